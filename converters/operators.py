"""The linear operators of a projection: what happens to spikes between two populations.

An operator maps a tensor of shape `in_shape` to one of shape `out_shape`. Pooling is folded into its addressing: a
`SumPool` says which pooled cell a source neuron counts into, and the weights are those of the pooled cells. Weights are
shared, never expanded to one entry a synapse, and may be floats or integers.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from spikeport.models.errors import GraphError

if TYPE_CHECKING:  # importing torch takes seconds, and the graph and the event simulator do without it
    import torch

Shape = tuple[int, ...]
Pair = tuple[int, int]


@dataclass(frozen=True)
class SumPool:
    """Sum over windows of `kernel` at steps of `stride` (no padding). (height, width)."""

    kernel: Pair
    stride: Pair

    def __post_init__(self) -> None:
        if min(*self.kernel, *self.stride) < 1:
            raise GraphError(f"pooling with kernel {self.kernel} and stride {self.stride} is not possible.")

    def out_shape(self, shape: Shape) -> Shape:
        """Shape (channels, height, width) after pooling."""
        if len(shape) != 3:
            raise GraphError(f"pooling needs an image; an input of shape {shape} is no image.")
        channels, height, width = shape
        rows = (height - self.kernel[0]) // self.stride[0] + 1
        columns = (width - self.kernel[1]) // self.stride[1] + 1
        if rows < 1 or columns < 1:
            raise GraphError(f"pooling {self.kernel} does not fit into an input of shape {shape}.")
        return channels, rows, columns

    def apply(self, x: "torch.Tensor") -> "torch.Tensor":
        """x: (batch, channels, height, width)."""
        import torch.nn.functional as F

        return F.avg_pool2d(x, self.kernel, self.stride, divisor_override=1)


@dataclass(frozen=True, eq=False)
class Operator:
    """A linear map from `in_shape` to `out_shape` with shared weights."""

    in_shape: Shape
    weight: np.ndarray
    pool: SumPool | None = None

    @property
    def pooled_shape(self) -> Shape:
        """Shape that the weights see: the input, pooled where pooling is folded in."""
        return self.pool.out_shape(self.in_shape) if self.pool else self.in_shape

    @property
    def out_shape(self) -> Shape:
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """Lower-case name used in files and chip costs: dense, conv, sparse, one_to_one."""
        raise NotImplementedError

    @property
    def n_in(self) -> int:
        return math.prod(self.in_shape)

    @property
    def n_out(self) -> int:
        return math.prod(self.out_shape)

    def apply(self, x: "torch.Tensor", weight: "torch.Tensor | None" = None) -> "torch.Tensor":
        """x: (batch, *in_shape), a floating dtype -> (batch, *out_shape). `weight` stands in for the operator's own."""
        raise NotImplementedError

    def with_weight(self, weight: np.ndarray) -> Self:
        """The same connections with other weights of the same shape."""
        if weight.shape != self.weight.shape:
            raise GraphError(f"weights of shape {weight.shape} given for an operator of {self.weight.shape}.")
        return replace(self, weight=weight)

    def fan_out(self) -> np.ndarray:
        """Synapses that leave each source neuron, int64 of shape `in_shape`; zero weights count as synapses."""
        import torch

        structure = self.with_weight(np.ones_like(self.weight, dtype=np.float64))
        out = torch.ones((1, *self.out_shape), dtype=torch.float64)
        return structure.transpose_apply(out)[0].round().to(torch.int64).numpy()

    def fan_in(self) -> np.ndarray:
        """Synapses into each target neuron, int64 (n_out,); zero weights count as synapses."""
        import torch

        structure = self.with_weight(np.ones_like(self.weight, dtype=np.float64))
        total = structure.apply(torch.ones((1, *self.in_shape), dtype=torch.float64))[0]
        return total.flatten().round().to(torch.int64).numpy()

    def transpose_apply(self, y: "torch.Tensor") -> "torch.Tensor":
        """The transposed map: (batch, *out_shape) -> (batch, *in_shape)."""
        import torch

        x = torch.zeros((y.shape[0], *self.in_shape), dtype=y.dtype, requires_grad=True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.apply(x), x, y)
        return gradient

    def magnitude_bound(self) -> float:
        """Largest possible |sum of weights into one neuron| for binary inputs; graded inputs scale it."""
        raise NotImplementedError

    def n_synapses(self) -> int:
        """Synapses (connections), however few weights they share."""
        return int(self.fan_out().sum())

    def describe(self) -> dict[str, Any]:
        """What a file needs beside the weights to build the operator again."""
        pool = None if self.pool is None else [list(self.pool.kernel), list(self.pool.stride)]
        return {"kind": self.kind, "in_shape": list(self.in_shape), "pool": pool}

    @property
    def _pooled_inputs(self) -> int:
        """Source neurons that count into one pooled cell."""
        return math.prod(self.pool.kernel) if self.pool else 1

    def pooled(self, x: "torch.Tensor") -> "torch.Tensor":
        return self.pool.apply(x) if self.pool else x


def _sizes(weight: np.ndarray, axis: int | tuple[()] = ()) -> np.ndarray:
    """Sums of |weight| along an axis (of none: |weight| itself), float64. The sizes take no second array of weights."""
    positive = np.maximum(weight, 0).sum(axis=axis, dtype=np.float64)
    negative = np.minimum(weight, 0).sum(axis=axis, dtype=np.float64)
    difference: np.ndarray = positive - negative
    return difference


def _tensor(weight: np.ndarray, like: "torch.Tensor") -> "torch.Tensor":
    if not weight.flags.writeable or any(stride < 0 for stride in weight.strides):
        weight = weight.copy()  # torch cannot share such memory
    import torch

    return torch.as_tensor(weight, dtype=like.dtype, device=like.device)


@dataclass(frozen=True, eq=False)
class Dense(Operator):
    """All to all. weight: (n_out, n_pooled). `shape_out` sees the output as an image; () means flat."""

    shape_out: Shape = ()

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.weight.shape[1] != math.prod(self.pooled_shape):
            raise GraphError(
                f"dense weights of shape {self.weight.shape} do not fit {math.prod(self.pooled_shape)} inputs."
            )
        if self.shape_out and math.prod(self.shape_out) != self.weight.shape[0]:
            raise GraphError(f"{self.weight.shape[0]} dense outputs cannot be seen as {self.shape_out}.")

    @property
    def kind(self) -> str:
        return "dense"

    @property
    def out_shape(self) -> Shape:
        return self.shape_out or (int(self.weight.shape[0]),)

    def apply(self, x: "torch.Tensor", weight: "torch.Tensor | None" = None) -> "torch.Tensor":
        weight = _tensor(self.weight, x) if weight is None else weight
        flat = self.pooled(x).flatten(1) @ weight.T
        return flat.reshape(-1, *self.out_shape)

    def magnitude_bound(self) -> float:
        return float(_sizes(self.weight, 1).max(initial=0)) * self._pooled_inputs

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"out_shape": list(self.out_shape)}


@dataclass(frozen=True, eq=False)
class Conv2d(Operator):
    """Cross-correlation, as in PyTorch and NIR. weight: (out channels, in channels / groups, height, width)."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        channels = self.pooled_shape[0] if len(self.in_shape) == 3 else 0
        if self.groups < 1 or self.weight.ndim != 4 or channels != self.weight.shape[1] * self.groups:
            raise GraphError(
                f"conv weights of shape {self.weight.shape} with {self.groups} groups do not fit an input of "
                f"shape {self.in_shape}."
            )
        if min(*self.stride, *self.dilation, *self.weight.shape[2:]) < 1 or min(self.padding) < 0:
            raise GraphError(
                f"a convolution with stride {self.stride}, padding {self.padding} and dilation {self.dilation} "
                "is not possible."
            )
        if self.weight.shape[0] % self.groups:
            raise GraphError(f"{self.weight.shape[0]} output channels cannot be split into {self.groups} groups.")
        if min(self.out_shape) < 1:
            raise GraphError(f"conv kernel {self.weight.shape[2:]} is larger than its input {self.pooled_shape[1:]}.")

    @property
    def kind(self) -> str:
        return "conv"

    @property
    def out_shape(self) -> Shape:
        size = [
            (extent + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for extent, pad, dilation, kernel, stride in zip(
                self.pooled_shape[1:], self.padding, self.dilation, self.weight.shape[2:], self.stride, strict=True
            )
        ]
        return (int(self.weight.shape[0]), size[0], size[1])

    def apply(self, x: "torch.Tensor", weight: "torch.Tensor | None" = None) -> "torch.Tensor":
        import torch.nn.functional as F

        weight = _tensor(self.weight, x) if weight is None else weight
        return F.conv2d(self.pooled(x), weight, None, self.stride, self.padding, self.dilation, self.groups)

    def magnitude_bound(self) -> float:
        """Over the targets: those near an edge lack the kernel's rows and columns that lie in the padding."""
        sizes = _sizes(self.weight, 1)
        sums = np.einsum("yk,okl,xl->oyx", self._taps(0), sizes, self._taps(1), optimize=True)
        return float(sums.max()) * self._pooled_inputs

    def _taps(self, axis: int) -> np.ndarray:
        """Which kernel places along an axis lie inside the image, 0.0 or 1.0: the different rows of (out, kernel)."""
        first = np.arange(self.out_shape[1 + axis]) * self.stride[axis] - self.padding[axis]
        place = first[:, None] + np.arange(self.weight.shape[2 + axis]) * self.dilation[axis]
        inside = (place >= 0) & (place < self.pooled_shape[1 + axis])
        return np.unique(inside, axis=0).astype(np.float64)

    def describe(self) -> dict[str, Any]:
        geometry = {
            "stride": list(self.stride),
            "padding": list(self.padding),
            "dilation": list(self.dilation),
            "groups": self.groups,
        }
        return super().describe() | geometry


@dataclass(frozen=True, eq=False)
class Sparse(Operator):
    """One weight for each listed (source, target) pair. weight: (n_pairs,); pairs are unique."""

    source: np.ndarray = None  # type: ignore[assignment]
    target: np.ndarray = None  # type: ignore[assignment]
    shape_out: Shape = ()

    def __post_init__(self) -> None:
        if self.pool is not None:
            raise GraphError("a sparse operator lists its sources one by one and takes no pooling.")
        if not (self.weight.shape == self.source.shape == self.target.shape) or self.weight.ndim != 1:
            raise GraphError("a sparse operator needs as many sources and targets as weights.")
        for name, index, count in (("source", self.source, self.n_in), ("target", self.target, self.n_out)):
            if index.size and (index.min() < 0 or index.max() >= count):
                raise GraphError(f"a sparse operator has a {name} outside 0..{count - 1}.")

    @property
    def kind(self) -> str:
        return "sparse"

    @property
    def out_shape(self) -> Shape:
        return self.shape_out

    def apply(self, x: "torch.Tensor", weight: "torch.Tensor | None" = None) -> "torch.Tensor":
        import torch

        indices = torch.as_tensor(np.stack([self.source, self.target]), device=x.device)
        weight = _tensor(self.weight, x) if weight is None else weight
        terms = x.flatten(1)[:, indices[0]] * weight
        out = torch.zeros((x.shape[0], self.n_out), dtype=x.dtype, device=x.device)
        return out.index_add(1, indices[1], terms).reshape(-1, *self.shape_out)

    def magnitude_bound(self) -> float:
        return float(np.bincount(self.target, _sizes(self.weight)).max(initial=0))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"out_shape": list(self.shape_out)}


@dataclass(frozen=True, eq=False)
class OneToOne(Operator):
    """Neuron i to neuron i. weight: (n,)."""

    def __post_init__(self) -> None:
        if self.pool is not None or self.weight.shape != (self.n_in,):
            raise GraphError(f"one-to-one weights of shape {self.weight.shape} do not fit {self.n_in} neurons.")

    @property
    def kind(self) -> str:
        return "one_to_one"

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    def apply(self, x: "torch.Tensor", weight: "torch.Tensor | None" = None) -> "torch.Tensor":
        weight = _tensor(self.weight, x) if weight is None else weight
        return (x.flatten(1) * weight).reshape(-1, *self.in_shape)

    def magnitude_bound(self) -> float:
        return float(_sizes(self.weight).max(initial=0))


def operator_from(description: dict[str, Any], arrays: dict[str, np.ndarray]) -> Operator:
    """Build an operator from `Operator.describe` and its arrays (`weight`, and `source`, `target` of a sparse one)."""
    pool = description["pool"]
    common: dict[str, Any] = {
        "in_shape": tuple(description["in_shape"]),
        "weight": arrays["weight"],
        "pool": None if pool is None else SumPool((pool[0][0], pool[0][1]), (pool[1][0], pool[1][1])),
    }
    match description["kind"]:
        case "dense":
            return Dense(**common, shape_out=tuple(description["out_shape"]))
        case "conv":
            geometry = {key: tuple(description[key]) for key in ("stride", "padding", "dilation")}
            return Conv2d(**common, **geometry, groups=int(description["groups"]))  # type: ignore[arg-type]
        case "sparse":
            shape = tuple(description["out_shape"])
            return Sparse(**common, source=arrays["source"], target=arrays["target"], shape_out=shape)
        case "one_to_one":
            return OneToOne(**common)
        case other:
            raise GraphError(f"unknown operator kind {other!r}.")
