"""Learning rules: each is the backward pass of a neuron's whole time window."""

from collections.abc import Callable

import torch

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.rules.csbp import CSBP

Rule = Callable[[torch.Tensor, CubaLIF], torch.Tensor]
"""(x of (steps, batch, ...), neuron) -> spikes of the same shape, differentiable by the rule."""

__all__ = ["CSBP", "Rule"]
