"""Optimizers and schedules of the learning rate, as a recipe's [training] names them."""

import math

import torch

from spikeport.models.recipe import TrainingSection


def schedule(settings: TrainingSection, step: int, batches: int) -> float:
    """Factor of the learning rate for the step after `step` others, in epochs of so many batches."""
    match settings.schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * step / (settings.epochs * batches)))
        case "milestones":
            return settings.decay ** sum(step >= epoch * batches for epoch in settings.milestones)
        case "constant":
            return 1.0


def make_optimizer(settings: TrainingSection, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=decay, fused=True)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, betas=(0.9, 0.999), fused=True)
