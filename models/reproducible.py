"""Getting the same result again: random numbers by position, and operations that do not vary."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(seed: int, use: str, *position: int) -> int:
    """Seed of a generator for one use at one position of a training.

    What is drawn there hangs on nothing that was drawn before, so that no generator's state has to be stored for a
    training that goes on from that position.
    """
    text = " ".join(map(str, (seed, use, *position)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


@contextmanager
def reproducible(asked: bool) -> Iterator[None]:
    """Refuse operations whose result may change from run to run on this device, where that is asked for."""
    if not asked:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
