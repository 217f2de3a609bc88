"""What stages tell while they work. The command line shows it; the Python API is silent by default."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Where stages report."""

    def task(self, title: str, total: int, unit: str = "") -> "TaskContext":
        """A task of `total` units; use as `with progress.task(...) as advance: advance(units done so far)`.

        Where the plural `unit` is named ("samples"), the rate at which they are done is of interest.
        """
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
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

    def say(self, text: str) -> None:
        return None
