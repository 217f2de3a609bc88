"""What a user meets at the command line: what works, and what each kind of bad input says."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from onnx_models import run as run_onnx

from spikeport.converters.graph import ProcessGraph
from spikeport.converters.nir_reader import read_nir
from spikeport.deploy.cli import main
from spikeport.deploy.run_folder import RunFolder
from spikeport.deploy.summary import Summary
from spikeport.deploy.trace import Trace
from spikeport.models.recipe import builtin_recipes

SMALL = """
name = "small"
seed = 3
[data]
set = "digits"
validation = 200
test = 100
[network]
architecture = "4C3p1-P2-10"
steps = 4
tau_mem = 5.0
tau_syn = 3.0
[training]
epochs = 4
batch_size = 25
learning_rate = 2e-2
[quantization]
calibration_samples = 20
[check]
lava_samples = 4
"""
STAGES = ("export", "quantize", "map", "simulate", "verify", "report")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with every stage but Lava done, by the stages one after another."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = folder / "small.toml"
    recipe.write_text(SMALL)
    assert main(["train", str(recipe), "-o", str(folder / "run")]) == 0
    for stage in STAGES:
        assert main([stage, str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be refused; return its message after checking that it is short and no traceback."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    message = capsys.readouterr().err.strip()
    assert message
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 2
    return message


def write_recipe(folder: Path, text: str) -> str:
    path = folder / "recipe.toml"
    path.write_text(text)
    return str(path)


def test_the_stages_leave_a_summary_whose_checks_pass(finished: Path) -> None:
    summary = Summary.load(finished / "summary.json")
    assert summary.checks_failed == []
    assert summary.accuracy.simulated.samples == 100
    assert {pair.second for pair in summary.comparisons if pair.mismatches == 0} == {"events"}
    assert summary.accuracy.lava_skipped == "not run"
    assert sum(sum(row) for row in summary.confusion) == 100
    assert (finished / "report.html").stat().st_size > 10_000


def test_the_summary_agrees_with_the_trace(finished: Path) -> None:
    summary, trace = Summary.load(finished / "summary.json"), Trace.load(finished / "trace-events.npz")
    for layer in summary.layers:
        spikes = trace.spikes(layer.name)
        assert layer.spikes_per_inference == pytest.approx(spikes.sum() / 100)
        assert layer.firing_rate == pytest.approx(spikes.mean())
        assert layer.silent_share == pytest.approx(1 - spikes.any(axis=1).mean())
    assert sum(layer.dense_macs_per_inference for layer in summary.layers) == summary.reference.dense_macs
    parts = sum(part.energy_nj for part in summary.cost.parts)
    assert parts == pytest.approx(summary.cost.energy_nj_per_inference)


def test_training_again_with_the_same_seed_gives_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    assert main(["train", str(finished / "recipe.toml"), "-o", str(tmp_path)]) == 0
    again, first = RunFolder.open(tmp_path), RunFolder.open(finished)
    assert {**again.result("train"), "seconds": 0} == {**first.result("train"), "seconds": 0}
    for name, packed in first.trace("float").packed.items():
        assert np.array_equal(packed, again.trace("float").packed[name])


def test_a_stage_can_be_run_again_alone(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "trace-events.npz").unlink()
    assert main(["simulate", str(run), "--backend", "events"]) == 0
    assert main(["report", str(run)]) == 0
    assert (run / "summary.json").is_file()


def test_a_spike_that_differs_is_named_and_the_status_is_1(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = Trace.load(run / "trace-events.npz")
    trace.packed["conv1"][7, 2, 3] ^= 0b00010000
    trace.save(run / "trace-events.npz")
    capsys.readouterr()
    assert main(["verify", str(run)]) == 1
    message = capsys.readouterr().err
    assert "conv1, sample 7, step 2, neuron 27" in message
    assert "1 of " in message


def test_a_wrong_synop_count_is_named_and_the_status_is_1(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = Trace.load(run / "trace-events.npz")
    trace.synops["input->conv1"][0, 0] += 1
    trace.save(run / "trace-events.npz")
    capsys.readouterr()
    assert main(["verify", str(run)]) == 1
    assert "input->conv1" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "train", *STAGES, "bundle", "doctor", "chips", "recipes"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Usage: spikeport")
    assert len(text) > 150


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name, text in builtin_recipes().items():
        assert name in listed
        assert main(["recipes", name]) == 0
        assert capsys.readouterr().out == text


def test_chips_are_listed_and_printed_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chips"]) == 0
    assert "loihi-sanafe" in capsys.readouterr().out
    assert main(["chips", "loihi"]) == 0
    assert "Davies" in capsys.readouterr().out


def test_doctor_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("PyTorch", "GPU", "Numba", "Lava", "Loihi"):
        assert word in text


def test_bundle_writes_one_folder_with_its_commands(run: Path, tmp_path: Path) -> None:
    assert main(["bundle", str(run), "--samples", "3", "-o", str(tmp_path / "elsewhere")]) == 0
    assert main(["bundle", str(run)]) == 0
    for folder, samples in ((tmp_path / "elsewhere", 3), (run / "bundle", 4)):
        names = {path.name for path in folder.iterdir()}
        assert names == {"README.md", "bundle.json", "network.npz", "run_lava.py", "stream.npz"}
        assert json.loads((folder / "bundle.json").read_text())["samples"] == samples
    text = (run / "bundle" / "README.md").read_text()
    for words in (
        "python run_lava.py  ",
        "PARTITION=<partition> python run_lava.py --hardware",
        "spikeport simulate DIR --from",
        "21 bits",
        "ds_offset",
        "Nothing in this network is known to exist in the simulator alone",
    ):
        assert words in text
    assert "{" not in text


def test_a_bundle_takes_no_more_samples_than_there_are(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has 100 samples; 101 were asked for" in fails(capsys, "bundle", str(run), "--samples", "101")


# what a bundle leaves elsewhere, here made of the torch trace


@pytest.fixture
def result(run: Path, tmp_path: Path) -> Path:
    """A trace as the runner of a bundle writes it: the first four samples."""
    head = replace(Trace.load(run / "trace-torch.npz").head(4), backend="lava", active={})
    head.save(tmp_path / "trace-lava.npz")
    return tmp_path / "trace-lava.npz"


def test_results_from_elsewhere_go_into_verify_and_the_report(run: Path, result: Path) -> None:
    assert main(["simulate", str(run), "--from", str(result)]) == 0
    replace(Trace.load(result), backend="loihi2").save(result)
    assert main(["simulate", str(run), "--from", str(result)]) == 0
    assert main(["verify", str(run)]) == 0
    assert main(["report", str(run)]) == 0
    summary = Summary.load(run / "summary.json")
    expected = {"events": (100, 0), "lava": (4, 0), "loihi2": (4, 0)}
    assert {pair.second: (pair.samples, pair.mismatches) for pair in summary.comparisons} == expected
    assert summary.accuracy.lava == summary.accuracy.loihi2
    assert summary.accuracy.loihi2 is not None
    assert summary.accuracy.loihi2.samples == 4
    assert "Accuracy, Loihi 2" in (run / "report.html").read_text()


def test_a_result_of_other_samples_or_another_network_is_refused(
    run: Path, result: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Trace.load(result)
    later = Trace.load(run / "trace-torch.npz").packed["input"][4:8]
    replace(good, packed=good.packed | {"input": later}).save(result)
    assert "not made from the first 4 test samples" in fails(capsys, "simulate", str(run), "--from", str(result))
    replace(good, graph="0" * 16).save(result)
    assert "another network" in fails(capsys, "simulate", str(run), "--from", str(result))
    replace(good, backend="torch").save(result)
    assert "made by 'torch'" in fails(capsys, "simulate", str(run), "--from", str(result))
    assert "goes with no other option" in _usage(capsys, "simulate", str(run), "--from", str(result), "--gpu-energy")
    assert not (run / "trace-lava.npz").exists()


def _usage(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


# ---- verify A B ------------------------------------------------------------------------------------------------------


@pytest.fixture
def flipped(run: Path) -> Path:
    """The network of the run with its kernel flipped."""
    graph = ProcessGraph.load(run / "graph.npz")
    first, *rest = graph.projections
    operator = first.operator.with_weight(first.operator.weight[..., ::-1, ::-1].copy())
    replace(graph, projections=(replace(first, operator=operator), *rest)).save(run / "flipped.npz")
    return run / "flipped.npz"


def test_two_backends_of_a_folder_are_compared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run), "torch", "events"]) == 0
    written = json.loads((run / "verify-torch-events.json").read_text())
    assert (written["mismatches"], written["divergence"]) == (0, None)
    text = capsys.readouterr().out
    assert [text.count(word) for word in ("conv1", "dense1", "100 %")] == [1, 1, 2]
    # one name is compared with torch
    assert main(["verify", str(run), "events"]) == 0
    assert "spikeport simulate" in fails(capsys, "verify", str(run), "torch", "lava")


def test_stored_traces_are_compared_with_their_network(
    run: Path,
    result: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPIKEPORT_LAVA_PYTHON", str(tmp_path / "no-python"))
    moved = Path(shutil.copy(run / "trace-torch.npz", tmp_path / "somewhere.npz"))
    assert "which network made these traces" in fails(capsys, "verify", str(moved), str(result))
    graph = ["--graph", str(shutil.copy(run / "graph.npz", tmp_path / "graph.npz"))]
    assert main(["verify", str(moved), str(result), *graph]) == 0
    # beside a run folder's own files the network is found
    assert main(["verify", str(run / "trace-torch.npz"), str(result)]) == 0

    trace = Trace.load(result)
    trace.packed["conv1"][2, 1, 3] ^= 0b00010000
    trace.save(result)
    capsys.readouterr()
    findings = tmp_path / "findings.json"
    assert main(["verify", str(moved), str(result), *graph, "--json", str(findings)]) == 1
    shown = capsys.readouterr()
    assert "conv1, sample 2, step 1, neuron 27" in shown.err
    for words in (
        "conv1, sample 2, step 1, neuron 27 (channel 0, row 3, column 3)",
        "incoming current",
        "source",
        "the states on Lava are not known",
    ):
        assert words in shown.out
    (found,) = json.loads(findings.read_text())
    assert found["divergence"]["place"] == {
        "population": "conv1",
        "sample": 2,
        "step": 1,
        "neuron": 27,
        "membrane": False,
    }
    assert [side["follows"] for side in found["divergence"]["explanation"]["sides"]] == [True, False]


def test_two_networks_are_compared_on_one_backend_if_asked_for(
    run: Path, flipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graphs = ["--graph", str(run / "graph.npz"), "--graph", str(flipped)]
    assert main(["verify", str(run), "torch", "torch", *graphs]) == 1
    shown = capsys.readouterr()
    assert "torch flipped" in shown.out
    assert "input->conv1: the kernel is flipped in both axes" in shown.err
    # the folder's findings are of its own network
    assert not list(run.glob("verify-*"))
    message = fails(capsys, "verify", str(run), str(run / "trace-torch.npz"), "events", "--graph", str(flipped))
    assert "another network" in message
    assert "a --graph for each" in message


def test_another_network_runs_on_two_backends(run: Path, flipped: Path) -> None:
    assert main(["verify", str(run), "torch", "events", "--graph", str(flipped)]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("DIR", "torch", "nonsense"), "'nonsense' is neither a backend (torch, events, lava, loihi2) nor the file"),
        (("torch", "events", "--graph", "GRAPH"), "'torch' needs a run folder"),
        (
            ("DIR", "torch", "events", "--graph", "GRAPH", "--graph", "GRAPH", "--graph", "GRAPH"),
            "3 networks are given",
        ),
        (("nowhere", "torch", "events"), "not a run folder"),
    ],
)
def test_wrong_places_are_named(
    arguments: tuple[str, ...], words: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"DIR": str(run), "GRAPH": str(run / "graph.npz")}
    assert words in fails(capsys, "verify", *(places.get(each, each) for each in arguments))


def test_too_many_places_are_a_wrong_use(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "4 places are given" in _usage(capsys, "verify", str(run), "torch", "events", "lava")
    assert "--graph is for two traces" in _usage(capsys, "verify", str(run), "--graph", str(run / "graph.npz"))


@pytest.mark.oracle
def test_exported_onnx_gives_the_spikes_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--to", "onnx"]) == 0
    assert capsys.readouterr().out.count("wrote ") == 2
    folder = RunFolder.open(run)
    trace = folder.trace("torch")
    found = run_onnx(folder.onnx_file("window"), {name: array[:50] for name, array in folder.test_inputs.items()})
    for population in folder.graph.populations:
        spikes = found[f"{population.name}.spikes"].reshape(50, trace.steps, -1)
        np.testing.assert_array_equal(spikes, trace.head(50).spikes(population.name))
    assert folder.onnx_file("step").is_file()


def test_an_unknown_recipe_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "run", "digit")
    assert "'digit'" in message
    assert "'digits'" in message


def test_a_missing_recipe_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "nowhere.toml does not exist" in fails(capsys, "run", str(tmp_path / "nowhere.toml"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("epochs", "epoch"), ("training.epoch", "did you mean 'epochs'")),
        (("steps = 4", 'steps = "four"'), ("network.steps", "'four'")),
        (("4C3p1-P2-10", "4C3p1-Q2-10"), ("'Q2'",)),
        (("4C3p1-P2-10", "4C3p1-P2-9"), ("10 neurons",)),
        (("tau_mem = 5.0", "tau_mem = 0.5"), ("network.tau_mem",)),
        (('set = "digits"', 'set = "digts"'), ("data.set", "'digts'")),
        (("test = 100", "test = 1700"), ("none to train on",)),
        (("[check]", '[chip]\nname = "loihi7"\n[check]'), ("'loihi7'", "loihi")),
        (("[check]", "[check"), ("not valid TOML",)),
    ],
    ids=["key", "type", "layer", "classes", "range", "data", "empty", "chip", "syntax"],
)
def test_a_wrong_recipe_is_refused_before_anything_is_trained(
    change: tuple[str, str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, SMALL.replace(*change))
    message = fails(capsys, "run", recipe, "-o", str(tmp_path / "run"))
    for word in words:
        assert word in message
    assert not list(tmp_path.glob("run/checkpoint*"))


def test_mnist_without_its_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIKEPORT_DATA", str(tmp_path))
    assert "train-images-idx3-ubyte.gz" in fails(capsys, "train", "mnist", "-o", str(tmp_path / "run"))


def test_a_truncated_data_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIKEPORT_DATA", str(tmp_path))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b half a file")
    assert "damaged" in fails(capsys, "train", "mnist", "-o", str(tmp_path / "run"))


def test_an_output_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    message = fails(capsys, "run", "digits", "-o", str(tmp_path / "file" / "run"))
    assert "cannot write" in message
    assert str(tmp_path / "file") in message


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_is_no_run(stage: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "not a run folder" in fails(capsys, stage, str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("stage", "file", "command"),
    [
        ("export", "checkpoint.pt", "spikeport train"),
        ("quantize", "small.nir", "small.nir"),
        ("map", "graph.npz", "spikeport quantize"),
        ("simulate", "graph.npz", "spikeport quantize"),
        ("verify", "trace-torch.npz", "spikeport simulate"),
        ("report", "trace-events.npz", "spikeport simulate"),
        ("report", "mapping.json", "spikeport map"),
        ("report", "verify.json", "spikeport verify"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_truncated_file_is_named_with_its_command(
    stage: str, file: str, command: str, damage: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = fails(capsys, stage, str(run))
    assert file in message
    assert command in message


def _change_nir(run: Path, change: str) -> None:
    path = run / "small.nir"
    with h5py.File(path, "r+") as file:
        nodes = file["node/nodes"]
        if change == "node":
            del nodes["conv1"]
            nodes["conv1/type"] = "LI"
            for name in ("tau", "r", "v_leak"):
                nodes[f"conv1/{name}"] = np.ones((4, 8, 8))
        elif change == "edge":
            edges = file["node/edges"][()]
            del file["node/edges"]
            file["node/edges"] = [edge for edge in edges if edge[0] != b"input"]
        elif change == "nan":
            weight = nodes["conv1_weight/weight"]
            values = weight[()]
            values[0, 0, 1, 1] = np.nan
            weight[...] = values


@pytest.mark.parametrize(
    ("change", "words"),
    [("node", ("conv1", "LI", "no spikes")), ("edge", ("conv1_weight",)), ("nan", ("conv1_weight", "NaN"))],
)
def test_a_wrong_nir_file_is_refused(
    change: str, words: tuple[str, ...], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read_nir(run / "small.nir")
    _change_nir(run, change)
    message = fails(capsys, "quantize", str(run))
    for word in words:
        assert word in message


def test_a_network_that_does_not_fit_says_by_how_much(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chip = tmp_path / "tiny.toml"
    assert main(["chips", "loihi", "--toml"]) == 0
    text = capsys.readouterr().out
    chip.write_text(text.replace("max_chips = 32", "max_chips = 1").replace("neurons = 1024", "neurons = 1"))
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text() + f'\n[chip]\nname = "{chip}"\n')
    message = fails(capsys, "map", str(run))
    assert "'conv1' does not fit" in message
    assert "128 cores" in message
    assert "needs 2 neurons, a core has 1 (1 too many)" in message


def test_map_prints_the_use_of_each_core_and_the_hops(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["map", str(run)]) == 0
    text = capsys.readouterr().out
    for word in ("conv1", "dense1", "axons out", "4,096", "Weighted hops"):
        assert word in text
    hops = RunFolder.open(run).result("map")["weighted_hops"]
    assert hops["placed"] <= min(hops["greedy"], hops["random"])


def test_map_lists_many_cores_only_if_asked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text() + f"\n[chip.pins]\nconv1 = {list(range(100, 164))}\n")
    capsys.readouterr()
    assert main(["map", str(run)]) == 0
    short = capsys.readouterr().out
    assert main(["map", str(run), "--all"]) == 0
    long = capsys.readouterr().out
    assert "--all" in short
    assert short.count("conv1") == 1
    assert long.count("conv1") == 64
    cores = [core.chip * 128 + core.core for core in RunFolder.open(run).mapping().cores if core.population == "conv1"]
    assert cores == list(range(100, 164))


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        ("conv = [0]", ("'conv'", "'conv1'")),
        ("conv1 = [4096]", ("4096", "0..4095")),
        ("conv1 = [1, 2]\ndense1 = [2]", ("core 2", "'conv1'", "'dense1'")),
    ],
)
def test_wrong_pins_are_refused_by_map(
    pins: str, words: tuple[str, ...], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = run / "recipe.toml"
    recipe.write_text(f"{recipe.read_text()}\n[chip.pins]\n{pins}\n")
    message = fails(capsys, "map", str(run))
    for word in words:
        assert word in message


def test_graded_input_is_refused_by_a_chip_with_binary_spikes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = SMALL.replace("[training]", '[encoder]\nname = "graded"\nmessage_bits = 4\n[training]')
    folder = str(tmp_path / "run")
    assert main(["train", write_recipe(tmp_path, text), "-o", folder]) == 0
    assert main(["export", folder]) == 0
    assert main(["quantize", folder]) == 0
    assert "input" in fails(capsys, "map", folder)
    assert main(["simulate", folder]) == 0
    assert main(["verify", folder]) == 0


def test_fewer_bits_and_what_each_population_costs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the terminal, in quantize.json, in the summary; the stages after it run on."""
    words = Summary.load(run / "summary.json").chip.cores
    capsys.readouterr()
    assert main(["quantize", str(run), "--bits", "4", "--sensitivity"]) == 0
    said = capsys.readouterr().out
    assert "4-bit weights" in said
    assert "most sensitive: " in said
    found = RunFolder.open(run).result("quantize")
    rows = {each["population"]: each for each in found["sensitivity"]["populations"]}
    assert list(rows) == ["conv1", "dense1"]
    assert (found["weight_bits"], found["sensitivity"]["samples"]) == (4, 200)
    for projection in RunFolder.open(run).graph.projections:
        assert projection.weight_bits == 4
        assert not np.any(projection.operator.weight % 32)
    for stage in ("map", "simulate", "verify", "report"):
        assert main([stage, str(run)]) == 0
    summary = Summary.load(run / "summary.json")
    assert {layer.name: layer.accuracy_alone for layer in summary.layers} == {n: rows[n]["alone"] for n in rows}
    assert [layer.weight_bits for layer in summary.layers] == [4, 4]
    assert summary.sensitivity is not None
    assert summary.sensitivity.float_accuracy == found["sensitivity"]["float_accuracy"]
    assert "Which population costs accuracy" in (run / "report.html").read_text()
    fewer = sum(core.synaptic_words for core in summary.chip.cores)
    assert fewer < 0.8 * sum(core.synaptic_words for core in words)
    assert main(["quantize", str(run)]) == 0
    assert "sensitivity" not in RunFolder.open(run).result("quantize")


@pytest.mark.parametrize("bits", ["1", "9", "x"])
def test_bits_that_no_weight_has_are_refused(bits: str, run: Path) -> None:
    assert main(["quantize", str(run), "--bits", bits]) == 2


def test_no_lava_is_a_clear_refusal_for_the_stage(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIKEPORT_LAVA_PYTHON", str(run / "no-python"))
    assert "no-python" in fails(capsys, "simulate", str(run), "--backend", "lava")


def test_ctrl_c_ends_with_130_and_leaves_no_half_written_file(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, SMALL.replace("epochs = 4", "epochs = 100000"))
    # a shell lets what it starts in the background ignore Ctrl-C, and this process would hand that on
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "spikeport.deploy.cli", "train", recipe, "-o", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    line = process.stdout.readline()
    while line and "epoch" not in line:
        line = process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"recipe.toml", "training.pt"}
