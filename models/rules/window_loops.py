"""The compiled loops of windows (Numba): what a thread does with its blocks of neurons.

All of it is in this one file: Numba keeps machine code by file, and does not see where a function of another one has
changed. `forward_task` and `backward_task` are what threads run, without Python; a job tells them where the arrays
are. Each loop over neurons holds selections instead of branches, so that it becomes vector instructions.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

TILE_VALUES = 6144
"""Neurons times rows of a tile, a part of a block, on which the backward pass works."""
SMALLEST_TILE = 512
"""Neurons of a tile, and of a block, at any number of steps: with fewer, the calls of the loops cost too much."""

# The loops below touch up to ten arrays; by default LLVM gives up on proving that they are apart beyond a few.
llvmlite.binding.set_option("spikeport", "--runtime-memory-check-threshold=256")

OPTIONS: dict[str, Any] = {"cache": True, "error_model": "numpy", "boundscheck": False}
jit = numba.njit(nogil=True, **OPTIONS)
contracted = numba.njit(nogil=True, **OPTIONS, fastmath={"contract"})
"""For gradients alone: a product and a sum may be rounded once. What decides on spikes rounds as torch does."""

CSBP, TSSL, STBP, SPIKE_BP = range(4)
SURROGATES = ("rectangular", "triangular", "arctan", "logistic")
CONSTANTS = 10
"""Numbers of a neuron that a job points to; `window_compiled._numbers` makes them."""


ADDRESSES = ("x", "errors", "out", "constants", "thresholds", "taken", "done")
WHOLE_NUMBERS = (
    *("levels", "rows", "steps", "size", "outputs", "span", "block"),
    *("down", "right", "width", "channels"),
    *("subtract", "kind", "first_switch", "second_switch", "third_switch"),
)
NUMBERS = ("setting", "cost", "divisor")


@cache
def job_type(stored: Any, computed: Any) -> np.dtype[Any]:
    """What a task is told. `stored`: type of the tensors (uint16 for bfloat16). `computed`: of the arithmetic.

    Addresses: x, errors, out (dense arrays: inputs and their errors (rows, size), spikes and theirs (steps, outputs));
    constants, thresholds; taken, done (counters, zero at the start: spans that a thread has taken, and neurons that are
    finished). rows: 1 where the inputs are the same at every step. outputs: fewer than size where spikes are pooled.
    span, block: neurons that a thread takes at once, and works on at once. down, right, width, channels: of the pooling
    window and the image, all 0 without. `zero`, of the stored type, is the last field.
    """
    whole = [(name, np.int64) for name in (*ADDRESSES, *WHOLE_NUMBERS)]
    return np.dtype([*whole, *((name, computed) for name in NUMBERS), ("zero", stored)], align=True)


@cache
def compiled_task(task: Callable[[Any], None], job: np.dtype[Any]) -> Any:
    """One of the tasks for a type of jobs, as a C function that takes a pointer."""
    return numba.cfunc(types.void(types.CPointer(numba.from_dtype(job))), **OPTIONS)(task)


@intrinsic
def _pointer(typingctx, address, like):  # type: ignore[no-untyped-def]
    """A pointer to numbers of the type of `like`."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), codegen


@intrinsic
def _add_at(typingctx, address, number):  # type: ignore[no-untyped-def]
    """Add to a counter that threads share; what it was."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


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
    pooled, last_row = max(1, grid[0] * grid[1]), x.shape[0] - 1
    u = np.empty(size, constants.dtype)
    v = np.empty((levels, size), constants.dtype)
    total = np.empty(size, constants.dtype)
    for first in range(start, stop, block):
        last = min(first + block, stop)
        n = last - first
        u[:] = 0
        v[:] = 0
        for t in range(spikes.shape[0]):
            inputs, outputs = x[min(t, last_row), first:last], spikes[t, first // pooled : last // pooled]
            if levels == 1 and not grid[0]:
                _fire(inputs, u, v[0], current_keep, gain, voltage_keep, thresholds[0], kept, outputs)
                continue
            _fire(inputs, u, v[0], current_keep, gain, voltage_keep, thresholds[0], kept, total[:n])
            for level in range(1, levels):
                _fire_again(u[:n], v[level], voltage_keep, thresholds[level], kept, total)
            if grid[0]:
                _sum_windows(total[:n], grid, divisor, like, outputs)
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


@contracted
def _add_filtered(d, state, current_keep, gain, total):  # type: ignore[no-untyped-def]
    for i in range(d.shape[0]):
        state[i] = current_keep * state[i] + gain * d[i]
        total[i] += state[i]


@jit
def _backward(x, error, start, stop, block, constants, thresholds, how, settings, grid, divisor, out):  # type: ignore[no-untyped-def]
    """Blocks in tiles. The arrays of a tile have a row for rest in front of the steps."""
    steps, size, last_row = error.shape[0], min(block, stop - start), x.shape[0] - 1
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
                _spread(error[t, first // pooled : last // pooled], grid, divisor, cost, spread[t])
        for here in range(first, last, tile):
            n = min(tile, last - here)
            for t in range(steps):
                _load(x[min(t, last_row), here : here + n], u[t], current_keep, gain, u[t + 1])
            d[:] = 0
            for level in range(thresholds.shape[0]):
                threshold = thresholds[level]
                if grid[0]:
                    free = cost - cost
                    _level(u, spread, here - first, n, free, constants, threshold, how, settings[0], p, trace, state, d)
                else:
                    _level(u, error, here, n, cost, constants, threshold, how, settings[0], p, trace, state, d)
            state[:2] = 0
            for step in range(steps):
                t = steps - 1 - step
                if last_row == steps - 1:
                    _store(d[t], state[0], current_keep, gain, like, out[t, here : here + n])
                else:
                    _add_filtered(d[t, :n], state[0], current_keep, gain, state[1])
            if last_row < steps - 1:
                for i in range(n):
                    out[0, here + i] = narrow(state[1, i], like)


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


@jit
def _array(address, like, shape):  # type: ignore[no-untyped-def]
    """The dense array of the type of `like` that lies there."""
    return numba.carray(_pointer(address, like), shape)  # type: ignore[call-arg]


@jit
def _next_span(job):  # type: ignore[no-untyped-def]
    """Start and stop of neurons that no thread has taken; the start is not below the size where none are left."""
    start = _add_at(job.taken, 1) * job.span  # type: ignore[call-arg]
    return start, min(start + job.span, job.size)


def forward_task(pointer):  # type: ignore[no-untyped-def]
    """Spikes of the spans that this thread takes."""
    job = numba.carray(pointer, 1)[0]
    x = _array(job.x, job.zero, (job.rows, job.size))
    out = _array(job.out, job.zero, (job.steps, job.outputs))
    constants = _array(job.constants, job.divisor, (CONSTANTS,))
    thresholds = _array(job.thresholds, job.divisor, (job.levels,))
    grid = job.down, job.right, job.width, job.channels
    subtract = job.subtract != 0
    start, stop = _next_span(job)
    while start < job.size:
        _forward(x, start, stop, job.block, constants, thresholds, subtract, grid, job.divisor, out)
        _add_at(job.done, stop - start)  # type: ignore[call-arg]
        start, stop = _next_span(job)


def backward_task(pointer):  # type: ignore[no-untyped-def]
    """Input errors of the spans that this thread takes."""
    job = numba.carray(pointer, 1)[0]
    x = _array(job.x, job.zero, (job.rows, job.size))
    errors = _array(job.errors, job.zero, (job.steps, job.outputs))
    out = _array(job.out, job.zero, (job.rows, job.size))
    constants = _array(job.constants, job.divisor, (CONSTANTS,))
    thresholds = _array(job.thresholds, job.divisor, (job.levels,))
    how = job.subtract != 0, job.kind, (job.first_switch, job.second_switch, job.third_switch)
    grid = job.down, job.right, job.width, job.channels
    settings = job.setting, job.cost
    start, stop = _next_span(job)
    while start < job.size:
        _backward(x, errors, start, stop, job.block, constants, thresholds, how, settings, grid, job.divisor, out)
        _add_at(job.done, stop - start)  # type: ignore[call-arg]
        start, stop = _next_span(job)
