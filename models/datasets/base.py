"""What every data set is, and the split that holds out validation samples."""

from dataclasses import dataclass

import numpy as np

from spikeport.models.errors import DataError


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels of one split."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set with its three splits. `note` says what a reader of its figures must know.

    temporal: the images carry a step axis, (n, steps, channels, height, width).
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    note: str = ""
    temporal: bool = False

    def __post_init__(self) -> None:
        rank = 5 if self.temporal else 4
        for name in ("train", "validation", "test"):
            split: Split = getattr(self, name)
            if not len(split):
                raise DataError(f"data set {self.name!r}: the {name} split is empty.")
            if len(split.images) != len(split.labels):
                raise DataError(f"data set {self.name!r}: {len(split.images)} images but {len(split.labels)} labels.")
            if split.images.ndim != rank or split.images.shape[1:] != self.train.images.shape[1:]:
                raise DataError(
                    f"data set {self.name!r}: the {name} images have the shape {split.images.shape}; all splits need "
                    f"(n, {'steps, ' if self.temporal else ''}channels, height, width), equal but for n."
                )
            # an integer is finite, and the test would take as much memory again as all frames of a recording set
            if split.images.dtype.kind not in "biu" and not np.isfinite(split.images).all():
                raise DataError(f"data set {self.name!r}: the {name} images hold values that are not finite numbers.")
            if split.labels.min() < 0 or split.labels.max() >= len(self.class_names):
                raise DataError(f"data set {self.name!r}: labels outside 0..{len(self.class_names) - 1} in {name}.")

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image, or of one step of a recording: (channels, height, width)."""
        return tuple(self.train.images.shape[2 if self.temporal else 1 :])


def hold_out(name: str, samples: int, validation: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training samples to train on and of the `validation` ones that are held out.

    Raises DataError where none is left to train on.
    """
    if validation >= samples:
        raise DataError(f"{name} has {samples} training samples; {validation} held out leave none to train on.")
    order = np.random.default_rng(seed).permutation(samples)
    return order[validation:], order[:validation]
