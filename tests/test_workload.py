"""What cores do, chip step by chip step: `workload` against plain loops over neurons, and cases worked by hand."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from graph_strategies import graphs, one_thread, random_graph, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_chip import (
    EVENT_OF,
    NEURON,
    SEEDS,
    by_hand,
    chip_steps,
    placed,
    random_mapping,
    random_trace,
    small_chip,
    tile_of,
    trace_of,
)

from spikeport.converters.graph import Input, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Conv2d, Dense, OneToOne, Sparse, SumPool
from spikeport.deploy import event_simulator, workload
from spikeport.deploy.mapping import Mapping, map_network
from spikeport.deploy.timing import derived_synops
from spikeport.deploy.trace import Trace
from spikeport.deploy.workload import Counts, count, prepare
from spikeport.models.errors import SpikeportError

__all__ = ["one_thread"]

CORE_EVENTS = ("axon_in", "axon_out", "spike", "neuron_active", "synop_dense", "synop_sparse", "synop_conv")


def every_kind() -> ProcessGraph:
    """Every operator kind, pooling with a rest, a constant input with and without delay, delays and two loops."""
    rng = np.random.default_rng(3)

    def weights(*shape: int) -> np.ndarray:
        return 2 * rng.integers(-60, 60, shape)

    source, target = np.nonzero(rng.random((6, 4)) < 0.6)
    return ProcessGraph(
        "every kind",
        3,
        1.0,
        (Input("in", (2, 5, 5)), Input("bias", (1,), constant=True)),
        (
            Population("conv", (3, 5, 5), NEURON, 1),
            Population("dense", (6,), NEURON, 2),
            Population("out", (4,), NEURON, 3),
        ),
        (
            Projection("in-conv", "in", "conv", Conv2d((2, 5, 5), weights(3, 2, 3, 3), padding=(1, 1))),
            Projection("conv-dense", "conv", "dense", Dense((3, 5, 5), weights(6, 12), SumPool((2, 2), (2, 2)))),
            Projection("bias-dense", "bias", "dense", Dense((1,), weights(6, 1))),
            Projection("bias-out", "bias", "out", Dense((1,), weights(4, 1)), delay=2),
            Projection("dense-out", "dense", "out", Sparse((6,), weights(len(source)), None, source, target, (4,))),
            Projection("in-out", "in", "out", Dense((2, 5, 5), weights(4, 32), SumPool((2, 2), (1, 1))), delay=2),
            Projection("out-out", "out", "out", OneToOne((4,), weights(4)), recurrent=True),
            Projection("out-dense", "out", "dense", Dense((4,), weights(6, 4)), recurrent=True),
        ),
        Readout("out"),
    )


def check_against_loops(graph: ProcessGraph, mapping: Mapping, trace: Trace) -> Counts:
    """Compare every figure of the counts with the loops of `plain_chip`."""
    counts = count(prepare(graph, mapping, trace), threads=1)
    steps = chip_steps(graph, mapping, trace)
    cores = len(mapping.cores)
    expected = {event: np.zeros((len(steps), cores), np.int64) for event in CORE_EVENTS}
    totals = {projection.name: Counter[str]() for projection in graph.projections}
    for g, units in enumerate(steps):
        for unit, visits in enumerate(units):
            for visit in visits:
                if unit < cores:
                    expected["neuron_active"][g, unit] += visit.active
                    expected["spike"][g, unit] += visit.fires
                    expected["axon_out"][g, unit] += len(visit.packets)
                for packet in visit.packets:
                    expected["axon_in"][g, packet.core] += 1
                    expected[EVENT_OF[packet.projection.operator.kind]][g, packet.core] += packet.synops
                    (x, y), (to_x, to_y) = tile_of(mapping, unit), tile_of(mapping, packet.core)
                    totals[packet.projection.name] += Counter(
                        packets=1,
                        synops=packet.synops,
                        sent_by_cores=int(unit < cores),
                        within_tile=int((x, y) == (to_x, to_y)),
                        hops_ew=abs(x - to_x),
                        hops_ns=abs(y - to_y),
                    )
    assert (counts.samples, counts.chip_steps) == (trace.samples, len(steps))
    assert counts.neurons.tolist() == [len(core.neurons) for core in mapping.cores]
    for event, array in expected.items():
        np.testing.assert_array_equal(counts.of(event), array, err_msg=event)
        np.testing.assert_array_equal(counts.by_core(event), array.sum(axis=0), err_msg=event)
    np.testing.assert_array_equal(counts.of("neuron_inactive"), counts.neurons - expected["neuron_active"])
    assert counts.by_core("neuron_access").tolist() == (counts.neurons * len(steps)).tolist()
    for name, total in totals.items():
        assert counts.by_projection[name] == {key: total[key] for key in counts.by_projection[name]}, name
        assert set(total) <= set(counts.by_projection[name])
    return counts


@settings(max_examples=40)
@given(graphs(), SEEDS, st.integers(1, 3), st.floats(0, 1), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
def test_every_count_equals_plain_loops_on_any_mapping(
    graph: ProcessGraph, seed: int, samples: int, rate: float, columns: int, rows: int, cores_per_tile: int
) -> None:
    chip = small_chip(columns, rows, cores_per_tile)
    mapping = random_mapping(graph, chip, seed)
    check_against_loops(graph, mapping, random_trace(graph, samples, seed, rate))


@settings(max_examples=15)
@given(graphs(), SEEDS, st.integers(2, 9))
def test_every_count_equals_plain_loops_on_chips_with_few_neurons_a_core(
    graph: ProcessGraph, seed: int, neurons: int
) -> None:
    mapping = map_network(graph, small_chip(neurons=neurons))
    check_against_loops(graph, mapping, random_trace(graph, 2, seed))


@pytest.mark.parametrize("neurons", [1000, 10, 2])
def test_every_kind_of_projection_is_counted_over_one_chip_and_over_many(neurons: int) -> None:
    graph = every_kind()
    mapping = map_network(graph, small_chip(neurons=neurons))
    assert (mapping.chips > 1) == (neurons < 1000)
    counts = check_against_loops(graph, mapping, random_trace(graph, 3, neurons))
    assert all(row["packets"] for row in counts.by_projection.values())
    assert {name for name, row in counts.by_projection.items() if row["sent_by_cores"] == 0} == {
        "in-conv",
        "bias-dense",
        "bias-out",
        "in-out",
    }


@pytest.mark.parametrize("kernel", [(3, 3), (2, 3), (3, 1)])
def test_pooling_windows_that_would_overlap_in_a_taller_image_are_counted(kernel: tuple[int, int]) -> None:
    # a window taller than its stride, but only one row of windows: each neuron lies in one cell, and not in its own
    pool = SumPool(kernel, (1, kernel[1]))
    shape = (2, kernel[0], 6)
    columns = 2 * (6 // kernel[1])
    graph = ProcessGraph(
        "one row of windows",
        1,
        1.0,
        (Input("in", shape),),
        (Population("a", (3,), NEURON, 1),),
        (Projection("in-a", "in", "a", Dense(shape, np.ones((3, columns), np.int64), pool)),),
        Readout("a"),
    )
    trace = trace_of(
        graph, {"in": np.ones((1, 1, 12 * kernel[0])), "a": np.zeros((1, 1, 3))}, {"a": np.ones((1, 1, 3))}
    )
    counts = check_against_loops(graph, map_network(graph, small_chip()), trace)
    assert counts.by_projection["in-a"]["synops"] == 3 * 12 * kernel[0] == derived_synops(graph, trace)["in-a"].sum()


@settings(max_examples=20)
@given(graphs(), SEEDS)
def test_synops_are_those_of_the_event_simulator_and_of_the_fan_out(graph: ProcessGraph, seed: int) -> None:
    trace = event_simulator.run(graph, random_inputs(graph, seed), threads=1)
    mapping = random_mapping(graph, small_chip(), seed)
    counts, derived = count(prepare(graph, mapping, trace), threads=1), derived_synops(graph, trace)
    assert counts.by_projection.keys() == derived.keys() == trace.synops.keys()
    for name, by_step in derived.items():
        np.testing.assert_array_equal(by_step, trace.synops[name], err_msg=name)
        assert counts.by_projection[name]["synops"] == by_step.sum(), name
    for population in graph.populations:
        cores = mapping.cores_of(population.name)
        for event, by_sample in (
            ("spike", trace.spike_counts(population.name)),
            ("neuron_active", trace.active_counts(population.name)),
        ):
            by_step = by_sample.ravel()  # at chip steps stage, stage + 1, ...
            here = counts.of(event)[:, cores].sum(axis=1)
            np.testing.assert_array_equal(here[population.stage :][: len(by_step)], by_step)
            assert here.sum() == by_step.sum()


def test_a_recurrent_spike_acts_one_step_later_and_not_beyond_its_sample() -> None:
    graph = every_kind()
    trace = random_trace(graph, 2, 0, rate=0)
    spikes = np.zeros((2, 3, 4), dtype=bool)
    spikes[0, 0, 1] = spikes[0, 2, :] = spikes[1, 1, 2] = True
    trace.packed["out"] = np.packbits(spikes, axis=-1)
    np.testing.assert_array_equal(derived_synops(graph, trace)["out-out"], [[0, 1, 0], [0, 0, 1]])
    counts = count(prepare(graph, map_network(graph, small_chip()), trace))
    out = counts.synops["synop_sparse"][:, -1]
    assert np.flatnonzero(out).tolist() == [3, 7], "stage 3: sample step 0 is worked on at chip step 3"
    assert counts.by_projection["out-out"]["packets"] == 2
    assert counts.by_projection["out-dense"]["packets"] == 2
    assert counts.spikes[:, -1].sum() == 6, "they fire all the same"


def test_a_constant_source_sends_so_that_its_delay_ends_with_the_first_sample_step() -> None:
    weight = np.array([[2]])
    graph = ProcessGraph(
        "constant",
        2,
        1.0,
        (Input("in", (1,)), Input("bias", (1,), constant=True)),
        (Population("a", (1,), NEURON, 1), Population("b", (1,), NEURON, 2)),
        (
            Projection("in-a", "in", "a", Dense((1,), weight)),
            Projection("a-b", "a", "b", Dense((1,), weight)),
            Projection("bias-a", "bias", "a", Sparse((1,), weight[0], None, np.array([0]), np.array([0]), (1,))),
            Projection("bias-b", "bias", "b", Sparse((1,), weight[0], None, np.array([0]), np.array([0]), (1,))),
            Projection("late-b", "bias", "b", Conv2d((1, 1, 1), weight[None, None]), delay=1),
        ),
        Readout("b"),
    )
    counts = count(prepare(graph, map_network(graph, small_chip()), random_trace(graph, 2, 0, rate=0)))
    # four sample steps; a works on the first at chip step 1, b at chip step 2
    assert counts.synops["synop_sparse"].T.tolist() == [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]]
    assert counts.synops["synop_conv"].T.tolist() == [[0] * 6, [1, 1, 1, 1, 0, 0]]


def test_a_network_worked_by_hand() -> None:
    graph, trace = by_hand()
    counts = count(prepare(graph, map_network(graph, small_chip(1, 1)), trace))
    assert counts.messages_in.tolist() == [[2, 0], [1, 1], [0, 0], [0, 0]]
    assert counts.packets_out.tolist() == [[0, 0], [1, 0], [0, 0], [0, 0]]
    assert counts.spikes.tolist() == [[0, 0], [1, 0], [0, 1], [0, 0]]
    assert counts.active.tolist() == [[0, 0], [2, 0], [2, 1], [0, 0]]
    assert counts.synops["synop_dense"].tolist() == [[4, 0], [2, 1], [0, 0], [0, 0]]
    assert counts.of("neuron_inactive").tolist() == [[2, 1], [0, 1], [0, 0], [2, 1]]
    assert counts.by_core("neuron_access").tolist() == [8, 4]
    assert counts.by_projection["a-b"] == {
        "packets": 1,
        "sent_by_cores": 1,
        "synops": 1,
        "within_tile": 1,
        "hops_ew": 0,
        "hops_ns": 0,
    }
    with pytest.raises(SpikeportError, match="'hop_ew'"):
        counts.of("hop_ew")


def test_hops_are_counted_across_chips_side_by_side() -> None:
    graph, trace = by_hand()
    mapping = placed(map_network(graph, small_chip(2, 2, 1, neurons=1)), (0, 0), (1, 1), (5, 0))
    assert [core.chip for core in mapping.cores] == [0, 0, 2]
    counts = count(prepare(graph, mapping, trace))
    # inputs enter at (1, 1): three spikes to a's two neurons at (0, 0) and (1, 1); a's first one to b at (5, 0)
    inputs, to_b = counts.by_projection["in-a"], counts.by_projection["a-b"]
    assert (inputs["packets"], inputs["within_tile"], inputs["hops_ew"], inputs["hops_ns"]) == (6, 3, 3, 3)
    assert (to_b["packets"], to_b["within_tile"], to_b["hops_ew"], to_b["hops_ns"]) == (1, 0, 5, 0)


@pytest.mark.parametrize(("threads", "chunk"), [(1, 1), (2, 7), (4, 32), (3, 1000)])
def test_counts_hang_on_neither_threads_nor_chunks(monkeypatch: pytest.MonkeyPatch, threads: int, chunk: int) -> None:
    graph = every_kind()
    mapping = map_network(graph, small_chip(neurons=10))
    joined = prepare(graph, mapping, random_trace(graph, 23, 5))
    once = count(joined, threads=1)
    monkeypatch.setattr(workload, "CHUNK", chunk)
    done: list[int] = []
    again = count(joined, threads, done.append)
    assert joined.chip_steps == 23 * 3 + 3 > 2 * 32
    assert done == [*range(chunk, joined.chip_steps, chunk), joined.chip_steps]
    assert again.by_projection == once.by_projection
    for event in CORE_EVENTS:
        np.testing.assert_array_equal(again.of(event), once.of(event))


def test_traces_and_mappings_that_do_not_belong_are_refused() -> None:
    graph = every_kind()
    mapping, trace = map_network(graph, small_chip()), random_trace(graph, 2, 0)
    other = random_graph(1)

    def refused(match: str, mapping: Mapping = mapping, **changes: object) -> None:
        with pytest.raises(SpikeportError, match=match):
            prepare(graph, mapping, replace(trace, **changes))  # type: ignore[arg-type]

    fine, active = trace.packed, trace.active
    refused("the trace is of graph .*, not of 'every kind'.*simulate", graph=other.fingerprint())
    refused("the mapping is of graph .*, not of 'every kind'.*map", map_network(other, small_chip()))
    refused("lacks the spikes of in\\.", packed={name: bits for name, bits in fine.items() if name != "in"})
    refused("lacks the spikes of in, dense\\.", packed={name: fine[name] for name in ("conv", "out")})
    refused("lacks the active neurons", active={})
    refused("lacks the active neurons", active={name: active[name] for name in ("conv", "out")})
    refused("spikes outside 'dense' of 6 neurons", packed=fine | {"dense": fine["dense"] | 1})
    refused("spikes outside 'dense'", packed=fine | {"dense": fine["conv"]})
    refused("spikes outside 'in'", packed=fine | {"in": fine["in"][..., :-1]})
    refused("spikes outside 'in'", packed=fine | {"in": fine["in"][:1]})
    refused("active neurons outside 'dense'", active=active | {"dense": active["dense"] | 2})
    refused("active neurons outside 'out'", active=active | {"out": active["out"][:, :2]})
    refused("has 4 steps a sample, the graph 3", steps=4)
    assert prepare(graph, mapping, trace).rows == 6


def test_a_mapping_that_leaves_a_neuron_out_or_holds_it_twice_is_refused() -> None:
    graph, trace = by_hand()
    mapping = map_network(graph, small_chip())
    for neurons in ([0], [0, 0], [0, 1, 1], [0, 2]):
        cores = (replace(mapping.cores[0], neurons=np.array(neurons)), mapping.cores[1])
        with pytest.raises(SpikeportError, match="each neuron of 'a' exactly once"):
            prepare(graph, replace(mapping, cores=cores), trace)


def test_silence_is_counted_as_nothing_but_visits() -> None:
    graph = every_kind()
    graph = replace(graph, projections=tuple(p for p in graph.projections if p.source != "bias"))
    nothing = {node.name: np.zeros((1, 3, node.size), bool) for node in graph.event_nodes}
    trace = trace_of(graph, nothing, {node.name: nothing[node.name] for node in graph.populations})
    counts = count(prepare(graph, map_network(graph, small_chip()), trace))
    assert not any(counts.of(event).any() for event in CORE_EVENTS)
    assert counts.by_core("neuron_inactive").tolist() == (counts.neurons * 6).tolist()
