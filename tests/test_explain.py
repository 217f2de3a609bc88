"""Why two traces part: planted faults get their names, from two networks and from the spikes alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fault_examples import (
    FAULTS,
    GRAPH,
    INPUTS,
    STEPS,
    relabelled,
    weight_changed,
    with_neuron,
    with_projection,
)
from graph_strategies import graphs, one_thread, random_inputs, simulate_plainly  # noqa: F401
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Conv2d, Dense, SumPool
from spikeport.deploy import torch_backend
from spikeport.deploy.differences import differences
from spikeport.deploy.explain import Explanation
from spikeport.deploy.replay import Cell, replay, sent_spikes
from spikeport.deploy.trace import Trace
from spikeport.deploy.verify import compare

TRUTH = torch_backend.run(GRAPH, INPUTS, device="cpu")

NAMES = {
    "a flipped kernel": "flipped kernel",
    "a transposed kernel": "transposed kernel",
    "a current decay off by one": "current decay off by one",
    "a voltage decay off by one": "voltage decay off by one",
    "the other register offset": "other ds_offset",
    "a lost bias": "lost bias",
    "a branch late by a step": "late branch",
    "an exponent too large by one": "wrong exponent",
    "the other reset": "wrong reset",
}
"""What each planted fault must be called; the faults that have no name follow."""
UNNAMED = {"a threshold off by ten": "threshold", "a single weight": "weights"}
QUANTITIES = {
    "a flipped kernel": "incoming current",
    "a transposed kernel": "incoming current",
    "a current decay off by one": "u",
    "a voltage decay off by one": "v",
    "the other register offset": "u",
    "a lost bias": "v",
    "a branch late by a step": "incoming current",
    "an exponent too large by one": "incoming current",
    "the other reset": "v after the reset",
    "a threshold off by ten": "spike",
    "a single weight": "incoming current",
}


def run(graph: ProcessGraph, **options: Any) -> Trace:
    return torch_backend.run(graph, INPUTS, device="cpu", **options)


def why(first: Trace, second: Trace, other: ProcessGraph | None = None, graph: ProcessGraph = GRAPH) -> Explanation:
    found = compare(graph, first, second, other=other).divergence
    assert found is not None
    assert found.explanation is not None
    return found.explanation


def names(explanation: Explanation) -> set[str]:
    return {cause.what for cause in explanation.causes}


@pytest.mark.parametrize("fault", FAULTS)
def test_two_networks_are_told_apart_by_name(fault: str) -> None:
    where, faulty = FAULTS[fault]
    found = why(TRUTH, run(faulty), faulty)
    (cause,) = found.causes
    assert cause.what == (NAMES | UNNAMED)[fault]
    assert cause.text.startswith(f"{cause.where}: ")
    assert cause.where == where or GRAPH.population(where).name == next(
        p.target for p in GRAPH.projections if p.name == cause.where
    )
    assert (found.elsewhere, [side.follows for side in found.sides]) == ((), [True, True])


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_quantity_that_differs_is_the_one_of_the_fault(fault: str) -> None:
    """From states that the backends recorded, and as well from those computed from the spikes."""
    where, faulty = FAULTS[fault]
    replayed = why(TRUTH, run(faulty), faulty).state
    recorded = why(TRUTH, relabelled(run(faulty, record=True), GRAPH)).state
    assert replayed is not None
    assert recorded is not None
    assert (replayed.quantity, recorded.quantity) == (QUANTITIES[fault], QUANTITIES[fault])
    assert where in replayed.hint
    assert recorded == replayed


@pytest.mark.parametrize("fault", FAULTS)
def test_spikes_alone_name_the_fault(fault: str) -> None:
    where, faulty = FAULTS[fault]
    found = why(TRUTH, relabelled(run(faulty), GRAPH))
    assert [side.follows for side in found.sides] == [True, False]
    assert all(cause.backend == "faulty" for cause in found.causes)
    if fault in UNNAMED:
        assert names(found) == {"unknown"}
        assert f"does not compute {where} as its graph says" in found.causes[0].text
        assert found.sides[1].u is None
        return
    assert NAMES[fault] in names(found)
    assert any(NAMES[fault] == cause.what and "explains all" in cause.text for cause in found.causes)


def test_a_named_fault_tells_what_the_states_were() -> None:
    faulty = FAULTS["a flipped kernel"][1]
    found = why(TRUTH, relabelled(run(faulty), GRAPH))
    recorded = why(TRUTH, relabelled(run(faulty, record=True), GRAPH))
    assert (found.sides[1].origin, recorded.sides[1].origin) == ("as if", "recorded")
    for key in ("current", "u_before", "u", "v_before", "v"):
        assert getattr(found.sides[1], key) == getattr(recorded.sides[1], key), key


@pytest.mark.parametrize("swap", [False, True])
def test_the_side_at_fault_is_told_from_the_other(swap: bool) -> None:
    bad = relabelled(run(FAULTS["a lost bias"][1]), GRAPH)
    found = why(bad, TRUTH) if swap else why(TRUTH, bad)
    assert [side.backend for side in found.sides if side.follows is False] == ["faulty"]
    assert names(found) == {"lost bias"}


# ---- faults in layouts ----------------------------------------------------------------------------------------------

IMAGE = (4, 3, 5)


def layered(seed: int = 3) -> ProcessGraph:
    """Convolution over several channels, then a square dense layer and a dense one behind the image."""
    rng = np.random.default_rng(seed)

    def weights(*shape: int) -> np.ndarray:
        return 2 * rng.integers(-40, 60, shape)

    def neuron(vth: int, size: tuple[int, ...] = ()) -> LoihiNeuron:
        bias = rng.integers(0, 90, size) if size else np.asarray(0)
        values = (np.asarray(value) for value in (2000, 700, vth))
        return LoihiNeuron(*values, bias, np.asarray(3))

    return ProcessGraph(
        "layered",
        STEPS,
        1e-3,
        (Input("in", (3, 4, 6)),),
        (
            Population("image", IMAGE, neuron(700, IMAGE), 1),
            Population("flat", (12,), neuron(1200), 2),
            Population("square", (12,), neuron(500), 3),
        ),
        (
            Projection("in-image", "in", "image", Conv2d((3, 4, 6), weights(4, 3, 2, 2))),
            Projection("image-flat", "image", "flat", Dense(IMAGE, weights(12, 60))),
            Projection("flat-square", "flat", "square", Dense((12,), weights(12, 12))),
        ),
        Readout("square"),
    )


LAYERED = layered()
LAYERED_INPUTS = {"in": (np.random.default_rng(1).random((20, STEPS, 3, 4, 6)) < 0.3).astype(np.uint8)}
LAYERED_TRUTH = torch_backend.run(LAYERED, LAYERED_INPUTS, device="cpu")
HWC = np.arange(60).reshape(IMAGE).transpose(1, 2, 0).reshape(-1)


def bias_moved(population: Population) -> Population:
    assert isinstance(population.neuron, LoihiNeuron)
    bias = population.neuron.bias_mant.reshape(-1)[HWC].reshape(IMAGE)
    return replace(population, neuron=replace(population.neuron, bias_mant=bias))


LAYOUTS = {
    "a transposed dense weight": (
        "transposed weights",
        with_projection(LAYERED, "flat-square", weight_changed(lambda weight: weight.T.copy())),
    ),
    "columns in another order": (
        "permuted neurons",
        with_projection(LAYERED, "image-flat", weight_changed(lambda weight: weight[:, HWC])),
    ),
    "neurons in another order": (
        "permuted neurons",
        with_projection(LAYERED, "image-flat", weight_changed(lambda weight: weight[:, np.argsort(HWC)])),
    ),
    "input channels reversed": (
        "permuted channels",
        with_projection(LAYERED, "in-image", weight_changed(lambda weight: weight[:, ::-1].copy())),
    ),
    "output channels permuted": (
        "permuted channels",
        with_projection(LAYERED, "in-image", weight_changed(lambda weight: weight[[2, 0, 3, 1]])),
    ),
    "biases in another order": (
        "permuted bias",
        replace(LAYERED, populations=(bias_moved(LAYERED.populations[0]), *LAYERED.populations[1:])),
    ),
}


@pytest.mark.parametrize("fault", LAYOUTS)
def test_faults_of_layout_are_named(fault: str) -> None:
    name, faulty = LAYOUTS[fault]
    bad = torch_backend.run(faulty, LAYERED_INPUTS, device="cpu")
    assert names(why(LAYERED_TRUTH, bad, faulty, LAYERED)) == {name}
    assert name in names(why(LAYERED_TRUTH, relabelled(bad, LAYERED), graph=LAYERED))


def test_rows_in_any_order_are_a_permutation() -> None:
    order = np.random.default_rng(0).permutation(12)
    faulty = with_projection(LAYERED, "flat-square", weight_changed(lambda weight: weight[order]))
    (cause,) = differences(LAYERED, faulty)
    assert cause.what == "permuted neurons"
    moved = np.flatnonzero(order != np.arange(12))
    assert f"number {order[moved[0]]} at {moved[0]}" in cause.text


def test_neurons_that_fire_for_each_other_are_named() -> None:
    order = np.random.default_rng(5).permutation(12)
    packed = np.packbits(LAYERED_TRUTH.spikes("square")[..., order], axis=-1)
    other = replace(LAYERED_TRUTH, packed=LAYERED_TRUTH.packed | {"square": packed}, backend="faulty")
    found = why(LAYERED_TRUTH, other, graph=LAYERED)
    assert names(found) == {"permuted neurons"}


@pytest.mark.parametrize(("by", "when"), [(1, "late"), (-1, "early")])
def test_spikes_read_at_another_step_are_named(by: int, when: str) -> None:
    moved = np.roll(LAYERED_TRUTH.spikes("square"), by, axis=1)
    moved[:, 0 if by > 0 else -1] = 0
    other = replace(LAYERED_TRUTH, packed=LAYERED_TRUTH.packed | {"square": np.packbits(moved, axis=-1)})
    causes = why(LAYERED_TRUTH, other, graph=LAYERED).causes
    assert any(cause.what == "shifted spikes" and f"one step {when}" in cause.text for cause in causes)


def test_a_state_that_is_carried_over_is_named() -> None:
    """The first sample is right, as it is after a reset that never comes."""
    name = "square"
    cell = Cell.of(LAYERED, name)
    sent = sent_spikes(LAYERED, {"flat"}, (LAYERED_TRUTH,), None, slice(0, 20))
    assert sent is not None
    spikes = replay(cell, sent, 20, STEPS, keep_state=True).spikes
    other = replace(LAYERED_TRUTH, packed=LAYERED_TRUTH.packed | {name: np.packbits(spikes.astype(bool), axis=-1)})
    found = compare(LAYERED, LAYERED_TRUTH, other).divergence
    assert found is not None
    assert found.place.sample > 0
    assert found.explanation is not None
    assert names(found.explanation) == {"carried-over state"}


def test_networks_that_differ_elsewhere_too_say_so() -> None:
    faulty = with_neuron(FAULTS["a flipped kernel"][1], "last", bias_mant=-100)
    found = why(TRUTH, run(faulty), faulty)
    assert names(found) == {"flipped kernel"}
    assert [cause.what for cause in found.elsewhere] == ["lost bias"]


# ---- laws ------------------------------------------------------------------------------------------------------------


@given(graphs(), st.integers(0, 2**32 - 1))
@settings(max_examples=12)
def test_a_replay_on_its_own_spikes_is_what_a_population_did(graph: ProcessGraph, seed: int) -> None:
    inputs = random_inputs(graph, seed)
    plain = simulate_plainly(graph, inputs)
    trace = torch_backend.run(graph, inputs, device="cpu")
    for population in graph.populations:
        name = population.name
        cell = Cell.of(graph, name)
        sent = sent_spikes(graph, {arm.projection.source for arm in cell.arms}, (trace,), inputs, slice(0, 3))
        assert sent is not None
        states = replay(cell, sent, 3, graph.steps)
        for values, expected in ((states.a, plain.a), (states.u, plain.u), (states.v, plain.v)):
            np.testing.assert_array_equal(values, expected[name])
        np.testing.assert_array_equal(states.spikes, plain.spikes[name])
        np.testing.assert_array_equal(states.membrane > cell.threshold, plain.spikes[name])


@given(graphs(graded=False), st.integers(0, 2**32 - 1))
@settings(max_examples=8)
def test_the_incoming_spikes_make_the_incoming_current(graph: ProcessGraph, seed: int) -> None:
    """Of any neuron and step, on both sides; rounding of negative exponents aside."""
    assume(all(projection.exponent >= 0 for projection in graph.projections))
    rng = np.random.default_rng(seed)
    inputs = random_inputs(graph, seed)
    trace = torch_backend.run(graph, inputs, device="cpu", record=True)
    name = graph.populations[int(rng.integers(len(graph.populations)))].name
    sample, step, neuron = (int(rng.integers(extent)) for extent in (3, graph.steps, graph.population(name).size))
    packed = trace.packed[name].copy()
    packed[sample, step, neuron // 8] ^= 128 >> neuron % 8
    found = why(trace, replace(trace, packed=trace.packed | {name: packed}, states={}), graph=graph)
    for side in (0, 1):
        listed = sum(each.currents[side] or 0 for each in found.incoming)
        assert listed + found.left_out_currents[side] == trace.states[name]["a"][sample, step, neuron]


def test_a_graded_input_needs_its_payloads() -> None:
    """A trace has the events of an input and not their payloads: without these nothing is claimed of the states."""
    operator = Conv2d((1, 4, 6), 2 * np.random.default_rng(0).integers(-20, 21, (2, 1, 2, 2)), SumPool((2, 2), (2, 2)))
    neuron = LoihiNeuron(*(np.asarray(value) for value in (3000, 500, 900, 0, 0)))
    graph = ProcessGraph(
        "graded",
        3,
        1e-3,
        (Input("in", (1, 4, 6), 4),),
        (Population("out", (2, 1, 2), neuron, 1),),
        (Projection("in-out", "in", "out", operator),),
        Readout("out"),
    )
    inputs = {"in": np.random.default_rng(2).integers(0, 16, (9, 3, 1, 4, 6))}
    truth = torch_backend.run(graph, inputs, device="cpu")
    faulty = with_projection(graph, "in-out", weight_changed(lambda weight: weight[..., ::-1, ::-1].copy()))
    bad = relabelled(torch_backend.run(faulty, inputs, device="cpu"), graph)
    found = compare(graph, truth, bad).divergence
    assert found is not None
    assert found.explanation is not None
    assert [(side.follows, side.u) for side in found.explanation.sides] == [(None, None)] * 2
    assert found.explanation.causes == ()
    known = compare(graph, truth, bad, inputs).divergence
    assert known is not None
    assert known.explanation is not None
    assert "flipped kernel" in names(known.explanation)
