"""On a Loihi 2 board the bundle gives the spikes of the torch integers. Skipped, with the reason, without a board."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spikeport.converters import bundle, lava_runner
from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Conv2d, Dense, Operator, SumPool
from spikeport.deploy import lava_backend, torch_backend
from spikeport.deploy.verify import compare
from spikeport.models.errors import BackendUnavailableError

STEPS = 6


def even_weights(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-64, 64, shape) * 2


def chain(shape: tuple[int, ...], *operators: Operator) -> ProcessGraph:
    """Layers one after another, with a bias for each neuron."""
    populations, projections = [], []
    source = "input"
    for index, operator in enumerate(operators):
        name = f"layer{index + 1}"
        bias = np.random.default_rng(index).integers(-40, 60, operator.out_shape)
        neuron = LoihiNeuron(np.asarray(1500), np.asarray(300), np.asarray(500), bias, np.asarray(5))
        populations.append(Population(name, operator.out_shape, neuron, stage=index + 1))
        projections.append(Projection(f"{source} to {name}", source, name, operator, exponent=1))
        source = name
    return ProcessGraph(
        "board", STEPS, 1e-3, (Input("input", shape),), tuple(populations), tuple(projections), Readout(source)
    )


def spikes_for(graph: ProcessGraph, samples: int) -> dict[str, np.ndarray]:
    random, shape = np.random.default_rng(0), (samples, graph.steps, *graph.inputs[0].shape)
    payloads = random.integers(1, 1 << graph.inputs[0].message_bits, shape)
    return {"input": np.where(random.random(shape) < 0.4, payloads, 0).astype(np.uint8)}


DENSE = chain((20,), Dense((20,), even_weights(1, 30, 20)), Dense((30,), even_weights(2, 10, 30)))
CONV = chain(
    (2, 8, 6),
    Conv2d((2, 8, 6), even_weights(3, 4, 2, 3, 3), padding=(1, 1)),
    Conv2d((4, 8, 6), even_weights(4, 6, 4, 3, 2), SumPool((2, 2), (2, 2))),
    Dense((6, 2, 2), even_weights(5, 5, 24)),
)


def branch() -> ProcessGraph:
    """A dense short cut past a layer, which waits one step in the axon."""
    shortcut = Projection("input to layer2", "input", "layer2", Dense((20,), even_weights(6, 10, 20)), 1, delay=1)
    return replace(DENSE, projections=(*DENSE.projections, shortcut))


def levels() -> ProcessGraph:
    """Two levels of one multi-level neuron: populations with the same synapses and other thresholds."""
    first, last = DENSE.populations
    assert isinstance(first.neuron, LoihiNeuron)
    second = replace(first, name="level2", neuron=replace(first.neuron, vth=np.asarray(900)))
    into, out = DENSE.projections
    extra = (replace(into, name="input to level2", target="level2"), replace(out, name="level2 out", source="level2"))
    return replace(DENSE, populations=(first, second, last), projections=(into, *extra, out))


GRAPHS = {
    "dense": DENSE,
    "convolution": CONV,
    "delayed branch": branch(),
    "levels": levels(),
    "graded input": replace(DENSE, inputs=(Input("input", (20,), 4),)),
}


@pytest.mark.usefixtures("board")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_board_gives_the_spikes_of_torch(graph: ProcessGraph) -> None:
    inputs = spikes_for(graph, samples=10)
    found = compare(graph, torch_backend.run(graph, inputs), lava_backend.run_loihi2(graph, inputs), inputs)
    assert found.equal, str(found)


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_the_networks_for_the_board_fire_and_have_nothing_of_the_simulator_alone(graph: ProcessGraph) -> None:
    inputs = spikes_for(graph, samples=10)
    description, network, _ = bundle.describe(graph, inputs)
    assert lava_runner.simulator_only(description, network) == []
    trace = torch_backend.run(graph, inputs, device="cpu")
    for population in graph.populations:
        assert 0.02 < trace.spikes(population.name).mean() < 0.98, population.name


def test_without_a_board_the_bundle_and_the_commands_for_it_are_left(tmp_path: Path) -> None:
    if lava_backend.board_missing() is None:
        pytest.skip("a board can be reached from here")
    with pytest.raises(BackendUnavailableError, match="no Loihi 2 board") as raised:
        lava_backend.run_loihi2(DENSE, spikes_for(DENSE, samples=2), tmp_path / "for-loihi")
    assert "python run_lava.py --hardware" in str(raised.value)
    assert "spikeport simulate DIR --from trace-loihi2.npz" in str(raised.value)
    assert {path.name for path in (tmp_path / "for-loihi").iterdir()} == {
        "README.md",
        "bundle.json",
        "network.npz",
        "run_lava.py",
        "stream.npz",
    }
