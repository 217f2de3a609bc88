"""Composing linear maps: what two linear nodes after one another amount to, as one operator with shared weights.

Every function takes the map so far (an operator, or `Identity` where nothing has happened yet) and returns the map with
one more node applied. What has no form with shared weights becomes a dense matrix where that stays small, and is an
error otherwise.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from spikeport.converters.operators import Conv2d, Dense, OneToOne, Operator, Pair, Shape, SumPool
from spikeport.models.errors import GraphError

LARGEST_DENSE = 1 << 24
"""Entries of a matrix that may be built where a composition has no shared form."""


@dataclass(frozen=True)
class Identity:
    """The map so far has only been pooled, reshaped or scaled: y = factor * pool(x), seen as `shape`."""

    in_shape: Shape
    shape: Shape
    pool: SumPool | None = None
    factor: np.ndarray | None = None

    @property
    def out_shape(self) -> Shape:
        return self.shape

    @property
    def pooled_shape(self) -> Shape:
        """Shape after pooling, before any flattening; `factor` is of this shape or a number."""
        return self.pool.out_shape(self.in_shape) if self.pool else self.in_shape


LinearMap = Identity | Operator


def flatten(first: LinearMap, shape: Shape) -> LinearMap:
    """See the output as `shape`; an operator's output keeps its own shape, in the same order."""
    return replace(first, shape=shape) if isinstance(first, Identity) else first


def pool(first: LinearMap, window: SumPool, average: bool) -> LinearMap:
    """Sum or average pooling of the output."""
    factor = np.asarray(1.0 / (window.kernel[0] * window.kernel[1]) if average else 1.0)
    shape = window.out_shape(first.out_shape)
    if isinstance(first, Identity):
        merged = window if first.pool is None else _merge_pools(first.pool, window)
        by_channel = None if first.factor is None else _by_channel(first.factor)
        if merged is not None and (first.factor is None or by_channel is not None):
            # a factor that is the same over a channel may as well come after the pooling
            after = np.broadcast_to(by_channel, shape) if by_channel is not None and by_channel.ndim else by_channel
            return scale(replace(first, pool=merged, shape=shape, factor=after), factor)
        first = _as_operator(first)
    if isinstance(first, Conv2d):
        return scale(_conv_then_pool(first, window), factor)
    if not isinstance(first, Dense):
        raise GraphError("pooling after a list of single synapses has no image to work on.")
    columns = torch.as_tensor(first.weight.T.copy(), dtype=torch.float64).reshape(-1, *first.out_shape)
    pooled = window.apply(columns).flatten(1).numpy().T
    return scale(replace(first, weight=pooled, shape_out=shape), factor)


def scale(first: LinearMap, factor: np.ndarray) -> LinearMap:
    """Multiply the output by `factor`, broadcastable to its shape."""
    factor = np.asarray(factor, dtype=np.float64)
    if factor.size == 1:
        factor = factor.reshape(())
        if factor == 1:
            return first
    if isinstance(first, Identity):
        if factor.ndim:
            factor = _filled(factor, first.shape).reshape(first.pooled_shape)
        return replace(first, factor=factor if first.factor is None else first.factor * factor)
    return _scaled(first, factor)


def _scaled(first: Operator, factor: np.ndarray) -> Operator:
    if factor.ndim == 0:
        return first.with_weight(first.weight * factor)
    full = _filled(factor, first.out_shape)
    if isinstance(first, Conv2d):
        by_channel = _by_channel(full)
        if by_channel is not None:
            return first.with_weight(first.weight * by_channel[..., None])
        first = _dense(first)
    if isinstance(first, Dense):
        return first.with_weight(first.weight * full.ravel()[:, None])
    return first.with_weight(first.weight * full.ravel())


def _by_channel(factor: np.ndarray) -> np.ndarray | None:
    """(channels, 1, 1) where every place of a channel has the same factor, a number as it is; else None."""
    if factor.ndim == 0:
        return factor
    channels = factor.reshape(factor.shape[0], -1)
    return channels[:, :1, None] if (channels == channels[:, :1]).all() else None


def _filled(factor: np.ndarray, shape: Shape) -> np.ndarray:
    """The factor of every element; a flat list of as many factors as elements is one for each."""
    if factor.ndim == 1 and factor.size == math.prod(shape):
        return factor.reshape(shape)
    try:
        return np.broadcast_to(factor, shape)
    except ValueError:
        raise GraphError(f"factors of shape {factor.shape} do not fit an output of shape {shape}.") from None


def dense(first: LinearMap, weight: np.ndarray) -> Dense:
    """Multiply the flat output by a matrix (n_out, n_in)."""
    if math.prod(first.out_shape) != weight.shape[1]:
        raise GraphError(f"a matrix of shape {weight.shape} follows an output of shape {first.out_shape}.")
    if isinstance(first, Identity):
        if first.factor is not None:
            weight = weight * first.factor.ravel()
        return Dense(first.in_shape, weight, first.pool)
    if isinstance(first, Dense):
        return replace(first, weight=weight @ first.weight, shape_out=())
    _check_size(weight.shape[0], first.n_in)
    rows = torch.as_tensor(weight, dtype=torch.float64).reshape(-1, *first.out_shape)
    return Dense(first.in_shape, first.transpose_apply(rows).flatten(1).numpy())


def conv(first: LinearMap, weight: np.ndarray, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Operator:
    """Cross-correlate the output with a kernel (out channels, in channels / groups, height, width)."""
    if isinstance(first, Identity):
        if first.factor is not None and first.factor.ndim:
            by_channel = _by_channel(first.factor.reshape(first.shape))
            if by_channel is not None:
                inputs = by_channel.reshape(groups, -1).repeat(weight.shape[0] // groups, axis=0)
                weight = weight * inputs[:, :, None, None]
            else:
                single = Conv2d(first.shape, weight, None, stride, padding, dilation, groups)
                matrix = _dense(single).weight * first.factor.ravel()
                return Dense(first.in_shape, matrix, first.pool, shape_out=single.out_shape)
        elif first.factor is not None:
            weight = weight * first.factor
        if first.pool is None and first.shape != first.in_shape:
            return Conv2d(first.shape, weight, None, stride, padding, dilation, groups)
        return Conv2d(first.in_shape, weight, first.pool, stride, padding, dilation, groups)
    second = Conv2d(first.out_shape, weight, None, stride, padding, dilation, groups)
    if isinstance(first, Conv2d):
        one_by_one = first.weight.shape[2:] == (1, 1) and first.padding == (0, 0)
        if one_by_one or padding == (0, 0):
            return _conv_then_conv(first, second)
    return replace(dense(first, _dense(second).weight), shape_out=second.out_shape)


def finish(first: LinearMap) -> Operator:
    """The operator of a path that may have gone through no weights at all."""
    if not isinstance(first, Identity):
        return first
    if first.pool is not None:
        return _as_operator(first)
    factor = np.ones(()) if first.factor is None else first.factor
    return OneToOne(first.in_shape, np.broadcast_to(factor, first.in_shape).ravel().copy())


def _merge_pools(first: SumPool, second: SumPool) -> SumPool | None:
    """Two poolings as one, where the first one's windows do not overlap or leave gaps."""
    if first.kernel != first.stride:
        return None
    kernel = (first.kernel[0] * second.kernel[0], first.kernel[1] * second.kernel[1])
    stride = (first.stride[0] * second.stride[0], first.stride[1] * second.stride[1])
    return SumPool(kernel, stride)


def _as_operator(first: Identity) -> Operator:
    """Pooling and scaling as a convolution of each channel with itself; a matrix where the factor differs by place."""
    channels = first.in_shape[0]
    window = first.pool or SumPool((1, 1), (1, 1))
    summed = Conv2d(first.in_shape, np.ones((channels, 1, *window.kernel)), None, window.stride, groups=channels)
    return summed if first.factor is None else _scaled(summed, first.factor)


def _conv_then_pool(first: Conv2d, window: SumPool) -> Conv2d:
    """A convolution followed by pooling is one convolution with a larger kernel and stride."""
    kernel = _spread(first.weight, first.dilation)
    height, width = kernel.shape[2:]
    down, right = first.stride
    grown = np.zeros(
        (*kernel.shape[:2], height + (window.kernel[0] - 1) * down, width + (window.kernel[1] - 1) * right)
    )
    for row in range(window.kernel[0]):
        for column in range(window.kernel[1]):
            grown[:, :, row * down : row * down + height, column * right : column * right + width] += kernel
    stride = (down * window.stride[0], right * window.stride[1])
    return Conv2d(first.in_shape, grown, first.pool, stride, first.padding, (1, 1), first.groups)


def _conv_then_conv(first: Conv2d, second: Conv2d) -> Conv2d:
    """Two convolutions are one with a larger kernel and stride. The second one's padding holds zeros where a first one
    that reaches past the edge would not, so one of them must do without."""
    groups = first.groups if first.groups == second.groups else 1
    inner, outer = (_spread(ungrouped(each.weight, each.groups // groups), each.dilation) for each in (first, second))
    down, right = first.stride
    height, width = inner.shape[2:]
    rows, columns = outer.shape[2:]
    shape = (outer.shape[0], inner.shape[1], height + (rows - 1) * down, width + (columns - 1) * right)
    grown = np.zeros(shape)
    inner = inner.reshape(groups, -1, *inner.shape[1:])
    outer = outer.reshape(groups, -1, *outer.shape[1:])
    for row in range(rows):
        for column in range(columns):
            part = np.einsum("gom,gmikl->goikl", outer[..., row, column], inner, optimize=True)
            place = grown[:, :, row * down : row * down + height, column * right : column * right + width]
            place += part.reshape(place.shape)
    stride = (down * second.stride[0], right * second.stride[1])
    padding = (first.padding[0] + second.padding[0] * down, first.padding[1] + second.padding[1] * right)
    return Conv2d(first.in_shape, grown, first.pool, stride, padding, (1, 1), groups)


def ungrouped(weight: np.ndarray, groups: int) -> np.ndarray:
    """A grouped kernel with the zeros between `groups` groups written out."""
    if groups == 1:
        return weight
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    out = np.zeros((weight.shape[0], inputs * groups, *weight.shape[2:]), weight.dtype)
    for group in range(groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        out[rows, group * inputs : (group + 1) * inputs] = weight[rows]
    return out


def _spread(weight: np.ndarray, dilation: Pair) -> np.ndarray:
    """A dilated kernel with its gaps written out as zeros."""
    height, width = ((extent - 1) * gap + 1 for extent, gap in zip(weight.shape[2:], dilation, strict=True))
    out = np.zeros((*weight.shape[:2], height, width), weight.dtype)
    out[:, :, :: dilation[0], :: dilation[1]] = weight
    return out


def _dense(operator: Operator) -> Dense:
    """The operator as a matrix over its unpooled input."""
    _check_size(operator.n_out, operator.n_in)
    rows = torch.eye(operator.n_out, dtype=torch.float64).reshape(-1, *operator.out_shape)
    return Dense(operator.in_shape, operator.transpose_apply(rows).flatten(1).numpy(), shape_out=operator.out_shape)


def _check_size(n_out: int, n_in: int) -> None:
    if n_out * n_in > LARGEST_DENSE:
        raise GraphError(
            f"two linear maps in a row would need a matrix of {n_out} x {n_in} entries; put a neuron between them."
        )
