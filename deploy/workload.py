"""What every unit of a mapped network has to do, chip step by chip step, as it follows from a trace's spikes.

`docs/chip-timing.md` says when a spike is sent and what for. A workload knows no costs: the same one is counted for
energy and timed under any chip file.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np

from spikeport.converters.graph import Input, Population, ProcessGraph
from spikeport.deploy.chip import SYNOP_EVENT
from spikeport.deploy.mapping import Mapping
from spikeport.deploy.synapses import list_synapses, survey
from spikeport.deploy.trace import Trace
from spikeport.models.errors import SpikeportError

CHUNK = 32
"""Chip steps that one thread works off at a time."""

SYNOP_EVENTS = ("synop_dense", "synop_sparse", "synop_conv")
Result = TypeVar("Result")

jit = numba.njit(nogil=True, cache=True)


class Sends(NamedTuple):
    """Who sends what to whom. A neuron is known by its bit: its place in a row of all nodes' packed spikes.

    unit_first, unit_bit: the neurons of each core in core order, then those of the host. unit_of: unit of each bit;
    unit_of_byte: of each byte, -1 where it holds neurons of several. send_first: for each bit, its
    packets, as places in send_core, send_synops, send_projection (int32). By projection: event (into SYNOP_EVENTS),
    offset (chip step at which it sends for sample step 0), recurrent, constant (its source fires by itself), timed
    (either of these: it does not carry all that its source fires). By unit: stage, tile column and row, the host last.
    """

    unit_first: np.ndarray
    unit_bit: np.ndarray
    unit_of: np.ndarray
    unit_of_byte: np.ndarray
    send_first: np.ndarray
    send_core: np.ndarray
    send_synops: np.ndarray
    send_projection: np.ndarray
    event: np.ndarray
    offset: np.ndarray
    recurrent: np.ndarray
    constant: np.ndarray
    timed: np.ndarray
    stage: np.ndarray
    column: np.ndarray
    row: np.ndarray


@dataclass(frozen=True, eq=False)
class Routes:
    """A mapped network, ready for any trace of it. byte: first byte of each node in a row of packed bits."""

    graph: ProcessGraph
    mapping: Mapping
    sends: Sends
    byte: dict[str, int]
    row_bytes: int


@dataclass(frozen=True, eq=False)
class Workload:
    """A trace on a mapped network."""

    routes: Routes
    trace: Trace

    @property
    def graph(self) -> ProcessGraph:
        return self.routes.graph

    @property
    def mapping(self) -> Mapping:
        return self.routes.mapping

    @property
    def sends(self) -> Sends:
        return self.routes.sends

    @property
    def rows(self) -> int:
        """Sample steps, counted through all samples."""
        return self.trace.samples * self.trace.steps

    @property
    def chip_steps(self) -> int:
        """Chip steps of the streamed run, filling and draining included."""
        return self.rows + max(population.stage for population in self.graph.populations)

    def bits(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Spikes and active neurons of chip steps start..stop - 1, packed uint8 (steps, row_bytes) each."""
        byte, row_bytes = self.routes.byte, self.routes.row_bytes
        spikes, active = (np.zeros((stop - start, row_bytes), np.uint8) for _ in range(2))
        for node in self.graph.nodes:
            columns = slice(byte[node.name], byte[node.name] + -(-node.size // 8))
            if isinstance(node, Input) and node.constant:
                spikes[:, columns] = np.packbits(np.ones(node.size, dtype=bool))
                continue
            first, last = max(start - node.stage, 0), min(stop - node.stage, self.rows)
            if first < last:
                here = slice(first + node.stage - start, last + node.stage - start)
                packed = self.trace.packed[node.name]
                spikes[here, columns] = packed.reshape(self.rows, -1)[first:last]
                if isinstance(node, Population):
                    active[here, columns] = self.trace.active[node.name].reshape(self.rows, -1)[first:last]
        return spikes, active

    def each_chunk(
        self, work: Callable[[int, int], Result], threads: int | None, progress: Callable[[int], None] | None
    ) -> Iterator[Result]:
        """Yield work(start, stop) for all chip steps, chunk by chunk and in order, done on a pool of threads."""
        starts = range(0, self.chip_steps, CHUNK)
        ends = [min(start + CHUNK, self.chip_steps) for start in starts]
        with ThreadPoolExecutor(threads) as pool:
            for end, result in zip(ends, pool.map(work, starts, ends), strict=True):
                if progress:
                    progress(end)
                yield result


@dataclass(frozen=True, eq=False)
class Counts:
    """What every core did in every chip step; int64 (chip steps, cores) unless told otherwise.

    messages_in, packets_out: packets that a core receives and sends. synops: synaptic operations by event of the chip
    file. active: neurons with state, input or bias. neurons: (cores,), all visited in every chip step. by_projection:
    totals of packets, sent_by_cores (the others come from the host), synops, within_tile, hops_ew, hops_ns.
    """

    samples: int
    chip_steps: int
    neurons: np.ndarray
    messages_in: np.ndarray
    packets_out: np.ndarray
    spikes: np.ndarray
    active: np.ndarray
    synops: dict[str, np.ndarray]
    by_projection: dict[str, dict[str, int]]

    def of(self, event: str) -> np.ndarray:
        """How often each core did an event of the chip file, broadcastable to (chip steps, cores)."""
        match event:
            case "axon_in":
                return self.messages_in
            case "synop_dense" | "synop_sparse" | "synop_conv":
                return self.synops[event]
            case "neuron_inactive":
                inactive: np.ndarray = self.neurons - self.active
                return inactive
            case "neuron_active" | "neuron_update":
                return self.active
            case "neuron_access":
                return self.neurons[None, :]
            case "spike":
                return self.spikes
            case "axon_out":
                return self.packets_out
        raise SpikeportError(f"no core counts the event {event!r}.")

    def by_core(self, event: str) -> np.ndarray:
        """How often each core did an event in the whole run, int64 (cores,)."""
        total: np.ndarray = np.broadcast_to(self.of(event), (self.chip_steps, len(self.neurons))).sum(axis=0)
        return total


def prepare(graph: ProcessGraph, mapping: Mapping, trace: Trace) -> Workload:
    """Join a trace with a mapping of the same graph: `with_trace(route(graph, mapping), trace)`."""
    return with_trace(route(graph, mapping), trace)


def with_trace(routes: Routes, trace: Trace) -> Workload:
    """Join a trace with the routes of the same graph.

    Raises SpikeportError where it is of another graph, or lacks the spikes of an input or the active neurons of a
    population.
    """
    _check(routes.graph, trace)
    return Workload(routes, trace)


def route(graph: ProcessGraph, mapping: Mapping) -> Routes:
    """Find the packets of every neuron. Raises SpikeportError for a mapping of another graph."""
    _check_graph(graph, "mapping", mapping.graph, "map")
    byte, row_bytes = {}, 0
    for node in graph.nodes:
        byte[node.name] = row_bytes
        row_bytes += -(-node.size // 8)
    core_of = {population.name: mapping.core_of_neurons(population) for population in graph.populations}
    position = {population.name: np.arange(population.size) for population in graph.populations}
    parts = []
    for index, projection in enumerate(graph.projections):
        synapses = list_synapses(projection.operator)
        records, _ = survey(synapses, position[projection.target], core_of[projection.target], len(mapping.cores))
        records = records[np.lexsort((records[:, 1], records[:, 0]))]
        start = np.concatenate([[0], np.cumsum(np.bincount(records[:, 0], minlength=synapses.n_axons))])
        neurons = np.flatnonzero(synapses.axon_of >= 0)
        axons = synapses.axon_of[neurons]
        reach = start[axons + 1] - start[axons]
        ends = np.cumsum(reach)
        entry = np.arange(int(reach.sum())) + np.repeat(start[axons] - (ends - reach), reach)
        bit = np.repeat(neurons + 8 * byte[projection.source], reach)
        projections = np.full(len(entry), index, np.int32)
        parts.append((bit, records[entry, 1].astype(np.int32), records[entry, 2].astype(np.int32), projections))
    bits, core, synops, through = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(bits, kind="stable")
    send_first = np.concatenate([[0], np.cumsum(np.bincount(bits, minlength=8 * row_bytes))])
    units = [core.neurons + 8 * byte[core.population] for core in mapping.cores]
    units += [np.concatenate([np.arange(node.size) + 8 * byte[node.name] for node in graph.inputs])]
    stages = {node.name: node.stage for node in graph.nodes}
    constant = {node.name for node in graph.inputs if node.constant}
    offset = [stages[p.target] - 1 - p.delay if p.source in constant else stages[p.source] for p in graph.projections]
    places = np.vstack([mapping.tile_positions(), mapping.input_tile])
    # bits that pad a node's last byte are never set, so they may go with any unit
    unit_of = np.full(8 * row_bytes, -1, dtype=np.int64)
    unit_of[np.concatenate(units)] = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
    by_byte = unit_of.reshape(-1, 8)
    alike = ((by_byte == by_byte[:, :1]) | (by_byte < 0)).all(axis=1)
    sends = Sends(
        unit_of=unit_of,
        unit_of_byte=np.where(alike, by_byte[:, 0], -1),
        unit_first=np.concatenate([[0], np.cumsum([len(unit) for unit in units])]),
        unit_bit=np.concatenate(units),
        send_first=send_first.astype(np.int64),
        send_core=core[order],
        send_synops=synops[order],
        send_projection=through[order],
        event=np.array([SYNOP_EVENTS.index(SYNOP_EVENT[p.operator.kind]) for p in graph.projections]),
        offset=np.array(offset),
        recurrent=np.array([p.recurrent for p in graph.projections]),
        constant=np.array([p.source in constant for p in graph.projections]),
        timed=np.array([p.recurrent or p.source in constant for p in graph.projections]),
        stage=np.array([*(stages[core.population] for core in mapping.cores), 0]),
        column=np.ascontiguousarray(places[:, 0]),
        row=np.ascontiguousarray(places[:, 1]),
    )
    return Routes(graph, mapping, sends, byte, row_bytes)


def _check_graph(graph: ProcessGraph, what: str, other: str, command: str) -> None:
    fingerprint = graph.fingerprint()
    if other != fingerprint:
        raise SpikeportError(
            f"the {what} is of graph {other}, not of {graph.name!r} ({fingerprint}). Run `spikeport {command}` again."
        )


def _check(graph: ProcessGraph, trace: Trace) -> None:
    _check_graph(graph, "trace", trace.graph, "simulate")
    missing = [node.name for node in graph.event_nodes if node.name not in trace.packed]
    if missing:
        raise SpikeportError(f"the {trace.backend} trace lacks the spikes of {', '.join(missing)}.")
    if any(population.name not in trace.active for population in graph.populations):
        raise SpikeportError(f"the {trace.backend} trace lacks the active neurons; use one of the `events` backend.")
    if graph.steps != trace.steps:
        raise SpikeportError(f"the {trace.backend} trace has {trace.steps} steps a sample, the graph {graph.steps}.")
    for node in graph.event_nodes:
        held = [("spikes", trace.packed[node.name])]
        held += [("active neurons", trace.active[node.name])] if isinstance(node, Population) else []
        for what, packed in held:
            padding = packed.shape[-1] * 8 - node.size
            shape = (trace.samples, trace.steps, -(-node.size // 8))
            # the kernels index by bit, unchecked
            if packed.shape != shape or (packed[..., -1] & ((1 << padding) - 1)).any():
                raise SpikeportError(
                    f"the {trace.backend} trace has {what} outside {node.name!r} of {node.size} neurons."
                )


def count(workload: Workload, threads: int | None = None, progress: Callable[[int], None] | None = None) -> Counts:
    """Count what the whole streamed run does."""
    n_cores, chip_steps, sends = len(workload.mapping.cores), workload.chip_steps, workload.sends
    by_core = np.zeros((chip_steps, (4 + len(SYNOP_EVENTS)) * n_cores), dtype=np.int64)
    fired = np.zeros((2, 8 * workload.routes.row_bytes), dtype=np.int64)

    def work(start: int, stop: int) -> np.ndarray:
        spikes, active = workload.bits(start, stop)
        fires = np.zeros_like(fired)
        _count(spikes, active, start, workload.rows, workload.trace.steps, sends, by_core[start:stop], fires)
        return fires

    for fires in workload.each_chunk(work, threads, progress):
        fired += fires
    tables = by_core.reshape(chip_steps, -1, n_cores)
    return Counts(
        samples=workload.trace.samples,
        chip_steps=chip_steps,
        neurons=np.array([len(core.neurons) for core in workload.mapping.cores], dtype=np.int64),
        messages_in=tables[:, 0],
        packets_out=tables[:, 1],
        spikes=tables[:, 2],
        active=tables[:, 3],
        synops={event: tables[:, 4 + index] for index, event in enumerate(SYNOP_EVENTS)},
        by_projection=_by_projection(workload, fired),
    )


def _by_projection(workload: Workload, fired: np.ndarray) -> dict[str, dict[str, int]]:
    """Totals of each projection. fired: (2, bits), how often each neuron fired in the whole run, and how often of these
    at the last step of a sample."""
    sends, n = workload.sends, len(workload.graph.projections)
    through, n_cores = sends.send_projection, len(workload.mapping.cores)
    bit = np.repeat(np.arange(fired.shape[1]), np.diff(sends.send_first))
    times = fired[0][bit] - np.where(sends.recurrent[through], fired[1][bit], 0)
    times[sends.constant[through]] = workload.rows
    unit = sends.unit_of[bit]
    east_west = np.abs(sends.column[unit] - sends.column[sends.send_core])
    north_south = np.abs(sends.row[unit] - sends.row[sends.send_core])
    each = {
        "packets": 1,
        "synops": sends.send_synops,
        "within_tile": (east_west == 0) & (north_south == 0),
        "hops_ew": east_west,
        "hops_ns": north_south,
        "sent_by_cores": unit < n_cores,
    }
    totals = {}
    for key, factor in each.items():
        # sums of whole numbers below 2^53 are exact in floats
        totals[key] = np.bincount(through, times * factor, n).astype(np.int64)
    return {
        projection.name: {key: int(total[index]) for key, total in totals.items()}
        for index, projection in enumerate(workload.graph.projections)
    }


@jit
def is_set(rows: np.ndarray, step: int, bit: int) -> bool:
    """Whether a bit is set in a row of packed bits (`numpy.packbits` order)."""
    return (rows[step, bit >> 3] >> (7 - (bit & 7))) & 1 != 0  # type: ignore[no-any-return]


@jit
def sends_now(row: int, rows: int, steps: int, recurrent: bool) -> bool:
    """Whether a projection carries what its source sends for a sample step."""
    if row < 0 or row >= rows:
        return False
    return not (recurrent and row % steps == steps - 1)


@jit
def _count(
    spikes: np.ndarray,
    active: np.ndarray,
    start: int,
    rows: int,
    steps: int,
    sends: Any,
    counted: np.ndarray,
    fired: np.ndarray,
) -> None:
    """counted: (chip steps, 7 cores): messages in of each core, then packets out, spikes, active, synops by event.
    fired: (2, bits)."""
    # each attribute taken once: taking one in a loop costs more than the loop's work
    unit_of, unit_of_byte, stage = sends.unit_of, sends.unit_of_byte, sends.stage
    send_first, send_core, send_synops = sends.send_first, sends.send_core, sends.send_synops
    send_projection, event, offset = sends.send_projection, sends.event, sends.offset
    recurrent, timed = sends.recurrent, sends.timed
    cores = len(stage) - 1
    all_sent = not timed.any()
    closing = np.empty(len(stage), np.int64)
    for step in range(spikes.shape[0]):
        for unit in range(len(stage)):
            closing[unit] = (start + step - stage[unit]) % steps == steps - 1
        for byte in range(spikes.shape[1]):
            bits = active[step, byte]
            if bits:
                unit = unit_of_byte[byte]
                if unit >= 0:
                    counted[step, 3 * cores + unit] += _ones(bits)
                else:
                    for k in range(8):
                        if bits >> (7 - k) & 1:
                            counted[step, 3 * cores + unit_of[8 * byte + k]] += 1
            bits = spikes[step, byte]
            if bits == 0:
                continue
            for k in range(8):
                if not bits >> (7 - k) & 1:
                    continue
                bit = 8 * byte + k
                unit, packets = unit_of[bit], 0
                fired[0, bit] += 1
                fired[1, bit] += closing[unit]
                for s in range(send_first[bit], send_first[bit + 1]):
                    p, core = send_projection[s], send_core[s]
                    late = not all_sent and timed[p]
                    if late and not sends_now(start + step - offset[p], rows, steps, recurrent[p]):
                        continue
                    packets += 1
                    counted[step, core] += 1
                    counted[step, (4 + event[p]) * cores + core] += send_synops[s]
                if unit < cores:
                    counted[step, cores + unit] += packets
                    counted[step, 2 * cores + unit] += 1


@jit
def _ones(byte: int) -> int:
    """Set bits of a byte."""
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F
