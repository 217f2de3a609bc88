"""Samples that the user gave as arrays, as a data set: no download.

A .npz file holds, by name, `x`: of a spiking network integers (samples, steps, *shape), spikes or payloads; of an ANN
values (samples, *shape) in 0..1. Optionally it holds `y`, the class of each sample, and `x_calibration`, further
samples on which quantisation is calibrated. A .npy file holds `x` alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spikeport.models.datasets.base import Dataset, Split
from spikeport.models.errors import DataError
from spikeport.models.files import atomic_path


@dataclass(frozen=True, eq=False)
class Arrays:
    """What such a file holds. labels and calibration are None where it has none."""

    x: np.ndarray
    labels: np.ndarray | None = None
    calibration: np.ndarray | None = None

    def samples(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name in the file and array of each set of samples."""
        yield "x", self.x
        if self.calibration is not None:
            yield "x_calibration", self.calibration


def read_arrays_file(path: Path) -> Arrays:
    """Read a file of spikes. Raises DataError naming what is missing or wrong."""
    arrays = _read(path, dimensions=3, shape="(samples, steps, ...)")
    for key, array in arrays.samples():
        if array.dtype.kind not in "biu":
            raise DataError(f"{path}: {key} is {array.dtype}; spikes are integers.")
        if int(array.min()) < 0:
            raise DataError(f"{path}: {key} holds negative numbers; a payload is 0 or more.")
    return arrays


def read_values_file(path: Path) -> Arrays:
    """Read a file of values in 0..1, as an ANN takes them. Raises DataError naming what is missing or wrong."""
    arrays = _read(path, dimensions=2, shape="(samples, ...)")
    for key, array in arrays.samples():
        if array.dtype.kind not in "biuf" or not (array.min() >= 0 and array.max() <= 1):
            found = f"{array.dtype} in {array.min()}..{array.max()}"
            raise DataError(f"{path}: {key} is {found}; an ANN's inputs are values in 0..1 (see --mean and --std).")
    calibration = None if arrays.calibration is None else arrays.calibration.astype(np.float32)
    return Arrays(arrays.x.astype(np.float32), arrays.labels, calibration)


def _read(path: Path, dimensions: int, shape: str) -> Arrays:
    try:
        with Path(path).open("rb") as stream:
            stored = np.load(stream, allow_pickle=False)
            given = {"x": stored} if isinstance(stored, np.ndarray) else {key: stored[key] for key in stored.files}
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except Exception as error:  # a damaged zip raises anything from zlib.error to KeyError
        raise DataError(f"{path} is no .npz or .npy file ({type(error).__name__}).") from None
    unknown = sorted(set(given) - {"x", "y", "x_calibration"})
    if "x" not in given or unknown:
        found = ", ".join(sorted(given)) or "nothing"
        raise DataError(f"{path} holds {found}; it takes x, and optionally y and x_calibration.")
    x, calibration, labels = given["x"], given.get("x_calibration"), given.get("y")
    for key, array in (("x", x), ("x_calibration", calibration)):
        if array is None:
            continue
        if array.ndim < dimensions or not array.size:
            raise DataError(f"{path}: {key} is of shape {array.shape}; it takes {shape} and a sample.")
        if array.shape[1:] != x.shape[1:]:
            raise DataError(f"{path}: a sample of x is of shape {x.shape[1:]}, but of {key} of {array.shape[1:]}.")
    if labels is not None and (labels.shape != x.shape[:1] or labels.dtype.kind not in "iu" or int(labels.min()) < 0):
        raise DataError(f"{path}: y is {labels.dtype} of shape {labels.shape}; it takes one class a sample of x.")
    return Arrays(x, labels, calibration)


def write_arrays_file(path: Path, arrays: Arrays) -> None:
    """Write arrays such that `read_arrays_file` reads them."""
    given: dict[str, Any] = {"x": arrays.x, "y": arrays.labels, "x_calibration": arrays.calibration}
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **{key: value for key, value in given.items() if value is not None})


def arrays_dataset(name: str, arrays: Arrays, classes: int, note: str) -> Dataset:
    """The arrays as a data set of frames (n, steps, channels, height, width); flat samples are images one pixel high.

    Without calibration samples the samples themselves stand in for them. Labels must be there.
    """
    x, calibration = arrays.x, arrays.x if arrays.calibration is None else arrays.calibration
    if arrays.labels is None:
        raise DataError(f"{name} holds no labels (y).")
    dtype = np.uint8 if max(int(x.max()), int(calibration.max())) < 256 else np.int32

    def split(frames: np.ndarray, labels: np.ndarray) -> Split:
        return Split(frames.reshape(*frames.shape[:2], 1, 1, -1).astype(dtype), labels.astype(np.int64))

    train = split(calibration, np.zeros(len(calibration)))
    validation = split(calibration[:1], np.zeros(1))  # nothing is selected on it
    test = split(x, arrays.labels)
    return Dataset(name, tuple(map(str, range(classes))), train, validation, test, note=note, temporal=True)
