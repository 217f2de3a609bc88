"""Writing a trained network as NIR, with dt, reset mode and discretisation in every neuron's metadata.

What NIR has no node for is written by its parts: a normalisation inside the convolution before it, a sum as several
edges into one node, and a multi-level population as one population a level, with the same edges in and out. Dropout
leaves nothing behind.
"""

import math
from pathlib import Path
from typing import Any

import nir
import numpy as np

from spikeport.models.architectures import (
    Add,
    Convolution,
    Dense,
    Dropout,
    Flatten,
    Neurons,
    Node,
    Norm,
    Pool,
    Shape,
    Source,
)
from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.files import atomic_path
from spikeport.models.networks import SpikingNetwork, TdBatchNorm
from spikeport.models.readouts import ReadoutKind

DISCRETIZATION = "euler"

NO_LEAK = 2.0**60
"""Time constant, in steps, of a membrane without leak behind a synaptic filter: 1 - 1/NO_LEAK is 1 in 64 bits."""


def to_nir(
    network: SpikingNetwork, dt: float, steps: int, message_bits: int = 1, readout: ReadoutKind | None = None
) -> nir.NIRGraph:
    """The network as a NIR graph.

    Args:
        dt: seconds of one step; time constants in steps become seconds.
        steps: length of a sample, recorded for readers that need it.
        message_bits: bits of the input's payload, 1 for binary spikes.
        readout: how a decision is read; by default from the membrane of an output that integrates, else psc.

    NIR has no field for dt, reset mode or readout: each neuron's metadata carries `dt`, `reset` and `discretization`,
    the graph's metadata `steps`, `readout`, `readout_keep` and `message_bits`.
    """
    output = network.populations[network.output]
    nodes: dict[str, nir.NIRNode] = {"input": nir.Input({"input": np.array(network.in_shape)})}
    edges: list[tuple[str, str]] = []
    ends: dict[str, list[str]] = {"input": ["input"]}
    """The NIR nodes whose sum is what leaves a node of the network."""

    def append(name: str, node: nir.NIRNode, sources: list[str]) -> None:
        edges.extend((source, name) for source in sources)
        nodes[name] = node

    if network.input_unit != 1.0:
        unit = np.full(network.in_shape, network.input_unit, dtype=np.float64)
        append("input_scale", nir.Scale(scale=unit), ["input"])
        ends["input"] = ["input_scale"]
    normalised = {node.inputs[0]: node for node in network.nodes if isinstance(node, Norm)}
    for node in network.nodes:
        sources = [end for name in node.inputs for end in ends[name]]
        match node:
            case Source():
                continue
            case Add() | Norm() | Dropout():
                ends[node.name] = sources
                continue
            case Neurons():
                for name, made in zip(level_names(node), _neurons(node, dt), strict=True):
                    append(name, made, sources)
                ends[node.name] = level_names(node)
                continue
            case Convolution():
                append(node.name, _conv(network, node, normalised.get(node.name)), sources)
            case _:
                append(node.name, _linear(network, node), sources)
        ends[node.name] = [node.name]
    append("output", nir.Output({"output": np.array(output.shape)}), [network.output])
    metadata = {
        "steps": steps,
        "readout": readout or ("membrane" if output.integrates else "psc"),
        "readout_keep": network.neuron.current_keep,
        "message_bits": message_bits,
    }
    return nir.NIRGraph(nodes=nodes, edges=edges, metadata=metadata)


def level_names(population: Neurons) -> list[str]:
    """Names of the populations that a population becomes on the chip: its own, or one for each of its levels."""
    levels = len(population.neuron.thresholds)
    if levels == 1 or population.integrates:
        return [population.name]
    return [f"{population.name}_level{level}" for level in range(1, levels + 1)]


def write_nir(graph: nir.NIRGraph, path: Path) -> None:
    """Write a NIR graph to a file, whole or not at all."""
    with atomic_path(path) as temporary:
        nir.write(temporary, graph)


def _array(network: SpikingNetwork, name: str, parameter: str) -> np.ndarray:
    array: np.ndarray = network.maps[name].get_parameter(parameter).detach().cpu().contiguous().numpy()
    return array


def _conv(network: SpikingNetwork, node: Convolution, norm: Norm | None) -> nir.Conv2d:
    weight = _array(network, node.name, "weight")
    bias = _array(network, node.name, "bias") if node.bias else np.zeros(weight.shape[0], weight.dtype)
    if norm is not None:
        module = network.maps[norm.name]
        assert isinstance(module, TdBatchNorm)
        factor, shift = (value.cpu().numpy() for value in module.factor_and_shift())
        weight, bias = weight * factor[:, None, None, None], bias * factor + shift
    return nir.Conv2d(
        input_shape=(node.in_shape[1], node.in_shape[2]),
        weight=weight,
        stride=(node.stride, node.stride),
        padding=(node.padding, node.padding),
        dilation=(1, 1),
        groups=1,
        bias=bias,
    )


def _linear(network: SpikingNetwork, node: Node) -> nir.NIRNode:
    match node:
        case Dense():
            weight = _array(network, node.name, "weight")
            return nir.Affine(weight, _array(network, node.name, "bias")) if node.bias else nir.Linear(weight)
        case Pool():
            pooling = node.pooling
            kind = nir.AvgPool2d if pooling.average else nir.SumPool2d
            return kind(np.array(pooling.kernel), np.array(pooling.stride), padding=np.array([0, 0]))
        case Flatten():
            source = next(other for other in network.nodes if other.name == node.inputs[0])
            return nir.Flatten(input_type={"input": np.array(source.shape)}, start_dim=0, end_dim=-1)
    raise TypeError(f"no NIR node for a {type(node).__name__}.")


def _neurons(node: Neurons, dt: float) -> list[nir.NIRNode]:
    """One NIR node for each level; u and v of `spikeport.models.cuba_lif` are NIR's I and v in Euler steps."""
    metadata: dict[str, Any] = {"dt": dt, "discretization": DISCRETIZATION}
    if node.integrates:
        return [_dynamics(node.neuron, node.shape, dt, metadata, None)]
    metadata["reset"] = node.neuron.reset
    return [_dynamics(node.neuron, node.shape, dt, metadata, level) for level in node.neuron.thresholds]


def _dynamics(
    neuron: CubaLIF, shape: Shape, dt: float, metadata: dict[str, Any], threshold: float | None
) -> nir.NIRNode:
    """IF where nothing leaks, else CubaLIF with w_in = 1 and r = tau_mem / dt; I and CubaLI without a threshold."""

    def full(value: float) -> np.ndarray:
        return np.full(shape, value, dtype=np.float64)

    fires = {} if threshold is None else {"v_threshold": full(threshold), "v_reset": full(0.0)}
    if neuron.tau_syn == 1 and math.isinf(neuron.tau_mem):
        kind = nir.I if threshold is None else nir.IF
        return kind(r=full(reciprocal(dt)), metadata=metadata, **fires)
    tau_mem = min(neuron.tau_mem, NO_LEAK)
    constants = {"tau_syn": neuron.tau_syn * dt, "tau_mem": tau_mem * dt, "r": tau_mem, "v_leak": 0.0, "w_in": 1.0}
    kind = nir.CubaLI if threshold is None else nir.CubaLIF
    return kind(**{key: full(value) for key, value in constants.items()}, metadata=metadata, **fires)


def reciprocal(dt: float) -> float:
    """1 / dt, rounded such that its product with dt is 1: membranes that meet their threshold exactly must not fire."""
    near = (1 / dt, math.nextafter(1 / dt, math.inf), math.nextafter(1 / dt, 0.0))
    return next((value for value in near if value * dt == 1.0), near[0])
