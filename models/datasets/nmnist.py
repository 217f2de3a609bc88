"""N-MNIST: MNIST shown to a moving event camera, 34x34 pixels, about 300 ms (Orchard et al. 2015,
doi 10.3389/fnins.2015.00437).

Train.zip and Test.zip hold Train/<label>/<index>.bin. An event is five bytes: column, row, then the polarity bit above
23 bits of microseconds, big-endian. Row 240 marks an overflow of the timer: 2^13 us are added from there on, as the
authors' own reader does. The camera's motion is not taken out of the frames.
"""

import re
from pathlib import Path

import numpy as np

from spikeport.models.datasets.base import Dataset
from spikeport.models.datasets.events import Binning, Events, FrameSplits
from spikeport.models.datasets.local import Members, download, find_local, is_official, open_members
from spikeport.models.errors import DataError

_URL = "https://data.mendeley.com/public-files/datasets/468j46mzdv/files/"
_FILES = {
    "Train.zip": ("39c25547-014b-4137-a934-9d29fa53c7a0/file_downloaded", "20959b8e626244a1b502305a9e6e2031"),
    "Test.zip": ("05a4d654-7e03-4c15-bdfa-9bb2bcbea494/file_downloaded", "69ca8762b2fe404d9b9bad1103e97832"),
}
_SENSOR = (34, 34)
_OVERFLOW_ROW = 240
_OVERFLOW_US = 1 << 13
_RECORDING_LIMIT = 4 << 20  # bytes; 800,000 events in a third of a second


def load_nmnist(validation: int, seed: int, binning: Binning, subset: bool) -> Dataset:
    """N-MNIST with its official test part. Raises DataError where a file is missing or damaged."""
    shape = binning.shape(_SENSOR)
    (train_path, train_official), (test_path, test_official) = (_archive(name, subset) for name in _FILES)
    with open_members(train_path) as train, open_members(test_path) as test:
        train_names, test_names = _recordings(train, "Train"), _recordings(test, "Test")
        labels = [[int(name.split("/")[1]) for name in names] for names in (train_names, test_names)]
        splits = FrameSplits.empty("nmnist", labels[0], labels[1], validation, seed, shape)
        for members, names, rows in (
            (train, train_names, splits.train_rows),
            (test, test_names, splits.test_rows),
        ):
            for name, row in zip(names, rows, strict=True):
                events = read_nmnist_events(members.read(name, _RECORDING_LIMIT), f"{members.path}: {name}")
                binning.into(row, events, start=0)
    official = train_official and test_official
    return splits.dataset("nmnist", tuple("0123456789"), "official files, checksums verified" if official else None)


def _archive(name: str, subset: bool) -> tuple[Path, bool]:
    """Path of an archive and whether it is the official one."""
    location, md5 = _FILES[name]
    path = find_local("nmnist", name)
    if path is None:
        return download("nmnist", name, _URL + location, md5), True
    return path, is_official(path, md5, subset)


def _recordings(members: Members, part: str) -> list[str]:
    """Names of the recordings by rising index, which is their order in MNIST."""
    found = [(int(match[1]), name) for name in members.sizes if (match := re.fullmatch(rf"{part}/\d/(\d+)\.bin", name))]
    if not found:
        raise DataError(f"{members.path} holds no {part}/<label>/<index>.bin. Download it again.")
    return [name for _, name in sorted(found)]


def read_nmnist_events(raw: bytes, where: str) -> Events:
    """Events of one .bin file; `where` names it in errors. Raises DataError where it is damaged."""
    if len(raw) % 5:
        raise DataError(f"{where} is truncated: {len(raw)} bytes are no whole number of events of 5 bytes.")
    column, row, high, middle, low = np.frombuffer(raw, np.uint8).reshape(-1, 5).T.astype(np.int64)
    overflow = row == _OVERFLOW_ROW
    time = ((high & 0x7F) << 16 | middle << 8 | low) + _OVERFLOW_US * np.cumsum(overflow)
    events = Events(*(values[~overflow] for values in (column, row, high >> 7, time)))
    return events.check(where, _SENSOR)
