"""Counts per core against dense matrices, and ticks against a network worked through by hand."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Conv2d, Dense, OneToOne, Operator, Sparse, SumPool
from spikeport.deploy.chip import SYNOP_EVENT, load_chip
from spikeport.deploy.mapping import Mapping, map_network
from spikeport.deploy.timing import core_counts, derived_synops, simulate_timing, split
from spikeport.deploy.trace import Trace, pack
from spikeport.models.errors import SpikeportError

ZERO = np.int64(0)
NEURON = LoihiNeuron(ZERO, ZERO, np.int64(100), ZERO, ZERO)
RNG = np.random.default_rng(3)


def weights(*shape: int) -> np.ndarray:
    """Even mixed-sign weights."""
    return 2 * RNG.integers(-60, 60, shape)


def every_kind() -> ProcessGraph:
    """Every operator kind, pooling, a constant input, a delay and a recurrent projection."""
    source, target = np.nonzero(RNG.random((6, 4)) < 0.6)
    return ProcessGraph(
        "every kind",
        3,
        1.0,
        (Input("in", (2, 6, 6)), Input("bias", (1,), constant=True)),
        (
            Population("conv", (3, 6, 6), NEURON, 1),
            Population("dense", (6,), NEURON, 2),
            Population("out", (4,), NEURON, 3),
        ),
        (
            Projection("in-conv", "in", "conv", Conv2d((2, 6, 6), weights(3, 2, 3, 3), padding=(1, 1))),
            Projection("conv-dense", "conv", "dense", Dense((3, 6, 6), weights(6, 27), SumPool((2, 2), (2, 2)))),
            Projection("bias-dense", "bias", "dense", Dense((1,), weights(6, 1))),
            Projection("dense-out", "dense", "out", Sparse((6,), weights(len(source)), None, source, target, (4,))),
            Projection("in-out", "in", "out", Dense((2, 6, 6), weights(4, 50), SumPool((2, 2), (1, 1))), delay=2),
            Projection("out-out", "out", "out", OneToOne((4,), weights(4)), recurrent=True),
        ),
        Readout("out"),
    )


GRAPH = every_kind()


@functools.cache
def mapped(neurons: int) -> Mapping:
    """GRAPH on Loihi with few neurons a core."""
    base = load_chip("loihi")
    chip = base.model_copy(update={"limits": base.limits.model_copy(update={"neurons": neurons})})
    return map_network(GRAPH, chip)


def random_trace(graph: ProcessGraph, samples: int, seed: int, rate: float = 0.3) -> Trace:
    """Random spikes of every event input and population, and random activity that they allow."""
    rng = np.random.default_rng(seed)
    nodes = [*graph.event_inputs, *graph.populations]
    spikes = {node.name: rng.random((samples, graph.steps, node.size)) < rate for node in nodes}
    active = {
        population.name: rng.integers(0, population.size + 1, (samples, graph.steps))
        for population in graph.populations
    }
    sizes = {node.name: node.size for node in nodes}
    packed = {name: pack(array) for name, array in spikes.items()}
    return Trace("random", graph.fingerprint(), samples, graph.steps, sizes, packed, active=active)


def matrix(operator: Operator) -> np.ndarray:
    """Synapses from each source neuron (rows) to each target neuron, path by path."""
    ones = operator.with_weight(np.ones(operator.weight.shape))
    columns = [ones.transpose_apply(_one(target, operator)).numpy().ravel() for target in range(operator.n_out)]
    return np.stack(columns, axis=1).round().astype(np.int64)


def _one(target: int, operator: Operator) -> torch.Tensor:
    unit = torch.zeros(operator.n_out, dtype=torch.float64)
    unit[target] = 1
    return unit.reshape(1, *operator.out_shape)


MATRICES = {projection.name: matrix(projection.operator) for projection in GRAPH.projections}


def arriving(projection: Projection, trace: Trace, size: int) -> np.ndarray:
    """Spikes that act on the target, by the step in which they act: (samples, steps, n_in)."""
    if projection.source == "bias":
        return np.ones((trace.samples, trace.steps, size), dtype=np.int64)
    spikes = np.unpackbits(trace.packed[projection.source], axis=-1, count=size).astype(np.int64)
    if projection.recurrent:
        spikes = np.concatenate([np.zeros_like(spikes[:, :1]), spikes[:, :-1]], axis=1)
    return spikes


@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 2**31))
def test_counts_per_core_equal_the_dense_matrices(neurons: int, samples: int, seed: int) -> None:
    mapping = mapped(neurons)
    trace = random_trace(GRAPH, samples, seed)
    counts = core_counts(GRAPH, mapping, trace)
    shape = (samples, GRAPH.steps, len(mapping.cores))
    messages = np.zeros(shape, dtype=np.int64)
    synops = {event: np.zeros(shape, dtype=np.int64) for event in SYNOP_EVENT.values()}
    for projection in GRAPH.projections:
        spikes = arriving(projection, trace, GRAPH.node(projection.source).size)
        for index in mapping.cores_of(projection.target):
            into_core = MATRICES[projection.name][:, mapping.cores[index].neurons].sum(axis=1)
            synops[SYNOP_EVENT[projection.operator.kind]][..., index] += spikes @ into_core
            messages[..., index] += spikes @ (into_core > 0)
    np.testing.assert_array_equal(counts.messages_in, messages)
    for event, expected in synops.items():
        np.testing.assert_array_equal(np.broadcast_to(counts.of(event), shape), expected)


@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 2**31))
def test_what_cores_count_is_conserved(neurons: int, samples: int, seed: int) -> None:
    mapping = mapped(neurons)
    trace = random_trace(GRAPH, samples, seed)
    counts, derived = core_counts(GRAPH, mapping, trace), derived_synops(GRAPH, trace)
    assert counts.projections.keys() == derived.keys()
    for name, array in derived.items():
        np.testing.assert_array_equal(counts.projections[name], array)
    np.testing.assert_array_equal(sum(a.sum(axis=2) for a in counts.synops.values()), sum(derived.values()))
    for population in GRAPH.populations:
        cores = mapping.cores_of(population.name)
        np.testing.assert_array_equal(counts.spikes[..., cores].sum(axis=2), trace.spike_counts(population.name))
        np.testing.assert_array_equal(counts.active[..., cores].sum(axis=2), trace.active[population.name])
    assert (counts.of("neuron_inactive") >= 0).all()
    from_cores = sum(
        (arriving(p, trace, GRAPH.node(p.source).size).sum(axis=(0, 1)) @ reached(p, mapping))
        for p in GRAPH.projections
        if p.source not in ("in", "bias")
    )
    assert counts.total("axon_out") == from_cores
    assert counts.total("axon_in") >= counts.total("axon_out")


def reached(projection: Projection, mapping: Mapping) -> np.ndarray:
    """Target cores that each source neuron reaches."""
    into = MATRICES[projection.name]
    cores = [mapping.cores[index].neurons for index in mapping.cores_of(projection.target)]
    return np.sum([into[:, neurons].any(axis=1) for neurons in cores], axis=0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.data())
def test_a_split_adds_up_and_never_exceeds_its_part(sizes: list[int], data: st.DataObject) -> None:
    totals = np.array(data.draw(st.lists(st.integers(0, sum(sizes)), min_size=1, max_size=5)))
    parts = split(totals, np.array(sizes))
    np.testing.assert_array_equal(parts.sum(axis=1), totals)
    assert (parts >= 0).all()
    assert (parts <= np.array(sizes)).all()


def test_a_recurrent_spike_acts_one_step_later_and_not_beyond_its_sample() -> None:
    trace = random_trace(GRAPH, 2, 0)
    spikes = np.zeros((2, 3, 4), dtype=bool)
    spikes[0, 0, 1] = spikes[0, 2, :] = True
    trace.packed["out"] = pack(spikes)
    np.testing.assert_array_equal(derived_synops(GRAPH, trace)["out-out"], [[0, 1, 0], [0, 0, 0]])


def by_hand() -> tuple[ProcessGraph, Trace]:
    """Two inputs -> two neurons a -> one neuron b, two steps, one sample."""
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
    packed = {name: pack(np.array(values)) for name, values in spikes.items()}
    active = {"a": np.array([[2, 2]]), "b": np.array([[1, 0]])}
    return graph, Trace("hand", graph.fingerprint(), 1, 2, {"in": 2, "a": 2, "b": 1}, packed, active=active)


def test_a_network_worked_through_by_hand_with_every_cause() -> None:
    graph, trace = by_hand()
    chip = load_chip("loihi-sanafe")
    mapping = map_network(graph, chip)
    timing = simulate_timing(graph, mapping, chip, core_counts(graph, mapping, trace))
    # ticks of 0.1 ns: message 160, dense synop 38, access 60, update 37, spike 300, message sent 51, barrier 6000
    a0 = 2 * 160 + 4 * 38 + 2 * (60 + 37) + 300 + 51
    a1 = 1 * 160 + 2 * 38 + 2 * (60 + 37)
    b0 = 1 * 160 + 1 * 38 + 1 * (60 + 37) + 300
    b1 = 60
    assert (a0, a1, b0, b1) == (1017, 430, 595, 60)
    assert timing.step_ticks.tolist() == [6000, 6000 + a0, 6000 + max(a1, b0), 6000 + b1]
    assert timing.critical_core.tolist() == [-1, 0, 1, 1]
    assert timing.busy_ticks.tolist() == [a0 + a1, b0 + b1]
    assert timing.critical_path == {
        "messages in": 2 * 160 + 160,
        "synapses": 4 * 38 + 38,
        "neurons": 2 * 97 + 97 + 60,
        "spikes out": 351 + 300,
        "barrier": 4 * 6000,
    }
    assert timing.ticks_per_inference == timing.total_ticks == 25672
    assert timing.latency_ticks.tolist() == [25672]


def test_davies_constants_price_synapses_neurons_and_the_barrier() -> None:
    graph, trace = by_hand()
    chip = load_chip("loihi")
    mapping = map_network(graph, chip)
    timing = simulate_timing(graph, mapping, chip, core_counts(graph, mapping, trace))
    assert timing.step_ticks.tolist() == [1130, 1130 + 4 * 35 + 2 * 84, 1130 + 2 * 35 + 2 * 84, 1130 + 53]


@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from(["loihi", "loihi-sanafe"]))
def test_streamed_time_is_the_slowest_core_of_each_shifted_step(
    neurons: int, samples: int, seed: int, name: str
) -> None:
    chip, mapping = load_chip(name), mapped(neurons)
    counts = core_counts(GRAPH, mapping, random_trace(GRAPH, samples, seed))
    timing = simulate_timing(GRAPH, mapping, chip, counts)
    rows, barrier = samples * GRAPH.steps, chip.barrier_ticks(mapping.tiles)
    stages = [GRAPH.population(core.population).stage for core in mapping.cores]

    def ticks(core: int, row: int) -> int:
        if not 0 <= row < rows:
            return 0
        sample, step = divmod(row, GRAPH.steps)
        shape = (samples, GRAPH.steps, len(mapping.cores))
        events = ["axon_in", "synop_dense", "synop_sparse", "synop_conv", "spike", "axon_out"]
        events += ["neuron_inactive", "neuron_active", "neuron_access", "neuron_update"]
        return sum(int(np.broadcast_to(counts.of(e), shape)[sample, step, core]) * chip.ticks(e) for e in events)

    expected = [
        barrier + max(ticks(core, g - stage) for core, stage in enumerate(stages)) for g in range(rows + max(stages))
    ]
    assert timing.step_ticks.tolist() == expected
    assert sum(timing.critical_path.values()) == timing.total_ticks
    assert timing.latency_ticks.tolist() == [
        sum(expected[s * GRAPH.steps : (s + 1) * GRAPH.steps + GRAPH.depth]) for s in range(samples)
    ]
    assert (timing.busy_share <= 1).all()


def test_traces_that_do_not_belong_are_refused() -> None:
    mapping = mapped(20)
    trace = random_trace(GRAPH, 2, 0)
    with pytest.raises(SpikeportError, match="the trace is of graph"):
        core_counts(GRAPH, mapping, replace(trace, graph="other"))
    with pytest.raises(SpikeportError, match="the mapping is of graph"):
        core_counts(GRAPH, replace(mapping, graph="other"), trace)
    with pytest.raises(SpikeportError, match="lacks the spikes of in"):
        core_counts(GRAPH, mapping, replace(trace, packed={k: v for k, v in trace.packed.items() if k != "in"}))
    with pytest.raises(SpikeportError, match="counts no active neurons"):
        core_counts(GRAPH, mapping, replace(trace, active={}))
    with pytest.raises(SpikeportError, match="spikes outside 'dense'"):
        core_counts(GRAPH, mapping, replace(trace, packed=trace.packed | {"dense": trace.packed["dense"] | 1}))
    with pytest.raises(SpikeportError, match="spikes outside 'dense'"):
        core_counts(GRAPH, mapping, replace(trace, packed=trace.packed | {"dense": trace.packed["conv"]}))
