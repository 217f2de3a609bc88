"""ONNX operators as layers of an `Ann`, with their meaning at inference (https://onnx.ai/onnx/operators/)."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from spikeport.converters.ann import (
    INPUT,
    Affine,
    AveragePool,
    Convolution,
    Flatten,
    Layer,
    Matrix,
    MaxPool,
    Relu,
    Sum,
)
from spikeport.converters.onnx_arrays import Arrays, Fault, shown
from spikeport.converters.operators import Conv2d, Pair, Shape, SumPool
from spikeport.models.errors import GraphError

LARGEST_VALUE = 1 << 26
"""Numbers that a layer may put out for one sample."""


@dataclass(frozen=True)
class Activation:
    """A value that depends on the input: the layer that makes it, and its shape without the batch."""

    layer: str
    shape: Shape


Value = Activation | np.ndarray
Inputs = Sequence[Value | None]
"""Of a node; None is one that is left out."""


class _Attributes:
    """The attributes of a node, taken one by one; what nobody takes is a fault."""

    def __init__(self, node: onnx.NodeProto) -> None:
        self.left: dict[str, Any] = {}
        for attribute in node.attribute:
            if attribute.ref_attr_name or attribute.name in self.left:
                raise Fault(f"attribute {shown(attribute.name)} is there twice or refers to another one")
            self.left[attribute.name] = _attribute(attribute)

    def take(self, name: str, default: Any) -> Any:
        """The attribute of that name, which must be of the default's type."""
        value = self.left.pop(name, default)
        if not isinstance(value, type(default)):
            raise Fault(f"attribute {name} is no {type(default).__name__}")
        return value

    def only(self, name: str, default: int, why: str) -> None:
        """The attribute may only have its default value."""
        if self.take(name, default) != default:
            raise Fault(why)

    def pair(self, name: str, default: Pair) -> Pair:
        values: tuple[Any, ...] = self.take(name, default)
        if len(values) != 2:
            raise Fault(f"{name} = {shown(values)} where the height's and the width's are needed")
        return int(values[0]), int(values[1])


def _attribute(attribute: onnx.AttributeProto) -> Any:
    """The value of an attribute; None for kinds that no operator here has."""
    match attribute.type:
        case onnx.AttributeProto.FLOAT:
            return float(attribute.f)
        case onnx.AttributeProto.INT:
            return int(attribute.i)
        case onnx.AttributeProto.STRING:
            return attribute.s.decode("utf-8", "replace")
        case onnx.AttributeProto.TENSOR:
            return attribute.t
        case onnx.AttributeProto.FLOATS:
            return tuple(attribute.floats)
        case onnx.AttributeProto.INTS:
            return tuple(attribute.ints)
    return None


class Operators:
    """Makes the layers of one model.

    batch: the model's batch if it is fixed.
    """

    def __init__(self, arrays: Arrays, batch: int | None) -> None:
        self.arrays, self.batch = arrays, batch
        self.layers: list[Layer] = []
        self.names = {INPUT}

    def apply(self, node: onnx.NodeProto, inputs: Inputs, is_last: bool) -> Value:
        """What a node puts out. Raises Fault or GraphError."""
        self.node, self.is_last = node, is_last
        attributes = _Attributes(node)
        with np.errstate(all="ignore"):  # what overflows is found when the layer is made
            value = SUPPORTED[node.op_type](self, inputs, attributes)
        if attributes.left:
            raise Fault(f"it has an attribute {shown(next(iter(attributes.left)))} that is not known")
        return value

    def _add_layer(self, kind: type[Layer], sources: Iterable[Activation], shape: Shape, **fields: Any) -> Activation:
        for value in fields.values():
            if isinstance(value, np.ndarray) and not np.isfinite(value).all():
                raise Fault("its values become NaN or infinite")
        name = (self.node.name or self.node.output[0])[:60]
        while name in self.names:
            name += "_"
        self.names.add(name)
        inputs = tuple(source.layer for source in sources)
        self.layers.append(kind(name, inputs, limited(shape, "its output"), **fields))
        return Activation(name, shape)

    def _conv(self, inputs: Inputs, attributes: _Attributes) -> Value:
        x, weight = _image(inputs), _constant_input(inputs, 1, "weight")
        if weight.ndim != 4:
            raise Fault(f"its weights have {weight.ndim} dimensions; convolutions of images are converted")
        bias = _constant_input(inputs, 2, "bias") if _given(inputs, 2) else np.zeros(weight.shape[0])
        if bias.shape != weight.shape[:1]:
            raise Fault(f"a bias of shape {bias.shape} for weights of shape {weight.shape}")
        kernel = (int(weight.shape[2]), int(weight.shape[3]))
        if attributes.pair("kernel_shape", kernel) != kernel:
            raise Fault(f"its kernel_shape is not that of its weights, {kernel}")
        stride, dilation = attributes.pair("strides", (1, 1)), attributes.pair("dilations", (1, 1))
        first, last = _pads(attributes, x.shape, kernel, stride, dilation)
        weight = _with_margin(weight, first, last, dilation)
        padding = (max(first[0], last[0]), max(first[1], last[1]))
        groups = attributes.take("group", 1)
        shape = Conv2d(x.shape, weight, None, stride, padding, dilation, groups).out_shape
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return self._add_layer(Convolution, [x], shape, weight=weight, bias=bias, **geometry)

    def _gemm(self, inputs: Inputs, attributes: _Attributes) -> Value:
        weight = _constant_input(inputs, 1, "weight")
        attributes.only("transA", 0, "it transposes its activations, and so mixes the samples of a batch")
        alpha, beta = attributes.take("alpha", 1.0), attributes.take("beta", 1.0)
        if not attributes.take("transB", 0):
            weight = weight.T
        bias = _constant_input(inputs, 2, "bias") if _given(inputs, 2) else np.zeros(())
        return self._matrix(_vector(inputs), alpha * weight, beta * bias)

    def _matmul(self, inputs: Inputs, attributes: _Attributes) -> Value:
        weight = _constant_input(inputs, 1, "matrix on the right")
        return self._matrix(_vector(inputs), weight.T, np.zeros(()))

    def _matrix(self, x: Activation, weight: np.ndarray, bias: np.ndarray) -> Activation:
        if weight.ndim != 2 or weight.shape[1] != x.shape[0] or not weight.shape[0]:
            raise Fault(f"a matrix of shape {weight.T.shape} for {x.shape[0]} features")
        shape = (int(weight.shape[0]),)
        return self._add_layer(Matrix, [x], shape, weight=weight, bias=_broadcast(bias, shape)[0])

    def _add(self, inputs: Inputs, attributes: _Attributes) -> Value:
        if any(isinstance(value, np.ndarray) for value in inputs):
            return self._by_constant(inputs, lambda c: (1 + 0 * c, c), either=True)
        first, second = _activation(inputs, 0), _activation(inputs, 1)
        if first.shape != second.shape:
            raise Fault(f"it adds {first.shape} and {second.shape}; only equal shapes are converted")
        return self._add_layer(Sum, [first, second], first.shape)

    def _sub(self, inputs: Inputs, attributes: _Attributes) -> Value:
        return self._by_constant(inputs, lambda c: (1 + 0 * c, -c))

    def _mul(self, inputs: Inputs, attributes: _Attributes) -> Value:
        return self._by_constant(inputs, lambda c: (c, 0 * c), either=True)

    def _div(self, inputs: Inputs, attributes: _Attributes) -> Value:
        return self._by_constant(inputs, lambda c: (1 / c, 0 * c))

    def _by_constant(
        self,
        inputs: Inputs,
        parts: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        either: bool = False,
    ) -> Activation:
        """factor x + shift with `parts` of the constant; `either`: the constant may come first."""
        ordered = inputs[::-1] if either and len(inputs) == 2 and isinstance(inputs[0], np.ndarray) else inputs
        x = _activation(ordered, 0)
        constant = _constant_input(ordered, 1, "second input")
        _broadcast(constant, x.shape)
        channels = constant.reshape((1,) * (1 + len(x.shape) - constant.ndim) + constant.shape)[0]
        channels = channels.reshape(channels.shape[0], -1)
        if (channels != channels[:, :1]).any():
            raise Fault("its constant differs from place to place of an image; only one a channel is converted")
        factor, shift = parts(np.broadcast_to(channels[:, 0], x.shape[:1]).astype(np.float64))
        return self._add_layer(Affine, [x], x.shape, factor=factor, shift=shift)

    def _batch_norm(self, inputs: Inputs, attributes: _Attributes) -> Value:
        x = _activation(inputs, 0)
        attributes.only("training_mode", 0, "it is in training mode; export the network for inference (model.eval())")
        attributes.only("spatial", 1, "it normalises every place by itself (spatial = 0)")
        attributes.take("momentum", 0.9)
        epsilon = attributes.take("epsilon", 1e-5)
        if any(self.node.output[1:]):
            raise Fault("it has training outputs; export the network for inference (model.eval())")
        names = ("scale", "B", "mean", "var")
        scale, shift, mean, variance = (_constant_input(inputs, i, name) for i, name in enumerate(names, 1))
        if any(array.shape != x.shape[:1] for array in (scale, shift, mean, variance)):
            raise Fault(f"its parameters do not have the {x.shape[0]} channels of its input")
        if (variance + epsilon <= 0).any():
            raise Fault("its variance is negative")
        factor = scale / np.sqrt(variance + epsilon)
        return self._add_layer(Affine, [x], x.shape, factor=factor, shift=shift - factor * mean)

    def _relu(self, inputs: Inputs, attributes: _Attributes) -> Value:
        x = _activation(inputs, 0)
        return self._add_layer(Relu, [x], x.shape)

    def _average_pool(self, inputs: Inputs, attributes: _Attributes) -> Value:
        x, kernel, stride, first, last = self._pool(inputs, attributes)
        attributes.take("count_include_pad", 0)  # of no matter without padding
        if any((*first, *last)):
            raise Fault("it pads; average pooling is converted without padding")
        shape = SumPool(kernel, stride).out_shape(x.shape)
        return self._add_layer(AveragePool, [x], shape, kernel=kernel, stride=stride)

    def _global_average_pool(self, inputs: Inputs, attributes: _Attributes) -> Value:
        x = _image(inputs)
        window = (x.shape[1], x.shape[2])
        return self._add_layer(AveragePool, [x], (x.shape[0], 1, 1), kernel=window, stride=window)

    def _max_pool(self, inputs: Inputs, attributes: _Attributes) -> Value:
        x, kernel, stride, first, last = self._pool(inputs, attributes)
        attributes.take("storage_order", 0)  # of the indices, which are refused
        if any(self.node.output[1:]):
            raise Fault("it puts out the places of its maxima, which no rate stands for")
        if first != last or any(pad >= extent for pad, extent in zip(first, kernel, strict=True)):
            raise Fault("its padding is larger than its window or unequal on two sides")
        padded = (x.shape[0], x.shape[1] + 2 * first[0], x.shape[2] + 2 * first[1])
        shape = SumPool(kernel, stride).out_shape(padded)
        return self._add_layer(MaxPool, [x], shape, kernel=kernel, stride=stride, padding=first)

    def _pool(self, inputs: Inputs, attributes: _Attributes) -> tuple[Activation, Pair, Pair, Pair, Pair]:
        """The image, the window, its stride, and the padding at the beginning and the end."""
        x = _image(inputs)
        kernel, stride = attributes.pair("kernel_shape", (0, 0)), attributes.pair("strides", (1, 1))
        if min(*kernel, *stride) < 1 or kernel[0] * kernel[1] > LARGEST_VALUE:
            raise Fault(f"a window of {shown(kernel)} at strides of {shown(stride)} is not possible")
        if attributes.pair("dilations", (1, 1)) != (1, 1):
            raise Fault("its window has gaps (dilations)")
        first, last = _pads(attributes, x.shape, kernel, stride, (1, 1))
        if attributes.take("ceil_mode", 0):
            extents = zip(x.shape[1:], first, last, kernel, stride, strict=True)
            if any((extent + a + b - window) % step for extent, a, b, window, step in extents):
                raise Fault("its last windows reach past the image (ceil_mode); pool without a rest")
        return x, kernel, stride, first, last

    def _flatten(self, inputs: Inputs, attributes: _Attributes) -> Value:
        x = _activation(inputs, 0)
        axis = attributes.take("axis", 1)
        if axis % (len(x.shape) + 1) != 1 or abs(axis) > len(x.shape):
            raise Fault(f"it flattens from dimension {shown(axis)} on; from 1 on (all but the batch) is converted")
        return self._add_layer(Flatten, [x], (math.prod(x.shape),))

    def _reshape(self, inputs: Inputs, attributes: _Attributes) -> Value:
        x, target = _activation(inputs, 0), _constant_input(inputs, 1, "shape")
        zero_is_zero = attributes.take("allowzero", 0)
        extents: list[int | None] = [int(extent) for extent in target.ravel()[:9]]
        if not zero_is_zero:  # a 0 copies the extent of the input; None stands for the batch's
            copied = (None, *x.shape)
            extents = [copied[i] if extent == 0 and i < len(copied) else extent for i, extent in enumerate(extents)]
        batch, rest = (extents[0], extents[1:]) if extents else (0, [])
        if batch is None or batch == self.batch or (batch == -1 and -1 not in rest):
            for shape in (x.shape, (math.prod(x.shape),)):
                fits = len(rest) == len(shape) and all(a in (-1, b) for a, b in zip(rest, shape, strict=True))
                if fits and rest.count(-1) <= 1:
                    return x if shape == x.shape else self._add_layer(Flatten, [x], shape)
        raise Fault(
            f"it gives (batch, {', '.join(map(str, x.shape))}) the shape {shown(target.tolist())}; only what keeps the "
            "batch and flattens the rest is converted"
        )

    def _softmax(self, inputs: Inputs, attributes: _Attributes) -> Value:
        x = _vector(inputs)
        if not self.is_last or attributes.take("axis", -1) not in (1, -1):
            raise Fault("it has no spiking form but at the very end, where it changes no decision and is left out")
        return x

    def _identity(self, inputs: Inputs, attributes: _Attributes) -> Value:
        return _first(inputs)

    def _dropout(self, inputs: Inputs, attributes: _Attributes) -> Value:
        for name, default in (("ratio", 0.5), ("seed", 0)):
            attributes.take(name, default)
        if _given(inputs, 2) and _constant_input(inputs, 2, "training_mode").any():
            raise Fault("it is in training mode; export the network for inference (model.eval())")
        return _first(inputs)

    def _constant(self, inputs: Inputs, attributes: _Attributes) -> Value:
        found = [
            name
            for name in ("value", "value_float", "value_floats", "value_int", "value_ints")
            if name in attributes.left
        ]
        if len(found) != 1:
            raise Fault("it holds no tensor and no numbers, or more than one of them")
        value = attributes.left.pop(found[0])
        if found[0] == "value":
            if not isinstance(value, onnx.TensorProto):
                raise Fault("its value is no tensor")
            return self.arrays.read(value)
        if not np.isfinite(np.asarray(value, np.float64)).all():
            raise Fault("it holds NaN or infinity")
        return np.asarray(value, np.float64 if "float" in found[0] else np.int64)


SUPPORTED: dict[str, Callable[[Operators, Inputs, _Attributes], Value]] = {
    "Add": Operators._add,
    "AveragePool": Operators._average_pool,
    "BatchNormalization": Operators._batch_norm,
    "Constant": Operators._constant,
    "Conv": Operators._conv,
    "Div": Operators._div,
    "Dropout": Operators._dropout,
    "Flatten": Operators._flatten,
    "Gemm": Operators._gemm,
    "GlobalAveragePool": Operators._global_average_pool,
    "Identity": Operators._identity,
    "LogSoftmax": Operators._softmax,
    "MatMul": Operators._matmul,
    "MaxPool": Operators._max_pool,
    "Mul": Operators._mul,
    "Relu": Operators._relu,
    "Reshape": Operators._reshape,
    "Softmax": Operators._softmax,
    "Sub": Operators._sub,
}
"""The operators that have a spiking form."""


def _given(inputs: Inputs, place: int) -> bool:
    return place < len(inputs) and inputs[place] is not None


def _activation(inputs: Inputs, place: int) -> Activation:
    value = inputs[place] if place < len(inputs) else None
    if not isinstance(value, Activation):
        raise Fault(f"its input {place + 1} is {'missing' if value is None else 'a constant'}")
    return value


def _first(inputs: Inputs) -> Value:
    if not inputs or inputs[0] is None:
        raise Fault("its input is missing")
    return inputs[0]


def _image(inputs: Inputs) -> Activation:
    x = _activation(inputs, 0)
    if len(x.shape) != 3:
        raise Fault(f"it takes images (channels, height, width), not {x.shape}")
    return x


def _vector(inputs: Inputs) -> Activation:
    x = _activation(inputs, 0)
    if len(x.shape) != 1:
        raise Fault(f"it takes vectors, not {x.shape}; flatten them first")
    return x


def _constant_input(inputs: Inputs, place: int, what: str) -> np.ndarray:
    value = inputs[place] if place < len(inputs) else None
    if not isinstance(value, np.ndarray):
        raise Fault(f"its {what} is {'missing' if value is None else 'computed from the input'}, not stored")
    return value


def _broadcast(constant: np.ndarray, shape: Shape) -> np.ndarray:
    """A constant as (1, *shape)."""
    try:
        return np.broadcast_to(constant, (1, *shape))
    except ValueError:
        raise Fault(f"a constant of shape {constant.shape} for values of shape {shape}") from None


def _pads(attributes: _Attributes, shape: Shape, kernel: Pair, stride: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    """Padding at the beginning and the end, (height, width) each."""
    mode: str = attributes.take("auto_pad", "NOTSET")
    pads: tuple[int, ...] = attributes.take("pads", (0, 0, 0, 0))
    if min(*stride, *kernel, *dilation) < 1:
        raise Fault(f"a window of {kernel} with strides {stride} and dilations {dilation} is not possible")
    if mode in ("NOTSET", "VALID"):
        if len(pads) != 4 or min(pads) < 0 or max(pads) > LARGEST_VALUE:
            raise Fault(f"pads = {shown(pads)}")
        given = (0, 0, 0, 0) if mode == "VALID" else pads
        return (given[0], given[1]), (given[2], given[3])
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise Fault(f"auto_pad = {shown(mode)}")
    wholes = [
        max((-(-extent // step) - 1) * step + (window - 1) * gap + 1 - extent, 0)
        for extent, window, step, gap in zip(shape[1:], kernel, stride, dilation, strict=True)
    ]
    smaller, larger = (wholes[0] // 2, wholes[1] // 2), (-(-wholes[0] // 2), -(-wholes[1] // 2))
    return (smaller, larger) if mode == "SAME_UPPER" else (larger, smaller)


def _with_margin(weight: np.ndarray, first: Pair, last: Pair, dilation: Pair) -> np.ndarray:
    """Weights for padding by the larger of two sides: a row or column of zeros makes up for the smaller one."""
    margin = [(0, 0), (0, 0)]
    for before, after, gap in zip(first, last, dilation, strict=True):
        if abs(before - after) > 1 or (before != after and gap != 1):
            raise Fault(f"its padding is unequal, {before} and {after}; by 1, and without dilation, it is converted")
        margin.append((max(after - before, 0), max(before - after, 0)))
    return np.pad(weight, margin)


def limited(shape: Shape, what: str) -> Shape:
    if math.prod(shape) > LARGEST_VALUE:
        raise GraphError(f"{what} of shape {shape} has more than {LARGEST_VALUE:,} numbers.")
    return shape
