"""Synapses as a core stores them: the input lists of an operator, axon by axon, and the words they take.

An axon is a pooled source cell with at least one synapse. Lists that differ only in where they begin are stored once,
which is how convolution weights stay shared inside a core.

The output channels that one source cell reaches in one pixel lie at equal distances in a core, in either order of
cutting (HWC and CHW), and a core holds runs of them. A list's hash is a polynomial in a fixed base, weight by weight at
the power of its place, so a run's part is a difference of prefix sums: a convolution is surveyed run by run, not
synapse by synapse.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

from spikeport.converters.operators import Conv2d, Dense, OneToOne, Operator, Sparse, SumPool
from spikeport.deploy.chip import SynapticList


class Synapses(NamedTuple):
    """The synapses of one operator, to be listed axon by axon without storing them all.

    axon_of: axon of each source neuron, -1 where it feeds no synapse, int64 (n_in,). A convolution (a dense layer is
    one over a single pixel) has `geometry` and `weight` (out, in / groups, height, width) and for each axon the pooled
    cells it feeds, cell[cell_start[a] : cell_start[a + 1]]; other operators list targets and weights in rows. Weights
    are whole numbers, or the bits of float64 values: they are only compared.
    """

    axon_of: np.ndarray
    n_out: int
    geometry: np.ndarray
    weight: np.ndarray
    cell_start: np.ndarray
    cell: np.ndarray
    row_start: np.ndarray
    row_target: np.ndarray
    row_weight: np.ndarray

    @property
    def n_axons(self) -> int:
        """How many axons the sources have."""
        return max(len(self.cell_start), len(self.row_start)) - 1


def _weight_type(operator: Operator) -> type:
    """The type whose bits `Synapses` holds; int64 weights stay where they are."""
    return np.int64 if operator.weight.dtype == np.int64 else np.float64


def list_synapses(operator: Operator) -> Synapses:
    """The synapses of an operator in the form that the kernels read."""
    none = np.zeros(0, dtype=np.int64)
    bits = np.ascontiguousarray(operator.weight, dtype=_weight_type(operator)).view(np.int64)
    if isinstance(operator, Sparse | OneToOne):
        pairs = np.arange(operator.n_in) if isinstance(operator, OneToOne) else operator.source
        targets = np.arange(operator.n_in) if isinstance(operator, OneToOne) else operator.target
        order = np.argsort(pairs, kind="stable")
        start = np.concatenate([[0], np.cumsum(np.bincount(pairs, minlength=operator.n_in))]).astype(np.int64)
        axons = np.arange(operator.n_in)
        rows = targets[order].astype(np.int64), bits[order]
        return Synapses(axons, operator.n_out, none, np.zeros((0, 0, 0, 0), np.int64), none, none, start, *rows)
    axon_of, start, cell = _axons(operator)
    if isinstance(operator, Conv2d):
        geometry = [*operator.pooled_shape[1:], *operator.out_shape[1:]]
        geometry += [*operator.stride, *operator.padding, *operator.dilation, operator.groups]
    elif isinstance(operator, Dense):
        bits = bits[:, :, None, None]
        geometry = [1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1]
    else:
        raise TypeError(f"no rule for the synapses of a {operator.kind} operator.")
    return Synapses(axon_of, operator.n_out, np.array(geometry, np.int64), bits, start, cell, none, none, none)


def _axons(operator: Operator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Axon of each source neuron, and the pooled cells of each axon (start, cell)."""
    pool = operator.pool
    pooled = math.prod(operator.pooled_shape)
    if pool is None:
        return np.arange(pooled), np.arange(pooled + 1), np.arange(pooled)
    neuron, cell = _windows(operator, pool)
    if pool.kernel[0] <= pool.stride[0] and pool.kernel[1] <= pool.stride[1]:
        axon_of = np.full(operator.n_in, -1, dtype=np.int64)
        axon_of[neuron] = cell
        return axon_of, np.arange(pooled + 1), np.arange(pooled)
    order = np.argsort(neuron, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(neuron, minlength=operator.n_in))])
    return np.arange(operator.n_in), start.astype(np.int64), cell[order]


def _windows(operator: Operator, pool: SumPool) -> tuple[np.ndarray, np.ndarray]:
    """Every (source neuron, pooled cell) pair, flat indices."""
    c, y, x, i, j = np.ogrid[tuple(slice(n) for n in (*operator.pooled_shape, *pool.kernel))]
    _, height, width = operator.in_shape
    neuron = (c * height + y * pool.stride[0] + i) * width + x * pool.stride[1] + j
    cell = (c * operator.pooled_shape[1] + y) * operator.pooled_shape[2] + x
    return neuron.ravel(), np.broadcast_to(cell, neuron.shape).ravel()


@numba.njit(cache=True, nogil=True)
def _list_axon(synapses: Any, axon: int, targets: np.ndarray, weights: np.ndarray) -> int:
    """Write the targets and weights of one axon's synapses; return how many."""
    n = 0
    if synapses.geometry.size == 0:
        for k in range(synapses.row_start[axon], synapses.row_start[axon + 1]):
            targets[n] = synapses.row_target[k]
            weights[n] = synapses.row_weight[k]
            n += 1
        return n
    height, width, out_height, out_width, sy, sx, py, px, dy, dx, groups = synapses.geometry
    weight = synapses.weight
    out_group, in_group = weight.shape[0] // groups, weight.shape[1]
    for k in range(synapses.cell_start[axon], synapses.cell_start[axon + 1]):
        channel, rest = divmod(synapses.cell[k], height * width)
        y, x = divmod(rest, width)
        group, inner = divmod(channel, in_group)
        for i in range(weight.shape[2]):
            row, odd = divmod(y + py - i * dy, sy)
            if odd or row < 0 or row >= out_height:
                continue
            for j in range(weight.shape[3]):
                column, odd = divmod(x + px - j * dx, sx)
                if odd or column < 0 or column >= out_width:
                    continue
                for out in range(group * out_group, (group + 1) * out_group):
                    targets[n] = (out * out_height + row) * out_width + column
                    weights[n] = weight[out, inner, i, j]
                    n += 1
    return n


@numba.njit(cache=True, nogil=True)
def _mix(x: np.uint64) -> np.uint64:
    """splitmix64: every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _survey(
    synapses: Any,
    n_axons: int,
    longest: int,
    position: np.ndarray,
    core_of: np.ndarray,
    n_cores: int,
    records: np.ndarray,
    hashes: np.ndarray,
) -> int:
    """Write one record for each (axon, core) with synapses: axon, core, synapses, span, 1 if its targets are
    consecutive; and a hash of its input list that does not depend on the base offset nor on the order of the synapses.
    Returns how many there are; those beyond the length of `records` are not written."""
    targets, weights = np.empty(longest, np.int64), np.empty(longest, np.int64)
    count, low, high = np.zeros(n_cores, np.int64), np.empty(n_cores, np.int64), np.empty(n_cores, np.int64)
    total, touched = np.zeros(n_cores, np.uint64), np.empty(n_cores, np.int64)
    # only overlapping pooling windows can lead twice from one axon to one target
    last_axon, repeats = np.full(len(position), -1, np.int64), np.zeros(n_cores, np.int64)
    n_records = 0
    for axon in range(n_axons):
        n = _list_axon(synapses, axon, targets, weights)
        n_touched = 0
        for k in range(n):
            core = core_of[targets[k]]
            if core < 0:
                continue
            place = position[targets[k]]
            if count[core] == 0:
                touched[n_touched] = core
                n_touched += 1
                low[core] = high[core] = place
                total[core] = np.uint64(0)
                repeats[core] = 0
            count[core] += 1
            repeats[core] += last_axon[targets[k]] == axon
            last_axon[targets[k]] = axon
            low[core], high[core] = min(low[core], place), max(high[core], place)
        for k in range(n):
            core = core_of[targets[k]]
            if core >= 0:
                offset = np.uint64(position[targets[k]] - low[core] + 1)
                total[core] += _mix(_mix(np.uint64(weights[k])) + offset * np.uint64(0x9E3779B97F4A7C15))
        for k in range(n_touched):
            core = touched[k]
            span = high[core] - low[core] + 1
            if n_records < len(records):
                records[n_records, 0], records[n_records, 1] = axon, core
                records[n_records, 2], records[n_records, 3] = count[core], span
                records[n_records, 4] = int(repeats[core] == 0 and span == count[core])
                hashes[n_records] = total[core]
            n_records += 1
            count[core] = 0
    return n_records


_PRIME = np.uint64((1 << 61) - 1)
_BASE = 0x0F1E_2D3C_4B5A_6978
_LOW_30, _LOW_31 = np.uint64((1 << 30) - 1), np.uint64((1 << 31) - 1)


@numba.njit(cache=True, nogil=True)
def _reduced(x: np.uint64) -> np.uint64:
    """x modulo 2^61 - 1."""
    x = (x >> np.uint64(61)) + (x & _PRIME)
    return x - _PRIME if x >= _PRIME else x


@numba.njit(cache=True, nogil=True)
def _times(a: np.uint64, b: np.uint64) -> np.uint64:
    """a b modulo 2^61 - 1, by halves of 31 bits."""
    a_high, a_low = a >> np.uint64(31), a & _LOW_31
    b_high, b_low = b >> np.uint64(31), b & _LOW_31
    middle = a_low * b_high + a_high * b_low
    high = a_high * b_high * np.uint64(2) + (middle >> np.uint64(30))
    return _reduced(high + ((middle & _LOW_30) << np.uint64(31)) + a_low * b_low)


@numba.njit(cache=True, nogil=True)
def _powers(base: np.uint64, n: int) -> np.ndarray:
    """base^0 .. base^(n - 1) modulo 2^61 - 1."""
    powers = np.ones(n, np.uint64)
    for k in range(1, n):
        powers[k] = _times(powers[k - 1], base)
    return powers


@numba.njit(cache=True, nogil=True)
def _prefix_sums(weight: np.ndarray, base: np.uint64) -> np.ndarray:
    """Sums over the first output channels of (hashed weight) base^channel: (out + 1, weights of one channel)."""
    sums, power = np.zeros((weight.shape[0] + 1, weight.shape[1]), np.uint64), np.uint64(1)
    for out in range(weight.shape[0]):
        for k in range(weight.shape[1]):
            hashed = _reduced(_mix(np.uint64(weight[out, k]) + np.uint64(0x9E3779B97F4A7C15)))
            sums[out + 1, k] = _reduced(sums[out, k] + _times(hashed, power))
        power = _times(power, base)
    return sums


@numba.njit(cache=True, nogil=True)
def _runs(core_of: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of output channels that lie on one core, pixel by pixel: first run of each pixel, core and first channel of
    each run; a run ends where the next one begins. core_of: (channels, pixels)."""
    channels, pixels = core_of.shape
    start = np.zeros(pixels + 1, np.int64)
    for out in range(channels):
        for pixel in range(pixels):
            start[pixel + 1] += out == 0 or core_of[out, pixel] != core_of[out - 1, pixel]
    start = np.cumsum(start)
    core, first, end = np.empty(start[-1], np.int64), np.empty(start[-1], np.int64), start[:-1].copy()
    for out in range(channels):
        for pixel in range(pixels):
            if out == 0 or core_of[out, pixel] != core_of[out - 1, pixel]:
                core[end[pixel]], first[end[pixel]] = core_of[out, pixel], out
                end[pixel] += 1
    return start, core, first


@numba.njit(cache=True, nogil=True)
def _survey_runs(
    synapses: Any,
    n_axons: int,
    step: int,
    begin: np.ndarray,
    sums: np.ndarray,
    powers: np.ndarray,
    inverses: np.ndarray,
    run_start: np.ndarray,
    run_core: np.ndarray,
    run_first: np.ndarray,
    n_cores: int,
    records: np.ndarray,
    hashes: np.ndarray,
) -> int:
    """The work of `_survey` run by run. begin: place of a pixel's first output channel; the next are `step` apart."""
    height, width, out_height, out_width, sy, sx, py, px, dy, dx, groups = synapses.geometry
    channels, in_group, rows, columns = synapses.weight.shape
    out_group = channels // groups
    count, low, high = np.zeros(n_cores, np.int64), np.empty(n_cores, np.int64), np.empty(n_cores, np.int64)
    total, touched = np.zeros(n_cores, np.uint64), np.empty(n_cores, np.int64)
    n_records = 0
    for axon in range(n_axons):
        channel, rest = divmod(axon, height * width)
        y, x = divmod(rest, width)
        group, inner = divmod(channel, in_group)
        n_touched = 0
        for i in range(rows):
            row, odd = divmod(y + py - i * dy, sy)
            if odd or row < 0 or row >= out_height:
                continue
            for j in range(columns):
                column, odd = divmod(x + px - j * dx, sx)
                if odd or column < 0 or column >= out_width:
                    continue
                pixel, k = row * out_width + column, (inner * rows + i) * columns + j
                for run in range(run_start[pixel], run_start[pixel + 1]):
                    core = run_core[run]
                    end = run_first[run + 1] if run + 1 < run_start[pixel + 1] else channels
                    a, b = max(run_first[run], group * out_group), min(end, (group + 1) * out_group)
                    if core < 0 or a >= b:
                        continue
                    first, last = begin[pixel] + a * step, begin[pixel] + (b - 1) * step
                    if count[core] == 0:
                        touched[n_touched] = core
                        n_touched += 1
                        low[core], high[core] = first, last
                        total[core] = np.uint64(0)
                    count[core] += b - a
                    low[core], high[core] = min(low[core], first), max(high[core], last)
                    part = _reduced(sums[b, k] + _PRIME - sums[a, k])
                    total[core] = _reduced(total[core] + _times(part, powers[begin[pixel]]))
        for t in range(n_touched):
            core = touched[t]
            span = high[core] - low[core] + 1
            if n_records < len(records):
                records[n_records, 0], records[n_records, 1] = axon, core
                records[n_records, 2], records[n_records, 3] = count[core], span
                records[n_records, 4] = int(span == count[core])
                hashes[n_records] = _times(total[core], inverses[low[core]])
            n_records += 1
            count[core] = 0
    return n_records


def survey(
    synapses: Synapses, position: np.ndarray, core_of: np.ndarray, n_cores: int
) -> tuple[np.ndarray, np.ndarray]:
    """The (axon, core) pairs of a projection whose target is cut over cores.

    position, core_of: of each target neuron, its place in the order of cutting and its core (-1: leave out).
    Returns records int64 (pairs, 5) - axon, core, synapses, span of the targets, whether they are consecutive - in
    rising order of axons, and uint64 hashes (pairs,) of the input lists.
    """
    fill = _by_runs(synapses, position, core_of, n_cores) or _by_synapses(synapses, position, core_of, n_cores)
    needed = 4 * synapses.n_axons  # mostly enough; what is not written takes no memory
    while True:
        records, hashes = np.empty((needed, 5), np.int64), np.empty(needed, np.uint64)
        needed = fill(records, hashes)
        if needed <= len(records):
            return records[:needed], hashes[:needed]


_Fill = Callable[[np.ndarray, np.ndarray], int]


def _by_runs(synapses: Synapses, position: np.ndarray, core_of: np.ndarray, n_cores: int) -> _Fill | None:
    """`_survey_runs` where it can be used: the axons are the pooled cells, and channels lie at equal distances of at
    least one place (none where only one neuron is looked at)."""
    one_cell = np.array_equal(synapses.cell_start, np.arange(synapses.n_axons + 1))
    if not synapses.geometry.size or not one_cell or not np.array_equal(synapses.cell, np.arange(synapses.n_axons)):
        return None
    channels = synapses.weight.shape[0]
    places, cores = position.reshape(channels, -1), core_of.reshape(channels, -1)
    step = int(places[1, 0] - places[0, 0]) if channels > 1 else 1
    if step < 0 or (step == 0 and np.count_nonzero(core_of >= 0) > 1) or np.any(np.diff(places, axis=0) != step):
        return None
    runs = _runs(cores)
    n = int(position.max(initial=0)) + 1
    base = np.uint64(_BASE)
    sums = _prefix_sums(synapses.weight.reshape(channels, -1), np.uint64(pow(_BASE, step, int(_PRIME))))
    powers, inverses = _powers(base, n), _powers(np.uint64(pow(_BASE, -1, int(_PRIME))), n)
    places_of = np.ascontiguousarray(places[0]), sums, powers, inverses
    return lambda records, hashes: int(
        _survey_runs(synapses, synapses.n_axons, step, *places_of, *runs, n_cores, records, hashes)
    )


def _by_synapses(synapses: Synapses, position: np.ndarray, core_of: np.ndarray, n_cores: int) -> _Fill:
    """`_survey`, which takes any operator and any order."""
    if synapses.geometry.size:
        longest = synapses.weight[:, 0, :, :].size // int(synapses.geometry[-1])
        longest *= int(np.diff(synapses.cell_start).max(initial=0))
    else:
        longest = int(np.diff(synapses.row_start).max(initial=0))
    return lambda records, hashes: int(
        _survey(synapses, synapses.n_axons, longest, position, core_of, n_cores, records, hashes)
    )


@numba.njit(cache=True, nogil=True)
def distinct_lists(records: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Which of a survey's records are the first of their input list in their core, bool (pairs,)."""
    size = 1
    while size < 2 * len(records):
        size *= 2
    slots, result = np.full(size, -1, np.int64), np.zeros(len(records), np.bool_)
    for k in range(len(records)):
        core, synapses = records[k, 1], records[k, 2]
        at = np.int64(_mix(hashes[k] + np.uint64(core) * np.uint64(0x9E3779B97F4A7C15)) & np.uint64(size - 1))
        while True:
            other = slots[at]
            if other < 0:
                slots[at] = k
                result[k] = True
                break
            if hashes[other] == hashes[k] and records[other, 1] == core and records[other, 2] == synapses:
                break
            at = (at + 1) & (size - 1)
    return result


def list_words(
    layout: SynapticList, synapses: np.ndarray, index_bits: np.ndarray, delayed: bool, weight_bits: int
) -> np.ndarray:
    """Words of synaptic memory of input lists of so many synapses with indices and weights of so many bits."""
    # weights too wide for the chip are refused elsewhere
    weight = min((width for width in layout.weight_bits if width >= weight_bits), default=max(layout.weight_bits))
    bits = weight + (layout.delay_bits if delayed else 0) + layout.tag_bits + index_bits
    blocks, rest = np.divmod(synapses, layout.block_synapses)

    full_words = -(-(layout.block_synapses * bits + layout.header_bits) // layout.word_bits)
    rest_words = np.where(rest > 0, -(-(rest * bits + layout.header_bits) // layout.word_bits), 0)
    total: np.ndarray = blocks * full_words + rest_words
    return total


def axon_synapses(operator: Operator, synapses: Synapses, axon: int) -> tuple[np.ndarray, np.ndarray]:
    """Targets, int64, and weights, int64 or float64, of one axon's synapses of an operator and its `list_synapses`; a
    target that it reaches twice is listed twice."""
    if synapses.geometry.size:
        cells = int(synapses.cell_start[axon + 1] - synapses.cell_start[axon])
        longest = synapses.weight[:, 0, :, :].size // int(synapses.geometry[-1]) * cells
    else:
        longest = int(synapses.row_start[axon + 1] - synapses.row_start[axon])
    targets, weights = np.empty(longest, np.int64), np.empty(longest, np.int64)
    n = _list_axon(synapses, axon, targets, weights)
    return targets[:n], weights[:n].view(_weight_type(operator))
