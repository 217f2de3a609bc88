"""Networks as ONNX: onnxruntime computes the integers of the torch reference, spike for spike."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph_strategies import graphs, one_thread, random_graph, random_inputs  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from onnx_models import load, run

from spikeport.converters.graph import (
    FloatNeuron,
    Input,
    LoihiNeuron,
    Population,
    ProcessGraph,
    Projection,
    Readout,
    with_populations,
)
from spikeport.converters.onnx_writer import step_model, window_model, write_onnx
from spikeport.converters.operators import Conv2d, Dense, Operator, Sparse, SumPool
from spikeport.converters.reference import Reference, Run
from spikeport.models.errors import GraphError

pytestmark = pytest.mark.oracle


def feeds(graph: ProcessGraph, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs in the types of the models."""
    bits = {node.name: node.message_bits for node in graph.event_inputs}
    return {name: array.astype(np.uint8 if bits[name] <= 8 else np.int64) for name, array in inputs.items()}


def assert_window_equal(graph: ProcessGraph, inputs: dict[str, np.ndarray]) -> Run:
    expected = Reference(graph).run(inputs)
    found = run(window_model(graph), feeds(graph, inputs))
    wanted = {f"{name}.spikes" for name in expected.spikes} | ({"membrane"} if graph.probed else set())
    assert set(found) == wanted
    for name, spikes in expected.spikes.items():
        assert found[f"{name}.spikes"].dtype == np.uint8
        np.testing.assert_array_equal(found[f"{name}.spikes"], spikes.numpy())
    if expected.membrane is not None:
        assert found["membrane"].dtype == np.int64
        np.testing.assert_array_equal(found["membrane"], expected.membrane.numpy())
    return expected


def assert_steps_equal(graph: ProcessGraph, inputs: dict[str, np.ndarray]) -> None:
    """The states that a step puts out are those that the next one takes."""
    expected = Reference(graph).run(inputs, record=True)
    model = step_model(graph)
    samples = len(next(iter(inputs.values())))
    states = {
        value.name: np.zeros((samples, *(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:])), dtype)
        for value in model.graph.input
        if value.name.endswith(".before")
        for dtype in [np.uint8 if ".spikes." in value.name else np.int64]
    }
    session = load(model)
    for t in range(graph.steps):
        found = run(session, states | {name: array[:, t] for name, array in feeds(graph, inputs).items()})
        for name in expected.spikes:
            np.testing.assert_array_equal(found[f"{name}.spikes"], expected.spikes[name][:, t].numpy())
            np.testing.assert_array_equal(found[f"{name}.u"], expected.u[name][:, t].numpy())
            np.testing.assert_array_equal(found[f"{name}.v"], expected.v[name][:, t].numpy())
        states = {name: found[name.removesuffix(".before")] for name in states}


@given(graph=graphs(), seed=st.integers(0, 2**32 - 1))
def test_the_window_is_that_of_the_torch_integers(graph: ProcessGraph, seed: int) -> None:
    """Every operator, neuron parameter, reset, loop, delay and payload of the random graphs, overflow included."""
    model = window_model(graph)
    onnx.checker.check_model(model, full_check=True)
    assert_window_equal(graph, random_inputs(graph, seed))


@given(graph=graphs(steps=3), seed=st.integers(0, 2**32 - 1))
def test_every_step_is_that_of_the_torch_integers(graph: ProcessGraph, seed: int) -> None:
    onnx.checker.check_model(step_model(graph), full_check=True)
    assert_steps_equal(graph, random_inputs(graph, seed))


def one_projection(operator: Operator, bits: int = 1, exponent: int = 0, steps: int = 2) -> ProcessGraph:
    """One population that hears an input through an operator; its neurons keep nothing of u, so that u is the sum."""
    one = np.asarray(1, np.int64)
    neuron = LoihiNeuron(4095 * one, 0 * one, 90_000 * one, 0 * one, 0 * one)
    return ProcessGraph(
        "one",
        steps,
        1e-3,
        (Input("in", operator.in_shape, bits),),
        (Population("out", operator.out_shape, neuron, stage=1),),
        (Projection("in->out", "in", "out", operator, exponent),),
        Readout("out"),
    )


@pytest.mark.parametrize("bits", [1, 8, 9, 16, 24, 32])
@pytest.mark.parametrize("kind", ["conv", "pooled conv", "dense", "pooled dense"])
def test_sums_are_exact_whatever_the_payload(kind: str, bits: int) -> None:
    """The largest payload through the largest weights: sums pass 2^24 from 16 bits on."""
    rng = np.random.default_rng(bits)
    pool = SumPool((2, 2), (2, 2)) if "pooled" in kind else None
    pooled = pool.out_shape((8, 12, 12)) if pool else (8, 12, 12)
    operator: Operator
    if kind.endswith("conv"):
        operator = Conv2d((8, 12, 12), rng.integers(-256, 256, (4, 8, 5, 5)), pool, padding=(2, 2))
    else:
        operator = Dense((8, 12, 12), rng.integers(-256, 256, (6, int(np.prod(pooled)))), pool)
    graph = one_projection(operator, bits)
    values = rng.integers(0, 1 << bits, (2, 2, 8, 12, 12))
    values[0] = (1 << bits) - 1
    assert bits < 16 or operator.magnitude_bound() * ((1 << bits) - 1) > 2**24
    assert_steps_equal(graph, {"in": values})


def test_weights_whose_sums_no_convolution_holds_are_refused_by_name() -> None:
    operator = Conv2d((1, 2, 2), np.full((1, 1, 2, 2), 1 << 22))
    with pytest.raises(GraphError, match=r"'in->out' sums up to 16,777,216"):
        window_model(one_projection(operator))


@pytest.mark.parametrize("exponent", [-9, -1, 3])
def test_exponents_shift_as_integers_do(exponent: int) -> None:
    """To the right, negative sums too are rounded down."""
    rng = np.random.default_rng(1)
    operator = Dense((9,), rng.integers(-256, 256, (7, 9)))
    assert_steps_equal(one_projection(operator, 4, exponent), {"in": rng.integers(0, 16, (5, 2, 9))})


def test_synapses_that_meet_in_one_neuron_are_all_summed() -> None:
    count = 500
    order = np.random.default_rng(2).permutation(count)
    operator = Sparse((count,), np.arange(count) - 200, None, order, np.arange(count) % 3, (3,))
    assert_steps_equal(one_projection(operator), {"in": np.ones((2, 2, count), np.uint8)})


def test_models_take_any_batch_and_any_number_of_steps() -> None:
    graph = random_graph(11)
    longer = replace(graph, steps=9)
    for samples in (1, 4):
        inputs = random_inputs(longer, 3, samples)
        found = run(window_model(graph), feeds(longer, inputs))
        for name, spikes in Reference(longer).run(inputs).spikes.items():
            np.testing.assert_array_equal(found[f"{name}.spikes"], spikes.numpy())


def test_weights_are_stored_once_in_small_integers() -> None:
    operator = Dense((40,), 2 * np.random.default_rng(3).integers(-128, 128, (50, 40)))
    model = window_model(one_projection(operator))
    assert 2 * 40 * 50 < model.ByteSize() < 2 * 40 * 50 + 3000


def test_a_model_says_what_it_was_made_of(tmp_path: Path) -> None:
    graph = random_graph(5)
    write_onnx(step_model(graph), tmp_path / "step.onnx")
    facts = {entry.key: entry.value for entry in onnx.load_model(tmp_path / "step.onnx").metadata_props}
    assert facts["spikeport.graph"] == graph.fingerprint()
    assert facts["spikeport.steps"] == str(graph.steps)
    assert facts["spikeport.readout_population"] == graph.readout.population


def test_graphs_that_have_no_such_form_are_refused() -> None:
    graph = random_graph(7, populations=1, recurrent=False)
    number = np.ones(())
    floats = with_populations(
        graph, [replace(p, neuron=FloatNeuron(number, number, number, number)) for p in graph.populations]
    )
    with pytest.raises(GraphError, match="Quantize the graph first"):
        step_model(floats)
    (population,) = graph.populations
    unfed = replace(graph, inputs=(), projections=())
    with pytest.raises(GraphError, match="no input that is fed"):
        window_model(with_populations(unfed, [population]))
    named = one_projection(Dense((3,), np.ones((2, 3), np.int64)))
    clash = replace(named, inputs=(Input("out.u", (3,)),), projections=(replace(named.projections[0], source="out.u"),))
    with pytest.raises(GraphError, match=r"'out\.u'"):
        step_model(clash)
