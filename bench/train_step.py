"""What the trainer and its peers do alike in `bench/train_speed.py`: networks, first weights, input, and how a step is
measured. Needs torch alone, because the peers run in an environment of their own.
"""

import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

IMAGE = (1, 28, 28)
CLASSES = 10
TAU_MEM = 5.0
THRESHOLD = 1.0
LOSS_GAIN = 10.0
LEARNING_RATE = 1e-4
INPUT_DENSITY = 0.2
CLIP_NORM = 1e6
"""Larger than any gradient: both sides take the norm, and nobody's gradient is changed."""

PEAK_RESET = Path("/proc/self/clear_refs")
"""Linux sets VmHWM back to VmRSS where a 5 is written here (proc(5))."""

ARCHITECTURES = {
    "mnist": "15C5-P2-40C5-P2-300-10",
    "fashion-fc": "400-400-10",
    "fashion-fc-rate": "400-400-10",
    "fashion-cnn": "32C5p2-P2-64C5p2-P2-1024-10",
}

ENCODERS = {"mnist": "rate", "fashion-fc": "graded", "fashion-fc-rate": "rate", "fashion-cnn": "graded"}
"""How the images of a network become spikes: as its recipe has it, and for one network in the other way as well."""
MESSAGE_BITS = 4
"""Of graded spikes."""

GAINS = {
    "mnist": (1.0, 1.0, 1.0, 1.0),
    "fashion-fc": (1.2, 2.0, 2.5),
    "fashion-fc-rate": (1.2, 2.0, 2.5),
    "fashion-cnn": (1.2, 1.1, 1.0, 2.0),
}
"""Deviation of a layer's first weights times the square root of its fan-in; about a tenth of each layer fires."""


@dataclass(frozen=True)
class Job:
    """One process: a network that is trained for some steps.

    variant: one of our rules, or a peer. counted: steps that are timed, after `warm_up` others.
    """

    network: str
    variant: str
    steps: int = 5
    batch: int = 100
    threads: int = 2
    warm_up: int = 5
    counted: int = 15
    precision: str = "float32"
    eager: bool = False

    def autocast(self) -> torch.autocast:
        """What forward passes run under: bfloat16 where that is the precision."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16")

    @classmethod
    def from_arguments(cls) -> "Job":
        """The job that a process was started with, and its number of threads set."""
        job = cls(**json.loads(sys.argv[1]))
        torch.set_num_threads(job.threads)
        return job


@dataclass(frozen=True)
class Layer:
    """A weighted layer: the shape of its weights, padding of a convolution, and whether 2 x 2 sums come before it."""

    weight: tuple[int, ...]
    padding: int
    pooled: bool


def layers(network: str) -> list[Layer]:
    """The weighted layers of a network, in order, each in front of a population."""
    shape: tuple[int, ...] = IMAGE
    found, pooled = [], False
    for part in ARCHITECTURES[network].split("-"):
        if part == "P2":
            shape, pooled = (shape[0], shape[1] // 2, shape[2] // 2), True
            continue
        if convolution := re.fullmatch(r"(\d+)C(\d+)(?:p(\d+))?", part):
            channels, kernel, padding = (int(group or 0) for group in convolution.groups())
            found.append(Layer((channels, shape[0], kernel, kernel), padding, pooled))
            shape = (channels, *(side + 2 * padding - kernel + 1 for side in shape[1:]))
        else:
            found.append(Layer((int(part), math.prod(shape)), 0, pooled))
            shape = (int(part),)
        pooled = False
    return found


def first_weights(network: str) -> list[torch.Tensor]:
    """The weights that every implementation starts from."""
    draws = torch.Generator().manual_seed(1)
    return [
        torch.randn(layer.weight, generator=draws) * gain / math.sqrt(math.prod(layer.weight[1:]))
        for layer, gain in zip(layers(network), GAINS[network], strict=True)
    ]


def images_and_labels(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (batch, 1, 28, 28) in 0..1, most pixels black, of a mean of INPUT_DENSITY; and labels."""
    draws = torch.Generator().manual_seed(2)
    lit = torch.rand((batch, *IMAGE), generator=draws) < 1.5 * INPUT_DENSITY
    grey = (1 + 2 * torch.rand((batch, *IMAGE), generator=draws)) / 3
    return torch.where(lit, grey, 0.0), torch.randint(CLASSES, (batch,), generator=draws)


def frames(images: torch.Tensor, job: Job) -> torch.Tensor:
    """Spikes of a window (steps, batch, ...).

    rate: a value p fires round(p steps) times, evenly spread. graded: the value, of MESSAGE_BITS, at every step.
    """
    if ENCODERS[job.network] == "graded":
        levels = (1 << MESSAGE_BITS) - 1
        return ((images * levels).round() / levels).expand(job.steps, *images.shape)
    ticks = torch.arange(job.steps + 1, dtype=images.dtype).view(-1, *[1] * images.dim())
    counts = torch.floor(ticks * images + 0.5)
    return counts[1:] - counts[:-1]


def rates(spikes: list[torch.Tensor]) -> list[float]:
    """Mean firing rate of each, the input first."""
    return [float(each.detach().float().mean()) for each in spikes]


def measure(step: Callable[[], object], job: Job) -> dict[str, Any]:
    """Median seconds of a step, and the most memory that this process held during all of them, in MiB."""
    PEAK_RESET.write_text("5", encoding="ascii")  # the peak of what came before the steps is none of theirs
    times = []
    for _ in range(job.warm_up + job.counted):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return {
        "seconds": statistics.median(times[job.warm_up :]),
        "peak_mib": memory_mib("VmHWM"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def memory_mib(what: str) -> float:
    """VmRSS or VmHWM of this process, as Linux tells them."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) / 1024
