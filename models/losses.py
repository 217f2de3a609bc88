"""Losses on the output of a window."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from spikeport.models.cuba_lif import filter_spikes

LossName = Literal["kernel", "count", "rate_cross_entropy", "squared_error"]


@dataclass(frozen=True)
class Loss:
    """A loss, summed over the batch; the settings that another loss reads are ignored.

    tau_syn: time constant of `kernel`'s filter in steps. desired, undesired: spike counts of `count`. gain: factor on
    the mean output before the softmax of `rate_cross_entropy`. membrane: the output is that of
    neurons that integrate, whose mean input a step is the last membrane over the number of steps.
    """

    name: LossName
    tau_syn: float = 3.0
    desired: float = 4.0
    undesired: float = 0.0
    gain: float = 10.0
    membrane: bool = False

    def __call__(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """output: spikes or membranes (steps, batch, classes). labels: class indices (batch,)."""
        match self.name:
            case "kernel":
                return kernel_loss(output, labels, self.tau_syn)
            case "count":
                return count_loss(output, labels, self.tau_syn, self.desired, self.undesired)
            case "rate_cross_entropy":
                mean = output[-1] / output.shape[0] if self.membrane else output.mean(dim=0)
                return F.cross_entropy(self.gain * mean, labels, reduction="sum")
            case "squared_error":
                return squared_error(output, labels)


def kernel_loss(spikes: torch.Tensor, labels: torch.Tensor, tau_syn: float) -> torch.Tensor:
    """Van Rossum distance to a desired spike train, summed over batch, classes and steps.

    L = 1/2 sum (a - d)^2, a and d the output and desired spikes filtered by tau_syn. The true class should fire at
    every step but the first, and from 10 steps on at every second one; every other class never (Zhang & Li, NeurIPS
    2020, as their code has it).

    Args:
        spikes: (steps, batch, classes).
        labels: (batch,), class indices.
    """
    desired = torch.zeros_like(spikes)
    every = 2 if spikes.shape[0] >= 10 else 1
    desired[1::every, torch.arange(labels.shape[0], device=labels.device), labels] = 1
    return 0.5 * (filter_spikes(spikes, tau_syn) - filter_spikes(desired, tau_syn)).square().sum()


def count_loss(
    spikes: torch.Tensor, labels: torch.Tensor, tau_syn: float, desired: float, undesired: float
) -> torch.Tensor:
    """Squared error of the filtered spike count against `desired` for the true class and `undesired` for the others.

    With e = (sum_t a[t] - target) / steps: L = steps / 2 sum e^2, so that the error at every step is e; a true class
    above `desired` and a wrong one below `undesired` have none (Zhang & Li, NeurIPS 2020, as their code has it).
    """
    steps = spikes.shape[0]
    true = F.one_hot(labels, spikes.shape[2]).bool()
    total = filter_spikes(spikes, tau_syn).sum(dim=0)
    target = torch.where(true, desired, undesired).to(total.dtype)
    error = (total - target) / steps
    settled = torch.where(true, error > 0, error < 0)
    return 0.5 * steps * error.masked_fill(settled, 0.0).square().sum()


def squared_error(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Squared distance of the last step's output over the number of steps to the one-hot label, summed (Lee et al.,
    Front. Neurosci. 14:119, 2020: the output neuron's membrane at the end over T, for a threshold of 1)."""
    wanted = F.one_hot(labels, output.shape[2]).to(output.dtype)
    return (output[-1] / output.shape[0] - wanted).square().sum()
