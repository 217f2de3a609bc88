"""A trained artificial neural network as a list of layers: what the ONNX reader makes and rate conversion takes.

Shapes have no batch dimension: (features,) or (channels, height, width). Every layer names the layers whose outputs it
takes; `INPUT` is the network's own input. All arrays are float64.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from spikeport.converters.operators import Pair, Shape

INPUT = "input"


@dataclass(frozen=True, eq=False)
class Layer:
    """One operation. `shape` is that of its output."""

    name: str
    inputs: tuple[str, ...]
    shape: Shape


@dataclass(frozen=True, eq=False)
class Convolution(Layer):
    """Cross-correlation. weight: (out channels, in channels / groups, height, width); bias: (out channels,)."""

    weight: np.ndarray
    bias: np.ndarray
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Matrix(Layer):
    """y = weight x + bias. weight: (out, in); bias: (out,)."""

    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True, eq=False)
class Affine(Layer):
    """y = factor x + shift, one of each for a channel of an image or an element of a vector: (shape[0],)."""

    factor: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True, eq=False)
class Relu(Layer):
    """y = max(x, 0)."""


@dataclass(frozen=True, eq=False)
class AveragePool(Layer):
    """Mean over windows, without padding."""

    kernel: Pair
    stride: Pair


@dataclass(frozen=True, eq=False)
class MaxPool(Layer):
    """Maximum over windows; padding never wins."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)


@dataclass(frozen=True, eq=False)
class Flatten(Layer):
    """The same values, seen as a vector."""


@dataclass(frozen=True, eq=False)
class Sum(Layer):
    """The sum of all inputs, which have one shape."""


@dataclass(frozen=True, eq=False)
class Ann:
    """Layers in topological order; `output` names the one that is the result."""

    name: str
    input_shape: Shape
    layers: tuple[Layer, ...]
    output: str

    def layer(self, name: str) -> Layer:
        """The layer of that name."""
        return next(layer for layer in self.layers if layer.name == name)

    def shape_of(self, name: str) -> Shape:
        """Shape of a layer's output, or of the input."""
        return self.input_shape if name == INPUT else self.layer(name).shape

    def readers(self, name: str) -> list[Layer]:
        """The layers that take a layer's output."""
        return [layer for layer in self.layers if name in layer.inputs]


def forward(ann: Ann, x: torch.Tensor, keep: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Outputs of the layers in `keep` and of the last one, by name. x: (batch, *input_shape), any floating dtype."""
    last = {name: layer.name for layer in ann.layers for name in layer.inputs}
    wanted = {*keep, ann.output}
    values = {INPUT: x}
    for layer in ann.layers:
        values[layer.name] = _apply(layer, [values[name] for name in layer.inputs])
        for name in layer.inputs:
            if last[name] == layer.name and name not in wanted:
                values.pop(name, None)
    return {name: values[name] for name in wanted}


def _apply(layer: Layer, inputs: list[torch.Tensor]) -> torch.Tensor:
    x = inputs[0]

    def like(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array, dtype=x.dtype, device=x.device)

    match layer:
        case Convolution():
            geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
            return F.conv2d(x, like(layer.weight), like(layer.bias), *geometry)
        case Matrix():
            return F.linear(x, like(layer.weight), like(layer.bias))
        case Affine():
            column = (-1, *[1] * (x.dim() - 2))
            return x * like(layer.factor).view(column) + like(layer.shift).view(column)
        case Relu():
            return x.relu()
        case AveragePool():
            return F.avg_pool2d(x, layer.kernel, layer.stride)
        case MaxPool():
            margin = (layer.padding[1], layer.padding[1], layer.padding[0], layer.padding[0])
            return F.max_pool2d(F.pad(x, margin, value=-math.inf), layer.kernel, layer.stride)
        case Flatten():
            return x.flatten(1)
        case Sum():
            return torch.stack(inputs).sum(dim=0)
    raise TypeError(f"no forward pass for a {type(layer).__name__}.")


def fold_affine(ann: Ann) -> Ann:
    """Affine layers folded into the convolution or matrix before them, where nothing else reads that one, or into the
    matrices behind them; layers that nothing reads any more are left out."""
    layers: dict[str, Layer] = {}
    renamed: dict[str, str] = {}
    for layer in ann.layers:
        first = layer.inputs[0]
        source = layers.get(renamed.get(first, first))
        if (
            isinstance(layer, Affine)
            and isinstance(source, Convolution | Matrix)
            and first != ann.output
            and len(ann.readers(first)) == 1
        ):
            weight = source.weight * layer.factor.reshape(-1, *[1] * (source.weight.ndim - 1))
            layers[source.name] = replace(source, weight=weight, bias=source.bias * layer.factor + layer.shift)
            renamed[layer.name] = source.name
        elif isinstance(layer, Matrix) and isinstance(source, Affine):
            bias = layer.bias + layer.weight @ source.shift
            layers[layer.name] = replace(layer, weight=layer.weight * source.factor, bias=bias, inputs=source.inputs)
        else:
            layers[layer.name] = replace(layer, inputs=tuple(renamed.get(name, name) for name in layer.inputs))
    output = renamed.get(ann.output, ann.output)
    read = {output}
    for layer in reversed(layers.values()):
        read |= set(layer.inputs) if layer.name in read else set()
    return replace(ann, layers=tuple(layer for layer in layers.values() if layer.name in read), output=output)
