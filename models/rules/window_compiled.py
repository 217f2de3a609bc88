"""Windows compiled for the CPU (Numba): the neuron of `spikeport.models.cuba_lif` and the rules' backward passes.

Neurons are independent, so blocks of them that fit the cache run on as many threads as torch uses. The forward pass
reads x and writes the spikes; the backward pass reads x and dL/ds, simulates the block again, and writes dL/dx. Inputs
are of any dense layout with the steps outermost, in float32, float64 or bfloat16 (computed in float32). Each loop over
neurons holds selections instead of branches, so that it becomes vector instructions.

Where spikes are pooled next, a window writes the pooled ones alone and takes the errors of these: what is not pooled
never leaves the cache.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.pooling import Pooling

if TYPE_CHECKING:
    from spikeport.models.rules.rule import Rule

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
BLOCK_VALUES = 16384
"""Neurons times steps of a block: its arrays stay in the cache of a core."""
CHANNELS_LAST = (0, 1, 3, 4, 2)
"""Order in memory of (steps, batch, channels, height, width) that pooling needs."""

# The loops below touch up to ten arrays; by default LLVM gives up on proving that they are apart beyond a few.
llvmlite.binding.set_option("spikeport", "--runtime-memory-check-threshold=256")

jit = numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)

CSBP, TSSL, STBP, SPIKE_BP = range(4)
SURROGATES = ("rectangular", "triangular", "arctan", "logistic")


def handles(x: torch.Tensor, rule: "Rule") -> bool:
    """True where a window of x under a rule can be run here."""
    return x.device.type == "cpu" and x.dtype in DTYPES and not rule.eager


def pools(x: torch.Tensor, pooling: Pooling) -> bool:
    """True where a window of x can be pooled as it runs: images that pooling divides without overlap or remainder."""
    return x.dim() == 5 and pooling.tiles(*x.shape[3:])


def forward(x: torch.Tensor, neuron: CubaLIF, pooling: Pooling | None = None) -> torch.Tensor:
    """Spikes of a window, of x's shape (steps, batch, ...), type and layout; pooled, (steps, batch, channels, ...)."""
    dtype = _compute_type(x)
    inputs, order = _flat(x, CHANNELS_LAST if pooling else None)
    spikes = _dense(pooling.shape(x.shape) if pooling else x.shape, x.dtype, order)
    outputs, _ = _flat(spikes, order)
    constants = _neuron_constants(neuron, dtype)
    thresholds = np.asarray(neuron.thresholds, dtype)
    grid, divisor, row = _grid(x, pooling, dtype)
    subtract = neuron.reset == "subtract"

    def work(start: int, stop: int) -> None:
        _forward(inputs, start, stop, constants, thresholds, subtract, grid, divisor, outputs)

    in_blocks(work, inputs.shape, row)
    return spikes


def backward(
    x: torch.Tensor, spike_errors: torch.Tensor, neuron: CubaLIF, rule: "Rule", pooling: Pooling | None = None
) -> torch.Tensor:
    """dL/dx of a window, from its inputs x and dL/ds, of the pooled spikes where they are; all (steps, batch, ...)."""
    dtype = _compute_type(x)
    inputs, order = _flat(x, CHANNELS_LAST if pooling else None)
    errors, _ = _flat(spike_errors.to(x.dtype), order)
    out = _dense(x.shape, x.dtype, order)
    outputs, _ = _flat(out, order)
    constants = _neuron_constants(neuron, dtype)
    thresholds = np.asarray(neuron.thresholds, dtype)
    kind, switches, numbers = _settings(rule)
    settings = np.asarray(numbers, dtype)
    grid, divisor, row = _grid(x, pooling, dtype)
    how = (neuron.reset == "subtract", kind, switches)

    def work(start: int, stop: int) -> None:
        _backward(inputs, errors, start, stop, constants, thresholds, how, settings, grid, divisor, outputs)

    in_blocks(work, inputs.shape, row)
    return out


def _grid(x: torch.Tensor, pooling: Pooling | None, dtype: Any) -> tuple[tuple[int, int, int, int], np.ndarray, int]:
    """Rows and columns of a pooling window, width and channels of the image; its divisor; neurons that go together.

    All zero, 1 and 1 without pooling.
    """
    if pooling is None:
        return (0, 0, 0, 0), np.ones(1, dtype), 1
    channels, width = x.shape[2], x.shape[4]
    return (*pooling.kernel, width, channels), np.full(1, pooling.divisor, dtype), pooling.kernel[0] * width * channels


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


def _compute_type(x: torch.Tensor) -> Any:
    return np.float64 if x.dtype == torch.float64 else np.float32


def _neuron_constants(neuron: CubaLIF, dtype: Any) -> np.ndarray:
    """current_keep, input_gain, voltage_keep, 1 / tau_mem, ln(voltage_keep), 1 / (4 tau_syn), then 5, 8, pi and
    infinity: numbers in the type that is computed in, so that no loop widens to float64."""
    leak = math.log(neuron.voltage_keep) if neuron.voltage_keep > 0 else 0.0
    values = (neuron.current_keep, neuron.input_gain, neuron.voltage_keep, 1 / neuron.tau_mem, leak)
    return np.asarray((*values, 1 / (4 * neuron.tau_syn), 5.0, 8.0, math.pi, math.inf), dtype)


def _flat(x: torch.Tensor, order: tuple[int, ...] | None = None) -> tuple[np.ndarray, tuple[int, ...]]:
    """x as an array (steps, neurons) in memory order, copied only where it is not dense in `order`; and that order."""
    if order is None:
        strides = x.stride()
        order = (0, *sorted(range(1, x.dim()), key=lambda axis: (-strides[axis], axis)))
    moved = x.detach().permute(order).contiguous().reshape(x.shape[0], -1)
    raw = moved.view(torch.uint16) if x.dtype == torch.bfloat16 else moved
    array: np.ndarray = raw.numpy()
    return array, order


def _dense(shape: Sequence[int], dtype: torch.dtype, order: tuple[int, ...]) -> torch.Tensor:
    """An empty tensor, dense in `order`, so that `_flat` gives its own memory and no copy."""
    axes = sorted(range(len(shape)), key=order.__getitem__)
    return torch.empty([shape[axis] for axis in order], dtype=dtype).permute(axes)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="window")


def in_blocks(work: Callable[[int, int], None], shape: tuple[int, ...], row: int = 1) -> None:
    """work(start, stop) on blocks of the neurons of (steps, neurons) that fit the cache, in whole rows of so many."""
    steps, size = shape
    in_spans(work, size, max(1, max(64, BLOCK_VALUES // steps) // row) * row)


def in_spans(work: Callable[[int, int], None], size: int, block: int) -> None:
    """work(start, stop) on all of 0..size, at most `block` at once, on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), -(-size // block))
    if threads <= 1:
        _run_span(work, 0, size, block)
        return
    share = -(-size // (4 * threads * block)) * block
    spans = [(start, min(start + share, size)) for start in range(0, size, share)]
    for done in [_pool(threads).submit(_run_span, work, start, stop, block) for start, stop in spans]:
        done.result()


def _run_span(work: Callable[[int, int], None], start: int, stop: int, block: int) -> None:
    for first in range(start, stop, block):
        work(first, min(first + block, stop))


@intrinsic
def _bits_to_float(typingctx, bits):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def _float_to_bits(typingctx, value):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


def widen(value):  # type: ignore[no-untyped-def]
    """A stored number as the type that is computed in."""


def narrow(value, like):  # type: ignore[no-untyped-def]
    """A number as the type that is stored; bfloat16 is rounded to nearest, ties to even."""


@overload(widen)
def _widen_of(value):  # type: ignore[no-untyped-def]
    if value == types.uint16:
        return lambda value: _bits_to_float(np.uint32(np.uint32(value) << np.uint32(16)))  # type: ignore[call-arg]
    return lambda value: value


@overload(narrow)
def _narrow_of(value, like):  # type: ignore[no-untyped-def]
    if like == types.uint16:

        def rounded(value, like):  # type: ignore[no-untyped-def]
            bits: Any = _float_to_bits(value)  # type: ignore[call-arg]
            odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
            return np.uint16(np.uint32(bits + odd + np.uint32(0x7FFF)) >> np.uint32(16))

        return rounded
    return lambda value, like: value


def _exponential(y):  # type: ignore[no-untyped-def]
    """e^y for -8 <= y <= 0, without branches."""


@overload(_exponential)
def _exponential_of(y):  # type: ignore[no-untyped-def]
    # (e^(y/16))^16 by a series; the terms left out are below a unit in the last place
    if y == types.float32:
        c7, c6, c5, c4, c3, half = (np.float32(1 / math.factorial(k)) for k in (7, 6, 5, 4, 3, 2))
        one, sixteenth = np.float32(1), np.float32(0.0625)

        def short(y):  # type: ignore[no-untyped-def]
            x = y * sixteenth
            series = one + x * (one + x * (half + x * (c3 + x * (c4 + x * (c5 + x * (c6 + x * c7))))))
            series *= series
            series *= series
            series *= series
            return series * series

        return short
    d = [1 / math.factorial(k) for k in range(14)]
    d2, d3, d4, d5, d6, d7, d8, d9, d10, d11, d12, d13 = d[2:]

    def long(y):  # type: ignore[no-untyped-def]
        x = y * 0.0625
        high = d7 + x * (d8 + x * (d9 + x * (d10 + x * (d11 + x * (d12 + x * d13)))))
        series = 1.0 + x * (1.0 + x * (d2 + x * (d3 + x * (d4 + x * (d5 + x * (d6 + x * high))))))
        series *= series
        series *= series
        series *= series
        return series * series

    return long


@jit
def _forward(x, start, stop, constants, thresholds, subtract, grid, divisor, spikes):  # type: ignore[no-untyped-def]
    n, levels = stop - start, thresholds.shape[0]
    current_keep, gain, voltage_keep = constants[0], constants[1], constants[2]
    zero = gain - gain
    one = gain / gain
    kept = one if subtract else zero
    like = spikes[0, 0]
    pooled = max(1, grid[0] * grid[1])
    u = np.zeros(n, constants.dtype)
    v = np.zeros((levels, n), constants.dtype)
    total = np.zeros(n, constants.dtype)
    for t in range(x.shape[0]):
        inputs, outputs = x[t, start:stop], spikes[t, start // pooled : stop // pooled]
        for i in range(n):
            u[i] = current_keep * u[i] + gain * widen(inputs[i])
        for level in range(levels):
            threshold, states, below = thresholds[level], v[level], zero if level == 0 else one
            for i in range(n):
                p = voltage_keep * states[i] + u[i]
                fired = p > threshold
                total[i] = below * total[i] + (one if fired else zero)
                states[i] = kept * (p - threshold) if fired else p
        if grid[0]:
            _sum_windows(total, grid, divisor[0], like, outputs)
        else:
            for i in range(n):
                outputs[i] = narrow(total[i], like)


@jit
def _sum_windows(total, grid, divisor, like, outputs):  # type: ignore[no-untyped-def]
    """Spikes of whole rows of windows, in (rows, columns, channels), summed over each window, over `divisor`."""
    down, right, width, channels = grid
    length, cells = width * channels, width // right
    row = np.empty(length, total.dtype)
    for group in range(outputs.shape[0] // (cells * channels)):
        start = group * down * length
        for j in range(length):
            row[j] = total[start + j]
        for d in range(1, down):
            for j in range(length):
                row[j] += total[start + d * length + j]
        for cell in range(cells):
            sums = row[cell * right * channels : (cell * right + 1) * channels]
            for r in range(1, right):
                more = row[(cell * right + r) * channels : (cell * right + r + 1) * channels]
                for c in range(channels):
                    sums[c] += more[c]
            place = (group * cells + cell) * channels
            for c in range(channels):
                outputs[place + c] = narrow(sums[c] / divisor, like)


@jit
def _spread(errors, grid, divisor, cost, e):  # type: ignore[no-untyped-def]
    """The error of each window for all of its neurons, over `divisor`, and the cost of a spike."""
    down, right, width, channels = grid
    length, cells = width * channels, width // right
    row = np.empty(length, e.dtype)
    for group in range(errors.shape[0] // (cells * channels)):
        for cell in range(cells):
            place = (group * cells + cell) * channels
            for r in range(right):
                part = row[(cell * right + r) * channels : (cell * right + r + 1) * channels]
                for c in range(channels):
                    part[c] = widen(errors[place + c]) / divisor + cost
        for d in range(down):
            start = (group * down + d) * length
            for j in range(length):
                e[start + j] = row[j]


# A loop over neurons inside a loop that runs back in time becomes vector instructions as a function of its own alone.


@jit
def _load(inputs, state, current_keep, gain, u):  # type: ignore[no-untyped-def]
    for i in range(inputs.shape[0]):
        state[i] = current_keep * state[i] + gain * widen(inputs[i])
        u[i] = state[i]


@jit
def _load_errors(errors, cost, e):  # type: ignore[no-untyped-def]
    for i in range(errors.shape[0]):
        e[i] = widen(errors[i]) + cost


@jit
def _store(d, state, current_keep, gain, like, out):  # type: ignore[no-untyped-def]
    for i in range(d.shape[0]):
        state[i] = current_keep * state[i] + gain * d[i]
        out[i] = narrow(state[i], like)


@jit
def _backward(x, error, start, stop, constants, thresholds, how, settings, grid, divisor, out):  # type: ignore[no-untyped-def]
    steps, n = x.shape[0], stop - start
    subtract, kind, switches = how
    current_keep, gain, cost = constants[0], constants[1], settings[1]
    like = out[0, 0]
    pooled = max(1, grid[0] * grid[1])
    u = np.empty((steps, n), constants.dtype)
    p = np.empty((steps, n), constants.dtype)
    e = np.empty((steps, n), constants.dtype)
    d = np.zeros((steps, n), constants.dtype)
    state = np.zeros(n, constants.dtype)
    for t in range(steps):
        _load(x[t, start:stop], state, current_keep, gain, u[t])
        errors = error[t, start // pooled : stop // pooled]
        if grid[0]:
            _spread(errors, grid, divisor[0], cost, e[t])
        else:
            _load_errors(errors, cost, e[t])
    for level in range(thresholds.shape[0]):
        _membranes(u, constants, thresholds[level], subtract, p)
        if kind == CSBP:
            _csbp(u, p, e, constants, thresholds[level], subtract, switches, settings, d)
        elif kind == TSSL:
            _tssl(p, e, constants, thresholds[level], switches, settings, d)
        elif kind == STBP:
            _stbp(p, e, constants, thresholds[level], subtract, switches, settings, d)
        else:
            _spike_bp(p, e, constants, thresholds[level], switches, settings, d)
    state[:] = 0
    for step in range(steps):
        t = steps - 1 - step
        _store(d[t], state, current_keep, gain, like, out[t, start:stop])


@jit
def _membranes(u, constants, threshold, subtract, p):  # type: ignore[no-untyped-def]
    """p of one level, from rest."""
    n = u.shape[1]
    voltage_keep = constants[2]
    zero = voltage_keep - voltage_keep
    kept = constants[1] / constants[1] if subtract else zero
    v = np.zeros(n, u.dtype)
    for t in range(u.shape[0]):
        us, ps = u[t], p[t]
        for i in range(n):
            m = voltage_keep * v[i] + us[i]
            ps[i] = m
            v[i] = kept * (m - threshold) if m > threshold else m


@jit
def _own_traces(p, constants, threshold, trace):  # type: ignore[no-untyped-def]
    """The neurons' own filtered spikes."""
    n = p.shape[1]
    current_keep, gain = constants[0], constants[1]
    zero = gain - gain
    level = np.zeros(n, p.dtype)
    for t in range(p.shape[0]):
        ps, traces = p[t], trace[t]
        for i in range(n):
            level[i] = current_keep * level[i] + (gain if ps[i] > threshold else zero)
            traces[i] = level[i]


@jit
def _add_errors(p, e, delta, constants, threshold, dead, d):  # type: ignore[no-untyped-def]
    """Add delta, or B f'(p - threshold) on the steps that the dead-neuron rule calls quiet."""
    steps, n = p.shape
    quiet_limit, steepness, eight = constants[5], constants[6], constants[7]
    one = eight / eight
    if not dead:
        for t in range(steps):
            deltas, ds = delta[t], d[t]
            for i in range(n):
                ds[i] += deltas[i]
        return
    trace = np.empty((steps, n), p.dtype)
    _own_traces(p, constants, threshold, trace)
    for t in range(steps):
        ps, es, deltas, traces, ds = p[t], e[t], delta[t], trace[t], d[t]
        for i in range(n):
            series = _exponential(-min(abs(ps[i] - threshold) * steepness, eight))
            surrogate = es[i] * steepness * series / ((one + series) * (one + series))
            ds[i] += surrogate if traces[i] < quiet_limit else deltas[i]


@jit
def _inverse_rises(p, threshold, soft, floor, lowest, inverse):  # type: ignore[no-untyped-def]
    """1 / max(rise, floor) where the rise is above `lowest`, else 0."""
    steps, n = p.shape
    zero = floor - floor
    one = floor / floor
    rest = np.zeros(n, p.dtype)
    for t in range(steps):
        ps, inverses = p[t], inverse[t]
        earlier = p[t - 1] if t > 0 else rest
        for i in range(n):
            last = earlier[i]
            before = soft * (last - threshold) if last > threshold else last
            rise = ps[i] - before
            inverses[i] = one / max(rise, floor) if rise > lowest else zero


@jit
def _csbp_step(u, p, e, lam, later, threshold, next_weight, hard, lost, soft, voltage_keep, delta):  # type: ignore[no-untyped-def]
    for i in range(p.shape[0]):
        b = e[i]
        time_error = next_weight * later[i] - b - lam[i] * (hard * u[i] + lost)
        found = soft * lam[i] - time_error * delta[i] if p[i] > threshold else lam[i]
        lam[i] = voltage_keep * found
        later[i] = b
        delta[i] = found


@jit
def _csbp(u, p, e, constants, threshold, subtract, switches, settings, d):  # type: ignore[no-untyped-def]
    steps, n = p.shape
    voltage_keep, inverse_tau = constants[2], constants[3]
    zero = voltage_keep - voltage_keep
    one = constants[1] / constants[1]
    shift, across, dead = switches
    soft = one if subtract else zero
    passing = one if across else zero
    hard = (one - soft) * passing
    lost = threshold * inverse_tau * soft * passing
    next_weight = one if shift else zero
    delta = np.empty((steps, n), p.dtype)
    _inverse_rises(p, threshold, soft, settings[0], -constants[9], delta)
    lam = np.zeros(n, p.dtype)
    later = np.zeros(n, p.dtype)
    for step in range(steps):
        t = steps - 1 - step
        _csbp_step(u[t], p[t], e[t], lam, later, threshold, next_weight, hard, lost, soft, voltage_keep, delta[t])
    _add_errors(p, e, delta, constants, threshold, dead, d)


@jit
def _tssl_step(p, e, psi, later, threshold, next_weight, inverse_tau, voltage_keep, delta):  # type: ignore[no-untyped-def]
    for i in range(p.shape[0]):
        b = e[i]
        at_spike = delta[i] * (b - next_weight * later[i] + psi[i] * p[i] * inverse_tau)
        found = at_spike if p[i] > threshold else voltage_keep * psi[i]
        psi[i] = found
        later[i] = b
        delta[i] = found


@jit
def _tssl(p, e, constants, threshold, switches, settings, d):  # type: ignore[no-untyped-def]
    steps, n = p.shape
    voltage_keep, inverse_tau = constants[2], constants[3]
    zero = voltage_keep - voltage_keep
    one = constants[1] / constants[1]
    timing, _, dead = switches
    next_weight = one if timing else zero
    delta = np.empty((steps, n), p.dtype)
    # clip(1 / rise, 0, 8) is 1 / max(rise, 1/8), and nothing where the membrane fell
    _inverse_rises(p, threshold, zero, one / settings[0], zero, delta)
    psi = np.zeros(n, p.dtype)
    later = np.zeros(n, p.dtype)
    for step in range(steps):
        t = steps - 1 - step
        _tssl_step(p[t], e[t], psi, later, threshold, next_weight, inverse_tau, voltage_keep, delta[t])
    _add_errors(p, e, delta, constants, threshold, dead, d)


@jit
def _stbp_step(p, e, slope, lam, threshold, lost_if_fired, cleared_membrane, cleared_level, voltage_keep, d):  # type: ignore[no-untyped-def]
    for i in range(p.shape[0]):
        m, after = p[i], lam[i]
        kept = after - lost_if_fired * after if m > threshold else after
        delta = (e[i] - after * (cleared_membrane * m + cleared_level)) * slope[i] + kept
        lam[i] = voltage_keep * delta
        d[i] += delta


@jit
def _stbp(p, e, constants, threshold, subtract, switches, settings, d):  # type: ignore[no-untyped-def]
    steps, n = p.shape
    voltage_keep = constants[2]
    zero = voltage_keep - voltage_keep
    one = constants[1] / constants[1]
    surrogate, through_reset, _ = switches
    passing = one if through_reset else zero
    lost_if_fired = zero if subtract else one
    cleared_membrane = zero if subtract else passing
    cleared_level = passing * threshold if subtract else zero
    inverse = one / settings[0]
    half, pi, eight = one / (one + one), constants[8], constants[7]
    slope = np.empty(n, p.dtype)
    lam = np.zeros(n, p.dtype)
    for step in range(steps):
        t = steps - 1 - step
        ps = p[t]
        if surrogate == 0:
            for i in range(n):
                slope[i] = inverse if abs(ps[i] - threshold) * inverse < half else zero
        elif surrogate == 1:
            for i in range(n):
                slope[i] = max(one - abs(ps[i] - threshold) * inverse, zero) * inverse
        elif surrogate == 2:
            for i in range(n):
                z = pi * abs(ps[i] - threshold) * inverse
                slope[i] = inverse / (one + z * z)
        else:
            for i in range(n):
                # in four parts, for the series holds to e^-8; beyond e^-32 nothing is left
                series = _exponential(-min(abs(ps[i] - threshold) * inverse * half * half, eight))
                series *= series
                series *= series
                slope[i] = inverse * series / ((one + series) * (one + series))
        _stbp_step(ps, e[t], slope, lam, threshold, lost_if_fired, cleared_membrane, cleared_level, voltage_keep, d[t])


@jit
def _spike_bp_step(p, e, slope, error, threshold, d):  # type: ignore[no-untyped-def]
    for i in range(p.shape[0]):
        error[i] = slope[i] * e[i] if p[i] > threshold else error[i]
        d[i] += error[i]


@jit
def _spike_bp(p, e, constants, threshold, switches, settings, d):  # type: ignore[no-untyped-def]
    steps, n = p.shape
    leak, log_leak = constants[2], constants[4]
    zero = leak - leak
    one = constants[1] / constants[1]
    correction = log_leak if switches[0] else zero
    inverse = one / threshold
    remaining = np.zeros(n, p.dtype)
    total = np.zeros(n, p.dtype)
    for t in range(steps):
        ps = p[t]
        for i in range(n):
            fired = one if ps[i] > threshold else zero
            remaining[i] = leak * remaining[i] + fired
            total[i] += fired
    for i in range(n):
        slope = one if remaining[i] > settings[0] else zero
        remaining[i] = inverse * (slope + correction * remaining[i] / max(total[i], one))
    error = np.zeros(n, p.dtype)
    for step in range(steps):
        t = steps - 1 - step
        _spike_bp_step(p[t], e[t], remaining, error, threshold, d[t])
