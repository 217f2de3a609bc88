"""Rate conversion: a trained ANN becomes a spiking network whose firing rates are the ANN's activations.

Every ReLU becomes a population of integrate-and-fire neurons that stands for an activation y in 0..threshold by firing
in y / threshold of the steps; each spike carries one threshold to the layers that read it, whose weights stay those of
the ANN. The threshold is a percentile of the ReLU's activations on calibration data, of the whole layer or of each
channel (Diehl et al. 2015; Rueckauer et al. 2017). The image enters as the same current at every step. An integrator
without threshold sums up the last layer: its membrane after T steps is T times the ANN's output, and decides.

With a_t the current that arrives and h = threshold / 2, a neuron fires in step t where

    h + a_1 + ... + a_t - threshold (s_1 + ... + s_(t-1)) > threshold

so that after T steps it has fired round(sum / threshold) times; the h that it begins with turns rounding down into
rounding to nearest. There are three ways to build it:

    synapse   The current u sums up the input, and a synapse of each neuron onto itself takes one threshold away. The
              membrane only shows u in this step, so the h is a threshold that is half as high: fire where u > h. This
              runs on Loihi and Lava, whose own reset only knows zero. Their current cannot be kept entirely: u loses
              1/4096 in every step. A bias has to come through a synapse too, from a source that fires at every step.
              And u has 24 bits for the sum of all steps, that of a neuron which never fires included: the more bits a
              graded input has and the more steps a sample, the fewer are left for the weights of the first layer.
    subtract  The membrane sums up and loses one threshold at a spike. No chip and no Lava process has this reset. The
              h comes in equal parts with every step's bias.
    zero      The membrane sums up and a spike sets it to zero, as on the chip: what lay above the threshold is lost.

Max pooling is first written as linear layers and ReLUs (`spikeport.converters.max_pooling`), which are then converted
like all others.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import nir
import numpy as np
import torch

from spikeport.converters.ann import (
    INPUT,
    Affine,
    Ann,
    AveragePool,
    Convolution,
    Flatten,
    Layer,
    Matrix,
    Relu,
    Sum,
    fold_affine,
    forward,
)
from spikeport.converters.graph import MAX_MESSAGE_BITS
from spikeport.converters.max_pooling import without_max_pool
from spikeport.converters.onnx_reader import read_onnx
from spikeport.converters.operators import Shape
from spikeport.models.errors import GraphError

NeuronKind = Literal["synapse", "subtract", "zero"]

DT = 1e-3
KEPT_STEPS = 4096
"""Time constant, in steps, of the longest memory that a current has on the chip (`ds_offset` 1)."""

CALIBRATION_BATCH = 250


@dataclass(frozen=True)
class Conversion:
    """How an ANN is converted.

    steps: length of a sample, T. message_bits: bits of the input's payload, the same value at every step; 1 for
    rate-coded binary spikes. With 4 bits and the neuron "synapse", the first layer keeps 8-bit weights over 32 steps.
    percentile: of the activations, becomes the threshold. per_channel: a threshold for each channel of an image and
    each element of a vector, else one for the layer. mean, std: the ANN takes (x - mean) / std for images x in 0..1,
    each a number for every channel or one for all.
    """

    steps: int
    neuron: NeuronKind = "synapse"
    message_bits: int = 4
    percentile: float = 99.9
    per_channel: bool = True
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


def convert_onnx(path: Path, calibration: np.ndarray, settings: Conversion) -> nir.NIRGraph:
    """`convert` the ANN of an .onnx file (`spikeport.converters.onnx_reader`)."""
    return convert(read_onnx(path), calibration, settings)


def convert(ann: Ann, calibration: np.ndarray, settings: Conversion) -> nir.NIRGraph:
    """The spiking network as a NIR graph, to be lowered like any other.

    Args:
        calibration: images (n, *input_shape) in 0..1, as the encoder will get them.

    Raises GraphError naming the layer that has no spiking form, and what to do instead.
    """
    _check(settings)
    if not len(calibration):
        raise GraphError(f"there are no calibration data to balance the thresholds of {ann.name} on.")
    if calibration.shape[1:] != ann.input_shape:
        found = calibration.shape[1:]
        raise GraphError(f"{ann.name} takes inputs of the shape {ann.input_shape}; the calibration data have {found}.")
    ann = fold_affine(without_max_pool(normalised(ann, settings)))
    thresholds = balance_thresholds(ann, calibration, settings)
    if settings.neuron == "subtract":
        ann = fold_affine(_with_shift(ann, thresholds, settings.steps))
    return _to_nir(ann, thresholds, settings)


def balance_thresholds(ann: Ann, calibration: np.ndarray, settings: Conversion) -> dict[str, np.ndarray]:
    """The threshold of each ReLU, in units of its activations: (channels,), or () of a whole layer.

    A channel whose percentile is 0 takes its largest activation; one that is never active takes the layer's.
    """
    relus = [layer.name for layer in ann.layers if isinstance(layer, Relu)]
    top: dict[str, np.ndarray] = {}
    for start in range(0, len(calibration), CALIBRATION_BATCH):
        x = torch.as_tensor(calibration[start : start + CALIBRATION_BATCH], dtype=torch.float64)
        with torch.no_grad():
            found = forward(ann, x, relus)
        for name in relus:
            values = found[name].transpose(0, 1).flatten(1).numpy()
            values = values if settings.per_channel else values.reshape(1, -1)
            kept = 1 + math.floor((1 - settings.percentile / 100) * values.shape[1] / len(x) * len(calibration))
            top[name] = _largest(np.concatenate([top.get(name, values[:, :0]), values], axis=1), kept)
    thresholds = {}
    for name, values in top.items():
        largest = values.max(axis=1)
        if not np.isfinite(largest).all():
            raise GraphError(f"layer {name!r} has activations that are NaN or infinite on the calibration data.")
        if not largest.any():
            raise GraphError(f"layer {name!r} is never active on the calibration data; its threshold cannot be set.")
        balanced = np.where(values.min(axis=1) > 0, values.min(axis=1), largest)
        balanced = np.where(balanced > 0, balanced, balanced.max())
        thresholds[name] = balanced if settings.per_channel else balanced.reshape(())
    return thresholds


def _largest(values: np.ndarray, kept: int) -> np.ndarray:
    """The `kept` largest values of each row."""
    if values.shape[1] <= kept:
        return values
    return np.partition(values, -kept, axis=1)[:, -kept:]


def _check(settings: Conversion) -> None:
    if settings.steps < 1:
        raise GraphError(f"a sample of {settings.steps} steps is not possible; give at least one.")
    if not 1 <= settings.message_bits <= MAX_MESSAGE_BITS:
        raise GraphError(f"message_bits = {settings.message_bits} is not in 1..{MAX_MESSAGE_BITS}.")
    if not 0 < settings.percentile <= 100:
        raise GraphError(f"percentile = {settings.percentile} is not in 0..100.")
    if not all(std > 0 for std in settings.std):
        raise GraphError(f"std = {settings.std} must be positive.")


def normalised(ann: Ann, settings: Conversion) -> Ann:
    """The ANN on images in 0..1, which it takes as (x - mean) / std."""
    channels = ann.input_shape[0]
    try:
        mean, std = (
            np.broadcast_to(np.asarray(values, np.float64), channels) for values in (settings.mean, settings.std)
        )
    except ValueError:
        raise GraphError(
            f"mean {settings.mean} and std {settings.std} do not fit the {channels} channels of {ann.name}."
        ) from None
    if not mean.any() and (std == 1).all():
        return ann
    name = _unused("normalisation", ann)
    first = Affine(name, (INPUT,), ann.input_shape, 1 / std, -mean / std)
    rest = (_reading(layer, {INPUT: name}) for layer in ann.layers)
    return replace(ann, layers=(first, *rest), output=name if ann.output == INPUT else ann.output)


def _with_shift(ann: Ann, thresholds: dict[str, np.ndarray], steps: int) -> Ann:
    """Half a threshold more over all steps, in front of every ReLU."""
    layers: list[Layer] = []
    for layer in ann.layers:
        if isinstance(layer, Relu):
            name = _unused(f"{layer.name}_shift", ann)
            channels = layer.shape[0]
            shift = np.broadcast_to(thresholds[layer.name] / (2 * steps), channels)
            layers.append(Affine(name, layer.inputs, layer.shape, np.ones(channels), shift))
            layer = replace(layer, inputs=(name,))
        layers.append(layer)
    return replace(ann, layers=tuple(layers))


def _reading(layer: Layer, renamed: dict[str, str]) -> Layer:
    return replace(layer, inputs=tuple(renamed.get(name, name) for name in layer.inputs))


def _unused(name: str, ann: Ann) -> str:
    taken = {layer.name for layer in ann.layers} | {INPUT}
    while name in taken:
        name += "_"
    return name


# ---- NIR ------------------------------------------------------------------------------------------------------------


def _to_nir(ann: Ann, thresholds: dict[str, np.ndarray], settings: Conversion) -> nir.NIRGraph:
    writer = _Writer(ann, settings)
    for layer in ann.layers:
        writer.add(layer, thresholds)
    return writer.finished()


class _Writer:
    """Writes layers as NIR nodes. `ends` has, by layer, the nodes whose sum is the layer's output."""

    def __init__(self, ann: Ann, settings: Conversion) -> None:
        self.ann, self.settings = ann, settings
        self.nodes: dict[str, nir.NIRNode] = {"input": nir.Input({"input": np.array(ann.input_shape)})}
        self.edges: list[tuple[str, str]] = []
        unit = 1 / ((1 << settings.message_bits) - 1)
        scaled = (
            self.node("input_scale", nir.Scale(np.full(ann.input_shape, unit)), ["input"]) if unit != 1 else "input"
        )
        self.ends = {INPUT: [scaled]}

    def node(self, name: str, node: nir.NIRNode, sources: Iterable[str]) -> str:
        """Add a node under a name that a file can hold."""
        name = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_") or "layer"
        while name in self.nodes or name == "output":
            name += "_"
        self.nodes[name] = node
        self.edges += [(source, name) for source in sources]
        return name

    def add(self, layer: Layer, thresholds: dict[str, np.ndarray]) -> None:
        sources = [end for name in layer.inputs for end in self.ends[name]]
        in_shape = self.ann.shape_of(layer.inputs[0])
        match layer:
            case Sum():
                self.ends[layer.name] = self._once(layer, sources)
                return
            case Relu():
                self.ends[layer.name] = [self._neurons(layer, thresholds[layer.name], sources)]
                return
            case Flatten() if len(in_shape) == 1:
                self.ends[layer.name] = sources
                return
        self.ends[layer.name] = [self.node(layer.name, _linear(layer, in_shape), sources)]

    def _once(self, layer: Layer, sources: list[str]) -> list[str]:
        """Each source once: an edge that is there twice is written as a factor of 2."""
        times = {source: sources.count(source) for source in sources}
        return [
            source
            if n == 1
            else self.node(f"{layer.name}_times{n}", nir.Scale(np.full(layer.shape, float(n))), [source])
            for source, n in times.items()
        ]

    def _neurons(self, layer: Layer, threshold: np.ndarray, sources: list[str]) -> str:
        """Neurons, the synapse onto themselves if they need one, and what a spike stands for; returns the last."""
        full = np.array(_spread(threshold, layer.shape))
        kind = self.settings.neuron
        metadata = {"dt": DT, "discretization": "euler", "reset": "subtract" if kind == "subtract" else "zero"}
        rest = np.zeros(layer.shape)
        if kind == "synapse":
            node = nir.CubaLIF(
                tau_syn=np.full(layer.shape, KEPT_STEPS * DT),
                tau_mem=np.full(layer.shape, DT),
                r=np.ones(layer.shape),
                v_leak=rest,
                v_threshold=full / 2,
                v_reset=rest,
                w_in=np.full(layer.shape, float(KEPT_STEPS)),
                metadata=metadata,
            )
        else:
            node = nir.IF(r=np.full(layer.shape, 1 / DT), v_threshold=full, v_reset=rest, metadata=metadata)
        name = self.node(layer.name, node, sources)
        if kind == "synapse":
            loop = self.node(f"{name}_loop", nir.Scale(-full), [name])
            self.edges.append((loop, name))
        return self.node(f"{name}_scale", nir.Scale(full), [name])

    def finished(self) -> nir.NIRGraph:
        shape = self.ann.shape_of(self.ann.output)
        node = nir.I(r=np.full(shape, 1 / DT), metadata={"dt": DT, "discretization": "euler"})
        last = self.node("readout", node, self.ends[self.ann.output])
        self.nodes["output"] = nir.Output({"output": np.array(shape)})
        self.edges.append((last, "output"))
        settings = self.settings
        metadata = {"steps": settings.steps, "readout": "membrane", "message_bits": settings.message_bits}
        # no type check: nir 1.0.8 takes the channels of a group for those of the image, and kernels to be square
        return nir.NIRGraph(nodes=self.nodes, edges=self.edges, metadata=metadata, type_check=False)


def _linear(layer: Layer, in_shape: Shape) -> nir.NIRNode:
    match layer:
        case Convolution():
            return nir.Conv2d(
                input_shape=in_shape[1:],
                weight=layer.weight,
                stride=layer.stride,
                padding=layer.padding,
                dilation=layer.dilation,
                groups=layer.groups,
                bias=layer.bias,
            )
        case Matrix():
            return nir.Affine(layer.weight, layer.bias) if layer.bias.any() else nir.Linear(layer.weight)
        case Affine():
            if not layer.shift.any():
                return nir.Scale(np.array(_spread(layer.factor, layer.shape)))
            if len(layer.shape) == 1:
                return nir.Affine(np.diag(layer.factor), layer.shift)
            ones = (1, 1)
            return nir.Conv2d(
                layer.shape[1:], layer.factor.reshape(-1, 1, 1, 1), ones, (0, 0), ones, layer.shape[0], layer.shift
            )
        case AveragePool():
            return nir.AvgPool2d(np.array(layer.kernel), np.array(layer.stride), padding=np.array([0, 0]))
        case Flatten():
            return nir.Flatten(input_type={"input": np.array(in_shape)}, start_dim=0, end_dim=-1)
    raise TypeError(f"no NIR node for a {type(layer).__name__}.")


def _spread(values: np.ndarray, shape: Shape) -> np.ndarray:
    """One value for all, or one a channel, as an array of the whole shape."""
    return np.broadcast_to(values.reshape(-1, *[1] * (len(shape) - 1)), shape)
