"""Loihi's neurons over a whole time window, as training runs them: `spikeport.models.loihi_integers` step by step.

On the CPU the window is compiled (Numba). There u and v are float64, in which the integers of the step are exact: they
stay below 2^24, and their products with a decay below 2^36. Elsewhere it is the step itself, in int64 tensors.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch

from spikeport.models.loihi_integers import (
    DECAY_UNITY,
    INPUT_SHIFT,
    STATE_LIMIT,
    THRESHOLD_SHIFT,
    IntegerState,
    integer_step,
)
from spikeport.models.rules.window_compiled import block_size
from spikeport.models.threads import in_spans

LIMIT = float(STATE_LIMIT)
INPUT_UNIT = float(1 << INPUT_SHIFT)


@dataclass(frozen=True, eq=False)
class IntegerNeurons:
    """A population of one du and one dv. vth: int64, () or the population's shape."""

    du: int
    dv: int
    vth: torch.Tensor
    ds_offset: int
    reset: str

    @property
    def current_keep(self) -> float:
        """Factor of u that survives a step, before it is cut to an integer."""
        return 1 - (self.du + self.ds_offset) / DECAY_UNITY

    @property
    def voltage_keep(self) -> float:
        """Factor of v that survives a step, before it is cut to an integer."""
        return 1 - self.dv / DECAY_UNITY


def run_window(a: torch.Tensor, bias: torch.Tensor, neurons: IntegerNeurons, membranes: bool = False) -> torch.Tensor:
    """Spikes of a window from rest, float32; with `membranes`, v after each step instead, float64.

    Args:
        a: summed synaptic input (steps, batch, *shape), whole numbers in a floating type.
        bias: bias_mant << bias_exp, whole numbers, () or the population's shape.
    """
    if a.device.type != "cpu":
        return _by_steps(a, bias, neurons, membranes)
    a = a.contiguous()
    size = a[0, 0].numel()
    out = torch.empty(a.shape, dtype=torch.float64 if membranes else torch.float32)
    constants = np.array([neurons.current_keep, neurons.voltage_keep, float(neurons.reset == "subtract")])
    level, shift = (_by_neuron(values, a) for values in (neurons.vth << THRESHOLD_SHIFT, bias))
    inputs, outputs = a.detach().view(len(a), -1).numpy(), out.view(len(a), -1).numpy()

    block = block_size(len(a))

    def work(start: int, stop: int) -> None:
        for first in range(start, stop, block):
            _window(inputs, first, min(first + block, stop), size, constants, level, shift, membranes, outputs)

    in_spans(work, inputs.shape[1], block)
    return out


def _by_neuron(values: torch.Tensor, a: torch.Tensor) -> np.ndarray:
    """float64 (neurons,)"""
    array: np.ndarray = values.detach().to(torch.float64).expand(a.shape[2:]).reshape(-1).numpy()
    return array


def _by_steps(a: torch.Tensor, bias: torch.Tensor, neurons: IntegerNeurons, membranes: bool) -> torch.Tensor:
    du, dv = (torch.tensor(value, device=a.device) for value in (neurons.du, neurons.dv))
    zero = torch.zeros(a.shape[1:], dtype=torch.int64, device=a.device)
    state, out = IntegerState(zero, zero), []
    whole = bias.to(torch.int64)
    for at_step in a.to(torch.int64):
        state, spikes = integer_step(
            state,
            at_step,
            du=du,
            dv=dv,
            vth=neurons.vth,
            bias=whole,
            ds_offset=neurons.ds_offset,
            reset=neurons.reset,
        )
        out.append(state.v.double() if membranes else spikes.float())
    return torch.stack(out)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _window(  # type: ignore[no-untyped-def]
    a, start: int, stop: int, size: int, constants: Any, level: Any, bias: Any, membranes: bool, out
) -> None:
    n = stop - start
    u, v = np.zeros(n), np.zeros(n)
    theta, shift = np.empty(n), np.empty(n)
    for i in range(n):
        theta[i], shift[i] = level[(start + i) % size], bias[(start + i) % size]
    current_keep, voltage_keep, subtract = constants
    for t in range(a.shape[0]):
        inputs, outputs = a[t, start:stop], out[t, start:stop]
        for i in range(n):
            x = np.trunc(u[i] * current_keep) + inputs[i] * INPUT_UNIT
            x = x - 2 * LIMIT if x > LIMIT else x
            x = x + 2 * LIMIT if x <= -LIMIT else x
            p = np.trunc(v[i] * voltage_keep) + x + shift[i]
            p = min(max(p, 1 - LIMIT), LIMIT - 1)
            fired = p > theta[i]
            u[i] = x
            v[i] = subtract * (p - theta[i]) if fired else p
            outputs[i] = v[i] if membranes else (1.0 if fired else 0.0)
