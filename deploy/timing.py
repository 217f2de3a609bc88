"""Time of a streamed run in integer ticks, under the two models of `docs/chip-timing.md`.

`simple` takes the mesh as free: a step lasts as long as its slowest unit. `cycle` follows every packet through queues,
routers and links (`mesh.py`). Both work on a `Workload` and on the costs of any chip file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numba
import numpy as np

from spikeport.converters.graph import Population, ProcessGraph
from spikeport.deploy import mesh
from spikeport.deploy.chip import Chip
from spikeport.deploy.mapping import Mapping
from spikeport.deploy.mesh import Fabric
from spikeport.deploy.trace import Trace
from spikeport.deploy.workload import SYNOP_EVENTS, Counts, Workload, is_set, sends_now
from spikeport.models.errors import SpikeportError
from spikeport.models.files import read_arrays, write_arrays

Model = Literal["simple", "cycle"]

UNIT_EVENTS = {
    "neurons": ("neuron_inactive", "neuron_active", "neuron_access", "neuron_update"),
    "spikes out": ("spike", "axon_out"),
    "messages in": ("axon_in",),
    "synapses": SYNOP_EVENTS,
}
"""What a core spends its time on, by the events that it is made of; the first two are the neuron unit's."""

CAUSES = (*mesh.CAUSES, "barrier")
"""What the time of a step goes to."""


FORMAT = "spikeport-timing"
FORMAT_VERSION = 1
COMMAND = "spikeport simulate"

_NUMBERS = ("model", "chip", "chip_digest", "tick_ns", "samples", "barrier_ticks", "link_ticks")
_ARRAYS = (
    "step_ticks",
    "critical_core",
    "latency_ticks",
    "neuron_ticks",
    "synapse_ticks",
    "stalled",
    "neuron_end",
    "synapses_began",
    "synapses_end",
    "link_packets",
)


@dataclass(frozen=True, eq=False)
class Timing:
    """Time of a streamed run, in ticks. Arrays are int64 (chip steps,) or (chip steps, cores).

    step_ticks: of each chip step, barrier included. causes: what each step's time went to; they add up to step_ticks.
    critical_core: the core that each step waited for, -1 where none worked. latency_ticks: (samples,), from the step in
    which a sample's first input enters to the end of the step in which the readout works on its last step.
    neuron_ticks, synapse_ticks: work of each core's two units; stalled: ticks a neuron unit waited for room.
    neuron_end, synapses_began, synapses_end: tick within the step (-1: no packet came). link_packets: (tiles, outputs),
    packets of the whole run that left each tile's router by each output (`mesh.py` numbers them); zeros in the simple
    model.
    """

    model: Model
    chip: str
    chip_digest: str
    tick_ns: float
    samples: int
    step_ticks: np.ndarray
    barrier_ticks: int
    causes: dict[str, np.ndarray]
    critical_core: np.ndarray
    latency_ticks: np.ndarray
    neuron_ticks: np.ndarray
    synapse_ticks: np.ndarray
    stalled: np.ndarray
    neuron_end: np.ndarray
    synapses_began: np.ndarray
    synapses_end: np.ndarray
    link_packets: np.ndarray
    link_ticks: int

    def save(self, path: Path, graph: ProcessGraph) -> None:
        """Write everything to one .npz file, without pickle; `graph` is the one that was timed."""
        header: dict[str, Any] = {"format": FORMAT, "version": FORMAT_VERSION, "graph": graph.fingerprint()}
        header |= {key: getattr(self, key) for key in _NUMBERS} | {"causes": list(self.causes)}
        arrays = {key: getattr(self, key) for key in _ARRAYS}
        write_arrays(path, header, arrays | {f"cause.{cause}": ticks for cause, ticks in self.causes.items()})

    @staticmethod
    def load(path: Path, graph: ProcessGraph) -> "Timing":
        """Read what `save` wrote of the same graph. Raises SpikeportError for any other file."""
        header, arrays = read_arrays(path, COMMAND)
        if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (FORMAT, FORMAT_VERSION):
            raise SpikeportError(f"{path} is not a timing of version {FORMAT_VERSION}. Run `{COMMAND}` again.")
        if header.get("graph") != graph.fingerprint():
            raise SpikeportError(f"{path} is the timing of another network. Run `{COMMAND}` again.")
        try:
            causes = {cause: arrays[f"cause.{cause}"] for cause in header["causes"]}
            fields = {key: header[key] for key in _NUMBERS} | {key: arrays[key] for key in _ARRAYS}
            timing = Timing(**fields, causes=causes)
            timing._check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SpikeportError(f"{path} is damaged ({error}). Run `{COMMAND}` again.") from None
        return timing

    def _check(self) -> None:
        """Raise ValueError where the arrays contradict each other."""
        steps, cores = self.neuron_ticks.shape
        by_core = (self.synapse_ticks, self.stalled, self.neuron_end, self.synapses_began, self.synapses_end)
        by_step = (self.step_ticks, self.critical_core, *self.causes.values())
        shapes = [array.shape == (steps, cores) for array in by_core]
        shapes += [array.shape == (steps,) for array in by_step] + [self.latency_ticks.shape == (self.samples,)]
        if self.model not in get_args(Model) or not all(shapes) or set(self.causes) != set(CAUSES):
            raise ValueError("its parts do not fit each other")

    @property
    def total_ticks(self) -> int:
        """The whole stream, filling and draining of the pipeline included."""
        return int(self.step_ticks.sum())

    @property
    def ticks_per_inference(self) -> float:
        """The stream's time over its samples (throughput, not latency)."""
        return self.total_ticks / self.samples

    @property
    def busy_share(self) -> np.ndarray:
        """Share of the stream's time in which the busier unit of each core works, float64 (cores,)."""
        busy = np.maximum(self.neuron_ticks.sum(axis=0), self.synapse_ticks.sum(axis=0))
        share: np.ndarray = busy / max(self.total_ticks, 1)
        return share

    @property
    def link_share(self) -> np.ndarray:
        """Share of the stream's time in which each router output is taken, float64 (tiles, outputs)."""
        share: np.ndarray = self.link_packets * self.link_ticks / max(self.total_ticks, 1)
        return share


def simulate_timing(
    workload: Workload,
    counts: Counts,
    chip: Chip,
    model: Model,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Timing:
    """Time the run that was counted. `chip` gives only costs and may be another than the one mapped onto."""
    if model not in get_args(Model):
        raise SpikeportError(f"unknown timing model {model!r}. Known: {', '.join(get_args(Model))}.")
    tables = _Tables.empty(workload)
    if model == "cycle":
        _time_packets(workload, chip, tables, threads, progress)
    else:
        _time_sums(counts, chip, tables)
    barrier = chip.barrier_ticks(workload.mapping.tiles)
    step_ticks = tables.figures[:, 0] + barrier
    causes = {cause: tables.figures[:, 2 + index] for index, cause in enumerate(mesh.CAUSES)}
    ends = np.concatenate([[0], np.cumsum(step_ticks)])
    graph, steps = workload.graph, workload.trace.steps
    first = np.arange(counts.samples) * steps
    neuron_ticks = sum(_ticks(chip, counts, events) for events in list(UNIT_EVENTS.values())[:2])
    synapse_ticks = sum(_ticks(chip, counts, events) for events in list(UNIT_EVENTS.values())[2:])
    return Timing(
        model=model,
        chip=chip.name,
        chip_digest=chip.digest,
        tick_ns=chip.tick_ns,
        samples=counts.samples,
        step_ticks=step_ticks,
        barrier_ticks=barrier,
        causes=causes | {"barrier": np.full(len(step_ticks), barrier)},
        critical_core=tables.figures[:, 1],
        latency_ticks=ends[first + steps + graph.depth] - ends[first],
        neuron_ticks=np.asarray(neuron_ticks),
        synapse_ticks=np.asarray(synapse_ticks),
        stalled=tables.times[:, mesh.STALLED],
        neuron_end=tables.ended[:, :-1],
        synapses_began=tables.times[:, mesh.SYNAPSES_BEGAN],
        synapses_end=tables.times[:, mesh.SYNAPSES_ENDED],
        link_packets=tables.moved,
        link_ticks=_at_least_one(chip.link_ticks),
    )


@dataclass(frozen=True, eq=False)
class _Tables:
    """What the models fill in; `mesh.simulate` explains the columns."""

    figures: np.ndarray
    ended: np.ndarray
    times: np.ndarray
    moved: np.ndarray

    @staticmethod
    def empty(workload: Workload) -> "_Tables":
        n, cores, mapping = workload.chip_steps, len(workload.mapping.cores), workload.mapping
        return _Tables(
            np.zeros((n, 2 + len(mesh.CAUSES)), np.int64),
            np.zeros((n, cores + 1), np.int64),
            np.zeros((n, 3, cores), np.int64),
            np.zeros((mapping.chips * mapping.columns * mapping.rows, 5 + mapping.cores_per_tile), np.int64),
        )


def _time_sums(counts: Counts, chip: Chip, tables: _Tables) -> None:
    """The simple model: sums of each unit."""
    spent = {cause: _ticks(chip, counts, events) for cause, events in UNIT_EVENTS.items()}
    neurons, synapses = spent["neurons"] + spent["spikes out"], spent["messages in"] + spent["synapses"]
    tables.ended[:, :-1] = neurons
    tables.times[:, mesh.SYNAPSES_ENDED] = np.where(counts.messages_in > 0, synapses, -1)
    slowest = np.maximum(neurons, synapses)
    critical = slowest.argmax(axis=1)
    step = np.arange(counts.chip_steps)
    tables.figures[:, 0] = slowest[step, critical]
    tables.figures[:, 1] = np.where(tables.figures[:, 0] > 0, critical, -1)
    at_synapses = synapses[step, critical] >= neurons[step, critical]
    for cause, ticks in spent.items():
        theirs = at_synapses == (cause in ("messages in", "synapses"))
        tables.figures[:, 2 + mesh.CAUSES.index(cause)] = np.where(theirs, ticks[step, critical], 0)


def _ticks(chip: Chip, counts: Counts, events: tuple[str, ...]) -> np.ndarray:
    """Ticks that each core spends on some events, int64 (chip steps, cores)."""
    result = np.zeros((counts.chip_steps, len(counts.neurons)), dtype=np.int64)
    for event in events:
        ticks = chip.ticks(event)
        if ticks:
            result += counts.of(event) * ticks
    return result


def fabric(mapping: Mapping, chip: Chip) -> Fabric:
    """The mesh of a mapping with a chip's times; chips stand side by side."""
    columns = mapping.chips * mapping.columns
    places = mapping.tile_positions()
    x, y = mapping.input_tile
    return Fabric(
        columns=columns,
        rows=mapping.rows,
        ports=mapping.cores_per_tile,
        tile=places[:, 1] * columns + places[:, 0],
        port=np.array([core.core % mapping.cores_per_tile for core in mapping.cores], dtype=np.int64),
        host_tile=y * columns + x,
        hop_ew=_at_least_one(chip.ticks("hop_ew")),
        hop_ns=_at_least_one(chip.ticks("hop_ns")),
        within_tile=_at_least_one(chip.ticks("within_tile")),
        link=_at_least_one(chip.link_ticks),
        link_packets=chip.network.link_packets,
        send_packets=chip.network.send_packets,
        queue_packets=chip.network.queue_packets,
    )


def _at_least_one(ticks: int) -> int:
    return max(ticks, 1)


def _time_packets(
    workload: Workload,
    chip: Chip,
    tables: _Tables,
    threads: int | None,
    progress: Callable[[int], None] | None,
) -> None:
    """The cycle model."""
    on = fabric(workload.mapping, chip)
    visit = [chip.ticks("neuron_access") + chip.ticks("neuron_inactive")]
    visit += [chip.ticks("neuron_access") + chip.ticks("neuron_active") + chip.ticks("neuron_update")]
    costs = [*visit, *(chip.ticks(event) for event in ("spike", "axon_out", "axon_in", *SYNOP_EVENTS))]

    def work(start: int, stop: int) -> np.ndarray:
        spikes, active = workload.bits(start, stop)
        here = slice(start, stop)
        moved = np.zeros(tables.moved.size, np.int64)
        _time(spikes, active, start, workload.rows, workload.trace.steps, workload.sends, np.array(costs),
              on.numbers(), on.tile, on.port, moved, tables.ended[here], tables.times[here],
              tables.figures[here])  # fmt: skip
        return moved

    for moved in workload.each_chunk(work, threads, progress):
        tables.moved.ravel()[:] += moved


@numba.njit(nogil=True, cache=True)
def _time(
    spikes: np.ndarray,
    active: np.ndarray,
    start: int,
    rows: int,
    steps: int,
    sends: Any,
    costs: np.ndarray,
    numbers: np.ndarray,
    tile: np.ndarray,
    port: np.ndarray,
    moved: np.ndarray,
    ended: np.ndarray,
    times: np.ndarray,
    figures: np.ndarray,
) -> None:
    """Simulate some chip steps. costs: ticks of a visit to an inactive and to an active neuron, of spike, axon_out,
    axon_in and SYNOP_EVENTS."""
    # each attribute taken once: taking one in a loop costs more than the loop's work
    unit_first, unit_bit = sends.unit_first, sends.unit_bit
    send_first, send_core, send_synops = sends.send_first, sends.send_core, sends.send_synops
    send_projection, event, offset = sends.send_projection, sends.event, sends.offset
    recurrent, timed = sends.recurrent, sends.timed
    at_rest, awake, spike, axon_out, axon_in = costs[0], costs[1], costs[2], costs[3], costs[4]
    cores = len(tile)
    none, unasked = np.empty((0, 4), np.int64), np.empty(0, np.int64)
    for step in range(spikes.shape[0]):
        packets = 0
        for k in range(len(unit_bit)):
            if is_set(spikes, step, unit_bit[k]):
                packets += send_first[unit_bit[k] + 1] - send_first[unit_bit[k]]
        first = np.zeros(cores + 2, np.int64)
        tail, out_tail = np.zeros(cores + 1, np.int64), np.zeros(cores + 1, np.int64)
        gap, out, target = np.empty(packets, np.int64), np.empty(packets, np.int64), np.empty(packets, np.int64)
        lookup, service = np.full(packets, axon_in), np.empty(packets, np.int64)
        n = 0
        for unit in range(cores + 1):
            on_core = unit < cores
            worked, sent = 0, 0
            for k in range(unit_first[unit], unit_first[unit + 1]):
                bit = unit_bit[k]
                if on_core:
                    worked += awake if is_set(active, step, bit) else at_rest
                if not is_set(spikes, step, bit):
                    continue
                if on_core:
                    worked += spike
                    sent += spike
                for s in range(send_first[bit], send_first[bit + 1]):
                    p = send_projection[s]
                    if timed[p] and not sends_now(start + step - offset[p], rows, steps, recurrent[p]):
                        continue
                    if on_core:
                        worked += axon_out
                        sent += axon_out
                    gap[n], out[n], target[n] = worked, sent, send_core[s]
                    service[n] = axon_in + send_synops[s] * costs[5 + event[p]]
                    n += 1
                    worked, sent = 0, 0
            first[unit + 1] = n
            tail[unit], out_tail[unit] = worked, sent
        work = (first, gap[:n], out[:n], target[:n], lookup[:n], service[:n], tail, out_tail)
        ticks = (unasked, unasked, unasked)
        mesh.simulate(numbers, tile, port, work, ticks, none, moved, ended[step], times[step], figures[step])


def derived_synops(graph: ProcessGraph, trace: Trace) -> dict[str, np.ndarray]:
    """Synaptic operations of each projection, int64 (samples, steps), from spikes and `Operator.fan_out` alone.

    It shares nothing with the counters of a simulator or of a workload, which it is there to check. A graded event is
    one operation a synapse, whatever its value.
    """
    result = {}
    for projection in graph.projections:
        node = graph.node(projection.source)
        fan_out = projection.operator.fan_out().ravel()
        if isinstance(node, Population) or not node.constant:
            packed = np.ascontiguousarray(trace.packed[node.name].reshape(trace.samples * trace.steps, -1))
            sums = np.zeros(len(packed), dtype=np.int64)
            _weigh(packed, fan_out, sums)
        else:
            sums = np.full(trace.samples * trace.steps, fan_out.sum())
        by_step = sums.reshape(trace.samples, trace.steps)
        if projection.recurrent:
            by_step = np.concatenate([np.zeros_like(by_step[:, :1]), by_step[:, :-1]], axis=1)
        result[projection.name] = by_step
    return result


@numba.njit(cache=True, nogil=True)
def _weigh(packed: np.ndarray, weight: np.ndarray, result: np.ndarray) -> None:
    """result[row] += weight of neuron, over all spikes."""
    for row in range(packed.shape[0]):
        for neuron in range(len(weight)):
            if is_set(packed, row, neuron):
                result[row] += weight[neuron]
