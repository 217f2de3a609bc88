"""CSBP's window compiled for the CPU (Numba): the equations of `spikeport.models.rules.csbp`, one pass over memory.

The forward pass keeps u and p (membrane before reset); spikes, rise and the quiet steps follow from them. Neurons are
independent, so blocks of them run on as many threads as torch uses. Agrees with the eager version to float tolerance.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch

from spikeport.models.cuba_lif import CubaLIF

BLOCK = 8192

jit = numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

# The costly inner loops touch few arrays and hold selections instead of branches, so that they become vector
# instructions.


@jit
def _forward(x, start, stop, current_keep, gain, voltage_keep, threshold, subtract, spikes, current, membrane):  # type: ignore[no-untyped-def]
    n = stop - start
    zero, one = gain - gain, gain / gain
    kept = one if subtract else zero
    u = np.zeros(n, x.dtype)
    v = np.zeros(n, x.dtype)
    for t in range(x.shape[0]):
        inputs, spike = x[t, start:stop], spikes[t, start:stop]
        currents, membranes = current[t, start:stop], membrane[t, start:stop]
        for i in range(n):
            u[i] = current_keep * u[i] + gain * inputs[i]
            p = voltage_keep * v[i] + u[i]
            fired = p > threshold
            spike[i] = one if fired else zero
            currents[i] = u[i]
            membranes[i] = p
            v[i] = kept * (p - threshold) if fired else p


@jit
def _backward(  # type: ignore[no-untyped-def]
    error, current, membrane, start, stop, constants, inverses, subtract, shift, across, dead, out
):
    current_keep, gain, voltage_keep, threshold, lost_by_subtraction, floor, steepness, clip, quarter = constants
    sixteenth = quarter * quarter
    c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13 = inverses
    steps, n = error.shape[0], stop - start
    zero, one = gain - gain, gain / gain
    soft = one if subtract else zero
    hard = (one - soft) * (one if across else zero)
    lost = lost_by_subtraction * soft * (one if across else zero)
    next_weight = one if shift else zero
    quiet_below = gain * quarter if dead else -one
    trace = np.zeros((steps, n), error.dtype)
    level = np.zeros(n, error.dtype)
    for t in range(steps):
        membranes, traces = membrane[t, start:stop], trace[t]
        for i in range(n):
            level[i] = current_keep * level[i] + (gain if membranes[i] > threshold else zero)
            traces[i] = level[i]
    lam = np.zeros(n, error.dtype)
    filtered = np.zeros(n, error.dtype)
    later = np.zeros(n, error.dtype)
    rest = np.zeros(n, error.dtype)
    surrogate = np.zeros(n, error.dtype)
    slope = np.zeros(n, error.dtype)
    for step in range(steps):
        t = steps - 1 - step
        errors, currents, membranes = error[t, start:stop], current[t, start:stop], membrane[t, start:stop]
        earlier = membrane[t - 1, start:stop] if t > 0 else rest
        traces, result = trace[t], out[t, start:stop]
        for i in range(n):
            # e^z as (e^(z/16))^16, a series without branches; exact to a few units in the last place
            z = min(max((threshold - membranes[i]) * steepness, -clip), clip) * sixteenth
            series = one + z * c13
            series = one + series * z * c12
            series = one + series * z * c11
            series = one + series * z * c10
            series = one + series * z * c9
            series = one + series * z * c8
            series = one + series * z * c7
            series = one + series * z * c6
            series = one + series * z * c5
            series = one + series * z * c4
            series = one + series * z * c3
            series = one + series * z * c2
            series = one + series * z
            series *= series
            series *= series
            series *= series
            series *= series
            surrogate[i] = steepness * series / ((one + series) * (one + series))
        for i in range(n):
            last = earlier[i]
            before = soft * (last - threshold) if last > threshold else last
            slope[i] = one / max(membranes[i] - before, floor)
        for i in range(n):
            b = errors[i]
            time_error = next_weight * later[i] - b - lam[i] * (hard * currents[i] + lost)
            delta = soft * lam[i] - time_error * slope[i] if membranes[i] > threshold else lam[i]
            lam[i] = voltage_keep * delta
            later[i] = b
            if traces[i] < quiet_below:
                delta = b * surrogate[i]
            filtered[i] = current_keep * filtered[i] + gain * delta
            result[i] = filtered[i]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="window")


def _in_blocks(work: Any, size: int) -> None:
    threads = torch.get_num_threads()
    block = max(BLOCK, -(-size // (8 * threads)))
    spans = [(start, min(start + block, size)) for start in range(0, size, block)]
    if len(spans) == 1 or threads == 1:
        for span in spans:
            work(*span)
    else:
        list(_pool(threads).map(lambda span: work(*span), spans))


def forward(x: torch.Tensor, neuron: CubaLIF) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Spikes, u and p, each (steps, ...), of inputs x on the CPU (float32 or float64)."""
    flat = x.detach().contiguous().flatten(1).numpy()
    spikes, current, membrane = (np.empty_like(flat) for _ in range(3))
    keep, gain, leak, level = _scalars(
        flat.dtype, neuron.current_keep, neuron.input_gain, neuron.voltage_keep, neuron.threshold
    )
    subtract = neuron.reset == "subtract"

    def work(start: int, stop: int) -> None:
        _forward(flat, start, stop, keep, gain, leak, level, subtract, spikes, current, membrane)

    _in_blocks(work, flat.shape[1])
    spikes_out, current_out, membrane_out = (torch.from_numpy(a).view(x.shape) for a in (spikes, current, membrane))
    return spikes_out, current_out, membrane_out


def backward(
    error: torch.Tensor,
    current: torch.Tensor,
    membrane: torch.Tensor,
    neuron: CubaLIF,
    *,
    floor: float,
    shift: bool,
    across: bool,
    dead: bool,
    width: float,
    clip: float,
) -> torch.Tensor:
    """dL/dx of a window, (steps, ...), from dL/ds and what `forward` kept."""
    flat = error.contiguous().flatten(1).numpy()
    currents, membranes = current.flatten(1).numpy(), membrane.flatten(1).numpy()
    out = np.empty_like(flat)
    constants = _scalars(
        flat.dtype,
        neuron.current_keep,
        neuron.input_gain,
        neuron.voltage_keep,
        neuron.threshold,
        neuron.threshold / neuron.tau_mem,
        floor,
        1 / width,
        clip,
        0.25,
    )
    inverses = _scalars(flat.dtype, *(1 / k for k in range(2, 14)))
    subtract = neuron.reset == "subtract"

    def work(start: int, stop: int) -> None:
        _backward(flat, currents, membranes, start, stop, constants, inverses, subtract, shift, across, dead, out)

    _in_blocks(work, flat.shape[1])
    return torch.from_numpy(out).view(error.shape)


def _scalars(dtype: np.dtype[Any], *values: float) -> tuple[Any, ...]:
    """The constants in the tensors' precision, so that no loop silently widens to float64."""
    return tuple(dtype.type(value) for value in values)
