"""STBP: backpropagation through time with a surrogate for the derivative of the spike.

    dL/dp[t] = (B[t] - lam p[t]) f'(p[t] - threshold) + lam (1 - s[t])             reset "zero"
             = (B[t] - lam threshold) f'(p[t] - threshold) + lam                   reset "subtract"
    lam <- (1 - 1/tau_mem) dL/dp[t];   dL/du[t] = dL/dp[t]

with B[t] = dL/ds[t] and lam = dL/dv[t]. Without `through_reset` the reset's own dependence on the spike is left out
(the terms with lam times f').

Surrogates f'(x), of unit area, for a width w:

    rectangular  1/w where |x| < w/2            (Wu et al. 2018; w = 1 in MLF)
    triangular   max(0, 1 - |x|/w) / w
    arctan       1 / (w (1 + (pi x / w)^2))
    logistic     e^-z / (w (1 + e^-z)^2), z = |x| / w
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from spikeport.models.cuba_lif import CubaLIF, Window
from spikeport.models.rules.rule import Rule

Surrogate = Literal["rectangular", "triangular", "arctan", "logistic"]


@dataclass(frozen=True)
class STBP(Rule):
    """Settings of the rule.

    surrogate, width: the stand-in for the spike's derivative, in membrane units.
    through_reset: let errors pass through the reset's dependence on the spike.
    """

    title: ClassVar[str] = "STBP"

    surrogate: Surrogate = "rectangular"
    width: float = 1.0
    through_reset: bool = True

    def current_errors(
        self, window: Window, spike_errors: torch.Tensor, neuron: CubaLIF, threshold: float
    ) -> torch.Tensor:
        slope = surrogate_slope(window.membrane - threshold, self.surrogate, self.width)
        out = torch.empty_like(spike_errors)
        lam = torch.zeros_like(spike_errors[0])
        for t in reversed(range(spike_errors.shape[0])):
            kept = 1 - window.spikes[t] if neuron.reset == "zero" else 1.0
            cleared = window.membrane[t] if neuron.reset == "zero" else threshold
            spike_error = spike_errors[t] - lam * cleared if self.through_reset else spike_errors[t]
            out[t] = spike_error * slope[t] + lam * kept
            lam = neuron.voltage_keep * out[t]
        return out


def surrogate_slope(distance: torch.Tensor, surrogate: Surrogate, width: float) -> torch.Tensor:
    """f' at a distance p - threshold, elementwise."""
    x = distance.abs() / width
    match surrogate:
        case "rectangular":
            return (x < 0.5).to(distance.dtype) / width
        case "triangular":
            return (1 - x).clamp(min=0) / width
        case "arctan":
            return 1 / (width * (1 + (math.pi * x) ** 2))
        case "logistic":
            z = torch.exp(-x)
            return z / (width * (1 + z) ** 2)
