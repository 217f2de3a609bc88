"""MNIST and Fashion-MNIST: 60000 + 10000 grey images of 28x28 pixels as gzipped idx files.

LeCun, Cortes, Burges 1998; Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747.
"""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spikeport.models.datasets.base import Dataset, Split, hold_out
from spikeport.models.datasets.local import official_file
from spikeport.models.errors import DataError


@dataclass(frozen=True)
class IdxSet:
    """Where the four files are and their checksums: training images, training labels, test images, test labels."""

    url: str
    md5: dict[str, str]
    class_names: tuple[str, ...]


IDX_SETS = {
    "mnist": IdxSet(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        tuple("0123456789"),
    ),
    "fashion-mnist": IdxSet(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        (
            "T-shirt/top",
            "trouser",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
    ),
}


def load_idx_set(name: str, validation: int, seed: int) -> Dataset:
    """A set of IDX_SETS with its official test part. Raises DataError where a file is missing or damaged."""
    source = IDX_SETS[name]
    paths = [official_file(name, file, source.url + file, md5) for file, md5 in source.md5.items()]
    images, labels, test_images, test_labels = (read_idx(path) for path in paths)
    for path, pixels, classes in ((paths[0], images, labels), (paths[2], test_images, test_labels)):
        if pixels.shape != (len(classes), 28, 28) or classes.ndim != 1:
            raise DataError(f"{path} holds {pixels.shape}, not 28x28 images for labels {classes.shape}.")
    kept, chosen = hold_out(name, len(labels), validation, seed)

    def split(pixels: np.ndarray, classes: np.ndarray) -> Split:
        return Split((pixels / np.float32(255))[:, None], classes.astype(np.int64))

    return Dataset(
        name,
        source.class_names,
        train=split(images[kept], labels[kept]),
        validation=split(images[chosen], labels[chosen]),
        test=split(test_images, test_labels),
        note="official files, checksums verified",
    )


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
