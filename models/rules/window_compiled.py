"""Windows compiled for the CPU: the neuron of `spikeport.models.cuba_lif` and the rules' backward passes.

Neurons are independent, so blocks of them that fit the cache run on as many threads as torch uses. The forward pass
reads x and writes the spikes; the backward pass reads x and dL/ds, simulates the block again, and writes dL/dx. Inputs
are of any dense layout with the steps outermost, in float32, float64 or bfloat16 (computed in float32); or one step
that stands for all, and so is its gradient. `window_loops` holds the loops.

Where spikes are pooled next, a window writes the pooled ones alone and takes the errors of these: what is not pooled
never leaves the cache.
"""

import ctypes
import math
import struct
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.pooling import Pooling
from spikeport.models.rules.window_loops import (
    CSBP,
    SMALLEST_TILE,
    SPIKE_BP,
    STBP,
    SURROGATES,
    TSSL,
    backward_task,
    compiled_task,
    forward_task,
    job_type,
)
from spikeport.models.threads import run_task, spans

if TYPE_CHECKING:
    from spikeport.models.rules.rule import Rule

BLOCK_VALUES = 16384
"""Neurons times steps of a block: its arrays stay in the second-level cache of a core."""
CHANNELS_LAST = (0, 1, 3, 4, 2)
"""Order in memory of (steps, batch, channels, height, width) that pooling needs."""

TYPES: dict[torch.dtype, tuple[Any, Any]] = {
    torch.float32: (np.float32, np.float32),
    torch.float64: (np.float64, np.float64),
    torch.bfloat16: (np.uint16, np.float32),
}
"""How numbers are stored, and how they are computed."""

Order = tuple[int, ...]
"""Axes of a tensor from the outermost in memory to the innermost."""


def handles(x: torch.Tensor, rule: "Rule") -> bool:
    """True where a window of x under a rule can be run here."""
    return x.device.type == "cpu" and x.dtype in TYPES and not rule.eager


def pools(x: torch.Tensor, pooling: Pooling) -> bool:
    """True where a window of x can be pooled as it runs: images that pooling divides without overlap or remainder."""
    return x.dim() == 5 and pooling.tiles(*x.shape[3:])


def forward(x: torch.Tensor, neuron: CubaLIF, steps: int, pooling: Pooling | None = None) -> torch.Tensor:
    """Spikes of a window (steps, batch, ...) of x's type and layout; pooled, (steps, batch, channels, ...).

    x: (steps, batch, ...), or (1, batch, ...).
    """
    order = CHANNELS_LAST if pooling else _order_of(x)
    shape = torch.Size((steps, *x.shape[1:]))
    spikes = _empty(pooling.shape(shape) if pooling else shape, x.dtype, order)
    _run(forward_task, x, None, spikes, order, neuron, pooling)
    return spikes


def backward(
    x: torch.Tensor, spike_errors: torch.Tensor, neuron: CubaLIF, rule: "Rule", pooling: Pooling | None = None
) -> torch.Tensor:
    """dL/dx of a window, in x's shape, from its inputs x, (steps, batch, ...) or (1, batch, ...), and dL/ds
    (steps, batch, ...), of the pooled spikes where they are."""
    order = CHANNELS_LAST if pooling else _order_of(x)
    out = _empty(x.shape, x.dtype, order)
    _run(backward_task, x, spike_errors.to(x.dtype), out, order, neuron, pooling, rule)
    return out


def _run(
    task: Callable[[Any], None],
    x: torch.Tensor,
    errors: torch.Tensor | None,
    out: torch.Tensor,
    order: Order,
    neuron: CubaLIF,
    pooling: Pooling | None,
    rule: "Rule | None" = None,
) -> None:
    """Run a task on all neurons of x and fill `out`, which `_empty` has made."""
    outside = out if errors is None else errors
    steps, size = len(outside), x.numel() // len(x) if len(x) else 0
    if not (steps and size):
        return
    stored, computed = TYPES[x.dtype]
    inputs = _laid(x, order)
    spike_errors = None if errors is None else _laid(errors, order)
    arrays, addresses = _numbers(neuron, computed)
    kind, switches, numbers = (0, (0, 0, 0), (0.0, 0.0)) if rule is None else _settings(rule)
    grid, divisor, row = _grid(x, pooling)
    block = block_size(steps, row)
    threads, span = spans(size, block)
    form, length = _form(stored, computed)
    job = ctypes.create_string_buffer(length + 16)  # and two counters
    place = ctypes.addressof(job)
    form.pack_into(
        job, 0,
        inputs.data_ptr(), 0 if spike_errors is None else spike_errors.data_ptr(), out.data_ptr(),
        *addresses, place + length, place + length + 8,
        len(arrays[1]), len(x), steps, size, outside.numel() // steps, span, block,
        *grid, neuron.reset == "subtract", kind, *switches, *numbers, divisor, 0,
    )  # fmt: skip
    run_task(compiled_task(task, job_type(stored, computed)), place, threads)
    if struct.unpack_from("q", job, length + 8) != (size,):  # a task cannot raise
        raise MemoryError("no memory for the blocks of a window")


@cache
def _form(stored: Any, computed: Any) -> tuple[struct.Struct, int]:
    """How a job is written, and its length in bytes."""
    kind = job_type(stored, computed)
    codes = {np.int64: "q", np.float32: "f", np.float64: "d", np.uint16: "H"}
    letters = "".join(codes[kind[name].type] for name in kind.names or ())
    return struct.Struct(letters), kind.itemsize


def block_size(steps: int, row: int = 1) -> int:
    """Neurons of a block that fits the cache, in whole rows of so many."""
    return max(1, max(SMALLEST_TILE, BLOCK_VALUES // steps) // row) * row


def _grid(x: torch.Tensor, pooling: Pooling | None) -> tuple[tuple[int, int, int, int], float, int]:
    """Rows and columns of a pooling window, width and channels of the image; its divisor; neurons that go together.

    All zero, 1 and 1 without pooling.
    """
    if pooling is None:
        return (0, 0, 0, 0), 1.0, 1
    channels, width = x.shape[2], x.shape[4]
    return (*pooling.kernel, width, channels), pooling.divisor, pooling.kernel[0] * width * channels


@lru_cache(maxsize=64)
def _settings(rule: Any) -> tuple[int, tuple[int, int, int], tuple[float, float]]:
    """A rule as numbers: its kind, three switches, and a setting beside the cost of a spike."""
    from spikeport.models.rules import csbp, spike_bp, stbp, tssl

    if isinstance(rule, csbp.CSBP):
        switches = int(rule.spike_error == "shift"), int(rule.across_spikes), int(rule.dead_neuron_rule)
        return CSBP, switches, (rule.slope_floor, rule.spike_cost)
    if isinstance(rule, tssl.TSSL):
        switches = int(rule.mode == "timing"), 0, int(rule.dead_neuron_rule)
        return TSSL, switches, (tssl.LARGEST_INVERSE_SLOPE, rule.spike_cost)
    if isinstance(rule, stbp.STBP):
        switches = SURROGATES.index(rule.surrogate), int(rule.through_reset), 0
        return STBP, switches, (rule.width, rule.spike_cost)
    if isinstance(rule, spike_bp.SpikeBP):
        return SPIKE_BP, (int(rule.leak_correction), 0, 0), (spike_bp.FORGOTTEN, rule.spike_cost)
    raise TypeError(f"{type(rule).__name__} has no compiled window")


@lru_cache(maxsize=64)
def _numbers(neuron: CubaLIF, computed: Any) -> tuple[tuple[np.ndarray, np.ndarray], tuple[int, int]]:
    """A neuron's constants and thresholds, in the type that is computed in, and where they are.

    The constants: current_keep, input_gain, voltage_keep, 1 / tau_mem, ln(voltage_keep), 1 / (4 tau_syn), then 5, 8, pi
    and infinity, so that no loop widens to float64.
    """
    leak = math.log(neuron.voltage_keep) if neuron.voltage_keep > 0 else 0.0
    values = (neuron.current_keep, neuron.input_gain, neuron.voltage_keep, 1 / neuron.tau_mem, leak)
    constants = np.asarray((*values, 1 / (4 * neuron.tau_syn), 5.0, 8.0, math.pi, math.inf), computed)
    thresholds = np.asarray(neuron.thresholds, computed)
    return (constants, thresholds), (constants.ctypes.data, thresholds.ctypes.data)


def _order_of(x: torch.Tensor) -> Order:
    """The steps, then the other axes as they lie in memory."""
    if x.is_contiguous():
        return tuple(range(x.dim()))
    strides = x.stride()
    return (0, *sorted(range(1, x.dim()), key=lambda axis: (-strides[axis], axis)))


def _laid(x: torch.Tensor, order: Order) -> torch.Tensor:
    """x with its memory dense in that order; a copy, its axes in that order, where it is not."""
    if x.is_contiguous() and list(order) == sorted(order):
        return x
    return x.detach().permute(order).contiguous()


def _empty(shape: Sequence[int], dtype: torch.dtype, order: Order) -> torch.Tensor:
    """A tensor whose memory is dense in that order."""
    return torch.empty_permuted(shape, order, dtype=dtype)
