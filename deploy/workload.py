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

    unit_first, unit_bit: the neurons of each core in core order, then those of the host. send_first: for each bit, its
    packets, as places in send_core, send_synops, send_projection (int32). By projection: event (into SYNOP_EVENTS),
    offset (chip step at which it sends for sample step 0), recurrent. Cores: tile column and row, the host last.
    """

    unit_first: np.ndarray
    unit_bit: np.ndarray
    send_first: np.ndarray
    send_core: np.ndarray
    send_synops: np.ndarray
    send_projection: np.ndarray
    event: np.ndarray
    offset: np.ndarray
    recurrent: np.ndarray
    column: np.ndarray
    row: np.ndarray


@dataclass(frozen=True, eq=False)
class Workload:
    """A trace on a mapping. byte: first byte of each node in a row of packed bits; stage: its chip step's lag."""

    graph: ProcessGraph
    mapping: Mapping
    trace: Trace
    sends: Sends
    byte: dict[str, int]
    row_bytes: int

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
        spikes, active = (np.zeros((stop - start, self.row_bytes), np.uint8) for _ in range(2))
        for node in self.graph.nodes:
            columns = slice(self.byte[node.name], self.byte[node.name] + -(-node.size // 8))
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
        with ThreadPoolExecutor(threads) as pool:
            ends = [min(start + CHUNK, self.chip_steps) for start in starts]
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
    """Join a trace with a mapping of the same graph.

    Raises SpikeportError where they belong to other graphs, or where the trace lacks the spikes of an input or the
    active neurons of a population.
    """
    _check(graph, mapping, trace)
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
    sends = Sends(
        unit_first=np.concatenate([[0], np.cumsum([len(unit) for unit in units])]),
        unit_bit=np.concatenate(units),
        send_first=send_first.astype(np.int64),
        send_core=core[order],
        send_synops=synops[order],
        send_projection=through[order],
        event=np.array([SYNOP_EVENTS.index(SYNOP_EVENT[p.operator.kind]) for p in graph.projections]),
        offset=np.array(offset),
        recurrent=np.array([p.recurrent for p in graph.projections]),
        column=np.ascontiguousarray(places[:, 0]),
        row=np.ascontiguousarray(places[:, 1]),
    )
    return Workload(graph, mapping, trace, sends, byte, row_bytes)


def _check(graph: ProcessGraph, mapping: Mapping, trace: Trace) -> None:
    fingerprint = graph.fingerprint()
    for what, other, command in (("mapping", mapping.graph, "map"), ("trace", trace.graph, "simulate")):
        if other != fingerprint:
            raise SpikeportError(
                f"the {what} is of graph {other}, not of {graph.name!r} ({fingerprint}). "
                f"Run `spikeport {command}` again."
            )
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
    n_cores, chip_steps = len(workload.mapping.cores), workload.chip_steps
    by_core = np.zeros((7, chip_steps, n_cores), dtype=np.int64)
    totals = np.zeros((len(workload.graph.projections), 6), dtype=np.int64)

    def work(start: int, stop: int) -> np.ndarray:
        spikes, active = workload.bits(start, stop)
        counted, passed = by_core[:, start:stop], np.zeros_like(totals)
        _count(spikes, active, start, workload.rows, workload.trace.steps, workload.sends, counted, passed)
        return passed

    for passed in workload.each_chunk(work, threads, progress):
        totals += passed
    keys = ("packets", "synops", "within_tile", "hops_ew", "hops_ns", "sent_by_cores")
    by_projection = {
        projection.name: {key: int(totals[index, column]) for column, key in enumerate(keys)}
        for index, projection in enumerate(workload.graph.projections)
    }
    return Counts(
        samples=workload.trace.samples,
        chip_steps=chip_steps,
        neurons=np.array([len(core.neurons) for core in workload.mapping.cores], dtype=np.int64),
        messages_in=by_core[0],
        packets_out=by_core[1],
        spikes=by_core[2],
        active=by_core[3],
        synops={event: by_core[4 + index] for index, event in enumerate(SYNOP_EVENTS)},
        by_projection=by_projection,
    )


@jit
def is_set(row: np.ndarray, bit: int) -> bool:
    """Whether a bit of a packed row is set (`numpy.packbits` order)."""
    return (row[bit >> 3] >> (7 - (bit & 7))) & 1 != 0  # type: ignore[no-any-return]


@jit
def sends_now(sends: Any, projection: int, chip_step: int, rows: int, steps: int) -> bool:
    """Whether a spike at a chip step goes over a projection."""
    row = chip_step - sends.offset[projection]
    if row < 0 or row >= rows:
        return False
    return not (sends.recurrent[projection] and row % steps == steps - 1)


@jit
def _count(
    spikes: np.ndarray,
    active: np.ndarray,
    start: int,
    rows: int,
    steps: int,
    sends: Any,
    counted: np.ndarray,
    totals: np.ndarray,
) -> None:
    """counted: (7, chip steps, cores): messages in, packets out, spikes, active, synops by event; totals: (projections,
    6)."""
    cores = counted.shape[2]
    for step in range(spikes.shape[0]):
        for unit in range(cores + 1):
            for k in range(sends.unit_first[unit], sends.unit_first[unit + 1]):
                bit = sends.unit_bit[k]
                if unit < cores and is_set(active[step], bit):
                    counted[3, step, unit] += 1
                if not is_set(spikes[step], bit):
                    continue
                if unit < cores:
                    counted[2, step, unit] += 1
                for s in range(sends.send_first[bit], sends.send_first[bit + 1]):
                    projection, core = sends.send_projection[s], sends.send_core[s]
                    if not sends_now(sends, projection, start + step, rows, steps):
                        continue
                    if unit < cores:
                        counted[1, step, unit] += 1
                    counted[0, step, core] += 1
                    counted[4 + sends.event[projection], step, core] += sends.send_synops[s]
                    east_west = abs(sends.column[unit] - sends.column[core])
                    north_south = abs(sends.row[unit] - sends.row[core])
                    totals[projection, 0] += 1
                    totals[projection, 1] += sends.send_synops[s]
                    totals[projection, 2] += east_west == 0 and north_south == 0
                    totals[projection, 3] += east_west
                    totals[projection, 4] += north_south
                    totals[projection, 5] += unit < cores
