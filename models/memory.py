"""Memory of a training step: what it takes, what there is, and keeping freed pages in the process."""

import copy
import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from spikeport.models.networks import TrainableNetwork

PROBE_SAMPLES = 3


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step takes: `fixed`, whatever the batch, and so many for each sample.

    kept_per_sample: what the backward pass needs of the forward pass, all of it at the same time; a lower bound.
    per_sample: with the gradients in passing; an estimate.
    """

    fixed: int
    kept_per_sample: int
    per_sample: int

    def total(self, batch: int) -> int:
        """Estimate for a batch."""
        return self.fixed + batch * self.per_sample

    def least(self, batch: int) -> int:
        """What a batch takes at the very least."""
        return self.fixed + batch * self.kept_per_sample

    def largest_batch(self, available: int) -> int:
        """The largest batch that should fit, 0 for none."""
        return max(0, (available - self.fixed) // self.per_sample)

    def explain(self, batch: int, processes: int, available: int | None) -> str:
        """Two sentences for an error; the batch is shared by so many processes."""
        share = "" if processes == 1 else f" in each of {processes} processes"
        text = f"A step with training.batch_size = {batch} takes about {gigabytes(self.total(-(-batch // processes)))}"
        if available is None:
            return f"{text}{share}. Lower training.batch_size."
        fits = self.largest_batch(available) * processes
        advice = f"at most {fits} should fit" if fits else "not even one sample fits; make the network smaller"
        return f"{text}{share}, and {gigabytes(available)} are free. Lower training.batch_size: {advice}."


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size < 1e11 else f"{size / 1e9:,.0f} GB"


def step_memory(network: TrainableNetwork, encoded: torch.Tensor, copies: int, bfloat16: bool) -> StepMemory:
    """Measure forward passes of one sample and of all that are given.

    Args:
        encoded: input spikes (steps, PROBE_SAMPLES, ...); their values do not matter.
        copies: numbers kept beside each weight: its gradient, the optimizer's, the running mean.
    """
    one, all_ = _kept(network, encoded[:, :1], bfloat16), _kept(network, encoded, bfloat16)
    # what does not grow with the batch, like weights in another precision, is no memory of a sample
    more = encoded.shape[1] - 1
    kept = max(1, (sum(all_) - sum(one)) // more)
    # going back through a layer, the gradients of its spikes and of its sums are there beside all that is kept
    passing = 2 * max(large - small for small, large in zip(one, all_, strict=False)) // more
    parameters = sum(weight.numel() * weight.element_size() for weight in network.parameters())
    return StepMemory(copies * parameters, kept, kept + passing)


def _kept(network: TrainableNetwork, encoded: torch.Tensor, bfloat16: bool) -> list[int]:
    """Bytes of each tensor that is there between the forward and the backward pass, in order, the weights left out."""
    probe = copy.deepcopy(network)
    weights = {weight.untyped_storage().data_ptr() for weight in probe.state_dict().values()}
    sizes: dict[int, int] = {}
    held: list[torch.Tensor] = []  # a tensor that were freed could have its address taken by another

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with (
        torch.random.fork_rng(),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        torch.autocast(encoded.device.type, torch.bfloat16, enabled=bfloat16),
    ):
        for tensor in probe(encoded.clone(), output_alone=True).values():
            count(tensor)
    return list(sizes.values())


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can still get on a device; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch has taken from the driver and not given out is free to us as well
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch and Python raise where memory cannot be had."""
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h


@contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[None]:
    """Let freed memory stay in the process while training on the CPU, on Linux with glibc; elsewhere nothing happens.

    Every step allocates and frees the same large tensors. glibc takes each of them from the kernel and gives it back,
    and the kernel fills every page with zeros again at its first touch: about an eighth of a step. Afterwards the
    limits are what glibc's own adaptation arrives at for large blocks, and free pages go back.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)
