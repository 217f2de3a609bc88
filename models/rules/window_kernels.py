"""Triton kernels of neuron windows. Imported by `window_triton` alone, and only where Triton is at hand.

One program holds a block of neurons and goes through their steps with the state in registers. Memory is (steps, n): a
step is a run of n neurons in whatever order the tensors' layout has them. Arithmetic is in COMPUTE, float32 or float64,
and constants take its precision. A step's equations are those of `cuba_lif` and of the rules' own files.

The membranes of all levels of a neuron travel as tuples. A tuple of steps and levels has level k of step t at
t * LEVELS + k.
"""

import math
from typing import Any

import triton
import triton.language as tl

from spikeport.models.rules.rule import SURROGATE_CLIP, SURROGATE_WIDTH
from spikeport.models.rules.spike_bp import FORGOTTEN
from spikeport.models.rules.tssl import LARGEST_INVERSE_SLOPE

# A kernel sees a module's constants only as constexpr.
_LOGISTIC_WIDTH = tl.constexpr(SURROGATE_WIDTH)
_LOGISTIC_CLIP = tl.constexpr(SURROGATE_CLIP)
_FORGOTTEN = tl.constexpr(FORGOTTEN)
_LEAST_RISE = tl.constexpr(1 / LARGEST_INVERSE_SLOPE)
_PI = tl.constexpr(math.pi)


@triton.jit
def _neurons(n: tl.tensor, BLOCK: tl.constexpr) -> Any:
    """Positions of the program's neurons and which of them exist."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < n


@triton.jit
def _steps(
    pointer: tl.tensor,
    n: tl.tensor,
    at: tl.tensor,
    exists: tl.tensor,
    first: tl.tensor,
    COUNT: tl.constexpr,
    STEPS: tl.constexpr,
) -> Any:
    """COUNT steps from `first` on, zeros beyond the window's end.

    All are asked for at once: a load behind a store would wait for it, since the two may alias.
    """
    steps = ()
    for i in tl.static_range(COUNT):
        t = tl.cast(first + i, tl.int64)
        steps = steps + (tl.load(pointer + t * n + at, mask=exists & (t < STEPS), other=0.0),)  # noqa: RUF005
    return steps


@triton.jit
def _filled(value: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr) -> Any:
    """A tuple of COUNT blocks of `value`."""
    blocks = ()
    for _ in tl.static_range(COUNT):
        blocks = blocks + (tl.full((BLOCK,), value, DTYPE),)  # noqa: RUF005
    return blocks


@triton.jit
def _after_reset(p: tl.tensor, THRESHOLD: tl.constexpr, RESET_TO_ZERO: tl.constexpr) -> Any:
    if RESET_TO_ZERO:
        v = tl.where(p > THRESHOLD, 0.0, p)
    else:
        v = tl.where(p > THRESHOLD, p - THRESHOLD, p)
    return v


@triton.jit
def forward_kernel(
    x_pointer: tl.tensor,
    spikes_pointer: tl.tensor,
    n: tl.tensor,
    STEPS: tl.constexpr,
    SEGMENT: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    CURRENT_KEEP: tl.constexpr,
    VOLTAGE_KEEP: tl.constexpr,
    GAIN: tl.constexpr,
    RESET_TO_ZERO: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Spikes (steps, n) of x (steps, n), from rest."""
    n = tl.cast(n, tl.int64)
    at, exists = _neurons(n, BLOCK)
    u = tl.full((BLOCK,), 0.0, COMPUTE)
    v = _filled(0.0, len(THRESHOLDS), BLOCK, COMPUTE)
    for first in range(0, STEPS, SEGMENT):
        x = _steps(x_pointer, n, at, exists, first, SEGMENT, STEPS)
        for i in tl.static_range(SEGMENT):
            u = CURRENT_KEEP * u + GAIN * x[i].to(COMPUTE)
            spikes = tl.full((BLOCK,), 0.0, COMPUTE)
            after = ()
            for k in tl.static_range(len(THRESHOLDS)):
                p = VOLTAGE_KEEP * v[k] + u
                spikes += tl.where(p > THRESHOLDS[k], 1.0, 0.0).to(COMPUTE)
                after = after + (_after_reset(p, THRESHOLDS[k], RESET_TO_ZERO),)  # noqa: RUF005
            v = after
            t = tl.cast(first + i, tl.int64)
            tl.store(
                spikes_pointer + t * n + at,
                spikes.to(spikes_pointer.dtype.element_ty),
                mask=exists & (t < STEPS),
            )
