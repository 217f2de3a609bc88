"""Triton kernels of neuron windows. Imported by `window_triton` alone, where Triton is at hand.

One program holds a block of neurons and goes through their steps with all state in registers. Memory is (steps, n), n
neurons in whatever order the tensors' layout has them. Arithmetic is in COMPUTE, float32 or float64, and constants take
its precision. The equations of a step are those of `cuba_lif` and of the rules' own files.

A backward pass takes a window in segments that fit in registers. It runs through the window once and writes down the
state between them, where there are more than two; then, last segment first, it simulates a segment again with u and the
membranes of all its steps kept in registers, and carries the errors back through it.

Values of several levels or steps are tuples of blocks; level k of step i is at i * LEVELS + k.
"""

# Triton joins tuples by + alone, and they grow while a kernel is compiled.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import math
from typing import Any

import triton
import triton.language as tl

from spikeport.models.rules.rule import SURROGATE_CLIP, SURROGATE_WIDTH
from spikeport.models.rules.spike_bp import FORGOTTEN

# A kernel sees a module's constants only as constexpr.
_LOGISTIC_WIDTH = tl.constexpr(SURROGATE_WIDTH)
_LOGISTIC_CLIP = tl.constexpr(SURROGATE_CLIP)
_FORGOTTEN = tl.constexpr(FORGOTTEN)
_PI = tl.constexpr(math.pi)


# --- Memory ----------------------------------------------------------------------------------------------------------


@triton.jit
def _neurons(BLOCK: tl.constexpr) -> Any:
    """Positions of the program's neurons in a row; the last program's may lie beyond its end."""
    return tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _exist(row: tl.tensor, n: tl.tensor, at: tl.tensor, ROWS: tl.constexpr) -> Any:
    return at < tl.where(row < ROWS, n, 0)


@triton.jit
def _load(
    pointer: tl.tensor, n: tl.tensor, at: tl.tensor, first: tl.tensor, COUNT: tl.constexpr, ROWS: tl.constexpr
) -> Any:
    """COUNT of the ROWS rows at a pointer, from `first` on; zeros beyond the last.

    All are under way at once: between stores a load would wait, since the compiler cannot know that they never meet.
    """
    rows = ()
    for i in tl.static_range(COUNT):
        row = tl.cast(first + i, tl.int64)
        rows = rows + (tl.load(pointer + row * n + at, mask=_exist(row, n, at, ROWS), other=0.0),)
    return rows


@triton.jit
def _store(
    pointer: tl.tensor, n: tl.tensor, at: tl.tensor, row: tl.tensor, values: tl.tensor, ROWS: tl.constexpr
) -> None:
    row = tl.cast(row, tl.int64)
    tl.store(pointer + row * n + at, values.to(pointer.dtype.element_ty), mask=_exist(row, n, at, ROWS))


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr) -> Any:
    blocks = ()
    for _ in tl.static_range(COUNT):
        blocks = blocks + (tl.full((BLOCK,), 0, DTYPE),)
    return blocks


# --- The neuron ------------------------------------------------------------------------------------------------------


@triton.jit
def _after_reset(p: tl.tensor, THRESHOLD: tl.constexpr, NEURON: tl.constexpr) -> Any:
    if NEURON.reset_to_zero:
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
    NEURON: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Spikes (steps, n) of x (steps, n), from rest."""
    n = tl.cast(n, tl.int64)
    at = _neurons(BLOCK)
    u = tl.full((BLOCK,), 0, COMPUTE)
    v = _zeros(len(NEURON.thresholds), BLOCK, COMPUTE)
    for first in range(0, STEPS, SEGMENT):
        x = _load(x_pointer, n, at, first, SEGMENT, STEPS)
        for i in tl.static_range(SEGMENT):
            u = NEURON.current_keep * u + NEURON.gain * x[i].to(COMPUTE)
            spikes = tl.full((BLOCK,), 0, COMPUTE)
            next_v = ()
            for k in tl.static_range(len(NEURON.thresholds)):
                p = NEURON.voltage_keep * v[k] + u
                spikes += tl.where(p > NEURON.thresholds[k], 1.0, 0.0)
                next_v = next_v + (_after_reset(p, NEURON.thresholds[k], NEURON),)
            v = next_v
            _store(spikes_pointer, n, at, first + i, spikes, STEPS)


@triton.jit
def _simulate(
    x: tl.tuple,
    state: tl.tuple,
    first: tl.tensor,
    STEPS: tl.constexpr,
    NEURON: tl.constexpr,
    RULE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> Any:
    """u and p of all steps of x, one word a level that has a bit for each quiet step, and the state behind them.

    state: u, then the levels' v, their filtered spikes and their numbers of spikes; beyond the window's end no spike
    counts and no trace fades.
    """
    LEVELS: tl.constexpr = len(NEURON.thresholds)
    currents = ()
    membranes = ()
    quiet = _zeros(LEVELS, BLOCK, tl.int32)
    u = state[0]
    for i in tl.static_range(len(x)):
        inside = first + i < STEPS
        u = NEURON.current_keep * u + NEURON.gain * x[i].to(COMPUTE)
        v = ()
        traces = ()
        counts = ()
        next_quiet = ()
        for k in tl.static_range(LEVELS):
            p = NEURON.voltage_keep * state[1 + k] + u
            spike = tl.where(p > NEURON.thresholds[k], tl.where(inside, 1.0, 0.0), 0.0).to(COMPUTE)
            before = state[1 + LEVELS + k]
            trace = tl.where(inside, RULE.trace_keep * before + RULE.trace_gain * spike, before)
            is_quiet = (trace < 0.25 * RULE.trace_gain).to(tl.int32)
            v = v + (_after_reset(p, NEURON.thresholds[k], NEURON),)
            traces = traces + (trace,)
            counts = counts + (state[1 + 2 * LEVELS + k] + spike,)
            next_quiet = next_quiet + (quiet[k] | (is_quiet << i),)
            membranes = membranes + (p,)
        currents = currents + (u,)
        state = (u,) + v + traces + counts
        quiet = next_quiet
    return currents, membranes, quiet, state


# --- The rules -------------------------------------------------------------------------------------------------------


@triton.jit
def _inverse_rise(rise: tl.tensor, distance: tl.tensor, is_quiet: tl.tensor, RULE: tl.constexpr) -> Any:
    """1 / rise, and on quiet steps the slope of the dead-neuron rule's logistic at a distance p - threshold.

    A quiet step has no spike, so one division, the dearest operation of a step, serves either.
    """
    divisor = tl.maximum(rise, RULE.slope_floor)
    surrogate = divisor
    if RULE.dead_neuron_rule:
        z = tl.minimum(tl.maximum(distance * (-1 / _LOGISTIC_WIDTH), -_LOGISTIC_CLIP), _LOGISTIC_CLIP)
        surrogate = tl.exp(z)
        divisor = tl.where(is_quiet, _LOGISTIC_WIDTH * (1 + surrogate) * (1 + surrogate), divisor)
    inverse = 1 / divisor
    return inverse, surrogate * inverse


@triton.jit
def _surrogate_slope(distance: tl.tensor, RULE: tl.constexpr) -> Any:
    x = tl.abs(distance) * (1 / RULE.width)
    if RULE.surrogate == "rectangular":
        slope = tl.where(x < 0.5, 1.0, 0.0).to(x.dtype) * (1 / RULE.width)
    elif RULE.surrogate == "triangular":
        slope = tl.maximum(1 - x, 0.0) * (1 / RULE.width)
    elif RULE.surrogate == "arctan":
        slope = 1 / (RULE.width * (1 + (_PI * x) * (_PI * x)))
    else:
        tl.static_assert(RULE.surrogate == "logistic")
        z = tl.exp(-x)
        slope = z / (RULE.width * (1 + z) * (1 + z))
    return slope


@triton.jit
def _activation_slopes(state: tl.tuple, NEURON: tl.constexpr, RULE: tl.constexpr) -> Any:
    """a' of spike_bp, for each level, from the state at the window's end; without correction log_leak is 0."""
    LEVELS: tl.constexpr = len(NEURON.thresholds)
    slopes = ()
    for k in tl.static_range(LEVELS):
        trace = state[1 + LEVELS + k]
        count = tl.maximum(state[1 + 2 * LEVELS + k], 1.0)
        slope = tl.where(trace > _FORGOTTEN, 1.0, 0.0) + RULE.log_leak * trace / count
        slopes = slopes + (slope / NEURON.thresholds[k],)
    return slopes


@triton.jit
def _csbp(
    error: tl.tensor,
    later_error: tl.tensor,
    lam: tl.tensor,
    u: tl.tensor,
    inverse_rise: tl.tensor,
    fired: tl.tensor,
    THRESHOLD: tl.constexpr,
    NEURON: tl.constexpr,
    RULE: tl.constexpr,
) -> Any:
    total = -error
    if RULE.shifted:
        total = later_error - error
    if RULE.across_spikes:
        if NEURON.reset_to_zero:
            total -= lam * u
        else:
            total -= lam * (THRESHOLD * NEURON.inverse_tau_mem)
    through_spike = -total * inverse_rise
    if not NEURON.reset_to_zero:
        through_spike += lam
    delta = tl.where(fired, through_spike, lam)
    return delta, NEURON.voltage_keep * delta


@triton.jit
def _tssl(
    error: tl.tensor,
    later_error: tl.tensor,
    psi: tl.tensor,
    p: tl.tensor,
    rise: tl.tensor,
    inverse_rise: tl.tensor,
    fired: tl.tensor,
    NEURON: tl.constexpr,
    RULE: tl.constexpr,
) -> Any:
    if RULE.shifted:
        error = error - later_error
    inverse = tl.where(rise > 0, inverse_rise, 0.0)
    at_spike = inverse * (error + psi * p * NEURON.inverse_tau_mem)
    delta = tl.where(fired, at_spike, NEURON.voltage_keep * psi)
    return delta, delta


@triton.jit
def _stbp(
    error: tl.tensor,
    lam: tl.tensor,
    p: tl.tensor,
    fired: tl.tensor,
    THRESHOLD: tl.constexpr,
    NEURON: tl.constexpr,
    RULE: tl.constexpr,
) -> Any:
    kept = lam
    if NEURON.reset_to_zero:
        kept = tl.where(fired, 0.0, lam)
    if RULE.through_reset:
        if NEURON.reset_to_zero:
            error = error - lam * p
        else:
            error = error - lam * THRESHOLD
    delta = error * _surrogate_slope(p - THRESHOLD, RULE) + kept
    return delta, NEURON.voltage_keep * delta


# --- The backward pass -----------------------------------------------------------------------------------------------


@triton.jit
def backward_kernel(
    x_pointer: tl.tensor,
    errors_pointer: tl.tensor,
    out_pointer: tl.tensor,
    states_pointer: tl.tensor,
    n: tl.tensor,
    STEPS: tl.constexpr,
    SEGMENT: tl.constexpr,
    STRIDE: tl.constexpr,
    NEURON: tl.constexpr,
    RULE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """dL/dx (steps, n) from x and B = dL/ds.

    states: room for the state before each segment but the first and the last, (segments - 2, 1 + 3 levels, n).
    STRIDE: steps that the first run through the window takes at a time; divides SEGMENT.
    """
    LEVELS: tl.constexpr = len(NEURON.thresholds)
    LAST: tl.constexpr = (STEPS - 1) // SEGMENT
    STATE: tl.constexpr = 1 + 3 * LEVELS
    ROWS: tl.constexpr = (LAST - 1) * STATE
    n = tl.cast(n, tl.int64)
    at = _neurons(BLOCK)
    at_rest = _zeros(STATE, BLOCK, COMPUTE)
    state = at_rest
    for segment in range(LAST):
        if segment > 0:
            for j in tl.static_range(STATE):
                _store(states_pointer, n, at, (segment - 1) * STATE + j, state[j], ROWS)
        for first in range(segment * SEGMENT, (segment + 1) * SEGMENT, STRIDE):
            x = _load(x_pointer, n, at, first, STRIDE, STEPS)
            _, _, _, state = _simulate(x, state, first, STEPS, NEURON, RULE, COMPUTE, BLOCK)
    if LAST > 1:
        tl.debug_barrier()  # a thread may read back what another one wrote
    carried = _zeros(LEVELS, BLOCK, COMPUTE)
    slopes = carried
    later_error = tl.full((BLOCK,), 0, COMPUTE)
    input_error = later_error
    for segment in range(LAST, -1, -1):
        first = segment * SEGMENT
        x = _load(x_pointer, n, at, first, SEGMENT, STEPS)
        errors = _load(errors_pointer, n, at, first, SEGMENT, STEPS)
        if segment < LAST:
            state = at_rest
            if segment > 0:
                state = _load(states_pointer, n, at, (segment - 1) * STATE, STATE, ROWS)
        start_v = state[1 : 1 + LEVELS]
        currents, membranes, quiet, state = _simulate(x, state, first, STEPS, NEURON, RULE, COMPUTE, BLOCK)
        if RULE.rule == "spike_bp":  # noqa: SIM102  known while compiling, unlike the other
            if segment == LAST:
                slopes = _activation_slopes(state, NEURON, RULE)
        for i in tl.static_range(SEGMENT - 1, -1, -1):
            error = tl.where(first + i < STEPS, errors[i].to(COMPUTE) + RULE.spike_cost, 0.0)
            current_error = tl.full((BLOCK,), 0, COMPUTE)
            next_carried = ()
            for k in tl.static_range(LEVELS):
                p = membranes[i * LEVELS + k]
                fired = p > NEURON.thresholds[k]
                if i > 0:
                    rise = p - _after_reset(membranes[(i - 1) * LEVELS + k], NEURON.thresholds[k], NEURON)
                else:
                    rise = p - start_v[k]
                is_quiet = ((quiet[k] >> i) & 1) != 0
                inverse_rise, surrogate = _inverse_rise(rise, p - NEURON.thresholds[k], is_quiet, RULE)
                if RULE.rule == "csbp":
                    delta, carry = _csbp(
                        error,
                        later_error,
                        carried[k],
                        currents[i],
                        inverse_rise,
                        fired,
                        NEURON.thresholds[k],
                        NEURON,
                        RULE,
                    )
                elif RULE.rule == "tssl":
                    delta, carry = _tssl(error, later_error, carried[k], p, rise, inverse_rise, fired, NEURON, RULE)
                elif RULE.rule == "stbp":
                    delta, carry = _stbp(error, carried[k], p, fired, NEURON.thresholds[k], NEURON, RULE)
                else:
                    tl.static_assert(RULE.rule == "spike_bp")
                    delta = tl.where(fired, slopes[k] * error, carried[k])
                    carry = delta
                if RULE.dead_neuron_rule:
                    delta = tl.where(is_quiet, error * surrogate, delta)
                current_error += delta
                next_carried = next_carried + (carry,)
            carried = next_carried
            later_error = error
            input_error = NEURON.current_keep * input_error + NEURON.gain * current_error
            _store(out_pointer, n, at, first + i, input_error, STEPS)
