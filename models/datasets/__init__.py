"""Data sets: official files, checked by checksum, split with a seed. One family a file:

digits       scikit-learn's digits, built in
idx          MNIST and Fashion-MNIST
cifar10      CIFAR-10, binary version
nmnist       N-MNIST, recordings of an event camera
dvs_gesture  DVS128 Gesture, recordings of an event camera
cifar10_dvs  CIFAR10-DVS, recordings of an event camera

Images are float32 (n, channels, height, width) in 0..1. Recordings are binned into frames, uint8 (n, steps, 2, height,
width), OFF events in channel 0 and ON events in channel 1 (`events.Binning`). Labels are int64 (n,).
"""

from typing import get_args

from spikeport.models.datasets.base import Dataset, Split
from spikeport.models.datasets.cifar10 import load_cifar10
from spikeport.models.datasets.cifar10_dvs import load_cifar10_dvs
from spikeport.models.datasets.digits import load_digits
from spikeport.models.datasets.dvs_gesture import load_dvs_gesture
from spikeport.models.datasets.events import Binning, FrameKind
from spikeport.models.datasets.idx import load_idx_set, read_idx
from spikeport.models.datasets.local import DATA_VARIABLE
from spikeport.models.datasets.nmnist import load_nmnist
from spikeport.models.errors import DataError

IMAGE_SETS = ("digits", "mnist", "fashion-mnist", "cifar10")
EVENT_SETS = ("nmnist", "dvs-gesture", "cifar10-dvs")

__all__ = ["DATA_VARIABLE", "EVENT_SETS", "IMAGE_SETS", "Binning", "Dataset", "Split", "load_dataset", "read_idx"]


def load_dataset(
    name: str,
    validation: int,
    seed: int,
    test: int | None = None,
    *,
    steps: int | None = None,
    bin_ms: float | None = None,
    events: FrameKind = "binary",
    downsample: int = 1,
    subset: bool = False,
) -> Dataset:
    """Load a data set by name, one of IMAGE_SETS or EVENT_SETS.

    Args:
        validation: samples taken from the training part for selection.
        seed: decides the split.
        test: test samples for sets that come without a split of their own (digits).
        steps: frames of a recording. This and all that follow are for event sets; images are not touched by them.
        bin_ms: length of a frame in milliseconds.
        events: "binary", one spike for any number of events, or "count", their number up to 255.
        downsample: side of the square of pixels that become one; divides the sides of the sensor.
        subset: use files that hold only a part of the official recordings; `Dataset.note` then says how many.

    Raises DataError where a file is missing, damaged or empty, or an argument does not fit the set.
    """
    if name in IMAGE_SETS:
        if name == "digits":
            return load_digits(validation, test or 360, seed)
        return load_cifar10(validation, seed) if name == "cifar10" else load_idx_set(name, validation, seed)
    if name not in EVENT_SETS:
        raise DataError(f"unknown data set {name!r}. Known: {', '.join(IMAGE_SETS + EVENT_SETS)}.")
    if steps is None or bin_ms is None:
        raise DataError(f"{name} holds recordings of an event camera: give `steps` and `bin_ms`, the length of a step.")
    if events not in get_args(FrameKind):
        raise DataError(f"unknown kind of events {events!r}. Known: {', '.join(get_args(FrameKind))}.")
    binning = Binning(steps, bin_ms, events, downsample)
    load = {"nmnist": load_nmnist, "dvs-gesture": load_dvs_gesture, "cifar10-dvs": load_cifar10_dvs}[name]
    return load(validation, seed, binning, subset)
