"""How a decision is read from the spikes of the last population. One definition for every backend and the trainer."""

from typing import Literal

import numpy as np

ReadoutKind = Literal["count", "psc", "first_spike"]


def scores(kind: ReadoutKind, keep: float, spikes: np.ndarray) -> np.ndarray:
    """Score of each class, float64 (samples, classes), from spikes (samples, steps, classes).

    count: number of spikes. psc: sum over time of the spikes filtered with the per-step factor `keep`, so that an
    early spike weighs more. first_spike: minus the step of the first spike.
    """
    steps = spikes.shape[1]
    if kind == "first_spike":
        return -np.where(spikes.any(axis=1), spikes.argmax(axis=1), steps).astype(np.float64)
    # a spike at step t adds keep^0 + ... + keep^(steps - 1 - t) to the sum of the filtered spikes
    weight = np.ones(steps) if kind == "count" else np.cumsum(keep ** np.arange(steps))[::-1]
    return np.einsum("ntc,t->nc", spikes, weight)


def decide(kind: ReadoutKind, keep: float, spikes: np.ndarray) -> np.ndarray:
    """Class of each sample, int64 (samples,); ties go to the lower index."""
    return scores(kind, keep, spikes).argmax(axis=-1)
