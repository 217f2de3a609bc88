"""Encoders: from values in 0..1 to integer spikes over a window. What is trained on is what the chip receives."""

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np
import torch

from spikeport.models.errors import DataError

EncoderName = Literal["rate", "graded", "poisson", "latency", "events"]

SILENT_BELOW = 0.5 / 255
"""A value below half a level of an 8-bit image has no latency spike: it is background."""


@dataclass(frozen=True)
class Encoder:
    """How values become spikes.

    rate: deterministic, binary. A value p fires round(p T) times, evenly spread: spike at step t where
        floor((t + 1) p + 1/2) > floor(t p + 1/2).
    graded: the value, rounded to `message_bits`, as a graded spike at every step (Loihi 2 only). It is the literature's
        direct encoding, with the payload's bits.
    poisson: binary, a spike with the probability p * rate_scale at each step, independently.
    latency: binary, at most one spike, at step round((1 - p)(T - 1)); none for p < 0.5/255 (`SILENT_BELOW`).
    events: the values already are spikes, (batch, T, ...), of recordings binned into T frames.

    seed: decides the Poisson spikes of numbered samples.
    gain: factor of `unit`, so of the weighted input that one spike causes.
    """

    name: EncoderName
    steps: int
    message_bits: int = 1
    gain: float = 1.0
    rate_scale: float = 1.0
    seed: int = 0

    @property
    def unit(self) -> float:
        """Value that one unit of a spike's payload stands for; a Scale node carries it in the exported network."""
        return self.gain / ((1 << self.message_bits) - 1) if self.name == "graded" else self.gain

    def __call__(
        self, values: torch.Tensor, first_index: int | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """values: (batch, ...) in 0..1 -> integer-valued spikes (steps, batch, ...) of the same dtype.

        For poisson only:
            first_index: number of the batch's first sample in its split. The spikes of a sample then depend on `seed`,
                its number and the step alone, whatever the batch, the dtype or the device.
            generator: where the spikes are drawn from if there is no first_index.

        Raises DataError where events have another number of steps.
        """
        match self.name:
            case "rate":
                ticks = torch.arange(self.steps + 1, dtype=values.dtype, device=values.device)
                counts = (ticks.view(-1, *[1] * values.dim()) * values).add_(0.5).floor_()
                return counts[1:] - counts[:-1]
            case "graded":
                level = 1.0 / ((1 << self.message_bits) - 1)
                return (values / level).round().expand(self.steps, *values.shape)
            case "poisson":
                return self._poisson(values, first_index, generator)
            case "latency":
                # in float64, so that the dtype of an image does not decide where a half is rounded to
                p = values.double()
                when = torch.where(p < SILENT_BELOW, -1.0, torch.floor((1 - p) * (self.steps - 1) + 0.5))
                ticks = torch.arange(self.steps, device=values.device).view(-1, *[1] * values.dim())
                return (ticks == when).to(values.dtype)
            case "events":
                if values.dim() < 2 or values.shape[1] != self.steps:
                    raise DataError(
                        f"events of the shape {tuple(values.shape)} for {self.steps} steps; "
                        "bin the recordings into as many frames as the network has steps."
                    )
                return values.transpose(0, 1)
            case _:
                assert_never(self.name)

    def _poisson(
        self, values: torch.Tensor, first_index: int | None, generator: torch.Generator | None
    ) -> torch.Tensor:
        shape = (self.steps, *values.shape)
        probability = values.double() * self.rate_scale
        if first_index is not None:
            spikes = np.empty(shape, np.uint8)
            for row, p in enumerate(probability.cpu().numpy()):
                np.less(
                    self._uniform(first_index + row, (self.steps, *p.shape)), p, out=spikes[:, row], casting="unsafe"
                )
            return torch.from_numpy(spikes).to(values.device, values.dtype)
        if generator is None:
            raise ValueError("Poisson spikes need a first_index or a generator.")
        uniform = torch.rand(shape, generator=generator, device=generator.device)
        return (uniform.to(values.device) < probability).to(values.dtype)

    def _uniform(self, sample: int, shape: tuple[int, ...]) -> np.ndarray:
        """Numbers in 0..1 in steps of 2^-32, from Philox's raw words: a stream that NumPy keeps between versions."""
        count = math.prod(shape)
        words = np.random.Philox(key=np.array([self.seed, sample], np.uint64)).random_raw(-(-count // 2))
        return (words.astype("<u8").view("<u4")[:count] * 2.0**-32).reshape(shape)
