"""Lava against an independent reference: plain numpy, layer by layer, without delay, one sample after another."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeport.converters import bundle, lava_runner
from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Conv2d, Dense, OneToOne, Operator, Shape, Sparse, SumPool
from spikeport.deploy import event_simulator, lava_backend, torch_backend
from spikeport.deploy import trace as trace_format
from spikeport.deploy.trace import Trace, decisions
from spikeport.deploy.verify import compare
from spikeport.models.errors import BackendError, BackendUnavailableError, GraphError, SpikeportError

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from graph_strategies import random_graph as random_graph_of_all
from graph_strategies import random_inputs

needs_lava = pytest.mark.usefixtures("lava_python")
HALVES = SumPool((2, 2), (2, 2))


# The reference


def toward_zero(x: np.ndarray, bits: int) -> np.ndarray:
    return np.sign(x) * (np.abs(x) >> bits)


def lif_step(neuron: LoihiNeuron, u: np.ndarray, v: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, ...]:
    """One step of `loihi.md`; u, v, a: int64 (samples, *shape). Returns u, v and the spikes."""
    u = toward_zero(u * (4096 - (neuron.du + neuron.ds_offset)), 12) + (a << 6)
    u = np.where(u > 2**23, u - 2**24, u)
    u = np.where(u <= -(2**23), u + 2**24, u)
    v = toward_zero(v * (4096 - neuron.dv), 12) + u + (neuron.bias_mant << neuron.bias_exp)
    v = np.clip(v, -(2**23 - 1), 2**23 - 1)
    spikes = v > (neuron.vth << 6)
    after = v - (neuron.vth << 6) if neuron.reset == "subtract" else np.zeros_like(v)
    return u, np.where(spikes, after, v), spikes


def apply(operator: Operator, x: np.ndarray) -> np.ndarray:
    """x: (samples, *in_shape) -> (samples, *out_shape), by loops over windows."""
    if operator.pool is not None:
        (high, wide), (down, right) = operator.pool.kernel, operator.pool.stride
        _, rows, columns = operator.pooled_shape
        pooled = np.zeros((len(x), *operator.pooled_shape), np.int64)
        for row in range(rows):
            for column in range(columns):
                window = x[:, :, row * down : row * down + high, column * right : column * right + wide]
                pooled[:, :, row, column] = window.sum(axis=(2, 3))
        x = pooled
    weight = operator.weight
    match operator:
        case Dense():
            return x.reshape(len(x), -1) @ weight.T
        case OneToOne():
            return x * weight.reshape(operator.in_shape)
        case Sparse():
            out = np.zeros((len(x), operator.n_out), np.int64)
            for source, target, value in zip(operator.source, operator.target, weight, strict=True):
                out[:, target] += x.reshape(len(x), -1)[:, source] * value
            return out.reshape(len(x), *operator.out_shape)
        case Conv2d():
            (top, left), (down, right), (tall, broad) = operator.padding, operator.stride, operator.dilation
            x = np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)))
            out = np.zeros((len(x), *operator.out_shape), np.int64)
            per_group = weight.shape[0] // operator.groups
            for channel, row, column in np.ndindex(*operator.out_shape):
                first = channel // per_group * weight.shape[1]
                window = x[:, first : first + weight.shape[1], row * down :: tall, column * right :: broad]
                taps = window[:, :, : weight.shape[2], : weight.shape[3]]
                out[:, channel, row, column] = (taps * weight[channel]).sum(axis=(1, 2, 3))
            return out
    raise NotImplementedError(operator.kind)


def reference(
    graph: ProcessGraph, inputs: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Spikes of every population, uint8 (samples, steps, n), and its v after the last step, int64 (samples, n)."""
    samples = len(next(iter(inputs.values())))
    zeros = {p.name: np.zeros((samples, *p.shape), np.int64) for p in graph.populations}
    state = {name: (array, array) for name, array in zeros.items()}
    before, out = dict(zeros), {name: [] for name in zeros}
    for step in range(graph.steps):
        now = {node.name: inputs[node.name][:, step].astype(np.int64) for node in graph.event_inputs}
        now |= {node.name: np.ones((samples, *node.shape), np.int64) for node in graph.inputs if node.constant}
        for population in graph.populations:
            current = zeros[population.name].copy()
            for projection in graph.incoming(population.name):
                spikes = (before if projection.recurrent else now)[projection.source]
                sums = apply(projection.operator, spikes.reshape(samples, *projection.operator.in_shape))
                current += np.ldexp(sums.reshape(current.shape), projection.exponent).astype(np.int64)
            u, v, spikes = lif_step(population.neuron, *state[population.name], current)
            state[population.name] = u, v
            now[population.name] = spikes.astype(np.int64)
            out[population.name].append(spikes.reshape(samples, -1))
        before = now
    spikes_of = {name: np.stack(steps, axis=1).astype(np.uint8) for name, steps in out.items()}
    return spikes_of, {name: v.reshape(samples, -1) for name, (_, v) in state.items()}


# Small graphs


@dataclass
class Builder:
    """Random integer graphs from a seed."""

    seed: int
    steps: int = 6

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.inputs: list[Input] = []
        self.populations: list[Population] = []
        self.projections: list[Projection] = []

    def weight(self, *shape: int, sign: str = "mixed") -> np.ndarray:
        draw = self.random.integers(0, 60, shape)
        return {"mixed": (draw - 28) * 2, "excitatory": draw, "inhibitory": -draw}[sign]

    def neuron(self, shape: Shape, vth: int = 300, each: bool = False, **fields: object) -> LoihiNeuron:
        values = self.random.integers
        return LoihiNeuron(
            du=values(0, 4096, shape if each else ()),
            dv=values(0, 4096, shape if each else ()),
            vth=values(vth // 2, 2 * vth, shape if each else ()),
            bias_mant=values(-200, 300, shape),
            bias_exp=np.asarray(5),
            **fields,
        )

    def input(self, name: str, shape: Shape, **fields: object) -> None:
        self.inputs.append(Input(name, shape, **fields))

    def population(self, name: str, shape: Shape, stage: int, **neuron: object) -> None:
        self.populations.append(Population(name, shape, self.neuron(shape, **neuron), stage))

    def project(self, source: str, target: str, operator: Operator, **fields: object) -> None:
        name = f"{source}-{target}-{len(self.projections)}"
        self.projections.append(Projection(name, source, target, operator, **({"exponent": 2} | fields)))

    def graph(self) -> ProcessGraph:
        return ProcessGraph(
            f"seed{self.seed}",
            self.steps,
            1e-3,
            tuple(self.inputs),
            tuple(self.populations),
            tuple(self.projections),
            Readout(self.populations[-1].name),
        )

    def spikes(self, samples: int) -> dict[str, np.ndarray]:
        return {
            node.name: self.random.integers(0, 1 << node.message_bits, (samples, self.steps, *node.shape))
            * (self.random.random((samples, self.steps, *node.shape)) < 0.6)
            for node in self.inputs
            if not node.constant
        }


def dense_with_biases() -> Builder:
    """Single-sign and mixed weights, whole sums that are shifted right, ones that wrap u, more stages than steps."""
    build = Builder(1, steps=3)
    build.input("in", (14,))
    build.population("a", (20,), 1)
    build.population("b", (9,), 2)
    build.population("c", (17,), 3)
    build.population("d", (5,), 4)
    build.project("in", "a", Dense((14,), build.weight(20, 14, sign="excitatory")), exponent=3)
    build.project("a", "b", Dense((20,), build.weight(9, 20)), exponent=8)
    build.project("b", "c", Dense((9,), 4 * (build.weight(17, 9, sign="inhibitory") // 4)), exponent=-2)
    build.project("a", "c", Dense((20,), build.weight(17, 20)), delay=1)
    build.project("c", "d", Dense((17,), build.weight(5, 17)))
    return build


def convolutions() -> Builder:
    """Everything that a flip, a transposition or a mixed-up axis would change."""
    build = Builder(2)
    build.input("in", (4, 7, 10))
    build.population("plain", (6, 5, 9), 1, vth=250)
    build.population("strided", (4, 3, 5), 2, vth=250)
    build.population("dilated", (2, 3, 1), 3)
    build.population("out", (3,), 4, vth=120)
    build.project("in", "plain", Conv2d((4, 7, 10), 8 * build.weight(6, 2, 3, 2) // 2, groups=2), exponent=-1)
    geometry = {"stride": (2, 2), "padding": (0, 1)}
    build.project("plain", "strided", Conv2d((6, 5, 9), build.weight(4, 6, 1, 3), **geometry))
    geometry = {"stride": (1, 2), "padding": (1, 0), "dilation": (2, 3)}
    build.project("strided", "dilated", Conv2d((4, 3, 5), build.weight(2, 4, 2, 2), **geometry))
    build.project("dilated", "out", Dense((2, 3, 1), build.weight(3, 6)))
    return build


def pooling() -> Builder:
    """Sum pools before convolution and dense: padded, overlapping, with stride, dilation and remainder."""
    build = Builder(3)
    build.input("in", (2, 8, 12))
    build.population("padded", (3, 4, 6), 1, vth=250)
    build.population("overlap", (2, 2, 3), 1, vth=250)
    build.population("strided", (2, 2, 2), 1, vth=250)
    build.population("remainder", (2, 2, 6), 1, vth=250)
    build.population("out", (4,), 2, vth=250)
    build.project("in", "padded", Conv2d((2, 8, 12), build.weight(3, 2, 3, 3), HALVES, padding=(1, 1)))
    build.project("in", "overlap", Conv2d((2, 8, 12), build.weight(2, 2, 2, 3), SumPool((3, 3), (2, 2))))
    geometry = {"stride": (1, 2), "dilation": (2, 1)}
    build.project("in", "strided", Conv2d((2, 8, 12), build.weight(2, 2, 2, 2), SumPool((2, 3), (2, 3)), **geometry))
    uncovered = Conv2d((2, 8, 12), build.weight(2, 2, 3, 3), SumPool((3, 2), (3, 2)), padding=(1, 1))
    assert bundle.composite_convolution(uncovered) is None
    build.project("in", "remainder", uncovered)
    build.project("padded", "out", Dense((3, 4, 6), build.weight(4, 18), HALVES))
    build.project("overlap", "out", Dense((2, 2, 3), build.weight(4, 4) * 3, SumPool((2, 2), (1, 1))))
    build.project("strided", "out", Dense((2, 2, 2), build.weight(4, 8)))
    build.project("remainder", "out", Dense((2, 2, 6), build.weight(4, 4), SumPool((2, 3), (2, 3))))
    return build


def branches() -> Builder:
    """Delayed branches into a convolutional population, constant inputs (one alone, at stage 0), sparse, one-to-one."""
    build = Builder(4)
    build.input("in", (2, 4, 6))
    build.input("one", (2,), constant=True)
    build.population("clock", (3,), 0)
    build.population("a", (3, 4, 6), 1, vth=250, each=True)
    build.population("b", (3, 4, 6), 2, vth=250)
    build.population("c", (3, 4, 6), 3, vth=250)
    build.project("one", "clock", Dense((2,), build.weight(3, 2, sign="excitatory")))
    build.project("clock", "a", Dense((3,), build.weight(72, 3)))
    build.project("in", "a", Conv2d((2, 4, 6), build.weight(3, 2, 3, 3), padding=(1, 1)))
    build.project("a", "b", Conv2d((3, 4, 6), build.weight(3, 3, 1, 3), padding=(0, 1)))
    build.project("one", "b", Dense((2,), build.weight(72, 2)))
    build.project("b", "c", Conv2d((3, 4, 6), build.weight(3, 3, 3, 1), padding=(1, 0)))
    build.project("a", "c", OneToOne((3, 4, 6), build.weight(72)), delay=1)
    pairs = np.unique(build.random.integers(0, [48, 72], (90, 2)), axis=0)
    sparse = Sparse((2, 4, 6), build.weight(len(pairs)), None, pairs[:, 0], pairs[:, 1], (3, 4, 6))
    build.project("in", "c", sparse, delay=2)
    return build


def recurrent() -> Builder:
    """Recurrence within a population and from an earlier stage; nothing reaches into the next sample."""
    build = Builder(5)
    build.input("in", (6,))
    build.population("a", (8,), 1)
    build.population("b", (7,), 2)
    build.project("in", "a", Dense((6,), build.weight(8, 6)))
    build.project("a", "a", Dense((8,), build.weight(8, 8)), recurrent=True)
    build.project("a", "b", Dense((8,), build.weight(7, 8)))
    build.project("a", "b", Dense((8,), build.weight(7, 8)), recurrent=True)
    return build


def graded() -> Builder:
    """Payloads of several bits into a dense layer and a pooled convolution."""
    build = Builder(6)
    build.input("image", (1, 4, 6), message_bits=4)
    build.input("vector", (5,), message_bits=10)
    build.population("a", (2, 2, 3), 1, vth=5000)
    build.population("b", (4,), 2)
    build.project("image", "a", Conv2d((1, 4, 6), build.weight(2, 1, 3, 3), HALVES, padding=(1, 1)))
    build.project("vector", "a", Dense((5,), build.weight(12, 5)), exponent=0)
    build.project("a", "b", Dense((2, 2, 3), build.weight(4, 12)))
    return build


def subtractive() -> Builder:
    """Reset by subtraction, with one threshold and with one of each neuron, on an image; and the other ds_offset."""
    build = Builder(8, steps=8)
    build.input("in", (2, 4, 5))
    build.population("image", (3, 4, 5), 1, vth=150, each=True, reset="subtract")
    build.population("flat", (11,), 2, vth=150, reset="subtract", ds_offset=0)
    build.population("out", (5,), 3, ds_offset=0)
    build.project("in", "image", Conv2d((2, 4, 5), build.weight(3, 2, 3, 3), padding=(1, 1)))
    build.project("image", "flat", Dense((3, 4, 5), build.weight(11, 60)))
    build.project("flat", "out", Dense((11,), build.weight(5, 11)))
    return build


def few_bits() -> Builder:
    """Weights of two bits; of two projections that had both signs no positive ones are left."""
    build = Builder(11)
    pick = build.random.choice
    build.input("in", (2, 6, 6))
    build.population("a", (3, 4, 4), 1, vth=300)
    build.project("in", "a", Conv2d((2, 6, 6), pick([-256, -128, 0], (3, 2, 3, 3), p=[0.1, 0.1, 0.8])))
    build.project("in", "a", Conv2d((2, 6, 6), pick([0, 128], (3, 2, 3, 3), p=[0.3, 0.7])))
    build.population("b", (9,), 2, vth=600)
    build.project("a", "b", Dense((3, 4, 4), pick([-256, -128, 0], (9, 48), p=[0.05, 0.05, 0.9])))
    build.project("in", "b", Dense((2, 6, 6), pick([-256, 0, 128], (9, 72), p=[0.03, 0.6, 0.37])), delay=1)
    return build


def random_operator(build: Builder, shape: Shape, dense: bool = True) -> Operator:
    """An operator that fits a source of that shape, (channels, height, width)."""
    choose = build.random.integers
    pool = SumPool(tuple(choose(1, 4, 2).tolist()), tuple(choose(1, 4, 2).tolist())) if choose(2) else None
    if dense and choose(4) == 0:
        plain = Dense(shape, np.zeros((1, int(np.prod(pool.out_shape(shape) if pool else shape))), np.int64), pool)
        return Dense(shape, build.weight(choose(2, 9), plain.weight.shape[1]), pool)
    groups = shape[0] if choose(3) == 0 else 1
    weight = build.weight(groups * choose(1, 4), shape[0] // groups, *choose(1, 4, 2))
    stride, padding, dilation = (tuple(map(int, choose(low, low + 2, 2))) for low in (1, 0, 1))
    return Conv2d(shape, weight, pool, stride, padding, dilation, int(groups))


def random_graph(seed: int) -> Builder:
    """A chain of random operators, with a dense short cut, delayed, from the input to the end."""
    build = Builder(seed, steps=int(np.random.default_rng(seed).integers(2, 6)))
    shape, source, stage = (2, 9, 11), "in", 0
    build.input("in", shape)
    while len(shape) == 3 and stage < 3:
        try:
            operator = random_operator(build, shape, dense=stage > 0)
        except GraphError:  # the kernel is larger than the image: draw again
            continue
        stage += 1
        fan_in = operator.weight[0].size * (np.prod(operator.pool.kernel) if operator.pool else 1)
        each = bool(build.random.integers(2))
        build.population(f"layer{stage}", operator.out_shape, stage, vth=int(80 * fan_in**0.5), each=each)
        build.project(source, f"layer{stage}", operator)
        shape, source = operator.out_shape, f"layer{stage}"
    build.population("out", (6,), stage + 1, vth=1500)
    build.project(source, "out", Dense(shape, build.weight(6, int(np.prod(shape)))))
    build.project("in", "out", Dense((2, 9, 11), build.weight(6, 198)), delay=stage)
    return build


# Lava equals the reference


@needs_lava
@pytest.mark.parametrize(
    "build",
    [dense_with_biases, convolutions, pooling, branches, recurrent, graded, subtractive, few_bits]
    + [pytest.param(lambda seed=seed: random_graph(seed), id=f"random{seed}") for seed in (13, 18, 32)],
)
def test_lava_gives_the_spikes_of_the_reference(build) -> None:
    builder = build()
    graph, inputs = builder.graph(), builder.spikes(samples=5)
    trace = lava_backend.run(graph, inputs, timeout_s=120)
    expected, _ = reference(graph, inputs)
    assert trace.membrane is None
    assert (trace.backend, trace.graph, trace.samples, trace.steps) == ("lava", graph.fingerprint(), 5, graph.steps)
    for population in graph.populations:
        spikes = expected[population.name]
        assert 0.02 < spikes.mean() < 0.98, f"{population.name} is silent or always on and tests nothing"
        np.testing.assert_array_equal(trace.spikes(population.name), spikes, err_msg=population.name)


def read_by_membrane(builder: Builder, saturates: bool = False) -> ProcessGraph:
    """The graph with its last population made an integrator that leaks a little, or saturates and fires."""
    last = builder.populations[-1]
    changes = {"vth": np.asarray(2**17 - 1), "dv": np.asarray(3)}
    if saturates:
        changes |= {"bias_mant": builder.random.integers(2000, 4000, last.shape), "bias_exp": np.asarray(7)}
    builder.populations[-1] = replace(last, neuron=replace(last.neuron, **changes))
    return replace(builder.graph(), readout=Readout(last.name, "membrane"))


@needs_lava
@pytest.mark.parametrize(
    ("build", "steps", "saturates"),
    [
        (dense_with_biases, 3, False),
        (dense_with_biases, 1, False),
        (pooling, 6, False),
        (branches, 6, False),
        (branches, 20, True),
        (recurrent, 6, False),
        (lambda: random_graph(18), 4, False),
    ],
    ids=["dense", "one step", "pooling", "image behind stage 0", "saturated image", "recurrent", "random18"],
)
def test_lava_gives_the_membranes_of_the_reference(build, steps: int, saturates: bool) -> None:
    """And those of torch and of the event simulator; each sample's, at the right chip step of the stream."""
    builder = build()
    builder.steps = steps
    graph, inputs = read_by_membrane(builder, saturates), builder.spikes(samples=5)
    trace = lava_backend.run(graph, inputs, timeout_s=120)
    spikes, membranes = reference(graph, inputs)
    name = graph.readout.population
    assert bool(spikes[name].any()) == saturates
    assert len(np.unique(membranes[name], axis=0)) > 1, "samples that look alike test nothing"
    np.testing.assert_array_equal(trace.membrane, membranes[name])
    for population in graph.populations:
        np.testing.assert_array_equal(trace.spikes(population.name), spikes[population.name], population.name)
    for other in (torch_backend.run(graph, inputs, device="cpu"), event_simulator.run(graph, inputs)):
        found = compare(graph, other, trace)
        assert found.equal, str(found)
        assert found.membranes == membranes[name].size
        np.testing.assert_array_equal(decisions(graph.readout, other), decisions(graph.readout, trace))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_geometry_without_pooling_equals_the_operator(seed: int) -> None:
    build = Builder(seed)
    try:
        operator = random_operator(build, (2, *build.random.integers(4, 8, 2).tolist()))
    except GraphError:
        return
    x = build.random.integers(0, 3, (2, *operator.in_shape))
    expected = apply(operator, x)
    flat = x.reshape(2, -1) @ bundle.dense_matrix(operator).T
    np.testing.assert_array_equal(flat.reshape(expected.shape), expected)
    composite = bundle.composite_convolution(operator) if isinstance(operator, Conv2d) else None
    if composite is not None:
        weight, stride, padding, dilation = composite
        single = Conv2d(operator.in_shape, weight, None, stride, padding, dilation, operator.groups)
        np.testing.assert_array_equal(single.apply(torch.as_tensor(x, dtype=torch.float64)).numpy(), expected)


def without_rounding(projection: Projection) -> Projection:
    """With a negative exponent only where its weights are multiples: Lava's Dense rounds sums otherwise."""
    e = projection.exponent
    if e >= 0 or not (projection.operator.weight % (1 << -e)).any():
        return projection
    return replace(projection, exponent=-e)


def deployable(seed: int, membrane: bool) -> tuple[ProcessGraph, dict[str, np.ndarray]]:
    """A random graph of every operator and parameter (tests/graph_strategies.py) that Lava can express, and inputs."""
    for draw in range(seed, seed + 50):
        graph = random_graph_of_all(draw, populations=3, inputs=2, steps=4, membrane=membrane, hot=draw % 2 == 0)
        graph = replace(graph, projections=tuple(map(without_rounding, graph.projections)))
        inputs = random_inputs(graph, draw, samples=4)
        states = torch_backend.run(graph, inputs, device="cpu", record=True).states.values()
        if max(np.abs(state["a"]).max() for state in states) >= 1 << 24:
            continue  # Lava's own 32 bits end there
        try:
            bundle.describe(graph, inputs)
        except BackendError as error:
            if "closes a loop" not in str(error):
                raise
            continue
        return graph, inputs
    raise AssertionError("no graph that Lava can express")


@needs_lava
@settings(max_examples=2, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_lava_gives_the_spikes_of_torch_on_random_graphs(seed: int, membrane: bool) -> None:
    graph, inputs = deployable(seed, membrane)
    found = compare(graph, torch_backend.run(graph, inputs, device="cpu"), lava_backend.run(graph, inputs), inputs)
    assert found.equal, str(found)


# States and faults


@needs_lava
def test_lava_records_the_states_of_torch() -> None:
    """Of flat populations and of images, in our neuron order, after the reset."""
    builder = subtractive()
    graph, inputs = builder.graph(), builder.spikes(samples=2)
    torch_states = torch_backend.run(graph, inputs, device="cpu", record=True).states
    trace = lava_backend.run(graph, inputs, timeout_s=120, record=True)
    for population in graph.populations:
        for key in ("u", "v"):
            expected = torch_states[population.name][key]
            assert len(np.unique(expected)) > 10
            np.testing.assert_array_equal(trace.states[population.name][key], expected, f"{key} of {population.name}")


def flip(arrays: dict[str, np.ndarray]) -> None:
    arrays["synapse0.weight"] = arrays["synapse0.weight"][:, ::-1, ::-1]


def lose_bias(arrays: dict[str, np.ndarray]) -> None:
    arrays["population0.bias_mant"] = np.zeros_like(arrays["population0.bias_mant"])


@needs_lava
@pytest.mark.parametrize(
    ("plant", "name", "quantity"),
    [(flip, "flipped kernel", "incoming current"), (lose_bias, "lost bias", "v")],
    ids=["flipped kernel", "lost bias"],
)
def test_a_fault_planted_in_the_bundle_is_named(plant, name: str, quantity: str, tmp_path: Path) -> None:
    """What Lava really does with a wrong bundle is told apart from what the network says."""
    build = Builder(9)
    build.input("in", (2, 5, 6))
    build.population("image", (3, 4, 4), 1, vth=200)
    build.population("out", (5,), 2, vth=200)
    build.project("in", "image", Conv2d((2, 5, 6), build.weight(3, 2, 2, 3)))
    build.project("image", "out", Dense((3, 4, 4), build.weight(5, 48)))
    graph, inputs = build.graph(), build.spikes(samples=4)
    bundle.write_bundle(graph, inputs, tmp_path / "bundle")
    with np.load(tmp_path / "bundle" / "network.npz") as stored:
        arrays = dict(stored)
    plant(arrays)
    np.savez(tmp_path / "bundle" / "network.npz", **arrays)
    trace = lava_backend.run_bundle(tmp_path / "bundle", graph, record=True)
    found = compare(graph, torch_backend.run(graph, inputs, device="cpu"), trace).divergence
    assert found is not None
    assert found.place.population == "image"
    assert found.explanation is not None
    assert {cause.what for cause in found.explanation.causes} == {name}
    assert found.explanation.sides[1].origin == "recorded"
    assert found.explanation.state is not None
    assert found.explanation.state.quantity == quantity


# What Lava cannot run


def one_layer(operator: Operator | None = None, **changes: object) -> ProcessGraph:
    build = Builder(7)
    operator = operator or Dense((3,), build.weight(2, 3))
    build.input("in", operator.in_shape)
    build.population("layer", operator.out_shape, 1)
    build.project("in", "layer", operator, exponent=changes.pop("exponent", 0))
    build.populations[0] = Population(
        "layer", operator.out_shape, LoihiNeuron(**(vars(build.populations[0].neuron) | changes)), 1
    )
    return build.graph()


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (one_layer(vth=np.asarray(1 << 17)), "'layer' has a vth outside"),
        (one_layer(exponent=-3), "exponent -3, and weights that are no multiples of 8"),
        (one_layer(Dense((2,), np.array([[3, -2]]))), "mixed weights that are not 8-bit"),
        (one_layer(Dense((2,), np.array([[3, 256]]))), "excitatory weights that are not 8-bit"),
        (one_layer(Dense((2,), np.array([[0.5, 2.0]]))), "float weights"),
    ],
)
def test_what_lava_cannot_run_is_refused(graph: ProcessGraph, message: str, tmp_path: Path) -> None:
    inputs = {"in": np.zeros((1, graph.steps, *graph.inputs[0].shape), np.uint8)}
    with pytest.raises(BackendError, match=message):
        bundle.write_bundle(graph, inputs, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_loop_over_populations_is_refused_by_name(tmp_path: Path) -> None:
    build = Builder(5)
    build.input("in", (6,))
    build.population("a", (8,), 1)
    build.population("b", (7,), 2)
    build.project("in", "a", Dense((6,), build.weight(8, 6)))
    build.project("a", "b", Dense((8,), build.weight(7, 8)))
    build.project("b", "a", Dense((7,), build.weight(8, 7)), recurrent=True)
    with pytest.raises(BackendError, match=r"'b-a-2' closes a loop over several populations.* 1 too late"):
        bundle.write_bundle(build.graph(), build.spikes(samples=2), tmp_path / "bundle")


def run_alone(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The runner as its README says, by Lava's Python."""
    command = [str(lava_backend.find_interpreter()), "run_lava.py", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@needs_lava
def test_what_exists_in_the_simulator_alone_is_refused_for_a_board_by_name(tmp_path: Path) -> None:
    builder = subtractive()
    bundle.write_bundle(builder.graph(), builder.spikes(samples=2), tmp_path / "bundle")
    done = run_alone(tmp_path / "bundle", "--hardware", "--record")
    assert done.returncode == 1
    lines = (
        "population 'image' resets by subtraction",
        "population 'image' has a vth of each neuron",
        "population 'flat' has ds_offset 0",
        "--record reads u and v",
    )
    readme = (tmp_path / "bundle" / "README.md").read_text()
    for line in lines:
        assert line in done.stderr
        assert line in readme or line.startswith("--record")
    assert "Traceback" not in done.stderr


@needs_lava
def test_a_bundle_runs_by_the_commands_of_its_readme(tmp_path: Path) -> None:
    """Alone, elsewhere; what it leaves is a trace with its inputs."""
    builder = graded()
    graph, inputs = builder.graph(), builder.spikes(samples=3)
    bundle.write_bundle(graph, inputs, tmp_path / "bundle")
    elsewhere = (tmp_path / "bundle").rename(tmp_path / "elsewhere")
    done = run_alone(elsewhere)
    assert done.returncode == 0, done.stderr
    trace = Trace.load(elsewhere / "trace-lava.npz", graph)
    truth = torch_backend.run(graph, inputs, device="cpu")
    assert trace.sizes == truth.sizes
    for name, packed in truth.packed.items():
        np.testing.assert_array_equal(trace.packed[name], packed, name)


def test_the_runner_writes_the_trace_format_that_is_read() -> None:
    assert (lava_runner.TRACE_FORMAT, lava_runner.TRACE_VERSION) == (trace_format.FORMAT, trace_format.FORMAT_VERSION)


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    graph = one_layer()
    with pytest.raises(SpikeportError, match="no bundle"):
        bundle.write_bundle(graph, {"in": np.zeros((1, graph.steps, 3), np.uint8)}, tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_missing_interpreter_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(lava_backend.INTERPRETER_VARIABLE, str(tmp_path / "python"))
    with pytest.raises(BackendUnavailableError, match="make setup-lava"):
        lava_backend.find_interpreter()


def test_an_interpreter_without_lava_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lava_backend.INTERPRETER_VARIABLE, sys.executable)
    with pytest.raises(BackendUnavailableError, match="cannot run Lava: it is Python"):
        lava_backend.find_interpreter()


# Workers


def workers(folder: Path) -> list[int]:
    """Processes whose command line names the folder, found in /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it ended while we looked
            continue
    return found


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


@pytest.fixture
def long_run() -> tuple[ProcessGraph, dict[str, np.ndarray]]:
    """Minutes of work."""
    builder = dense_with_biases()
    return builder.graph(), builder.spikes(samples=20_000)


@needs_lava
def test_normal_end_leaves_no_worker_and_keeps_the_files(tmp_path: Path) -> None:
    graph = one_layer()
    trace = lava_backend.run(graph, {"in": np.ones((1, graph.steps, 3), np.uint8)}, tmp_path / "run")
    assert trace.seconds > 0
    assert (tmp_path / "run" / "trace-lava.npz").exists()
    assert workers(tmp_path) == []


@needs_lava
def test_time_limit_ends_every_worker(long_run, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="did not finish within 4 s"):
        lava_backend.run(*long_run, tmp_path / "run", timeout_s=4)
    assert workers(tmp_path) == []


@needs_lava
def test_interrupt_ends_every_worker(long_run, tmp_path: Path) -> None:
    seen = []

    def interrupt(done: int) -> None:
        seen.append(len(workers(tmp_path)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lava_backend.run(*long_run, tmp_path / "run", progress=interrupt, timeout_s=60)
    assert seen[0] > 5
    assert workers(tmp_path) == []


@needs_lava
def test_a_run_does_not_outlive_its_program(long_run, tmp_path: Path) -> None:
    graph, inputs = long_run
    bundle.write_bundle(graph, inputs, tmp_path / "run")
    command = [lava_backend.find_interpreter(), "run/run_lava.py", tmp_path / "run", "--out", "trace.npz", "--tied"]
    script = f"import subprocess; subprocess.run({[str(part) for part in command]}, stderr=subprocess.DEVNULL)"
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        assert wait_until(lambda: len(workers(tmp_path)) > 5, seconds=30)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert wait_until(lambda: workers(tmp_path) == [], seconds=10)


@needs_lava
def test_words_of_a_failing_worker_reach_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def damage(graph: ProcessGraph, inputs: dict[str, np.ndarray], folder: Path) -> None:
        bundle.write_bundle(graph, inputs, folder)
        np.savez(folder / "stream.npz", input0=np.zeros((6, 2), np.uint8))

    monkeypatch.setattr(lava_backend, "write_bundle", damage)
    graph = one_layer()
    with pytest.raises(BackendError, match=r"(?s)exit status 1.*data\.shape=\(2,\) self\._shape=\(3,\) Mismatch"):
        lava_backend.run(graph, {"in": np.ones((1, graph.steps, 3), np.uint8)}, tmp_path / "run", timeout_s=60)
    assert workers(tmp_path) == []
