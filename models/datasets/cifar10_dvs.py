"""CIFAR10-DVS: 10000 images of CIFAR-10 moved on a screen before an event camera of 128x128 pixels
(Li et al. 2017, doi 10.3389/fnins.2017.00309).

Ten archives, airplane.zip and so on, hold <class>/cifar10_<class>_<0..999>.aedat in AEDAT 2.0. There is no official
test part: of each class the recordings 0 to 899 train and 900 to 999 test. A recording is binned from its first event.
"""

import re
from contextlib import ExitStack
from pathlib import PurePosixPath

from spikeport.models.datasets.aedat import DVS128, read_aedat2
from spikeport.models.datasets.base import Dataset
from spikeport.models.datasets.cifar10 import CIFAR10_CLASSES
from spikeport.models.datasets.events import Binning, FrameSplits
from spikeport.models.datasets.local import Members, find_by_hand, is_official, open_members
from spikeport.models.errors import DataError

_PAGE = "https://figshare.com/articles/dataset/CIFAR10-DVS_New/4724671"
_MD5 = {
    "airplane": "0afd5c4bf9ae06af762a77b180354fdd",
    "automobile": "8438dfeba3bc970c94962d995b1b9bdd",
    "bird": "a9c207c91c55b9dc2002dc21c684d785",
    "cat": "52c63c677c2b15fa5146a8daf4d56687",
    "deer": "b6bf21f6c04d21ba4e23fc3e36c8a4a3",
    "dog": "f379ebdf6703d16e0a690782e62639c3",
    "frog": "cad6ed91214b1c7388a5f6ee56d08803",
    "horse": "e7cbbf77bec584ffbf913f00e682782a",
    "ship": "41c7bd7d6b251be82557c6cce9a7d5c9",
    "truck": "89f3922fd147d9aeff89e76a2b0b70a7",
}
_PER_CLASS = 1000
_TRAIN_PER_CLASS = 900
_RECORDING_LIMIT = 256 << 20  # bytes


def load_cifar10_dvs(validation: int, seed: int, binning: Binning, subset: bool) -> Dataset:
    """CIFAR10-DVS from its archives or from its unpacked folders. Raises DataError where one is missing or damaged."""
    shape = binning.shape(DVS128)
    paths = [find_by_hand("cifar10-dvs", _PAGE, f"{name}.zip", name) for name in CIFAR10_CLASSES]
    checks = [path.is_file() and is_official(path, _MD5[path.stem], subset) for path in paths]
    with ExitStack() as stack:
        train: list[tuple[int, Members, str]] = []
        test: list[tuple[int, Members, str]] = []
        for label, path in enumerate(paths):
            members = stack.enter_context(open_members(path))
            found = _recordings(members, CIFAR10_CLASSES[label])
            if len(found) < _PER_CLASS and not subset:
                raise DataError(
                    f"{path} holds {len(found)} recordings of {_PER_CLASS}.\n"
                    "Download it again, or set subset = true to use those that it holds."
                )
            for index in sorted(found):
                (train if index < _TRAIN_PER_CLASS else test).append((label, members, found[index]))
        labels = [[label for label, _, _ in part] for part in (train, test)]
        splits = FrameSplits.empty("cifar10-dvs", labels[0], labels[1], validation, seed, shape)
        for part, rows in ((train, splits.train_rows), (test, splits.test_rows)):
            for (_, members, name), row in zip(part, rows, strict=True):
                events = read_aedat2(members.read(name, _RECORDING_LIMIT), f"{members.path}: {name}")
                binning.into(row, events, start=events.time.min())
    whole = "all recordings, no checksum verified" if len(train) + len(test) == _PER_CLASS * len(paths) else None
    return splits.dataset(
        "cifar10-dvs", CIFAR10_CLASSES, "official files, checksums verified" if all(checks) else whole
    )


def _recordings(members: Members, name: str) -> dict[int, str]:
    """Names of the recordings of a class by index."""
    matches = [(re.fullmatch(rf"cifar10_{name}_(\d+)\.aedat", PurePosixPath(m).name), m) for m in members.sizes]
    return {int(match[1]): member for match, member in matches if match and int(match[1]) < _PER_CLASS}
