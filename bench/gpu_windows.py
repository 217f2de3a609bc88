"""Neuron windows on a GPU, forward and backward, beside SpikingJelly's Triton backend and the time of copying memory.

    .venv/bin/python bench/gpu_windows.py

2^20 neurons; 4, 16 and 32 steps; float32 and float16. Exit status 1 where a must is missed: at least as fast as
SpikingJelly, and at most 1.5 times the floor. Without a GPU it says so, and exits with 0.

The floor is the bytes that a window has to move (forward x and s, backward x, dL/ds and dL/dx) over the bandwidth of a
large copy, which is measured here. Times are the GPU's: a wait is put before each run, so that Python has launched all
of it when the clock starts, and the cache is overwritten before. The column "with Python" has the runs one after the
other by the wall clock.

SpikingJelly (2.0 or newer, installed by whoever wants the comparison) runs the same equations as our STBP row: no
synaptic filter, tau_mem = 2, reset to zero with errors through it, the arctan surrogate. It is told to take its Triton
kernels, and asked which it took.
"""

import importlib.metadata
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.rules import CSBP, STBP, Rule, window_triton

NEURONS = 2**20
STEPS = (4, 16, 32)
DTYPES = (torch.float32, torch.float16)
LARGEST_OVER_FLOOR = 1.5
REPEATS = 50
COPIED_BYTES = 2**30
CACHE_BYTES = 2**28
"""More than the last cache of any GPU."""
WAIT_CYCLES = 4_000_000
"""A few milliseconds: longer than Python takes to launch a window."""

TAU, ALPHA = 2.0, 2.0
THRESHOLD = 1.00001
"""No sum of float16 numbers falls on it: SpikingJelly fires there, and spikeport only above."""
LIKE_SPIKINGJELLY = STBP("arctan", width=2 / ALPHA), CubaLIF(tau_syn=1, tau_mem=TAU, threshold=THRESHOLD)
DEFAULT = CSBP(), CubaLIF()

Window = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """Times in seconds; theirs is None where SpikingJelly has no such window or is not there."""

    dtype: torch.dtype
    steps: int
    rule: Rule
    floor: float
    ours: float
    with_python: float
    theirs: float | None

    @property
    def missed(self) -> list[str]:
        """Musts that this row misses."""
        slower = self.theirs is not None and self.ours > self.theirs
        over = self.ours > LARGEST_OVER_FLOOR * self.floor
        return ["slower than SpikingJelly"] * slower + [f"over {LARGEST_OVER_FLOOR} of the floor"] * over


def spikingjelly() -> tuple[Window | None, str]:
    """SpikingJelly's window, if it can be had, and what is to be said of it."""
    os.environ["SJ_LIF_CUDA_IMPLEMENTATION"] = "triton"  # read when it is imported
    try:
        from spikingjelly.activation_based import functional, surrogate

        version = importlib.metadata.version("spikingjelly")
        took = functional.neuron_implementation("lif", torch.device("cuda"))["implementation"]
    except (ImportError, AttributeError, RuntimeError) as error:
        return None, f"SpikingJelly is left out, and so is its must: {error}"
    if took != "triton":
        return None, f"SpikingJelly {version} is left out, and so is its must: it took {took!r} instead of Triton."
    slope = surrogate.ATan(alpha=ALPHA)

    def window(x: torch.Tensor) -> torch.Tensor:
        rest = torch.zeros_like(x[0], dtype=torch.float32)
        spikes: torch.Tensor = functional.lif_multi_step(x, rest, TAU, False, THRESHOLD, 0.0, slope, False)[0]
        return spikes

    return window, f"SpikingJelly {version}, implementation {took!r}"


def both_ways(window: Window, x: torch.Tensor, errors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes and dL/dx of a window."""
    spikes = window(x)
    return spikes.detach(), torch.autograd.grad(spikes, x, errors)[0]


def gpu_seconds(run: Callable[[], object]) -> float:
    """Median time of a run on the GPU, with its caches overwritten."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for repeat in range(REPEATS + 5):
        cache.zero_()
        torch.cuda._sleep(WAIT_CYCLES)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 5:  # compilation, and memory from the driver, fall into the first
            times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def wall_seconds(run: Callable[[], object]) -> float:
    """Mean time of a run among others, by the wall clock."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(REPEATS):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / REPEATS


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the GPU."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / gpu_seconds(lambda: target.copy_(source))


def disagreement(x: torch.Tensor, errors: torch.Tensor, window: Window, other: Window) -> float:
    """Share of neurons whose spikes or errors differ between two windows by more than rounding."""
    (spikes, found), (expected_spikes, expected) = (both_ways(each, x, errors) for each in (window, other))
    tolerance = 1e-4 if x.dtype == torch.float32 else 1e-2
    differ = (spikes != expected_spikes) | ~torch.isclose(found, expected, rtol=tolerance, atol=tolerance)
    return float(differ.any(dim=0).float().mean())


def measure(peer: Window | None, bandwidth: float) -> list[Row]:
    rows = []
    for dtype in DTYPES:
        for steps in STEPS:
            x = torch.randn(steps, NEURONS, device="cuda").mul_(2).to(dtype).requires_grad_()
            errors = torch.randn(steps, NEURONS, device="cuda").to(dtype)
            floor = 5 * x.numel() * x.element_size() / bandwidth
            for rule, neuron in (LIKE_SPIKINGJELLY, DEFAULT):

                def ours(x: torch.Tensor, rule: Rule = rule, neuron: CubaLIF = neuron) -> torch.Tensor:
                    return rule(x, neuron)

                def eager(x: torch.Tensor, rule: Rule = rule, neuron: CubaLIF = neuron) -> torch.Tensor:
                    return replace(rule, eager=True)(x.float(), neuron).to(x.dtype)

                others = [eager] if peer is None or rule is not LIKE_SPIKINGJELLY[0] else [eager, peer]
                for other in others:  # a fast window that computes something else is no window
                    if (share := disagreement(x, errors, ours, other)) > 1e-4:
                        raise SystemExit(f"{rule.title}, {steps} steps, {dtype}: {share:.2%} of the neurons disagree")

                def run(window: Window = ours, x: torch.Tensor = x, errors: torch.Tensor = errors) -> object:
                    return both_ways(window, x, errors)

                theirs = gpu_seconds(lambda run=run, peer=peer: run(peer)) if len(others) > 1 else None
                rows.append(Row(dtype, steps, rule, floor, gpu_seconds(run), wall_seconds(run), theirs))
    return rows


def main() -> None:
    console = Console()
    if not torch.cuda.is_available():
        console.print("skipped: there is no GPU that torch can use.")
        return
    if not window_triton.handles(torch.zeros(1, 1, device="cuda"), CSBP()):
        sys.exit("Triton is not installed, or older than the kernels want: windows would run eagerly.")
    peer, said = spikingjelly()
    bandwidth = copy_bandwidth()
    rows = measure(peer, bandwidth)
    table = Table(title=f"Window of {NEURONS:,} neurons, forward and backward, milliseconds")
    for heading in (
        "type",
        "steps",
        "rule",
        "floor",
        "ours",
        "/ floor",
        "SpikingJelly",
        "/ ours",
        "with Python",
        "must",
    ):
        table.add_column(heading, justify="left" if heading in ("type", "rule", "must") else "right")
    for row in rows:
        theirs, ratio = (
            ("-", "-") if row.theirs is None else (f"{row.theirs * 1e3:.3f}", f"{row.theirs / row.ours:.2f}")
        )
        table.add_row(
            str(row.dtype).removeprefix("torch."),
            str(row.steps),
            row.rule.title,
            f"{row.floor * 1e3:.3f}",
            f"{row.ours * 1e3:.3f}",
            f"{row.ours / row.floor:.2f}",
            theirs,
            ratio,
            f"{row.with_python * 1e3:.3f}",
            "; ".join(row.missed) or "met",
        )
    console.print(table)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies at {bandwidth / 1e9:,.0f} GB/s.")
    console.print(said)
    if any(row.missed for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
