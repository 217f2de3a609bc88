"""Converted ANNs on Lava: its neurons only reset to zero, and a synapse makes them subtract, spike for spike."""

import sys
from pathlib import Path

import numpy as np
import pytest

from spikeport.converters.lower import lower
from spikeport.converters.onnx_reader import read_onnx
from spikeport.converters.quantize import quantize
from spikeport.converters.rate_conversion import Conversion, NeuronKind, convert
from spikeport.deploy import lava_backend, torch_backend
from spikeport.deploy.verify import compare

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from onnx_models import Builder

STEPS = 6


def residual_network() -> Builder:
    """Convolutions with a shortcut, average and max pooling, biases."""
    rng = np.random.default_rng(0)
    made = Builder((2, 6, 6))
    weights = [made.array(rng.normal(0.1, 0.3, (2, 2, 3, 3))) for _ in range(2)]
    bias = made.array([0.1, -0.2])
    made.add("Conv", weights[0], bias, pads=[1, 1, 1, 1])
    short = made.add("Relu")
    made.add("Conv", weights[1], bias, pads=[1, 1, 1, 1])
    made.add("Add", short)
    made.add("Relu")
    made.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2], shape=(2, 3, 3))
    made.add("Flatten", shape=(18,))
    made.add("Gemm", made.array(rng.normal(0, 0.5, (18, 3))), made.array([0.3, 0.0, -0.1]), shape=(3,))
    return made


@pytest.mark.usefixtures("lava_python")
@pytest.mark.parametrize("neuron", ["synapse", "zero"])
def test_lava_runs_converted_networks_spike_for_spike(neuron: NeuronKind, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    ann = read_onnx(residual_network().save(tmp_path / "network.onnx"))
    images = rng.integers(0, 256, (20, 2, 6, 6)).astype(np.uint8)
    graph = lower(convert(ann, images / 255, Conversion(STEPS, neuron, message_bits=8)), "network")
    inputs = {"input": np.repeat(images[:, None], STEPS, axis=1)}
    integer, _ = quantize(graph, {"input": inputs["input"][:8]})
    few = {"input": inputs["input"][:3]}
    reference, lava = torch_backend.run(integer, few), lava_backend.run(integer, few, timeout_s=120)
    comparison = compare(integer, reference, lava, few)
    assert comparison.equal, str(comparison)
    assert sum(int(reference.spikes(population.name).sum()) for population in integer.populations) > 100
