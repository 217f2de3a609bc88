"""Networks that can be trained and deployed: the nodes of an architecture with their parameters, run over a window.

Maps work on all steps of all samples at once, and a population on the whole window of each of its neurons. Images lie
in memory pixel by pixel, the channels of one pixel together (torch.channels_last): convolutions are fastest with that.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

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
    parse_architecture,
)
from spikeport.models.cuba_lif import CubaLIF, integrate
from spikeport.models.errors import RecipeError
from spikeport.models.recipe import Recipe
from spikeport.models.rules import RateBP, Rule
from spikeport.models.spike_convolution import convolve_layer

__all__ = ["SpikingNetwork", "TdBatchNorm", "TrainableNetwork", "build_network", "parse_architecture"]


def build_network(recipe: Recipe, in_shape: Shape, classes: int) -> "SpikingNetwork":
    """The untrained network of a recipe. Raises RecipeError where its architecture or its rule does not fit."""
    nodes = parse_architecture(recipe.network, in_shape, classes)
    return SpikingNetwork(nodes, recipe.network.neuron(), recipe.rule.build(), recipe.build_encoder().unit)


class TdBatchNorm(nn.BatchNorm2d):
    """y = threshold gain (x - mean) / sqrt(var + eps) + bias for each channel of (steps x batch, channels, ...).

    Mean and variance are those of the window while training, and running ones otherwise (tdBN: Zheng et al., AAAI
    2021).
    """

    def __init__(self, channels: int, threshold: float, gain: float) -> None:
        super().__init__(channels)
        self.threshold = threshold
        nn.init.constant_(self.weight, gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight * self.threshold,
            self.bias,
            self.training,
            self.momentum or 0.0,
            self.eps,
        )

    def factor_and_shift(self) -> tuple[torch.Tensor, torch.Tensor]:
        """y = factor x + shift with the running statistics, float64 (channels,)."""
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, variance, gain = self.running_mean.double(), self.running_var.double(), self.weight.detach().double()
        factor = self.threshold * gain / torch.sqrt(variance + self.eps)
        return factor, self.bias.detach().double() - factor * mean


class TrainableNetwork(nn.Module):
    """What training and evaluation need of a network.

    neuron: the readout takes its filter. spike_cost: what each spike before the output adds to the loss; training
    raises it as it goes on.
    """

    neuron: CubaLIF
    spike_cost: float

    @property
    def populations(self) -> dict[str, Neurons]:
        """The populations by name, in order, the output last."""
        raise NotImplementedError

    @property
    def output(self) -> str:
        """Name of the last population."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, output_alone: bool = False) -> dict[str, torch.Tensor]:
        """Input spikes (steps, batch, *in_shape) -> spikes of every population (steps, batch, *shape), in order.

        An output population that integrates gives its membranes. With `output_alone`, others may be left out.
        """
        raise NotImplementedError


class SpikingNetwork(TrainableNetwork):
    """A feed-forward spiking network trained under one rule.

    Args:
        nodes: in topological order; the first is the input and the last the output population.
        neuron: the recipe's, which most populations have; the readout takes its filter.
        input_unit: what one unit of an input spike's payload stands for.

    Raises RecipeError where the rule is not defined for one of the neurons, or for batch normalisation.
    """

    def __init__(self, nodes: Sequence[Node], neuron: CubaLIF, rule: Rule, input_unit: float = 1.0) -> None:
        super().__init__()
        self.nodes = tuple(nodes)
        self.neuron = neuron
        self.rule = rule
        self.input_unit = input_unit
        self.spike_cost = 0.0
        self.maps = nn.ModuleDict({node.name: made for node in self.nodes if (made := _parameters(node)) is not None})
        for node in self.nodes:
            if isinstance(node, Norm) and rule.rate_level:
                raise RecipeError(f'{rule.title} has no batch normalisation. Set network.norm = "none".')
            if isinstance(node, Neurons) and not node.integrates:
                rule.check(node.neuron)
        last_use = {source: node.name for node in self.nodes for source in node.inputs}
        self._spent: dict[str, list[str]] = {node.name: [] for node in self.nodes}
        for source, user in last_use.items():
            self._spent[user].append(source)
        users = Counter(source for node in self.nodes for source in node.inputs)
        pools = {node.inputs[0]: node for node in self.nodes if isinstance(node, Pool)}
        self._pooled = {name: pool for name, pool in pools.items() if name in self.populations and users[name] == 1}

    @property
    def in_shape(self) -> Shape:
        """Shape of the input at one step."""
        return self.nodes[0].shape

    @property
    def populations(self) -> dict[str, Neurons]:
        """The populations by name, in order, the output last."""
        return {node.name: node for node in self.nodes if isinstance(node, Neurons)}

    @property
    def output(self) -> str:
        """Name of the last population."""
        return self.nodes[-1].name

    def forward(self, x: torch.Tensor, output_alone: bool = False) -> dict[str, torch.Tensor]:
        """Input spikes (steps, batch, *in_shape) -> spikes of every population (steps, batch, *shape), in order.

        An output population that integrates gives its membranes. Under a rule of rates only the output carries
        gradients: those of its mean over time. With `output_alone`, populations that are pooled next may be left out,
        as their windows pool them on the way.
        """
        if isinstance(self.rule, RateBP) and torch.is_grad_enabled():
            return self._with_rate_gradients(x, self.rule)
        return self._run(x, {}, self._pooled if output_alone else {})

    def _run(
        self, x: torch.Tensor, masks: dict[str, torch.Tensor], pooled: Mapping[str, Pool]
    ) -> dict[str, torch.Tensor]:
        """`masks` is filled with the dropout of this window; `pooled`: pools that the windows of populations do."""
        steps = x.shape[0]
        constant = steps > 1 and x.stride(0) == 0  # the same frame at every step goes through the maps once
        values = {self.nodes[0].name: self._scaled(x[:1] if constant else x)}
        found: dict[str, torch.Tensor] = {}
        for node in self.nodes[1:]:
            if node.name in values:
                continue  # a pool that the window before it has done
            inputs = [values[name] for name in node.inputs]
            if not isinstance(node, Neurons):
                values[node.name] = self._linear(node, inputs, masks)
            elif pool := pooled.get(node.name):
                values[pool.name] = self._rule_of(node).pooled(inputs[0], node.neuron, pool.pooling, steps)
            else:
                if node.integrates:
                    # a sum over the window, and what the loss reads: never in a reduced precision
                    wide = torch.promote_types(inputs[0].dtype, torch.float32)
                    out = integrate(inputs[0].to(wide).expand(steps, *inputs[0].shape[1:]), node.neuron)
                else:
                    out = self._rule_of(node)(inputs[0], node.neuron, steps)
                values[node.name] = found[node.name] = out
            for name in self._spent[node.name]:
                del values[name]
        return found

    def _with_rate_gradients(self, x: torch.Tensor, rule: RateBP) -> dict[str, torch.Tensor]:
        """One pass without gradients for the spikes, and one over mean rates, of (1, batch, ...), with them."""
        masks: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            found = self._run(x, masks, {})
        steps = x.shape[0]
        values = {self.nodes[0].name: self._scaled(x.mean(dim=0, keepdim=True))}
        for node in self.nodes[1:]:
            inputs = [values[name] for name in node.inputs]
            if not isinstance(node, Neurons):
                values[node.name] = self._linear(node, inputs, masks)
            elif node.integrates:
                # the membranes that the mean input would have made; the value stays the true ones
                ones = torch.ones((steps, *[1] * (inputs[0].dim() - 1)), dtype=inputs[0].dtype, device=x.device)
                found[node.name] = found[node.name] + integrate(ones, node.neuron) * _zero_valued(inputs[0])
            else:
                mean = found[node.name].mean(dim=0)
                values[node.name] = self._rule_of(node).rate(inputs[0][0], mean, node.neuron, steps)[None]
                if node.name == self.output:
                    found[node.name] = found[node.name] + _zero_valued(values[node.name])
            for name in self._spent[node.name]:
                del values[name]
        return found

    def _rule_of(self, node: Neurons) -> Any:
        """The rule with what a spike costs now; spikes of the output, which the loss wants, cost nothing."""
        if node.name == self.output or not self.spike_cost:
            return self.rule
        return replace(self.rule, spike_cost=self.spike_cost)

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.input_unit == 1.0 else x * self.input_unit

    def _linear(self, node: Node, inputs: list[torch.Tensor], masks: dict[str, torch.Tensor]) -> torch.Tensor:
        """The output of a node that is no population; all (steps, batch, ...)."""
        first = inputs[0]
        match node:
            case Convolution():
                layer = self.maps[node.name]
                assert isinstance(layer, nn.Conv2d)
                return convolve_layer(layer, first.flatten(0, 1)).unflatten(0, first.shape[:2])
            case Dense() | Norm():
                out: torch.Tensor = self.maps[node.name](first.flatten(0, 1))
                return out.unflatten(0, first.shape[:2])
            case Pool():
                return node.pooling(first)
            case Flatten():
                return first.flatten(2)
            case Add():
                return inputs[0] + inputs[1]
            case Dropout():
                if not self.training:
                    return first
                if node.name not in masks:
                    masks[node.name] = torch.empty_like(first[:1]).bernoulli_(1 - node.rate).div_(1 - node.rate)
                return first * masks[node.name]
        raise TypeError(f"no way to run a {type(node).__name__}.")


def _parameters(node: Node) -> nn.Module | None:
    """The trainable part of a node, with its initial values."""
    match node:
        case Convolution():
            conv = nn.Conv2d(node.in_shape[0], node.shape[0], node.kernel, node.stride, node.padding, bias=node.bias)
            if node.gain is not None:
                nn.init.normal_(conv.weight, std=math.sqrt(node.gain / math.prod(conv.weight.shape[1:])))
            with torch.no_grad():
                conv.weight.mul_(node.scale)
            conv.weight.data = _channels_last(conv.weight.data)
            return _without_bias(conv)
        case Dense():
            linear = nn.Linear(node.in_shape[0], node.shape[0], bias=node.bias)
            nn.init.normal_(linear.weight, std=math.sqrt(node.gain / node.in_shape[0]))
            return _without_bias(linear)
        case Norm():
            return TdBatchNorm(node.shape[0], node.threshold, node.gain)
    return None


def _channels_last(weight: torch.Tensor) -> torch.Tensor:
    """The weights in the layout that the output takes over; for a single channel torch would pick another."""
    _, channels, height, width = weight.shape
    strides = (height * width * channels, 1, width * channels, channels)
    return torch.empty_strided(weight.shape, strides, dtype=weight.dtype).copy_(weight)


def _without_bias(module: nn.Conv2d | nn.Linear) -> nn.Module:
    """Biases start at zero."""
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def _zero_valued(x: torch.Tensor) -> torch.Tensor:
    """Zero with the gradient of x."""
    return x - x.detach()
