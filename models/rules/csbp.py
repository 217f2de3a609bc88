"""CSBP (reconstructed): cross-spike error backpropagation for LIF neurons that fire several times.

After Zeng, Chen, Li, Chen, 计算机应用研究 41(7):2134-2140, 2024. Only the abstract is public, so this formulation is
ours. It is exact in continuous time: the tests hold it against finite differences of spike times.

A neuron's loss depends on its spike times t_1 < t_2 < ... Two derivatives carry the error of a spike:

    DSFT   d t_k / d V(t_k)     = -1 / V'(t_k)                      the membrane's slope at the spike
    DBSFT  d t_k / d t_(k-1)    = I(t_(k-1)) E_k / V'(t_k)          reset to zero: a later reset removes charge I dt
                                = (threshold / tau_mem) E_k / V'    reset by subtraction
    with E_k = exp(-(t_k - t_(k-1)) / tau_mem)

In steps, one backward sweep per neuron with a single state, lam = dL/dv[t] (v after reset):

    if s[t]:  G = g[t] - lam u[t]                 reset "zero";      G = g[t] - lam threshold / tau_mem  "subtract"
              delta = -G / max(rise[t], floor)    reset "zero";      lam - G / max(rise[t], floor)       "subtract"
    else:     delta = lam
    lam <- (1 - 1/tau_mem) delta;   dL/du[t] = delta

g[t] = dL/d(time of a spike at t), from B[t] = dL/ds[t], the error that arrives through the linear maps and synaptic
filters behind:

    shift       g[t] = B[t+1] - B[t]     the spike moved by one step, onset jump of the filter included; exact as h -> 0
    existence   g[t] = -B[t]             the spike moved out of the window: what a coarse grid of few steps rewards

Timing gradients cannot create a first spike. The dead-neuron rule (a switch) therefore gives quiet steps, where the
filtered output is below 1 / (4 tau_syn), delta = B[t] f'(p[t] - threshold), with f a logistic of width 0.2.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from spikeport.models.cuba_lif import CubaLIF, Window
from spikeport.models.rules.rule import Rule, dead_neuron_errors, next_step


@dataclass(frozen=True)
class CSBP(Rule):
    """Settings of the rule.

    spike_error: how the error at a spike is read (see the module's text).
    slope_floor: lower bound of the membrane's rise a step; keeps 1/V' finite at grazing spikes.
    across_spikes: DBSFT on or off (off only to measure what it contributes).
    dead_neuron_rule: surrogate error on quiet steps; off in exact gradient checks.
    """

    title: ClassVar[str] = "CSBP (reconstructed)"

    spike_error: Literal["existence", "shift"] = "existence"
    slope_floor: float = 0.5
    across_spikes: bool = True
    dead_neuron_rule: bool = True

    def current_errors(
        self, window: Window, spike_errors: torch.Tensor, neuron: CubaLIF, threshold: float
    ) -> torch.Tensor:
        time_errors = spike_time_errors(spike_errors, self.spike_error)
        out = torch.empty_like(spike_errors)
        lam = torch.zeros_like(spike_errors[0])
        for t in reversed(range(spike_errors.shape[0])):
            lost = window.current[t] if neuron.reset == "zero" else threshold / neuron.tau_mem
            total = time_errors[t] - lam * lost if self.across_spikes else time_errors[t]
            through_spike = -total / window.rise[t].clamp(min=self.slope_floor)
            if neuron.reset == "subtract":
                through_spike = through_spike + lam
            out[t] = torch.where(window.spikes[t].bool(), through_spike, lam)
            lam = neuron.voltage_keep * out[t]
        if not self.dead_neuron_rule:
            return out
        surrogate = dead_neuron_errors(window, spike_errors, neuron, threshold)
        return torch.where(surrogate.isnan(), out, surrogate)


def spike_time_errors(spike_errors: torch.Tensor, reading: str) -> torch.Tensor:
    """dL/d(spike time) for a spike at each step, from B = dL/ds, (steps, batch, ...)."""
    return -spike_errors if reading == "existence" else next_step(spike_errors) - spike_errors
