"""Sum and average pooling of spikes, by itself or as the last step of a window (`spikeport.models.rules`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Pooling:
    """Sums, or means, over windows of `kernel` (height, width) at steps of `stride`; what is left over is dropped."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    average: bool = False

    @property
    def divisor(self) -> int:
        """What a window's sum is divided by."""
        return self.kernel[0] * self.kernel[1] if self.average else 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Pool images (n, channels, height, width), or windows of them (steps, batch, channels, height, width)."""
        images = x.flatten(0, -4)
        pooled = F.avg_pool2d(images, self.kernel, self.stride, divisor_override=self.divisor)
        return pooled.unflatten(0, x.shape[:-3])

    def tiles(self, height: int, width: int) -> bool:
        """True where the windows lie side by side and leave nothing of the image out."""
        return self.kernel == self.stride and height % self.kernel[0] == 0 and width % self.kernel[1] == 0

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of pooled images of this shape (..., height, width)."""
        sides = zip(shape[-2:], self.kernel, self.stride, strict=True)
        return (*shape[:-2], *((side - window) // step + 1 for side, window, step in sides))
