"""Current-based leaky integrate-and-fire neurons over a time window, in floats.

Time runs in steps; x is the weighted sum of input spikes, tau_syn and tau_mem count steps:

    u[t] = (1 - 1/tau_syn) u[t-1] + x[t] / tau_syn            synaptic filter of unit area
    p[t] = (1 - 1/tau_mem) v[t-1] + u[t]                      membrane before reset
    s[t] = 1 if p[t] > threshold else 0
    v[t] = 0 where s[t] ("zero"), or p[t] - threshold s[t] ("subtract")

A multi-level neuron (MLF, Feng et al., IJCAI 2022) has one membrane for each of its thresholds, all fed by the same u,
and sends the sum of their spikes.

This is the forward pass of TSSL-BP (Zhang & Li, NeurIPS 2020), with the filter moved from the sending to the receiving
neuron (both are linear and commute), and NIR's CubaLIF in Euler steps with w_in = 1 and r = tau_mem / dt.
"""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class CubaLIF:
    """Parameters of a population. tau_syn, tau_mem in steps (>= 1; infinite for no leak); threshold in membrane units.

    levels: further thresholds of a multi-level neuron, above `threshold`.
    """

    tau_syn: float = 3.0
    tau_mem: float = 5.0
    threshold: float = 1.0
    reset: Literal["zero", "subtract"] = "zero"
    levels: tuple[float, ...] = ()

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The thresholds of all levels, lowest first."""
        return (self.threshold, *self.levels)

    @property
    def current_keep(self) -> float:
        """Factor of u that survives a step."""
        return 1.0 - 1.0 / self.tau_syn

    @property
    def voltage_keep(self) -> float:
        """Factor of v that survives a step."""
        return 1.0 - 1.0 / self.tau_mem

    @property
    def input_gain(self) -> float:
        """Factor on x, so that one spike's filtered trace has unit area."""
        return 1.0 / self.tau_syn


@dataclass(frozen=True)
class Window:
    """What a time window of one level leaves behind. Every tensor: (steps, batch, ...).

    spikes: 0 or 1. current: u. membrane: p, before reset. rise: p[t] - v[t-1], the slope of the membrane.
    """

    spikes: torch.Tensor
    current: torch.Tensor
    membrane: torch.Tensor
    rise: torch.Tensor


def simulate(x: torch.Tensor, neuron: CubaLIF) -> Window:
    """Run a whole window from rest at the lowest threshold. x: (steps, batch, ...), the weighted input sums."""
    return fire(filter_spikes(x, neuron.tau_syn), neuron, neuron.threshold)


def fire(current: torch.Tensor, neuron: CubaLIF, threshold: float) -> Window:
    """The membrane and spikes of one level, from rest, driven by u (steps, batch, ...)."""
    spikes, membrane, rise = (torch.empty_like(current) for _ in range(3))
    v = torch.zeros_like(current[0])
    for t in range(current.shape[0]):
        p = neuron.voltage_keep * v + current[t]
        s = (p > threshold).to(current.dtype)
        spikes[t], membrane[t], rise[t] = s, p, p - v
        v = p * (1 - s) if neuron.reset == "zero" else p - threshold * s
    return Window(spikes, current, membrane, rise)


def integrate(x: torch.Tensor, neuron: CubaLIF) -> torch.Tensor:
    """The membrane of neurons that never fire, (steps, batch, ...), from the weighted sums x of their input spikes."""
    v = torch.zeros_like(x[0])
    out = []
    for u in filter_spikes(x, neuron.tau_syn):
        v = neuron.voltage_keep * v + u
        out.append(v)
    return torch.stack(out)


def filter_spikes(spikes: torch.Tensor, tau: float) -> torch.Tensor:
    """Exponential trace of unit area: a[t] = (1 - 1/tau) a[t-1] + s[t] / tau, over the first axis."""
    trace = torch.zeros_like(spikes[0])
    out = []
    for t in range(spikes.shape[0]):
        trace = (1 - 1 / tau) * trace + spikes[t] / tau
        out.append(trace)
    return torch.stack(out)


def filter_errors(errors: torch.Tensor, tau: float) -> torch.Tensor:
    """Transpose of `filter_spikes`: d[t] = e[t] / tau + (1 - 1/tau) d[t+1]; O(steps)."""
    trace = torch.zeros_like(errors[0])
    out = torch.empty_like(errors)
    for t in reversed(range(errors.shape[0])):
        trace = (1 - 1 / tau) * trace + errors[t] / tau
        out[t] = trace
    return out
