"""Recordings of event cameras, binned into frames: what the event data sets share."""

import math
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spikeport.models.datasets.base import Dataset, Split, hold_out
from spikeport.models.errors import DataError

FrameKind = Literal["binary", "count"]


@dataclass(frozen=True, eq=False)
class Events:
    """Events of a recording, int64 (n,) each: column, row from the top, polarity (0 OFF, 1 ON), microseconds."""

    x: np.ndarray
    y: np.ndarray
    polarity: np.ndarray
    time: np.ndarray

    def check(self, where: str, sensor: tuple[int, int]) -> "Events":
        """These events. Raises DataError where there are none or one lies outside the sensor (height, width)."""
        if not len(self.time):
            raise DataError(f"{where} holds no events. Download it again.")
        height, width = sensor
        if min(self.x.min(), self.y.min()) < 0 or self.x.max() >= width or self.y.max() >= height:
            raise DataError(f"{where} holds events outside the sensor of {width}x{height} pixels. Download it again.")
        return self


@dataclass(frozen=True)
class Binning:
    """How a recording becomes frames uint8 (steps, 2, height / downsample, width / downsample).

    Step t holds the events of [start + t bin_ms, start + (t + 1) bin_ms); later events are left out.

    events: "binary", one spike for any number of events of a bin, or "count", their number up to 255.
    """

    steps: int
    bin_ms: float
    events: FrameKind = "binary"
    downsample: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.downsample < 1 or not (0 < self.bin_ms < math.inf):
            raise DataError(
                f"steps = {self.steps}, bin_ms = {self.bin_ms}, downsample = {self.downsample}: all must be positive."
            )

    def shape(self, sensor: tuple[int, int]) -> tuple[int, int, int, int]:
        """Shape of the frames of one recording. Raises DataError where `downsample` does not divide the sensor."""
        if any(side % self.downsample for side in sensor):
            raise DataError(f"downsample = {self.downsample} does not divide the sensor's {sensor[1]}x{sensor[0]}.")
        return (self.steps, 2, sensor[0] // self.downsample, sensor[1] // self.downsample)

    def into(self, frames: np.ndarray, events: Events, start: float, stop: float = math.inf) -> None:
        """Write the events from `start` up to `stop`, in microseconds, into zeroed contiguous frames of `shape`."""
        step = np.floor((events.time - start) / (1000 * self.bin_ms))
        kept = (step >= 0) & (step < self.steps) & (events.time < stop)
        height, width = frames.shape[2:]
        row, column = events.y[kept] // self.downsample, events.x[kept] // self.downsample
        index = ((step[kept].astype(np.int64) * 2 + events.polarity[kept]) * height + row) * width + column
        flat = frames.reshape(-1)
        if self.events == "binary":
            flat[index] = 1
        else:
            flat[:] = np.minimum(np.bincount(index, minlength=flat.size), 255)


@dataclass(frozen=True, eq=False)
class FrameSplits:
    """The empty frames of a data set: `train_rows[i]` and `test_rows[i]` are those of the i-th recording of a part.

    Readers take the recordings in the order of their archive and write each straight to its place in its split.
    """

    train: Split
    validation: Split
    test: Split
    train_rows: list[np.ndarray]
    test_rows: list[np.ndarray]

    @staticmethod
    def empty(
        name: str,
        train_labels: list[int],
        test_labels: list[int],
        validation: int,
        seed: int,
        frame_shape: tuple[int, ...],
    ) -> "FrameSplits":
        """Raises DataError where a part has no recordings, or where the frames exceed this machine's memory."""
        for part, labels in (("training", train_labels), ("test", test_labels)):
            if not labels:
                raise DataError(f"{name}: there are no {part} recordings. Download the official files again.")
        needed = (len(train_labels) + len(test_labels)) * math.prod(frame_shape)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > memory:
            raise DataError(
                f"the frames of {name} need {needed / 2**30:.1f} GiB and this machine has {memory / 2**30:.1f}. "
                "Take fewer steps or a larger downsample."
            )
        kept, chosen = hold_out(name, len(train_labels), validation, seed)

        def split(labels: np.ndarray) -> Split:
            return Split(np.zeros((len(labels), *frame_shape), np.uint8), labels)

        known = np.array(train_labels, np.int64)
        train, held_out, test = split(known[kept]), split(known[chosen]), split(np.array(test_labels, np.int64))
        rows = dict(zip(kept.tolist(), train.images, strict=True))
        rows |= dict(zip(chosen.tolist(), held_out.images, strict=True))
        return FrameSplits(train, held_out, test, [rows[i] for i in range(len(known))], list(test.images))

    def dataset(self, name: str, class_names: tuple[str, ...], complete: str | None) -> Dataset:
        """The data set of the filled frames; `complete` is its note, None for a subset."""
        subset = f"subset: {len(self.train_rows)} training, {len(self.test_rows)} test recordings"
        return Dataset(
            name, class_names, self.train, self.validation, self.test, note=complete or subset, temporal=True
        )
