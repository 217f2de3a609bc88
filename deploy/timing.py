"""Counts per core from a trace, and the time that they take in integer ticks.

The model of this version: in a chip step every core receives its messages, does their synaptic operations, updates
its neurons and sends its spikes, one after another; the step takes as long as its slowest core, and a barrier closes
it. The network between the cores is taken as free of contention and hides behind the cores. Samples stream back to
back: at chip step g a population of stage l works on the sample step g - l, samples counted through. Cores that have no
sample yet, or none any more, do nothing.
"""

from dataclasses import dataclass

import numba
import numpy as np

from spikeport.converters.graph import Input, Population, ProcessGraph, Projection
from spikeport.deploy.chip import SYNOP_EVENT, Chip
from spikeport.deploy.mapping import Mapping
from spikeport.deploy.synapses import list_synapses, survey
from spikeport.deploy.trace import Trace
from spikeport.models.errors import SpikeportError

CORE_EVENTS = (
    "axon_in",
    "synop_dense",
    "synop_sparse",
    "synop_conv",
    "neuron_inactive",
    "neuron_active",
    "neuron_access",
    "neuron_update",
    "spike",
    "axon_out",
)
"""The events of `chip.Events` that a core does; the others belong to the mesh."""

CAUSES = {
    "messages in": ("axon_in",),
    "synapses": ("synop_dense", "synop_sparse", "synop_conv"),
    "neurons": ("neuron_inactive", "neuron_active", "neuron_access", "neuron_update"),
    "spikes out": ("spike", "axon_out"),
}
"""What a core spends its time on, by the events that it is made of."""


@dataclass(frozen=True, eq=False)
class CoreCounts:
    """What every core did in every sample step. Arrays are int64 (samples, steps, cores) unless told otherwise.

    messages_in, packets_out: spikes that arrive at and leave a core, one for each (spike, projection, target core).
    synops: synaptic operations by event of the chip file. active: neurons with state or input. neurons: (cores,).
    within_tile, hops_ew, hops_ns: packets within a tile and hops of all packets along their XY routes, in total;
    chips stand side by side. projections: synaptic operations of each projection, (samples, steps).
    """

    samples: int
    steps: int
    neurons: np.ndarray
    messages_in: np.ndarray
    synops: dict[str, np.ndarray]
    active: np.ndarray
    spikes: np.ndarray
    packets_out: np.ndarray
    within_tile: int
    hops_ew: int
    hops_ns: int
    projections: dict[str, np.ndarray]

    def of(self, event: str) -> np.ndarray:
        """How often each core did an event of CORE_EVENTS, broadcastable to (samples, steps, cores)."""
        match event:
            case "axon_in":
                return self.messages_in
            case "synop_dense" | "synop_sparse" | "synop_conv":
                return self.synops.get(event, np.zeros((1, 1, len(self.neurons)), dtype=np.int64))
            case "neuron_inactive":
                inactive: np.ndarray = self.neurons - self.active
                return inactive
            case "neuron_active" | "neuron_update":
                return self.active
            case "neuron_access":
                return self.neurons[None, None, :]
            case "spike":
                return self.spikes
            case "axon_out":
                return self.packets_out
        raise SpikeportError(f"no core counts the event {event!r}.")

    def total(self, event: str) -> int:
        """How often an event of `chip.Events` happened in the whole run."""
        on_mesh = {"within_tile": self.within_tile, "hop_ew": self.hops_ew, "hop_ns": self.hops_ns}
        if event in on_mesh:
            return on_mesh[event]
        return int(np.broadcast_to(self.of(event), (self.samples, self.steps, len(self.neurons))).sum())


@dataclass(frozen=True, eq=False)
class Timing:
    """Time of a streamed run, in ticks.

    step_ticks: of each chip step, barrier included, int64 (chip steps,). critical_core: the core that each step waited
    for, -1 where none worked. critical_path: ticks of all steps by cause; the causes add up to the whole run.
    latency_ticks: from the step in which a sample's first input enters to the end of the step in which the readout
    works on its last step, int64 (samples,). busy_ticks: int64 (cores,).
    """

    tick_ns: float
    step_ticks: np.ndarray
    barrier_ticks: int
    critical_core: np.ndarray
    critical_path: dict[str, int]
    latency_ticks: np.ndarray
    busy_ticks: np.ndarray

    @property
    def total_ticks(self) -> int:
        """The whole stream, filling and draining of the pipeline included."""
        return int(self.step_ticks.sum())

    @property
    def ticks_per_inference(self) -> float:
        """The stream's time over its samples (throughput, not latency)."""
        return self.total_ticks / len(self.latency_ticks)

    @property
    def busy_share(self) -> np.ndarray:
        """Share of the stream's time in which each core works, float64 (cores,)."""
        share: np.ndarray = self.busy_ticks / max(self.total_ticks, 1)
        return share


@numba.njit(cache=True, nogil=True)
def _deliver(
    packed: np.ndarray,
    steps: int,
    lag: int,
    axon_of: np.ndarray,
    start: np.ndarray,
    core: np.ndarray,
    synapses: np.ndarray,
    source_core: np.ndarray,
    synops: np.ndarray,
    messages: np.ndarray,
    packets: np.ndarray,
    sent: np.ndarray,
) -> None:
    """Add up what the spikes of one projection cause: synops and messages by (row, target core), packets by (row,
    source core), `sent` by source neuron. Rows are sample steps; spikes act `lag` rows later, within their sample."""
    for row in range(packed.shape[0]):
        if row % steps + lag >= steps:
            continue
        for byte in range(packed.shape[1]):
            bits = packed[row, byte]
            if bits == 0:
                continue
            for bit in range(8):
                if not (bits >> (7 - bit)) & 1:
                    continue
                neuron = byte * 8 + bit
                sent[neuron] += 1
                axon = axon_of[neuron]
                if axon < 0:
                    continue
                for k in range(start[axon], start[axon + 1]):
                    synops[row + lag, core[k]] += synapses[k]
                    messages[row + lag, core[k]] += 1
                if source_core[neuron] >= 0:
                    packets[row, source_core[neuron]] += start[axon + 1] - start[axon]


@numba.njit(cache=True, nogil=True)
def _weigh(packed: np.ndarray, weight: np.ndarray, group: np.ndarray, result: np.ndarray) -> None:
    """result[row, group of neuron] += weight of neuron, over all spikes."""
    for row in range(packed.shape[0]):
        for byte in range(packed.shape[1]):
            bits = packed[row, byte]
            if bits == 0:
                continue
            for bit in range(8):
                if (bits >> (7 - bit)) & 1:
                    neuron = byte * 8 + bit
                    result[row, group[neuron]] += weight[neuron]


def core_counts(graph: ProcessGraph, mapping: Mapping, trace: Trace) -> CoreCounts:
    """Count, per core and sample step, what the trace's spikes cause.

    `trace.active` is by population: for one on several cores it is split in proportion to their neurons, rounded so
    that the sum is exact. Messages, synaptic operations, spikes and packets are exact for each core.

    Raises SpikeportError where mapping and trace belong to other graphs, or the trace lacks input spikes or activity.
    """
    _check_belongs(graph, mapping, trace)
    rows, n_cores = trace.samples * trace.steps, len(mapping.cores)
    messages, packets, spikes, active = (np.zeros((rows, n_cores), dtype=np.int64) for _ in range(4))
    synops: dict[str, np.ndarray] = {}
    projections: dict[str, np.ndarray] = {}
    mesh = np.zeros(3, dtype=np.int64)
    core_of = {population.name: mapping.core_of_neurons(population) for population in graph.populations}
    for projection in graph.projections:
        source = graph.node(projection.source)
        synapses = list_synapses(projection.operator)
        position = np.arange(synapses.n_out)
        records, _ = survey(synapses, position, core_of[projection.target], n_cores)
        start = np.concatenate([[0], np.cumsum(np.bincount(records[:, 0], minlength=synapses.n_axons))])
        target_core, n_synapses = np.ascontiguousarray(records[:, 1]), np.ascontiguousarray(records[:, 2])
        source_core = core_of.get(source.name, np.full(source.size, -1, dtype=np.int64))
        own = np.zeros((rows, n_cores), dtype=np.int64)
        sent = np.zeros(source.size, dtype=np.int64)
        lag = int(projection.recurrent)
        routes = (start.astype(np.int64), target_core, n_synapses)
        packed = _rows(trace, source)
        _deliver(packed, trace.steps, lag, synapses.axon_of, *routes, source_core, own, messages, packets, sent)
        event = SYNOP_EVENT[projection.operator.kind]
        synops[event] = synops[event] + own if event in synops else own
        projections[projection.name] = own.sum(axis=1).reshape(trace.samples, trace.steps)
        mesh += _traffic(mapping, synapses.axon_of, start, target_core, source_core, sent)
    for population in graph.populations:
        packed, own_core = _rows(trace, population), core_of[population.name]
        _weigh(packed, np.ones(population.size, dtype=np.int64), own_core, spikes)
        cores = mapping.cores_of(population.name)
        sizes = np.array([len(mapping.cores[index].neurons) for index in cores])
        active[:, cores] = split(trace.active_counts(population.name).reshape(-1), sizes)
    shape = (trace.samples, trace.steps, n_cores)
    return CoreCounts(
        samples=trace.samples,
        steps=trace.steps,
        neurons=np.array([len(core.neurons) for core in mapping.cores], dtype=np.int64),
        messages_in=messages.reshape(shape),
        synops={event: array.reshape(shape) for event, array in synops.items()},
        active=active.reshape(shape),
        spikes=spikes.reshape(shape),
        packets_out=packets.reshape(shape),
        within_tile=int(mesh[0]),
        hops_ew=int(mesh[1]),
        hops_ns=int(mesh[2]),
        projections=projections,
    )


def derived_synops(graph: ProcessGraph, trace: Trace) -> dict[str, np.ndarray]:
    """Synaptic operations of each projection, int64 (samples, steps), from spikes and `Operator.fan_out` alone.

    It shares nothing with the counters of a simulator or of `core_counts`, which it is there to check. A graded event
    is one operation a synapse, whatever its value.
    """
    result = {}
    for projection in graph.projections:
        fan_out = projection.operator.fan_out().ravel()
        packed = _rows(trace, graph.node(projection.source))
        sums = np.zeros((len(packed), 1), dtype=np.int64)
        _weigh(packed, fan_out, np.zeros(len(fan_out), dtype=np.int64), sums)
        sums = sums.reshape(trace.samples, trace.steps)
        result[projection.name] = _arriving(projection, sums)
    return result


def split(totals: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Split each total in proportion to sizes, in whole numbers that add up: (n,), (parts,) -> int64 (n, parts)."""
    ends = totals[:, None].astype(np.int64) * np.cumsum(sizes) // sizes.sum()
    return np.diff(ends, axis=1, prepend=0)


def simulate_timing(graph: ProcessGraph, mapping: Mapping, chip: Chip, counts: CoreCounts) -> Timing:
    """Ticks of every chip step of the streamed run that was counted.

    `chip` gives only costs and may be another than the one mapped onto.
    """
    rows, n_cores = counts.samples * counts.steps, len(mapping.cores)
    stage = np.array([graph.population(core.population).stage for core in mapping.cores], dtype=np.int64)
    chip_steps = rows + int(stage.max())
    barrier = chip.barrier_ticks(mapping.tiles)
    core_ticks = _ticks(chip, counts, CORE_EVENTS)
    streamed = np.zeros((chip_steps, n_cores), dtype=np.int64)
    for level in np.unique(stage):
        streamed[level : level + rows, stage == level] = core_ticks[:, stage == level]
    critical = streamed.argmax(axis=1)
    slowest = streamed[np.arange(chip_steps), critical]
    critical[slowest == 0] = -1
    step_ticks = slowest + barrier
    # where on the sample steps the critical core of each chip step was
    worked = np.flatnonzero(critical >= 0)
    row, core = worked - stage[critical[worked]], critical[worked]
    path = {cause: int(_ticks(chip, counts, events)[row, core].sum()) for cause, events in CAUSES.items()}
    ends = np.concatenate([[0], np.cumsum(step_ticks)])
    first = np.arange(counts.samples) * counts.steps
    return Timing(
        tick_ns=chip.tick_ns,
        step_ticks=step_ticks,
        barrier_ticks=barrier,
        critical_core=critical,
        critical_path=path | {"barrier": barrier * chip_steps},
        latency_ticks=ends[first + counts.steps + graph.depth] - ends[first],
        busy_ticks=core_ticks.sum(axis=0),
    )


def _ticks(chip: Chip, counts: CoreCounts, events: tuple[str, ...]) -> np.ndarray:
    """Ticks that each core spends on some events, int64 (sample steps, cores)."""
    result = np.zeros((counts.samples, counts.steps, len(counts.neurons)), dtype=np.int64)
    for event in events:
        ticks = chip.ticks(event)
        if ticks:
            result += counts.of(event) * ticks
    return result.reshape(-1, len(counts.neurons))


def _arriving(projection: Projection, sums: np.ndarray) -> np.ndarray:
    """Move what a recurrent projection's spikes cause to the next step of their sample."""
    if not projection.recurrent:
        return sums
    moved = np.zeros_like(sums)
    moved[:, 1:] = sums[:, :-1]
    return moved


def _rows(trace: Trace, node: Input | Population) -> np.ndarray:
    """Packed spikes of an input or population, uint8 (sample steps, bytes); constant inputs fire at every step."""
    rows = trace.samples * trace.steps
    if isinstance(node, Input) and node.constant:
        return np.broadcast_to(np.packbits(np.ones(node.size, dtype=bool)), (rows, -(-node.size // 8)))
    packed = np.ascontiguousarray(trace.packed[node.name].reshape(rows, -1))
    padding = packed.shape[1] * 8 - node.size
    # the kernels index by bit, unchecked
    if not 0 <= padding < 8 or (packed[:, -1] & ((1 << padding) - 1)).any():
        raise SpikeportError(f"the {trace.backend} trace has spikes outside {node.name!r} of {node.size} neurons.")
    return packed


def _traffic(
    mapping: Mapping,
    axon_of: np.ndarray,
    start: np.ndarray,
    target_core: np.ndarray,
    source_core: np.ndarray,
    sent: np.ndarray,
) -> np.ndarray:
    """Packets within a tile, east-west hops and north-south hops of one projection's packets, int64 (3,)."""
    positions = mapping.tile_positions()
    result = np.zeros(3, dtype=np.int64)
    reached = np.diff(start)
    for core in np.unique(source_core):
        here = positions[core] if core >= 0 else np.array(mapping.input_tile)
        mine = (source_core == core) & (axon_of >= 0)
        by_axon = np.zeros(len(reached), dtype=np.int64)
        np.add.at(by_axon, axon_of[mine], sent[mine])
        packets = np.repeat(by_axon, reached)
        away = np.abs(positions[target_core] - here)
        result += (packets[away.sum(axis=1) == 0].sum(), packets @ away[:, 0], packets @ away[:, 1])
    return result


def _check_belongs(graph: ProcessGraph, mapping: Mapping, trace: Trace) -> None:
    fingerprint = graph.fingerprint()
    for what, other in (("mapping", mapping.graph), ("trace", trace.graph)):
        if other != fingerprint:
            raise SpikeportError(f"the {what} is of graph {other}, not of {graph.name!r} ({fingerprint}).")
    spiking: list[Input | Population] = [*graph.event_inputs, *graph.populations]
    missing = [node.name for node in spiking if node.name not in trace.packed]
    if missing:
        raise SpikeportError(f"the {trace.backend} trace lacks the spikes of {', '.join(missing)}.")
    if any(population.name not in trace.active for population in graph.populations):
        raise SpikeportError(f"the {trace.backend} trace counts no active neurons; use one of the `events` backend.")
    for population in graph.populations:
        active = trace.active[population.name]
        if (
            active.shape != trace.packed[population.name].shape
            or trace.active_counts(population.name).max() > population.size
        ):
            raise SpikeportError(f"the {trace.backend} trace counts more active neurons than {population.name} has.")
