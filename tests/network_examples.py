"""Small networks for tests: settings in a line, and weights and statistics with which every population fires."""

from typing import Any

import torch

from spikeport.models.architectures import Node, parse_architecture
from spikeport.models.networks import SpikingNetwork, TdBatchNorm
from spikeport.models.recipe import NetworkSection
from spikeport.models.rules import STBP, Rule

Shape = tuple[int, ...]


def section(architecture: str, **settings: Any) -> NetworkSection:
    """A [network] section; what the test does not care about is that of the MNIST tables."""
    given: dict[str, Any] = {"steps": 5, "tau_mem": 5.0, "tau_syn": 3.0} | settings
    return NetworkSection(architecture=architecture, **given)


def nodes(architecture: str, in_shape: Shape, classes: int, **settings: Any) -> dict[str, Node]:
    """The nodes of an architecture by name."""
    return {node.name: node for node in parse_architecture(section(architecture, **settings), in_shape, classes)}


def network(
    architecture: str,
    in_shape: Shape,
    classes: int = 3,
    rule: Rule | None = None,
    input_unit: float = 1.0,
    **settings: Any,
) -> SpikingNetwork:
    """An untrained network."""
    given = section(architecture, **settings)
    return SpikingNetwork(parse_architecture(given, in_shape, classes), given.neuron(), rule or STBP(), input_unit)


def settled(made: SpikingNetwork, x: torch.Tensor, seed: int = 0) -> SpikingNetwork:
    """The network in float64, evaluating, after batches of training mode: its running statistics are those of x, its
    gains and shifts random, and its weights large enough to fire."""
    made = made.double().train()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in made.maps.values():
            for name, parameter in module.named_parameters():
                if isinstance(module, TdBatchNorm) or name == "bias":
                    parameter.add_(0.4 * torch.rand(parameter.shape, generator=generator))
                else:
                    parameter.mul_(1.5).add_(0.5 / parameter[0].numel())
        for _ in range(4):
            made(x)
    return made.eval()
