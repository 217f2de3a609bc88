"""NIR in the terms of other libraries: the same spikes as before, and what one of them cannot do is named.

That they do read and run it so is shown in `hw_tests/test_interop.py`, with the libraries themselves.
"""

import itertools
from typing import Any

import nir
import numpy as np
import pytest
import torch
from graph_strategies import one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeport.converters.nir_float import FloatNetwork
from spikeport.converters.nir_peers import PEERS, for_peer
from spikeport.models.errors import GraphError

NODES = (nir.Input, nir.Output, nir.Affine, nir.Conv2d, nir.SumPool2d, nir.AvgPool2d, nir.Flatten)


def image_network(seed: int, kind: str, loop: bool, average: bool) -> nir.NIRGraph:
    """A scaled input, a grouped convolution, a pooling and two matrices, of IF, LIF or CubaLIF; perhaps a loop."""
    rng = np.random.default_rng(seed)

    def neuron(*shape: int) -> nir.NIRNode:
        def full(value: float) -> np.ndarray:
            return np.full(shape, value)

        level = {"v_threshold": full(rng.uniform(0.3, 0.6)), "v_reset": full(0.0)}
        if kind == "IF":
            return nir.IF(r=full(rng.uniform(300, 900)), **level)
        if kind == "LIF":
            return nir.LIF(full(rng.uniform(2e-3, 8e-3)), full(rng.uniform(1, 3)), full(0.0), **level)
        taus = [full(rng.uniform(1e-3, 8e-3)) for _ in range(2)]
        return nir.CubaLIF(*taus, full(rng.uniform(1, 3)), full(0.0), w_in=full(rng.uniform(0.5, 2)), **level)

    def weight(*shape: int) -> np.ndarray:
        return rng.normal(0.3, 1, shape) / np.sqrt(np.prod(shape[1:])) * 2

    pair = np.array([2, 2])
    nodes: dict[str, nir.NIRNode] = {
        "in": nir.Input({"input": np.array([2, 4, 4])}),
        "unit": nir.Scale(np.full((2, 4, 4), 0.5)),
        "conv": nir.Conv2d((4, 4), weight(4, 1, 3, 3), (1, 1), (1, 1), (1, 1), 2, rng.normal(0, 0.1, 4)),
        "a": neuron(4, 4, 4) if kind != "LIF" else nir.IF(np.full((4, 4, 4), 1e3), np.full((4, 4, 4), 0.5)),
        "pool": (nir.AvgPool2d if average else nir.SumPool2d)(pair, pair, np.array([0, 0])),
        "flat": nir.Flatten({"input": np.array([4, 2, 2])}, 0, -1),
        "fc1": nir.Affine(weight(6, 16), rng.normal(0, 0.1, 6)),
        "b": neuron(6),
        "fc2": nir.Linear(weight(3, 6)),
        "c": neuron(3),
        "out": nir.Output({"output": np.array([3])}),
    }
    edges = list(itertools.pairwise(nodes))
    if loop:
        nodes["back"] = nir.Affine(weight(6, 6) - 0.3, rng.normal(0, 0.1, 6))
        edges += [("b", "back"), ("back", "b")]
    return nir.NIRGraph(nodes, edges, {"steps": 10}, type_check=False)


@pytest.mark.parametrize("peer", PEERS)
@given(seed=st.integers(0, 2**32 - 1), discretization=st.sampled_from(["euler", "exponential"]), average=st.booleans())
@settings(max_examples=8)
def test_the_same_spikes_in_other_terms(peer: str, discretization: str, average: bool, seed: int) -> None:
    """Weights lose what 32 bits cannot hold, so a membrane near its threshold may fall to the other side."""
    terms = PEERS[peer]
    kind = ["IF", "LIF"][seed % 2] if peer == "sinabs" else ["IF", "LIF", "Cuba"][seed % 3]
    loop, reset = terms.loops and seed % 2 == 0, terms.resets[seed % len(terms.resets)]
    graph = image_network(seed, kind, loop, average)
    network = FloatNetwork(graph, "ours", dt=1e-3, reset=reset, discretization=discretization)
    stated = for_peer(network.graph, network.timing, peer)  # type: ignore[arg-type]
    again = FloatNetwork(stated, peer)  # its metadata says the rest
    assert again.timing.dt == terms.dt
    assert all(isinstance(node, (*NODES, nir.Conv1d, nir.IF, nir.LIF, nir.CubaLIF)) for node in stated.nodes.values())
    inputs = {"in": np.random.default_rng(seed).integers(0, 2, (4, 10, 2, 4, 4))}
    first, second = (each.run(inputs, ["a", "c"]) for each in (network, again))
    for name in ("a", "c"):
        assert float((first[name] == second[name]).to(torch.float64).mean()) >= 0.99, name


def refusal(graph: nir.NIRGraph, peer: str, reset: str) -> str:
    network = FloatNetwork(graph, "ours", dt=1e-3, reset=reset)
    with pytest.raises(GraphError) as caught:
        for_peer(network.graph, network.timing, peer)  # type: ignore[arg-type]
    return str(caught.value)


def changed(node: str, **values: Any) -> nir.NIRGraph:
    graph = image_network(0, "Cuba", False, False)
    for key, value in values.items():
        setattr(graph.nodes[node], key, value)
    return graph


@pytest.mark.parametrize(
    ("graph", "peer", "reset", "said"),
    [
        (image_network(0, "Cuba", False, False), "sinabs", "subtract", "'a' (CubaLIF): Sinabs reads none"),
        (image_network(0, "IF", True, False), "sinabs", "subtract", "Sinabs reads no loops"),
        (image_network(0, "IF", False, False), "sinabs", "zero", "reset 'subtract' only"),
        (image_network(0, "IF", False, False), "snntorch", "subtract", "reset 'zero' only"),
        (changed("b", v_leak=np.full(6, 0.1)), "norse", "zero", "'b': with Norse, v_leak has to be 0"),
        (changed("b", v_threshold=np.arange(1.0, 7.0)), "spikingjelly", "zero", "'b': SpikingJelly takes one value"),
        (changed("unit", scale=np.arange(32.0).reshape(2, 4, 4)), "norse", "zero", "'unit' (Scale)"),
        (changed("pool", padding=np.array([1, 1]), stride=np.array([4, 4])), "norse", "zero", "'pool' (SumPool2d)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_peer_cannot_do_is_named(graph: nir.NIRGraph, peer: str, reset: str, said: str) -> None:
    assert said in refusal(graph, peer, reset)


def test_branches_that_meet_are_refused_for_what_runs_depth_first() -> None:
    """Two ways into one neuron: Norse would run it after the first."""
    nodes = {
        "in": nir.Input({"input": np.array([2])}),
        "x": nir.Affine(np.eye(2), np.zeros(2)),
        "y": nir.Affine(np.eye(2), np.zeros(2)),
        "n": nir.IF(np.ones(2), np.ones(2)),
        "out": nir.Output({"output": np.array([2])}),
    }
    edges = [("in", "x"), ("in", "y"), ("x", "n"), ("y", "n"), ("n", "out")]
    graph = nir.NIRGraph(nodes, edges, {}, type_check=False)
    assert "no branches that meet" in refusal(graph, "norse", "zero")
    for_peer(graph, FloatNetwork(graph, "ours", dt=1e-3, reset="zero").timing, "snntorch")
