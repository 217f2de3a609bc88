"""Fused neuron windows on a GPU: one Triton kernel forward, one backward, each over all steps.

Memory is moved as little as can be: the forward pass reads x and writes s, the backward pass reads x and dL/ds and
writes dL/dx. State stays in registers, and nothing but x is kept between the two; see `window_kernels`. Where Triton's
interpreter is switched on (TRITON_INTERPRET=1), the kernels also take tensors on the CPU, for tests.
"""

import math
import os
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from spikeport.models.cuba_lif import CubaLIF

if TYPE_CHECKING:
    from spikeport.models.rules.rule import Rule

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OLDEST_TRITON = (3, 6)
"""Older ones take no named tuples as constants, which the kernels read."""

WARPS = 4
STRIDE = 4
"""Steps that are asked for at a time where a pass keeps no more than the last state."""
REGISTERS = 64
"""Words of u and membranes that a thread keeps in a backward pass: a quarter of its registers, so that enough threads
stay on a multiprocessor to hide the memory's latency."""
LONGEST_SEGMENT = 16
"""Steps of one segment, which are unrolled; compilation takes time with the third power of it."""
FULL_GRID = 1024
"""Programs that keep all of a GPU busy; where there would be fewer, a thread takes fewer neurons."""


class Neuron(NamedTuple):
    """A neuron's constants in a kernel: factors a step of u and v, gain of x, and 1 / tau_mem."""

    thresholds: tuple[float, ...]
    current_keep: float
    voltage_keep: float
    gain: float
    reset_to_zero: bool
    inverse_tau_mem: float


class Settings(NamedTuple):
    """A rule's settings in a kernel, which is compiled for one rule and reads that rule's alone.

    trace_keep, trace_gain: the filter of output spikes that the rule looks at.
    shifted: the error of a spike is the difference to the next step's. slope_floor: the least rise to divide by.
    """

    rule: str
    spike_cost: float
    trace_keep: float = 0.0
    trace_gain: float = 1.0
    shifted: bool = False
    dead_neuron_rule: bool = False
    slope_floor: float = 1.0
    across_spikes: bool = False
    surrogate: str = ""
    width: float = 1.0
    through_reset: bool = False
    log_leak: float = 0.0


def handles(x: torch.Tensor, rule: "Rule") -> bool:
    """True where a window of x under a rule can be run here; the backward pass of a rate-level rule cannot."""
    interpreted = x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return (x.is_cuda or interpreted) and x.dtype in DTYPES and not rule.eager and _triton_is_at_hand()


@cache
def _triton_is_at_hand() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= OLDEST_TRITON


def forward(x: torch.Tensor, neuron: CubaLIF) -> torch.Tensor:
    """Spikes of a window, in x's shape (steps, batch, ...), type and memory layout."""
    from spikeport.models.rules.window_kernels import forward_kernel

    x = _in_rows(x)
    spikes = torch.empty_like(x)
    steps = len(x)
    _launch(forward_kernel, (x, spikes), 16 // x.element_size(), steps, min(steps, STRIDE), _constants(neuron))
    return spikes


def backward(x: torch.Tensor, spike_errors: torch.Tensor, neuron: CubaLIF, rule: "Rule") -> torch.Tensor:
    """dL/dx of a window, in x's type and memory layout, from its inputs x and B = dL/ds; all (steps, batch, ...)."""
    from spikeport.models.rules.window_kernels import backward_kernel

    x = _in_rows(x)
    if spike_errors.stride() != x.stride():  # the expanded error of a sum, say
        spike_errors = torch.empty_like(x).copy_(spike_errors)
    out = torch.empty_like(x)
    steps, levels = len(x), len(neuron.thresholds)
    wide = x.dtype == torch.float64
    words = (1 + levels) * (2 if wide else 1)
    segment = min(LONGEST_SEGMENT, REGISTERS // words)
    if steps <= segment:
        segment = stride = steps
    else:
        stride = STRIDE
        longest = max(1, segment // stride)
        strides = -(-steps // stride)
        segment = -(-strides // -(-strides // longest)) * stride  # as few segments as can be, of like lengths
    rows = max(0, (steps - 1) // segment - 1) * (1 + 3 * levels)
    states = torch.empty(rows, x[0].numel(), dtype=torch.float64 if wide else torch.float32, device=x.device)
    per_thread = max(1, min(16 // x.element_size(), REGISTERS // (words * segment)))
    constants = (_constants(neuron), _settings(rule, neuron))
    _launch(backward_kernel, (x, spike_errors, out, states), per_thread, steps, segment, stride, *constants)
    return out


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """x with its steps one behind the other, each without gaps; a copy only where it is not so.

    The kernels then see (steps, neurons), the neurons in their order in memory: channels_last needs no copy.
    """
    one = x[0]
    if torch.empty_like(one).stride() != one.stride():  # torch keeps the strides of dense tensors alone
        return x.contiguous()
    if len(x) == 1 or x.stride(0) == one.numel():
        return x
    return x.new_empty_strided(x.shape, (one.numel(), *one.stride())).copy_(x)


def _launch(kernel: Any, tensors: tuple[torch.Tensor, ...], per_thread: int, *constants: Any) -> None:
    """Run a kernel over all neurons. per_thread: most neurons that a thread takes, rounded down to a power of two."""
    import triton.language as tl

    x = tensors[0]
    n = x[0].numel()
    if n == 0:
        return
    per_thread = 1 << (per_thread.bit_length() - 1)
    while per_thread > 1 and n < FULL_GRID * 32 * WARPS * per_thread:
        per_thread //= 2
    block = 32 * WARPS * per_thread
    compute = tl.float64 if x.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(x):
        # without fused multiply-add, all three implementations round alike and fire in the same steps
        kernel[(-(-n // block),)](
            *tensors,
            n,
            *constants,
            compute,
            block,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def _constants(neuron: CubaLIF) -> Neuron:
    return Neuron(
        tuple(float(threshold) for threshold in neuron.thresholds),
        neuron.current_keep,
        neuron.voltage_keep,
        neuron.input_gain,
        neuron.reset == "zero",
        1 / neuron.tau_mem,
    )


def _settings(rule: "Rule", neuron: CubaLIF) -> Settings:
    from spikeport.models.rules import CSBP, STBP, TSSL, SpikeBP, tssl

    cost = rule.spike_cost
    trace = (neuron.current_keep, neuron.input_gain)
    match rule:
        case CSBP():
            return Settings(
                "csbp",
                cost,
                *trace,
                shifted=rule.spike_error == "shift",
                dead_neuron_rule=rule.dead_neuron_rule,
                slope_floor=rule.slope_floor,
                across_spikes=rule.across_spikes,
            )
        case TSSL():
            return Settings(
                "tssl",
                cost,
                *trace,
                shifted=rule.mode == "timing",
                dead_neuron_rule=rule.dead_neuron_rule,
                slope_floor=1 / tssl.LARGEST_INVERSE_SLOPE,
            )
        case STBP():
            return Settings("stbp", cost, surrogate=rule.surrogate, width=rule.width, through_reset=rule.through_reset)
        case SpikeBP():
            leak = neuron.voltage_keep
            return Settings("spike_bp", cost, leak, 1.0, log_leak=math.log(leak) if rule.leak_correction else 0.0)
        case _:
            raise TypeError(f"no kernel for rule {type(rule).__name__}")
