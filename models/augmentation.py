"""Random changes to training images, the same for all steps of a recording. Zeros move in from the sides."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from spikeport.models.errors import DataError


def shift(images: torch.Tensor, pixels: int, generator: torch.Generator) -> torch.Tensor:
    """Each image (batch, channels, height, width) moved by up to `pixels` in both directions.

    The same as a random crop of the image padded with `pixels` zeros on each side.
    """
    height, width = images.shape[2:]
    rows, columns = torch.randint(0, 2 * pixels + 1, (2, len(images)), generator=generator).to(images.device)
    crops = F.pad(images, [pixels] * 4).unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(len(images), device=images.device), :, rows, columns]


def flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image (batch, channels, height, width) mirrored left to right with probability 1/2."""
    chosen = torch.randint(0, 2, (len(images),), generator=generator, dtype=torch.bool).to(images.device)
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def rotate_and_scale(images: torch.Tensor, degrees: float, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Each image (batch, channels, height, width) turned by up to `degrees` and magnified by 1 - scale to 1 + scale.

    Both are uniform, about the image's centre, with bilinear interpolation.
    """
    turn, size = (2 * torch.rand((2, len(images)), generator=generator) - 1).to(images.device, images.dtype)
    angle, zoom = turn * math.radians(degrees), 1 + size * scale
    height, width = images.shape[2:]
    cosine, sine = angle.cos() / zoom, angle.sin() / zoom
    # grid_sample counts both axes from -1 to 1, so that on an oblong image a turn needs their ratio
    rows = [cosine, -sine * height / width, torch.zeros_like(cosine), sine * width / height, cosine]
    matrix = torch.stack([*rows, torch.zeros_like(cosine)], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@dataclass(frozen=True)
class Augmentation:
    """What happens to a batch of training images, in this order.

    shift_pixels: moved by up to so many pixels. flip: mirrored left to right, half of them. rotate_degrees: turned by
    up to so many degrees. scale: magnified by a factor of 1 - scale to 1 + scale.
    """

    shift_pixels: int = 0
    flip: bool = False
    rotate_degrees: float = 0.0
    scale: float = 0.0

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """images: (batch, channels, height, width), or (batch, steps, channels, height, width) of recordings.

        Only shifts and flips keep the whole numbers of recordings. Raises DataError where others are asked for.
        """
        steps = images.shape[1] if images.dim() == 5 else None
        if steps is not None:
            if self.rotate_degrees or self.scale:
                raise DataError("recordings cannot be rotated or scaled; shift and flip keep their spikes whole.")
            images = images.flatten(1, 2)
        if self.shift_pixels:
            images = shift(images, self.shift_pixels, generator)
        if self.flip:
            images = flip(images, generator)
        if self.rotate_degrees or self.scale:
            images = rotate_and_scale(images, self.rotate_degrees, self.scale, generator)
        return images if steps is None else images.unflatten(1, (steps, -1))
