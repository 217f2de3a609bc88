"""Compiled loops on as many threads as torch uses, and on the same ones.

Torch's operations run on the threads of its OpenMP library, which wait for the next one in a busy loop. Threads of
another pool would have to share the cores with those that wait, so ours are borrowed from that library where it is
libgomp or can stand for it (torch's wheels for Linux have it); elsewhere they are Python's.

A task is machine code alone: its threads never wait for Python's lock.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import count
from typing import Any

import torch

SPANS = 4
"""Parts of the work for each thread, so that none waits long for the others."""

_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def in_spans(work: Callable[[int, int], None], size: int, block: int) -> None:
    """work(start, stop) on all of 0..size, in spans of whole blocks. `work` has to release Python's lock.

    Raises the first error that `work` raises.
    """
    threads, share = spans(size, block)
    if threads == 1:
        work(0, size)
        return
    starts = range(0, size, share)
    tickets = count()
    errors: list[BaseException] = []

    def take(_: object = None) -> None:
        try:
            while not errors and (number := next(tickets)) < len(starts):
                work(starts[number], min(starts[number] + share, size))
        except BaseException as error:  # raised again below, by the thread that waits
            errors.append(error)

    parallel = _openmp()
    if parallel is not None:
        parallel(_TASK(take), None, threads, 0)
    else:
        helpers = [_pool(threads - 1).submit(take) for _ in range(threads - 1)]
        take()
        for helper in helpers:
            helper.result()
    if errors:
        raise errors[0]


def run_task(task: Any, data: int, threads: int) -> None:
    """Run a C function (a Numba cfunc) on so many threads at once, each with the address of the same data."""
    function = _TASK(task.address)
    if threads == 1:
        function(data)
    elif parallel := _openmp():
        parallel(function, data, threads, 0)
    else:
        helpers = [_pool(threads - 1).submit(function, data) for _ in range(threads - 1)]
        function(data)
        for helper in helpers:
            helper.result()


def spans(size: int, block: int) -> tuple[int, int]:
    """Threads for 0..size, and how much of it, in whole blocks, one of them takes at once."""
    threads = max(1, min(torch.get_num_threads(), -(-size // block)))
    return threads, size if threads == 1 else -(-size // (SPANS * threads * block)) * block


@cache
def _openmp() -> Any:
    """GOMP_parallel(task, data, threads, flags) of the library that torch has loaded, or None."""
    try:
        found = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = (_TASK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return found


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="window")
