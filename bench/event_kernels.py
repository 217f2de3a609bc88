"""Synaptic operations per second of the event simulator's inner loops, beside a C loop over the same rows.

    .venv/bin/python bench/event_kernels.py

One thread. The C loop adds rows of 8-bit weights to 32-bit sums, as a hand would write it: four rows at a time where
they go to the same targets, one contiguous run for a kernel row. It is compiled here with `cc -O3 -march=native`.
"""

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
from rich.console import Console
from rich.table import Table

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Conv2d, Dense, Operator, SumPool
from spikeport.deploy import event_kernels as kernels
from spikeport.deploy.event_program import Program

STEPS = 100
REPEATS = 30
RATE = 0.1

C_SOURCE = """
#include <stdint.h>

void dense(int32_t *restrict acc, const int8_t *restrict w, const int32_t *spikes, const int64_t *ends, int64_t steps,
           int64_t n) {
  for (int64_t t = 0, k = 0; t < steps; t++) {
    for (; k + 4 <= ends[t]; k += 4) {
      const int8_t *a = w + spikes[k] * n, *b = w + spikes[k + 1] * n;
      const int8_t *c = w + spikes[k + 2] * n, *d = w + spikes[k + 3] * n;
      for (int64_t j = 0; j < n; j++) acc[j] += a[j] + b[j] + c[j] + d[j];
    }
    for (; k < ends[t]; k++) {
      const int8_t *a = w + spikes[k] * n;
      for (int64_t j = 0; j < n; j++) acc[j] += a[j];
    }
  }
}

/* stride 1, no padding, windows of pool x pool; weights (channel, row, column from right to left, output channel) */
void conv(int32_t *restrict acc, const int8_t *restrict w, const int32_t *spikes, const int64_t *ends, int64_t steps,
          int64_t channels, int64_t width, int64_t pool, int64_t size, int64_t out, int64_t out_size) {
  for (int64_t t = 0, k = 0; t < steps; t++)
    for (; k < ends[t]; k++) {
      int32_t pixel = spikes[k] / (int32_t)channels, channel = spikes[k] % (int32_t)channels;
      int64_t y = pixel / (int32_t)width / pool, x = pixel % (int32_t)width / pool, left = x - size + 1;
      int64_t from = left < 0 ? -left : 0, to = left + size > out_size ? out_size - left : size;
      for (int64_t ky = 0; ky < size; ky++) {
        if (y < ky || y - ky >= out_size) continue;
        int32_t *restrict a = acc + ((y - ky) * out_size + left + from) * out;
        const int8_t *restrict b = w + ((channel * size + ky) * size + from) * out;
        for (int64_t j = 0; j < (to - from) * out; j++) a[j] += b[j];
      }
    }
}
"""


@dataclass(frozen=True)
class Row:
    """One layer: synaptic operations a second of ours and of the C loop (None without a C compiler)."""

    layer: str
    synops: int
    ours: float
    c: float | None


@numba.njit(nogil=True, _nrt=False)
def _accumulate(net, work, spikes, ends, payloads):  # type: ignore[no-untyped-def]
    """Add the spikes of all steps to the sums of the only projection. Returns the synaptic operations."""
    done, begin, p = 0, 0, net.projections[0]
    for end in ends:
        if p.kind == kernels.DENSE:
            done += kernels.accumulate_dense(p, net, spikes[begin:end], payloads, False, work)
        else:
            done += kernels.accumulate_conv(p, net, spikes[begin:end], payloads, False, work)
        begin = end
    return done


def layers() -> dict[str, tuple[Operator, tuple[int, ...]]]:
    """The layers that are measured, and what the C loop needs to know of each."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return 2 * rng.integers(-128, 128, shape)

    pool = SumPool((2, 2), (2, 2))
    return {
        "dense 784 to 400": (Dense((784,), weight(400, 784)), (400,)),
        "dense 2048 to 2048": (Dense((2048,), weight(2048, 2048)), (2048,)),
        "conv 5 x 5, 1 to 15 channels": (Conv2d((1, 28, 28), weight(15, 1, 5, 5)), (1, 28, 1, 5, 15, 24)),
        "conv 5 x 5, 15 to 40, pooled": (Conv2d((15, 24, 24), weight(40, 15, 5, 5), pool), (15, 24, 2, 5, 40, 8)),
        "conv 3 x 3, 64 to 64": (Conv2d((64, 18, 18), weight(64, 64, 3, 3)), (64, 18, 1, 3, 64, 16)),
    }


def measure() -> list[Row]:
    """Every layer at a firing rate of RATE."""
    with tempfile.TemporaryDirectory() as folder:
        library = compile_c(Path(folder))
        return [_measure(name, operator, sizes, library) for name, (operator, sizes) in layers().items()]


def compile_c(folder: Path) -> ctypes.CDLL | None:
    """The C loops as a library, or None without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    source, library = folder / "rows.c", folder / "rows.so"
    source.write_text(C_SOURCE)
    command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def _measure(name: str, operator: Operator, sizes: tuple[int, ...], library: ctypes.CDLL | None) -> Row:
    neuron = LoihiNeuron(*(np.asarray(value, np.int64) for value in (4095, 0, 100, 0, 0)))
    graph = ProcessGraph(
        name,
        1,
        1e-3,
        (Input("in", operator.in_shape),),
        (Population("out", operator.out_shape, neuron, 1),),
        (Projection("in->out", "in", "out", operator),),
        Readout("out"),
    )
    program = Program(graph, 1)
    work = program.workspace()
    fired = np.random.default_rng(1).random((STEPS, operator.n_in)) < RATE
    spikes, ends = np.nonzero(fired)[1].astype(np.int32), np.cumsum(fired.sum(axis=1))
    payloads = np.zeros(0, np.int32)
    synops = _accumulate(program.net, work, spikes, ends, payloads)
    sums = work.acc[: operator.n_out].copy()
    runs: list[Callable[[], object]] = [lambda: _accumulate(program.net, work, spikes, ends, payloads)]
    if library is not None:
        acc = np.zeros(operator.n_out, np.int32)
        arrays = [ctypes.c_void_p(array.ctypes.data) for array in (acc, program.net.weights, spikes, ends)]
        loop = getattr(library, "dense" if isinstance(operator, Dense) else "conv")
        numbers = [ctypes.c_int64(number) for number in (STEPS, *sizes)]
        loop(*arrays, *numbers)
        np.testing.assert_array_equal(acc, sums)
        runs.append(lambda: loop(*arrays, *numbers))
    seconds = _fastest(runs)
    return Row(name, synops, synops / seconds[0], synops / seconds[1] if library else None)


def _fastest(runs: list[Callable[[], object]]) -> list[float]:
    """Shortest time of each, taken in turns so that all see the same machine."""
    best = [float("inf")] * len(runs)
    for _ in range(REPEATS):
        for index, run in enumerate(runs):
            started = time.perf_counter()
            run()
            best[index] = min(best[index], time.perf_counter() - started)
    return best


def main() -> None:
    table = Table(title=f"Synaptic operations a second on one thread, {RATE:.0%} of the sources firing")
    for heading in ("layer", "operations a step", "event simulator", "C loop", "C / ours"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    rows = measure()
    for row in rows:
        c, ratio = ("-", "-") if row.c is None else (f"{row.c / 1e9:.1f} G", f"{row.c / row.ours:.2f}")
        table.add_row(row.layer, f"{row.synops // STEPS:,}", f"{row.ours / 1e9:.1f} G", c, ratio)
    console = Console()
    console.print(table)
    if rows[0].c is None:
        console.print("The C loop was left out: there is no C compiler named `cc`.")


if __name__ == "__main__":
    main()
