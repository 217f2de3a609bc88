"""DVS128 Gesture: eleven hand and arm gestures of 29 people before an event camera of 128x128 pixels
(Amir et al., CVPR 2017).

A trial is an AEDAT 3.1 file, user01_fluorescent.aedat, with a table user01_fluorescent_labels.csv of its gestures:
class 1..11, start and end in microseconds. Each gesture is one sample, binned from its start. trials_to_train.txt and
trials_to_test.txt name the trials of the official parts: users 1 to 23 and 24 to 29.
"""

import re
from pathlib import PurePosixPath

import numpy as np

from spikeport.models.datasets.aedat import DVS128, read_aedat3
from spikeport.models.datasets.base import Dataset
from spikeport.models.datasets.events import Binning, FrameSplits
from spikeport.models.datasets.local import Members, find_by_hand, is_official, open_members
from spikeport.models.errors import DataError

_ARCHIVE = "DvsGesture.tar.gz"
_FOLDER = "DvsGesture"
_MD5 = "8a5c71fb11e24e5ca5b11866ca6c00a1"
_PAGE = "https://ibm.ent.box.com/s/3hiq58ww1pbbjrinh367ykfdf60xsfm8/folder/50167556794"
_CLASSES = (
    "hand clapping",
    "right hand wave",
    "left hand wave",
    "right arm clockwise",
    "right arm counter clockwise",
    "left arm clockwise",
    "left arm counter clockwise",
    "arm roll",
    "air drums",
    "air guitar",
    "other gestures",
)
_TRIAL_LIMIT = 1 << 30  # bytes
_TEXT_LIMIT = 1 << 20

Gesture = tuple[int, int, int]
"""Class from 0, start and end in microseconds."""


def load_dvs_gesture(validation: int, seed: int, binning: Binning, subset: bool) -> Dataset:
    """DVS128 Gesture with its official test part, from the archive or from its unpacked folder.

    Raises DataError where a file is missing or damaged.
    """
    shape = binning.shape(DVS128)
    path = find_by_hand("dvs-gesture", _PAGE, _ARCHIVE, _FOLDER)
    verified = path.is_file() and is_official(path, _MD5, subset)
    with open_members(path) as members:
        by_name = {PurePosixPath(name).name: name for name in members.sizes}
        parts, absent = [], 0
        for part in ("train", "test"):
            listed = _trials(members, by_name, part)
            there = [trial for trial in listed if trial in by_name]
            absent += len(listed) - len(there)
            if len(there) < len(listed) and not subset:
                missing = next(trial for trial in listed if trial not in by_name)
                raise DataError(f"{path} holds no {missing}. Download it again, or set subset = true to do without.")
            parts.append({trial: _gestures(members, by_name, trial) for trial in there})
        if parts[0].keys() & parts[1].keys():
            raise DataError(f"{path}: trials_to_train.txt and trials_to_test.txt share a trial. Download it again.")
        labels = [[gesture[0] for gestures in part.values() for gesture in gestures] for part in parts]
        splits = FrameSplits.empty("dvs-gesture", labels[0], labels[1], validation, seed, shape)
        wanted: dict[str, list[tuple[Gesture, np.ndarray]]] = {}
        for trials, rows in zip(parts, (splits.train_rows, splits.test_rows), strict=True):
            free = iter(rows)
            wanted |= {trial: [(gesture, next(free)) for gesture in gestures] for trial, gestures in trials.items()}
        for name in members.sizes:  # in the archive's order: going back in a gzip file means starting anew
            trial = PurePosixPath(name).name
            if trial in wanted and by_name[trial] == name:
                events = read_aedat3(members.read(name, _TRIAL_LIMIT), f"{path}: {name}")
                for (_, start, stop), row in wanted[trial]:
                    binning.into(row, events, start, stop)
    whole = "unpacked files, no checksum verified" if path.is_dir() and not absent else None
    return splits.dataset("dvs-gesture", _CLASSES, "official files, checksums verified" if verified else whole)


def _text(members: Members, by_name: dict[str, str], name: str) -> list[str]:
    """Lines of a text file."""
    if name not in by_name:
        raise DataError(f"{members.path} holds no {name}. Download it again.")
    try:
        return members.read(by_name[name], _TEXT_LIMIT).decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise DataError(f"{members.path}: {name} is no text. Download it again.") from None


def _trials(members: Members, by_name: dict[str, str], part: str) -> list[str]:
    """Names of the trials of a part, in the order of its list."""
    name = f"trials_to_{part}.txt"
    trials = [line.strip() for line in _text(members, by_name, name) if line.strip()]
    for trial in trials:
        if not re.fullmatch(r"user\d+_\w+\.aedat", trial):
            raise DataError(f"{members.path}: {name} lists {trial[:80]!r}, which names no trial. Download it again.")
    if len(set(trials)) != len(trials):
        raise DataError(f"{members.path}: {name} lists a trial twice. Download it again.")
    return trials


def _gestures(members: Members, by_name: dict[str, str], trial: str) -> list[Gesture]:
    """The gestures of a trial."""
    name = f"{trial.removesuffix('.aedat')}_labels.csv"
    gestures = []
    for line in _text(members, by_name, name)[1:]:
        if not line.strip():
            continue
        match = re.fullmatch(r"(\d{1,4}),(\d{1,18}),(\d{1,18})", line.strip())
        if not match or not 1 <= int(match[1]) <= len(_CLASSES) or int(match[3]) <= int(match[2]):
            raise DataError(
                f"{members.path}: {name} holds {line.strip()[:80]!r}, which is no gesture. Download it again."
            )
        gestures.append((int(match[1]) - 1, int(match[2]), int(match[3])))
    return gestures
