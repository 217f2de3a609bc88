"""What NIR has and our own networks do not, on Lava: delays as relays, convolutions along one axis, thresholds."""

import itertools
from pathlib import Path

import nir
import numpy as np
import pytest

from spikeport.converters.lower import lower
from spikeport.converters.quantize import quantize
from spikeport.deploy import lava_backend, torch_backend
from spikeport.deploy.verify import compare

pytestmark = pytest.mark.oracle

STEPS = 10


def network() -> nir.NIRGraph:
    """Conv1d, LIF, a delay of three steps beside a straight way, Threshold, and an input that is delayed as well."""
    rng = np.random.default_rng(0)

    def lif(*shape: int) -> nir.LIF:
        return nir.LIF(*(np.full(shape, value) for value in (3.0, 3.0, 0.0, 0.5)))

    nodes: dict[str, nir.NIRNode] = {
        "in": nir.Input({"input": np.array([2, 6])}),
        "conv": nir.Conv1d(6, rng.normal(0.3, 1, (3, 2, 3)), 1, 1, 1, 1, np.zeros(3)),
        "a": lif(3, 6),
        "flat": nir.Flatten({"input": np.array([3, 6])}, 0, -1),
        "late": nir.Delay(np.full(18, 3.0)),
        "w": nir.Linear(rng.normal(0.1, 0.4, (4, 18))),
        "t": nir.Threshold(np.full(4, 0.3)),
        "out": nir.Output({"output": np.array([4])}),
        "wait": nir.Delay(np.full((2, 6), 2.0)),
        "side": nir.Flatten({"input": np.array([2, 6])}, 0, -1),
        "v": nir.Linear(rng.normal(0.1, 0.4, (4, 12))),
    }
    edges = list(itertools.pairwise(list(nodes)[:8]))
    edges += [("flat", "w"), ("in", "wait"), ("wait", "side"), ("side", "v"), ("v", "t")]
    return nir.NIRGraph(nodes, edges, {"dt": 1.0, "reset": "zero", "steps": STEPS}, type_check=False)


def test_delays_and_thresholds_are_spike_for_spike(lava_python: Path) -> None:
    inputs = {"in": (np.random.default_rng(1).random((3, STEPS, 2, 6)) < 0.4).astype(np.uint8)}
    integer, _ = quantize(lower(network(), "delays"), inputs)
    assert sum(".after" in population.name for population in integer.populations) == 4
    expected = torch_backend.run(integer, inputs)
    assert expected.spikes("t").mean() > 0.05
    comparison = compare(integer, expected, lava_backend.run(integer, inputs))
    assert comparison.equal, str(comparison)
