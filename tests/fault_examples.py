"""One small network, and the same network with planted faults: what `verify` must find and name."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Conv2d, Dense
from spikeport.deploy.trace import Trace

SAMPLES, STEPS = 60, 9


def neuron(vth: int, du: int, dv: int, bias: int = 0) -> LoihiNeuron:
    values = (np.asarray(value, dtype=np.int64) for value in (du, dv, vth, bias, 0))
    return LoihiNeuron(*values)


def network() -> ProcessGraph:
    """Two branches behind a convolution that meet again, with biases and a readout."""
    rng = np.random.default_rng(4)

    def weights(*shape: int) -> np.ndarray:
        return 2 * rng.integers(-50, 80, shape)

    return ProcessGraph(
        "verified",
        STEPS,
        1e-3,
        (Input("in", (2, 5, 5)),),
        (
            Population("first", (3, 4, 4), neuron(220, 1500, 500), 1),
            Population("middle", (24,), neuron(1800, 2000, 700, bias=300), 2),
            Population("side", (12,), neuron(1500, 1000, 300), 2),
            Population("last", (10,), neuron(3500, 2500, 400, bias=100), 3),
        ),
        (
            Projection("in-first", "in", "first", Conv2d((2, 5, 5), weights(3, 2, 2, 2))),
            Projection("first-middle", "first", "middle", Dense((3, 4, 4), weights(24, 48))),
            Projection("first-side", "first", "side", Dense((3, 4, 4), weights(12, 48))),
            Projection("middle-last", "middle", "last", Dense((24,), weights(10, 24))),
            Projection("side-last", "side", "last", Dense((12,), weights(10, 12))),
            Projection("first-last", "first", "last", Dense((3, 4, 4), weights(10, 48)), delay=1),
        ),
        Readout("last"),
    )


GRAPH = network()
ORDER = [population.name for population in GRAPH.populations]
INPUTS = {"in": (np.random.default_rng(8).random((SAMPLES, STEPS, 2, 5, 5)) < 0.3).astype(np.uint8)}


def with_neuron(graph: ProcessGraph, name: str, **changes: int) -> ProcessGraph:
    """Other parameters for one population; each number is added to what is there."""

    def changed(population: Population) -> Population:
        old = population.neuron
        assert isinstance(old, LoihiNeuron)
        return replace(population, neuron=replace(old, **{key: getattr(old, key) + by for key, by in changes.items()}))

    return replace(graph, populations=tuple(changed(p) if p.name == name else p for p in graph.populations))


def with_projection(graph: ProcessGraph, name: str, change: Callable[[Projection], Projection]) -> ProcessGraph:
    return replace(graph, projections=tuple(change(p) if p.name == name else p for p in graph.projections))


def weight_changed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Projection], Projection]:
    return lambda p: replace(p, operator=p.operator.with_weight(change(p.operator.weight)))


def one_weight(weight: np.ndarray) -> np.ndarray:
    changed = weight.copy()
    changed.flat[weight.size // 3] += 20
    return changed


FAULTS: dict[str, tuple[str, ProcessGraph]] = {
    "a flipped kernel": (
        "first",
        with_projection(GRAPH, "in-first", weight_changed(lambda weight: weight[..., ::-1, ::-1].copy())),
    ),
    "a transposed kernel": (
        "first",
        with_projection(GRAPH, "in-first", weight_changed(lambda weight: weight.swapaxes(-1, -2))),
    ),
    "a current decay off by one": ("middle", with_neuron(GRAPH, "middle", du=1)),
    "a voltage decay off by one": ("first", with_neuron(GRAPH, "first", dv=1)),
    "the other register offset": ("middle", with_neuron(GRAPH, "middle", ds_offset=-1)),
    "a threshold off by ten": ("side", with_neuron(GRAPH, "side", vth=10)),
    "a lost bias": ("middle", with_neuron(GRAPH, "middle", bias_mant=-300)),
    "a branch late by a step": ("last", with_projection(GRAPH, "side-last", lambda p: replace(p, recurrent=True))),
    "an exponent too large by one": (
        "side",
        with_projection(GRAPH, "first-side", lambda p: replace(p, exponent=p.exponent + 1)),
    ),
    "a single weight": ("last", with_projection(GRAPH, "middle-last", weight_changed(one_weight))),
    "the other reset": (
        "first",
        replace(
            GRAPH,
            populations=tuple(
                replace(p, neuron=replace(p.neuron, reset="subtract")) if p.name == "first" else p
                for p in GRAPH.populations
            ),
        ),
    ),
}


def relabelled(trace: Trace, graph: ProcessGraph) -> Trace:
    """The trace of a faulty graph, passed off as one of `graph`."""
    trace.graph, trace.backend = graph.fingerprint(), "faulty"
    return trace
