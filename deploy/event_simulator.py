"""The `events` backend: an event-driven simulator of an integer `ProcessGraph`; work grows with spikes.

Each sample runs step by step through the populations in order, without pipeline delay, which equals the streamed chip
bit for bit (the balancing pass sees to that). Chunks of samples run on as many threads as asked for; results do not
depend on their number. Synaptic operations are counted where they are done.
"""

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection
from spikeport.converters.operators import Conv2d, Dense, OneToOne, Operator, Sparse, SumPool
from spikeport.deploy import event_kernels as kernels
from spikeport.deploy.trace import Trace, check_inputs, pack
from spikeport.models.errors import BackendError

CHUNK = 32
ACCUMULATOR_LIMIT = 1 << 31
NARROW_SUM = 1 << 18
"""Sums up to this keep u inside 24 bits after its one wrap, so that states fit 32 bits; larger ones take 64."""

LARGEST_LISTS = 1 << 26
"""Entries of the matrix that is built for a projection without a kernel of its own."""


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
    simulator = _Simulator(graph)
    started = time.perf_counter()
    flat = {name: _channels_last(array, graph.node(name).shape) for name, array in inputs.items()}
    trace = Trace(
        backend="events",
        graph=graph.fingerprint(),
        samples=samples,
        steps=graph.steps,
        sizes={node.name: node.size for node in graph.event_nodes},
        packed={p.name: np.zeros((samples, graph.steps, -(-p.size // 8)), np.uint8) for p in graph.populations},
        synops={p.name: np.zeros((samples, graph.steps), np.int64) for p in graph.projections},
        active={p.name: np.zeros((samples, graph.steps, -(-p.size // 8)), np.uint8) for p in graph.populations},
    )
    for node in graph.event_inputs:
        array = inputs[node.name]
        trace.packed[node.name] = pack(array.reshape(samples, graph.steps, -1))
    chunks = [slice(start, min(start + CHUNK, samples)) for start in range(0, samples, CHUNK)]
    done = 0
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for finished in pool.map(lambda chunk: simulator.run_chunk(chunk, flat, trace), chunks):
            done += finished
            if progress:
                progress(done)
    trace.seconds = time.perf_counter() - started
    return trace


@dataclass(eq=False)
class _Spikes:
    """Spike lists of a chunk of samples: row b holds counts[b] events."""

    indices: np.ndarray
    payloads: np.ndarray
    counts: np.ndarray

    @staticmethod
    def empty(samples: int, size: int) -> "_Spikes":
        shape = (samples, size)
        return _Spikes(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(samples, np.int64))


class _Simulator:
    """The graph as flat arrays for the kernels."""

    def __init__(self, graph: ProcessGraph) -> None:
        if not graph.is_integer:
            raise BackendError("the event simulator runs integer graphs; quantise the network first.")
        self.graph = graph
        self.state_type = {population.name: _state_type(graph, population) for population in graph.populations}
        self.synapses = {projection.name: _prepare(graph, projection) for projection in graph.projections}
        self.neurons = {population.name: _neurons(population) for population in graph.populations}

    def run_chunk(self, chunk: slice, inputs: dict[str, np.ndarray], trace: Trace) -> int:
        graph, n = self.graph, int(chunk.stop - chunk.start)
        now = {node.name: _Spikes.empty(n, node.size) for node in graph.nodes}
        before = {p.source: _Spikes.empty(n, graph.node(p.source).size) for p in graph.projections if p.recurrent}
        sums = {p.name: np.zeros((n, p.size), np.int32) for p in graph.populations}
        state: dict[str, np.ndarray] = {
            p.name: np.zeros((2, n, p.size), self.state_type[p.name]) for p in graph.populations
        }
        shifted = {p.name: np.zeros((n, graph.population(p.target).size), np.int32)
                   for p in graph.projections if p.exponent < 0}  # fmt: skip
        for node in graph.inputs:
            if node.constant:
                ones = np.ones((n, node.size), np.uint8)
                kernels.collect(ones, now[node.name].indices, now[node.name].payloads, now[node.name].counts)
        for t in range(graph.steps):
            for name in before:
                before[name], now[name] = now[name], before[name]
            for node in graph.event_inputs:
                sent = now[node.name]
                kernels.collect(inputs[node.name][chunk, t], sent.indices, sent.payloads, sent.counts)
            for population in graph.populations:
                acc = sums[population.name]
                u, v = state[population.name]
                for projection in graph.incoming(population.name):
                    if projection.recurrent and t == 0:
                        continue
                    spikes = before[projection.source] if projection.recurrent else now[projection.source]
                    target = shifted.get(projection.name, acc)
                    self._accumulate(projection, spikes, target, trace.synops[projection.name][chunk, t])
                    if projection.name in shifted:
                        kernels.shift_into(target, -projection.exponent, acc)
                sent = now[population.name]
                bits = np.zeros((n, -(-population.size // 8)), np.uint8)
                events = (sent.indices, sent.payloads, sent.counts)
                integrate: Callable[..., None] = kernels.integrate
                awake = np.zeros_like(bits)
                integrate(acc, u, v, *self.neurons[population.name], *events, bits, awake)
                trace.packed[population.name][chunk, t] = bits
                trace.active[population.name][chunk, t] = awake
        return n

    def _accumulate(self, projection: Projection, spikes: _Spikes, acc: np.ndarray, operations: np.ndarray) -> None:
        kernel, arguments = self.synapses[projection.name]
        kernel(spikes.indices, spikes.payloads, spikes.counts, *arguments, acc, operations)


def _channels_last(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(samples, steps, *shape) as flat (samples, steps, n) in the simulator's order."""
    if len(shape) == 3:
        array = array.transpose(0, 1, 3, 4, 2)
    return np.ascontiguousarray(array.reshape(*array.shape[:2], -1)).astype(np.int32, copy=False)


def _internal_order(shape: tuple[int, ...]) -> np.ndarray:
    """For each place in the simulator's order, the flat index of that neuron in the trace."""
    index = np.arange(math.prod(shape)).reshape(shape)
    return (index.transpose(1, 2, 0) if len(shape) == 3 else index).ravel()


def _neurons(population: Population) -> tuple[Any, ...]:
    neuron = population.neuron
    if not isinstance(neuron, LoihiNeuron):
        raise BackendError(f"population {population.name!r} is not quantised.")
    order = _internal_order(population.shape)

    def flat(values: np.ndarray) -> np.ndarray:
        whole = np.asarray(values, np.int64)
        return whole.reshape(1) if whole.ndim == 0 else whole.reshape(-1)[order]

    exponent = flat(neuron.bias_exp)
    mant = flat(neuron.bias_mant)
    bias = np.where(exponent >= 0, mant << np.maximum(exponent, 0), mant >> np.maximum(-exponent, 0))
    keep_u = kernels.DECAY_UNITY - flat(neuron.du) - neuron.ds_offset
    keep_v = kernels.DECAY_UNITY - flat(neuron.dv)
    level = flat(neuron.vth) << kernels.SHIFT
    return keep_u, keep_v, level, bias, neuron.reset == "subtract", order


def _bound(graph: ProcessGraph, projection: Projection) -> float:
    """Largest |sum| that a projection can send to one neuron in one step."""
    source = graph.node(projection.source)
    payload = (1 << source.message_bits) - 1 if isinstance(source, Input) else 1
    return projection.operator.magnitude_bound() * payload * (1 << max(projection.exponent, 0))


def _state_type(graph: ProcessGraph, population: Population) -> type:
    incoming = graph.incoming(population.name)
    total = sum(_bound(graph, projection) for projection in incoming)
    if total >= ACCUMULATOR_LIMIT:
        names = ", ".join(repr(projection.name) for projection in incoming)
        raise BackendError(f"sums of {names} into {population.name!r} may exceed 32 bits; use the torch backend.")
    return np.int32 if total <= NARROW_SUM else np.int64


def _prepare(graph: ProcessGraph, projection: Projection) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """The kernel of a projection and its constant arguments."""
    source, target = graph.node(projection.source), graph.population(projection.target)
    operator = projection.operator
    weight = operator.weight.astype(np.int32) << max(projection.exponent, 0)
    sources, targets = _internal_order(source.shape), _internal_order(target.shape)
    if isinstance(operator, Conv2d) and (operator.in_shape, operator.out_shape) == (source.shape, target.shape):
        return kernels.accumulate_conv, (_geometry(operator), np.ascontiguousarray(_kernel_rows(operator, weight)))
    if isinstance(operator, Dense):
        first, cells = _pooled_cells(operator, source.shape)
        return kernels.accumulate_rows, (first, cells, np.ascontiguousarray(weight.T[:, targets]))
    if isinstance(operator, OneToOne):
        every = np.arange(operator.n_in)
        return kernels.accumulate_lists, _lists((every, every), weight, sources, targets)
    if isinstance(operator, Sparse):
        return kernels.accumulate_lists, _lists((operator.source, operator.target), weight, sources, targets)
    pairs, values = _written_out(operator.with_weight(weight), projection.name)
    return kernels.accumulate_lists, _lists(pairs, values, sources, targets)


def _written_out(operator: Operator, name: str) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Every synapse of an operator as a (source, target) pair: a convolution into neurons that are no image.

    Where overlapping pooling gives a pair several synapses, the first carries the summed weight and the others zero, so
    that they still count as operations.
    """
    if operator.n_in * operator.n_out > LARGEST_LISTS:
        raise BackendError(f"projection {name!r} joins a convolution to flat neurons and is too large to write out.")
    targets = torch.eye(operator.n_out, dtype=torch.float64).reshape(-1, *operator.out_shape)
    ones = operator.with_weight(np.ones_like(operator.weight))
    synapses = ones.transpose_apply(targets).flatten(1).round().to(torch.int64).numpy()
    summed = operator.transpose_apply(targets).flatten(1).round().to(torch.int64).numpy()
    target, source = np.nonzero(synapses)
    repeats = synapses[target, source]
    leading = np.cumsum(repeats) - repeats
    values = np.zeros(int(repeats.sum()), np.int32)
    values[leading] = summed[target, source]
    return (np.repeat(source, repeats), np.repeat(target, repeats)), values


def _lists(
    pairs: tuple[np.ndarray, np.ndarray], weight: np.ndarray, sources: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Target lists by source, both in the simulator's order."""
    place_of_source, place_of_target = np.argsort(sources), np.argsort(targets)
    source, target = place_of_source[pairs[0]], place_of_target[pairs[1]]
    order = np.argsort(source, kind="stable")
    first = np.zeros(sources.size + 1, np.int64)
    np.cumsum(np.bincount(source, minlength=sources.size), out=first[1:])
    return first, target[order].astype(np.int64), weight[order]


def _pooled_cells(operator: Operator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For each source in the simulator's order, the weight columns (pooled cells, flat C,H,W) that it counts into."""
    order = _internal_order(shape)
    if operator.pool is None:
        return np.arange(order.size + 1), order
    channels, height, width = operator.in_shape
    rows, columns = _windows(operator.pool, 0, height), _windows(operator.pool, 1, width)
    pooled = operator.pooled_shape
    cells = [
        [(channel * pooled[1] + row) * pooled[2] + column for row in rows[y] for column in columns[x]]
        for channel, y, x in zip(*np.unravel_index(order, (channels, height, width)), strict=True)
    ]
    first = np.concatenate([[0], np.cumsum([len(group) for group in cells])])
    return first, np.array([cell for group in cells for cell in group], np.int64)


def _windows(pool: SumPool, axis: int, extent: int) -> list[list[int]]:
    """For each coordinate along an axis, the pooling windows that contain it."""
    size, stride = pool.kernel[axis], pool.stride[axis]
    count = (extent - size) // stride + 1
    return [[w for w in range(count) if w * stride <= place < w * stride + size] for place in range(extent)]


def _geometry(operator: Conv2d) -> tuple[int, ...]:
    pool = operator.pool or SumPool((1, 1), (1, 1))
    return (
        *operator.in_shape,
        *pool.kernel,
        *pool.stride,
        *operator.pooled_shape[1:],
        *operator.stride,
        *operator.padding,
        *operator.dilation,
        *operator.out_shape,
        operator.groups,
    )


def _kernel_rows(operator: Conv2d, weight: np.ndarray) -> np.ndarray:
    """(out, in / groups, height, width) as (in, height, width, out / groups)."""
    out, per_group, height, width = weight.shape
    split = weight.reshape(operator.groups, out // operator.groups, per_group, height, width)
    return split.transpose(0, 2, 3, 4, 1).reshape(operator.groups * per_group, height, width, -1)
