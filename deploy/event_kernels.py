"""The event simulator's compiled code (Numba): `run_samples` takes samples through all their steps in one call.

The network arrives as tables (`spikeport.deploy.event_program` fills them). A spike list names neurons in the
simulator's own order, channels last, so that the targets of one row of a kernel lie side by side. Synaptic operations
are counted where they are done. All compiled code is in this file: Numba's cache on disk follows one file's changes.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

DECAY_BITS = 12
LIMIT = 1 << 23

CONSTANT, EVENTS, GRADED, POPULATION = range(4)
"""Kinds of a node."""
DENSE, CONV, LISTS = range(3)
"""Kinds of a projection."""
SHARED, EACH, WIDE = range(3)
"""Parameters of a population: one set in 32 bits, one a neuron in 32 bits, one a neuron in 64 bits."""

NODE = np.dtype([(name, np.int64) for name in ("kind", "size", "bits", "lists", "order")])
"""bits: its first byte in the trace. lists: its two spike lists, for even and odd steps. order: of an input, where in
the tables the place of each of its neurons is, or -1 where nothing changes places."""
POPULATION_ROW = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("node", "kind", "first", "last", "acc", "state", "flags", "active"),
            *("keeps", "parameters", "unit", "subtract", "pixels", "channels"),
        )
    ]
)
"""first, last: its projections. acc, state, flags, active, keeps, parameters: offsets. unit: what 1 in acc is in u."""
PROJECTION = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("kind", "source", "recurrent", "synops", "width", "weights", "row", "shift"),
            *("acc", "part", "part_size", "part_shift", "part_order"),
            *("first", "entries", "source_order"),
            *("channels", "groups", "group_in", "group_out", "cells", "cell_of", "rows", "row_entries"),
            *("n_columns", "columns", "column_entries"),
        )
    ]
)
"""Offsets into the weights of `width` bytes, the sums and the tables; -1 where there is none. `row`: weights of one
source. shift: a stored weight counts 2^shift in the unit of its sums. part: of a projection with sums of its own, where
`add_part` adds them."""


class Network(NamedTuple):
    """The graph as flat arrays, read only.

    nodes, populations, projections: arrays of the records above, projections by target. tables: int32. weights: bytes,
    each projection's of its own width. keeps: float64, keep_u / 4096, keep_v / 4096, and parameters: int32,
    level, bias; one of each or one a neuron. wide_parameters: int64, keep_u, keep_v, level, bias, one a neuron.
    """

    nodes: np.ndarray
    populations: np.ndarray
    projections: np.ndarray
    tables: np.ndarray
    weights: np.ndarray
    keeps: np.ndarray
    parameters: np.ndarray
    wide_parameters: np.ndarray


class Work(NamedTuple):
    """What changes while one sample runs.

    acc: int32 sums, zero between the steps. u, v: int32 and wide_u, wide_v: int64 states. lists: int32 spike lists.
    counts: int64 (nodes, 2), their lengths. flags: uint16, one a neuron, FIRED and ACTIVE, in whole groups of
    sixteen. starts: int64, where the weights of each spike of one projection begin, in the order in which they are
    added, and spike_of: int32, the spikes. cell_of, row_of, ends: int32, see `sort_by_cell`.
    """

    acc: np.ndarray
    u: np.ndarray
    v: np.ndarray
    wide_u: np.ndarray
    wide_v: np.ndarray
    lists: np.ndarray
    counts: np.ndarray
    flags: np.ndarray
    starts: np.ndarray
    spike_of: np.ndarray
    cell_of: np.ndarray
    row_of: np.ndarray
    ends: np.ndarray


GROUP = 32
"""Rows of weights that are summed before they are added to acc; 256 would still fit 16 bits."""
LANES = 32
"""Sums that are kept in registers at a time; weights and acc end with as many spare places."""
FIRED, ACTIVE = np.uint16(1), np.uint16(256)

BACKWARDS = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)), bitorder="little").astype(np.int64)
"""A byte with its bits in reverse: the trace's bytes begin with the highest."""

_OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "_nrt": False}
_INLINED: dict[str, Any] = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""`_nrt`: no reference is counted, as nothing is allocated; counting them took most of the time of a quiet step."""
jit: Any = numba.njit(**_OPTIONS, **_INLINED)
vectors: Any = intrinsic


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    """A vector of `kind` with one number in all places."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), builder.trunc(value, kind.element), ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), kind.count), None))


@vectors
def add_rows(  # type: ignore[no-untyped-def]
    typing_context, acc, base, weights, width, offset, starts, first, count, length, factor
):
    """acc[base + j] += factor * sum of weights[offset + starts[first + k] + j] over k < count, for j < length.

    weights: bytes; `offset` counts them, `starts` weights of `width` bytes. Written in vectors of LANES places, which
    stay in registers over the rows: a loop in Python is bound by loads and stores of acc. Rows of 8 bits are summed in
    16. Reads, and adds zeros, up to LANES - 1 places past the end.
    """
    numbers = [types.int64] * 5
    signature = types.void(acc, types.int64, weights, types.int64, types.int64, starts, *numbers[1:])
    long, wide = ir.IntType(64), ir.VectorType(ir.IntType(32), LANES)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def data(place: int) -> Any:
            return context.make_array(signature.args[place])(context, builder, arguments[place]).data

        _, base, _, size, offset, _, first, count, length, factor = arguments
        sums, begin = builder.gep(data(0), [base]), builder.gep(data(5), [first])
        rows = builder.gep(data(2), [offset])

        def add_blocks(bits: int) -> None:
            stored = ir.IntType(bits)
            narrow = ir.VectorType(ir.IntType(16), LANES) if bits == 8 else wide
            here = builder.bitcast(rows, stored.as_pointer())
            with cgutils.for_range_slice(builder, long(0), length, long(LANES), long) as (j, _):
                total = cgutils.alloca_once_value(builder, ir.Constant(narrow, None))
                with cgutils.for_range(builder, count, intp=long) as loop:
                    start = builder.add(builder.load(builder.gep(begin, [loop.index])), j)
                    row = builder.bitcast(builder.gep(here, [start]), ir.VectorType(stored, LANES).as_pointer())
                    weight = builder.load(row, align=1)
                    weight = weight if weight.type == narrow else builder.sext(weight, narrow)
                    builder.store(builder.add(builder.load(total), weight), total)
                rest = builder.sub(length, j)
                rest = builder.select(builder.icmp_signed("<", rest, long(LANES)), rest, long(LANES))
                lanes = ir.Constant(narrow, list(range(LANES)))
                inside = builder.icmp_signed("<", lanes, _spread(builder, rest, narrow))
                kept = builder.select(inside, builder.load(total), ir.Constant(narrow, None))
                kept = kept if narrow == wide else builder.sext(kept, wide)
                target = builder.bitcast(builder.gep(sums, [j]), wide.as_pointer())
                product = builder.mul(kept, _spread(builder, factor, wide))
                builder.store(builder.add(builder.load(target, align=4), product), target, align=4)

        for bits in (8, 16, 32):
            with builder.if_then(builder.icmp_signed("==", size, long(bits // 8))):
                add_blocks(bits)
        return context.get_dummy_value()

    return signature, generate


@vectors
def load_weight(typing_context, weights, width, place):  # type: ignore[no-untyped-def]
    """The weight of `width` bytes that begins at a byte."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer = builder.gep(array.data, [arguments[2]])

        def load(bits: int) -> Any:
            loaded = builder.load(builder.bitcast(pointer, ir.IntType(bits).as_pointer()), align=1)
            return loaded if bits == 32 else builder.sext(loaded, ir.IntType(32))

        value = cgutils.alloca_once_value(builder, load(8))
        for bits in (16, 32):
            with builder.if_then(builder.icmp_signed("==", arguments[1], ir.IntType(64)(bits // 8))):
                builder.store(load(bits), value)
        return builder.load(value)

    return types.int32(weights, types.int64, types.int64), generate


@vectors
def sixteen_flags(typing_context, flags, at):  # type: ignore[no-untyped-def]
    """The lowest bits of flags[at], flags[at + 1], ... as bits 0, 1, ... 15, and the bits above 256 as 16, ... 31."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        kind = ir.VectorType(ir.IntType(16), 16)
        values = builder.load(builder.bitcast(builder.gep(array.data, [arguments[1]]), kind.as_pointer()), align=2)

        def bits(mark: int) -> Any:
            marked = builder.and_(values, ir.Constant(kind, [mark] * 16))
            found = builder.icmp_unsigned("!=", marked, ir.Constant(kind, None))
            return builder.zext(builder.bitcast(found, ir.IntType(16)), ir.IntType(64))

        return builder.or_(bits(int(FIRED)), builder.shl(bits(int(ACTIVE)), ir.IntType(64)(16)))

    return types.int64(flags, types.int64), generate


@vectors
def append_places(typing_context, places, at, first, mask):  # type: ignore[no-untyped-def]
    """Write first + i for each of the sixteen lowest bits i that is set in mask to places[at], ...; return how many."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        kind, short = ir.VectorType(ir.IntType(32), 16), builder.trunc(arguments[3], ir.IntType(16))
        numbers = builder.add(ir.Constant(kind, list(range(16))), _spread(builder, arguments[2], kind))
        chosen = builder.bitcast(short, ir.VectorType(ir.IntType(1), 16))
        pointer = builder.gep(array.data, [arguments[1]])
        types_ = ir.FunctionType(ir.VoidType(), [kind, pointer.type, chosen.type])
        store = cgutils.get_or_insert_function(builder.module, types_, "llvm.masked.compressstore.v16i32")
        builder.call(store, [numbers, pointer, chosen])
        return builder.zext(builder.ctpop(short), ir.IntType(64))

    return types.int64(places, types.int64, types.int64, types.int64), generate


# ---- spikes into sums: each returns the synaptic operations that it did ----------------------------------------------


@jit
def accumulate_dense(p, net, spikes, payloads, graded, work):  # type: ignore[no-untyped-def]
    """Every spike adds one row of weights to all targets, or several where it counts into several pooled cells."""
    rows = 0
    if p.first < 0:
        rows = spikes.size
        for k in range(rows):
            work.starts[k], work.spike_of[k] = p.row * spikes[k], k
    else:
        for k in range(spikes.size):
            for entry in range(net.tables[p.first + spikes[k]], net.tables[p.first + spikes[k] + 1]):
                work.starts[rows], work.spike_of[rows] = p.row * net.tables[p.entries + entry], k
                rows += 1
    group = 1 if graded else GROUP
    for first in range(0, rows, group):
        factor = (np.int64(payloads[work.spike_of[first]]) if graded else 1) << p.shift
        count = min(rows - first, group)
        add_rows(work.acc, p.acc, net.weights, p.width, p.weights, work.starts, first, count, p.row, factor)
    return rows * p.row


@jit
def locate(p, tables, spike):  # type: ignore[no-untyped-def]
    """The cell of a spike, which says what targets it reaches, and where its channel's weights begin.

    Pixels of one pooled cell reach the same; so do the channels of one group.
    """
    source = np.uint32(tables[p.source_order + spike]) if p.source_order >= 0 else np.uint32(spike)
    pixel = source // np.uint32(p.channels)
    channel = np.int64(source - pixel * np.uint32(p.channels))
    cell = np.int64(tables[p.cell_of + np.int64(pixel)])
    if p.groups > 1:
        cell = cell * p.groups + channel // p.group_in
    return cell, channel * p.row


@jit
def sort_by_cell(p, tables, spikes, work):  # type: ignore[no-untyped-def]
    """Sort the spikes into work.starts and work.spike_of, cell by cell (counting sort).

    work.ends says where each cell ends. cell_of, row_of: the cell and the weights of each spike, before sorting.
    """
    work.ends[: p.cells] = 0
    for k in range(spikes.size):
        cell, start = locate(p, tables, spikes[k])
        work.cell_of[k], work.row_of[k] = cell, start
        work.ends[cell] += 1
    before = 0
    for cell in range(p.cells):
        count = work.ends[cell]
        work.ends[cell] = before
        before += count
    for k in range(spikes.size):
        cell = work.cell_of[k]
        work.starts[work.ends[cell]], work.spike_of[work.ends[cell]] = work.row_of[k], k
        work.ends[cell] += 1


@jit
def accumulate_cell(p, net, cell, first, count, factor, work):  # type: ignore[no-untyped-def]
    """Add the kernels of some spikes of one cell, by runs of targets that lie side by side.

    The tables hold for each cell's row (place in acc, place in a channel's weights) of the kernel rows that reach a
    target, and for each cell's column (the same, length) of the runs of kernel columns.
    """
    tables, place, base, done = net.tables, cell, p.acc, 0
    if p.groups > 1:
        place = cell // p.groups
        base += (cell - place * p.groups) * p.group_out
    row = np.int64(np.uint32(place) // np.uint32(p.n_columns))
    column = p.columns + place - row * p.n_columns
    row += p.rows
    for r in range(tables[row], tables[row + 1]):
        row_base = base + tables[p.row_entries + 2 * r]
        row_weights = np.int64(tables[p.row_entries + 2 * r + 1])
        for c in range(tables[column], tables[column + 1]):
            entry = p.column_entries + 3 * c
            at, length = row_base + tables[entry], np.int64(tables[entry + 2])
            weight = p.weights + p.width * (row_weights + tables[entry + 1])
            add_rows(work.acc, at, net.weights, p.width, weight, work.starts, first, count, length, factor)
            done += count * length
    return done


@jit
def accumulate_conv(p, net, spikes, payloads, graded, work):  # type: ignore[no-untyped-def]
    """Spikes that reach the same targets go together, unless each has a payload of its own."""
    sort_by_cell(p, net.tables, spikes, work)
    group, first, done = np.int64(1 if graded else GROUP), np.int64(0), 0
    while first < spikes.size:
        spike = work.spike_of[first]
        cell = np.int64(work.cell_of[spike])
        left = np.int64(work.ends[cell]) - first
        count = left if left < group else group
        factor = (np.int64(payloads[spike]) if graded else 1) << p.shift
        done += accumulate_cell(p, net, cell, first, count, factor, work)
        first += count
    return done


@jit
def accumulate_lists(p, net, spikes, payloads, graded, work):  # type: ignore[no-untyped-def]
    """Sparse and one-to-one: each source has its list of targets and weights."""
    done = 0
    for k in range(spikes.size):
        factor = np.int32((payloads[k] if graded else 1) << p.shift)
        first, last = net.tables[p.first + spikes[k]], net.tables[p.first + spikes[k] + 1]
        for entry in range(first, last):
            weight = load_weight(net.weights, p.width, p.weights + p.width * entry)
            work.acc[p.acc + net.tables[p.entries + entry]] += weight * factor
        done += last - first
    return done


@jit
def add_part(p, tables, acc):  # type: ignore[no-untyped-def]
    """Add a projection's own sums, shifted right (arithmetically), to its target's and clear them."""
    for i in range(p.part_size):
        target = tables[p.part_order + i] if p.part_order >= 0 else i
        acc[p.part + target] += acc[p.acc + i] >> p.part_shift
        acc[p.acc + i] = 0


# ---- sums into spikes ------------------------------------------------------------------------------------------------


@jit
def advance(a, old_u, old_v, keep_u, keep_v, level, bias, unit, subtract):  # type: ignore[no-untyped-def]
    """One neuron by one step (`spikeport.models.loihi_integers`) in 32 bits: u, v, flags.

    Decays are exact in doubles: a state and keep / 4096 take 44 bits, and the conversion rounds towards zero.
    """
    active = (a | old_u | old_v | bias) != 0
    u = np.int32(np.int32(old_u * keep_u) + np.int32(a * unit))
    u = np.int32(u - 2 * LIMIT) if u > LIMIT else (np.int32(u + 2 * LIMIT) if u <= -LIMIT else u)
    v = np.int32(np.int32(np.int32(old_v * keep_v) + u) + bias)
    v = np.int32(min(max(v, np.int32(1 - LIMIT)), np.int32(LIMIT - 1)))
    fired = v > level
    after = np.int32(v - level) if subtract else np.int32(0)
    flags = (FIRED if fired else np.uint16(0)) | (ACTIVE if active else np.uint16(0))
    return u, after if fired else v, flags


@jit
def integrate_shared(acc, u, v, flags, keep_u, keep_v, level, bias, unit, subtract):  # type: ignore[no-untyped-def]
    """One step of neurons with the same parameters; acc is cleared."""
    for i in range(acc.size):
        u[i], v[i], flags[i] = advance(acc[i], u[i], v[i], keep_u, keep_v, level, bias, unit, subtract)
        acc[i] = 0


@jit
def integrate_each(acc, u, v, flags, keep_u, keep_v, level, bias, unit, subtract):  # type: ignore[no-untyped-def]
    """One step of neurons with parameters of their own; acc is cleared."""
    for i in range(acc.size):
        u[i], v[i], flags[i] = advance(acc[i], u[i], v[i], keep_u[i], keep_v[i], level[i], bias[i], unit, subtract)
        acc[i] = 0


@jit
def integrate_wide(acc, u, v, flags, keep_u, keep_v, level, bias, unit, subtract):  # type: ignore[no-untyped-def]
    """One step of neurons whose u may pass 32 bits, or with parameters beyond the chip's; acc is cleared."""
    for i in range(acc.size):
        active = acc[i] != 0 or u[i] != 0 or v[i] != 0 or bias[i] != 0
        product = u[i] * keep_u[i]
        new_u = (product >> DECAY_BITS if product >= 0 else -(-product >> DECAY_BITS)) + np.int64(acc[i]) * unit
        if new_u > LIMIT:
            new_u -= 2 * LIMIT
        if new_u <= -LIMIT:
            new_u += 2 * LIMIT
        product = v[i] * keep_v[i]
        new_v = (product >> DECAY_BITS if product >= 0 else -(-product >> DECAY_BITS)) + new_u + bias[i]
        new_v = min(max(new_v, 1 - LIMIT), LIMIT - 1)
        fired = active and new_v > level[i]
        if fired:
            new_v = new_v - level[i] if subtract else 0
        acc[i], u[i], v[i], flags[i] = 0, new_u, new_v, fired * FIRED + active * ACTIVE


@jit
def list_spikes(flags, n, spikes):  # type: ignore[no-untyped-def]
    """Indices of the flags that say FIRED. Returns their number."""
    count = 0
    for i in range(0, n, 16):
        count += append_places(spikes, count, i, sixteen_flags(flags, i))
    return count


@jit
def write_flat(flags, n, bits, fired_at, active_at):  # type: ignore[no-untyped-def]
    """Set the flags' bits in the trace, in the same order."""
    for i in range((n + 7) // 8):
        both = sixteen_flags(flags, 8 * i)
        bits[fired_at + i] = BACKWARDS[both & 255]
        bits[active_at + i] = BACKWARDS[(both >> 16) & 255]


@jit
def write_image(flags, pixels, channels, bits, fired_at, active_at):  # type: ignore[no-untyped-def]
    """Set the flags' bits in the trace, channel by channel, eight pixels at a time."""
    for group in range((pixels + 7) // 8):
        for channel in range(channels):
            both = 0
            for k in range(8):
                both = 2 * both + flags[(8 * group + k) * channels + channel]
            place = channel * pixels + 8 * group
            byte, places = place >> 3, place & 7
            fired, active = both & 255, both >> 8
            bits[fired_at + byte] |= fired >> places
            bits[active_at + byte] |= active >> places
            fired, active = (fired << (8 - places)) & 255, (active << (8 - places)) & 255
            if fired:
                bits[fired_at + byte + 1] |= fired
            if active:
                bits[active_at + byte + 1] |= active


@jit
def read_spikes(bits, tables, order, spikes):  # type: ignore[no-untyped-def]
    """The spike list of packed bits, in the trace's order or by the table at `order`. Returns its length."""
    count = 0
    for i in range(bits.size):
        if bits[i] != 0:
            count += append_places(spikes, count, 8 * i, BACKWARDS[bits[i]])
    if order >= 0:
        for k in range(count):
            spikes[k] = tables[order + spikes[k]]
    return count


# ---- samples ---------------------------------------------------------------------------------------------------------


@jit
def step_population(p, node, step, row, net, work, bits):  # type: ignore[no-untyped-def]
    """Advance a population from its sums, write its spike list and its part of the trace. Returns the spikes."""
    n, at = node.size, p.parameters
    acc, flags = work.acc[p.acc : p.acc + n], work.flags[p.flags :]
    if p.kind == WIDE:
        wide = net.wide_parameters[at : at + 4 * n].reshape((4, n))
        wide_u, wide_v = work.wide_u[p.state : p.state + n], work.wide_v[p.state : p.state + n]
        integrate_wide(acc, wide_u, wide_v, flags, wide[0], wide[1], wide[2], wide[3], p.unit, p.subtract)
    else:
        u, v = work.u[p.state : p.state + n], work.v[p.state : p.state + n]
        own, keep = net.parameters[at : at + 2 * n], net.keeps[p.keeps : p.keeps + 2 * n]
        unit = np.int32(p.unit)
        if p.kind == EACH:
            integrate_each(acc, u, v, flags, keep[:n], keep[n:], own[:n], own[n:], unit, p.subtract)
        else:
            integrate_shared(acc, u, v, flags, keep[0], keep[1], own[0], own[1], unit, p.subtract)
    size = (n + 7) // 8
    fired_at, active_at = node.bits + row * size, p.active + row * size
    if p.channels == 1:
        write_flat(flags, n, bits, fired_at, active_at)
    else:
        write_image(flags, p.pixels, p.channels, bits, fired_at, active_at)
    return list_spikes(flags, n, work.lists[node.lists + (step & 1) * n :])


@jit
def step_projection(p, step, net, payloads, paid, work):  # type: ignore[no-untyped-def]
    """Add the spikes of one step to the sums. Returns the synaptic operations."""
    source, half = net.nodes[p.source], (step - p.recurrent) & 1
    at = source.lists + half * source.size
    spikes = work.lists[at : at + work.counts[p.source, half]]
    graded, sent = source.kind == GRADED, payloads[paid[p.source, half] :]
    if p.kind == DENSE:
        done = accumulate_dense(p, net, spikes, sent, graded, work)
    elif p.kind == CONV:
        done = accumulate_conv(p, net, spikes, sent, graded, work)
    else:
        done = accumulate_lists(p, net, spikes, sent, graded, work)
    if p.part >= 0:
        add_part(p, net.tables, work.acc)
    return done


@jit
def step_input(node, step, row, net, work, bits):  # type: ignore[no-untyped-def]
    """Write the spike list of an input from its packed bits. Returns the spikes."""
    size, at = (node.size + 7) // 8, node.lists + (step & 1) * node.size
    packed = bits[node.bits + row * size : node.bits + (row + 1) * size]
    return read_spikes(packed, net.tables, node.order, work.lists[at:])


@jit
def read_membrane(p, work, row):  # type: ignore[no-untyped-def]
    """Write v of a population, in the simulator's order."""
    for i in range(row.size):
        row[i] = work.wide_v[p.state + i] if p.kind == WIDE else np.int64(work.v[p.state + i])


@numba.njit(**_OPTIONS, cache=True)
def run_samples(  # type: ignore[no-untyped-def]
    first, last, steps, net, work, payloads, paid, bits, synops, probed, membrane
):
    """Run the samples first <= s < last, which may be one long one, and write their part of the trace.

    payloads: int32, of all events of graded inputs in these samples, input by input, in the order of the packed bits.
    paid: int64 (nodes, 3): where in them a node's spike lists begin, and where its next one will. bits, synops: the
    trace of the whole run, flat. membrane: int64 (samples, size), v after the last step of the population in row
    `probed` of the table, in the simulator's order; -1: of none.
    """
    for sample in range(first, last):
        for state in (work.u, work.v):
            state[:] = 0
        for state in (work.wide_u, work.wide_v):
            state[:] = 0
        for step in range(steps):
            row, half = sample * steps + step, step & 1
            for i in range(net.nodes.size):
                node = net.nodes[i]
                if node.kind == EVENTS or node.kind == GRADED:
                    work.counts[i, half] = step_input(node, step, row, net, work, bits)
                    paid[i, half] = paid[i, 2]
                    paid[i, 2] += work.counts[i, half]
            for k in range(net.populations.size):
                population = net.populations[k]
                for i in range(population.first, population.last):
                    projection = net.projections[i]
                    if step > 0 or projection.recurrent == 0:
                        done = step_projection(projection, step, net, payloads, paid, work)
                        synops[projection.synops + row] = done
                node = net.nodes[population.node]
                work.counts[population.node, half] = step_population(population, node, step, row, net, work, bits)
        if probed >= 0:
            read_membrane(net.populations[probed], work, membrane[sample])
