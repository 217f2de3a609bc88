"""Architectures: networks as directed acyclic graphs of nodes, read from strings such as `15C5-P2-40C5-P2-300-10`.

    15C5      convolution to 15 channels, 5x5 kernel     (15C5p2: padding 2; 15C5s2: stride 2)
    P2        pooling 2x2 of the spikes before the next layer
    A         average over the whole image
    R64       residual block of two 3x3 convolutions to 64 channels     (R64s2: stride 2)
    300       300 neurons, all to all

Every convolution and dense layer is followed by a population, the last one included; it may integrate and never fire.
The order of a residual block is the recipe's `block` (SN: neurons, C: convolution, BN: normalisation if there is any):

    early        SN(BN C SN(BN C(s)) + S(s))     S: identity, or BN C1x1 to other channels, or every n-th row and column
    spike-add    SN(BN C SN(BN C(s))) + S(s)     S: identity, or SN(BN C1x1(s))
    membrane     x + BN C SN(BN C SN(x))         x: a current; down: average pooling, then BN C1x1

Whole networks go by a name:

    lenet, vgg9, resnet11     Lee et al., 2020; resnet11 is of the early order, strides in a block's second convolution
    resnet9                   theirs, too, but its form is not in their code: one block less than resnet11, widths ours
    cnn1, cnn2                Zhang & Li, 2020, for CIFAR-10
    ds-resnet20, ds-resnet14  Feng et al., 2022; any 6 n + 2 layers, ds-resnet20:16-32-64 with other widths than
                              64-128-256. Their last layer has biases, and an output that integrates does not leak.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.errors import RecipeError
from spikeport.models.pooling import Pooling
from spikeport.models.recipe import NetworkSection

Shape = tuple[int, ...]
Block = Literal["spike-add", "early", "membrane"]


@dataclass(frozen=True)
class Node:
    """One node. inputs: the nodes it takes, by name. shape: of its output at one step of one sample."""

    name: str
    inputs: tuple[str, ...]
    shape: Shape


@dataclass(frozen=True)
class Source(Node):
    """The input spikes."""


@dataclass(frozen=True)
class Convolution(Node):
    """Cross-correlation. Initial weights: normal with variance gain / fan in, PyTorch's default where gain is None;
    then times `scale`."""

    in_shape: Shape
    kernel: int
    stride: int = 1
    padding: int = 0
    bias: bool = False
    gain: float | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Dense(Node):
    """All to all. Initial weights: normal with variance gain / fan in."""

    in_shape: Shape
    bias: bool = False
    gain: float = 2.0


@dataclass(frozen=True)
class Norm(Node):
    """Batch normalisation over time and batch (tdBN) of the convolution before it, to deviation `threshold` times a
    trained gain that starts at `gain`."""

    threshold: float
    gain: float = 1.0


@dataclass(frozen=True)
class Pool(Node):
    """Sum or average over windows of an image."""

    pooling: Pooling


@dataclass(frozen=True)
class Flatten(Node):
    """An image as a list, channel by channel."""


@dataclass(frozen=True)
class Dropout(Node):
    """While training, each neuron is silent for a whole window with probability `rate`; the others count more."""

    rate: float


@dataclass(frozen=True)
class Add(Node):
    """The sum of its inputs."""


@dataclass(frozen=True)
class Neurons(Node):
    """A population. integrates: it never fires, and its membrane is the output."""

    neuron: CubaLIF
    integrates: bool = False


@dataclass(frozen=True)
class _Plan:
    """An architecture string and what a named network settles beside it.

    gain: of all initial weights (`Convolution`). stride_last: the second convolution of a block has the stride.
    """

    text: str
    block: Block | None = None
    gain: float | None = None
    bias_last: bool = False
    sum_last: bool = False
    stride_last: bool = False


_PLANS = {
    "lenet": _Plan("20C5p2-P2-50C5p2-P2-200", gain=2.0),
    "vgg9": _Plan("64C3p1-64C3p1-P2-128C3p1-128C3p1-P2-256C3p1-256C3p1-256C3p1-P2-1024", gain=2.0),
    "resnet9": _Plan("64C3p1-P2-R64-R128s2-R256s2-1024", "early", gain=1.0, stride_last=True),
    "resnet11": _Plan("64C3p1-P2-R128-R256s2-R512-R512s2-1024", "early", gain=1.0, stride_last=True),
    "cnn1": _Plan("96C3p1-256C3p1-P2-384C3p1-P2-384C3p1-256C3p1-1024-1024"),
    "cnn2": _Plan("128C3p1-256C3p1-P2-512C3p1-P2-1024C3p1-512C3p1-1024-512"),
}
NAMES = (*_PLANS, "ds-resnet20", "ds-resnet14")

_DS_RESNET = re.compile(r"ds-resnet(\d+)(?::(\d+)-(\d+)-(\d+))?")
_CONV = re.compile(r"(\d+)C(\d+)(?:p(\d+))?(?:s(\d+))?")
_BLOCK = re.compile(r"R(\d+)(?:s(\d+))?")
_POOL = re.compile(r"P(\d+)")
_DENSE = re.compile(r"(\d+)")


def parse_architecture(section: NetworkSection, in_shape: Shape, classes: int) -> tuple[Node, ...]:
    """The nodes of a recipe's network for inputs of `in_shape` (channels, height, width), in topological order.

    The last one is the output population; where it fires, it has one threshold, so that it can be read.

    Raises RecipeError naming the part that cannot be read, does not fit its input, or the wrong number of classes.
    """
    plan = _plan(section.architecture, classes)
    return _Builder(section, plan, in_shape).build(classes)


def _plan(text: str, classes: int) -> _Plan:
    if text in _PLANS:
        return replace(_PLANS[text], text=f"{_PLANS[text].text}-{classes}")
    match = _DS_RESNET.fullmatch(text)
    if match is None:
        return _Plan(text)
    blocks, rest = divmod(int(match[1]) - 2, 6)
    if blocks < 1 or rest:
        raise RecipeError(f"architecture {text!r}: a ds-resnet has 6 n + 2 layers: 14, 20, 32, ...")
    widths = match.groups()[1:] if match[2] else ("64", "128", "256")
    stages = [f"R{width}{'s2' if stage else ''}" + f"-R{width}" * (blocks - 1) for stage, width in enumerate(widths)]
    parts = [f"{widths[0]}C3p1", *stages, "A", str(classes)]
    return _Plan("-".join(parts), gain=2.0, bias_last=True, sum_last=True)


class _Builder:
    """Appends nodes; `here` names the node whose output goes on, and `current` tells that it is no spikes."""

    def __init__(self, section: NetworkSection, plan: _Plan, in_shape: Shape) -> None:
        self.section = section
        self.plan = plan
        self.text = plan.text
        self.block: Block = plan.block or section.block
        self.neuron = section.neuron()
        self.nodes: dict[str, Node] = {}
        self.counts = {"conv": 0, "dense": 0, "pool": 0, "block": 0}
        self.here = self._append(Source("input", (), in_shape))
        self.current = False

    def build(self, classes: int) -> tuple[Node, ...]:
        parts = self.text.split("-")
        for index, part in enumerate(parts):
            following = parts[index + 1] if index + 1 < len(parts) else None
            if match := _POOL.fullmatch(part):
                self._pool(part, int(match[1]))
            elif part == "A":
                self._average_image(part)
            elif match := _CONV.fullmatch(part):
                kernel, padding, stride = int(match[2]), int(match[3] or 0), int(match[4] or 1)
                membrane_next = self.block == "membrane" and following is not None and _BLOCK.fullmatch(following)
                self._convolution(part, int(match[1]), kernel, stride, padding, fires=not membrane_next)
            elif match := _BLOCK.fullmatch(part):
                self._residual_block(part, int(match[1]), int(match[2] or 1))
            elif (match := _DENSE.fullmatch(part)) and int(part) > 0:
                self._dense(int(part), last=following is None)
            else:
                raise RecipeError(
                    f"architecture {self.text!r}: cannot read {part!r}. Write layers like 15C5, 15C5p2, P2, R64s2, A "
                    f"or 300, or one of {', '.join(NAMES)}."
                )
        last = self.nodes[self.here]
        if last.shape != (classes,) or not self.here.startswith("dense"):
            raise RecipeError(
                f"architecture {self.text!r} must end in a dense layer of {classes} neurons, one for each class."
            )
        return tuple(self.nodes.values())

    @property
    def shape(self) -> Shape:
        return self.nodes[self.here].shape

    def _append(self, node: Node) -> str:
        self.nodes[node.name] = node
        return node.name

    def _next(self, kind: str) -> str:
        self.counts[kind] += 1
        return f"{kind}{self.counts[kind]}"

    def _refuse(self, what: str) -> RecipeError:
        return RecipeError(f"architecture {self.text!r}: {what}")

    def _pool(self, part: str, side: int) -> None:
        if len(self.shape) != 3 or side < 1 or min(self.shape[1:]) < side:
            raise self._refuse(f"{part} cannot pool an input of shape {self.shape}.")
        self._fire_currents()
        name = self._next("pool")
        if self.section.pool != "neurons":
            self.here = self._pooled(name, self.here, (side, side), (side, side), self.section.pool == "average")
            return
        averaged = self._pooled(f"{name}_average", self.here, (side, side), (side, side), average=True)
        neuron = CubaLIF(1.0, math.inf, self.section.pool_threshold, self.section.reset)
        self.here = self._append(Neurons(name, (averaged,), self.nodes[averaged].shape, neuron))

    def _average_image(self, part: str) -> None:
        if len(self.shape) != 3:
            raise self._refuse(f"{part} cannot pool an input of shape {self.shape}.")
        self._fire_currents()
        sides = (self.shape[1], self.shape[2])
        self.here = self._pooled(self._next("pool"), self.here, sides, sides, average=True)

    def _pooled(self, name: str, source: str, kernel: tuple[int, int], stride: tuple[int, int], average: bool) -> str:
        pooling = Pooling(kernel, stride, average)
        return self._append(Pool(name, (source,), pooling.shape(self.nodes[source].shape), pooling))

    def _convolution(self, part: str, channels: int, kernel: int, stride: int, padding: int, fires: bool) -> None:
        if len(self.shape) != 3:
            raise self._refuse(f"{part} follows a dense layer; a convolution needs an image.")
        self._fire_currents()
        name = self._next("conv")
        mapped = self._mapped(part, name, self.here, channels, kernel, stride, padding)
        self.here, self.current = (self._fire(name, mapped), False) if fires else (mapped, True)

    def _mapped(
        self,
        part: str,
        name: str,
        source: str,
        channels: int,
        kernel: int,
        stride: int,
        padding: int,
        gain: float = 1.0,
    ) -> str:
        """A convolution and its normalisation, if there is any."""
        shape = self.nodes[source].shape
        sides = [(extent + 2 * padding - kernel) // max(stride, 1) + 1 for extent in shape[1:]]
        if min(*sides, channels, kernel, stride) < 1:
            raise self._refuse(f"{part} does not fit an input of shape {shape}.")
        out, section = (channels, *sides), self.section
        geometry = (kernel, stride, padding, section.bias and section.norm == "none")
        weight = self._append(
            Convolution(f"{name}_weight", (source,), out, shape, *geometry, self.plan.gain, section.weight_scale)
        )
        if section.norm == "none":
            return weight
        return self._append(Norm(f"{name}_norm", (weight,), out, section.threshold, gain))

    def _fire(self, name: str, source: str) -> str:
        """A hidden population and its dropout; the node that goes on."""
        shape = self.nodes[source].shape
        fired = self._append(Neurons(name, (source,), shape, self.neuron))
        if not self.section.dropout:
            return fired
        return self._append(Dropout(f"{name}_dropout", (fired,), shape, self.section.dropout))

    def _fire_currents(self) -> None:
        """What follows membrane shortcuts takes spikes."""
        if self.current:
            self.here, self.current = self._fire(f"block{self.counts['block']}_out", self.here), False

    def _sum(self, name: str, first: str, second: str) -> str:
        return self._append(Add(name, (first, second), self.nodes[first].shape))

    def _residual_block(self, part: str, channels: int, stride: int) -> None:
        shape = self.shape
        if len(shape) != 3:
            raise self._refuse(f"{part} follows a dense layer; a residual block needs an image.")
        odd = self.block == "membrane" and (shape[1] % max(stride, 1) or shape[2] % max(stride, 1))
        if channels < 1 or stride < 1 or odd:
            raise self._refuse(f"{part} does not fit an input of shape {shape}.")
        name = self._next("block")
        strides = (1, stride) if self.plan.stride_last else (stride, 1)
        changes = channels != shape[0] or stride != 1
        source = self.here
        start = self._fire(f"{name}_1", source) if self.block == "membrane" else source
        first = self._mapped(part, f"{name}_1", start, channels, 3, strides[0], 1)
        inner = self._fire(f"{name}_2" if self.block == "membrane" else f"{name}_1", first)
        gain = 0.0 if self.block == "membrane" else 1.0
        second = self._mapped(part, f"{name}_2", inner, channels, 3, strides[1], 1, gain)
        match self.block:
            case "spike-add":
                second = self._fire(f"{name}_2", second)
                shortcut = source
                if changes:
                    mapped = self._mapped(part, f"{name}_skip", source, channels, 1, stride, 0)
                    shortcut = self._fire(f"{name}_skip", mapped)
                self.here = self._sum(f"{name}_add", second, shortcut)
            case "early":
                shortcut = source
                if channels != shape[0]:
                    shortcut = self._mapped(part, f"{name}_skip", source, channels, 1, stride, 0)
                elif stride != 1:
                    shortcut = self._pooled(f"{name}_skip", source, (1, 1), (stride, stride), average=False)
                self.here = self._fire(f"{name}_2", self._sum(f"{name}_add", second, shortcut))
            case "membrane":
                shortcut = source
                if stride != 1:
                    sides = (stride, stride)
                    shortcut = self._pooled(f"{name}_skip_pool", source, sides, sides, average=True)
                if changes:
                    shortcut = self._mapped(part, f"{name}_skip", shortcut, channels, 1, 1, 0)
                self.here, self.current = self._sum(f"{name}_add", second, shortcut), True

    def _dense(self, size: int, last: bool) -> None:
        self._fire_currents()
        name, source = self._next("dense"), self.here
        if len(self.shape) > 1:
            source = self._append(Flatten(f"{name}_flatten", (source,), (math.prod(self.shape),)))
        bias = self.section.bias or (last and self.plan.bias_last)
        gain = 2.0 if self.plan.gain is None else self.plan.gain
        mapped = self._append(Dense(f"{name}_weight", (source,), (size,), self.nodes[source].shape, bias, gain))
        if not last:
            self.here = self._fire(name, mapped)
            return
        integrates = self.section.output == "membrane"
        neuron = replace(self.neuron, levels=())
        if integrates and self.plan.sum_last:
            neuron = replace(neuron, tau_syn=1.0, tau_mem=math.inf)
        self.here = self._append(Neurons(name, (mapped,), (size,), neuron, integrates))
