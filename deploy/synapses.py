"""Synapses as a core stores them: the input lists of an operator, axon by axon, and the words they take.

An axon is a pooled source cell with at least one synapse. Lists that differ only in where they begin are stored once,
which is how convolution weights stay shared inside a core.
"""

import math
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
    are the bits of the float64 value: they are only compared.
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


def list_synapses(operator: Operator) -> Synapses:
    """The synapses of an operator in the form that the kernels read."""
    none = np.zeros(0, dtype=np.int64)
    bits = np.ascontiguousarray(operator.weight, dtype=np.float64).view(np.int64)
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


def survey(
    synapses: Synapses, position: np.ndarray, core_of: np.ndarray, n_cores: int
) -> tuple[np.ndarray, np.ndarray]:
    """The (axon, core) pairs of a projection whose target is cut over cores.

    position, core_of: of each target neuron, its place in the order of cutting and its core (-1: leave out).
    Returns records int64 (pairs, 5) - axon, core, synapses, span of the targets, whether they are consecutive - in
    rising order of axons, and uint64 hashes (pairs,) of the input lists.
    """
    if synapses.geometry.size:
        longest = synapses.weight[:, 0, :, :].size // int(synapses.geometry[-1])
        longest *= int(np.diff(synapses.cell_start).max(initial=0))
    else:
        longest = int(np.diff(synapses.row_start).max(initial=0))
    needed = synapses.n_axons
    while True:
        records, hashes = np.empty((needed, 5), np.int64), np.empty(needed, np.uint64)
        needed = _survey(synapses, synapses.n_axons, longest, position, core_of, n_cores, records, hashes)
        if needed <= len(records):
            return records[:needed], hashes[:needed]


def list_words(layout: SynapticList, synapses: np.ndarray, index_bits: np.ndarray, delayed: bool) -> np.ndarray:
    """Words of synaptic memory of input lists of so many synapses with indices of so many bits."""
    bits = layout.weight_bits + (layout.delay_bits if delayed else 0) + layout.tag_bits + index_bits
    blocks, rest = np.divmod(synapses, layout.block_synapses)

    full_words = -(-(layout.block_synapses * bits + layout.header_bits) // layout.word_bits)
    rest_words = np.where(rest > 0, -(-(rest * bits + layout.header_bits) // layout.word_bits), 0)
    total: np.ndarray = blocks * full_words + rest_words
    return total
