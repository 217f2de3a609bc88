"""Populations of both kinds in one graph, and the table that says which one costs accuracy."""

import json

import numpy as np
import pytest
from graph_strategies import one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantize import float_network, floats, spikes

from spikeport.converters.graph import FloatNeuron, Input, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Dense
from spikeport.converters.quantize import quantize
from spikeport.converters.reference import Reference
from spikeport.converters.sensitivity import mixed, sensitivity
from spikeport.models.readouts import decide


@given(st.integers(0, 2**32 - 1), st.sets(st.sampled_from(["conv", "inner", "out"])))
@settings(max_examples=10)
def test_a_mixed_graph_runs_each_population_as_its_kind_does(seed: int, chosen: set[str]) -> None:
    """Every population answers the spikes that reach it as it would alone; graphs of one kind are the mixed ones of
    none and of all."""
    graph = float_network(seed, biased=True)
    inputs = spikes(graph, seed, samples=6)
    integer, _ = quantize(graph, inputs, bits=3)
    both = mixed(graph, integer, chosen)
    assert {p.name for p in both.populations if not isinstance(p.neuron, FloatNeuron)} == chosen
    run = Reference(both).run(inputs)
    if len(chosen) in (0, 3):
        assert both.fingerprint() == (integer if chosen else graph).fingerprint()
    for population in both.populations:
        kind = integer if population.name in chosen else graph
        fed = {**inputs, **{name: array.numpy() for name, array in run.spikes.items()}}
        found = Reference(only(kind, population.name)).run({name: fed[name] for name in sources(kind, population.name)})
        np.testing.assert_array_equal(found.spikes[population.name], run.spikes[population.name])


def sources(graph: ProcessGraph, name: str) -> list[str]:
    return [node.name for node in graph.nodes if node.name in {p.source for p in graph.incoming(name)} - {name}]


def only(graph: ProcessGraph, name: str) -> ProcessGraph:
    """One population, its sources as inputs."""
    inputs = tuple(Input(source, graph.node(source).shape) for source in sources(graph, name))
    population = Population(name, graph.population(name).shape, graph.population(name).neuron, 1)
    projections = tuple(
        Projection(p.name, p.source, p.target, p.operator, p.exponent, 0, p.recurrent) for p in graph.incoming(name)
    )
    return ProcessGraph("only", graph.steps, graph.dt, inputs, (population,), projections, Readout(name))


def fragile_network(layer: str | None) -> ProcessGraph:
    """Three layers; a weight that no spike ever meets, a hundred times the others, spoils the levels of one."""
    rng = np.random.default_rng(3)
    weights = {
        "first": rng.normal(0.1, 0.5, (16, 12)),
        "second": rng.normal(0.1, 0.5, (16, 16)),
        "third": rng.normal(0.1, 0.5, (5, 16)),
    }
    weights["first"][0] = weights["second"][0] = -1.0  # never fire
    if layer is not None:
        weights[layer][1, 0] = 60.0  # from the input that is always silent, or from a neuron that never fires
    names = ["in", *weights]
    populations = [Population(name, (len(weights[name]),), floats(1.2), i + 1) for i, name in enumerate(weights)]
    projections = [
        Projection(f"to {name}", names[i], name, Dense((weights[name].shape[1],), weights[name]))
        for i, name in enumerate(weights)
    ]
    return ProcessGraph(
        "fragile", 8, 1e-3, (Input("in", (12,)),), tuple(populations), tuple(projections), Readout("third")
    )


@pytest.mark.parametrize("layer", ["first", "second", "third"])
def test_the_layer_whose_weights_do_not_fit_the_bits_is_named(layer: str) -> None:
    graph = fragile_network(layer)
    inputs = spikes(graph, samples=200)
    inputs["in"][..., 0] = 0
    labels = decide("count", 0.0, Reference(graph).run(inputs).spikes["third"].numpy())
    assert len(np.unique(labels)) > 2
    trials: list[tuple[int, int]] = []
    integer, _ = quantize(graph, {"in": inputs["in"][:40]}, bits=5)
    found = sensitivity(graph, integer, inputs, labels, on_step=lambda done, of: trials.append((done, of)))
    assert found.most_sensitive.population == layer
    assert (found.float_accuracy, found.samples) == (1.0, 200)
    rows = {each.population: each for each in found.populations}
    assert list(rows) == ["first", "second", "third"]
    for name, row in rows.items():
        assert (row.alone < 0.75) == (name == layer)
        assert (row.without > found.integer_accuracy + 0.1) == (name == layer)
    assert trials == [(index + 1, 8) for index in range(8)]
    assert json.loads(json.dumps(found.to_json()))["populations"][0]["alone"] == rows["first"].alone
