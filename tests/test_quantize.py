"""Post-training quantisation: integers of the right form, close to the floats, and files that keep them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graph_strategies import graphs, one_thread, random_graph  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeport.converters import quantize as quantizing
from spikeport.converters.graph import (
    FloatNeuron,
    Input,
    LoihiNeuron,
    Population,
    ProcessGraph,
    Projection,
    Readout,
    Reset,
)
from spikeport.converters.operators import Conv2d, Dense, OneToOne, Operator, Sparse
from spikeport.converters.quantize import quantize
from spikeport.converters.reference import Reference
from spikeport.models.errors import QuantizationError, SpikeportError
from spikeport.models.files import write_arrays

SEEDS = st.integers(0, 2**32 - 1)
STEPS = 8
SPIKES, MEMBRANE = Readout("out"), Readout("out", "membrane")


def floats(
    threshold: float | np.ndarray = 1.0,
    current_keep: float | np.ndarray = 0.6,
    voltage_keep: float | np.ndarray = 0.8,
    bias: float | np.ndarray = 0.0,
    reset: Reset = "zero",
) -> FloatNeuron:
    return FloatNeuron(
        np.asarray(current_keep), np.asarray(voltage_keep), np.asarray(threshold), np.asarray(bias), reset
    )


def float_network(seed: int = 0, reset: Reset = "zero", biased: bool = False) -> ProcessGraph:
    """A convolution, a matrix with a loop, and a short cut past it; drive enough that neurons fire."""
    rng = np.random.default_rng(seed)

    def bias(size: int) -> np.ndarray | float:
        return rng.uniform(-0.1, 0.2, size) if biased else 0.0

    conv = Conv2d((2, 6, 5), rng.normal(0.03, 0.35, (4, 2, 3, 3)), stride=(2, 1))
    inner = Dense((4, 2, 3), rng.normal(0.05, 0.4, (12, 24)))
    return ProcessGraph(
        "floats",
        STEPS,
        1e-3,
        (Input("in", (2, 6, 5)),),
        (
            Population("conv", (4, 2, 3), floats(1.5, reset=reset), 1),
            Population("inner", (12,), floats(1.6, 0.5, 0.9, bias(12), reset), 2),
            Population("out", (5,), floats(rng.uniform(1.5, 2.5, 5), 0.0, 0.75, bias(5), reset), 3),
        ),
        (
            Projection("in-conv", "in", "conv", conv),
            Projection("conv-inner", "conv", "inner", inner),
            Projection("loop", "inner", "inner", Dense((12,), rng.normal(0, 0.15, (12, 12))), recurrent=True),
            Projection("inner-out", "inner", "out", Dense((12,), rng.normal(0.15, 0.5, (5, 12)))),
            Projection("short", "conv", "out", Dense((4, 2, 3), rng.normal(0.05, 0.3, (5, 24))), delay=1),
        ),
        Readout("out"),
    )


def spikes(graph: ProcessGraph, seed: int = 1, samples: int = 24, rate: float = 0.35) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        node.name: (rng.random((samples, graph.steps, *node.shape)) < rate).astype(np.uint8)
        for node in graph.event_inputs
    }


def one_population(
    *weights: np.ndarray,
    neuron: FloatNeuron | None = None,
    steps: int = STEPS,
    readout: Readout = SPIKES,
) -> ProcessGraph:
    """Inputs `in0`, `in1`, ... into one population, each through a matrix (n_out, n_in)."""
    inputs = tuple(Input(f"in{index}", (weight.shape[1],)) for index, weight in enumerate(weights))
    projections = tuple(
        Projection(f"p{index}", f"in{index}", "out", Dense((weight.shape[1],), weight))
        for index, weight in enumerate(weights)
    )
    population = Population("out", (weights[0].shape[0],), neuron or floats(), 1)
    return ProcessGraph("one", steps, 1e-3, inputs, (population,), projections, readout)


def integers(population: Population) -> LoihiNeuron:
    assert isinstance(population.neuron, LoihiNeuron)
    return population.neuron


# ---- the numbers -----------------------------------------------------------------------------------------------------


@given(SEEDS, st.booleans(), st.booleans())
@settings(max_examples=8)
def test_every_number_is_the_float_in_the_unit_of_its_population(seed: int, subtract: bool, biased: bool) -> None:
    graph = float_network(seed, "subtract" if subtract else "zero", biased)
    made, report = quantize(graph, spikes(graph, seed, samples=6))
    assert made.is_integer
    for before, after, layer in zip(graph.populations, made.populations, report.layers, strict=True):
        old, new, scale = before.neuron, integers(after), layer.scale
        assert isinstance(old, FloatNeuron)
        assert (after.name, after.shape, after.stage) == (before.name, before.shape, before.stage)
        assert (new.reset, new.ds_offset) == (old.reset, 1)
        np.testing.assert_array_equal(new.du, np.round(4096 * (1 - old.current_keep)) - 1)
        np.testing.assert_array_equal(new.dv, np.round(4096 * (1 - old.voltage_keep)))
        np.testing.assert_array_equal(new.vth, np.round(scale * old.threshold))
        bias = new.bias_mant.astype(float) * 2.0**new.bias_exp
        assert np.all(np.abs(bias - 64 * scale * old.bias) <= 2.0**new.bias_exp / 2)
        for values, low, high in (
            (new.du, 0, 4095),
            (new.dv, 0, 4095),
            (new.vth, 0, 2**17 - 1),
            (new.bias_mant, -4096, 4095),
            (new.bias_exp, 0, 7),
        ):
            assert values.dtype == np.int64
            assert low <= values.min() <= values.max() <= high
    for first, second in zip(graph.projections, made.projections, strict=True):
        assert (second.name, second.source, second.target) == (first.name, first.source, first.target)
        assert (second.delay, second.recurrent) == (first.delay, first.recurrent)
        scale = {layer.population: layer.scale for layer in report.layers}[first.target]
        check_weights(first.operator.weight * scale, second.operator.weight, second.exponent)


def check_weights(wanted: np.ndarray, found: np.ndarray, exponent: int) -> None:
    """Right form, right range, and the nearest value that the format has."""
    assert found.dtype == np.int16
    mixed = wanted.min() < 0 < wanted.max()
    if mixed:
        low, high, step = -256, 254, 2
    else:
        low, high, step = (0, 255, 1) if wanted.min() >= 0 else (-255, 0, 1)
    assert low <= found.min() <= found.max() <= high
    assert not np.any(found % step)
    nearest = np.clip(wanted / 2**exponent, low, high)
    assert np.all(np.abs(nearest - found) <= step / 2 + 1e-9)
    assert 0 <= exponent <= 6


@pytest.mark.parametrize(
    ("weight", "low", "high"),
    [
        (np.linspace(-1, 0.9, 12), -256, 254),
        (np.linspace(0, 1, 12) ** 1.5, 0, 255),
        (np.linspace(0.3, 1, 12), 0, 255),
        (-(np.linspace(0, 1, 12) ** 1.5), -255, 0),
        (np.linspace(-1, -0.3, 12), -255, 0),
    ],
    ids=["mixed", "excitatory with zero", "excitatory", "inhibitory with zero", "inhibitory"],
)
def test_weights_fill_the_range_of_their_sign(weight: np.ndarray, low: int, high: int) -> None:
    graph = one_population(weight.reshape(3, 4), neuron=floats(0.7))
    made, report = quantize(graph, spikes(graph))
    found = made.projections[0].operator.weight
    check_weights(weight.reshape(3, 4) * report.layers[0].scale, found, made.projections[0].exponent)
    assert low <= found.min() <= found.max() <= high
    assert np.abs(found).max() > 120
    assert bool((found % 2).any()) == (low == 0 or high == 0)


@given(SEEDS, st.integers(2, 8), st.sampled_from(["mixed", "excitatory", "inhibitory"]))
@settings(max_examples=30)
def test_weights_of_few_bits_lie_on_the_chips_levels(seed: int, bits: int, sign: str) -> None:
    """What a chip that clears the low bits of a weight leaves as it is: 2^bits levels, and the nearest one is taken."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(6, 20)) if sign == "mixed" else rng.gamma(2.0, size=(6, 20))
    weight = -weight if sign == "inhibitory" else weight
    graph = one_population(weight, neuron=floats(4.0))
    made, report = quantize(graph, spikes(graph, seed, samples=4), bits=bits)
    (projection,), (layer,) = made.projections, report.layers
    found, step = projection.operator.weight.astype(np.int64), 2 ** (8 - bits + (sign == "mixed"))
    low, high = {"mixed": (-256, 256 - step), "excitatory": (0, 256 - step), "inhibitory": (step - 256, 0)}[sign]
    assert (projection.weight_bits, layer.weight_bits, report.weight_bits, projection.exponent) == (bits, bits, bits, 0)
    assert not np.any(found % step)
    assert low <= found.min() <= found.max() <= high
    wanted = np.clip(weight * layer.scale, low, high)
    assert np.all(np.abs(wanted - found) <= step / 2 * (1 + 1e-9))
    outside = (weight * layer.scale < low - step / 2) | (weight * layer.scale > high + step / 2)
    assert layer.clipped_weights == pytest.approx(outside.mean())


def test_fewer_bits_lose_more_and_clip_more() -> None:
    graph = float_network(2, biased=True)
    calibration = spikes(graph, samples=16)
    errors, clipped = [], []
    for bits in (8, 5, 3, 2):
        _, report = quantize(graph, calibration, bits=bits)
        errors.append(np.mean([layer.spike_error for layer in report.layers]))
        clipped.append(np.mean([layer.clipped_weights for layer in report.layers]))
    assert errors == sorted(errors)
    assert 3 * errors[0] < errors[-1] < 0.3
    assert clipped[0] < clipped[-1]


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_other_widths_are_refused(bits: int) -> None:
    graph = float_network()
    with pytest.raises(QuantizationError, match=f"{bits} bits"):
        quantize(graph, spikes(graph), bits=bits)


def test_the_report_tells_of_decays_and_thresholds() -> None:
    """A keep of 1 - 1/3 lies 1/12288 beside the nearest of 4096 decays; one of exactly 1 is 1/4096 off in u, which
    always forgets that much."""
    neuron = floats(np.array([1.0, 0.013]), np.array([1.0, 0.5]), np.array([1 - 1 / 3, 0.5]))
    graph = one_population(np.linspace(-1, 1, 8).reshape(2, 4), neuron=neuron)
    made, report = quantize(graph, spikes(graph))
    (layer,) = report.layers
    assert layer.current_decay_error == pytest.approx(1 / 4096)
    assert layer.voltage_decay_error == pytest.approx(1 / 12288)
    small = integers(made.populations[0]).vth[1] / layer.scale
    assert 0 < layer.threshold_error == pytest.approx(abs(small - 0.013) / 0.013)


def test_a_file_keeps_the_bits_of_weights_and_they_decide_no_spike(tmp_path: Path) -> None:
    made, _ = quantize(float_network(), spikes(float_network(), samples=4), bits=3)
    made.save(tmp_path / "graph.npz")
    loaded = ProcessGraph.load(tmp_path / "graph.npz")
    assert [projection.weight_bits for projection in loaded.projections] == [3] * 5
    wide = replace(made, projections=tuple(replace(projection, weight_bits=8) for projection in made.projections))
    assert wide.fingerprint() == made.fingerprint() == loaded.fingerprint()


@pytest.mark.parametrize("ratio", [1, 3, 10, 30, 60, 100])
def test_a_projection_of_larger_weights_takes_an_exponent(ratio: int) -> None:
    """Both keep their levels: the large one is not cut off, the small one not rounded away."""
    rng = np.random.default_rng(ratio)
    small, large = rng.uniform(-1, 1, (6, 8)), ratio * rng.uniform(-1, 1, (6, 2))
    graph = one_population(small, large, neuron=floats(2.0 + ratio))
    made, report = quantize(graph, spikes(graph))
    scale = report.layers[0].scale
    for wanted, projection in zip((small, large), made.projections, strict=True):
        found = projection.operator.weight * 2.0**projection.exponent / scale
        error = np.sqrt(np.mean((found - wanted) ** 2)) / np.sqrt(np.mean(wanted**2))
        assert error < 0.12, (projection.name, error)
    assert made.projections[0].exponent == 0
    assert (made.projections[1].exponent > 0) == (ratio > 2)


@pytest.mark.parametrize("ratio", [1.1, 1.4, 2.9])
def test_weights_a_little_larger_than_others_are_not_cut_off(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any scale, only what 8 bits at that scale are meant to cut off is cut off."""
    monkeypatch.setattr("spikeport.converters.quantize.CANDIDATES", (1.0, 1.5))
    small, large = np.random.default_rng(0).uniform(-1, 1, (6, 8)), np.full((6, 2), -ratio)
    small.flat[0] = 1.0
    graph = one_population(small, large, neuron=floats(2.0))
    made, report = quantize(graph, spikes(graph))
    found = made.projections[1].operator.weight * 2.0 ** made.projections[1].exponent / report.layers[0].scale
    np.testing.assert_allclose(found, large, rtol=0.01)


def test_weights_too_different_for_one_population_are_refused() -> None:
    graph = one_population(np.full((2, 3), 1e-5), np.full((2, 3), 10.0))
    with pytest.raises(QuantizationError, match=r"'p[01]'"):
        quantize(graph, spikes(graph))


@pytest.mark.parametrize("bias", [0.0, 1e-4, 0.3, -0.7, 3.0, -9.0])
def test_a_bias_is_kept_within_its_rounding(bias: float) -> None:
    values = np.array([bias, bias / 3, -bias / 7])
    graph = one_population(np.linspace(-1, 1, 12).reshape(3, 4), neuron=floats(bias=values))
    made, report = quantize(graph, spikes(graph))
    neuron, scale = integers(made.populations[0]), report.layers[0].scale
    wanted = 64 * scale * values
    unit = 2.0 ** int(neuron.bias_exp)
    assert np.all(np.abs(neuron.bias_mant * unit - wanted) <= unit / 2)
    # thirteen bits are used: a smaller exponent would not have held the largest
    assert neuron.bias_exp == 0 or np.abs(wanted).max() / (unit / 2) > 4095


def test_a_bias_beyond_the_format_is_refused() -> None:
    graph = one_population(np.full((2, 3), 0.01), neuron=floats(threshold=5.0, bias=-400.0))
    with pytest.raises(QuantizationError, match=r"'out'.*bias"):
        quantize(graph, spikes(graph))


@pytest.mark.parametrize(
    ("keep", "du"), [(0.0, 4095), (0.5, 2047), (1 - 1 / 2.5, 1637), (1 - 1 / 4096, 0), (1.0, 0), (0.9999, 0)]
)
def test_current_decays(keep: float, du: int) -> None:
    """With the register's offset of one, du = 0 still forgets 1/4096 a step; a keep of one has no nearer form."""
    graph = one_population(np.ones((1, 2)), neuron=floats(3.0, current_keep=keep))
    assert integers(quantize(graph, spikes(graph))[0].populations[0]).du == du


@pytest.mark.parametrize(("keep", "dv"), [(0.0, 4095), (0.5, 2048), (0.8, 819), (1.0, 0)])
def test_voltage_decays(keep: float, dv: int) -> None:
    graph = one_population(np.ones((1, 2)), neuron=floats(3.0, voltage_keep=keep))
    assert integers(quantize(graph, spikes(graph))[0].populations[0]).dv == dv


# ---- how well it does ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", ["zero", "subtract"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_the_integer_network_fires_as_the_float_one(reset: Reset, biased: bool) -> None:
    """On samples that the search has not seen, in every population, with firing of 5 to 40 % of the neuron-steps."""
    graph = float_network(2, reset, biased)
    made, report = quantize(graph, spikes(graph, samples=16))
    unseen = spikes(graph, seed=99, samples=40)
    expected, found = Reference(graph).run(unseen), Reference(made).run(unseen)
    for layer, population in zip(report.layers, graph.populations, strict=True):
        name = population.name
        truth = expected.spikes[name].numpy()
        assert 0.05 < truth.mean() < 0.4, name
        differing = float((truth != found.spikes[name].numpy()).mean())
        assert differing < 0.06, name
        assert layer.spike_error < 0.06, name
        assert differing < 3 * layer.spike_error + 0.02, name


def test_the_report_says_what_happened() -> None:
    graph = float_network(2, biased=True)
    calibration = spikes(graph, samples=10)
    trials: list[tuple[int, int]] = []
    made, report = quantize(graph, calibration, on_step=lambda done, of: trials.append((done, of)))
    assert report.samples == 10
    assert [layer.population for layer in report.layers] == ["conv", "inner", "out"]
    run, truth = Reference(made).run(calibration, record=True), Reference(graph).run(calibration, record=True)
    for layer, population in zip(report.layers, made.populations, strict=True):
        name, scale = population.name, layer.scale
        pairs = [
            (p.operator.weight, q.operator.weight * 2.0**q.exponent / scale)
            for p, q in zip(graph.projections, made.projections, strict=True)
            if p.target == name
        ]
        wanted, found = (np.concatenate([pair[index].ravel() for pair in pairs]) for index in (0, 1))
        assert layer.weight_error == pytest.approx(np.linalg.norm(wanted - found) / np.linalg.norm(wanted))
        u, true_u = run.u[name].numpy() / (64 * scale), truth.u[name].numpy()
        assert layer.headroom == pytest.approx(float(np.abs(run.u[name].numpy()).max()) / 2**23)
        if name == "conv":  # its input is the same in both runs
            assert layer.current_error == pytest.approx(np.linalg.norm(u - true_u) / np.linalg.norm(true_u))
            differing = (run.spikes[name] != truth.spikes[name]).double().mean().item()
            assert layer.spike_error == pytest.approx(differing)
        assert layer.threshold == integers(population).vth.max()
        assert layer.weight_bits == 8
        assert 0 <= layer.clipped_weights < 0.2
        assert 0 < layer.headroom < 1
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["samples"] == 10
    assert trials == [(index + 1, trials[0][1]) for index in range(trials[0][1])]


def test_quantising_twice_gives_the_same_graph() -> None:
    graph = float_network(5, biased=True)
    first, second = (quantize(graph, spikes(graph))[0] for _ in range(2))
    assert first.fingerprint() == second.fingerprint()


def test_the_float_graph_is_left_as_it_was() -> None:
    graph = float_network(5)
    before = graph.fingerprint()
    quantize(graph, spikes(graph))
    assert graph.fingerprint() == before


def test_graded_inputs_are_calibrated_with_their_payloads() -> None:
    rng = np.random.default_rng(0)
    graph = one_population(rng.normal(0.002, 0.01, (6, 10)), neuron=floats(0.6))
    graph = replace(graph, inputs=(replace(graph.inputs[0], message_bits=4),))
    calibration = {"in0": rng.integers(0, 256, (12, STEPS, 10))}
    made, report = quantize(graph, calibration)
    assert Reference(graph).run(calibration).spikes["out"].float().mean() > 0.05
    assert report.layers[0].spike_error < 0.05
    assert made.inputs == graph.inputs


def with_one_strong_neuron(weight: float, threshold: float) -> tuple[ProcessGraph, dict[str, np.ndarray]]:
    """Graded input through random weights, but for the first neuron, whose are all alike and large; and samples."""
    rng = np.random.default_rng(1)
    weights = rng.normal(0, 0.01, (30, 200))
    weights[0] = weight
    graph = one_population(weights, neuron=floats(threshold, bias=np.linspace(0.1, 0.2, 30)))
    graph = replace(graph, inputs=(replace(graph.inputs[0], message_bits=8),))
    return graph, {"in0": rng.integers(0, 128, (16, STEPS, 200))}


def test_a_population_that_can_only_be_kept_roughly_is_not_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A current that is hard to hold leaves the weights few levels; silence would differ at the fewest neuron-steps."""
    monkeypatch.setattr(quantizing, "HEADROOM", 0.5 / 3)
    graph, calibration = with_one_strong_neuron(0.05, threshold=14.0)
    made, report = quantize(graph, calibration)
    rate = float(Reference(graph).run(calibration).spikes["out"].float().mean())
    layer = report.layers[0]
    assert 0.5 * rate < float(Reference(made).run(calibration).spikes["out"].float().mean()) < 1.5 * rate
    assert layer.spike_error > rate  # what makes silence look good
    assert layer.spike_distance < 0.6


def test_a_neuron_that_never_fires_takes_no_levels_from_the_others() -> None:
    graph, calibration = with_one_strong_neuron(-0.5, threshold=6.0)
    made, report = quantize(graph, calibration)
    assert report.layers[0].headroom < 0.5
    assert report.layers[0].spike_error < 0.02
    truth, found = Reference(graph).run(calibration).spikes["out"], Reference(made).run(calibration).spikes["out"]
    assert not found[:, :, 0].any()
    assert not truth[:, :, 0].any()
    weak = report.graph.projections[0].operator.weight
    np.testing.assert_array_equal(weak[1:], graph.projections[0].operator.weight[1:])
    shrunk = weak[0] / graph.projections[0].operator.weight[0]
    np.testing.assert_allclose(shrunk, shrunk[0])
    neuron = report.graph.populations[0].neuron
    assert isinstance(neuron, FloatNeuron)
    assert neuron.bias[0] == pytest.approx(0.1 * shrunk[0])
    np.testing.assert_array_equal(Reference(report.graph).run(calibration).spikes["out"], truth)


def test_where_u_binds_the_scale_weights_of_few_bits_keep_fine_levels() -> None:
    """By a negative exponent, with sums that are whole."""
    graph, calibration = with_one_strong_neuron(0.01, threshold=6.0)
    made, report = quantize(graph, calibration, bits=4)
    (projection,) = made.projections
    assert projection.exponent < 0
    assert not (projection.operator.weight % (1 << -projection.exponent)).any()
    assert len(np.unique(projection.operator.weight)) > 12
    assert report.layers[0].spike_distance < 0.2


def test_a_constant_source_is_quantised_like_any_other() -> None:
    rng = np.random.default_rng(0)
    graph = one_population(rng.normal(0.1, 0.5, (4, 6)), neuron=floats(1.2))
    bias = rng.uniform(-0.1, 0.3, 4)
    graph = replace(
        graph,
        inputs=(*graph.inputs, Input("constant", (4,), constant=True)),
        projections=(*graph.projections, Projection("bias", "constant", "out", OneToOne((4,), bias))),
    )
    made, report = quantize(graph, spikes(graph))
    found = made.projections[1]
    assert np.allclose(found.operator.weight * 2.0**found.exponent / report.layers[0].scale, bias, atol=0.02)
    assert report.layers[0].spike_error < 0.08


# ---- membranes that are read -----------------------------------------------------------------------------------------


def read_by_membrane(seed: int = 2, voltage_keep: float = 0.95, current_keep: float = 0.5) -> ProcessGraph:
    """The network above, its last population an integrator with a bias."""
    graph = float_network(seed, biased=True)
    last = graph.populations[-1]
    assert isinstance(last.neuron, FloatNeuron)
    integrator = floats(np.inf, current_keep, voltage_keep, last.neuron.bias)
    populations = (*graph.populations[:-1], replace(last, neuron=integrator))
    return replace(graph, populations=populations, readout=Readout("out", "membrane"))


@pytest.mark.parametrize(("voltage_keep", "current_keep"), [(0.95, 0.5), (1.0, 0.0), (0.7, 0.0), (0.999, 0.9)])
def test_an_integrator_keeps_its_membrane(voltage_keep: float, current_keep: float) -> None:
    """On samples that the search has not seen: the membranes within a few per cent, nearly all decisions."""
    graph = read_by_membrane(voltage_keep=voltage_keep, current_keep=current_keep)
    made, report = quantize(graph, spikes(graph, samples=32))
    layer, neuron = report.layers[-1], integers(made.populations[-1])
    assert (made.readout, neuron.vth.item(), layer.threshold) == (graph.readout, 2**17 - 1, 2**17 - 1)
    unseen = spikes(graph, seed=99, samples=200)
    truth, run = Reference(graph).run(unseen), Reference(made).run(unseen)
    assert truth.membrane is not None
    assert run.membrane is not None
    assert not run.spikes["out"].any()
    assert layer.spike_error == 0
    membrane, found = truth.membrane.numpy(), run.membrane.numpy() / (64 * layer.scale)
    error = np.linalg.norm(found - membrane) / np.linalg.norm(membrane)
    assert layer.membrane_error is not None
    assert layer.decision_error is not None
    assert error < 0.2
    assert layer.membrane_error < 0.2
    assert np.mean(found.argmax(1) != membrane.argmax(1)) < 0.15
    assert len(np.unique(membrane.argmax(1))) > 2


def test_the_report_says_what_became_of_the_membrane() -> None:
    graph = read_by_membrane()
    calibration = spikes(graph, samples=20)
    made, report = quantize(graph, calibration)
    run, truth = Reference(made).run(calibration, record=True), Reference(graph).run(calibration)
    assert run.membrane is not None
    assert truth.membrane is not None
    *others, layer = report.layers
    last, wanted = run.membrane.numpy(), truth.membrane.numpy()
    distance = np.linalg.norm(last / (64 * layer.scale) - wanted)
    assert layer.membrane_error == pytest.approx(distance / np.linalg.norm(wanted))
    assert layer.decision_error == pytest.approx(np.mean(last.argmax(1) != wanted.argmax(1)))
    largest = max(run.v["out"].abs().max().item(), run.u["out"].abs().max().item())
    assert layer.headroom == pytest.approx(largest / 2**23)
    assert all((other.membrane_error, other.decision_error) == (None, None) for other in others)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["layers"][-1]["membrane_error"] > 0


@pytest.mark.parametrize("steps", [8, 120, 400])
@pytest.mark.parametrize("drive", [0.02, 1.0])
def test_a_membrane_stays_within_half_of_its_range(steps: int, drive: float) -> None:
    """However long it integrates without a leak; the weights give up levels before v saturates, and fires."""
    weight = np.linspace(-0.1, 1, 24).reshape(4, 6) * drive
    graph = one_population(weight, neuron=floats(np.inf, 0.0, 1.0), steps=steps, readout=MEMBRANE)
    calibration = spikes(graph, samples=6, rate=0.9)
    made, report = quantize(graph, calibration)
    run = Reference(made).run(calibration, record=True)
    assert run.v["out"].abs().max().item() <= 2**22
    assert report.layers[0].headroom <= 0.5
    assert (report.layers[0].headroom > 0.2) == (steps > 8)
    assert not run.spikes["out"].any()
    assert report.layers[0].membrane_error < 0.05  # type: ignore[operator]


@pytest.mark.parametrize("steps", [30, 120])
def test_a_current_that_sums_up_stays_within_half_of_its_range(steps: int) -> None:
    """Inhibition over many steps: beyond the range u would wrap, and the neurons that it keeps silent would fire."""
    weight = np.random.default_rng(0).uniform(-1, 0.4, (6, 8))
    graph = one_population(weight, neuron=floats(1.0, 1 - 1 / 4096, 0.0), steps=steps)
    graph = replace(graph, inputs=(replace(graph.inputs[0], message_bits=4),))
    calibration = {"in0": np.full((4, steps, 8), 15, np.uint8)}
    _, report = quantize(graph, calibration)
    assert 0.2 < report.layers[0].headroom <= 0.5


def test_an_integrator_beside_whose_membrane_every_weight_vanishes_is_refused() -> None:
    graph = one_population(np.ones((1, 2)), neuron=floats(np.inf, 0.0, 1.0, bias=1e6), readout=MEMBRANE)
    with pytest.raises(QuantizationError, match=r"'out'|'p0'"):
        quantize(graph, spikes(graph))


def test_an_integrator_is_kept_in_a_file(tmp_path: Path) -> None:
    for graph in (read_by_membrane(), quantize(read_by_membrane(), spikes(read_by_membrane(), samples=4))[0]):
        graph.save(tmp_path / "graph.npz")
        loaded = ProcessGraph.load(tmp_path / "graph.npz")
        assert loaded.fingerprint() == graph.fingerprint()
        assert loaded.probed is not None
        assert loaded.probed.name == "out"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda graph: replace(graph, readout=Readout("out")), "'out' never fires.*'count' of 'out'"),
        (
            lambda graph: replace(graph, readout=Readout("inner", "membrane")),
            "readout 'membrane'.*'inner' has thresholds",
        ),
        (lambda graph: changed_neuron(graph, 2, threshold=np.asarray(1.0)), "'out' has thresholds"),
        (lambda graph: changed_neuron(graph, 2, threshold=np.array([np.inf] * 4 + [1.0])), "'out' has thresholds"),
        (lambda graph: changed_neuron(graph, 0, threshold=np.asarray(np.inf)), "'conv' never fires"),
        (
            lambda graph: replace(
                graph,
                projections=(
                    *graph.projections,
                    Projection("back", "out", "inner", Dense((5,), np.ones((12, 5))), recurrent=True),
                ),
            ),
            "'back' comes from 'out', which never fires",
        ),
    ],
)
def test_only_the_population_of_a_membrane_readout_never_fires(
    change: Callable[[ProcessGraph], ProcessGraph], said: str
) -> None:
    with pytest.raises(SpikeportError, match=said) as caught:
        change(read_by_membrane())
    assert len(str(caught.value).splitlines()) <= 2


# ---- what has no integer form ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named(value: float) -> None:
    weight = np.ones((2, 3))
    weight[1, 1] = value
    graph = one_population(np.ones((2, 3)), weight)
    with pytest.raises(QuantizationError, match="'p1'"):
        quantize(graph, spikes(graph))


@pytest.mark.parametrize("field", ["threshold", "bias", "current_keep", "voltage_keep"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_are_no_numbers_are_named(field: str, value: float) -> None:
    parameters = {field: np.array([0.5, value])}
    good = one_population(np.ones((2, 3)))
    with pytest.raises(SpikeportError, match="'out'"):
        quantize(one_population(np.ones((2, 3)), neuron=floats(**parameters)), spikes(good))  # type: ignore[arg-type]


def test_a_quantised_graph_is_not_quantised_again() -> None:
    graph = float_network()
    made, _ = quantize(graph, spikes(graph))
    with pytest.raises(QuantizationError, match=r"'conv'.*already"):
        quantize(made, spikes(graph))


@pytest.mark.parametrize("threshold", [300.0, 5000.0])
def test_a_large_threshold_still_fits_its_bits(threshold: float) -> None:
    graph = one_population(np.linspace(-1, 1, 12).reshape(3, 4), neuron=floats(threshold))
    made, report = quantize(graph, spikes(graph))
    vth = int(integers(made.populations[0]).vth)
    assert vth == round(report.layers[0].scale * threshold) <= 2**17 - 1
    assert made.projections[0].operator.weight.any()


def test_a_threshold_beside_which_every_weight_vanishes_is_refused() -> None:
    """17 bits cannot hold a billion and one side by side: a network of zeros is no quantisation of it."""
    graph = one_population(np.linspace(-1, 1, 12).reshape(3, 4), neuron=floats(1e9))
    with pytest.raises(QuantizationError, match=r"'out'|'p0'"):
        quantize(graph, spikes(graph))


def test_a_negative_threshold_is_refused() -> None:
    graph = one_population(np.ones((2, 3)), neuron=floats(np.array([1.0, -0.5])))
    with pytest.raises(QuantizationError, match=r"'out': thresholds -\d+\.\.\d+ do not fit 17 bits"):
        quantize(graph, spikes(graph))


@pytest.mark.parametrize("decays", [{"current_keep": 1.2}, {"current_keep": -0.3}, {"voltage_keep": 1.5}])
def test_decays_outside_their_range_are_refused(decays: dict[str, float]) -> None:
    graph = one_population(np.ones((2, 3)), neuron=floats(**decays))
    with pytest.raises(QuantizationError, match="'out' has decays"):
        quantize(graph, spikes(graph))


def test_a_loop_over_several_populations_is_named() -> None:
    graph = float_network()
    back = Projection("back", "inner", "conv", Dense((12,), np.ones((24, 12))), recurrent=True)
    looped = replace(graph, projections=(*graph.projections, back))
    with pytest.raises(QuantizationError, match=r"'conv'.*'inner'"):
        quantize(looped, spikes(looped))


# ---- files -----------------------------------------------------------------------------------------------------------


@given(graphs())
@settings(max_examples=25)
def test_a_saved_graph_is_loaded_with_its_fingerprint(
    tmp_path_factory: pytest.TempPathFactory, graph: ProcessGraph
) -> None:
    path = tmp_path_factory.mktemp("graph") / "graph.npz"
    graph.save(path)
    loaded = ProcessGraph.load(path)
    assert loaded.fingerprint() == graph.fingerprint()
    assert (loaded.inputs, loaded.readout, loaded.steps) == (graph.inputs, graph.readout, graph.steps)
    for first, second in zip(graph.projections, loaded.projections, strict=True):
        assert type(first.operator) is type(second.operator)
        np.testing.assert_array_equal(first.operator.weight, second.operator.weight)


def test_a_saved_float_graph_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    graph = replace(float_network(1, "subtract", biased=True), notes={"discretization": "euler"})
    graph.save(tmp_path / "graph.npz")
    loaded = ProcessGraph.load(tmp_path / "graph.npz")
    assert loaded.fingerprint() == graph.fingerprint()
    assert (loaded.name, loaded.notes, loaded.dt) == (graph.name, graph.notes, graph.dt)
    assert not loaded.is_integer


QUANTISED = quantize(float_network(1, biased=True), spikes(float_network(1)))[0]


def changed(graph: ProcessGraph, index: int, **changes: object) -> ProcessGraph:
    """Another projection in place of the one at `index`."""
    projections = list(graph.projections)
    projections[index] = replace(projections[index], **changes)  # type: ignore[arg-type]
    return replace(graph, projections=tuple(projections))


def changed_neuron(graph: ProcessGraph, index: int, **changes: object) -> ProcessGraph:
    populations = list(graph.populations)
    neuron = replace(populations[index].neuron, **changes)  # type: ignore[arg-type]
    populations[index] = replace(populations[index], neuron=neuron)
    return replace(graph, populations=tuple(populations))


def nudged(graph: ProcessGraph, index: int) -> ProcessGraph:
    """One weight of one projection by one."""
    operator = graph.projections[index].operator
    weight = operator.weight.copy()
    weight.flat[weight.size // 2] += 1
    return changed(graph, index, operator=operator.with_weight(weight))


def flipped(operator: Operator) -> Operator:
    """The same weights, the kernels turned round."""
    return operator.with_weight(operator.weight[..., ::-1, ::-1])


NUDGES: dict[str, Callable[[ProcessGraph], ProcessGraph]] = {
    **{f"weight of {p.name}": (lambda graph, i=i: nudged(graph, i)) for i, p in enumerate(QUANTISED.projections)},
    **{
        f"{field} of {p.name}": (
            lambda graph, i=i, f=field: changed_neuron(graph, i, **{f: getattr(graph.populations[i].neuron, f) + 1})
        )
        for i, p in enumerate(QUANTISED.populations)
        for field in ("du", "dv", "vth", "bias_mant", "bias_exp")
    },
    "exponent": lambda graph: changed(graph, 0, exponent=graph.projections[0].exponent + 1),
    "kernel position": lambda graph: changed(graph, 0, operator=flipped(graph.projections[0].operator)),
    "ds_offset": lambda graph: changed_neuron(graph, 1, ds_offset=0),
    "reset": lambda graph: changed_neuron(graph, 1, reset="subtract"),
    "recurrence": lambda graph: changed(graph, 3, recurrent=True),
    "steps": lambda graph: replace(graph, steps=graph.steps + 1),
    "message bits": lambda graph: replace(graph, inputs=(replace(graph.inputs[0], message_bits=2),)),
    "readout": lambda graph: replace(graph, readout=Readout("out", "first_spike")),
}


@pytest.mark.parametrize("nudge", NUDGES)
def test_the_fingerprint_notices(nudge: str) -> None:
    assert NUDGES[nudge](QUANTISED).fingerprint() != QUANTISED.fingerprint()


def test_the_fingerprint_does_not_hang_on_names_and_notes() -> None:
    renamed = replace(QUANTISED, name="another", notes={"trained": "today"})
    assert renamed.fingerprint() == QUANTISED.fingerprint()


def test_the_fingerprint_tells_sparse_targets_apart() -> None:
    def sparse(target: list[int]) -> ProcessGraph:
        operator = Sparse((2,), np.array([4, 6]), None, np.array([0, 1]), np.array(target), (2,))
        return replace(
            random_graph(0, populations=1, inputs=1, steps=1),
            inputs=(Input("in", (2,)),),
            populations=(Population("out", (2,), integers(QUANTISED.populations[0]), 1),),
            projections=(Projection("p", "in", "out", operator),),
            readout=Readout("out"),
        )

    assert sparse([0, 1]).fingerprint() != sparse([1, 0]).fingerprint()


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_graph_file_is_refused(fraction: float, tmp_path: Path) -> None:
    path = tmp_path / "graph.npz"
    QUANTISED.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(SpikeportError, match=r"graph\.npz"):
        ProcessGraph.load(path)


@pytest.mark.parametrize(
    "header",
    [
        {},
        [],
        None,
        {"format": "spikeport-trace", "version": 1},
        {"format": "spikeport-process-graph", "version": 99},
        {"format": "spikeport-process-graph", "version": 1},
        {"format": "spikeport-process-graph", "version": 1, "populations": 3, "projections": "x"},
        {"format": "spikeport-process-graph", "version": 1, "populations": [{}], "projections": []},
    ],
    ids=str,
)
def test_a_file_with_another_header_is_refused(header: object, tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    write_arrays(path, header, {"weight": np.zeros(2)})
    with pytest.raises(SpikeportError, match=r"other\.npz"):
        ProcessGraph.load(path)
