"""Encoders: from values in 0..1 to integer spikes over a window. What is trained on is what the chip receives."""

from dataclasses import dataclass
from typing import Literal

import torch

EncoderName = Literal["rate", "graded"]


@dataclass(frozen=True)
class Encoder:
    """How values become spikes.

    rate: deterministic, binary. A value p fires round(p T) times, evenly spread: spike at step t where
        floor((t + 1) p + 1/2) > floor(t p + 1/2).
    graded: the value, rounded to `message_bits`, as a graded spike at every step (Loihi 2 only).
    """

    name: EncoderName
    steps: int
    message_bits: int = 1

    @property
    def unit(self) -> float:
        """Value that one unit of a spike's payload stands for; a Scale node carries it in the exported network."""
        return 1.0 if self.name == "rate" else 1.0 / ((1 << self.message_bits) - 1)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """values: (batch, ...) in 0..1 -> integer-valued spikes (steps, batch, ...) of the same dtype."""
        if self.name == "graded":
            levels = (values / self.unit).round()
            return levels.expand(self.steps, *values.shape)
        ticks = torch.arange(self.steps + 1, dtype=values.dtype, device=values.device)
        counts = torch.floor(ticks.view(-1, *[1] * values.dim()) * values + 0.5)
        return counts[1:] - counts[:-1]
