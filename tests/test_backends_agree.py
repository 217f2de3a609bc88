"""Every backend does the same: torch, events and a plain model in Python's integers, spike by spike, count by count.

The networks are random (`graph_strategies`): all operators, pooled addressing, exponents, delays, loops, both resets,
states that wrap and saturate.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from graph_strategies import (  # noqa: F401
    LARGEST_CURRENT,
    graphs,
    one_thread,
    random_graph,
    random_inputs,
    simulate_plainly,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spikeport.converters.graph import (
    FloatNeuron,
    Input,
    LoihiNeuron,
    Population,
    ProcessGraph,
    Projection,
    Readout,
)
from spikeport.converters.lower import balance
from spikeport.converters.operators import Conv2d, Dense, OneToOne, Operator, SumPool
from spikeport.deploy import event_simulator, torch_backend
from spikeport.deploy.timing import derived_synops
from spikeport.deploy.trace import Trace, pack
from spikeport.models.errors import BackendError, QuantizationError, SpikeportError

SEEDS = st.integers(0, 2**32 - 1)
Run = Callable[..., Trace]


def neuron(vth: int = 100, du: int = 4095, dv: int = 0, bias: int = 0) -> LoihiNeuron:
    """One set of parameters for a whole population."""
    values = (np.asarray(value, dtype=np.int64) for value in (du, dv, vth, bias, 0))
    return LoihiNeuron(*values)


def network(
    operator: Operator, exponent: int = 0, bits: int = 1, steps: int = 3, parameters: LoihiNeuron | None = None
) -> ProcessGraph:
    """One population behind one input."""
    return ProcessGraph(
        "network",
        steps,
        1e-3,
        (Input("in", operator.in_shape, bits),),
        (Population("out", operator.out_shape, parameters or neuron(), 1),),
        (Projection("in->out", "in", "out", operator, exponent),),
        Readout("out"),
    )


def assert_same(graph: ProcessGraph, first: Trace, second: Trace) -> None:
    """Every population's spikes and active neurons are equal, and the membrane that is read."""
    assert_same_membrane(graph, first.membrane, second.membrane)
    for population in graph.populations:
        name = population.name
        np.testing.assert_array_equal(first.spikes(name), second.spikes(name), name)
        np.testing.assert_array_equal(first.active[name], second.active[name], name)


def assert_same_membrane(graph: ProcessGraph, first: np.ndarray | None, second: np.ndarray | None) -> None:
    """Both have the membrane if it is the readout, and then the same integers."""
    if graph.probed is None:
        assert first is None
        assert second is None
        return
    for membrane in (first, second):
        assert membrane is not None
        assert (membrane.shape[1], membrane.dtype) == (graph.probed.size, np.int64)
    np.testing.assert_array_equal(first, second, "membrane")


@given(graphs(), SEEDS)
def test_torch_and_events_do_what_the_plain_model_does(graph: ProcessGraph, seed: int) -> None:
    inputs = random_inputs(graph, seed, samples=2)
    plain = simulate_plainly(graph, inputs)
    torch_trace = torch_backend.run(graph, inputs, device="cpu", record=True)
    event_trace = event_simulator.run(graph, inputs, threads=1)
    for population in graph.populations:
        name = population.name
        for trace in (torch_trace, event_trace):
            np.testing.assert_array_equal(trace.spikes(name), plain.spikes[name], f"{trace.backend} {name}")
            np.testing.assert_array_equal(trace.active[name], pack(plain.active[name]), f"{trace.backend} {name}")
        for key, expected in (("a", plain.a), ("u", plain.u), ("v", plain.v)):
            np.testing.assert_array_equal(torch_trace.states[name][key], expected[name], f"{key} of {name}")
    for trace in (torch_trace, event_trace):
        assert_same_membrane(graph, trace.membrane, plain.v[graph.probed.name][:, -1] if graph.probed else None)
    for projection in graph.projections:
        np.testing.assert_array_equal(event_trace.synops[projection.name], plain.synops[projection.name])


@given(graphs(populations=4), SEEDS)
@settings(max_examples=20)
def test_torch_and_events_agree_over_many_samples(graph: ProcessGraph, seed: int) -> None:
    inputs = random_inputs(graph, seed, samples=event_simulator.MOST_SAMPLES + 5)
    torch_trace = torch_backend.run(graph, inputs, device="cpu")
    event_trace = event_simulator.run(graph, inputs, threads=2)
    assert_same(graph, torch_trace, event_trace)
    for node in graph.event_inputs:
        np.testing.assert_array_equal(torch_trace.packed[node.name], event_trace.packed[node.name])


@given(graphs(), SEEDS)
@settings(max_examples=20)
def test_synops_follow_from_the_spikes_of_the_reference(graph: ProcessGraph, seed: int) -> None:
    """As integers, for every projection and step; by `Operator.fan_out` and by unit vectors through the operator."""
    inputs = random_inputs(graph, seed, samples=2)
    reference = torch_backend.run(graph, inputs, device="cpu")
    counted = event_simulator.run(graph, inputs, threads=1).synops
    derived = derived_synops(graph, reference)
    constant = {node.name: np.ones((2, graph.steps, node.size)) for node in graph.inputs if node.constant}
    for projection in graph.projections:
        structure = projection.operator.with_weight(np.ones_like(projection.operator.weight))
        units = torch.eye(structure.n_in, dtype=torch.float64).reshape(-1, *structure.in_shape)
        fan_out = structure.apply(units).flatten(1).sum(1).numpy()
        source = projection.source
        spikes = constant[source] if source in constant else reference.spikes(source)
        expected = spikes @ fan_out
        if projection.recurrent:
            expected = np.concatenate([np.zeros((2, 1)), expected[:, :-1]], axis=1)
        np.testing.assert_array_equal(counted[projection.name], expected, projection.name)
        np.testing.assert_array_equal(derived[projection.name], expected, projection.name)


@given(graphs(populations=4, inputs=2, recurrent=False), SEEDS)
@example(random_graph(3, populations=4, recurrent=False), 0)
@settings(max_examples=15)
def test_a_streamed_chip_gives_the_reference_shifted_by_the_stages(graph: ProcessGraph, seed: int) -> None:
    """Delays and stages: samples back to back, one chip step a connection, each stage reset l steps after the input."""
    inputs = random_inputs(graph, seed, samples=2)
    expected = torch_backend.run(graph, inputs, device="cpu")
    streamed, membranes = stream(graph, inputs)
    for population in graph.populations:
        name = population.name
        np.testing.assert_array_equal(streamed[name], expected.spikes(name), name)
    assert_same_membrane(graph, expected.membrane, membranes[graph.probed.name] if graph.probed else None)


def stream(graph: ProcessGraph, inputs: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One run over all samples in chip time; spikes of each population (samples, steps, size), cut out at its stage,
    and v of each after the last step of a sample, (samples, size).

    Each chip step runs the populations by themselves on what was sent 1 + delay chip steps earlier.
    """
    samples = next(iter(inputs.values())).shape[0]
    rows = samples * graph.steps
    chip_steps = rows + max(p.stage for p in graph.populations)
    sent = {node.name: np.zeros((chip_steps, node.size), np.int64) for node in graph.nodes}
    for node in graph.inputs:
        sent[node.name][:rows] = 1 if node.constant else inputs[node.name].reshape(rows, -1)
        if node.constant:
            sent[node.name][:] = 1
    membranes = {}
    for population in graph.populations:
        incoming = graph.incoming(population.name)
        late = np.zeros((chip_steps, population.size), np.int64)
        for projection in incoming:
            matrix = projection.operator.apply(
                torch.eye(projection.operator.n_in, dtype=torch.float64).reshape(-1, *projection.operator.in_shape)
            ).flatten(1)
            sums = (sent[projection.source] @ matrix.numpy()).astype(np.int64)
            exponent = projection.exponent
            sums = sums << exponent if exponent >= 0 else sums >> -exponent
            wait = 1 + projection.delay
            late[wait:] += sums[:-wait] if chip_steps > wait else 0
        own = late[population.stage : population.stage + rows].reshape(samples, graph.steps, -1)
        spikes, membranes[population.name] = advance_alone(population, own, graph.steps)
        sent[population.name][population.stage : population.stage + rows] = spikes.reshape(rows, -1)
    spikes_of = {p.name: sent[p.name][p.stage : p.stage + rows] for p in graph.populations}
    return {name: spikes.reshape(samples, graph.steps, -1) for name, spikes in spikes_of.items()}, membranes


def advance_alone(population: Population, currents: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Spikes and last v of a population that is given its synaptic sums (samples, steps, size), by the plain model."""
    high, low = (Input(name, population.shape, 26) for name in ("high", "low"))
    ones = np.ones(population.size, np.int64)
    alone = ProcessGraph(
        "alone",
        steps,
        1e-3,
        (high, low),
        (replace(population, stage=1),),
        (
            Projection("plus", "high", population.name, OneToOne(population.shape, ones)),
            Projection("minus", "low", population.name, OneToOne(population.shape, -ones)),
        ),
        Readout(population.name),
    )
    assert np.abs(currents).max() <= LARGEST_CURRENT
    shaped = currents.reshape(*currents.shape[:2], *population.shape)
    split = {"high": np.maximum(shaped, 0), "low": np.maximum(-shaped, 0)}
    run = simulate_plainly(alone, split)
    return run.spikes[population.name], run.v[population.name][:, -1]


def test_the_random_networks_reach_what_they_are_for() -> None:
    """The tests above would mean little if no state ever wrapped, nothing fired or no branch ever waited."""
    seen: set[str] = set()
    for seed in range(24):
        hot = seed % 2 == 1
        graph = random_graph(seed, populations=1 + seed % 4, hot=hot)
        run = simulate_plainly(graph, random_inputs(graph, seed, samples=2))
        seen |= {f"{p.operator.kind}{' pooled' if p.operator.pool else ''}" for p in graph.projections}
        seen |= {f"reset {p.neuron.reset}" for p in graph.populations}
        seen |= {"wraps"} if run.wrapped else set()
        seen |= {"saturates"} if run.saturated else set()
        seen |= {"delay"} if any(p.delay for p in graph.projections) else set()
        seen |= {"recurrent"} if any(p.recurrent for p in graph.projections) else set()
        seen |= {f"exponent {np.sign(p.exponent)}" for p in graph.projections}
        seen |= {"constant"} if any(node.constant for node in graph.inputs) else set()
        seen |= {"graded"} if any(node.message_bits > 1 for node in graph.inputs) else set()
        rate = np.mean([spikes.mean() for spikes in run.spikes.values()])
        seen |= {"fires"} if 0.05 < rate < 0.6 else set()
    assert seen == {
        *("dense", "conv", "sparse", "one_to_one", "dense pooled", "conv pooled"),
        *("reset zero", "reset subtract", "wraps", "saturates", "delay", "recurrent", "constant", "graded", "fires"),
        *("exponent -1", "exponent 0", "exponent 1"),
    }


def test_the_random_integrators_reach_what_they_are_for() -> None:
    """Images and flat ones, with and without a leak, some that fire because they saturate, most that never do."""
    seen: set[str] = set()
    silent = different = 0
    for seed in range(24):
        graph = random_graph(seed, populations=1 + seed % 3, hot=seed % 2 == 1, membrane=True)
        assert graph.probed is not None
        run = simulate_plainly(graph, random_inputs(graph, seed, samples=2))
        last = run.v[graph.probed.name][:, -1]
        parameters = graph.probed.neuron
        assert isinstance(parameters, LoihiNeuron)
        different += len(np.unique(last)) > 1
        silent += not run.spikes[graph.probed.name].any()
        seen |= {"fires"} if run.spikes[graph.probed.name].any() else set()
        seen |= {"image" if len(graph.probed.shape) == 3 and min(graph.probed.shape) > 1 else "flat"}
        seen |= {"leaks" if np.all(parameters.dv) else "does not leak"}
    assert seen == {"fires", "image", "flat", "leaks", "does not leak"}
    assert min(silent, different) > 12


@pytest.mark.parametrize("membrane", [False, True])
@pytest.mark.parametrize(("threads", "chunk"), [(1, 1), (2, 1), (2, 3), (5, 7), (1, 1000)])
def test_events_do_not_depend_on_threads_and_chunks(
    threads: int, chunk: int, membrane: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = random_graph(11, populations=4, steps=5, membrane=membrane)
    inputs = random_inputs(graph, 1, samples=11)
    expected = event_simulator.run(graph, inputs, threads=1)
    monkeypatch.setattr(event_simulator, "MOST_SAMPLES", chunk)
    done: list[int] = []
    trace = event_simulator.run(graph, inputs, threads=threads, progress=done.append)
    assert_same(graph, expected, trace)
    assert {name: array.tolist() for name, array in trace.synops.items()} == {
        name: array.tolist() for name, array in expected.synops.items()
    }
    assert done == sorted(done)
    assert done[-1] == 11


@pytest.mark.parametrize("membrane", [False, True])
def test_torch_does_not_depend_on_the_batch(membrane: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = random_graph(11, populations=4, steps=5, membrane=membrane)
    inputs = random_inputs(graph, 1, samples=7)
    expected = torch_backend.run(graph, inputs, device="cpu", record=True)
    monkeypatch.setattr(torch_backend, "STATES_PER_BATCH", 2 * max(node.size for node in graph.event_nodes))
    done: list[int] = []
    trace = torch_backend.run(graph, inputs, device="cpu", progress=done.append, record=True)
    assert_same(graph, expected, trace)
    for name, states in trace.states.items():
        for key, values in states.items():
            np.testing.assert_array_equal(values, expected.states[name][key], f"{key} of {name}")
    assert done == [2, 4, 6, 7]


@given(graphs(hot=True), SEEDS)
@settings(max_examples=10)
def test_a_sample_does_not_depend_on_its_neighbours(graph: ProcessGraph, seed: int) -> None:
    inputs = random_inputs(graph, seed, samples=4)
    order = np.random.default_rng(seed).permutation(4)
    for run in (torch_backend.run, event_simulator.run):
        together = run(graph, inputs)
        shuffled = run(graph, {name: array[order] for name, array in inputs.items()})
        for population in graph.populations:
            name = population.name
            np.testing.assert_array_equal(together.spikes(name)[order], shuffled.spikes(name), name)
        if graph.probed is not None:
            np.testing.assert_array_equal(together.membrane[order], shuffled.membrane)


@pytest.mark.parametrize("bits", [1, 2, 8, 16])
@pytest.mark.parametrize("exponent", [-5, 0, 2])
def test_graded_events_weigh_by_their_payload(bits: int, exponent: int) -> None:
    """Two payloads through weights 3 and -2, summed by hand; a negative exponent rounds the sum down."""
    graph = network(Dense((2,), np.array([[3, -2]])), exponent, bits, steps=1, parameters=neuron(vth=2))
    payloads = np.array([[[0, 0]], [[1, 0]], [[0, 1]], [[2**bits - 1, 1]], [[1, 2**bits - 1]]])
    expected = []
    for first, second in payloads[:, 0].tolist():
        total = 3 * first - 2 * second
        expected.append(math.floor(total * 2.0**exponent))
    traced = torch_backend.run(graph, {"in": payloads}, device="cpu", record=True)
    assert traced.states["out"]["a"].ravel().tolist() == expected
    expected_spikes = simulate_plainly(graph, {"in": payloads}).spikes["out"]
    for trace in (traced, event_simulator.run(graph, {"in": payloads})):
        np.testing.assert_array_equal(trace.spikes("out"), expected_spikes, trace.backend)


def test_a_graded_event_is_one_operation_a_synapse() -> None:
    graph = network(Dense((2,), np.array([[3, -2], [0, 4]])), bits=4, steps=2)
    inputs = {"in": np.array([[[15, 0], [7, 1]]])}
    assert event_simulator.run(graph, inputs).synops["in->out"].tolist() == [[2, 4]]


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_inputs_of_every_integer_type_run_alike(dtype: type[np.generic]) -> None:
    graph = network(Conv2d((1, 4, 3), np.array([[[[90, -30]]]])))
    inputs = np.random.default_rng(0).integers(0, 2, (3, 3, 1, 4, 3))
    expected = simulate_plainly(graph, {"in": inputs}).spikes["out"]
    assert expected.any()
    for run in (torch_backend.run, event_simulator.run):
        np.testing.assert_array_equal(run(graph, {"in": inputs.astype(dtype)}).spikes("out"), expected)


def test_an_input_view_that_is_not_contiguous_runs_alike() -> None:
    graph = network(Dense((6,), np.arange(24).reshape(4, 6) * 2))
    wide = np.random.default_rng(0).integers(0, 2, (12, 3, 4)).transpose(2, 1, 0)[:, :, ::2]
    for run in (torch_backend.run, event_simulator.run):
        np.testing.assert_array_equal(
            run(graph, {"in": wide}).packed["out"], run(graph, {"in": wide.copy()}).packed["out"]
        )


def test_a_population_seen_flat_and_as_an_image_keeps_its_order() -> None:
    """A flat operator behind an image, and an image behind flat neurons: both count channels first."""
    rng = np.random.default_rng(2)
    image, flat, pairs = (2, 3, 4), (24,), SumPool((1, 2), (1, 2))
    graph = ProcessGraph(
        "reshaped",
        3,
        1e-3,
        (Input("in", image),),
        (Population("flat", flat, neuron(60), 1), Population("image", image, neuron(60), 2)),
        (
            Projection("a", "in", "flat", OneToOne(flat, 2 * rng.integers(0, 100, 24))),
            Projection("b", "flat", "image", Dense(image, 2 * rng.integers(-60, 70, (24, 12)), pairs)),
        ),
        Readout("image"),
    )
    inputs = {"in": rng.integers(0, 2, (4, 3, *image))}
    plain = simulate_plainly(graph, inputs).spikes
    assert plain["image"].any()
    for run in (torch_backend.run, event_simulator.run):
        trace = run(graph, inputs)
        for name, expected in plain.items():
            np.testing.assert_array_equal(trace.spikes(name), expected, f"{trace.backend} {name}")


def seen_otherwise(shape: tuple[int, ...]) -> tuple[ProcessGraph, dict[str, np.ndarray], np.ndarray]:
    """A convolution to (2, 2, 3) into neurons of another shape; inputs and the spikes that they must give."""
    rng = np.random.default_rng(4)
    operator = Conv2d((1, 3, 3), 2 * rng.integers(-60, 60, (2, 1, 2, 1)))
    graph = network(operator, steps=4, parameters=neuron(30))
    graph = replace(graph, populations=(replace(graph.populations[0], shape=shape),))
    inputs = {"in": rng.integers(0, 2, (6, 4, 1, 3, 3))}
    expected = simulate_plainly(graph, inputs).spikes["out"]
    assert 0.1 < expected.mean() < 0.9
    return graph, inputs, expected


@pytest.mark.parametrize("run", [torch_backend.run, event_simulator.run], ids=["torch", "events"])
def test_a_convolution_into_flat_neurons_runs(run: Run) -> None:
    """What pooling followed by flattening lowers to."""
    graph, inputs, expected = seen_otherwise((12,))
    np.testing.assert_array_equal(run(graph, inputs).spikes("out"), expected)


@pytest.mark.parametrize("run", [torch_backend.run, event_simulator.run], ids=["torch", "events"])
def test_a_convolution_into_another_image_is_right_or_refused(run: Run) -> None:
    try:
        graph, inputs, expected = seen_otherwise((3, 2, 2))
        trace = run(graph, inputs)
    except SpikeportError:
        return
    np.testing.assert_array_equal(trace.spikes("out"), expected)


# ---- the edges of the number formats -------------------------------------------------------------------------------


@pytest.mark.parametrize(("current", "expected"), [(131072, 8388608), (131073, -8388544), (-131072, 8388608)])
def test_u_wraps_once_and_only_beyond_its_limits(current: int, expected: int) -> None:
    """2^23 itself stays, one unit more wraps, and -2^23 wraps to 2^23: the limits are not symmetric."""
    graph = network(OneToOne((1,), np.array([np.sign(current)])), bits=18, steps=1, parameters=neuron(131071))
    inputs = {"in": np.array([[[abs(current)]]])}
    trace = torch_backend.run(graph, inputs, device="cpu", record=True)
    assert trace.states["out"]["u"].item() == expected
    # only what has not wrapped to below zero reaches the largest threshold
    for spikes in (trace.spikes("out"), event_simulator.run(graph, inputs).spikes("out")):
        assert spikes.item() == (expected > 0)


@pytest.mark.parametrize("payload", [2**25 + 2**18, 2**26, 2**29 + 12345])
def test_currents_that_leave_u_beyond_24_bits_run_alike(payload: int) -> None:
    """One wrap does not bring such a u back into 24 bits; what is left over must not be cut by a backend's own type."""
    parameters = neuron(vth=131071, du=2000, dv=100)
    graph = network(OneToOne((1,), np.array([1])), bits=30, steps=3, parameters=parameters)
    inputs = {"in": np.array([[[payload], [0], [0]]])}
    expected = simulate_plainly(graph, inputs)
    reference = torch_backend.run(graph, inputs, device="cpu", record=True)
    np.testing.assert_array_equal(reference.states["out"]["u"], expected.u["out"])
    try:
        found = event_simulator.run(graph, inputs)
    except BackendError:
        return  # refusing is honest too
    np.testing.assert_array_equal(found.spikes("out"), expected.spikes["out"])


def test_sums_beyond_32_bits_are_refused_by_events_and_exact_in_torch() -> None:
    graph = network(OneToOne((1,), np.array([254])), exponent=6, bits=18, steps=1)
    inputs = {"in": np.array([[[2**18 - 1]]])}
    with pytest.raises(BackendError, match=r"'in->out'.*32 bit") as caught:
        event_simulator.run(graph, inputs)
    assert "torch" in str(caught.value)
    trace = torch_backend.run(graph, inputs, device="cpu", record=True)
    assert trace.states["out"]["a"].item() == 254 * (2**18 - 1) << 6


def test_projections_that_fit_32_bits_one_by_one_but_not_together_are_not_cut() -> None:
    first, second = Input("a", (1,), 30), Input("b", (1,), 30)
    one = OneToOne((1,), np.array([1]))
    graph = ProcessGraph(
        "two",
        1,
        1e-3,
        (first, second),
        (Population("out", (1,), neuron(131071), 1),),
        (Projection("a->out", "a", "out", one, 1), Projection("b->out", "b", "out", one, 1)),
        Readout("out"),
    )
    inputs = {name: np.array([[[2**30 - 1]]]) for name in "ab"}
    expected = simulate_plainly(graph, inputs)
    assert expected.spikes["out"].item() == 1
    try:
        found = event_simulator.run(graph, inputs)
    except BackendError:
        return
    assert found.spikes("out").item() == 1


def test_sums_beyond_53_bits_are_refused_by_torch() -> None:
    graph = network(OneToOne((1,), np.array([2**40])), bits=16)
    with pytest.raises(QuantizationError, match=r"'in->out'.*53 bits"):
        torch_backend.run(graph, {"in": np.zeros((1, 3, 1), np.int64)}, device="cpu")


@pytest.mark.parametrize("bits", [12, 16, 17])
def test_sums_beyond_float32_are_exact_in_torch(bits: int) -> None:
    """2^24 + 1 is the first integer that a 32-bit float rounds away."""
    rng = np.random.default_rng(bits)
    weight = 2 * rng.integers(-128, 128, (2, 3, 3, 3)) + 1
    graph = network(Conv2d((3, 7, 6), weight, padding=(1, 1)), bits=bits, steps=2)
    inputs = {"in": rng.integers(2 ** (bits - 1), 2**bits, (3, 2, 3, 7, 6))}
    trace = torch_backend.run(graph, inputs, device="cpu", record=True)
    np.testing.assert_array_equal(trace.states["out"]["a"], simulate_plainly(graph, inputs).a["out"])


# ---- wrong input -----------------------------------------------------------------------------------------------------

WRONG_GRAPH = replace(
    random_graph(5, populations=1, inputs=1, steps=3, graded=False),
    inputs=(Input("pixels", (2, 3, 4), 2), Input("labels", (5,))),
    populations=(Population("out", (2,), neuron(), 1),),
    projections=(
        Projection("p", "pixels", "out", Dense((2, 3, 4), np.full((2, 24), 10))),
        Projection("l", "labels", "out", Dense((5,), np.full((2, 5), 10))),
    ),
    readout=Readout("out"),
)
GOOD = {"pixels": np.ones((2, 3, 2, 3, 4), np.int64), "labels": np.ones((2, 3, 5), np.int64)}


@pytest.mark.parametrize("run", [torch_backend.run, event_simulator.run], ids=["torch", "events"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pixels": None}, "pixels"),
        ({"surplus": GOOD["labels"]}, "surplus"),
        ({"pixels": GOOD["pixels"][:, :2]}, r"'pixels'.*\(3, 2, 3, 4\)"),
        ({"pixels": GOOD["pixels"].reshape(2, 3, 24)}, r"'pixels'.*\(3, 2, 3, 4\)"),
        ({"pixels": GOOD["pixels"].transpose(0, 1, 4, 3, 2)}, "'pixels'"),
        ({"labels": GOOD["labels"].astype(np.float32)}, "'labels' is float32"),
        ({"labels": GOOD["labels"].astype(np.complex64)}, "'labels' is complex64"),
        ({"labels": GOOD["labels"].astype(str)}, "'labels'"),
        ({"labels": 2 * GOOD["labels"]}, r"'labels'.*0\.\.1"),
        ({"pixels": 4 * GOOD["pixels"]}, r"'pixels'.*0\.\.3"),
        ({"pixels": -GOOD["pixels"]}, r"'pixels'.*0\.\.3"),
        ({"labels": GOOD["labels"].astype(np.uint64) * np.uint64(2**63)}, "'labels'"),
        ({"labels": GOOD["labels"][:1]}, "samples"),
        ({"labels": GOOD["labels"][:0], "pixels": GOOD["pixels"][:0]}, "no samples"),
        ({"labels": np.array(1)}, "labels"),
    ],
)
def test_wrong_inputs_are_named(run: Run, change: dict[str, np.ndarray | None], said: str) -> None:
    given_ = {name: array for name, array in (GOOD | change).items() if array is not None}
    with pytest.raises(SpikeportError, match=said) as caught:
        run(WRONG_GRAPH, given_)
    assert len(str(caught.value).splitlines()) <= 2


def test_the_right_inputs_run() -> None:
    for run in (torch_backend.run, event_simulator.run):
        assert run(WRONG_GRAPH, GOOD).samples == 2


def test_events_refuse_floats_and_name_what_to_do() -> None:
    ones = np.ones(())
    floats = FloatNeuron(0 * ones, 0 * ones, ones, 0 * ones)
    graph = replace(WRONG_GRAPH, populations=(replace(WRONG_GRAPH.populations[0], neuron=floats),))
    with pytest.raises(BackendError, match="quantise"):
        event_simulator.run(graph, GOOD)


def test_balance_is_needed_for_a_graph_to_stand() -> None:
    """The tests above lean on `balance`: an unbalanced graph is refused, with the projection named."""
    graph = random_graph(3, populations=4, recurrent=False)
    assert any(p.delay for p in graph.projections)
    with pytest.raises(SpikeportError, match="arrives at stage"):
        replace(graph, projections=tuple(replace(p, delay=0) for p in graph.projections))
    again = balance(list(graph.inputs), list(graph.populations), list(graph.projections))
    assert [p.stage for p in again[0]] == [p.stage for p in graph.populations]
