"""`spikeport import`: a foreign file becomes a run folder on which every later stage works; what is wrong is named."""

import json
from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
from graph_strategies import one_thread  # noqa: F401

from spikeport.converters.nir_float import FloatNetwork
from spikeport.converters.nir_reader import read_nir
from spikeport.converters.nir_writer import write_nir
from spikeport.deploy import api
from spikeport.deploy.cli import main
from spikeport.deploy.run_folder import RunFolder
from spikeport.deploy.summary import Summary
from spikeport.models.errors import RecipeError, SpikeportError
from spikeport.models.recipe import parse_any_recipe, parse_recipe

STEPS, SAMPLES = 12, 24
CHOSEN = ["--dt", "1e-3", "--reset", "zero"]


def network(middle: nir.NIRNode | None = None) -> nir.NIRGraph:
    """A recurrent network of two populations that fire, as another library would write it: no metadata at all."""
    rng = np.random.default_rng(0)

    def lif(size: int) -> nir.LIF:
        return nir.LIF(np.full(size, 4e-3), np.full(size, 4.0), np.zeros(size), np.ones(size))

    nodes: dict[str, nir.NIRNode] = {
        "pixels": nir.Input({"input": np.array([9])}),
        "fc1": nir.Affine(rng.normal(0.2, 0.4, (8, 9)), rng.normal(0, 0.1, 8)),
        "hidden": lif(8) if middle is None else middle,
        "fc2": nir.Linear(rng.normal(0.1, 0.6, (3, 8))),
        "classes": lif(3),
        "output": nir.Output({"output": np.array([3])}),
    }
    edges = list(zip(nodes, list(nodes)[1:], strict=False))
    nodes["loop"] = nir.Linear(rng.normal(0, 0.2, (8, 8)))
    return nir.NIRGraph(nodes, [*edges, ("hidden", "loop"), ("loop", "hidden")], {}, type_check=False)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with foreign.nir and with inputs.npz, labels and calibration samples in it."""
    monkeypatch.chdir(tmp_path)
    write_nir(network(), tmp_path / "foreign.nir")
    rng = np.random.default_rng(1)
    x = (rng.random((2 * SAMPLES, STEPS, 9)) < 0.4).astype(np.int64)
    arrays = {"x": x[:SAMPLES], "y": rng.integers(0, 3, SAMPLES), "x_calibration": x[SAMPLES:]}
    np.savez(tmp_path / "inputs.npz", **arrays)
    return tmp_path


def run(*arguments: str) -> int:
    return main(list(arguments))


def test_every_stage_works_on_an_imported_network(place: Path) -> None:
    assert run("import", "foreign.nir", "--inputs", "inputs.npz", "-o", "run", *CHOSEN) == 0
    for stage in ("quantize", "map", "simulate", "verify", "report"):
        assert run(stage, "run") == 0, stage
    summary = Summary.model_validate(json.loads((place / "run" / "summary.json").read_text()))
    assert (summary.training.rule, summary.training.architecture) == ("imported", "9-8-3")
    assert summary.training.imported == "foreign.nir: dt = 0.001, reset zero, euler steps"
    assert summary.accuracy.validation_float is None
    assert {pair.mismatches for pair in summary.comparisons if pair.skipped is None} == {0}
    page = (place / "run" / "report.html").read_text()
    assert "imported from foreign.nir" in page
    assert "trained with" not in page


def test_the_float_trace_is_what_the_file_says(place: Path) -> None:
    assert run("import", "foreign.nir", "--inputs", "inputs.npz", "-o", "run", *CHOSEN) == 0
    folder = RunFolder.open(place / "run")
    with np.load(place / "inputs.npz") as stored:
        x, y = stored["x"], stored["y"]
    expected = FloatNetwork(network(), "network", dt=1e-3, reset="zero").run({"pixels": x})
    trace = folder.trace("float")
    for name in ("hidden", "classes"):
        np.testing.assert_array_equal(trace.spikes(name), expected[name].numpy())
        assert 0.02 < trace.spikes(name).mean() < 0.9
    decided = expected["classes"].sum(1).argmax(1).numpy()
    assert folder.result("import")["float_accuracy"] == pytest.approx(float((decided == y).mean()))


def test_the_choices_are_recorded_where_they_are_read_again(place: Path) -> None:
    chosen = ["--dt", "5e-4", "--reset", "subtract", "--discretization", "exponential", "--readout", "first_spike"]
    assert run("import", "foreign.nir", "--inputs", "inputs.npz", "-o", "run", *chosen) == 0
    folder = RunFolder.open(place / "run")
    node = read_nir(folder.nir_file).nodes["hidden"]
    assert node.metadata == {"dt": 5e-4, "reset": "subtract", "discretization": "exponential"}
    graph = folder.float_graph()
    assert (graph.dt, graph.steps, graph.readout.kind) == (5e-4, STEPS, "first_spike")
    assert graph.notes == {"discretization": "exponential", "reset": "subtract"}
    assert run("import", str(folder.nir_file), "--inputs", "inputs.npz", "-o", "again") == 0  # nothing left to choose


def test_without_labels_the_float_decisions_stand_in(place: Path) -> None:
    with np.load(place / "inputs.npz") as stored:
        np.save(place / "inputs.npy", stored["x"])
    assert run("import", "foreign.nir", "--inputs", "inputs.npy", "-o", "run", *CHOSEN) == 0
    folder = RunFolder.open(place / "run")
    assert "no labels" in folder.data.note
    assert "calibrated on the test samples themselves" in folder.data.note
    assert folder.result("import")["float_accuracy"] is None
    decided = folder.trace("float").spikes("classes").sum(axis=1).argmax(axis=1)
    np.testing.assert_array_equal(folder.data.test.labels, decided)


def test_a_built_in_data_set_by_its_recipe(place: Path) -> None:
    rng = np.random.default_rng(0)
    nodes = {
        "input": nir.Input({"input": np.array([1, 8, 8])}),
        "flat": nir.Flatten({"input": np.array([1, 8, 8])}, 0, -1),
        "fc": nir.Affine(rng.normal(0, 0.2, (10, 64)), np.zeros(10)),
        "out_": nir.IF(r=np.full(10, 1e3), v_threshold=np.ones(10)),
        "output": nir.Output({"output": np.array([10])}),
    }
    write_nir(nir.NIRGraph(nodes, list(zip(nodes, list(nodes)[1:], strict=False)), {}, type_check=False), Path("d.nir"))
    assert run("import", "d.nir", "--recipe", "digits", "-o", "run", *CHOSEN) == 0
    folder = RunFolder.open(place / "run")
    assert (folder.recipe.steps, len(folder.data.test), folder.data.name) == (8, 360, "digits")
    assert folder.trace("float").samples == 360


def test_what_the_chip_cannot_do_runs_in_floats_and_is_refused_by_quantize(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    middle = nir.LI(np.full(8, 4e-3), np.full(8, 4.0), np.zeros(8))
    write_nir(network(middle), place / "foreign.nir")
    assert run("import", "foreign.nir", "--inputs", "inputs.npz", "-o", "run", *CHOSEN) == 0
    reason = RunFolder.open(place / "run").result("import")["not_on_chip"]
    assert "'hidden' (LI)" in reason
    assert "only a membrane potential" in reason
    capsys.readouterr()
    assert run("quantize", "run") == 2
    assert "'hidden' (LI)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["foreign.nir", "--inputs", "inputs.npz"], "dt is not recorded"),
        (["foreign.nir", "--inputs", "inputs.npz", "--dt", "1e-3"], "reset is not recorded"),
        (["foreign.nir", *CHOSEN], "either --inputs FILE.npz or --recipe"),
        (["foreign.nir", "--inputs", "inputs.npz", "--recipe", "digits", *CHOSEN], "either --inputs"),
        (["foreign.nir", "--inputs", "missing.npz", *CHOSEN], "missing.npz does not exist"),
        (["foreign.nir", "--inputs", "wide.npz", *CHOSEN], "(samples, steps, 9)"),
        (["foreign.nir", "--inputs", "inputs.npz", "--steps", "5", *CHOSEN], "with 5 steps"),
        (["foreign.nir", "--inputs", "floats.npz", *CHOSEN], "spikes are integers"),
        (["foreign.nir", "--inputs", "more.npz", *CHOSEN], "it takes x, and optionally y"),
        (["foreign.nir", "--inputs", "foreign.nir", *CHOSEN], "no .npz or .npy file"),
        (["foreign.nir", "--inputs", "inputs.npz", "--readout", "membrane", *CHOSEN], "'membrane' does not fit"),
        (["foreign.pth", "--inputs", "inputs.npz", *CHOSEN], ".nir and .onnx can be imported"),
        (["nowhere.nir", "--inputs", "inputs.npz", *CHOSEN], "does not exist"),
    ],
)
def test_what_is_wrong_is_said_and_ends_with_status_2(
    arguments: list[str], said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "foreign.pth").write_bytes(b"")
    np.savez(place / "wide.npz", x=np.zeros((2, 3, 10), np.uint8))
    np.savez(place / "floats.npz", x=np.zeros((2, 3, 9)))
    np.savez(place / "more.npz", x=np.zeros((2, 3, 9), np.uint8), z=np.zeros(1))
    assert run("import", *arguments, "-o", "run") == 2
    assert said in capsys.readouterr().err
    assert not (place / "run").exists()


def test_an_imported_network_is_not_trained(place: Path) -> None:
    assert run("import", "foreign.nir", "--inputs", "inputs.npz", "-o", "run", *CHOSEN) == 0
    text = (place / "run" / "recipe.toml").read_text()
    parse_any_recipe(text, "imported")
    with pytest.raises(RecipeError, match="nothing to train"):
        parse_recipe(text, "imported")
    assert run("train", "run/recipe.toml", "-o", "other") == 2
    assert run("export", "run") == 2


@pytest.mark.parametrize("peer", ["norse", "snntorch", "spikingjelly"])
def test_an_import_is_exported_in_the_terms_of_another_library(peer: str, place: Path) -> None:
    assert run("import", "foreign.nir", "--inputs", "inputs.npz", "-o", "run", *CHOSEN) == 0
    assert run("export", "run", "--for", peer) == 0
    with np.load(place / "inputs.npz") as stored:
        x = stored["x"]
    stated = FloatNetwork(read_nir(place / "run" / f"foreign-{peer}.nir"), peer).run({"pixels": x}, ["classes"])
    expected = RunFolder.open(place / "run").trace("float").spikes("classes")
    assert float((stated["classes"].numpy() == expected).mean()) >= 0.999


def test_what_another_library_cannot_do_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("import", "foreign.nir", "--inputs", "inputs.npz", "-o", "run", *CHOSEN) == 0
    capsys.readouterr()
    assert run("export", "run", "--for", "sinabs") == 2
    assert "Sinabs" in capsys.readouterr().err
    assert run("export", "run", "--for", "norse", "--to", "lava") == 2


def test_the_same_from_python(place: Path) -> None:
    with np.load(place / "inputs.npz") as stored:
        inputs: dict[str, Any] = {"pixels": stored["x"]}
    exact = api.read_file("foreign.nir", dt=1e-3, reset="zero").run(inputs)["classes"]
    graph = api.convert_file("foreign.nir", inputs, dt=1e-3, reset="zero")
    events = api.simulate(graph, inputs, "events")
    assert api.verify(graph, api.simulate(graph, inputs, "torch"), events).equal
    assert float((events.spikes("classes") == exact.numpy()).mean()) > 0.9
    with pytest.raises(SpikeportError, match="dt is not recorded"):
        api.read_file("foreign.nir")
