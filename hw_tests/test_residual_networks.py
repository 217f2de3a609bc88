"""Residual networks on Lava: shortcuts of spikes and membranes, levels and pooling neurons, spike for spike."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spikeport.converters.lower import lower
from spikeport.converters.nir_writer import to_nir
from spikeport.converters.quantize import quantize
from spikeport.deploy import lava_backend, torch_backend
from spikeport.deploy.verify import compare

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from network_examples import network, settled

STEPS = 4
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # every level is a population, and each of them a process of the system
    "spike addition, levels": ("R2-A-3", {"block": "spike-add", "levels": (0.5,)}),
    "early, pooling neurons": ("2C3p1-P2-R2-A-3", {"block": "early", "pool": "neurons", "pool_threshold": 0.6}),
    "membrane, read from an integrator": ("2C3p1-P2-R2-A-3", {"block": "membrane", "output": "membrane"}),
}


def spikes(samples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (samples, STEPS, 2, 6, 6)).astype(np.uint8)


@pytest.mark.usefixtures("lava_python")
@pytest.mark.parametrize(("architecture", "settings"), CASES.values(), ids=CASES.keys())
def test_lava_runs_residual_networks_spike_for_spike(architecture: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    given = {"norm": "tdbn", "tau_syn": 1.0, "tau_mem": 2.0, "threshold": 0.3, "steps": STEPS} | settings
    built = network(architecture, (2, 6, 6), 3, **given)
    settled(built, torch.as_tensor(spikes(6, 0), dtype=torch.float64).transpose(0, 1))
    graph, _ = quantize(lower(to_nir(built, 1e-3, STEPS), "network"), {"input": spikes(8, 1)})
    inputs = {"input": spikes(3, 2)}
    reference, lava = torch_backend.run(graph, inputs), lava_backend.run(graph, inputs, timeout_s=120)
    comparison = compare(graph, reference, lava, inputs)
    assert comparison.equal, str(comparison)
    assert sum(int(reference.spikes(population.name).sum()) for population in graph.populations) > 50
