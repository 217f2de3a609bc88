"""Residual networks to the chip: what is trained, what is read back from NIR, and what every backend runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph_strategies import one_thread  # noqa: F401
from network_examples import network, settled

from spikeport.converters.graph import ProcessGraph
from spikeport.converters.lower import lower
from spikeport.converters.nir_reader import read_nir
from spikeport.converters.nir_writer import level_names, to_nir, write_nir
from spikeport.converters.operators import Conv2d, OneToOne
from spikeport.converters.quantize import quantize
from spikeport.converters.reference import Reference
from spikeport.deploy import event_simulator, torch_backend
from spikeport.deploy.verify import compare
from spikeport.models.networks import SpikingNetwork

STEPS = 5
SHAPE = (2, 8, 8)
DT = 1e-3
BLOCKS = ("spike-add", "early", "membrane")
PLAIN: dict[str, Any] = {"tau_syn": 1.0, "tau_mem": 2.0, "threshold": 0.3, "steps": STEPS}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normalised": {"norm": "tdbn"},
    "levels": {"norm": "tdbn", "levels": (0.5, 0.7), "tau_mem": 4 / 3},
    "levels, membrane": {"levels": (0.6,), "output": "membrane", "bias": True},
    "pooling neurons": {"norm": "tdbn", "pool": "neurons", "pool_threshold": 0.6, "dropout": 0.3, "leak": False},
    "filtered": {"norm": "tdbn", "tau_syn": 2.5, "reset": "subtract", "pool": "average"},
    "filtered, membrane": {"tau_syn": 2.0, "bias": True, "output": "membrane", "leak": False},
}
AFTER_A_CONVOLUTION, AT_THE_INPUT = "3C3p1-R3-P2-R4s2-A-3", "R3-R4s2-3"
READ_BACK = [(AFTER_A_CONVOLUTION, case) for case in SETTINGS] + [
    (AT_THE_INPUT, case) for case in ("normalised", "levels, membrane")
]
QUANTISED: dict[str, tuple[str, dict[str, Any]]] = {
    # every level of a neuron is a population, whose scale is searched: small networks
    "levels": ("2C3p1-P2-R2-A-3", SETTINGS["levels"] | {"levels": (0.5,)}),
    "levels, membrane": ("2C3p1-P2-R3s2-A-3", SETTINGS["levels, membrane"]),
    "pooling neurons": ("2C3p1-P2-R2-R3s2-A-3", SETTINGS["pooling neurons"]),
    "filtered": ("2C3p1-P2-R2-R3s2-A-3", SETTINGS["filtered"]),
}


def spikes(samples: int, in_shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """Random inputs (samples, steps, *in_shape)."""
    return np.random.default_rng(seed).integers(0, 2, (samples, STEPS, *in_shape)).astype(np.uint8)


def made(architecture: str, seed: int = 0, **settings: Any) -> SpikingNetwork:
    torch.manual_seed(seed)
    built = network(architecture, SHAPE, 3, **(PLAIN | settings))
    return settled(built, torch.as_tensor(spikes(6, seed=seed), dtype=torch.float64).transpose(0, 1), seed)


def lowered(built: SpikingNetwork) -> ProcessGraph:
    return lower(to_nir(built, DT, STEPS), "network")


@pytest.mark.parametrize(("architecture", "case"), READ_BACK)
@pytest.mark.parametrize("block", BLOCKS)
def test_what_is_read_back_fires_as_the_network_did(block: str, architecture: str, case: str, tmp_path: Path) -> None:
    built = made(architecture, block=block, **SETTINGS[case])
    inputs = spikes(5, seed=1)
    with torch.no_grad():
        expected = built(torch.as_tensor(inputs, dtype=torch.float64).transpose(0, 1))
    write_nir(to_nir(built, DT, STEPS), tmp_path / "network.nir")
    run = Reference(lower(read_nir(tmp_path / "network.nir"), "network")).run({"input": inputs})
    assert sorted(run.spikes) == sorted(name for node in built.populations.values() for name in level_names(node))
    busy = 0
    for name, node in built.populations.items():
        if node.integrates:
            assert run.membrane is not None
            torch.testing.assert_close(run.membrane, expected[name][-1], rtol=1e-9, atol=1e-12)
            continue
        total = torch.stack([run.spikes[level] for level in level_names(node)]).sum(dim=0)
        assert torch.equal(total.double(), expected[name].transpose(0, 1)), name
        busy += bool(0.02 < float(expected[name].mean()) / len(node.neuron.thresholds) < 0.98)
    assert busy > len(built.populations) / 2  # the others are silent or always on


@pytest.mark.parametrize("case", QUANTISED)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_backend_runs_the_quantised_network_alike(block: str, case: str) -> None:
    architecture, settings = QUANTISED[case]
    graph = lowered(made(architecture, block=block, **settings))
    integer, report = quantize(graph, {"input": spikes(6, seed=2)})
    assert all(layer.spike_error < 0.15 for layer in report.layers)
    inputs = {"input": spikes(4, seed=3)}
    reference, events = torch_backend.run(integer, inputs), event_simulator.run(integer, inputs)
    comparison = compare(integer, reference, events, inputs)
    assert comparison.equal, str(comparison)
    fired = sum(int(reference.spikes(population.name).sum()) for population in integer.populations)
    assert fired > 100


def test_a_block_that_adds_next_to_nothing_is_quantised() -> None:
    """The second gain of a membrane block starts at zero: weights far below those of the shortcut, beside a bias."""
    built = made("3C3p1-R3-A-3", block="membrane", norm="tdbn")
    norm = built.maps["block1_2_norm"]
    with torch.no_grad():
        norm.get_parameter("weight").fill_(2e-3)
        norm.get_parameter("bias").fill_(1.0)
    graph = lowered(built)
    peaks = {p.source: float(np.abs(p.operator.weight).max()) for p in graph.incoming("block1_out")}
    assert peaks["input"] > 200 * peaks["block1_2"] > 0
    _, report = quantize(graph, {"input": spikes(6, seed=2)})
    assert {layer.population: layer.spike_error < 0.02 for layer in report.layers}["block1_out"]


def test_a_shortcut_of_spikes_is_one_to_one_and_waits() -> None:
    graph = lowered(made("3C3p1-R3-A-3", block="early"))
    shortcut = next(p for p in graph.projections if p.name == "conv1->block1_2")
    assert isinstance(shortcut.operator, OneToOne)
    assert shortcut.operator.weight.tolist() == [1.0] * 192
    assert shortcut.delay == 1


def test_sums_of_spikes_share_the_weights_of_the_convolution_behind() -> None:
    graph = lowered(made("3C3p1-R3-R3-A-3", block="spike-add"))
    into = {p.source: p.operator for p in graph.incoming("block2_1")}
    assert set(into) == {"conv1", "block1_2"}
    assert into["conv1"].weight is into["block1_2"].weight


def test_membrane_shortcuts_keep_shared_weights_through_every_halving() -> None:
    graph = lowered(made("3C3p1-R3-R4s2-R4s2-3", block="membrane", norm="tdbn"))
    into = {p.source: p.operator for p in graph.incoming("block3_out")}
    assert set(into) == {"input", "block1_2", "block2_2", "block3_2"}
    assert all(isinstance(operator, Conv2d) for operator in into.values())
    kernels = {name: operator.weight.shape[2:] for name, operator in into.items()}
    assert kernels == {"input": (6, 6), "block1_2": (6, 6), "block2_2": (4, 4), "block3_2": (3, 3)}
