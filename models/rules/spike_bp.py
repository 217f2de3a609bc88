"""Spike-based backpropagation with leak correction (Lee et al., Front. Neurosci. 14:119, 2020).

The whole window has one derivative of the output by the net input for each neuron:

    n = number of spikes;   f = sum over its spikes of l^(steps between the spike and the window's end)
    a' = (1 [f > 1/1000] + ln(l) f / max(n, 1)) / threshold

l = 1 - 1/tau_mem is the leak. 1 / threshold is the derivative of a neuron without leak; the second term corrects it.
Errors enter at spikes only, the reset ends their way, and the leak is passed as it were 1:

    delta[t] = a' B[t_k] for t_(k-1) < t <= t_k, the next spike at or after t;   0 after the last spike

with B[t] = dL/ds[t].
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from spikeport.models.cuba_lif import CubaLIF, Window
from spikeport.models.errors import RecipeError
from spikeport.models.rules.rule import Rule

FORGOTTEN = 1e-3
"""A spike that has leaked below this share counts as none."""


@dataclass(frozen=True)
class SpikeBP(Rule):
    """Settings of the rule. leak_correction: off only to measure what it contributes."""

    title: ClassVar[str] = "spike-based BP"

    leak_correction: bool = True

    def check(self, neuron: CubaLIF) -> None:
        if neuron.reset != "zero":
            raise RecipeError('rule spike_bp is defined for neurons that reset to zero. Set network.reset = "zero".')
        if neuron.tau_syn != 1:
            raise RecipeError(
                "rule spike_bp is defined for neurons without a synaptic filter. Set network.tau_syn = 1."
            )
        if self.leak_correction and neuron.tau_mem == 1:
            raise RecipeError("rule spike_bp corrects for a leak that keeps something. Set network.tau_mem above 1.")

    def current_errors(
        self, window: Window, spike_errors: torch.Tensor, neuron: CubaLIF, threshold: float
    ) -> torch.Tensor:
        slope = activation_slope(window.spikes, neuron.voltage_keep, threshold, self.leak_correction)
        out = torch.empty_like(spike_errors)
        error = torch.zeros_like(spike_errors[0])
        for t in reversed(range(spike_errors.shape[0])):
            error = out[t] = torch.where(window.spikes[t].bool(), slope * spike_errors[t], error)
        return out


def activation_slope(spikes: torch.Tensor, leak: float, threshold: float, corrected: bool = True) -> torch.Tensor:
    """a' of each neuron, (batch, ...), from its spikes (steps, batch, ...) and the membrane's share kept a step."""
    remaining = torch.zeros_like(spikes[0])
    for s in spikes:
        remaining = leak * remaining + s
    slope = (remaining > FORGOTTEN).to(spikes.dtype)
    if corrected:
        slope = slope + math.log(leak) * remaining / spikes.sum(dim=0).clamp(min=1)
    return slope / threshold
