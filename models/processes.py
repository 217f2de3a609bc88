"""Training on several processes, as `torchrun` starts them: each takes a share of every batch.

Losses are sums over the batch, so that the gradients of the shares add up to the gradient of the batch: the weights of
all processes stay equal, and equal to those of one process but for the rounding of the sums.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed

from spikeport.models.errors import TrainingError

T = TypeVar("T")


def is_first_process() -> bool:
    """True in the process that writes files and prints; known before torch's process group is."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True)
class Processes:
    """This process among all of a training; one that is alone by default."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, values: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This process's part of a batch, contiguous; the first processes get one sample more where it does not go
        up, and the last ones none where there are fewer samples than processes."""
        return values if self.size == 1 else values.tensor_split(self.size, dim)[self.rank]

    def add(self, tensors: list[torch.Tensor]) -> None:
        """Replace tensors by their sums over all processes."""
        if self.size == 1 or not tensors:
            return
        # one message for all tensors: most of them are small
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def gather(self, value: T) -> list[T]:
        """A value of each process, by rank, in every process."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """The first process's value, in every process."""
        return self.gather(value)[0]


@contextmanager
def join_processes(device: str | None) -> Iterator[Processes]:
    """This process among those that `torchrun` started, on its device; leaves the group at the end if it made it.

    device: torch device; by default a GPU where there is one, each process of a machine its own.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpu = torch.cuda.is_available() and (device is None or device.startswith("cuda"))
    if gpu and device is None and local >= torch.cuda.device_count():
        raise TrainingError(
            f"process {local} of this machine finds {torch.cuda.device_count()} GPUs. "
            "Start no more processes than there are GPUs: torchrun --nproc-per-node."
        )
    place = torch.device(device or (f"cuda:{local}" if gpu else "cpu"))
    distributed = torch.distributed.is_available()
    made = distributed and not torch.distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if place.index is not None:
        torch.cuda.set_device(place)
    if made:
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
    try:
        if distributed and torch.distributed.is_initialized():
            yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), place)
        else:
            yield Processes(device=place)
    finally:
        if made:
            torch.distributed.destroy_process_group()
