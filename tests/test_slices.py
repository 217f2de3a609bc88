"""Weights in slices: nearer to the float network than 8 bits, and exactly the integers that a chip holds."""

import numpy as np
import pytest
from graph_strategies import one_thread  # noqa: F401

from spikeport.converters.graph import FloatNeuron, Input, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Dense
from spikeport.converters.quantize import quantize
from spikeport.converters.reference import Reference
from spikeport.converters.slices import slices
from spikeport.deploy import event_simulator, torch_backend
from spikeport.deploy.verify import compare
from spikeport.models.errors import QuantizationError

STEPS = 40


def network(strong: float = 15.0) -> ProcessGraph:
    """A recurrent population whose few strong inhibitory weights leave 8 bits little for the others."""
    rng = np.random.default_rng(0)
    back = rng.normal(0, 0.2, (16, 16))
    back[rng.random((16, 16)) < 0.05] = -strong
    value = [np.asarray(each) for each in (0.55, 0.9, 1.0, 0.0)]
    populations = (Population("a", (16,), FloatNeuron(*value), 1), Population("b", (4,), FloatNeuron(*value), 2))
    projections = (
        Projection("in->a", "in", "a", Dense((8,), rng.normal(0.1, 0.4, (16, 8)))),
        Projection("a->a", "a", "a", Dense((16,), back), recurrent=True),
        Projection("a->b", "a", "b", Dense((16,), rng.normal(0.1, 0.4, (4, 16)))),
    )
    return ProcessGraph("strong", STEPS, 1e-3, (Input("in", (8,)),), populations, projections, Readout("b"))


def spikes(samples: int, seed: int) -> dict[str, np.ndarray]:
    return {"in": (np.random.default_rng(seed).random((samples, STEPS, 8)) < 0.3).astype(np.uint8)}


def test_slices_add_up_to_the_weight_to_the_last_integer() -> None:
    rng = np.random.default_rng(1)
    projection = Projection("p", "in", "a", Dense((8,), rng.normal(0, 5, (16, 8))))
    scale = 254 * 128 / float(np.abs(projection.operator.weight).max())
    parts = slices(projection, scale)
    total = sum(part.operator.weight * 2.0**part.exponent for part in parts)
    np.testing.assert_array_equal(total, np.rint(projection.operator.weight * scale))
    assert [part.exponent for part in parts] == [7, 0, 0]
    coarse, positive, negative = (part.operator.weight for part in parts)
    assert not (coarse % 2).any()
    assert np.abs(coarse).max() <= 254
    assert (positive.min(), negative.max()) == (0, 0)
    assert max(positive.max(), -negative.min()) <= 255


def test_fewer_spikes_differ_than_with_8_bits() -> None:
    graph, calibration, inputs = network(), spikes(16, 0), spikes(16, 1)
    expected = Reference(graph).run(inputs).spikes
    wrong = {}
    for number in (1, 2):
        integer, report = quantize(graph, calibration, slices=number)
        run = Reference(integer).run(inputs).spikes
        wrong[number] = {name: float((run[name] != expected[name]).double().mean()) for name in expected}
        assert [layer.population for layer in report.layers] == ["a", "b"]
    for name in ("a", "b"):
        assert expected[name].double().mean() > 0.02
        assert wrong[2][name] < 0.2 * wrong[1][name], wrong


def test_backends_agree_on_it() -> None:
    integer, report = quantize(network(), spikes(8, 0), slices=2)
    inputs = spikes(8, 2)
    first, second = torch_backend.run(integer, inputs), event_simulator.run(integer, inputs)
    assert compare(integer, first, second).equal
    assert all(0 < layer.current_error < 0.1 and layer.weight_error < 1e-3 for layer in report.layers)


def test_a_membrane_that_is_read_is_refused() -> None:
    graph = network()
    neuron = FloatNeuron(*(np.asarray(each) for each in (0.5, 0.9, np.inf, 0.0)))
    read = ProcessGraph(
        "membrane",
        STEPS,
        1e-3,
        graph.inputs,
        (graph.populations[0], Population("b", (4,), neuron, 2)),
        graph.projections,
        Readout("b", "membrane"),
    )
    with pytest.raises(QuantizationError, match="'b', which is read"):
        quantize(read, spikes(4, 0), slices=2)
