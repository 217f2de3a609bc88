"""Operation counts against the package `neurobench`, run on a torch model of the same network.

The package lives beside the environment: `.ci/setup-neurobench.sh` puts it into .neurobench, and a program of its own
runs it, so that nothing of it is imported here.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Conv2d, Dense, OneToOne, Shape, SumPool
from spikeport.deploy import torch_backend
from spikeport.deploy.operation_counts import NEUROBENCH_VERSION, OperationCounts, Operations, count_operations
from spikeport.deploy.trace import Trace

pytestmark = pytest.mark.oracle

ROOT = Path(__file__).resolve().parents[1]
RUNNER = Path(__file__).with_name("neurobench_runner.py")
SAMPLES, STEPS = 7, 6
HALVES = SumPool((2, 2), (2, 2))


def run_program(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The runner in this Python, with .neurobench on its path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".neurobench"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RUNNER), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


# The networks


def neuron(threshold: int) -> LoihiNeuron:
    zero = np.int64(0)
    return LoihiNeuron(np.int64(1200), np.int64(300), np.int64(threshold), zero, zero)


def weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Even weights, more of them positive; a third are zero."""
    return np.where(rng.random(shape) < 1 / 3, 0, 2 * rng.integers(-30, 60, shape))


def dense_network(rng: np.random.Generator) -> ProcessGraph:
    first = Dense((2, 3, 3), weights(rng, 11, 18))
    return ProcessGraph(
        "dense",
        STEPS,
        1.0,
        (Input("in", (2, 3, 3)),),
        (Population("a", (11,), neuron(300), 1), Population("b", (4,), neuron(100), 2)),
        (Projection("in-a", "in", "a", first), Projection("a-b", "a", "b", Dense((11,), weights(rng, 4, 11)))),
        Readout("b"),
    )


def conv_network(rng: np.random.Generator, pool: SumPool | None = None, bits: int = 1) -> ProcessGraph:
    """Stride and padding in one convolution, dilation and groups in the other; pooling, if any, before it."""
    shape: Shape = (2, 9, 8)
    first = Conv2d(shape, weights(rng, 4, 2, 3, 3), None, stride=(2, 1), padding=(1, 2))
    second = Conv2d(first.out_shape, weights(rng, 6, 2, 2, 2), pool, padding=(1, 0), dilation=(1, 2), groups=2)
    last = Dense(second.out_shape, weights(rng, 5, second.n_out))
    return ProcessGraph(
        "conv",
        STEPS,
        1.0,
        (Input("in", shape, bits),),
        (
            Population("a", first.out_shape, neuron(300 * (4 * bits - 3)), 1),
            Population("b", second.out_shape, neuron(300), 2),
            Population("c", (5,), neuron(300), 3),
        ),
        (Projection("in-a", "in", "a", first), Projection("a-b", "a", "b", second), Projection("b-c", "b", "c", last)),
        Readout("c"),
    )


def recurrent_network(rng: np.random.Generator) -> ProcessGraph:
    """A population that feeds itself, one that two feed, and a bias through the synaptic filter."""
    return ProcessGraph(
        "recurrent",
        STEPS,
        1.0,
        (Input("in", (10,)), Input("constant", (8,), constant=True)),
        (Population("a", (8,), neuron(150), 1), Population("b", (5,), neuron(100), 2)),
        (
            Projection("in-a", "in", "a", Dense((10,), weights(rng, 8, 10))),
            Projection("constant-a", "constant", "a", OneToOne((8,), rng.integers(1, 20, 8))),
            Projection("a-a", "a", "a", Dense((8,), weights(rng, 8, 8)), recurrent=True),
            Projection("a-b", "a", "b", Dense((8,), weights(rng, 5, 8))),
            Projection("in-b", "in", "b", Dense((10,), weights(rng, 5, 10)), delay=1),
        ),
        Readout("b"),
    )


CASES: dict[str, tuple[Callable[[np.random.Generator], ProcessGraph], int]] = {
    "dense": (dense_network, SAMPLES),
    "dense one by one": (dense_network, 1),
    "conv": (conv_network, SAMPLES),
    "pooled conv": (lambda rng: conv_network(rng, HALVES), SAMPLES),
    "pooled conv one by one": (lambda rng: conv_network(rng, HALVES), 1),
    "pooled conv, batches of 3": (lambda rng: conv_network(rng, HALVES), 3),
    "graded conv": (lambda rng: conv_network(rng, None, 3), SAMPLES),
    "graded conv, batches of 2": (lambda rng: conv_network(rng, HALVES, 3), 2),
    "recurrent": (recurrent_network, SAMPLES),
}


def network(case: str) -> tuple[ProcessGraph, np.ndarray, int]:
    """The graph, its inputs and the batch of a case."""
    build, batch = CASES[case]
    rng = np.random.default_rng(5)
    graph = build(rng)
    node = graph.event_inputs[0]
    rates = rng.permutation(np.linspace(0.005, 0.3, SAMPLES)).reshape(-1, *(1,) * (1 + len(node.shape)))
    payload = rng.integers(1, 1 << node.message_bits, (SAMPLES, STEPS, *node.shape))
    payload[:, ::2] = 1  # and some only ones, graded or not
    fires = rng.random(payload.shape) < rates
    return graph, np.where(fires, payload, 0), batch


# The exchange


def described(graph: ProcessGraph, batch: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A network as the runner reads it; a constant source becomes the bias of its target's first layer."""
    layers: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    biases = {p.target: p.operator.weight for p in graph.projections if p.source == "constant"}
    for projection in graph.projections:
        operator = projection.operator
        if projection.source == "constant":
            continue
        layers.append(
            operator.describe()
            | {
                "source": projection.source,
                "target": projection.target,
                "recurrent": projection.recurrent,
                "bias": projection.target in biases,
            }
        )
        index = len(layers) - 1
        arrays[f"weight{index}"] = operator.weight
        if projection.target in biases:
            arrays[f"bias{index}"] = biases.pop(projection.target)
    populations = []
    for population in graph.populations:
        assert isinstance(population.neuron, LoihiNeuron)
        parameters = {key: int(getattr(population.neuron, key)) for key in ("du", "dv", "vth")}
        populations.append({"name": population.name, "shape": population.shape} | parameters)
    return {"layers": layers, "populations": populations, "batch": batch}, arrays


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> "Answers":
    """NeuroBench's results of all cases, and the spikes that its models gave."""
    version = run_program("--version")
    if version.returncode != 0:
        words = version.stderr.strip().splitlines() or ["it said nothing"]
        pytest.skip(f"NeuroBench does not run ({words[-1]}); .ci/setup-neurobench.sh installs it")
    if version.stdout.strip() != NEUROBENCH_VERSION:
        pytest.skip(f"NeuroBench is {version.stdout.strip()}; the definitions are those of {NEUROBENCH_VERSION}")
    folder = tmp_path_factory.mktemp("neurobench")
    networks, arrays = {}, {}
    for case in CASES:
        graph, inputs, batch = network(case)
        networks[case], own = described(graph, batch)
        arrays |= {f"{case}.{key}": array for key, array in (own | {"inputs": inputs}).items()}
    np.savez(folder / "networks.npz", networks=np.array(json.dumps(networks)), **arrays)
    done = run_program(folder / "networks.npz", folder / "results.npz")
    assert done.returncode == 0, done.stderr
    with np.load(folder / "results.npz") as stored:
        spikes = {key: stored[key] for key in stored.files}
    return json.loads(str(spikes.pop("results"))), spikes


Answers = tuple[dict[str, Any], dict[str, np.ndarray]]


def counted(case: str) -> tuple[ProcessGraph, Trace, OperationCounts]:
    graph, inputs, batch = network(case)
    trace = torch_backend.run(graph, {"in": inputs}, device="cpu")
    return graph, trace, count_operations(graph, trace, {"in": inputs}, batch)


@pytest.mark.parametrize("case", CASES)
def test_operations_are_those_of_neurobench(case: str, answers: Answers) -> None:
    graph, trace, counts = counted(case)
    results, spikes = answers
    for population in graph.populations:
        fired = spikes[f"{case}.spikes.{population.name}"][:SAMPLES]
        np.testing.assert_array_equal(fired, trace.spikes(population.name))  # it is the same network
    found = results[case]["SynapticOperations"]
    expected = {key: round(value * SAMPLES) for key, value in found.items()}
    total = counts.total
    assert {
        "Dense": total.dense,
        "Effective_ACs": total.effective_acs,
        "Effective_MACs": total.effective_macs,
    } == expected
    assert (counts.dense, counts.effective_acs, counts.effective_macs) == tuple(
        found[key] for key in ("Dense", "Effective_ACs", "Effective_MACs")
    )


@pytest.mark.parametrize("case", CASES)
def test_operations_of_each_layer_are_those_of_neurobench(case: str, answers: Answers) -> None:
    graph, _, counts = counted(case)
    layers = [name for name in counts.projections if name != "constant-a"]
    expected = [
        Operations(layer["Dense"], layer["Effective_ACs"], layer["Effective_MACs"])
        for layer in answers[0][case]["layers"]
    ]
    assert [counts.projections[name] for name in layers] == expected
    assert len(layers) == len(graph.projections) - (case == "recurrent")


@pytest.mark.parametrize("case", CASES)
def test_sparsities_are_those_of_neurobench(case: str, answers: Answers) -> None:
    _, _, counts = counted(case)
    results = answers[0][case]
    assert counts.activation_sparsity == pytest.approx(results["ActivationSparsity"], rel=1e-12)
    assert round(counts.connection_sparsity, 4) == pytest.approx(results["ConnectionSparsity"], abs=1e-7)


def test_the_cases_have_what_they_are_for() -> None:
    """Spikes in every population, and both kinds of operations where pooling or payloads make MACs."""
    for case in CASES:
        graph, trace, counts = counted(case)
        assert all(0 < trace.spikes(population.name).mean() < 1 for population in graph.populations), case
        assert counts.connection_sparsity > 0.2
        assert (counts.total.effective_macs > 0) == ("pooled" in case or "graded" in case)
        assert counts.total.effective_acs > 0
    pooled = [counted(case)[2].total for case in CASES if case.startswith("pooled")]
    assert len({total.effective_macs for total in pooled}) > 1  # the batch decides
    assert len({total.effective_macs + total.effective_acs for total in pooled}) == 1
