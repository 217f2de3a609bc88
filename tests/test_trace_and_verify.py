"""Traces and their comparison: planted faults are found, and the first divergence is named to the neuron and step."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fault_examples import FAULTS, GRAPH, INPUTS, ORDER, SAMPLES, STEPS, relabelled, with_neuron
from graph_strategies import (  # noqa: F401
    explicit_matrix,
    graphs,
    one_thread,
    random_graph,
    random_inputs,
    simulate_plainly,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeport.converters.graph import ProcessGraph, Readout
from spikeport.deploy import event_simulator, torch_backend
from spikeport.deploy.cli import main
from spikeport.deploy.replay import Place
from spikeport.deploy.trace import Trace, decisions, pack
from spikeport.deploy.verify import compare, compare_synops
from spikeport.models.errors import SpikeportError
from spikeport.models.files import write_arrays

SEEDS = st.integers(0, 2**32 - 1)


TRUTH = torch_backend.run(GRAPH, INPUTS, device="cpu", record=True)


def first_difference(first: Trace, second: Trace) -> tuple[str, int, int, int]:
    """By sample, then step, then population in graph order, then neuron: of all differences the smallest."""
    differences = [
        (int(sample), int(step), rank, int(index))
        for rank, name in enumerate(ORDER)
        for sample, step, index in np.argwhere(first.spikes(name) != second.spikes(name))
    ]
    sample, step, rank, index = min(differences)
    return ORDER[rank], sample, step, index


# ---- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_where_it_first_shows(fault: str) -> None:
    where, faulty = FAULTS[fault]
    bad = relabelled(torch_backend.run(faulty, INPUTS, device="cpu"), GRAPH)
    name, sample, step, index = first_difference(TRUTH, bad)
    at = (sample, step, index)
    good = {key: values[at] for key, values in TRUTH.states[name].items()}
    found = compare(GRAPH, TRUTH, bad, INPUTS)
    place = found.divergence
    assert place is not None
    assert place.place == Place(name, sample, step, index)
    assert (place.first, place.second) == (int(TRUTH.spikes(name)[at]), int(bad.spikes(name)[at]))
    assert place.explanation is not None
    side = place.explanation.sides[0]
    assert (side.current, side.u, side.v) == (int(good["a"]), int(good["u"]), int(good["v"]))
    assert (side.follows, place.explanation.sides[1].follows) == (True, False)
    assert name == where
    assert found.by_population == {key: int((TRUTH.spikes(key) != bad.spikes(key)).sum()) for key in ORDER}
    assert found.mismatches == sum(found.by_population.values()) > 0
    # a fault reaches nothing that is not behind it
    behind = {"first": ORDER, "middle": ["middle", "last"], "side": ["side", "last"], "last": ["last"]}
    assert all(count == 0 for key, count in found.by_population.items() if key not in behind[where])


def test_the_state_shown_is_that_of_the_plain_model() -> None:
    _, faulty = FAULTS["a lost bias"]
    bad = relabelled(torch_backend.run(faulty, INPUTS, device="cpu"), GRAPH)
    found = compare(GRAPH, TRUTH, bad, INPUTS).divergence
    assert found is not None
    assert found.explanation is not None
    place, side = found.place, found.explanation.sides[0]
    plain = simulate_plainly(GRAPH, {"in": INPUTS["in"][place.sample : place.sample + 1]})
    at = (0, place.step, place.neuron)
    assert side.current == plain.a[place.population][at]
    assert (side.u, side.v) == (plain.u[place.population][at], plain.v[place.population][at])
    assert side.spike == found.first == plain.spikes[place.population][at]
    if place.step:
        before = (0, place.step - 1, place.neuron)
        assert (side.u_before, side.v_before) == (plain.u[place.population][before], plain.v[place.population][before])


@pytest.mark.parametrize("fault", FAULTS)
def test_the_message_names_place_and_state(fault: str) -> None:
    _, faulty = FAULTS[fault]
    found = compare(GRAPH, TRUTH, relabelled(torch_backend.run(faulty, INPUTS, device="cpu"), GRAPH), INPUTS)
    assert found.divergence is not None
    assert found.divergence.explanation is not None
    place, side = found.divergence.place, found.divergence.explanation.sides[0]
    text = str(found)
    assert f"{place.population}, sample {place.sample}, step {place.step}, neuron {place.neuron}" in text
    assert f"torch: input {side.current}, u {side.u}, v {side.v}" in text
    assert text.startswith(f"torch and faulty: {found.mismatches} of {found.compared} neuron-steps differ")


def test_equal_traces_have_no_difference() -> None:
    found = compare(GRAPH, TRUTH, event_simulator.run(GRAPH, INPUTS))
    assert (found.mismatches, found.divergence) == (0, None)
    assert found.by_population == dict.fromkeys(ORDER, 0)
    assert (found.first, found.second, found.samples) == ("torch", "events", SAMPLES)
    assert found.compared == SAMPLES * STEPS * (48 + 24 + 12 + 10)
    assert found.spikes == sum(int(TRUTH.spikes(name).sum()) for name in ORDER)
    for name in ORDER:
        assert 0.05 < TRUTH.spikes(name).mean() < 0.7, name
    assert "0 of" in str(found)


@given(graphs(), SEEDS)
@settings(max_examples=6)
def test_one_flipped_bit_is_found(graph: ProcessGraph, seed: int) -> None:
    """Any population, sample, step and neuron, also the last bit before the padding."""
    inputs = random_inputs(graph, seed)
    truth = torch_backend.run(graph, inputs, device="cpu")
    rng = np.random.default_rng(seed)
    population = graph.populations[int(rng.integers(len(graph.populations)))]
    place = tuple(int(rng.integers(extent)) for extent in (truth.samples, truth.steps, population.size))
    changed = truth.spikes(population.name)
    changed[place] ^= 1
    other = replace(truth, packed=truth.packed | {population.name: pack(changed)})
    for first, second in ((truth, other), (other, truth)):
        found = compare(graph, first, second)
        assert found.mismatches == 1
        assert found.divergence is not None
        divergence = found.divergence
        assert divergence.place == Place(population.name, *place)
        assert (divergence.first, divergence.second) == (
            int(first.spikes(population.name)[place]),
            int(second.spikes(population.name)[place]),
        )


def test_the_earliest_difference_wins_over_the_first_population() -> None:
    """A late difference in an early population does not hide an early one in a late population."""
    packed = {name: array.copy() for name, array in TRUTH.packed.items()}
    packed["first"][2, 5, 1] ^= 0b00010000
    packed["last"][2, 4, 0] ^= 0b01000000
    packed["side"][3, 0, 0] ^= 0b10000000
    divergence = compare(GRAPH, TRUTH, replace(TRUTH, packed=packed)).divergence
    assert divergence is not None
    assert divergence.place == Place("last", 2, 4, 1)


def test_only_samples_that_both_have_are_compared() -> None:
    _, faulty = FAULTS["a lost bias"]
    other = relabelled(torch_backend.run(faulty, INPUTS, device="cpu"), GRAPH)
    whole = compare(GRAPH, TRUTH, other)
    part = compare(GRAPH, TRUTH.head(2), other)
    differing = {name: (TRUTH.spikes(name) != other.spikes(name))[:2].sum() for name in ORDER}
    assert part.samples == 2
    assert part.by_population == differing
    assert part.compared == 2 * whole.compared // SAMPLES
    assert compare(GRAPH, other, TRUTH.head(2)).mismatches == part.mismatches


@pytest.mark.parametrize("which", [0, 1])
def test_a_trace_of_another_network_is_refused(which: int) -> None:
    foreign = torch_backend.run(with_neuron(GRAPH, "last", vth=1), INPUTS, device="cpu")
    pair = [TRUTH, TRUTH]
    pair[which] = foreign
    with pytest.raises(SpikeportError, match=rf"trace \(torch\) was made with another network.*{foreign.graph}"):
        compare(GRAPH, *pair)


def test_a_comparison_can_be_written_as_json() -> None:
    _, faulty = FAULTS["a flipped kernel"]
    found = compare(GRAPH, TRUTH, relabelled(torch_backend.run(faulty, INPUTS, device="cpu"), GRAPH), INPUTS)
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert found.divergence is not None
    assert written["divergence"]["place"]["neuron"] == found.divergence.place.neuron
    assert written["mismatches"] == found.mismatches
    assert [layer["mismatches"] for layer in written["layers"]] == list(written["by_population"].values())
    (cause,) = written["divergence"]["explanation"]["causes"]
    assert cause["what"] == "flipped kernel"


def test_synops_are_compared_by_projection_and_step() -> None:
    counted = event_simulator.run(GRAPH, INPUTS)
    rows = compare_synops(GRAPH, counted, TRUTH)
    assert [row.projection for row in rows] == [p.name for p in GRAPH.projections]
    for row, projection in zip(rows, GRAPH.projections, strict=True):
        fan_out = explicit_matrix(projection.operator)[1].sum(0)
        expected = (TRUTH.spikes(projection.source) @ fan_out).sum()
        assert row.counted == row.derived == expected > 0
        assert row.steps_that_differ == 0
    counted.synops["side-last"][1, 2] += 3
    counted.synops["side-last"][4, 6] -= 3
    (wrong,) = [row for row in compare_synops(GRAPH, counted, TRUTH) if row.steps_that_differ]
    assert (wrong.projection, wrong.counted - wrong.derived, wrong.steps_that_differ) == ("side-last", 0, 2)


# ---- membranes that are read -----------------------------------------------------------------------------------------


def probed(graph: ProcessGraph) -> ProcessGraph:
    """The network above with an integrator for its last population."""
    graph = with_neuron(graph, "last", vth=131071 - 3500, dv=3 - 400)
    return replace(graph, readout=Readout("last", "membrane"))


PROBED = probed(GRAPH)
MEMBRANES = torch_backend.run(PROBED, INPUTS, device="cpu")


def with_membranes(trace: Trace, changes: dict[tuple[int, int], int]) -> Trace:
    """The same trace with other membranes at some (sample, neuron)."""
    assert trace.membrane is not None
    changed = trace.membrane.copy()
    for place, by in changes.items():
        changed[place] += by
    return replace(trace, membrane=changed)


def test_equal_membranes_are_counted() -> None:
    found = compare(PROBED, MEMBRANES, event_simulator.run(PROBED, INPUTS))
    assert (found.equal, found.mismatches, found.divergence) == (True, 0, None)
    assert (found.membranes, found.membrane_mismatches) == (SAMPLES * 10, 0)
    assert str(found).endswith(f"spikes), 0 of {SAMPLES * 10} membranes that are read")
    assert compare(GRAPH, TRUTH, TRUTH).membranes == 0


@pytest.mark.parametrize(
    ("change", "causes"),
    [({"dv": 1}, ["voltage decay off by one"]), ({"du": 1}, ["current decay off by one"]), ({"bias_mant": 1}, [])],
)
def test_a_fault_that_shows_in_membranes_alone_is_found(change: dict[str, int], causes: list[str]) -> None:
    faulty = torch_backend.run(with_neuron(PROBED, "last", **change), INPUTS, device="cpu")
    found = compare(PROBED, MEMBRANES, relabelled(faulty, PROBED), INPUTS)
    assert (found.mismatches, found.equal) == (0, False)
    assert found.membrane_mismatches > SAMPLES
    differs = found.divergence
    assert differs is not None
    assert differs.explanation is not None
    place = differs.place
    assert place == Place("last", 0, STEPS - 1, place.neuron, membrane=True)
    assert MEMBRANES.membrane is not None
    assert faulty.membrane is not None
    assert place.neuron == np.flatnonzero(MEMBRANES.membrane[0] != faulty.membrane[0])[0]
    values = tuple(int(trace.membrane[0, place.neuron]) for trace in (MEMBRANES, faulty))
    assert (differs.first, differs.second) == values
    assert differs.explanation.sides[0].v == differs.first
    assert [cause.what for cause in differs.explanation.causes if cause.what != "unknown"] == causes
    text = f"last, sample 0, step {STEPS - 1}, neuron {place.neuron}: membrane v {values[0]} against {values[1]}"
    assert text in str(found)
    assert found.to_json()["membrane_mismatches"] == found.membrane_mismatches


def test_one_membrane_that_differs_is_found() -> None:
    found = compare(PROBED, MEMBRANES, with_membranes(MEMBRANES, {(17, 4): -1}))
    assert (found.mismatches, found.membrane_mismatches, found.equal) == (0, 1, False)
    assert found.divergence is not None
    assert found.divergence.place == Place("last", 17, STEPS - 1, 4, membrane=True)
    assert found.divergence.first == found.divergence.second + 1


@pytest.mark.parametrize(
    ("sample", "step", "what"),
    [(2, STEPS - 1, "spikes"), (2, 0, "spikes"), (1, 3, "spikes"), (3, 0, "membrane")],
    ids=["at the same step", "in the same sample", "in a sample before", "in a sample behind"],
)
def test_the_earliest_difference_is_a_spike_or_a_membrane(sample: int, step: int, what: str) -> None:
    packed = {name: array.copy() for name, array in MEMBRANES.packed.items()}
    packed["middle"][sample, step, 1] ^= 0b00010000
    other = replace(with_membranes(MEMBRANES, {(2, 7): 5, (2, 3): -5, (9, 0): 1}), packed=packed)
    found = compare(PROBED, MEMBRANES, other)
    assert (found.mismatches, found.membrane_mismatches) == (1, 3)
    assert found.divergence is not None
    membrane = Place("last", 2, STEPS - 1, 3, membrane=True)
    assert found.divergence.place == (membrane if what == "membrane" else Place("middle", sample, step, 11))


@pytest.mark.parametrize("which", [0, 1])
def test_a_trace_that_lacks_the_membranes_is_not_equal_to_one_with(which: int) -> None:
    pair = [MEMBRANES, MEMBRANES]
    pair[which] = replace(MEMBRANES, membrane=None)
    with pytest.raises(SpikeportError, match="does not hold the membrane of 'last'"):
        compare(PROBED, *pair)


def test_membranes_that_differ_fail_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where every spike is equal, the exit status of `spikeport verify` is 1 all the same."""
    for by, status in ((0, 0), (1, 1)):
        found = compare(PROBED, MEMBRANES, with_membranes(MEMBRANES, {(3, 3): by}))
        monkeypatch.setattr("spikeport.deploy.cli._open", lambda folder: SimpleNamespace(graph=PROBED))
        monkeypatch.setattr("spikeport.deploy.verifying.verify_stage", lambda *_, found=found: ([found], []))
        assert main(["verify", str(tmp_path)]) == status


# ---- traces ----------------------------------------------------------------------------------------------------------


@given(graphs(), SEEDS)
@settings(max_examples=15)
def test_a_saved_trace_is_loaded_again(
    tmp_path_factory: pytest.TempPathFactory, graph: ProcessGraph, seed: int
) -> None:
    trace = event_simulator.run(graph, random_inputs(graph, seed))
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    trace.save(path)
    loaded = Trace.load(path)
    for key in ("backend", "graph", "samples", "steps", "sizes", "seconds"):
        assert getattr(loaded, key) == getattr(trace, key), key
    for key in ("packed", "synops", "active"):
        before, after = getattr(trace, key), getattr(loaded, key)
        assert list(before) == list(after)
        for name, array in before.items():
            np.testing.assert_array_equal(array, after[name])
            assert array.dtype == after[name].dtype
    assert compare(graph, trace, loaded).mismatches == 0

    if graph.probed is None:
        assert loaded.membrane is None
    else:
        assert trace.membrane is not None
        assert loaded.membrane is not None
        assert loaded.membrane.dtype == np.int64
        np.testing.assert_array_equal(loaded.membrane, trace.membrane)


def test_names_with_dots_and_slashes_survive(tmp_path: Path) -> None:
    spikes = np.array([[[1, 0, 1]]])
    sizes = {"block.1/conv": 3, "ü": 3}
    trace = Trace("torch", "0" * 16, 1, 1, sizes, {name: pack(spikes) for name in sizes})
    trace.save(tmp_path / "trace.npz")
    loaded = Trace.load(tmp_path / "trace.npz")
    for name in sizes:
        assert loaded.spikes(name).tolist() == spikes.tolist()


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 17])
def test_packed_spikes_unpack_to_what_went_in(size: int) -> None:
    spikes = np.random.default_rng(size).integers(0, 2, (4, 3, size))
    trace = Trace("torch", "0" * 16, 4, 3, {"p": size}, {"p": pack(spikes)})
    np.testing.assert_array_equal(trace.spikes("p"), spikes)
    np.testing.assert_array_equal(trace.spikes("p", slice(1, 3)), spikes[1:3])
    np.testing.assert_array_equal(trace.spike_counts("p"), spikes.sum(-1))


def test_graded_inputs_are_kept_as_events() -> None:
    assert np.unpackbits(pack(np.array([[[0, 3, 255, 1]]])), axis=-1, count=4).tolist() == [[[0, 1, 1, 1]]]


def test_the_head_is_the_first_samples_of_everything() -> None:
    trace = torch_backend.run(GRAPH, INPUTS, device="cpu", record=True)
    trace = replace(trace, synops=event_simulator.run(GRAPH, INPUTS).synops)
    head = trace.head(2)
    alone = torch_backend.run(GRAPH, {"in": INPUTS["in"][:2]}, device="cpu", record=True)
    assert (head.samples, head.steps, head.graph, head.backend) == (2, STEPS, trace.graph, "torch")
    for name in ORDER:
        np.testing.assert_array_equal(head.spikes(name), alone.spikes(name))
        np.testing.assert_array_equal(head.active[name], alone.active[name])
        for key in ("a", "u", "v"):
            np.testing.assert_array_equal(head.states[name][key], alone.states[name][key])
    assert all(array.shape == (2, STEPS) for array in head.synops.values())
    assert trace.head(SAMPLES).samples == SAMPLES


def test_the_head_has_the_first_membranes() -> None:
    head = MEMBRANES.head(2)
    assert head.membrane is not None
    assert MEMBRANES.membrane is not None
    np.testing.assert_array_equal(head.membrane, MEMBRANES.membrane[:2])
    found = compare(PROBED, head, MEMBRANES)
    assert (found.membranes, found.equal) == (2 * 10, True)


def test_a_head_longer_than_the_trace_is_refused() -> None:
    with pytest.raises(SpikeportError, match=f"has {SAMPLES} samples; {SAMPLES + 1} were asked for"):
        TRUTH.head(SAMPLES + 1)


# three classes over four steps: the second fires first, the third most often, the first latest and twice
RASTER = np.array([[[0, 1, 0], [0, 0, 1], [1, 0, 1], [1, 0, 1]]])


@pytest.mark.parametrize(
    ("kind", "keep", "steps", "expected"),
    [
        ("count", 0.0, None, 2),
        ("count", 0.0, 1, 1),
        ("count", 0.0, 2, 1),  # a draw goes to the lower class
        ("first_spike", 0.0, None, 1),
        ("psc", 0.5, None, 2),
        ("psc", 1.0, None, 2),
        ("psc", 1.0, 2, 1),
    ],
)
def test_decisions(kind: str, keep: float, steps: int | None, expected: int) -> None:
    trace = Trace("torch", "0" * 16, 1, 4, {"out": 3}, {"out": pack(RASTER)})
    readout = Readout("out", kind, keep)  # type: ignore[arg-type]
    assert decisions(readout, trace, steps).tolist() == [expected]


def test_the_psc_readout_weighs_early_spikes() -> None:
    """sum over time of the filtered spikes: at keep 0.5 one spike at step 0 of 4 leaves 1.875, two at the end 2.5."""
    early = np.array([[[1, 0], [0, 0], [0, 1], [0, 0]]])
    trace = Trace("torch", "0" * 16, 1, 4, {"out": 2}, {"out": pack(early)})
    assert decisions(Readout("out", "psc", 0.9), trace).tolist() == [0]
    assert decisions(Readout("out", "count"), trace).tolist() == [0]
    late = np.array([[[1, 0], [0, 0], [0, 1], [0, 1]]])
    trace = Trace("torch", "0" * 16, 1, 4, {"out": 2}, {"out": pack(late)})
    assert decisions(Readout("out", "psc", 0.5), trace).tolist() == [1]
    assert decisions(Readout("out", "psc", 1.0), trace).tolist() == [0]


def read_at_the_end(membrane: np.ndarray | None, samples: int = 3) -> Trace:
    """A trace of three classes that never fire, over four steps."""
    return Trace("torch", "0" * 16, samples, 4, {"out": 3}, {"out": pack(np.zeros((samples, 4, 3)))}, membrane=membrane)


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_a_membrane_decides_after_the_last_step_alone(dtype: type[np.generic], tmp_path: Path) -> None:
    readout = Readout("out", "membrane")
    read_at_the_end(np.array([[-3, -2, -9], [5, 5, 1], [0, 1, 1]], dtype)).save(tmp_path / "trace.npz")
    trace = Trace.load(tmp_path / "trace.npz")
    assert trace.membrane is not None
    assert trace.membrane.dtype == dtype
    assert decisions(readout, trace).tolist() == decisions(readout, trace, 4).tolist() == [1, 0, 1]
    for steps in (1, 3, 5):
        with pytest.raises(SpikeportError, match=f"'out' is read after 4 steps, not {steps}"):
            decisions(readout, trace, steps)


@pytest.mark.parametrize("membrane", [None, np.zeros((3, 4), np.int64), np.zeros((2, 3), np.int64)])
def test_a_trace_without_the_membrane_that_decides_is_refused(membrane: np.ndarray | None) -> None:
    with pytest.raises(SpikeportError, match="the torch trace does not hold the membrane of 'out'"):
        decisions(Readout("out", "membrane"), read_at_the_end(membrane))


def test_silence_is_a_decision_for_the_lowest_class() -> None:
    trace = Trace("torch", "0" * 16, 2, 4, {"out": 3}, {"out": pack(np.zeros((2, 4, 3)))})
    for kind in ("count", "psc", "first_spike"):
        assert decisions(Readout("out", kind, 0.5), trace).tolist() == [0, 0]  # type: ignore[arg-type]


# ---- damaged files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "trace.npz"
    event_simulator.run(GRAPH, INPUTS).save(path)
    return path.read_bytes()


def refused(path: Path) -> str:
    with pytest.raises(SpikeportError) as caught:
        Trace.load(path)
    message = str(caught.value)
    assert path.name in message
    assert len(message.splitlines()) <= 2
    return message


def test_a_missing_trace_says_how_to_make_one(tmp_path: Path) -> None:
    assert "spikeport simulate" in refused(tmp_path / "trace.npz")


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 0.9, 0.999])
def test_a_truncated_trace_is_refused(fraction: float, saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    path.write_bytes(saved[: int(fraction * len(saved))])
    assert "spikeport simulate" in refused(path)


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7])
def test_a_trace_with_flipped_bits_is_refused(place: float, saved: bytes, tmp_path: Path) -> None:
    """The archive's checksums notice what the format cannot."""
    content = bytearray(saved)
    middle = int(place * len(content))
    content[middle : middle + 40] = bytes(value ^ 0xFF for value in content[middle : middle + 40])
    path = tmp_path / "trace.npz"
    path.write_bytes(bytes(content))
    refused(path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with path.open("wb") as stream:
        np.savez(stream, __header__=np.array([{"format": "spikeport-trace"}], dtype=object))
    refused(path)


def test_a_process_graph_is_no_trace(tmp_path: Path) -> None:
    GRAPH.save(tmp_path / "graph.npz")
    assert "not a trace" in refused(tmp_path / "graph.npz")


GOOD_HEADER = {
    "format": "spikeport-trace",
    "version": 2,
    "backend": "torch",
    "graph": "0" * 16,
    "samples": 2,
    "steps": 3,
    "sizes": {"out": 9},
    "seconds": 0.5,
}
GOOD_ARRAYS = {"spikes.out": np.zeros((2, 3, 2), np.uint8), "active.out": np.zeros((2, 3, 2), np.uint8)}


def test_the_file_that_the_faults_are_planted_in_is_good(tmp_path: Path) -> None:
    write_arrays(tmp_path / "trace.npz", GOOD_HEADER, GOOD_ARRAYS)
    assert Trace.load(tmp_path / "trace.npz").spikes("out").shape == (2, 3, 9)


@pytest.mark.parametrize(
    ("header", "arrays"),
    [
        ([], GOOD_ARRAYS),
        (GOOD_HEADER | {"version": 1}, GOOD_ARRAYS),
        ({key: value for key, value in GOOD_HEADER.items() if key != "samples"}, GOOD_ARRAYS),
        ({key: value for key, value in GOOD_HEADER.items() if key != "sizes"}, GOOD_ARRAYS),
        (GOOD_HEADER | {"sizes": ["out"]}, GOOD_ARRAYS),
        (GOOD_HEADER | {"samples": "many"}, GOOD_ARRAYS),
        (GOOD_HEADER, GOOD_ARRAYS | {"nodot": np.zeros(1)}),
        (GOOD_HEADER, GOOD_ARRAYS | {"other.out": np.zeros(1)}),
        (GOOD_HEADER, {"active.out": np.zeros((2, 3, 2), np.uint8)}),
        (GOOD_HEADER, {"spikes.out": np.zeros((2, 3, 1), np.uint8)}),
        (GOOD_HEADER, {"spikes.out": np.zeros((1, 3, 2), np.uint8)}),
        (GOOD_HEADER, {"spikes.out": np.zeros((2, 3, 2), np.float64)}),
        (GOOD_HEADER, GOOD_ARRAYS | {"active.out": np.zeros((2, 2, 2), np.uint8)}),
        (GOOD_HEADER, GOOD_ARRAYS | {"membrane": np.zeros((3, 9), np.int64)}),
        (GOOD_HEADER, GOOD_ARRAYS | {"membrane": np.zeros((2, 9), np.uint8)}),
        (GOOD_HEADER, GOOD_ARRAYS | {"membrane": np.zeros(2, np.int64)}),
        (GOOD_HEADER, GOOD_ARRAYS | {"membrane": np.zeros((), np.int64)}),
    ],
    ids=[
        "a list for a header",
        "another version",
        "no samples",
        "no sizes",
        "sizes that are a list",
        "samples that are text",
        "an array of no group",
        "an array of another group",
        "a population without spikes",
        "too few bytes for the neurons",
        "too few samples",
        "spikes that are floats",
        "counts of other steps",
        "membranes of other samples",
        "membranes that are bytes",
        "membranes of no neurons",
        "a membrane that is a number",
    ],
)
def test_a_trace_that_contradicts_itself_is_refused(
    header: object, arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / "trace.npz"
    write_arrays(path, header, arrays)
    refused(path)


def test_a_trace_of_the_random_graphs_holds_every_event_node() -> None:
    graph = random_graph(6, populations=3)
    inputs = random_inputs(graph, 0)
    for run in (torch_backend.run, event_simulator.run):
        trace = run(graph, inputs)
        assert trace.sizes == {node.name: node.size for node in graph.event_nodes}
        assert set(trace.packed) == set(trace.sizes)
        for node in graph.event_inputs:
            expected = inputs[node.name].reshape(trace.samples, trace.steps, -1) != 0
            np.testing.assert_array_equal(trace.spikes(node.name), expected)
