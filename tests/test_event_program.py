"""How the event simulator lays a graph out: units and widths of weights, orders, 32 or 64 bits; all without effect."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from graph_strategies import graphs, one_thread, operators, random_graph, random_inputs, simulate_plainly  # noqa: F401
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Conv2d, Dense, OneToOne, Operator, SumPool
from spikeport.deploy import event_kernels as kernels
from spikeport.deploy import event_simulator
from spikeport.deploy.event_program import Program
from spikeport.deploy.trace import pack

SEEDS = st.integers(0, 2**32 - 1)


def neuron(vth: int = 100, du: int = 3000, dv: int = 500, bias: int = 0) -> LoihiNeuron:
    """One set of parameters for a whole population."""
    return LoihiNeuron(*(np.asarray(value, dtype=np.int64) for value in (du, dv, vth, bias, 0)))


def joined(
    sources: list[tuple[Operator, int, int]], parameters: LoihiNeuron | None = None, steps: int = 4
) -> ProcessGraph:
    """One population behind an input for each (operator, exponent, message bits)."""
    inputs = tuple(Input(f"in{i}", operator.in_shape, bits) for i, (operator, _, bits) in enumerate(sources))
    projections = tuple(
        Projection(f"p{i}", f"in{i}", "out", operator, exponent) for i, (operator, exponent, _) in enumerate(sources)
    )
    out = Population("out", sources[0][0].out_shape, parameters or neuron(), 1)
    return ProcessGraph("joined", steps, 1e-3, inputs, (out,), projections, Readout("out"))


def assert_plain(graph: ProcessGraph, seed: int = 0, samples: int = 3) -> None:
    """The event simulator does what the plain model does: spikes, active neurons, operations; and the membrane of
    the last population, made an integrator."""
    if graph.probed is None:
        assert_plain(as_integrator(graph), seed, samples)
    inputs = random_inputs(graph, seed, samples)
    plain, trace = simulate_plainly(graph, inputs), event_simulator.run(graph, inputs, threads=1)
    for population in graph.populations:
        name = population.name
        np.testing.assert_array_equal(trace.spikes(name), plain.spikes[name], name)
        np.testing.assert_array_equal(trace.active[name], pack(plain.active[name]), name)
    if graph.probed is not None:
        assert trace.membrane is not None
        np.testing.assert_array_equal(trace.membrane, plain.v[graph.probed.name][:, -1])
    for projection in graph.projections:
        np.testing.assert_array_equal(trace.synops[projection.name], plain.synops[projection.name], projection.name)


def as_integrator(graph: ProcessGraph) -> ProcessGraph:
    """The same graph, read by the membrane of its last population, which gets the largest threshold and a slow leak."""
    last = graph.populations[-1]
    assert isinstance(last.neuron, LoihiNeuron)
    leak, vth = np.minimum(last.neuron.dv, 3), np.full_like(last.neuron.vth, 2**17 - 1)
    integrator = replace(last, neuron=replace(last.neuron, vth=vth, dv=leak))
    return replace(
        graph,
        populations=(*graph.populations[:-1], integrator),
        projections=tuple(p for p in graph.projections if p.source != last.name),
        readout=Readout(last.name, "membrane"),
    )


@given(
    st.lists(st.tuples(st.integers(-4, 7), st.integers(0, 6), st.sampled_from([1, 1, 3])), min_size=1, max_size=4),
    SEEDS,
)
@example([(0, 1, 1), (3, 0, 1), (0, 4, 1)], 0)
@example([(-3, 3, 1), (2, 2, 1)], 1)
@example([(-1, 0, 3), (0, 6, 1), (7, 6, 3)], 2)
@settings(max_examples=30)
def test_units_of_weights_have_no_effect(parts: list[tuple[int, int, int]], seed: int) -> None:
    """Projections of different exponents, and weights with different common powers of two, into one population."""
    rng = np.random.default_rng(seed)
    sources = [(Dense((6,), rng.integers(-9, 10, (9, 6)) << shift), exponent, bits) for exponent, shift, bits in parts]
    assert_plain(joined(sources, neuron(int(rng.integers(0, 3000)))), seed)


@pytest.mark.parametrize(
    ("largest", "step", "width"),
    [
        *((127, 1, 1), (-128, 1, 1), (254, 2, 1), (-256, 2, 1), (2**19, 2**13, 1), (0, 1, 1)),
        *(
            (128, 1, 2),
            (255, 1, 2),
            (-255, 1, 2),
            (2**15 - 1, 1, 2),
            (-(2**15), 1, 2),
            (2**15, 1, 4),
            (2**19 + 1, 1, 4),
        ),
    ],
)
@pytest.mark.parametrize("kind", ["dense", "conv", "one to one"])
def test_weights_take_no_more_bytes_than_they_need(kind: str, largest: int, step: int, width: int) -> None:
    rng = np.random.default_rng(width)
    weight = np.sort(np.array([largest, largest - np.sign(largest) * step, 0, step * np.sign(largest)] * 9))
    weight = rng.permutation(weight)
    operator: Operator = {
        "dense": lambda: Dense((4,), weight.reshape(9, 4)),
        "conv": lambda: Conv2d((2, 5, 4), weight[:36].reshape(2, 2, 3, 3)),
        "one to one": lambda: OneToOne((36,), weight),
    }[kind]()
    for bits in (1, 2):
        graph = joined([(operator, 0, bits)], neuron(min(abs(largest), 2**17 - 1)))
        assert Program(graph, 1).net.projections["width"].tolist() == [width]
        assert_plain(graph)


@given(operators(), st.integers(-2, 3), st.sampled_from([1, 5]), SEEDS)
@example(
    Conv2d((2, 7, 9), np.arange(-60, 60, 2).reshape(2, 2, 5, 3), SumPool((3, 2), (1, 1)), (2, 1), (2, 1), (1, 3)),
    0,
    1,
    3,
)
@example(Conv2d((4, 6, 6), 2 * np.arange(-18, 18).reshape(4, 1, 3, 3), None, (1, 2), (1, 1), (2, 1), 4), 1, 1, 4)
@example(Conv2d((4, 8, 11), np.arange(-100, 188, 2).reshape(6, 2, 3, 4), None, (1, 3), (1, 2), (1, 2), 2), 0, 5, 5)
@settings(max_examples=60)
def test_every_operator_by_itself(operator: Operator, exponent: int, bits: int, seed: int) -> None:
    """Strides, paddings, dilations, groups and overlapping windows, binary and graded."""
    assert_plain(joined([(operator, exponent, bits)], neuron(300)), seed)


@pytest.mark.parametrize("channels", [1, 2, 7, 8, 17, 33])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (4, 4), (5, 7)])
def test_images_of_all_sizes_are_packed_in_the_graphs_order(channels: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(channels)
    weight = 2 * rng.integers(-100, 110, (channels, 2, 1, 1))
    first = Conv2d((2, *size), weight)
    assert_plain(joined([(first, 0, 1)], neuron(40)))


@pytest.mark.parametrize("rows", [31, 32, 33, 200])
def test_many_spikes_of_extreme_weights_do_not_overflow_16_bits(rows: int) -> None:
    for value in (-256, 254):
        operator = Dense((rows,), np.full((70, rows), value))
        other = Conv2d((rows, 3, 3), np.full((5, rows, 2, 2), value))
        for case in (operator, other):
            graph = joined([(case, 0, 1)], neuron(40_000, du=4095, dv=4096))
            inputs = {"in0": np.ones((1, graph.steps, *case.in_shape), np.uint8)}
            plain = simulate_plainly(graph, inputs)
            np.testing.assert_array_equal(event_simulator.run(graph, inputs).spikes("out"), plain.spikes["out"])


@pytest.mark.parametrize("bits", [1, 4])
def test_convolutions_that_see_flat_neurons_as_different_images(bits: int) -> None:
    """One of them finds the neurons in its own order, the others need a table: before, behind, and between."""
    rng = np.random.default_rng(7)

    def conv(shape: tuple[int, int, int], channels: int, kernel: tuple[int, int]) -> Conv2d:
        return Conv2d(shape, 2 * rng.integers(-60, 64, (channels, shape[0], *kernel)))

    operators = [
        ("in", "flat", conv((3, 4, 6), 6, (3, 5))),  # to (6, 2, 2)
        ("in", "flat", conv((3, 6, 4), 2, (3, 2))),  # to (2, 4, 3)
        ("flat", "image", conv((2, 3, 4), 3, (2, 2))),  # to (3, 2, 3)
        ("flat", "image", conv((6, 2, 2), 18, (2, 2))),  # to (18, 1, 1)
    ]
    shapes = {"in": (72,), "flat": (24,), "image": (3, 2, 3)}
    graph = ProcessGraph(
        "views",
        4,
        1e-3,
        (Input("in", shapes["in"], bits),),
        (Population("flat", shapes["flat"], neuron(90), 1), Population("image", shapes["image"], neuron(60), 2)),
        tuple(Projection(f"p{i}", source, target, op, i % 2) for i, (source, target, op) in enumerate(operators)),
        Readout("image"),
    )
    assert_plain(graph)


@pytest.mark.parametrize(
    ("parameters", "bits", "kind"),
    [
        (neuron(), 1, kernels.SHARED),
        (LoihiNeuron(*(np.full(4, value) for value in (3000, 500, 100, 0, 0))), 1, kernels.SHARED),
        (LoihiNeuron(np.arange(4), *(np.full(4, value) for value in (500, 100, 0, 0))), 1, kernels.EACH),
        (neuron(131071, du=4095), 16, kernels.SHARED),
        (neuron(131071, du=0), 12, kernels.WIDE),
        (neuron(131071, du=4095), 22, kernels.WIDE),
        (neuron(2**26), 1, kernels.WIDE),
    ],
)
def test_states_take_64_bits_where_32_may_not_do(parameters: LoihiNeuron, bits: int, kind: int) -> None:
    weight = np.array([[100, -90, 70, -60]] * 4)
    for reset in ("zero", "subtract"):
        own = LoihiNeuron(
            parameters.du, parameters.dv, parameters.vth, parameters.bias_mant, parameters.bias_exp, 1, reset
        )
        graph = joined([(Dense((4,), weight), 0, bits)], own, steps=12)
        assert Program(graph, 1).net.populations["kind"].tolist() == [kind]
        assert_plain(graph, bits)


@given(graphs(populations=3), SEEDS)
@settings(max_examples=15)
def test_samples_one_by_one_are_the_samples_together(graph: ProcessGraph, seed: int) -> None:
    """On one thread or several, in one call or many; counts included."""
    assume(graph.event_inputs)
    inputs = random_inputs(graph, seed, samples=5)
    together = event_simulator.run(graph, inputs, threads=3)
    for sample in range(5):
        alone = event_simulator.run(graph, {name: x[sample : sample + 1] for name, x in inputs.items()}, threads=1)
        for kind in ("packed", "active", "synops"):
            for name, array in getattr(alone, kind).items():
                np.testing.assert_array_equal(getattr(together, kind)[name][sample], array[0], f"{kind} of {name}")
        if graph.probed is not None:
            np.testing.assert_array_equal(together.membrane[sample], alone.membrane[0])


@pytest.mark.parametrize("piece", [1, 7, 50, 1000])
def test_inputs_are_read_in_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graded and binary ones; the payloads of a piece must find their events."""
    graph = random_graph(4, populations=2, inputs=2, steps=6)
    assert {node.message_bits > 1 for node in graph.event_inputs} == {True, False}
    monkeypatch.setattr(event_simulator, "PIECE", piece)
    assert_plain(graph, 3, samples=4)


def test_the_event_simulator_does_not_import_torch() -> None:
    """It would take seconds at every start."""
    code = "import sys, spikeport.deploy.event_simulator; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
