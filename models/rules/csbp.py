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
from typing import Any, Literal

import torch

from spikeport.models.cuba_lif import CubaLIF, Window, filter_errors, filter_spikes, simulate
from spikeport.models.rules import csbp_compiled

SURROGATE_WIDTH = 0.2
SURROGATE_CLIP = 8.0


@dataclass(frozen=True)
class CSBP:
    """Settings of the rule.

    spike_error: how the error at a spike is read (see the module's text).
    slope_floor: lower bound of the membrane's rise a step; keeps 1/V' finite at grazing spikes.
    across_spikes: DBSFT on or off (off only to measure what it contributes).
    dead_neuron_rule: surrogate error on quiet steps; off in exact gradient checks.
    eager: keep to plain torch operations on the CPU too (the readable reference).
    """

    spike_error: Literal["existence", "shift"] = "existence"
    slope_floor: float = 0.5
    across_spikes: bool = True
    dead_neuron_rule: bool = True
    eager: bool = False

    def __call__(self, x: torch.Tensor, neuron: CubaLIF) -> torch.Tensor:
        """Spikes of a window, (steps, batch, ...), with CSBP as their backward pass."""
        return _CsbpWindow.apply(x, neuron, self)


class _CsbpWindow(torch.autograd.Function):
    """Eager on any device; on the CPU the compiled window of `csbp_compiled`, unless the rule says `eager`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, neuron: CubaLIF, rule: CSBP) -> torch.Tensor:
        ctx.neuron, ctx.rule = neuron, rule
        if rule.eager or x.device.type != "cpu":
            window = simulate(x, neuron)
            ctx.save_for_backward(window.spikes, window.current, window.membrane, window.rise)
            return window.spikes
        spikes, current, membrane = csbp_compiled.forward(x, neuron)
        ctx.save_for_backward(current, membrane)
        return spikes

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        neuron: CubaLIF = ctx.neuron
        rule: CSBP = ctx.rule
        if len(ctx.saved_tensors) == 4:
            errors = current_errors(Window(*ctx.saved_tensors), gradients[0], neuron, rule)
            return filter_errors(errors, neuron.tau_syn), None, None
        current, membrane = ctx.saved_tensors
        gradient = csbp_compiled.backward(
            gradients[0],
            current,
            membrane,
            neuron,
            floor=rule.slope_floor,
            shift=rule.spike_error == "shift",
            across=rule.across_spikes,
            dead=rule.dead_neuron_rule,
            width=SURROGATE_WIDTH,
            clip=SURROGATE_CLIP,
        )
        return gradient, None, None


def current_errors(window: Window, spike_errors: torch.Tensor, neuron: CubaLIF, rule: CSBP) -> torch.Tensor:
    """dL/du of a window, from B = dL/ds; both (steps, batch, ...)."""
    time_errors = spike_time_errors(spike_errors, rule.spike_error)
    quiet = None
    if rule.dead_neuron_rule:
        quiet = filter_spikes(window.spikes, neuron.tau_syn) < 1 / (4 * neuron.tau_syn)
        surrogate = spike_errors * logistic_slope(window.membrane - neuron.threshold)
    out = torch.empty_like(spike_errors)
    lam = torch.zeros_like(spike_errors[0])
    for t in reversed(range(spike_errors.shape[0])):
        fired = window.spikes[t].bool()
        lost = window.current[t] if neuron.reset == "zero" else neuron.threshold / neuron.tau_mem
        total = time_errors[t] - lam * lost if rule.across_spikes else time_errors[t]
        through_spike = -total / window.rise[t].clamp(min=rule.slope_floor)
        if neuron.reset == "subtract":
            through_spike = through_spike + lam
        delta = torch.where(fired, through_spike, lam)
        lam = neuron.voltage_keep * delta
        out[t] = delta if quiet is None else torch.where(quiet[t], surrogate[t], delta)
    return out


def spike_time_errors(spike_errors: torch.Tensor, reading: str) -> torch.Tensor:
    """dL/d(spike time) for a spike at each step, from B = dL/ds, (steps, batch, ...)."""
    if reading == "existence":
        return -spike_errors
    later = torch.cat([spike_errors[1:], torch.zeros_like(spike_errors[:1])])
    return later - spike_errors


def logistic_slope(distance: torch.Tensor) -> torch.Tensor:
    """f'(x) of a logistic f of width 0.2, as TSSL-BP's code clips it."""
    z = (-distance / SURROGATE_WIDTH).clamp(-SURROGATE_CLIP, SURROGATE_CLIP).exp()
    return z / (SURROGATE_WIDTH * (1 + z) ** 2)
