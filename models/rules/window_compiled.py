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
from functools import lru_cache
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
from spikeport.models.threads import in_spans

if TYPE_CHECKING:
    from spikeport.models.rules.rule import Rule

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
BLOCK_VALUES = 16384
"""Neurons times steps of a block: its arrays stay in the second-level cache of a core."""
TILE_VALUES = 6144
"""Neurons times rows of a tile, a part of a block, on which the backward pass works."""
SMALLEST_TILE = 512
"""Neurons of a tile, and of a block, at any number of steps: with fewer, the calls of the loops cost too much."""
CHANNELS_LAST = (0, 1, 3, 4, 2)
"""Order in memory of (steps, batch, channels, height, width) that pooling needs."""

# The loops below touch up to ten arrays; by default LLVM gives up on proving that they are apart beyond a few.
llvmlite.binding.set_option("spikeport", "--runtime-memory-check-threshold=256")

jit = numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)
contracted = numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False, fastmath={"contract"})
"""For gradients alone: a product and a sum may be rounded once. What decides on spikes rounds as torch does."""

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
    constants, thresholds = _numbers(neuron, dtype)
    grid, divisor, row = _grid(x, pooling, dtype)
    subtract = neuron.reset == "subtract"

    def work(start: int, stop: int, block: int) -> None:
        _forward(inputs, start, stop, block, constants, thresholds, subtract, grid, divisor, outputs)

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
    constants, thresholds = _numbers(neuron, dtype)
    kind, switches, numbers = _settings(rule)
    settings = np.asarray(numbers, dtype)
    grid, divisor, row = _grid(x, pooling, dtype)
    how = (neuron.reset == "subtract", kind, switches)

    def work(start: int, stop: int, block: int) -> None:
        _backward(inputs, errors, start, stop, block, constants, thresholds, how, settings, grid, divisor, outputs)

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


def _compute_type(x: torch.Tensor) -> Any:
    return np.float64 if x.dtype == torch.float64 else np.float32


@lru_cache(maxsize=64)
def _numbers(neuron: CubaLIF, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """current_keep, input_gain, voltage_keep, 1 / tau_mem, ln(voltage_keep), 1 / (4 tau_syn), then 5, 8, pi and
    infinity, in the type that is computed in, so that no loop widens to float64; and the thresholds."""
    leak = math.log(neuron.voltage_keep) if neuron.voltage_keep > 0 else 0.0
    values = (neuron.current_keep, neuron.input_gain, neuron.voltage_keep, 1 / neuron.tau_mem, leak)
    constants = np.asarray((*values, 1 / (4 * neuron.tau_syn), 5.0, 8.0, math.pi, math.inf), dtype)
    return constants, np.asarray(neuron.thresholds, dtype)


def _flat(x: torch.Tensor, order: tuple[int, ...] | None = None) -> tuple[np.ndarray, tuple[int, ...]]:
    """x as an array (steps, neurons) in memory order, copied only where it is not dense in `order`; and that order."""
    moved = x.detach()
    if order is None:
        order = tuple(range(x.dim()))
        if not x.is_contiguous():
            strides = x.stride()
            order = (0, *sorted(order[1:], key=lambda axis: (-strides[axis], axis)))
    if order != tuple(range(x.dim())):
        moved = moved.permute(order)
    moved = moved.contiguous().view(x.shape[0], -1)
    raw = moved.view(torch.uint16) if x.dtype == torch.bfloat16 else moved
    array: np.ndarray = raw.numpy()
    return array, order


def _dense(shape: Sequence[int], dtype: torch.dtype, order: tuple[int, ...]) -> torch.Tensor:
    """An empty tensor, dense in `order`, so that `_flat` gives its own memory and no copy."""
    axes = sorted(range(len(shape)), key=order.__getitem__)
    return torch.empty([shape[axis] for axis in order], dtype=dtype).permute(axes)


def in_blocks(work: Callable[[int, int, int], None], shape: tuple[int, ...], row: int = 1) -> None:
    """work(start, stop, block) on spans of the neurons of (steps, neurons), to be done in blocks that fit the cache, of
    whole rows of so many."""
    steps, size = shape
    block = max(1, max(SMALLEST_TILE, BLOCK_VALUES // steps) // row) * row
    in_spans(lambda start, stop: work(start, stop, block), size, block)


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


def _hyperbolic_cosine(y):  # type: ignore[no-untyped-def]
    """2 cosh(y / 2) for 0 <= y <= 8, without branches."""


@overload(_hyperbolic_cosine, jit_options={"fastmath": {"contract"}})
def _hyperbolic_cosine_of(y):  # type: ignore[no-untyped-def]
    # cosh(y / 8) by a series, and cosh(2 z) = 2 cosh(z)^2 - 1 twice
    if y == types.float32:
        eighth, one, two = np.float32(0.125), np.float32(1), np.float32(2)
        c2, c4, c6, c8 = (np.float32(1 / math.factorial(k)) for k in (2, 4, 6, 8))

        def short(y):  # type: ignore[no-untyped-def]
            z = (y * eighth) * (y * eighth)
            cosine = one + z * (c2 + z * (c4 + z * (c6 + z * c8)))
            cosine = two * cosine * cosine - one
            return two * (two * cosine * cosine - one)

        return short
    d2, d4, d6, d8, d10, d12, d14, d16, d18 = (1 / math.factorial(k) for k in range(2, 20, 2))

    def long(y):  # type: ignore[no-untyped-def]
        z = (y * 0.125) * (y * 0.125)
        high = d8 + z * (d10 + z * (d12 + z * (d14 + z * (d16 + z * d18))))
        cosine = 1.0 + z * (d2 + z * (d4 + z * (d6 + z * high)))
        cosine = 2.0 * cosine * cosine - 1.0
        return 2.0 * (2.0 * cosine * cosine - 1.0)

    return long


# A loop over neurons inside a loop over time becomes vector instructions as a function of its own alone.


@jit
def _forward(x, start, stop, block, constants, thresholds, subtract, grid, divisor, spikes):  # type: ignore[no-untyped-def]
    levels, size = thresholds.shape[0], min(block, stop - start)
    current_keep, gain, voltage_keep = constants[0], constants[1], constants[2]
    zero = gain - gain
    kept = gain / gain if subtract else zero
    like = spikes[0, 0]
    pooled = max(1, grid[0] * grid[1])
    u = np.empty(size, constants.dtype)
    v = np.empty((levels, size), constants.dtype)
    total = np.empty(size, constants.dtype)
    for first in range(start, stop, block):
        last = min(first + block, stop)
        n = last - first
        u[:] = 0
        v[:] = 0
        for t in range(x.shape[0]):
            inputs, outputs = x[t, first:last], spikes[t, first // pooled : last // pooled]
            if levels == 1 and not grid[0]:
                _fire(inputs, u, v[0], current_keep, gain, voltage_keep, thresholds[0], kept, outputs)
                continue
            _fire(inputs, u, v[0], current_keep, gain, voltage_keep, thresholds[0], kept, total[:n])
            for level in range(1, levels):
                _fire_again(u[:n], v[level], voltage_keep, thresholds[level], kept, total)
            if grid[0]:
                _sum_windows(total[:n], grid, divisor[0], like, outputs)
            else:
                for i in range(n):
                    outputs[i] = narrow(total[i], like)


@jit
def _fire(inputs, u, v, current_keep, gain, voltage_keep, threshold, kept, spikes):  # type: ignore[no-untyped-def]
    """A step of the first level."""
    zero = gain - gain
    one = gain / gain
    like = spikes[0]
    for i in range(inputs.shape[0]):
        current = current_keep * u[i] + gain * widen(inputs[i])
        p = voltage_keep * v[i] + current
        fired = p > threshold
        u[i] = current
        v[i] = kept * (p - threshold) if fired else p
        spikes[i] = narrow(one if fired else zero, like)


@jit
def _fire_again(u, v, voltage_keep, threshold, kept, total):  # type: ignore[no-untyped-def]
    """A step of another level of the same neurons; its spikes are added to the total."""
    zero = threshold - threshold
    one = threshold / threshold
    for i in range(u.shape[0]):
        p = voltage_keep * v[i] + u[i]
        fired = p > threshold
        total[i] += one if fired else zero
        v[i] = kept * (p - threshold) if fired else p


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


@jit
def _load(inputs, before, current_keep, gain, u):  # type: ignore[no-untyped-def]
    for i in range(inputs.shape[0]):
        u[i] = current_keep * before[i] + gain * widen(inputs[i])


@contracted
def _store(d, state, current_keep, gain, like, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        state[i] = current_keep * state[i] + gain * d[i]
        out[i] = narrow(state[i], like)


@jit
def _backward(x, error, start, stop, block, constants, thresholds, how, settings, grid, divisor, out):  # type: ignore[no-untyped-def]
    """Blocks in tiles. The arrays of a tile have a row for rest in front of the steps."""
    steps, size = x.shape[0], min(block, stop - start)
    current_keep, gain, cost = constants[0], constants[1], settings[1]
    like = out[0, 0]
    pooled = max(1, grid[0] * grid[1])
    tile = min(size, max(SMALLEST_TILE, TILE_VALUES // (steps + 1)))
    spread = np.empty((steps, size if grid[0] else 0), constants.dtype)
    u = np.zeros((steps + 1, tile), constants.dtype)
    p = np.zeros((steps + 1, tile), constants.dtype)
    trace = np.zeros((steps + 1, tile), constants.dtype)
    d = np.empty((steps, tile), constants.dtype)
    state = np.empty((3, tile), constants.dtype)
    for first in range(start, stop, block):
        last = min(first + block, stop)
        if grid[0]:
            for t in range(steps):
                _spread(error[t, first // pooled : last // pooled], grid, divisor[0], cost, spread[t])
        for here in range(first, last, tile):
            n = min(tile, last - here)
            for t in range(steps):
                _load(x[t, here : here + n], u[t], current_keep, gain, u[t + 1])
            d[:] = 0
            for level in range(thresholds.shape[0]):
                threshold = thresholds[level]
                if grid[0]:
                    free = cost - cost
                    _level(u, spread, here - first, n, free, constants, threshold, how, settings[0], p, trace, state, d)
                else:
                    _level(u, error, here, n, cost, constants, threshold, how, settings[0], p, trace, state, d)
            state[0] = 0
            for step in range(steps):
                t = steps - 1 - step
                _store(d[t], state[0], current_keep, gain, like, out[t, here : here + n])


@jit
def _level(u, e, place, n, cost, constants, threshold, how, setting, p, trace, state, d):  # type: ignore[no-untyped-def]
    """Simulate a level of a tile again and add what its spikes have to do with the currents to d. Its errors are
    e[:, place : place + n] plus the cost of a spike."""
    subtract, kind, switches = how
    steps = d.shape[0]
    gain, voltage_keep, inverse_tau = constants[1], constants[2], constants[3]
    zero = gain - gain
    one = gain / gain
    soft = one if subtract else zero
    traced = switches[2] != 0 and kind in (CSBP, TSSL)
    quiet = constants[5] if traced else -constants[9]
    for t in range(1, steps + 1):
        if traced:
            _simulate(u[t, :n], p[t - 1], trace[t - 1], constants, threshold, soft, p[t], trace[t])
        else:
            _membranes(u[t, :n], p[t - 1], voltage_keep, threshold, soft, p[t])
    state[:] = 0
    if kind == SPIKE_BP:
        _spike_slopes(p, constants, threshold, setting, switches[0], state)
    for step in range(steps):
        t = steps - 1 - step
        last, now, traces, adjoint = p[t], p[t + 1, :n], trace[t + 1], state[0]
        errors, later = e[t, place : place + n], e[min(t + 1, steps - 1), place : place + n]
        next_one = one if switches[0] and step else zero
        if kind == CSBP:
            passing = one if switches[1] else zero
            hard, lost = (one - soft) * passing, threshold * inverse_tau * soft * passing
            factors = cost, soft, hard, lost, next_one, quiet
            _csbp(u[t + 1], last, now, errors, later, traces, adjoint, constants, threshold, setting, factors, d[t])
        elif kind == TSSL:
            factors_of_tssl = cost, next_one, quiet
            _tssl(last, now, errors, later, traces, adjoint, constants, threshold, setting, factors_of_tssl, d[t])
        elif kind == STBP:
            _slopes(now, threshold, switches[0], one / setting, constants, state[1])
            through_reset = one if switches[1] else zero
            _stbp(now, errors, state[1], adjoint, threshold, cost, soft, through_reset, voltage_keep, d[t])
        else:
            _spike_bp(now, errors, state[1], adjoint, threshold, cost, d[t])


@jit
def _reset(p, threshold, soft):  # type: ignore[no-untyped-def]
    """The membrane that a step leaves behind."""
    return soft * (p - threshold) if p > threshold else p


@jit
def _membranes(u, last, voltage_keep, threshold, soft, p):  # type: ignore[no-untyped-def]
    """p of one step from that of the last one."""
    for i in range(u.shape[0]):
        p[i] = voltage_keep * _reset(last[i], threshold, soft) + u[i]


@jit
def _simulate(u, last, trace_before, constants, threshold, soft, p, trace):  # type: ignore[no-untyped-def]
    """The same, and the neurons' own filtered spikes."""
    current_keep, gain, voltage_keep = constants[0], constants[1], constants[2]
    zero = gain - gain
    for i in range(u.shape[0]):
        m = voltage_keep * _reset(last[i], threshold, soft) + u[i]
        p[i] = m
        trace[i] = current_keep * trace_before[i] + (gain if m > threshold else zero)


@contracted
def _quiet_slope(distance, steepness, eight):  # type: ignore[no-untyped-def]
    """f'(p - threshold) of the dead-neuron rule: 5 z / (1 + z)^2, z = e^(-5 |distance|), as 5 / (z^-1/2 + z^1/2)^2."""
    double_cosine = _hyperbolic_cosine(min(abs(distance) * steepness, eight))
    return steepness / (double_cosine * double_cosine)


@contracted
def _csbp(u, last, p, e, e_later, trace, lam, constants, threshold, floor, factors, d):  # type: ignore[no-untyped-def]
    cost, soft, hard, lost, next_one, quiet = factors
    voltage_keep, steepness, eight = constants[2], constants[6], constants[7]
    one = eight / eight
    for i in range(p.shape[0]):
        m, after = p[i], lam[i]
        b = widen(e[i]) + cost
        rise = m - _reset(last[i], threshold, soft)
        time_error = next_one * (widen(e_later[i]) + cost) - b - after * (hard * u[i] + lost)
        at_spike = soft * after - time_error * (one / max(rise, floor))
        found = at_spike if m > threshold else after
        lam[i] = voltage_keep * found
        surrogate = b * _quiet_slope(m - threshold, steepness, eight)
        d[i] += surrogate if trace[i] < quiet else found


@contracted
def _tssl(last, p, e, e_later, trace, psi, constants, threshold, largest, factors, d):  # type: ignore[no-untyped-def]
    cost, next_one, quiet = factors
    voltage_keep, inverse_tau, steepness, eight = constants[2], constants[3], constants[6], constants[7]
    one = eight / eight
    zero = one - one
    floor = one / largest
    for i in range(p.shape[0]):
        m, before, after = p[i], last[i], psi[i]
        b = widen(e[i]) + cost
        rise = m - (zero if before > threshold else before)
        # clip(1 / rise, 0, largest), and nothing where the membrane fell
        inverse = one / max(rise, floor) if rise > zero else zero
        at_spike = inverse * (b - next_one * (widen(e_later[i]) + cost) + after * m * inverse_tau)
        found = at_spike if m > threshold else voltage_keep * after
        psi[i] = found
        surrogate = b * _quiet_slope(m - threshold, steepness, eight)
        d[i] += surrogate if trace[i] < quiet else found


@contracted
def _slopes(p, threshold, surrogate, inverse, constants, slope):  # type: ignore[no-untyped-def]
    eight, pi = constants[7], constants[8]
    one = eight / eight
    zero, half = one - one, one / (one + one)
    n = p.shape[0]
    if surrogate == 0:
        for i in range(n):
            slope[i] = inverse if abs(p[i] - threshold) * inverse < half else zero
    elif surrogate == 1:
        for i in range(n):
            slope[i] = max(one - abs(p[i] - threshold) * inverse, zero) * inverse
    elif surrogate == 2:
        for i in range(n):
            z = pi * abs(p[i] - threshold) * inverse
            slope[i] = inverse / (one + z * z)
    else:
        for i in range(n):
            # 2 cosh(2 z) = (2 cosh(z))^2 - 2 twice, for the series holds to 8; beyond 32 nothing is left
            double = _hyperbolic_cosine(min(abs(p[i] - threshold) * inverse * half * half, eight))
            double = double * double - one - one
            double = double * double - one - one
            slope[i] = inverse / (double * double)


@contracted
def _stbp(p, e, slope, lam, threshold, cost, soft, passing, voltage_keep, d):  # type: ignore[no-untyped-def]
    one = threshold / threshold
    lost_if_fired = one - soft
    cleared_membrane, cleared_level = (one - soft) * passing, soft * passing * threshold
    for i in range(p.shape[0]):
        m, after = p[i], lam[i]
        kept = after - lost_if_fired * after if m > threshold else after
        delta = (widen(e[i]) + cost - after * (cleared_membrane * m + cleared_level)) * slope[i] + kept
        lam[i] = voltage_keep * delta
        d[i] += delta


@jit
def _spike_slopes(p, constants, threshold, forgotten, corrected, state):  # type: ignore[no-untyped-def]
    """The one factor of all steps in state[1], from the spikes that the end remembers and their number."""
    leak, log_leak = constants[2], constants[4]
    zero = leak - leak
    one = constants[1] / constants[1]
    correction = log_leak if corrected else zero
    inverse = one / threshold
    remaining, total = state[1], state[2]
    n = p.shape[1]
    for t in range(1, p.shape[0]):
        ps = p[t]
        for i in range(n):
            fired = one if ps[i] > threshold else zero
            remaining[i] = leak * remaining[i] + fired
            total[i] += fired
    for i in range(n):
        slope = one if remaining[i] > forgotten else zero
        remaining[i] = inverse * (slope + correction * remaining[i] / max(total[i], one))


@jit
def _spike_bp(p, e, slope, error, threshold, cost, d):  # type: ignore[no-untyped-def]
    for i in range(p.shape[0]):
        error[i] = slope[i] * (widen(e[i]) + cost) if p[i] > threshold else error[i]
        d[i] += error[i]
