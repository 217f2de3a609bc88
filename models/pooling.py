"""Sum pooling of spikes. On the CPU its backward pass is compiled (Numba) for channels-last memory, where torch's takes
several times as long in bfloat16; windows do not overlap there, so that each error is copied to its window."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from spikeport.models.rules.window_compiled import in_blocks, jit

VIEWED_AS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}
"""Errors are only copied, so that the kernel needs no arithmetic on them."""


def sum_pool(x: torch.Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> torch.Tensor:
    """Sums of windows of x (n, channels, height, width), `stride` apart; rows and columns left over are dropped."""
    dense = x.is_contiguous(memory_format=torch.channels_last)
    if x.device.type == "cpu" and x.dtype in VIEWED_AS and kernel == stride and dense and x.requires_grad:
        out: torch.Tensor = _SumPool.apply(x, kernel)
        return out
    return F.avg_pool2d(x, kernel, stride, divisor_override=1)


class _SumPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kernel: tuple[int, int]) -> torch.Tensor:
        ctx.kernel, ctx.shape = kernel, x.shape
        return F.avg_pool2d(x, kernel, divisor_override=1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        out = torch.empty(ctx.shape, dtype=gradient.dtype, memory_format=torch.channels_last)
        errors, outputs, kernel = _pixels(gradient), _pixels(out), ctx.kernel

        def work(start: int, stop: int) -> None:
            _spread(errors, outputs, start, stop, kernel)

        n, channels, height, width = ctx.shape
        in_blocks(work, (height * width * channels, n))
        return out, None


def _pixels(x: torch.Tensor) -> np.ndarray:
    """x in memory order, (n, height, width, channels)."""
    array: np.ndarray = x.detach().permute(0, 2, 3, 1).view(VIEWED_AS[x.dtype]).numpy()
    return array


@jit
def _spread(error, out, start, stop, kernel):  # type: ignore[no-untyped-def]
    rows, columns, channels = error.shape[1:]
    down, right = kernel
    for n in range(start, stop):
        for row in range(out.shape[1]):
            for column in range(out.shape[2]):
                pixel = out[n, row, column]
                if row < rows * down and column < columns * right:
                    source = error[n, row // down, column // right]
                    for c in range(channels):
                        pixel[c] = source[c]
                else:
                    for c in range(channels):
                        pixel[c] = 0
