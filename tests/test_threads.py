"""Spans of compiled work on torch's threads."""

import threading

import numba
import numpy as np
import pytest
import torch

from spikeport.models import threads
from spikeport.models.rules import window_loops


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("borrowed", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("size", "block"), [(1, 1), (7, 7), (8, 7), (1000, 7), (100, 1)])
def test_all_of_the_work_is_done_once_in_whole_blocks(monkeypatch, borrowed, count, size, block):
    if not borrowed:
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    torch.set_num_threads(count)
    spans, lock = [], threading.Lock()

    def work(start, stop):
        with lock:
            spans.append((start, stop))

    threads.in_spans(work, size, block)
    assert [start for start, _ in sorted(spans)] == [0, *(stop for _, stop in sorted(spans)[:-1])]
    assert max(spans)[1] == size
    assert all(start % block == 0 for start, _ in spans)


@pytest.mark.parametrize("borrowed", [True, False])
def test_an_error_in_any_thread_is_raised(monkeypatch, borrowed):
    if not borrowed:
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    torch.set_num_threads(2)

    def work(start, stop):
        if stop == 100:
            raise ZeroDivisionError(start)

    with pytest.raises(ZeroDivisionError):
        threads.in_spans(work, 100, 1)


def test_torch_counts_on_the_same_threads_afterwards():
    torch.set_num_threads(2)
    x = torch.randn(300, 300)
    before = x @ x
    threads.in_spans(lambda start, stop: None, 64, 1)
    assert torch.get_num_threads() == 2
    torch.testing.assert_close(x @ x, before, rtol=0, atol=0)


@numba.cfunc(numba.types.void(numba.types.CPointer(numba.types.int64)))
def counting(data):
    """Adds one to the number that data points to."""
    window_loops._add_at(numba.carray(data, 1)[0], 1)


@pytest.mark.parametrize("borrowed", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_task_runs_once_on_each_thread(monkeypatch, borrowed, count):
    if not borrowed:
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    counter = np.zeros(1, np.int64)
    data = np.array([counter.ctypes.data])
    for rounds in range(1, 200):
        threads.run_task(counting, data.ctypes.data, count)
        assert counter[0] == rounds * count
