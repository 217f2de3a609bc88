"""Random integer networks for property tests, and a plain model of what they must do.

`random_graph` draws a network from a seed; `graphs` is the Hypothesis strategy around it. `simulate_plainly` steps
such a network neuron by neuron in Python's own integers, and `explicit_matrix` writes an operator out synapse by
synapse: neither shares a line with the code under test.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.lower import balance
from spikeport.converters.operators import Conv2d, Dense, OneToOne, Operator, Pair, Shape, Sparse, SumPool

LARGEST_CURRENT = 1 << 25
"""Bound on a population's synaptic sum in random graphs; with it, u fits into 32 bits after its one wrap."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For modules that import it: a second thread costs tensors this small 16 ms an operation on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def graphs(**fixed: object) -> st.SearchStrategy[ProcessGraph]:
    """Random integer graphs; keywords fix arguments of `random_graph`. Failures shrink to few populations and steps."""
    drawn = {
        "seed": st.integers(0, 2**32 - 1),
        "populations": st.integers(1, 4),
        "inputs": st.integers(1, 2),
        "steps": st.integers(1, 6),
        "graded": st.booleans(),
        "recurrent": st.booleans(),
        "hot": st.booleans(),
        "membrane": st.booleans(),
    }
    return st.builds(random_graph, **(drawn | {key: st.just(value) for key, value in fixed.items()}))


def operators() -> st.SearchStrategy[Operator]:
    """Random operators of every kind, over random geometry."""
    return st.builds(_operator_from_seed, st.integers(0, 2**32 - 1), st.sampled_from(KINDS))


def random_graph(
    seed: int,
    populations: int = 3,
    inputs: int = 2,
    steps: int = 4,
    graded: bool = True,
    recurrent: bool = True,
    hot: bool = False,
    membrane: bool = False,
) -> ProcessGraph:
    """A balanced integer graph of small populations, with every operator and neuron parameter that a backend knows.

    Args:
        graded: let one input carry payloads of several bits.
        recurrent: let populations feed themselves and earlier ones, from the step before.
        hot: large exponents and slow decays, so that u wraps and v saturates.
        membrane: add a population that only integrates (and fires where it saturates); its membrane is the readout.
    """
    rng = np.random.default_rng(seed)
    sources = [
        Input(f"in{index}", _shape(rng), int(rng.integers(2, 9)) if graded and index == 0 else 1)
        for index in range(inputs)
    ]
    if rng.random() < 0.3:
        sources.append(Input("constant", (int(rng.integers(1, 4)),), constant=True))
    nodes: list[Input | Population] = list(sources)
    projections: list[Projection] = []
    made: list[Population] = []
    for index in range(populations):
        name = f"population{index}"
        first = nodes[int(rng.integers(len(sources)))] if index == 0 else made[-1]
        operator = random_operator(rng, first.shape, KINDS[int(rng.integers(len(KINDS)))])
        shape = operator.out_shape
        incoming = [_projection(rng, projections, first, name, operator, hot)]
        others = [node for node in nodes if rng.random() < 0.35]
        incoming += [
            _projection(rng, [*projections, *incoming], node, name, _operator_between(rng, node.shape, shape), hot)
            for node in others
        ]
        population = Population(name, shape, random_neuron(rng, shape, hot))
        if recurrent and rng.random() < 0.5:
            loop = _projection(rng, [*projections, *incoming], population, name, _loop(rng, shape), hot)
            incoming.append(replace(loop, recurrent=True))
        if recurrent and made and rng.random() < 0.3:
            earlier = made[int(rng.integers(len(made)))]
            back = _operator_between(rng, shape, earlier.shape)
            both = [*projections, *incoming]
            projections.append(replace(_projection(rng, both, population, earlier.name, back, hot), recurrent=True))
        made.append(population)
        nodes.append(population)
        projections += incoming
    readout = Readout(made[-1].name)
    if membrane:
        operator = random_operator(rng, made[-1].shape, KINDS[int(rng.integers(len(KINDS)))])
        made.append(Population("integrator", operator.out_shape, random_integrator(rng, operator.out_shape, hot)))
        for node in [node for node in nodes[:-1] if rng.random() < 0.35]:
            beside = _operator_between(rng, node.shape, operator.out_shape)
            projections.append(_projection(rng, projections, node, "integrator", beside, hot))
        projections.append(_projection(rng, projections, nodes[-1], "integrator", operator, hot))
        nodes.append(made[-1])
        readout = Readout("integrator", "membrane")
    bounded = _within(LARGEST_CURRENT, nodes, projections)
    staged, padded = balance(sources, made, bounded)
    return ProcessGraph(f"random {seed}", steps, 1e-3, tuple(sources), tuple(staged), tuple(padded), readout)


def random_inputs(graph: ProcessGraph, seed: int, samples: int = 3, rate: float = 0.4) -> dict[str, np.ndarray]:
    """Events for every input that the caller feeds: 0 or a payload within its bits, in one of several integer types."""
    rng = np.random.default_rng(seed)
    found = {}
    for node in graph.event_inputs:
        shape = (samples, graph.steps, *node.shape)
        payload = rng.integers(1, 1 << node.message_bits, shape)
        types = [np.uint8, np.int32, np.int64] if node.message_bits <= 8 else [np.int64]
        dtype = types[int(rng.integers(len(types)))]
        found[node.name] = np.where(rng.random(shape) < rate, payload, 0).astype(dtype)
    return found


# ---- operators ------------------------------------------------------------------------------------------------------

KINDS = ("dense", "conv", "sparse", "one_to_one", "pooled dense", "pooled conv")


def random_operator(rng: np.random.Generator, in_shape: Shape, kind: str) -> Operator:
    """An operator of about that kind from a given shape; flat sources take no convolution and no pooling."""
    image = len(in_shape) == 3
    pool = _pool(rng, in_shape) if image and kind.startswith("pooled") else None
    pooled = pool.out_shape(in_shape) if pool else in_shape
    if kind.endswith("conv") and image:
        return _conv(rng, in_shape, pooled, pool)
    if kind == "sparse":
        return _sparse(rng, in_shape, _shape(rng))
    if kind == "one_to_one":
        return OneToOne(in_shape, random_weights(rng, (math.prod(in_shape),)))
    shape_out = _shape(rng) if rng.random() < 0.5 else ()
    n_out = math.prod(shape_out) if shape_out else int(rng.integers(1, 13))
    return Dense(in_shape, random_weights(rng, (n_out, math.prod(pooled))), pool, shape_out=shape_out)


def random_weights(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """Weights as the chip stores them: mixed and even, or of one sign; some are zero."""
    mode = rng.integers(3)
    if mode == 0:
        values = 2 * rng.integers(-128, 128, shape)
    elif mode == 1:
        values = rng.integers(0, 256, shape)
    else:
        values = -rng.integers(0, 256, shape)
    return np.where(rng.random(shape) < 0.1, 0, values).astype([np.int16, np.int32, np.int64][int(rng.integers(3))])


def random_neuron(rng: np.random.Generator, shape: Shape, hot: bool = False) -> LoihiNeuron:
    """Parameters over their whole ranges, each shared or one a neuron."""

    def spread(low: int, high: int) -> np.ndarray:
        values: np.ndarray = rng.integers(low, high, shape if rng.random() < 0.5 else ())
        return np.asarray(values, dtype=np.int64)

    slow = hot or rng.random() < 0.3
    biased = rng.random() < 0.4
    threshold = (1 << 17) if rng.random() < (0.5 if hot else 0.1) else 600
    return LoihiNeuron(
        du=spread(0, 300 if slow else 4096),
        dv=spread(0, 300 if slow else 4096),
        vth=spread(0, threshold),
        bias_mant=spread(-4096, 4096) if biased else np.asarray(0, dtype=np.int64),
        bias_exp=spread(-3, 8) if biased else np.asarray(0, dtype=np.int64),
        ds_offset=int(rng.integers(2)),
        reset="subtract" if rng.random() < 0.4 else "zero",
    )


def random_integrator(rng: np.random.Generator, shape: Shape, hot: bool = False) -> LoihiNeuron:
    """A neuron with the largest threshold; half of them leak slowly or not at all."""
    neuron = random_neuron(rng, shape, hot)
    dv = np.asarray(rng.integers(0, 3, shape if rng.random() < 0.5 else ())) if rng.random() < 0.5 else neuron.dv
    return replace(neuron, dv=dv, vth=np.full(shape if rng.random() < 0.3 else (), 2**17 - 1, np.int64))


def explicit_matrix(operator: Operator) -> tuple[np.ndarray, np.ndarray]:
    """The operator synapse by synapse, in loops: (weights summed, synapses counted), each int64 (n_out, n_in)."""
    weights = np.zeros((operator.n_out, operator.n_in), dtype=np.int64)
    counts = np.zeros_like(weights)
    for target, source, weight in _synapses(operator):
        weights[target, source] += weight
        counts[target, source] += 1
    return weights, counts


def _synapses(operator: Operator) -> Iterator[tuple[int, int, int]]:
    """(target, source, weight) of every synapse."""
    weight = operator.weight
    if isinstance(operator, OneToOne):
        yield from ((index, index, int(value)) for index, value in enumerate(weight))
    elif isinstance(operator, Sparse):
        yield from zip(operator.target.tolist(), operator.source.tolist(), weight.tolist(), strict=True)
    elif isinstance(operator, Dense):
        members = _members(operator)
        for target in range(weight.shape[0]):
            for cell, sources in enumerate(members):
                yield from ((target, source, int(weight[target, cell])) for source in sources)
    elif isinstance(operator, Conv2d):
        yield from _conv_synapses(operator, _members(operator))


def _conv_synapses(operator: Conv2d, members: list[list[int]]) -> Iterator[tuple[int, int, int]]:
    weight = operator.weight
    channels, rows, columns = operator.out_shape
    _, height, width = operator.pooled_shape
    per_group_out = weight.shape[0] // operator.groups
    for o, y, x in np.ndindex(channels, rows, columns):
        for i, ky, kx in np.ndindex(weight.shape[1:]):
            row = y * operator.stride[0] - operator.padding[0] + ky * operator.dilation[0]
            column = x * operator.stride[1] - operator.padding[1] + kx * operator.dilation[1]
            if 0 <= row < height and 0 <= column < width:
                channel = o // per_group_out * weight.shape[1] + i
                target = (o * rows + y) * columns + x
                for source in members[(channel * height + row) * width + column]:
                    yield target, source, int(weight[o, i, ky, kx])


def _members(operator: Operator) -> list[list[int]]:
    """The source neurons that count into each pooled cell."""
    if operator.pool is None:
        return [[index] for index in range(operator.n_in)]
    _, height, width = operator.in_shape
    (tall, wide), (down, right) = operator.pool.kernel, operator.pool.stride
    return [
        [(c * height + y * down + dy) * width + x * right + dx for dy in range(tall) for dx in range(wide)]
        for c, y, x in np.ndindex(operator.pooled_shape)
    ]


# ---- the plain model ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class PlainRun:
    """What every neuron did. Arrays by name, int64.

    spikes, a, u, v: by population, (samples, steps, size); v after reset, active 0 or 1.
    synops: by projection, (samples, steps). wrapped, saturated: neuron-steps in which u wrapped and v saturated.
    """

    spikes: dict[str, np.ndarray]
    a: dict[str, np.ndarray]
    u: dict[str, np.ndarray]
    v: dict[str, np.ndarray]
    active: dict[str, np.ndarray]
    synops: dict[str, np.ndarray]
    wrapped: int = 0
    saturated: int = 0


def simulate_plainly(graph: ProcessGraph, inputs: dict[str, np.ndarray]) -> PlainRun:
    """Every sample by itself, step by step, neuron by neuron, in Python's integers."""
    samples = next(iter(inputs.values())).shape[0]
    frame = (samples, graph.steps)

    def table(size: int = 0) -> np.ndarray:
        return np.zeros((*frame, size) if size else frame, dtype=np.int64)

    def by_population() -> dict[str, np.ndarray]:
        return {p.name: table(p.size) for p in graph.populations}

    run = PlainRun(
        by_population(),
        by_population(),
        by_population(),
        by_population(),
        by_population(),
        {p.name: table() for p in graph.projections},
    )
    matrices = {p.name: explicit_matrix(p.operator) for p in graph.projections}
    sent = {name: array.reshape(*frame, -1).astype(np.int64) for name, array in inputs.items()}
    sent |= {node.name: np.ones((*frame, node.size), np.int64) for node in graph.inputs if node.constant}
    sent |= run.spikes
    for sample, t in np.ndindex(frame):
        for population in graph.populations:
            name = population.name
            total = [0] * population.size
            for projection in graph.projections:
                when = t - 1 if projection.recurrent else t
                if projection.target != name or when < 0:
                    continue
                arriving = sent[projection.source][sample, when]
                weights, counts = matrices[projection.name]
                run.synops[projection.name][sample, t] = (counts @ (arriving != 0)).sum()
                total = [
                    before + _shift(int(part), projection.exponent)
                    for before, part in zip(total, weights @ arriving, strict=True)
                ]
            for index, a in enumerate(total):
                _advance(run, population, sample, t, index, a)
    return run


def _advance(run: PlainRun, population: Population, sample: int, t: int, index: int, a: int) -> None:
    """One neuron by one step."""
    name, neuron = population.name, population.neuron
    assert isinstance(neuron, LoihiNeuron)

    def own(values: np.ndarray) -> int:
        return int(np.broadcast_to(values, population.shape).ravel()[index])

    u, v = (int(state[name][sample, t - 1, index]) if t else 0 for state in (run.u, run.v))
    bias = _shift(own(neuron.bias_mant), own(neuron.bias_exp))
    run.active[name][sample, t, index] = bool(u or v or a or bias)
    u = _decayed(u, 4096 - (own(neuron.du) + neuron.ds_offset)) + (a << 6)
    wrapped = u
    if wrapped > 2**23:
        wrapped -= 2**24
    if wrapped <= -(2**23):
        wrapped += 2**24
    run.wrapped += wrapped != u
    v = _decayed(v, 4096 - own(neuron.dv)) + wrapped + bias
    run.saturated += abs(v) > 2**23 - 1
    v = max(-(2**23 - 1), min(v, 2**23 - 1))
    level = own(neuron.vth) << 6
    fires = v > level
    if fires:
        v = v - level if neuron.reset == "subtract" else 0
    for target, value in ((run.spikes, int(fires)), (run.a, a), (run.u, wrapped), (run.v, v)):
        target[name][sample, t, index] = value


def _decayed(x: int, keep: int) -> int:
    """x keep / 4096, rounded towards zero."""
    size = abs(x) * keep >> 12
    return size if x >= 0 else -size


def _shift(value: int, places: int) -> int:
    return value << places if places >= 0 else value >> -places


# ---- parts of a random graph ----------------------------------------------------------------------------------------


def _operator_from_seed(seed: int, kind: str) -> Operator:
    rng = np.random.default_rng(seed)
    shape = _image(rng) if kind not in ("sparse", "one_to_one", "dense") else _shape(rng)
    return random_operator(rng, shape, kind)


def _shape(rng: np.random.Generator) -> Shape:
    return _image(rng) if rng.random() < 0.6 else (int(rng.integers(1, 13)),)


def _image(rng: np.random.Generator) -> Shape:
    return (int(rng.integers(1, 4)), int(rng.integers(2, 7)), int(rng.integers(2, 7)))


def _pair(rng: np.random.Generator, low: int, high: Pair | int) -> Pair:
    tall, wide = high if isinstance(high, tuple) else (high, high)
    return int(rng.integers(low, tall + 1)), int(rng.integers(low, wide + 1))


def _pool(rng: np.random.Generator, shape: Shape) -> SumPool:
    """Windows that may overlap, leave gaps or leave a rest at the edge."""
    return SumPool(_pair(rng, 1, (min(3, shape[1]), min(3, shape[2]))), _pair(rng, 1, 3))


def _conv(rng: np.random.Generator, in_shape: Shape, pooled: Shape, pool: SumPool | None) -> Conv2d:
    padding, dilation = _pair(rng, 0, 2), _pair(rng, 1, 2)
    room = [(extent + 2 * pad - 1) // gap + 1 for extent, pad, gap in zip(pooled[1:], padding, dilation, strict=True)]
    kernel = _pair(rng, 1, (min(3, room[0]), min(3, room[1])))
    groups = int(rng.choice([g for g in (1, 2, 3) if pooled[0] % g == 0]))
    weight = random_weights(rng, (groups * int(rng.integers(1, 3)), pooled[0] // groups, *kernel))
    return Conv2d(in_shape, weight, pool, _pair(rng, 1, 2), padding, dilation, groups)


def _sparse(rng: np.random.Generator, in_shape: Shape, out_shape: Shape) -> Sparse:
    n_in, n_out = math.prod(in_shape), math.prod(out_shape)
    pairs = rng.permutation(n_in * n_out)[: int(rng.integers(0, n_in * n_out + 1))]
    source, target = pairs % n_in, pairs // n_in
    return Sparse(in_shape, random_weights(rng, source.shape), None, source, target, out_shape)


def _operator_between(rng: np.random.Generator, in_shape: Shape, out_shape: Shape) -> Operator:
    """An operator that maps one given shape to another: by any kind that can."""
    kinds = ["dense", "sparse"]
    if math.prod(in_shape) == math.prod(out_shape):
        kinds.append("one_to_one")
    if len(in_shape) == len(out_shape) == 3 and all(rest >= 0 for rest in np.subtract(in_shape, out_shape)[1:]):
        kinds += ["conv", "conv"]
    kind = kinds[int(rng.integers(len(kinds)))]
    if kind == "conv":
        padding = _pair(rng, 0, 1)
        kernel = [
            extent + 2 * pad - wanted + 1
            for extent, pad, wanted in zip(in_shape[1:], padding, out_shape[1:], strict=True)
        ]
        return Conv2d(in_shape, random_weights(rng, (out_shape[0], in_shape[0], *kernel)), padding=padding)
    if kind == "sparse":
        return _sparse(rng, in_shape, out_shape)
    if kind == "one_to_one":
        return OneToOne(in_shape, random_weights(rng, (math.prod(in_shape),)))
    pool = _pool(rng, in_shape) if len(in_shape) == 3 and rng.random() < 0.5 else None
    columns = math.prod(pool.out_shape(in_shape) if pool else in_shape)
    return Dense(in_shape, random_weights(rng, (math.prod(out_shape), columns)), pool, shape_out=out_shape)


def _loop(rng: np.random.Generator, shape: Shape) -> Operator:
    """A projection of a population onto itself."""
    if len(shape) == 3 and rng.random() < 0.4:
        return Conv2d(shape, random_weights(rng, (shape[0], shape[0], 3, 1)), padding=(1, 0))
    return _operator_between(rng, shape, shape)


def _projection(
    rng: np.random.Generator,
    others: list[Projection],
    source: Input | Population,
    target: str,
    operator: Operator,
    hot: bool,
) -> Projection:
    exponent = int(rng.integers(4, 9)) if hot else int(rng.integers(-3, 3))
    return Projection(f"{source.name}->{target}#{len(others)}", source.name, target, operator, exponent)


def _within(limit: int, nodes: list[Input | Population], projections: list[Projection]) -> list[Projection]:
    """Lower exponents until no population's synaptic sum can pass `limit`."""
    bits = {node.name: node.message_bits for node in nodes if isinstance(node, Input)}

    def size(projection: Projection) -> float:
        counted = np.abs(explicit_matrix(projection.operator)[0]).sum(axis=1).max(initial=0)
        return float(counted * ((1 << bits.get(projection.source, 1)) - 1) * 2.0**projection.exponent)

    result = []
    for projection in projections:
        share = limit / sum(other.target == projection.target for other in projections)
        excess = max(0, math.ceil(math.log2(size(projection) / share))) if size(projection) > 0 else 0
        result.append(replace(projection, exponent=projection.exponent - excess))
    return result
