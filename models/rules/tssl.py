"""TSSL-BP: temporal spike sequence learning (Zhang & Li, NeurIPS 2020).

The error of a spike has two parts, carried backwards through a neuron's window by one state psi:

    q        = clip(1 / rise[t], 0, 8) where s[t], else 0                       all-or-none: only spikes carry errors
    delta    = q E[t] + psi p[t] q / tau_mem    where s[t]                      inter-neuron + intra-neuron (reset)
             = (1 - 1/tau_mem) psi              elsewhere                       intra-neuron (leak)
    psi      <- delta;   dL/du[t] = delta

E[t] comes from B[t] = dL/ds[t], the error behind the synaptic filters:

    author   E[t] = B[t]             the authors' code: an error of the spike's existence
    timing   E[t] = B[t] - B[t+1]    the spike moved by one step, the gradient that the paper's text describes

The authors' code multiplies kappa / (-tau_syn) by -1 / rise and by tau_syn; a true derivative of the filter by the
spike's time has the other sign after the onset, which "timing" has.

On quiet steps the dead-neuron rule (a switch) replaces dL/du[t] and leaves psi alone; the authors' code has it on for
all of training.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from spikeport.models.cuba_lif import CubaLIF, Window
from spikeport.models.errors import RecipeError
from spikeport.models.rules.rule import Rule, dead_neuron_errors, next_step

LARGEST_INVERSE_SLOPE = 8.0


@dataclass(frozen=True)
class TSSL(Rule):
    """Settings of the rule.

    mode: the error of a spike as in the authors' code, or the true timing gradient (see the module's text).
    dead_neuron_rule: surrogate error on quiet steps.
    """

    title: ClassVar[str] = "TSSL-BP"

    mode: Literal["author", "timing"] = "author"
    dead_neuron_rule: bool = True

    def check(self, neuron: CubaLIF) -> None:
        if neuron.reset != "zero":
            raise RecipeError('rule tssl is defined for neurons that reset to zero. Set network.reset = "zero".')

    def current_errors(
        self, window: Window, spike_errors: torch.Tensor, neuron: CubaLIF, threshold: float
    ) -> torch.Tensor:
        errors = spike_errors if self.mode == "author" else spike_errors - next_step(spike_errors)
        # a membrane that fell has no slope to divide by: its spike carries nothing
        inverse = torch.where(window.rise > 0, (1 / window.rise).clamp(max=LARGEST_INVERSE_SLOPE), 0.0)
        out = torch.empty_like(spike_errors)
        psi = torch.zeros_like(spike_errors[0])
        for t in reversed(range(spike_errors.shape[0])):
            at_spike = inverse[t] * (errors[t] + psi * window.membrane[t] / neuron.tau_mem)
            psi = out[t] = torch.where(window.spikes[t].bool(), at_spike, neuron.voltage_keep * psi)
        if not self.dead_neuron_rule:
            return out
        surrogate = dead_neuron_errors(window, spike_errors, neuron, threshold)
        return torch.where(surrogate.isnan(), out, surrogate)
