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


@numba.njit(nogil=True, cache=True, fastmath=False)
def _forward(x, start, stop, current_keep, gain, voltage_keep, threshold, subtract, spikes, current, membrane):  # type: ignore[no-untyped-def]
    u = np.zeros(stop - start, x.dtype)
    v = np.zeros(stop - start, x.dtype)
    for t in range(x.shape[0]):
        for i in range(stop - start):
            u[i] = current_keep * u[i] + gain * x[t, start + i]
            p = voltage_keep * v[i] + u[i]
            fired = p > threshold
            spikes[t, start + i] = 1 if fired else 0
            current[t, start + i] = u[i]
            membrane[t, start + i] = p
            v[i] = (p - threshold if subtract else p * 0) if fired else p


@numba.njit(nogil=True, cache=True, fastmath=False)
def _backward(  # type: ignore[no-untyped-def]
    error, current, membrane, start, stop, constants, subtract, shift, across, dead, out
):
    current_keep, gain, voltage_keep, threshold, lost_by_subtraction, floor, width, clip = constants
    steps, n = error.shape[0], stop - start
    quiet = np.zeros((steps, n), np.bool_)
    trace = np.zeros(n, error.dtype)
    for t in range(steps):
        for i in range(n):
            fired = membrane[t, start + i] > threshold
            trace[i] = current_keep * trace[i] + (gain if fired else gain * 0)
            quiet[t, i] = trace[i] < gain / 4
    lam = np.zeros(n, error.dtype)
    filtered = np.zeros(n, error.dtype)
    for step in range(steps):
        t = steps - 1 - step
        for i in range(n):
            k = start + i
            p = membrane[t, k]
            b = error[t, k]
            delta = lam[i]
            if p > threshold:
                before = voltage_keep * 0
                if t > 0:
                    before = membrane[t - 1, k]
                    if before > threshold:
                        before = before - threshold if subtract else before * 0
                time_error = -b
                if shift and t + 1 < steps:
                    time_error = error[t + 1, k] - b
                if across:
                    time_error -= lam[i] * (lost_by_subtraction if subtract else current[t, k])
                delta = -time_error / max(p - before, floor)
                if subtract:
                    delta += lam[i]
            lam[i] = voltage_keep * delta
            if dead and quiet[t, i]:
                z = np.exp(min(max(-(p - threshold) / width, -clip), clip))
                delta = b * (z / (width * (1 + z) ** 2))
            filtered[i] = current_keep * filtered[i] + gain * delta
            out[t, k] = filtered[i]


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
        width,
        clip,
    )
    subtract = neuron.reset == "subtract"

    def work(start: int, stop: int) -> None:
        _backward(flat, currents, membranes, start, stop, constants, subtract, shift, across, dead, out)

    _in_blocks(work, flat.shape[1])
    return torch.from_numpy(out).view(error.shape)


def _scalars(dtype: np.dtype[Any], *values: float) -> tuple[Any, ...]:
    """The constants in the tensors' precision, so that no loop silently widens to float64."""
    return tuple(dtype.type(value) for value in values)
