"""SANA-FE 2.2.9 against our simulator: the same spikes, packets, hops, energies and `simple` times, step by step.

`replay` says what SANA-FE does, chip step by chip step, from explicit matrices; it shares no line with our counters.
Where its model is another than ours the replay follows SANA-FE, and a comment says so:

- A neuron that fires sends one message to each target core; we send one for each projection and target core.
- A neuron is updated where v != 0 or bias != 0 or a synapse of it worked in the step before; ours is active where u, v,
  the sum of its inputs or the bias is not zero. So after a spike we count one more neuron-step (u still holds the input
  that made it fire), and where inputs cancel to zero at rest SANA-FE does.
- It knows no samples: what a recurrent projection carries from the last step is sent, to be ignored.
"""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_strategies import KINDS, explicit_matrix, random_operator

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.lower import balance
from spikeport.converters.operators import Dense
from spikeport.deploy import event_simulator
from spikeport.deploy.chip import SYNOP_EVENT, Chip, load_chip
from spikeport.deploy.mapping import Mapping, map_network
from spikeport.deploy.run_folder import RunFolder
from spikeport.deploy.sanafe_export import SANAFE_VERSION, sanafe_stage, write_sanafe
from spikeport.deploy.timing import simulate_timing
from spikeport.deploy.workload import Counts, count, prepare
from spikeport.models.errors import BackendError, ChipError, QuantizationError, SpikeportError
from spikeport.models.files import write_json
from spikeport.models.recipe import read_recipe_text

PYTHON = Path(__file__).resolve().parents[1] / ".venv-peers" / "bin" / "python"
STEPS = 12
RATE = 0.3
SYNOPS = ("synop_dense", "synop_sparse", "synop_conv")
Inputs = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def sanafe_python() -> Path:
    if not PYTHON.exists():
        pytest.skip("there is no .venv-peers with SANA-FE; run `make setup-peers`")
    return PYTHON


@pytest.fixture
def sanafe(sanafe_python: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a network on SANA-FE."""

    def run(graph: ProcessGraph, mapping: Mapping, chip: Chip, inputs: Inputs, timing: str = "simple") -> Any:
        write_sanafe(graph, mapping, chip, inputs, tmp_path / "export", regular=timing == "cycle")
        out = tmp_path / "result.json"
        done = subprocess.run(
            [sanafe_python, "run_sanafe.py", ".", "--out", out, "--timing", timing],
            cwd=tmp_path / "export",
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return json.loads(out.read_text(encoding="utf-8"))

    return run


# ---- networks -------------------------------------------------------------------------------------------------------


def network(seed: int, *features: str, steps: int = STEPS) -> tuple[ProcessGraph, Inputs]:
    """A chain of three populations of integrate-and-fire neurons over random operators.

    features: leak, subtract, bias, skip (a second way with delays), recurrent, parallel, constant.
    """
    rng = np.random.default_rng(seed)
    sources = [Input("in", (2, 7, 8)), Input("flat", (7,))]
    made: list[Population] = []
    projections: list[Projection] = []

    def project(source: Input | Population, target: str, operator: Any, **rest: Any) -> None:
        name = f"p{len(projections)}"
        projections.append(Projection(name, source.name, target, operator, int(rng.integers(2)), **rest))

    def dense(source: Input | Population, shape: tuple[int, ...]) -> Dense:
        size = int(np.prod(shape))
        return Dense(source.shape, 2 * rng.integers(-15, 25, (size, source.size)), shape_out=shape)

    nodes: list[Input | Population] = [sources[0]]
    for index in range(3):
        source, name = nodes[-1], f"population{index}"
        kinds = ("dense", "pooled dense") if "skip" in features else KINDS
        operator = random_operator(rng, source.shape, kinds[int(rng.integers(len(kinds)))])
        while operator.n_out < 12:
            operator = random_operator(rng, source.shape, kinds[int(rng.integers(len(kinds)))])
        if operator.weight.sum() < 0:  # let something fire
            operator = operator.with_weight(np.minimum(np.abs(operator.weight), 254))
        shape = operator.out_shape
        each = shape if rng.random() < 0.5 else ()
        neuron = LoihiNeuron(
            du=np.asarray(4095),
            dv=rng.integers(0, 600, each) if "leak" in features else np.asarray(0),
            vth=np.asarray(0),
            bias_mant=rng.integers(-400, 1000, each) if "bias" in features else np.asarray(0),
            bias_exp=np.asarray(3),
            reset="subtract" if "subtract" in features else "zero",
        )
        made.append(Population(name, shape, neuron))
        project(source, name, operator)
        if index == 0:
            project(sources[1], name, dense(sources[1], shape))
        if "parallel" in features and index:
            project(source, name, dense(source, shape))
        if "skip" in features and index == 2:
            project(nodes[1], name, dense(nodes[1], shape))
            project(sources[1], name, dense(sources[1], shape))
            if "recurrent" in features:
                project(made[0], name, dense(made[0], shape), recurrent=True)
        if "recurrent" in features and index == 1:
            project(made[-1], name, dense(made[-1], shape), recurrent=True)
        incoming = [p for p in projections if p.target == name]
        drive = sum(RATE * np.abs(explicit_matrix(p.operator)[0].sum(axis=1)).mean() * 2**p.exponent for p in incoming)
        vth = rng.integers(int(drive) + 50, 4 * int(drive) + 200, each)
        made[-1] = replace(made[-1], neuron=replace(neuron, vth=vth))
        nodes.append(made[-1])
    if "constant" in features:
        sources.append(Input("one", (3,), constant=True))
        for target in (made[0], made[2]):
            project(sources[2], target.name, dense(sources[2], target.shape))
    staged, padded = balance(sources, made, projections)
    graph = ProcessGraph(
        f"random {seed}", steps, 1e-3, tuple(sources), tuple(staged), tuple(padded), Readout("population2")
    )
    inputs = {n.name: (rng.random((1, steps, *n.shape)) < RATE).astype(np.uint8) for n in graph.event_inputs}
    return graph, inputs


def chip_of(neurons: int = 8, columns: int = 8, rows: int = 4, cores: int = 4, column: int = 0) -> Chip:
    """`loihi-sanafe` with fewer neurons a core, so that small networks spread over many."""
    chip = load_chip("loihi-sanafe")
    limits = chip.limits.model_copy(update={"neurons": neurons})
    mesh = chip.mesh.model_copy(update={"columns": columns, "rows": rows})
    port = chip.input.model_copy(update={"column": column})
    return chip.model_copy(update={"limits": limits, "mesh": mesh, "cores_per_tile": cores, "input": port})


# ---- what SANA-FE does ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Replay:
    """By population (chip steps, size): spikes, updated. By chip step and core: messages, packets, synops by event."""

    spikes: dict[str, np.ndarray]
    updated: dict[str, np.ndarray]
    messages: np.ndarray
    packets: np.ndarray
    hops: np.ndarray
    synops: dict[str, np.ndarray] = field(default_factory=dict)


def replay(graph: ProcessGraph, mapping: Mapping, inputs: Inputs) -> Replay:
    """Every chip step in plain numpy."""
    last = max(population.stage for population in graph.populations)
    total, cores = graph.steps + last, len(mapping.cores)
    where = mapping.tile_positions()
    core_of = {p.name: mapping.core_of_neurons(p) for p in graph.populations}
    found = Replay({}, {}, *(np.zeros((total, cores), np.int64) for _ in range(2)), np.zeros((total, 2), np.int64))
    found.synops = {event: np.zeros((total, cores), np.int64) for event in SYNOPS}
    size = {p.name: p.size for p in graph.populations}
    found.spikes = {name: np.zeros((total, n), np.int64) for name, n in size.items()}
    found.updated = {name: np.zeros((total, n), np.int64) for name, n in size.items()}
    arriving = {name: np.zeros((total + 9, n), np.int64) for name, n in size.items()}
    touched = {name: np.zeros((total + 9, n), np.int64) for name, n in size.items()}
    v = {name: np.zeros(n, np.int64) for name, n in size.items()}
    parts = [(projection, *explicit_matrix(projection.operator)) for projection in graph.projections]

    def send(name: str, spikes: np.ndarray, step: int, origins: np.ndarray, own: np.ndarray | None, only: int) -> None:
        """Messages of neurons that lie at `origins`, on the cores `own`; `only`: into populations of that stage."""
        reached = np.zeros((len(spikes), cores), bool)
        for projection, weights, counts in parts:
            target = graph.population(projection.target)
            if projection.source != name or only not in (0, target.stage):
                continue
            onto = np.zeros((cores, target.size), np.int64)
            onto[core_of[target.name], np.arange(target.size)] = 1
            synapses = counts @ spikes
            found.synops[SYNOP_EVENT[projection.operator.kind]][step] += onto @ synapses
            reached |= (onto @ counts).T > 0
            late = target.stage - graph.node(name).stage if projection.recurrent else projection.delay
            when = step + 1 + (0 if only else late)
            arriving[target.name][when] += (weights @ spikes) << projection.exponent
            touched[target.name][when] += synapses
        reached &= spikes[:, None] > 0
        found.messages[step] += reached.sum(axis=0)
        if own is not None:
            np.add.at(found.packets[step], own, reached.sum(axis=1))
        away = np.abs(where[None, :, :] - origins[:, None, :])
        found.hops[step] += (away * reached[:, :, None]).sum(axis=(0, 1))

    for step in range(total):
        for population in graph.populations:
            name, neuron = population.name, population.neuron
            assert isinstance(neuron, LoihiNeuron)
            flat = {key: np.broadcast_to(getattr(neuron, key), population.shape).ravel() for key in ("dv", "vth")}
            on = population.stage <= step < population.stage + graph.steps
            whole = np.broadcast_to(neuron.bias_mant << neuron.bias_exp, population.shape).ravel()
            bias = whole if on else 0 * whole
            if step == population.stage + graph.steps:
                v[name][:] = 0  # the runner empties it
            before = v[name]
            found.updated[name][step] = (before != 0) | (bias != 0) | (touched[name][step] > 0)
            kept = np.sign(before) * ((np.abs(before) * (4096 - flat["dv"])) >> 12)
            now = kept + (arriving[name][step] << 6) + bias
            level = flat["vth"] << 6
            fires = (now > level) & on
            v[name] = np.where(fires, now - level if neuron.reset == "subtract" else 0, now)
            found.spikes[name][step] = fires
            found.updated[name][step] |= fires
            send(name, fires.astype(np.int64), step, where[core_of[name]], core_of[name], 0)
        for node in graph.inputs:
            port = np.tile(mapping.input_tile, (node.size, 1))
            if not node.constant:
                if step < graph.steps:
                    send(node.name, inputs[node.name][0, step].ravel().astype(np.int64), step, port, None, 0)
                continue
            for stage in sorted({graph.population(p.target).stage for p in graph.outgoing(node.name)}):
                if stage - 1 <= step < stage - 1 + graph.steps:
                    send(node.name, np.ones(node.size, np.int64), step, port, None, stage)
    return found


def by_core(mapping: Mapping, values: dict[str, np.ndarray]) -> np.ndarray:
    """Sums over the neurons of each core, (chip steps, cores)."""
    return np.stack([values[core.population][:, core.neurons].sum(axis=1) for core in mapping.cores], axis=1)


def expected_costs(mapping: Mapping, chip: Chip, run: Replay) -> tuple[np.ndarray, np.ndarray]:
    """Time in ns and energy in pJ of each chip step: the formulas of docs/chip-timing.md, by hand."""

    def cost(what: str, event: str) -> float:
        return float(getattr(chip.event(event), what).value)

    sizes = np.array([len(core.neurons) for core in mapping.cores])[None, :]
    spikes, updated = by_core(mapping, run.spikes), by_core(mapping, run.updated)

    def neurons(what: str) -> np.ndarray:
        rest, active = cost(what, "neuron_inactive"), cost(what, "neuron_active") + cost(what, "neuron_update")
        visits = sizes * cost(what, "neuron_access") + (sizes - updated) * rest + updated * active
        found: np.ndarray = visits + spikes * cost(what, "spike") + run.packets * cost(what, "axon_out")
        return found

    def synapses(what: str) -> np.ndarray:
        work: np.ndarray = sum((run.synops[event] * cost(what, event) for event in SYNOPS), start=np.zeros(1))
        return run.messages * cost(what, "axon_in") + work

    barrier = chip.barrier.at(mapping.tiles).value
    time = np.maximum(neurons("time_ns"), synapses("time_ns")).max(axis=1) + barrier
    energy = (neurons("energy_pj") + synapses("energy_pj")).sum(axis=1)
    energy += run.hops[:, 0] * cost("energy_pj", "hop_ew") + run.hops[:, 1] * cost("energy_pj", "hop_ns")
    return time, energy


# ---- SANA-FE equals us ----------------------------------------------------------------------------------------------

CASES: list[tuple[int, tuple[str, ...]]] = [
    *((seed, ()) for seed in (0, 1, 3, 15)),
    (4, ("leak",)),
    (5, ("leak", "subtract")),
    (6, ("bias", "leak")),
    (7, ("bias", "subtract")),
    (8, ("skip",)),
    (16, ("skip", "leak", "bias")),
    (10, ("constant",)),
    (11, ("recurrent",)),
    (12, ("recurrent", "skip", "bias")),
    (13, ("parallel",)),
    (14, ("parallel", "constant", "leak")),
]


@pytest.mark.oracle
@pytest.mark.parametrize(("seed", "features"), CASES, ids=lambda value: str(value).replace("'", ""))
@pytest.mark.parametrize("chip", [chip_of(), chip_of(10, 2, 1, 2, column=1)], ids=["mesh", "several chips"])
def test_sanafe_equals_us(seed: int, features: tuple[str, ...], chip: Chip, sanafe: Callable[..., Any]) -> None:
    graph, inputs = network(seed, *features)
    mapping = map_network(graph, chip)
    assert len(mapping.cores) > len(graph.populations)
    trace = event_simulator.run(graph, inputs, threads=1)
    ours = replay(graph, mapping, inputs)
    result = sanafe(graph, mapping, chip, inputs)
    for population in graph.populations:
        window = slice(population.stage, population.stage + graph.steps)
        spikes = ours.spikes[population.name]
        np.testing.assert_array_equal(spikes[window], trace.spikes(population.name)[0], err_msg=population.name)
        assert spikes.sum() == spikes[window].sum()
        np.testing.assert_array_equal(result["spikes"][population.name], spikes.sum(axis=1), err_msg=population.name)
    assert sum(int(spikes.sum()) for spikes in ours.spikes.values()) > 20, "too few spikes to test anything"
    np.testing.assert_array_equal(result["packets"], ours.messages.sum(axis=1))
    np.testing.assert_array_equal(result["hops"], ours.hops.sum(axis=1))
    updated = np.array(result["updated"]) - np.array(result["input_spikes"])  # input neurons that fire count as updated
    np.testing.assert_array_equal(updated, sum(array.sum(axis=1) for array in ours.updated.values()))
    time, energy = expected_costs(mapping, chip, ours)
    np.testing.assert_allclose(np.array(result["sim_time"]) * 1e9, time, rtol=1e-9)
    np.testing.assert_allclose(np.array(result["step_energy"]) * 1e12, energy, rtol=1e-9)
    np.testing.assert_allclose(result["energy"]["total"] * 1e12, energy.sum(), rtol=1e-9)
    if "parallel" in features or "recurrent" in features:
        return  # we count one packet a projection, and none into the next sample
    workload = prepare(graph, mapping, trace)
    counts = count(workload, threads=1)
    check_counts(counts, ours, mapping)
    # our `simple` model, told which neurons SANA-FE updates
    timing = simulate_timing(workload, replace(counts, active=by_core(mapping, ours.updated)), chip, "simple")
    np.testing.assert_allclose(np.array(result["sim_time"]) * 1e9, timing.step_ticks * chip.tick_ns, rtol=1e-9)


def check_counts(counts: Counts, ours: Replay, mapping: Mapping) -> None:
    """Our counters against the replay: everything but the active neurons, whose definition differs."""
    np.testing.assert_array_equal(counts.messages_in, ours.messages)
    np.testing.assert_array_equal(counts.packets_out, ours.packets)
    np.testing.assert_array_equal(counts.spikes, by_core(mapping, ours.spikes))
    for event in SYNOPS:
        np.testing.assert_array_equal(counts.of(event), ours.synops[event], err_msg=event)
    totals = counts.by_projection.values()
    hops = [sum(total[key] for total in totals) for key in ("hops_ew", "hops_ns")]
    assert hops == ours.hops.sum(axis=0).tolist()


@pytest.mark.oracle
def test_costs_of_visits_may_be_told_by_activity(sanafe: Callable[..., Any]) -> None:
    """neuron_inactive and neuron_active have no counterpart by name; access and update can say the same."""
    chip = chip_of()
    costs = {"neuron_inactive": (3, 1), "neuron_active": (5, 2), "neuron_update": (7, 4)}
    events = {}
    for name, (energy, time) in costs.items():
        old = chip.event(name)
        pair = {key: getattr(old, key).model_copy(update={"value": float(value)})
                for key, value in (("energy_pj", energy), ("time_ns", time))}  # fmt: skip
        events[name] = old.model_copy(update=pair)
    chip = chip.model_copy(update={"events": chip.events.model_copy(update=events)})
    graph, inputs = network(3)
    mapping = map_network(graph, chip)
    result = sanafe(graph, mapping, chip, inputs)
    time, energy = expected_costs(mapping, chip, replay(graph, mapping, inputs))
    np.testing.assert_allclose(np.array(result["sim_time"]) * 1e9, time, rtol=1e-9)
    np.testing.assert_allclose(np.array(result["step_energy"]) * 1e12, energy, rtol=1e-9)


@pytest.mark.oracle
@pytest.mark.parametrize("timing", ["detailed", "cycle"])
def test_the_other_timings_run_to_the_same_spikes(timing: str, sanafe: Callable[..., Any]) -> None:
    graph, inputs = network(1, steps=3)
    chip = chip_of(16)
    mapping = map_network(graph, chip)
    result = sanafe(graph, mapping, chip, inputs, timing)
    simple = expected_costs(mapping, chip, replay(graph, mapping, inputs))[0]
    for population in graph.populations:
        counts = event_simulator.run(graph, inputs, threads=1).spike_counts(population.name)[0]
        window = slice(population.stage, population.stage + graph.steps)
        np.testing.assert_array_equal(result["spikes"][population.name][window], counts)
    assert len(result["sim_time"]) == len(simple)
    if timing == "detailed":
        assert (np.array(result["sim_time"]) * 1e9 >= simple * (1 - 1e-9)).all()


# ---- what it cannot run ---------------------------------------------------------------------------------------------


def one_layer(weights: np.ndarray | None = None, bits: int = 1, exponent: int = 0, **changes: Any) -> ProcessGraph:
    operator = Dense((3,), np.array([[3, -2, 4], [1, 1, 5]]) if weights is None else weights)
    zero = np.asarray(0)
    values = {"du": np.asarray(4095), "dv": zero, "vth": np.asarray(100), "bias_mant": zero, "bias_exp": zero}
    layer = Population("layer", operator.out_shape, LoihiNeuron(**(values | changes)), 1)
    link = Projection("link", "in", "layer", operator, exponent)
    return ProcessGraph("small", 4, 1e-3, (Input("in", (3,), bits),), (layer,), (link,), Readout("layer"))


@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [
        (one_layer(du=np.asarray(2000)), QuantizationError, r"'layer' filters its input \(du \+ ds_offset = 2001\)"),
        (one_layer(ds_offset=0), QuantizationError, "'layer' filters its input"),
        (one_layer(bits=4), BackendError, "'in' carries graded spikes"),
        (one_layer(exponent=-1), BackendError, "'link' shifts its sum right"),
        (one_layer(np.full((2, 3), 254), exponent=9), QuantizationError, "'layer': a current wraps"),
        (one_layer(np.full((2, 3), -254), exponent=6), QuantizationError, "'layer': a membrane saturates"),
    ],
)
def test_what_sanafe_does_not_compute_exactly_is_refused(
    graph: ProcessGraph, error: type[Exception], message: str, tmp_path: Path
) -> None:
    chip = load_chip("loihi-sanafe")
    inputs = {"in": np.ones((1, 4, 3), np.uint8)}
    place = replace(graph, inputs=(Input("in", (3,)),))
    mapping = replace(map_network(place, chip), graph=graph.fingerprint())
    with pytest.raises(error, match=message):
        write_sanafe(graph, mapping, chip, inputs, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_costs_without_counterpart_are_refused(tmp_path: Path) -> None:
    graph, inputs = one_layer(), {"in": np.ones((1, 4, 3), np.uint8)}
    chip = load_chip("loihi")
    with pytest.raises(ChipError, match=r"'loihi' has costs .*static power .*packets within a tile"):
        write_sanafe(graph, map_network(graph, chip), chip, inputs, tmp_path / "export")


def test_several_samples_are_refused(tmp_path: Path) -> None:
    graph, chip = one_layer(), load_chip("loihi-sanafe")
    with pytest.raises(BackendError, match="give it one sample, not 2"):
        write_sanafe(graph, map_network(graph, chip), chip, {"in": np.ones((2, 4, 3), np.uint8)}, tmp_path / "export")


def test_a_run_folder_is_exported_with_the_costs_that_sanafe_can_express(tmp_path: Path) -> None:
    text, _ = read_recipe_text("digits")
    folder = RunFolder.create(tmp_path / "run", text)
    shape = (1, 8, 8)
    operator = Dense(shape, 2 * np.random.default_rng(0).integers(-20, 40, (10, 64)))
    small = one_layer()
    layer = replace(small.populations[0], shape=(10,))
    link = Projection("link", "input", "layer", operator)
    steps = folder.recipe.network.steps
    graph = replace(small, steps=steps, inputs=(Input("input", shape),), populations=(layer,), projections=(link,))
    graph.save(folder.graph_file)
    mapping = map_network(graph, load_chip(folder.recipe.chip.name))
    write_json(folder.result_file("mapping"), mapping.to_json())
    place, chip = sanafe_stage(folder, 3)
    assert (folder.recipe.chip.name, chip) == ("loihi", "loihi-sanafe")
    names = {"arch.yaml", "network.net", "inputs.bin", "plan.json", "run_sanafe.py"}
    assert {path.name for path in place.iterdir()} == names
    stream = np.frombuffer((place / "inputs.bin").read_bytes(), np.uint8).reshape(-1, 64)
    np.testing.assert_array_equal(stream[:steps], folder.test_inputs["input"][3].reshape(steps, 64))
    assert (place / "network.net").read_text(encoding="utf-8").count("\ne ") == 640
    with pytest.raises(SpikeportError, match=r"no test sample 360; the test set has the samples 0\.\.359"):
        sanafe_stage(folder, 360)


def test_set_up_installs_the_sanafe_that_the_export_is_for() -> None:
    script = (Path(__file__).resolve().parents[1] / ".ci" / "setup-peers.sh").read_text(encoding="utf-8")
    assert f"sanafe=={SANAFE_VERSION} " in script


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    graph, chip = one_layer(), load_chip("loihi-sanafe")
    with pytest.raises(SpikeportError, match="no export"):
        write_sanafe(graph, map_network(graph, chip), chip, {"in": np.ones((1, 4, 3), np.uint8)}, tmp_path)
    assert (tmp_path / "thesis.tex").exists()
