"""How a decision is read from the last population: one definition for every backend and the trainer.

The kinds count, psc and first_spike read its spikes, uint8 (samples, steps, classes). The kind membrane reads v of a
population that only integrates, (samples, classes), as it stands after the last step of a sample.
"""

from typing import Literal

import numpy as np

ReadoutKind = Literal["count", "psc", "first_spike", "membrane"]


def scores(kind: ReadoutKind, keep: float, read: np.ndarray) -> np.ndarray:
    """Score of each class, float64 (samples, classes), from what the kind reads.

    count: number of spikes. psc: sum over time of the spikes filtered with the per-step factor `keep`, so that an
    early spike weighs more. first_spike: minus the step of the first spike. membrane: v itself.

    Raises ValueError for spikes where the kind reads membranes, and the other way round.
    """
    expected = 2 if kind == "membrane" else 3
    if read.ndim != expected:
        raise ValueError(f"the readout {kind!r} reads {expected} dimensions, not {read.ndim}.")
    if kind == "membrane":
        return read.astype(np.float64)
    steps = read.shape[1]
    if kind == "first_spike":
        return -np.where(read.any(axis=1), read.argmax(axis=1), steps).astype(np.float64)
    # a spike at step t adds keep^0 + ... + keep^(steps - 1 - t) to the sum of the filtered spikes
    weight = np.ones(steps) if kind == "count" else np.cumsum(keep ** np.arange(steps))[::-1]
    return np.einsum("ntc,t->nc", read, weight)


def decide(kind: ReadoutKind, keep: float, read: np.ndarray) -> np.ndarray:
    """Class of each sample, int64 (samples,); ties go to the lower index."""
    return scores(kind, keep, read).argmax(axis=-1)
