"""Writing a trained network as NIR, with dt, reset mode and discretisation in every neuron's metadata."""

from pathlib import Path
from typing import Any

import nir
import numpy as np

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.files import atomic_path
from spikeport.models.networks import LayerSpec, SpikingNetwork

DISCRETIZATION = "euler"


def to_nir(network: SpikingNetwork, dt: float, steps: int, message_bits: int = 1) -> nir.NIRGraph:
    """The network as a NIR graph.

    Args:
        dt: seconds of one step; time constants in steps become seconds.
        steps: length of a sample, recorded for readers that need it.
        message_bits: bits of the input's payload, 1 for binary spikes.

    NIR has no field for dt, reset mode or readout: each neuron's metadata carries `dt`, `reset` and `discretization`,
    the graph's metadata `steps`, `readout`, `readout_keep` and `message_bits`.
    """
    nodes: dict[str, nir.NIRNode] = {"input": nir.Input({"input": np.array(network.specs[0].in_shape)})}
    edges: list[tuple[str, str]] = []

    def append(name: str, node: nir.NIRNode) -> None:
        edges.append((next(reversed(nodes)), name))
        nodes[name] = node

    if network.input_unit != 1.0:
        unit = np.full(network.specs[0].in_shape, network.input_unit, dtype=np.float64)
        append("input_scale", nir.Scale(scale=unit))
    for spec in network.specs:
        weight = network.weight(spec.name).numpy()
        if spec.pool > 1:
            side = np.array([spec.pool, spec.pool])
            append(f"{spec.name}_pool", nir.SumPool2d(kernel_size=side, stride=side, padding=np.array([0, 0])))
        if spec.kind == "conv":
            append(f"{spec.name}_weight", _conv(spec, weight))
        else:
            if len(spec.in_shape) > 1:
                shape = {"input": np.array(spec.pooled_shape)}
                append(f"{spec.name}_flatten", nir.Flatten(input_type=shape, start_dim=0, end_dim=-1))
            append(f"{spec.name}_weight", nir.Linear(weight=weight))
        append(spec.name, _neurons(network.neuron, spec.out_shape, dt))
    append("output", nir.Output({"output": np.array(network.specs[-1].out_shape)}))
    metadata = {
        "steps": steps,
        "readout": "psc",
        "readout_keep": network.neuron.current_keep,
        "message_bits": message_bits,
    }
    return nir.NIRGraph(nodes=nodes, edges=edges, metadata=metadata)


def write_nir(graph: nir.NIRGraph, path: Path) -> None:
    """Write a NIR graph to a file, whole or not at all."""
    with atomic_path(path) as temporary:
        nir.write(temporary, graph)


def _conv(spec: LayerSpec, weight: np.ndarray) -> nir.Conv2d:
    height, width = spec.pooled_shape[1:]
    return nir.Conv2d(
        input_shape=(height, width),
        weight=weight,
        stride=(spec.stride, spec.stride),
        padding=(spec.padding, spec.padding),
        dilation=(1, 1),
        groups=1,
        bias=np.zeros(weight.shape[0], weight.dtype),
    )


def _neurons(neuron: CubaLIF, shape: tuple[int, ...], dt: float) -> nir.CubaLIF:
    """u and v of `spikeport.models.cuba_lif` are NIR's I and v in Euler steps: w_in = 1 and r = tau_mem / dt."""

    def full(value: float) -> np.ndarray:
        return np.full(shape, value, dtype=np.float64)

    metadata: dict[str, Any] = {"dt": dt, "reset": neuron.reset, "discretization": DISCRETIZATION}
    return nir.CubaLIF(
        tau_syn=full(neuron.tau_syn * dt),
        tau_mem=full(neuron.tau_mem * dt),
        r=full(neuron.tau_mem),
        v_leak=full(0.0),
        v_threshold=full(neuron.threshold),
        v_reset=full(0.0),
        w_in=full(1.0),
        metadata=metadata,
    )
