"""Ticks of a streamed run: against units and mesh stepped by a clock, against sums, and cases worked by hand."""

import json
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
from clock_stepped import CONTENTION, FULL_LINK, FULL_QUEUE, STALL, record_step
from graph_strategies import graphs, one_thread, random_graph
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from plain_chip import (
    EVENT_OF,
    SEEDS,
    Visit,
    by_hand,
    chip_steps,
    placed,
    random_mapping,
    random_trace,
    small_chip,
    tile_of,
    trace_of,
    with_ticks,
)

from spikeport.converters.graph import ProcessGraph, Readout
from spikeport.deploy import workload
from spikeport.deploy.chip import Chip, Events, load_chip
from spikeport.deploy.mapping import Mapping, map_network
from spikeport.deploy.mesh import EAST, NORTH, SOUTH, WEST, Fabric, StepEvents, StepLoad
from spikeport.deploy.timing import CAUSES, Model, Timing, simulate_timing
from spikeport.deploy.trace import Trace
from spikeport.deploy.workload import count, prepare
from spikeport.models.errors import SpikeportError

__all__ = ["one_thread"]


def timed(graph: ProcessGraph, mapping: Mapping, chip: Chip, trace: Trace, model: Model, threads: int = 1) -> Timing:
    joined = prepare(graph, mapping, trace)
    return simulate_timing(joined, count(joined, threads), chip, model, threads)


# ---- the whole network, stepped by a clock --------------------------------------------------------------------------


@dataclass
class Step:
    """What one chip step must come to. causes: without the barrier."""

    load: StepLoad
    events: StepEvents
    critical: int
    causes: Counter[str]


def fabric_of(mapping: Mapping, chip: Chip) -> Fabric:
    """The mesh as `docs/chip-timing.md` has it."""
    columns = mapping.chips * mapping.columns
    places = [tile_of(mapping, unit) for unit in range(len(mapping.cores) + 1)]
    tiles = [y * columns + x for x, y in places]
    network = chip.network
    return Fabric(
        columns=columns,
        rows=mapping.rows,
        ports=mapping.cores_per_tile,
        tile=np.array(tiles[:-1]),
        port=np.array([core.core % mapping.cores_per_tile for core in mapping.cores]),
        host_tile=tiles[-1],
        hop_ew=max(1, chip.ticks("hop_ew")),
        hop_ns=max(1, chip.ticks("hop_ns")),
        within_tile=max(1, chip.ticks("within_tile")),
        link=max(1, chip.link_ticks),
        link_packets=network.link_packets,
        send_packets=network.send_packets,
        queue_packets=network.queue_packets,
    )


def load_of(units: list[list[Visit]], chip: Chip) -> StepLoad:
    """The work of one chip step, visit by visit, at the costs of a chip."""
    first, tail, out_tail = [0], [], []
    gap, out, target, lookup, service = [], [], [], [], []
    for unit, visits in enumerate(units):
        host = unit == len(units) - 1
        work, sending = 0, 0
        for visit in visits:
            if not host:
                work += chip.ticks("neuron_access")
                if visit.active:
                    work += chip.ticks("neuron_active") + chip.ticks("neuron_update")
                else:
                    work += chip.ticks("neuron_inactive")
                if visit.fires:
                    work += chip.ticks("spike")
                    sending += chip.ticks("spike")
            for packet in visit.packets:
                if not host:
                    work += chip.ticks("axon_out")
                    sending += chip.ticks("axon_out")
                gap.append(work)
                out.append(sending)
                target.append(packet.core)
                lookup.append(chip.ticks("axon_in"))
                each = chip.ticks(EVENT_OF[packet.projection.operator.kind])
                service.append(chip.ticks("axon_in") + packet.synops * each)
                work, sending = 0, 0
        first.append(len(gap))
        tail.append(work)
        out_tail.append(sending)
    lists = (first, gap, out, target, lookup, service, tail, out_tail)
    return StepLoad(*(np.array(values, dtype=np.int64) for values in lists))


def walk_back(load: StepLoad, events: StepEvents) -> tuple[int, Counter[str]]:
    """The unit that the step waited for (-1: none worked), and what its time went to."""
    cores = len(events.synapses_ended)
    ends = []
    for core in range(cores):
        ends += [(int(events.synapses_ended[core]), core, "synapses"), (int(events.ended[core]), core, "neurons")]
    end, critical, unit = max(ends, key=lambda entry: entry[0])  # the first of several
    causes: Counter[str] = Counter()
    if end <= 0:
        return -1, causes
    if unit == "neurons":
        account_for_sender(load, events, critical, None, causes)
        return critical, causes
    served = [packet for packet in range(len(load.target)) if load.target[packet] == critical]
    served.sort(key=lambda packet: events.arrived[packet])
    packet = served.pop()
    while True:
        causes["messages in"] += int(load.lookup[packet])
        causes["synapses"] += int(load.service[packet] - load.lookup[packet])
        if not served or events.taken[served[-1]] + load.service[served[-1]] < events.taken[packet]:
            break
        packet = served.pop()
    causes["network"] += int(events.taken[packet] - events.put[packet])
    sender = next(unit for unit in range(cores + 1) if load.first[unit] <= packet < load.first[unit + 1])
    if sender == cores:
        causes["input"] += int(events.put[packet])
    else:
        account_for_sender(load, events, sender, packet, causes)
    return critical, causes


def account_for_sender(load: StepLoad, events: StepEvents, unit: int, until: int | None, causes: Counter[str]) -> None:
    """A neuron unit's time until it put a packet, or until its last visit ended."""
    before = 0
    for packet in range(load.first[unit], load.first[unit + 1] if until is None else until + 1):
        ready = before + load.gap[packet]
        causes["spikes out"] += int(load.out[packet])
        causes["neurons"] += int(load.gap[packet] - load.out[packet])
        causes["network"] += int(events.put[packet] - ready)
        before = events.put[packet]
    if until is None:
        causes["spikes out"] += int(load.out_tail[unit])
        causes["neurons"] += int(load.tail[unit] - load.out_tail[unit])


def by_clock(
    graph: ProcessGraph, mapping: Mapping, chip: Chip, trace: Trace, waits: Counter[str] | None = None
) -> list[Step]:
    fabric = fabric_of(mapping, chip)
    steps = []
    for units in chip_steps(graph, mapping, trace):
        load = load_of(units, chip)
        record = record_step(fabric, load)
        events = record.events(fabric, load)
        steps.append(Step(load, events, *walk_back(load, events)))
        if waits is not None:
            waits += record.waits
    return steps


def check_against_clock(
    graph: ProcessGraph, mapping: Mapping, chip: Chip, trace: Trace, waits: Counter[str] | None = None
) -> Timing:
    """Compare every figure of the cycle model with the network stepped by a clock."""
    timing = timed(graph, mapping, chip, trace, "cycle")
    steps = by_clock(graph, mapping, chip, trace, waits)
    barrier = chip.barrier_ticks(mapping.tiles)
    cores = range(len(mapping.cores))
    link_packets = np.zeros_like(timing.link_packets)
    assert len(timing.step_ticks) == len(steps)
    for g, step in enumerate(steps):
        load, events = step.load, step.events
        assert timing.step_ticks[g] == events.end + barrier, g
        assert timing.neuron_end[g].tolist() == events.ended[:-1].tolist(), g
        assert timing.synapses_end[g].tolist() == events.synapses_ended.tolist(), g
        assert timing.critical_core[g] == step.critical, g
        found = {cause: int(ticks[g]) for cause, ticks in timing.causes.items()}
        assert found == {cause: step.causes[cause] for cause in CAUSES} | {"barrier": barrier}, g
        of_core = [np.flatnonzero(load.target == core) for core in cores]
        sent = [slice(*load.first[core : core + 2]) for core in cores]
        assert timing.synapses_began[g].tolist() == [events.taken[p].min() if len(p) else 0 for p in of_core], g
        assert timing.synapse_ticks[g].tolist() == [load.service[p].sum() for p in of_core], g
        assert timing.neuron_ticks[g].tolist() == [load.gap[sent[c]].sum() + load.tail[c] for c in cores], g
        worked = timing.neuron_ticks[g] + timing.stalled[g]
        assert worked.tolist() == events.ended[:-1].tolist(), g
        np.add.at(link_packets, (events.grants[:, 1], events.grants[:, 2]), 1)
    np.testing.assert_array_equal(timing.link_packets, link_packets)
    assert timing.barrier_ticks == barrier
    return timing


def random_chip(seed: int) -> Chip:
    """A small mesh of narrow buffers on which every event takes a few ticks or none."""
    rng = np.random.default_rng(seed)
    columns, rows, cores_per_tile = (int(n) for n in rng.integers(1, (4, 3, 4)))
    ticks = {event: int(rng.integers(0, 4)) for event in Events.model_fields}
    ticks |= {event: int(rng.integers(0, 2)) for event in Events.model_fields if event.startswith("synop")}
    buffers = {name: int(rng.integers(1, 4)) for name in ("link_packets", "send_packets", "queue_packets")}
    chip = with_ticks(small_chip(columns, rows, cores_per_tile), ticks, link=int(rng.integers(0, 4)), **buffers)
    x, y = int(rng.integers(columns)), int(rng.integers(rows))
    return chip.model_copy(update={"input": chip.input.model_copy(update={"column": x, "row": y})})


@settings(max_examples=60, phases=set(Phase) - {Phase.shrink})  # one example takes long enough
@given(graphs(steps=2, inputs=1), SEEDS, st.integers(1, 2), st.sampled_from([0.0, 0.05, 0.2]), SEEDS)
def test_the_cycle_model_is_a_clock_that_steps_the_whole_network(
    graph: ProcessGraph, seed: int, samples: int, rate: float, chip_seed: int
) -> None:
    chip = random_chip(chip_seed)
    mapping = random_mapping(graph, chip, seed)
    check_against_clock(graph, mapping, chip, random_trace(graph, samples, seed, rate))


def test_the_networks_that_the_clock_steps_wait_for_everything_there_is() -> None:
    waits: Counter[str] = Counter()
    causes: Counter[str] = Counter()
    for seed in range(6):
        graph, chip = random_graph(seed, inputs=1, steps=2, populations=2), random_chip(seed)
        mapping = random_mapping(graph, chip, seed)
        timing = check_against_clock(graph, mapping, chip, random_trace(graph, 2, seed, 0.2), waits)
        causes += Counter({cause: int(ticks.sum()) for cause, ticks in timing.causes.items()})
    assert set(waits) == {STALL, FULL_LINK, FULL_QUEUE, CONTENTION}
    assert set(causes) == set(CAUSES)


# ---- the simple model and what both share ---------------------------------------------------------------------------

NEURON_EVENTS = ("neuron_inactive", "neuron_active", "neuron_access", "neuron_update", "spike", "axon_out")
SYNAPSE_EVENTS = ("axon_in", "synop_dense", "synop_sparse", "synop_conv")


@settings(max_examples=30)
@given(graphs(), SEEDS, SEEDS, st.floats(0, 1))
def test_a_simple_step_is_the_slowest_sum_of_a_unit(
    graph: ProcessGraph, seed: int, chip_seed: int, rate: float
) -> None:
    chip = random_chip(chip_seed)
    mapping, trace = random_mapping(graph, chip, seed), random_trace(graph, 2, seed, rate)
    timing = timed(graph, mapping, chip, trace, "simple")
    for g, units in enumerate(chip_steps(graph, mapping, trace)):
        load = load_of(units, chip)
        cores = range(len(mapping.cores))
        neurons = [load.gap[load.first[c] : load.first[c + 1]].sum() + load.tail[c] for c in cores]
        sending = [load.out[load.first[c] : load.first[c + 1]].sum() + load.out_tail[c] for c in cores]
        synapses = [load.service[load.target == c].sum() for c in cores]
        lookups = [load.lookup[load.target == c].sum() for c in cores]
        assert timing.neuron_ticks[g].tolist() == timing.neuron_end[g].tolist() == neurons
        assert timing.synapse_ticks[g].tolist() == synapses
        received = [(load.target == c).any() for c in cores]
        assert timing.synapses_end[g].tolist() == [
            n if came else -1 for n, came in zip(synapses, received, strict=True)
        ]
        slowest = max([*neurons, *synapses])
        critical = next((c for c in cores if slowest and slowest in (neurons[c], synapses[c])), -1)
        assert (timing.step_ticks[g] - timing.barrier_ticks, timing.critical_core[g]) == (slowest, critical)
        expected = Counter(barrier=timing.barrier_ticks)
        if critical >= 0 and synapses[critical] == slowest:
            expected += Counter({"messages in": lookups[critical], "synapses": slowest - lookups[critical]})
        elif critical >= 0:
            expected += Counter({"spikes out": sending[critical], "neurons": slowest - sending[critical]})
        assert {cause: int(ticks[g]) for cause, ticks in timing.causes.items()} == {c: expected[c] for c in CAUSES}
    assert not timing.link_packets.any()
    assert not timing.stalled.any()


@pytest.mark.parametrize("name", ["loihi", "loihi-sanafe", "loihi2"])
@pytest.mark.parametrize("model", ["simple", "cycle"])
def test_the_figures_of_a_run_fit_each_other(name: str, model: Model) -> None:
    chip, graph = load_chip(name), random_graph(5, graded=False)
    mapping, trace = map_network(graph, chip), random_trace(graph, 4, 1)
    timing = timed(graph, mapping, chip, trace, model)
    assert (timing.model, timing.chip, timing.tick_ns, timing.samples) == (model, name, chip.tick_ns, 4)
    assert tuple(timing.causes) == CAUSES
    np.testing.assert_array_equal(sum(timing.causes.values()), timing.step_ticks)
    assert timing.barrier_ticks == chip.barrier_ticks(mapping.tiles)
    assert (timing.causes["barrier"] == timing.barrier_ticks).all()
    ends = np.cumsum(timing.step_ticks)
    assert timing.total_ticks == ends[-1] == timing.ticks_per_inference * 4
    assert len(ends) == 4 * graph.steps + max(population.stage for population in graph.populations)
    last = [(sample + 1) * graph.steps - 1 + graph.depth for sample in range(4)]
    begins = [0, *ends[graph.steps - 1 :: graph.steps]][:4]
    assert timing.latency_ticks.tolist() == [ends[at] - begin for at, begin in zip(last, begins, strict=True)]
    assert (timing.busy_share <= 1).all()
    assert (timing.link_share <= 1).all()
    for array in (timing.neuron_end, timing.synapses_end):
        assert (array <= (timing.step_ticks - timing.barrier_ticks)[:, None]).all()
    assert (timing.link_ticks, timing.link_packets.any()) == (3, model == "cycle")


@settings(max_examples=30)
@given(graphs(), SEEDS, SEEDS, st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_the_mesh_makes_no_step_shorter(graph: ProcessGraph, seed: int, chip_seed: int, rate: float) -> None:
    chip = random_chip(chip_seed)
    joined = prepare(graph, random_mapping(graph, chip, seed), random_trace(graph, 2, seed, rate))
    counts = count(joined, 1)
    simple, cycle = (simulate_timing(joined, counts, chip, model, 1) for model in ("simple", "cycle"))  # type: ignore[arg-type]
    assert (cycle.step_ticks >= simple.step_ticks).all()
    assert (cycle.neuron_end >= simple.neuron_end).all()
    assert (cycle.synapses_end >= simple.synapses_end).all()
    np.testing.assert_array_equal(cycle.neuron_ticks, simple.neuron_ticks)
    np.testing.assert_array_equal(cycle.synapse_ticks, simple.synapse_ticks)
    np.testing.assert_array_equal(sum(cycle.causes.values()), cycle.step_ticks)
    assert cycle.barrier_ticks == simple.barrier_ticks


@pytest.mark.parametrize("model", ["simple", "cycle"])
def test_ticks_hang_on_neither_threads_nor_chunks(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    graph, chip = random_graph(3, graded=False), random_chip(3)
    joined = prepare(graph, random_mapping(graph, chip, 3), random_trace(graph, 20, 3, 0.2))
    assert joined.chip_steps > 2 * workload.CHUNK
    counts = count(joined)
    monkeypatch.setattr(workload, "CHUNK", 1 << 20)
    whole = simulate_timing(joined, counts, chip, model, 1)
    for threads, chunk in ((1, 32), (2, 32), (4, 32), (2, 1), (4, 7)):
        monkeypatch.setattr(workload, "CHUNK", chunk)
        done: list[int] = []
        assert_same(simulate_timing(joined, counts, chip, model, threads, done.append), whole)
        expected = [*range(chunk, joined.chip_steps, chunk), joined.chip_steps]
        assert done == (expected if model == "cycle" else []), "sums take no time that is worth telling"


def assert_same(a: Timing, b: Timing) -> None:
    for entry in fields(Timing):
        mine, other = getattr(a, entry.name), getattr(b, entry.name)
        if entry.name == "causes":
            assert list(mine) == list(other)
            for cause in mine:
                np.testing.assert_array_equal(mine[cause], other[cause], err_msg=cause)
        elif isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, other, err_msg=entry.name)
            assert mine.dtype == other.dtype
        else:
            assert mine == other, entry.name


# ---- worked by hand -------------------------------------------------------------------------------------------------


def causes_of(timing: Timing) -> dict[str, list[int]]:
    return {cause: ticks.tolist() for cause, ticks in timing.causes.items() if ticks.any()}


def in_one_tile(graph: ProcessGraph, chip: Chip) -> Mapping:
    """The two cores of `by_hand` on the tile at which inputs enter."""
    tile = (chip.input.column, chip.input.row)
    return placed(map_network(graph, chip), tile, tile)


def test_the_simple_model_worked_by_hand() -> None:
    graph, trace = by_hand()
    chip = load_chip("loihi-sanafe")
    timing = timed(graph, in_one_tile(graph, chip), chip, trace, "simple")
    # ticks of 0.1 ns: message 160, dense synop 38, access 60, update 37, spike 300, message sent 51, barrier 6000
    a0_synapses = 2 * 160 + 4 * 38
    a1_neurons = 2 * (60 + 37) + 300 + 51
    b2_neurons = 1 * (60 + 37) + 300
    a3_neurons = 2 * 60
    assert (a0_synapses, a1_neurons, b2_neurons, a3_neurons) == (472, 545, 397, 120)
    assert timing.step_ticks.tolist() == [6472, 6545, 6397, 6120]
    assert timing.critical_core.tolist() == [0, 0, 1, 0]
    assert timing.neuron_ticks.tolist() == [[120, 60], [545, 60], [194, 397], [120, 60]]
    assert timing.synapse_ticks.tolist() == [[472, 0], [236, 198], [0, 0], [0, 0]]
    assert causes_of(timing) == {
        "messages in": [320, 0, 0, 0],
        "synapses": [152, 0, 0, 0],
        "neurons": [0, 194, 97, 120],
        "spikes out": [0, 351, 300, 0],
        "barrier": [6000] * 4,
    }
    assert timing.ticks_per_inference == timing.total_ticks == 25534
    assert timing.latency_ticks.tolist() == [25534]
    assert timing.busy_share.tolist() == pytest.approx([(120 + 545 + 194 + 120) / 25534, (60 + 60 + 397 + 60) / 25534])


def test_the_cycle_model_worked_by_hand() -> None:
    graph, trace = by_hand()
    chip = load_chip("loihi-sanafe")
    timing = timed(graph, in_one_tile(graph, chip), chip, trace, "cycle")
    # The way to a core, which costs nothing here, takes one tick. The host's two packets leave at 0 and 3 (an output is
    # taken for 3 ticks); the first is taken at 1, and both keep the synapse unit busy until 1 + 2 * 236. a's first
    # neuron is done at 97 + 300 + 51, when its packet is put; b takes it at 449.
    assert timing.step_ticks.tolist() == [6473, 6000 + 449 + 198, 6397, 6120]
    assert timing.critical_core.tolist() == [0, 1, 1, 0]
    assert timing.neuron_end.tolist() == [[120, 60], [545, 60], [194, 397], [120, 60]]
    assert timing.synapses_began.tolist() == [[1, 0], [1, 449], [0, 0], [0, 0]]
    assert timing.synapses_end.tolist() == [[473, -1], [237, 647], [-1, -1], [-1, -1]]
    assert causes_of(timing) == {
        "messages in": [320, 160, 0, 0],
        "synapses": [152, 38, 0, 0],
        "neurons": [0, 97, 97, 120],
        "spikes out": [0, 351, 300, 0],
        "network": [1, 1, 0, 0],
        "barrier": [6000] * 4,
    }
    assert timing.link_packets.sum() == timing.link_packets[0, 4:6].sum() == 4


def test_what_the_host_waits_for_is_input() -> None:
    graph, trace = by_hand()
    slow = with_ticks(
        small_chip(1, 1), {"within_tile": 5, "axon_in": 1}, link=4, send_packets=1, link_packets=1, queue_packets=1
    )
    timing = timed(graph, map_network(graph, slow), slow, trace, "cycle")
    # The first packet is taken at 5, and its place in the queue is room from 6 on. The second finds room in the send
    # buffer at 1, leaves it at 6 and is taken at 11, long after the first ended at 6.
    assert timing.step_ticks[0] - timing.barrier_ticks == 12
    assert {cause: ticks[0] for cause, ticks in causes_of(timing).items()} == {
        "input": 1,
        "network": 10,
        "messages in": 1,
        "barrier": 7,
    }


def test_davies_constants_price_synapses_neurons_and_the_barrier() -> None:
    graph, trace = by_hand()
    chip = load_chip("loihi")
    timing = timed(graph, in_one_tile(graph, chip), chip, trace, "simple")
    # synop 35, neuron 53 inactive or 84 active
    assert timing.step_ticks.tolist() == [1130 + 4 * 35, 1130 + 2 * 84, 1130 + 2 * 84, 1130 + 2 * 53]


def test_latency_ends_with_the_readout_and_throughput_with_the_deepest_population() -> None:
    graph, trace = by_hand()
    first = replace(graph, readout=Readout("a"))
    spikes = {name: np.tile(np.unpackbits(bits, axis=-1, count=first.node(name).size), (3, 1, 1))
              for name, bits in trace.packed.items()}  # fmt: skip
    active = {"a": np.ones((3, 2, 2)), "b": np.zeros((3, 2, 1))}
    chip = load_chip("loihi")
    timing = timed(first, map_network(first, chip), chip, trace_of(first, spikes, active), "simple")
    ticks = timing.step_ticks.tolist()
    assert len(ticks) == 3 * 2 + 2
    # a works one chip step behind the input: on the second step of the samples in chip steps 2, 4 and 6
    assert timing.latency_ticks.tolist() == [sum(ticks[0:3]), sum(ticks[2:5]), sum(ticks[4:7])]
    assert timing.ticks_per_inference == sum(ticks) / 3


def test_the_barrier_is_that_of_the_mapped_tiles() -> None:
    graph, trace = by_hand()
    few = {"neurons": 1}
    for name, tiles, ticks in (("loihi", 1, 1130), ("loihi", 3, 1357), ("loihi-sanafe", 3, 10000)):
        base = load_chip(name)
        limits = base.limits.model_copy(update=few if tiles == 3 else {})
        chip = base.model_copy(update={"cores_per_tile": 1 if tiles == 3 else 4, "limits": limits})
        mapping = placed(map_network(graph, chip), *([(0, 0)] * 2 if tiles == 1 else [(0, 0), (1, 0), (2, 1)]))
        assert mapping.tiles == tiles
        for model in ("simple", "cycle"):
            timing = timed(graph, mapping, chip, trace, model)  # type: ignore[arg-type]
            assert timing.barrier_ticks == ticks
            assert timing.causes["barrier"].tolist() == [ticks] * 4


@pytest.mark.parametrize("model", ["simple", "cycle"])
def test_a_second_chip_file_gives_the_times_of_the_same_mapping(model: Model) -> None:
    graph, trace = by_hand()
    first, second = load_chip("loihi"), load_chip("loihi-sanafe")
    mapping, its_own = in_one_tile(graph, first), in_one_tile(graph, second)
    beside = timed(graph, mapping, second, trace, model)
    assert_same(beside, timed(graph, its_own, second, trace, model))
    assert beside.chip == "loihi-sanafe"
    assert beside.total_ticks != timed(graph, mapping, first, trace, model).total_ticks


def test_links_are_counted_where_packets_leave() -> None:
    graph, trace = by_hand()
    chip = small_chip(2, 2, 1, neurons=1)
    mapping = placed(map_network(graph, chip), (0, 0), (1, 0), (1, 1))
    timing = timed(graph, mapping, chip, trace, "cycle")
    # inputs enter at (1, 1): three spikes to (0, 0), west then north, and three to (1, 0), north; a's first neuron at
    # (0, 0) sends one to b at (1, 1), east then south
    links = timing.link_packets[:, :4]
    assert {(tile, way): n for (tile, way), n in np.ndenumerate(links) if n} == {
        (3, WEST): 3,
        (2, NORTH): 3,
        (3, NORTH): 3,
        (0, EAST): 1,
        (1, SOUTH): 1,
    }
    assert timing.link_packets[:, 4].tolist() == [3, 3, 0, 1]
    np.testing.assert_allclose(timing.link_share, timing.link_packets * 3 / timing.total_ticks)


def test_an_unknown_model_is_refused() -> None:
    graph, trace = by_hand()
    chip = load_chip("loihi")
    with pytest.raises(SpikeportError, match=r"unknown timing model 'exact'\. Known: simple, cycle"):
        timed(graph, map_network(graph, chip), chip, trace, "exact")  # type: ignore[arg-type]


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["simple", "cycle"])
def test_a_stored_timing_is_read_back_as_it_was(tmp_path: Path, model: Model) -> None:
    graph, trace = by_hand()
    chip = load_chip("loihi")
    timing = timed(graph, map_network(graph, chip), chip, trace, model)
    timing.save(tmp_path / "timing.npz", graph)
    assert_same(Timing.load(tmp_path / "timing.npz", graph), timing)


def test_other_and_damaged_files_are_refused(tmp_path: Path) -> None:
    graph, trace = by_hand()
    chip, path = load_chip("loihi"), tmp_path / "timing.npz"

    def refused(match: str, of: ProcessGraph = graph) -> None:
        with pytest.raises(SpikeportError, match=match) as caught:
            Timing.load(path, of)
        assert "timing.npz" in str(caught.value)
        assert "spikeport simulate" in str(caught.value)

    refused("is missing")
    timed(graph, map_network(graph, chip), chip, trace, "cycle").save(path, graph)
    good = path.read_bytes()
    refused("another network", replace(graph, steps=3))
    with np.load(path) as stored:
        arrays = dict(stored)
    header = json.loads(arrays.pop("__header__").tobytes())

    def write(header: object, arrays: dict[str, np.ndarray]) -> None:
        np.savez(path, __header__=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)

    for missing in ("step_ticks", "link_packets", "cause.network"):
        write(header, {key: array for key, array in arrays.items() if key != missing})
        refused(f"damaged .*{missing}")
    for missing in ("samples", "causes", "chip"):
        write({key: value for key, value in header.items() if key != missing}, arrays)
        refused(f"damaged .*{missing}")
    write(header | {"version": 2}, arrays)
    refused("not a timing of version 1")
    write(header | {"format": "spikeport-trace"}, arrays)
    refused("not a timing")
    write([], arrays)
    refused("not a timing")
    path.write_bytes(good[: len(good) // 2])
    refused("is damaged")
    path.write_bytes(b"")
    refused("is damaged")
    trace.save(path)
    refused("not a timing")
