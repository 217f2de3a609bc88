"""Networks that can be trained and deployed, written as in the literature: `15C5-P2-40C5-P2-300-10`.

    15C5      convolution to 15 channels, 5x5 kernel     (15C5p2: padding 2; 15C5s2: stride 2)
    P2        sum pooling 2x2 of the spikes before the next layer
    300       300 neurons, all to all

Every convolution and dense layer is followed by a population of CUBA LIF neurons, the last one included. There are no
biases: with a synaptic filter they would cost the chip an extra constant source.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.errors import RecipeError
from spikeport.models.rules import Rule

_CONV = re.compile(r"(\d+)C(\d+)(?:p(\d+))?(?:s(\d+))?")
_POOL = re.compile(r"P(\d+)")
_DENSE = re.compile(r"(\d+)")


@dataclass(frozen=True)
class LayerSpec:
    """One population and the linear map into it. `pool`: side of the sum pooling before the map, 1 for none."""

    name: str
    kind: Literal["conv", "dense"]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    kernel: int = 0
    padding: int = 0
    stride: int = 1
    pool: int = 1

    @property
    def pooled_shape(self) -> tuple[int, ...]:
        """Shape after pooling, (channels, height, width) or (n,)."""
        return _pooled(self.in_shape, self.pool)


def _pooled(shape: tuple[int, ...], pool: int) -> tuple[int, ...]:
    return shape if pool == 1 else (shape[0], shape[1] // pool, shape[2] // pool)


def parse_architecture(text: str, in_shape: tuple[int, ...], classes: int) -> list[LayerSpec]:
    """Read an architecture string for inputs of `in_shape` (channels, height, width).

    Raises RecipeError naming the part that cannot be read, does not fit its input, or the wrong number of classes.
    """
    layers: list[LayerSpec] = []
    shape, pool = in_shape, 1
    for part in text.split("-"):
        if match := _POOL.fullmatch(part):
            pool *= int(match[1])
            if len(shape) != 3 or pool < 1 or min(_pooled(shape, pool)) < 1:
                raise RecipeError(f"architecture {text!r}: {part} cannot pool an input of shape {shape}.")
            continue
        if match := _CONV.fullmatch(part):
            channels, kernel, padding = (int(group or 0) for group in match.groups()[:3])
            stride = int(match[4] or 1)
            if len(shape) != 3:
                raise RecipeError(f"architecture {text!r}: {part} follows a dense layer; a convolution needs an image.")
            inner = _pooled(shape, pool)
            size = [(extent + 2 * padding - kernel) // max(stride, 1) + 1 for extent in inner[1:]]
            if min(*size, channels, kernel, stride) < 1:
                raise RecipeError(f"architecture {text!r}: {part} does not fit an input of shape {inner}.")
            name = f"conv{1 + sum(layer.kind == 'conv' for layer in layers)}"
            spec = LayerSpec(name, "conv", shape, (channels, *size), kernel, padding, stride, pool)
        elif (match := _DENSE.fullmatch(part)) and int(part) > 0:
            name = f"dense{1 + sum(layer.kind == 'dense' for layer in layers)}"
            spec = LayerSpec(name, "dense", shape, (int(part),), pool=pool)
        else:
            raise RecipeError(
                f"architecture {text!r}: cannot read {part!r}. Write layers like 15C5, 15C5p2, P2 or 300."
            )
        layers.append(spec)
        shape, pool = spec.out_shape, 1
    if not layers or pool != 1 or shape != (classes,):
        raise RecipeError(f"architecture {text!r} must end in a dense layer of {classes} neurons, one for each class.")
    return layers


class SpikingNetwork(nn.Module):
    """A feed-forward spiking network trained under one rule."""

    def __init__(self, specs: list[LayerSpec], neuron: CubaLIF, rule: Rule, input_unit: float = 1.0) -> None:
        super().__init__()
        self.specs = specs
        self.neuron = neuron
        self.rule = rule
        self.input_unit = input_unit
        self.maps = nn.ModuleDict({spec.name: _linear_map(spec) for spec in specs})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Input spikes (steps, batch, *in_shape) -> spikes of every population (steps, batch, *out_shape)."""
        steps, batch = x.shape[:2]
        spikes: dict[str, torch.Tensor] = {}
        s = x * self.input_unit
        for spec in self.specs:
            s = s.flatten(0, 1)
            if spec.pool > 1:
                s = F.avg_pool2d(s, spec.pool, divisor_override=1)
            if spec.kind == "dense":
                s = s.flatten(1)
            s = self.rule(self.maps[spec.name](s).unflatten(0, (steps, batch)), self.neuron)
            spikes[spec.name] = s
        return spikes

    def weight(self, name: str) -> torch.Tensor:
        """Weights of the map into a population, detached and on the CPU."""
        return self.maps[name].get_parameter("weight").detach().cpu()

    @property
    def output(self) -> str:
        """Name of the last population."""
        return self.specs[-1].name


def _linear_map(spec: LayerSpec) -> nn.Module:
    if spec.kind == "conv":
        return nn.Conv2d(spec.in_shape[0], spec.out_shape[0], spec.kernel, spec.stride, spec.padding, bias=False)
    n_in = 1
    for extent in spec.pooled_shape:
        n_in *= extent
    linear = nn.Linear(n_in, spec.out_shape[0], bias=False)
    nn.init.kaiming_normal_(linear.weight)
    return linear
