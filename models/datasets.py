"""Data sets: official files, checked by checksum, split with a seed. Images are float32 (n, channels, height, width)
in 0..1, labels int64 (n,)."""

import gzip
import hashlib
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spikeport.models.errors import DataError

DATA_VARIABLE = "SPIKEPORT_DATA"


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels of one split."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set with its three splits. `note` says what a reader of its figures must know."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            split: Split = getattr(self, name)
            if not len(split):
                raise DataError(f"data set {self.name!r}: the {name} split is empty.")
            if len(split.images) != len(split.labels):
                raise DataError(f"data set {self.name!r}: {len(split.images)} images but {len(split.labels)} labels.")
            if not np.isfinite(split.images).all():
                raise DataError(f"data set {self.name!r}: the {name} images hold values that are not finite numbers.")
            if split.labels.min() < 0 or split.labels.max() >= len(self.class_names):
                raise DataError(f"data set {self.name!r}: labels outside 0..{len(self.class_names) - 1} in {name}.")

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.train.images.shape[1:])


def load_dataset(name: str, validation: int, seed: int, test: int | None = None) -> Dataset:
    """Load a data set by name ("digits" or "mnist").

    Args:
        validation: samples taken from the training part for selection.
        seed: decides the split.
        test: test samples for sets that come without a split of their own (digits).

    Raises DataError where a file is missing, damaged or empty.
    """
    if name == "digits":
        return _digits(validation, test or 360, seed)
    if name == "mnist":
        return _mnist(validation, seed)
    raise DataError(f"unknown data set {name!r}. Known: digits, mnist.")


def _digits(validation: int, test: int, seed: int) -> Dataset:
    """scikit-learn's digits: 1797 images of 8x8 pixels in 17 grey levels; ships with scikit-learn."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = (bunch.images / 16).astype(np.float32)[:, None]
    labels = bunch.target.astype(np.int64)
    if validation + test >= len(labels):
        raise DataError(f"digits has {len(labels)} samples; {validation} + {test} held out leave none to train on.")
    try:
        rest, held_out = train_test_split(np.arange(len(labels)), test_size=test, stratify=labels, random_state=seed)
        kept, chosen = train_test_split(rest, test_size=validation, stratify=labels[rest], random_state=seed)
    except ValueError:
        raise DataError(
            f"digits cannot be split into {test} test and {validation} validation samples; each part needs at least "
            "one sample of each of the 10 classes."
        ) from None
    train, chosen_split, test_split = (Split(images[index], labels[index]) for index in (kept, chosen, held_out))
    return Dataset(
        "digits",
        tuple("0123456789"),
        train,
        chosen_split,
        test_split,
        note="scikit-learn digits, stratified split by seed",
    )


_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}


def _mnist(validation: int, seed: int) -> Dataset:
    paths = {name: _official_file("mnist", name, _MNIST_URL, md5) for name, md5 in _MNIST_MD5.items()}
    images, labels, test_images, test_labels = (read_idx(path) for path in paths.values())
    if validation >= len(labels):
        raise DataError(f"mnist has {len(labels)} training samples; {validation} held out leave none to train on.")
    order = np.random.default_rng(seed).permutation(len(labels))
    kept, chosen = order[validation:], order[:validation]

    def split(pixels: np.ndarray, classes: np.ndarray) -> Split:
        return Split((pixels / np.float32(255))[:, None], classes.astype(np.int64))

    return Dataset(
        "mnist",
        tuple("0123456789"),
        train=split(images[kept], labels[kept]),
        validation=split(images[chosen], labels[chosen]),
        test=split(test_images, test_labels),
        note="official files, checksums verified",
    )


def _official_file(dataset: str, name: str, url: str, md5: str) -> Path:
    """The official file: from the folder that SPIKEPORT_DATA names, else downloaded once and checked."""
    folder = os.environ.get(DATA_VARIABLE)
    if folder:
        for candidate in (Path(folder) / dataset / name, Path(folder) / name):
            if candidate.is_file():
                return _checked(candidate, md5)
        raise DataError(f"{DATA_VARIABLE}={folder} holds no {dataset}/{name}. Put the official file there or unset it.")
    import pooch

    try:
        return Path(pooch.retrieve(url + name, f"md5:{md5}", fname=name, path=pooch.os_cache("spikeport") / dataset))
    except Exception as error:  # requests, urllib3 and pooch raise a dozen unrelated types
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise DataError(
            f"cannot download {url}{name} ({reason}).\n"
            f"Set {DATA_VARIABLE} to a folder that holds {dataset}/{name}, or try again with a network."
        ) from None


def _checked(path: Path, md5: str) -> Path:
    try:
        found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from None
    if found != md5:
        raise DataError(f"{path} is damaged or not the official file (md5 {found}, expected {md5}). Download it again.")
    return path


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes. Raises DataError where it is truncated or of another type."""
    try:
        with gzip.open(path) as stream:
            raw = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is truncated or no gzip file ({error}). Download it again.") from None
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an idx file of unsigned bytes.")
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", rank, 4) if len(raw) >= 4 + 4 * rank else np.empty(0)
    if rank == 0 or shape.size != rank or len(raw) != 4 + 4 * rank + math.prod(int(extent) for extent in shape):
        raise DataError(f"{path} is truncated: its {len(raw)} bytes do not match its header.")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape.astype(int))
