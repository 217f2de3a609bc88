"""MLF: multi-level firing on STBP (Feng et al., IJCAI 2022).

A neuron has several thresholds, each with a membrane of its own and all fed by the same input; it sends the sum of
their spikes. Errors pass every level through a rectangular surrogate of width 1, so that together the levels cover more
of the membrane's range than one threshold does, and through the reset.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from spikeport.models.rules.stbp import STBP, Surrogate


@dataclass(frozen=True)
class MLF(STBP):
    """The rule of Feng et al.; it has no settings. Which neurons have several thresholds is the network's choice."""

    title: ClassVar[str] = "MLF"

    surrogate: Surrogate = field(default="rectangular", init=False)
    width: float = field(default=1.0, init=False)
    through_reset: bool = field(default=True, init=False)
