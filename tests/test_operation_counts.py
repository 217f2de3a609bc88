"""Operation counts against nets worked through by hand, and against loops over explicit synapses."""

from dataclasses import replace
from typing import cast

import numpy as np
import pytest
from graph_strategies import explicit_matrix, graphs, operators, random_inputs
from graph_strategies import one_thread as one_thread
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Conv2d, Dense, OneToOne, Operator, SumPool
from spikeport.deploy import operation_counts, torch_backend
from spikeport.deploy.operation_counts import (
    OperationCounts,
    Operations,
    activation_sparsity,
    connection_sparsity,
    count_operations,
    dense_operations,
)
from spikeport.deploy.trace import Trace, pack
from spikeport.models.errors import SpikeportError

ZERO = np.int64(0)
NEURON = LoihiNeuron(ZERO, ZERO, np.int64(100), ZERO, ZERO)


def single(operator: Operator, bits: int = 1, steps: int = 2, recurrent: bool = False) -> ProcessGraph:
    """One population behind one operator: from the input, or from itself."""
    source = Input("in", operator.in_shape, bits)
    population = Population("a", operator.out_shape, NEURON, 1)
    projection = Projection("p", "a" if recurrent else "in", "a", operator, recurrent=recurrent)
    return ProcessGraph("single", steps, 1.0, (source,), (population,), (projection,), Readout("a"))


def traced(graph: ProcessGraph, **spikes: object) -> Trace:
    """A trace with these spikes (samples, steps, size) of some nodes; the others are silent."""
    arrays = {name: np.array(values) for name, values in spikes.items()}
    samples = len(next(iter(arrays.values())))
    sizes = {node.name: node.size for node in graph.event_nodes}
    silent = {name: np.zeros((samples, graph.steps, size)) for name, size in sizes.items()}
    packed = {name: pack(array) for name, array in (silent | arrays).items()}
    return Trace("hand", graph.fingerprint(), samples, graph.steps, sizes, packed)


def test_a_dense_net_by_hand() -> None:
    """Neuron 0 has the weights 2 and 6, neuron 1 has 0 and 8."""
    graph = single(Dense((2,), np.array([[2, 0], [6, 8]])))
    trace = traced(graph, **{"in": [[[1, 1], [1, 0]], [[0, 1], [0, 0]]], "a": [[[1, 0], [0, 0]], [[0, 0], [1, 1]]]})
    counts = count_operations(graph, trace)
    assert counts.projections == {"p": Operations(dense=2 * 2 * 4, effective_acs=3 + 2 + 1, effective_macs=0)}
    assert (counts.dense, counts.effective_acs, counts.effective_macs) == (8, 3, 0)
    assert counts.activation_sparsity == 1 - 3 / 8
    assert counts.connection_sparsity == 1 / 4


def test_the_border_of_a_padded_convolution_counts_nowhere() -> None:
    """A 3 x 3 kernel over 3 x 3 cells with padding 1: 9 synapses at the middle, 6 at an edge, 4 at a corner."""
    ones = np.ones((1, 1, 3, 3), np.int64)
    graph = single(Conv2d((1, 3, 3), ones, padding=(1, 1)), steps=1)
    corner, middle = np.eye(9, dtype=int)[[0, 4]]
    counts = count_operations(graph, traced(graph, **{"in": [[corner], [middle], [corner + middle]]}))
    assert counts.total == Operations(3 * (9 + 4 * 6 + 4 * 4), 4 + 9 + 13, 0)
    holed = ones.copy()
    holed[0, 0, 1, 1] = 0  # each cell loses its own neuron
    graph = single(Conv2d((1, 3, 3), holed, padding=(1, 1)), steps=1)
    counts = count_operations(graph, traced(graph, **{"in": [[corner], [middle], [corner + middle]]}))
    assert counts.total == Operations(3 * 49, 3 + 8 + 11, 0)
    assert counts.connection_sparsity == 1 / 9


def pooled_net() -> tuple[ProcessGraph, Trace]:
    """2 x 2 pooling of 2 x 4 cells into two, then one weight to each of three channels; one of them is zero."""
    weight = np.array([2, 0, 4]).reshape(3, 1, 1, 1)
    graph = single(Conv2d((1, 2, 4), weight, SumPool((2, 2), (2, 2))), steps=2)
    one_each = [1, 0, 1, 0, 0, 0, 0, 0]
    two_in_one = [1, 1, 0, 0, 0, 0, 0, 0]
    return graph, traced(graph, **{"in": [[one_each, two_in_one], [one_each, one_each]]})


def test_a_pooled_number_is_one_operation_and_a_mac_above_one() -> None:
    graph, trace = pooled_net()
    # step 0: two cells of 1 in both samples; step 1: one cell of 2 in the first, two of 1 in the second
    assert count_operations(graph, trace).total == Operations(2 * 2 * 6, 4 + 4, 2 + 4)


def test_one_sample_above_one_makes_macs_of_its_batch_alone() -> None:
    graph, trace = pooled_net()
    assert count_operations(graph, trace, batch=1).total == Operations(2 * 2 * 6, 4 + 4 + 4, 2)
    assert count_operations(graph, trace, batch=99) == count_operations(graph, trace)


def test_graded_inputs_are_macs_at_steps_with_payloads_above_one() -> None:
    graph = single(Dense((2,), np.array([[2, 4], [6, 8]])), bits=4)
    inputs = {"in": np.array([[[0, 5], [1, 1]]])}
    trace = traced(graph, **inputs)
    assert count_operations(graph, trace, inputs).total == Operations(8, 4, 2)
    assert count_operations(graph, trace).total == Operations(8, 0, 6)  # payloads unknown


def test_a_recurrent_layer_gets_nothing_at_the_first_step() -> None:
    graph = single(Dense((2,), np.array([[2, 4], [6, 0]])), steps=3, recurrent=True)
    trace = traced(graph, a=[[[1, 1], [1, 0], [1, 1]]])
    assert count_operations(graph, trace).total == Operations(3 * 4, 3 + 2, 0)


def test_a_recurrent_layer_of_a_single_step_gets_nothing() -> None:
    pooled = Dense((1, 2, 2), np.array([[2]] * 4), SumPool((2, 2), (2, 2)), shape_out=(1, 2, 2))
    graph = single(pooled, steps=1, recurrent=True)
    assert count_operations(graph, traced(graph, a=[[[1, 1, 1, 1]]])).total == Operations(4, 0, 0)


def test_a_constant_source_is_a_bias() -> None:
    graph = single(Dense((2,), np.array([[2, 4], [6, 8]])))
    biased = replace(
        graph,
        inputs=(*graph.inputs, Input("constant", (2,), constant=True)),
        projections=(*graph.projections, Projection("bias", "constant", "a", OneToOne((2,), np.array([0, 2])))),
    )
    spikes = {"in": [[[1, 1], [1, 0]]]}
    counts = count_operations(biased, traced(biased, **spikes))
    assert counts.projections["bias"] == Operations()
    assert counts.total == count_operations(graph, traced(graph, **spikes)).total
    assert counts.connection_sparsity == 0


def test_a_network_without_weights_has_no_connection_sparsity() -> None:
    graph = replace(single(Dense((2,), np.array([[2, 4]]))), projections=())
    counts = count_operations(graph, traced(graph, a=[[[1], [0]]]))
    assert (counts.connection_sparsity, counts.total) == (0, Operations())
    assert counts.activation_sparsity == 0.5


def test_a_trace_without_input_spikes_needs_the_inputs() -> None:
    graph = single(Dense((2,), np.array([[2, 4], [6, 8]])))
    inputs = {"in": np.array([[[1, 1], [1, 0]]])}
    whole = traced(graph, **inputs)
    bare = replace(whole, sizes={"a": 2}, packed={"a": whole.packed["a"]})
    assert count_operations(graph, bare, inputs) == count_operations(graph, whole)
    with pytest.raises(SpikeportError, match="holds no spikes of input 'in'; give the inputs"):
        count_operations(graph, bare)


def test_what_does_not_belong_together_is_refused() -> None:
    graph = single(Dense((2,), np.array([[2, 4], [6, 8]])))
    inputs = {"in": np.array([[[1, 1], [1, 0]]])}
    trace = traced(graph, **inputs)
    with pytest.raises(SpikeportError, match="made with another network than 'single'"):
        count_operations(replace(graph, steps=3), trace)
    with pytest.raises(SpikeportError, match="is not the one that the hand trace was made with"):
        count_operations(graph, trace, {"in": 1 - inputs["in"]})
    with pytest.raises(SpikeportError, match="has 1 samples, but 2 inputs"):
        count_operations(graph, trace, {"in": np.repeat(inputs["in"], 2, axis=0)})
    with pytest.raises(SpikeportError, match="a batch of 0 samples"):
        count_operations(graph, trace, batch=0)


# ---- against loops ---------------------------------------------------------------------------------------------------


def plainly(graph: ProcessGraph, trace: Trace, inputs: dict[str, np.ndarray], batch: int) -> OperationCounts:
    """NeuroBench's definitions, layer by layer, step by step, batch by batch, over explicit matrices."""
    found = {}
    zeros = stored = 0
    for projection in graph.projections:
        dense = acs = macs = 0
        source = graph.node(projection.source)
        if not (isinstance(source, Input) and source.constant):
            operator = projection.operator
            pooled = replace(operator, in_shape=operator.pooled_shape, pool=None)
            every = explicit_matrix(pooled)[1]
            present = explicit_matrix(pooled.with_weight((operator.weight != 0).astype(np.int64)))[0]
            zeros += int((operator.weight == 0).sum())
            stored += operator.weight.size
            sent = inputs[source.name] if isinstance(source, Input) else trace.spikes(source.name)
            for first in range(0, trace.samples, batch):
                for t in range(trace.steps):
                    operations, binary = 0, True
                    for sample in range(first, min(first + batch, trace.samples)):
                        values = np.zeros(operator.in_shape, np.int64)
                        if t >= projection.recurrent:
                            values += sent[sample, t - projection.recurrent].reshape(operator.in_shape)
                        arriving = summed(values, operator.pool).ravel()
                        operations += int((present @ (arriving != 0)).sum())
                        binary &= bool((arriving <= 1).all())
                        dense += int(every.sum())
                    acs, macs = (acs + operations, macs) if binary else (acs, macs + operations)
        found[projection.name] = Operations(dense, acs, macs)
    spikes = np.concatenate([trace.spikes(population.name).ravel() for population in graph.populations])
    return OperationCounts(trace.samples, found, float((spikes == 0).mean()), zeros / stored if stored else 0.0)


def summed(values: np.ndarray, pool: SumPool | None) -> np.ndarray:
    if pool is None:
        return values
    channels, rows, columns = pool.out_shape(cast(tuple[int, ...], values.shape))
    (tall, wide), (down, right) = pool.kernel, pool.stride
    out = np.zeros((channels, rows, columns), np.int64)
    for y, x in np.ndindex(rows, columns):
        out[:, y, x] = values[:, y * down : y * down + tall, x * right : x * right + wide].sum(axis=(1, 2))
    return out


@given(graphs(), st.integers(0, 99), st.integers(1, 4), st.sampled_from([0.05, 0.4]))
def test_counts_are_those_of_loops_over_explicit_synapses(
    graph: ProcessGraph, seed: int, batch: int, rate: float
) -> None:
    inputs = random_inputs(graph, seed, samples=4, rate=rate)
    trace = torch_backend.run(graph, inputs, device="cpu")
    expected = plainly(graph, trace, inputs, batch)
    found = count_operations(graph, trace, inputs, batch)
    assert found.projections == expected.projections
    assert found.activation_sparsity == pytest.approx(expected.activation_sparsity, abs=1e-12)
    assert found.connection_sparsity == pytest.approx(expected.connection_sparsity, abs=1e-12)


@settings(max_examples=25)
@given(graphs(), st.integers(0, 99))
def test_laws_of_the_counts(graph: ProcessGraph, seed: int) -> None:
    """Batches move operations between ACs and MACs and change nothing else; larger ones make no fewer MACs."""
    inputs = random_inputs(graph, seed, samples=4)
    trace = torch_backend.run(graph, inputs, device="cpu")
    one, two, all_ = (count_operations(graph, trace, inputs, batch) for batch in (1, 2, None))
    assert one.dense == two.dense == all_.dense
    assert one.total.effective_macs <= two.total.effective_macs <= all_.total.effective_macs
    assert len({c.total.effective_acs + c.total.effective_macs for c in (one, two, all_)}) == 1
    assert all_.total.effective_acs + all_.total.effective_macs <= all_.total.dense
    assert 0 <= activation_sparsity(graph, trace) <= 1
    assert 0 <= connection_sparsity(graph) <= 1


@given(operators())
def test_dense_operations_are_the_synapses_behind_the_pooling(operator: Operator) -> None:
    behind = replace(operator, in_shape=operator.pooled_shape, pool=None)
    assert dense_operations(single(operator)) == {"p": explicit_matrix(behind)[1].sum()}


@settings(max_examples=25)
@given(graphs(graded=False), st.integers(0, 99))
def test_without_pooling_and_zero_weights_they_are_the_synaptic_operations_of_the_chip(
    graph: ProcessGraph, seed: int
) -> None:
    """What the two ways of counting share; NeuroBench leaves out constant sources."""

    def plain(projection: Projection) -> Projection:
        operator = projection.operator
        if operator.pool is not None:
            return replace(projection, operator=OneToOne(operator.in_shape, np.ones(operator.n_in, np.int64)))
        return replace(projection, operator=operator.with_weight(np.where(operator.weight == 0, 2, operator.weight)))

    kept = [p for p in map(plain, graph.projections) if p.operator.n_out == graph.population(p.target).size]
    graph = replace(graph, projections=tuple(kept))
    inputs = random_inputs(graph, seed)
    trace = torch_backend.run(graph, inputs, device="cpu")
    counts = count_operations(graph, trace)
    assert counts.total.effective_macs == 0
    for projection in graph.projections:
        if projection.source == "constant":
            continue
        source = trace.spikes(projection.source).astype(np.int64)
        late = int(projection.recurrent)
        fan_out = projection.operator.fan_out().ravel()
        chip = int((source[:, : graph.steps - late] @ fan_out).sum())
        assert counts.projections[projection.name].effective_acs == chip


def test_chunks_of_samples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = pooled_net()
    rng = np.random.default_rng(0)
    inputs = {"in": rng.integers(0, 2, (9, 2, 1, 2, 4))}
    trace = torch_backend.run(graph, inputs, device="cpu")
    whole = count_operations(graph, trace, batch=4)
    monkeypatch.setattr(operation_counts, "VALUES_PER_CHUNK", 2 * 8 * 2)
    assert count_operations(graph, trace, batch=4) == whole
