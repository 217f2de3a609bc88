"""What the units of a mapped network do in every chip step, neuron by neuron, as `docs/chip-timing.md` tells it.

Plain loops over a trace's bits and over operators written out synapse by synapse; it shares no line with
`spikeport.deploy.workload` and `spikeport.deploy.timing`. Random traces, mappings and chips for the tests of both.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from graph_strategies import explicit_matrix
from hypothesis import strategies as st

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Dense
from spikeport.deploy.chip import Chip, Events, load_chip
from spikeport.deploy.mapping import Core, Mapping, map_network
from spikeport.deploy.trace import Trace, pack

SEEDS = st.integers(0, 2**32 - 1)
EVENT_OF = {"dense": "synop_dense", "conv": "synop_conv", "sparse": "synop_sparse", "one_to_one": "synop_sparse"}


# ---- what a chip step holds -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packet:
    """A message on its way to a core, with the synaptic operations that it brings."""

    projection: Projection
    core: int
    synops: int


@dataclass(frozen=True)
class Visit:
    """What a unit does about one neuron in one chip step; the host's neurons have no state."""

    active: bool
    fires: bool
    packets: list[Packet]


def chip_steps(graph: ProcessGraph, mapping: Mapping, trace: Trace) -> list[list[list[Visit]]]:
    """The visits of each unit (the cores, then the host) in each chip step."""
    run = _Run(graph, mapping, trace)
    last = max(population.stage for population in graph.populations)
    return [[list(unit) for unit in run.units(g)] for g in range(run.rows + last)]


class _Run:
    def __init__(self, graph: ProcessGraph, mapping: Mapping, trace: Trace) -> None:
        self.graph, self.mapping, self.steps = graph, mapping, graph.steps
        self.rows = trace.samples * trace.steps
        self.spikes = {name: _unpacked(packed, graph.node(name).size) for name, packed in trace.packed.items()}
        self.active = {name: _unpacked(packed, graph.node(name).size) for name, packed in trace.active.items()}
        self.reached = {projection.name: _reached(projection, mapping) for projection in graph.projections}

    def units(self, g: int) -> Iterator[list[Visit]]:
        for core in self.mapping.cores:
            r = g - self.graph.population(core.population).stage
            works = 0 <= r < self.rows
            yield [
                self.visit(g, core.population, n, works and self.active[core.population][r][n], works and
                           self.spikes[core.population][r][n])
                for n in core.neurons.tolist()
            ]  # fmt: skip
        host = []
        for node in self.graph.inputs:
            for n in range(node.size):
                fires = node.constant or (g < self.rows and self.spikes[node.name][g][n])
                host.append(self.visit(g, node.name, n, False, fires))
        yield host

    def visit(self, g: int, source: str, neuron: int, active: bool, fires: bool) -> Visit:
        packets = []
        for projection in self.graph.projections:
            if fires and projection.source == source and self.delivers(projection, g):
                reached = self.reached[projection.name][neuron]
                packets += [Packet(projection, core, synops) for core, synops in reached]
        return Visit(bool(active), bool(fires), packets)

    def delivers(self, projection: Projection, g: int) -> bool:
        """Whether a projection has a sample step to deliver for at chip step g."""
        if projection.recurrent:
            r = g + 1 - self.graph.node(projection.source).stage
            return 0 < r < self.rows and r % self.steps != 0  # the first step of a sample gets nothing
        r = g - self.graph.population(projection.target).stage + 1 + projection.delay
        return 0 <= r < self.rows


def _unpacked(packed: np.ndarray, size: int) -> list[list[int]]:
    """Bits by sample step, counted through all samples."""
    bits: list[list[int]] = np.unpackbits(packed.reshape(-1, packed.shape[-1]), axis=-1, count=size).tolist()
    return bits


def _reached(projection: Projection, mapping: Mapping) -> list[list[tuple[int, int]]]:
    """(core, synapses in it) of each source neuron, cores rising."""
    counts = explicit_matrix(projection.operator)[1]
    reached = []
    for neuron in range(counts.shape[1]):
        entries = []
        for index, core in enumerate(mapping.cores):
            if core.population == projection.target:
                synapses = sum(counts[core.neurons.tolist(), neuron].tolist())
                entries += [(index, synapses)] if synapses else []
        reached.append(entries)
    return reached


def tile_of(mapping: Mapping, unit: int) -> tuple[int, int]:
    """Column and row of a unit's tile on the whole mesh, chips side by side; the host's is the input tile."""
    if unit == len(mapping.cores):
        return mapping.input_tile
    core = mapping.cores[unit]
    return core.chip * mapping.columns + core.tile_x, core.tile_y


# ---- random traces, mappings, chips ---------------------------------------------------------------------------------


def random_trace(graph: ProcessGraph, samples: int, seed: int, rate: float = 0.3) -> Trace:
    """Random spikes of every input and population, and random activity that need not fit them."""
    rng = np.random.default_rng(seed)
    frame = (samples, graph.steps)
    return trace_of(
        graph,
        {node.name: rng.random((*frame, node.size)) < rate for node in graph.event_nodes},
        {node.name: rng.random((*frame, node.size)) < 0.6 for node in graph.populations},
    )


def trace_of(graph: ProcessGraph, spikes: dict[str, np.ndarray], active: dict[str, np.ndarray]) -> Trace:
    """A trace of given bits (samples, steps, neurons)."""
    samples = len(next(iter(spikes.values())))
    sizes = {node.name: node.size for node in graph.event_nodes}
    packed, working = ({name: pack(np.array(bits)) for name, bits in group.items()} for group in (spikes, active))
    return Trace("drawn", graph.fingerprint(), samples, graph.steps, sizes, packed, active=working)


def small_chip(
    columns: int = 2, rows: int = 2, cores_per_tile: int = 2, neurons: int = 1000, **changes: object
) -> Chip:
    """Loihi 2 with other sizes and room for every network of the tests; changes: further fields of `Chip`."""
    base = load_chip("loihi2")
    roomy = {"neurons": neurons, "synaptic_words": 1 << 20}
    return base.model_copy(
        update={
            "mesh": base.mesh.model_copy(update={"columns": columns, "rows": rows}),
            "cores_per_tile": cores_per_tile,
            "max_chips": 4096,
            "limits": base.limits.model_copy(update=roomy),
            "input": base.input.model_copy(update={"column": columns - 1, "row": rows - 1}),
            **changes,
        }
    )


def with_ticks(chip: Chip, ticks: dict[str, int], link: int = 1, barrier: int = 7, **buffers: int) -> Chip:
    """A chip whose events take whole ticks of a quarter nanosecond; what is not named takes none."""
    quarter = 0.25

    def takes(quantity: object, n: int) -> object:
        values = dict.fromkeys(("value", "low", "high"), n * quarter)
        return quantity.model_copy(update=values)  # type: ignore[attr-defined]

    events = {
        name: chip.event(name).model_copy(update={"time_ns": takes(chip.event(name).time_ns, ticks.get(name, 0))})
        for name in Events.model_fields
    }
    points = [
        point.model_copy(update={"time_ns": takes(point.time_ns, barrier + index)})
        for index, point in enumerate(chip.barrier.points)
    ]
    network = {"link_ns": takes(chip.network.link_ns, link), **buffers}
    return chip.model_copy(
        update={
            "tick_ns": quarter,
            "events": chip.events.model_copy(update=events),
            "barrier": chip.barrier.model_copy(update={"points": points}),
            "network": chip.network.model_copy(update=network),
        }
    )


def random_mapping(graph: ProcessGraph, chip: Chip, seed: int) -> Mapping:
    """Neurons anywhere, in any order: each population cut at random places, its parts on random cores of some chips."""
    rng = np.random.default_rng(seed)
    mapping = map_network(graph, chip)
    parts: list[tuple[str, np.ndarray]] = []
    for population in graph.populations:
        order = rng.permutation(population.size)
        cuts = np.sort(rng.choice(population.size - 1, int(rng.integers(min(population.size, 4))), replace=False)) + 1
        parts += [(population.name, part) for part in np.split(order, cuts)]
    chips = -(-len(parts) // chip.cores) + int(rng.integers(2))
    places = rng.permutation(chips * chip.cores)[: len(parts)].tolist()
    return replace(
        mapping, cores=tuple(_core(mapping, chip, place, *part) for place, part in zip(places, parts, strict=True))
    )


def placed(mapping: Mapping, *tiles: tuple[int, int]) -> Mapping:
    """The same cores on given tiles (x, y) of the whole mesh, in each tile the first free one."""
    cores: list[Core] = []
    for core, (x, y) in zip(mapping.cores, tiles, strict=True):
        chip, x_on_chip = divmod(x, mapping.columns)
        before = sum((other.chip, other.tile_x, other.tile_y) == (chip, x_on_chip, y) for other in cores)
        number = (y * mapping.columns + x_on_chip) * mapping.cores_per_tile + before
        cores.append(replace(core, chip=chip, core=number, tile_x=x_on_chip, tile_y=y))
    return replace(mapping, cores=tuple(cores))


def _core(mapping: Mapping, chip: Chip, place: int, population: str, neurons: np.ndarray) -> Core:
    on_chip, core = divmod(place, chip.cores)
    y, x = divmod(core // chip.cores_per_tile, chip.mesh.columns)
    return replace(
        mapping.cores[0], chip=on_chip, core=core, tile_x=x, tile_y=y, population=population, neurons=neurons
    )


# ---- a network to work by hand --------------------------------------------------------------------------------------

ZERO = np.int64(0)
NEURON = LoihiNeuron(ZERO, ZERO, np.int64(100), ZERO, ZERO)


def by_hand() -> tuple[ProcessGraph, Trace]:
    """Two inputs -> two neurons a -> one neuron b, two steps, one sample; a's first neuron and b fire in step 0."""
    graph = ProcessGraph(
        "by hand",
        2,
        1.0,
        (Input("in", (2,)),),
        (Population("a", (2,), NEURON, 1), Population("b", (1,), NEURON, 2)),
        (
            Projection("in-a", "in", "a", Dense((2,), np.array([[2, 4], [6, 8]]))),
            Projection("a-b", "a", "b", Dense((2,), np.array([[2, 4]]))),
        ),
        Readout("b"),
    )
    spikes = {"in": [[[1, 1], [1, 0]]], "a": [[[1, 0], [0, 0]]], "b": [[[1], [0]]]}
    active = {"a": [[[1, 1], [1, 1]]], "b": [[[1], [0]]]}
    return graph, trace_of(graph, _arrays(spikes), _arrays(active))


def _arrays(values: dict[str, list[list[list[int]]]]) -> dict[str, np.ndarray]:
    return {name: np.array(bits) for name, bits in values.items()}
