"""The `events` backend: an event-driven simulator of an integer `ProcessGraph`; work grows with spikes.

Each sample runs step by step through the populations in order, without pipeline delay, which equals the streamed chip
bit for bit (the balancing pass sees to that). One compiled call takes samples through all their steps; threads share
the weights, and results do not depend on their number. Synaptic operations are counted where they are done.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from spikeport.converters.graph import ProcessGraph
from spikeport.deploy import event_kernels as kernels
from spikeport.deploy.event_program import Program
from spikeport.deploy.trace import Trace, check_inputs

CALLS_PER_THREAD = 16
"""Compiled calls that the samples of one thread are split into, for progress and an even load."""
MOST_SAMPLES = 64
"""Samples of one compiled call at most."""
PIECE = 1 << 24
"""Input values that are converted at a time."""


def run(
    graph: ProcessGraph,
    inputs: dict[str, np.ndarray],
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """Run all samples of `inputs` (samples, steps, *shape) and return their Trace, counts included.

    Args:
        threads: worker threads; all cores by default.
        progress: called with the number of samples done so far.

    Raises BackendError for a float graph or sums beyond 32 bits, SpikeportError for inputs that do not fit the graph.
    """
    samples = check_inputs(graph, inputs)
    threads = threads or os.cpu_count() or 1
    simulator = _Simulator(graph, inputs, samples)
    started = time.perf_counter()
    size = min(max(samples // (threads * CALLS_PER_THREAD), 1), MOST_SAMPLES, simulator.most_samples)
    calls = [slice(start, min(start + size, samples)) for start in range(0, samples, size)]
    done = 0
    with ThreadPoolExecutor(min(threads, len(calls))) as pool:
        for finished in pool.map(simulator.run_samples, calls):
            done += finished
            if progress:
                progress(done)
    if graph.probed is not None:
        simulator.trace.membrane = simulator.membrane[:, simulator.program.probed_order]
    simulator.trace.seconds = time.perf_counter() - started
    return simulator.trace


class _Simulator:
    """A run: the graph's tables, its inputs, and the trace, whose arrays are parts of two flat ones."""

    def __init__(self, graph: ProcessGraph, inputs: dict[str, np.ndarray], samples: int) -> None:
        self.graph, self.inputs = graph, inputs
        self.program = Program(graph, samples)
        self.most_samples = max(1, PIECE // (graph.steps * sum(node.size for node in graph.event_inputs) + 1))
        self.bits = np.zeros(self.program.n_bits, np.uint8)
        self.synops = np.zeros(self.program.n_synops, np.int64)
        self.membrane = np.zeros((samples, self.program.probed_order.size), np.int64)
        self.idle: deque[kernels.Work] = deque()
        rows = samples * graph.steps

        def bits(name: str, start: int) -> np.ndarray:
            width = -(-graph.node(name).size // 8)
            return self.bits[start : start + rows * width].reshape(samples, graph.steps, width)

        def counts(start: int) -> np.ndarray:
            return self.synops[start : start + rows].reshape(samples, graph.steps)

        self.trace = Trace(
            backend="events",
            graph=graph.fingerprint(),
            samples=samples,
            steps=graph.steps,
            sizes={node.name: node.size for node in graph.event_nodes},
            packed={name: bits(name, start) for name, start in self.program.bits.items()},
            synops={p.name: counts(self.program.synops[p.name]) for p in graph.projections},
            active={name: bits(name, start) for name, start in self.program.active.items()},
        )

        # no samples: compiles the kernels, or loads them, before anybody looks at the clock
        self._call(slice(0, 0), self.program.workspace(), np.zeros(0, np.int32), self._unread())

    def _call(self, samples: slice, work: kernels.Work, payloads: np.ndarray, paid: np.ndarray) -> None:
        trace = self.bits, self.synops, self.program.probed, self.membrane
        net, steps = self.program.net, self.graph.steps
        kernels.run_samples(samples.start, samples.stop, steps, net, work, payloads, paid, *trace)
        self.idle.append(work)

    def _unread(self) -> np.ndarray:
        """Where the payloads of each node begin, before any is read."""
        return np.zeros((len(self.graph.nodes), 3), np.int64)

    def run_samples(self, samples: slice) -> int:
        """Run some samples on this thread; return their number."""
        try:
            work = self.idle.pop()
        except IndexError:
            work = self.program.workspace()
        self._call(samples, work, *self._read(samples))
        return int(samples.stop - samples.start)

    def _read(self, samples: slice) -> tuple[np.ndarray, np.ndarray]:
        """Pack the inputs of some samples into the trace; return the payloads of graded ones and where they begin."""
        paid = self._unread()
        payloads: list[np.ndarray] = []
        for index, node in enumerate(self.graph.inputs):
            if node.constant:
                continue
            paid[index] = sum(part.size for part in payloads)
            array, packed = self.inputs[node.name][samples], self.trace.packed[node.name][samples]
            steps = max(1, PIECE // (array.shape[0] * node.size))
            for step in range(0, self.graph.steps, steps):
                piece = array[:, step : step + steps].reshape(array.shape[0], -1, node.size)
                fired = piece != 0
                packed[:, step : step + steps] = np.packbits(fired, axis=-1)
                if node.message_bits > 1:
                    payloads.append(piece[fired].astype(np.int32))
        return np.concatenate([*payloads, np.zeros(0, np.int32)]), paid
