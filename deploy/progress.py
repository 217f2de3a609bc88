"""What stages tell while they work. The command line shows it; the Python API is silent by default."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from spikeport.models.checkpoint import Epoch


class Progress(Protocol):
    """Where stages report."""

    def task(self, title: str, total: int, unit: str = "") -> "TaskContext":
        """A task of `total` units; use as `with progress.task(...) as advance: advance(units done so far)`.

        Where the plural `unit` is named ("samples"), the rate at which they are done is of interest.
        """
        ...

    def training(self, batches: int, epochs: int) -> AbstractContextManager["TrainingView"]:
        """A training of so many batches in all, over so many epochs."""
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...


class TrainingView(Protocol):
    """What a running training tells."""

    def advance(self, done: int) -> None:
        """So many batches are done."""
        ...

    def epoch(self, epoch: Epoch) -> None:
        """An epoch is over."""
        ...


class TaskContext(Protocol):
    """Context manager of a running task; entering gives the function that takes (units done, note)."""

    def __enter__(self) -> Callable[..., None]: ...

    def __exit__(self, *details: object) -> bool | None: ...


class Silent:
    """Says nothing."""

    @contextmanager
    def task(self, title: str, total: int, unit: str = "") -> Iterator[Callable[..., None]]:
        yield lambda done, note="": None

    @contextmanager
    def training(self, batches: int, epochs: int) -> Iterator[TrainingView]:
        yield _SilentTraining()

    def say(self, text: str) -> None:
        return None


class _SilentTraining:
    def advance(self, done: int) -> None:
        return None

    def epoch(self, epoch: Epoch) -> None:
        return None


def epoch_line(epoch: Epoch) -> str:
    """An epoch in a line: the means over populations."""
    firing, dead = (sum(values.values()) / max(len(values), 1) for values in (epoch.firing_rate, epoch.dead_share))
    return (
        f"loss {epoch.loss:.4g}, validation {epoch.validation_accuracy:.2%}, firing {firing:.1%}, dead {dead:.1%}, "
        f"{epoch.spikes_per_sample:,.0f} spikes a sample"
    )
