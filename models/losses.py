"""Losses on the output spikes of a window."""

import torch

from spikeport.models.cuba_lif import filter_spikes


def kernel_loss(spikes: torch.Tensor, labels: torch.Tensor, tau_syn: float) -> torch.Tensor:
    """Van Rossum distance to a desired spike train, summed over batch, classes and steps.

    L = 1/2 sum (a - d)^2, a and d the output and desired spikes filtered by tau_syn. The true class should fire at
    every step but the first, every other class never (Zhang & Li, NeurIPS 2020, as their code has it at T = 5).

    Args:
        spikes: (steps, batch, classes).
        labels: (batch,), class indices.
    """
    desired = torch.zeros_like(spikes)
    desired[1:, torch.arange(labels.shape[0], device=labels.device), labels] = 1
    return 0.5 * (filter_spikes(spikes, tau_syn) - filter_spikes(desired, tau_syn)).square().sum()
