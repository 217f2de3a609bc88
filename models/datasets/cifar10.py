"""CIFAR-10, binary version: 50000 + 10000 colour images of 32x32 pixels (Krizhevsky 2009).

Six files of 10000 records: a byte for the label, then the red, green and blue planes, 1024 bytes each.
"""

import numpy as np

from spikeport.models.datasets.base import Dataset, Split, hold_out
from spikeport.models.datasets.local import Members, checked, download, find_local, open_members
from spikeport.models.errors import DataError

_URL = "https://www.cs.toronto.edu/~kriz/"
_ARCHIVE = "cifar-10-binary.tar.gz"
_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
_FOLDER = "cifar-10-batches-bin"
_RECORDS = 10_000
_SHAPE = (3, 32, 32)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load_cifar10(validation: int, seed: int) -> Dataset:
    """CIFAR-10 with its official test part, from the official archive or from its unpacked folder.

    Raises DataError where a file is missing or damaged.
    """
    path = find_local("cifar10", _ARCHIVE, _FOLDER)
    if path is not None and path.is_dir():
        # the publisher gives a checksum of the archive alone
        prefix, note = "", "unpacked files that no checksum covers: not the official files byte for byte"
    else:
        path = download("cifar10", _ARCHIVE, _URL + _ARCHIVE, _MD5) if path is None else checked(path, _MD5)
        prefix, note = f"{_FOLDER}/", "official archive, checksum verified"
    with open_members(path) as members:
        parts = [_read_batch(members, f"{prefix}data_batch_{number}.bin") for number in range(1, 6)]
        test_images, test_labels = _read_batch(members, f"{prefix}test_batch.bin")
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    kept, chosen = hold_out("cifar10", len(labels), validation, seed)

    def split(pixels: np.ndarray, classes: np.ndarray) -> Split:
        return Split(pixels / np.float32(255), classes.astype(np.int64))

    return Dataset(
        "cifar10",
        CIFAR10_CLASSES,
        train=split(images[kept], labels[kept]),
        validation=split(images[chosen], labels[chosen]),
        test=split(test_images, test_labels),
        note=note,
    )


def _read_batch(members: Members, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (n, 3, 32, 32) and labels uint8 (n,) of one file."""
    if name not in members.sizes:
        raise DataError(f"{members.path} holds no {name}. Unpack {_ARCHIVE} again.")
    size = _RECORDS * (1 + int(np.prod(_SHAPE)))
    if members.sizes[name] != size:
        raise DataError(f"{members.path}: {name} has {members.sizes[name]} bytes instead of {size}. Unpack it again.")
    records = np.frombuffer(members.read(name, size), np.uint8).reshape(_RECORDS, -1)
    if records[:, 0].max() >= len(CIFAR10_CLASSES):
        raise DataError(f"{members.path}: {name} holds labels outside 0..9; it is no file of CIFAR-10.")
    return records[:, 1:].reshape(-1, *_SHAPE), records[:, 0]
