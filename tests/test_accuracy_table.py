"""The table of accuracies: which musts stored results hold, and how the table is written."""

import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from report_examples import make_summary
from rich.console import Console

from spikeport.deploy.run_folder import RunFolder
from spikeport.models.errors import SpikeportError
from spikeport.models.files import write_json
from spikeport.models.recipe import builtin_recipes, parse_recipe

ROOT = Path(__file__).parents[1]


def load() -> ModuleType:
    """`bench/accuracy.py`, which is a program and no part of the package."""
    spec = importlib.util.spec_from_file_location("accuracy_table", ROOT / "bench" / "accuracy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


table = load()


def result(recipe: str, seed: int = 1, percent: float = 99.5, **changes: Any) -> dict[str, Any]:
    """What is stored of a run, as it comes out of a summary, with an accuracy and whatever else a test is about."""
    edits = dict(next(row.edits for row in table.ROWS if row.recipe == recipe))
    folder = RunFolder(Path("unused"))
    folder.__dict__["recipe_text"] = table.edited(recipe, {"seed": str(seed)} | edits)
    stored: dict[str, Any] = table.measured(make_summary(), folder, recipe, seed, edits)
    assert json.loads(json.dumps(stored)) == stored
    return stored | {"test_float": percent / 100, "test_quantized": percent / 100 - 0.001} | changes


def stored(*results: dict[str, Any]) -> dict[str, Any]:
    return {f"{each['recipe']} {each['seed']}": each for each in results}


def check(results: dict[str, Any], words: str) -> Any:
    """The one must whose text holds these words."""
    (found,) = [each for each in table.checks(results) if words in each.text]
    return found


def everything() -> dict[str, Any]:
    """Results under which every must is held."""
    thrifty = [result("mnist", seed, 99.5, spikes_per_image=700.0) for seed in (1, 2, 3)]
    plain = [result("mnist-tssl", seed, 99.45, spikes_per_image=1000.0) for seed in (1, 2, 3)]
    rest = [
        result(row.recipe, percent=(row.must or 90) + (0.2 if row.recipe == "cifar10-cnn1" else 0.1))
        for row in table.ROWS
        if row.recipe not in ("mnist", "mnist-tssl")
    ]
    return stored(*thrifty, *plain, *rest)


# --- The musts -------------------------------------------------------------------------------------------------------


def test_results_of_a_recipe_that_was_changed_since_do_not_count() -> None:
    found = result("mnist-stbp")
    old = found | {"recipe_text": found["recipe_text"].replace("epochs", "# epochs")}
    words = "mnist-stbp: test accuracy"
    assert check(stored(found), words).held
    assert not check(stored(old), words).held
    assert "recipe changed since" not in table.markdown(stored(found))
    assert "recipe changed since" in table.markdown(stored(old))


def test_every_row_is_a_built_in_recipe_and_its_edits_are_keys_of_it() -> None:
    for row in table.ROWS:
        assert row.recipe in builtin_recipes()
        parse_recipe(table.edited(row.recipe, dict(row.edits)), row.recipe)
    assert len({row.recipe for row in table.ROWS}) == len(table.ROWS)


def test_every_must_can_be_held() -> None:
    found = table.checks(everything())
    assert [each.text for each in found if not each.held] == []
    assert len(found) > 2 * len(table.ROWS)


@pytest.mark.parametrize("missing", [row.recipe for row in table.ROWS])
def test_a_row_without_a_result_is_missed_unless_it_needs_a_gpu(missing: str) -> None:
    row = next(row for row in table.ROWS if row.recipe == missing)
    results = {key: each for key, each in everything().items() if each["recipe"] != missing}
    found = [each for each in table.checks(results) if each.text.startswith(f"{missing}:")]
    if row.gpu or row.must is None:
        assert found == []
    else:
        (only,) = found
        assert (only.found, only.held) == ("not run yet", False)


@pytest.mark.parametrize(
    ("percent", "held", "says"),
    [(99.4, True, "99.40 %"), (99.39, False, "99.39 %"), (99.53, True, "99.53 %"), (9.8, False, "9.80 %")],
)
def test_an_accuracy_is_held_from_its_must_on(percent: float, held: bool, says: str) -> None:
    found = check(stored(result("mnist", percent=percent)), "mnist: test accuracy >= 99.4 %")
    assert (found.found, found.held) == (says, held)


def test_the_mean_over_seeds_is_held_to_the_must() -> None:
    results = stored(*(result("mnist-stbp", seed, percent) for seed, percent in ((1, 99.0), (2, 99.1), (3, 99.5))))
    found = check(results, "mnist-stbp: test accuracy")
    assert (found.found, found.held) == ("99.20 %", True)


def test_a_try_with_another_recipe_counts_for_nothing() -> None:
    short = result("mnist-stbp", edits={"epochs": "2"})
    assert check(stored(short), "mnist-stbp: test accuracy").found == "not run yet"
    whole = result("nmnist", edits={})  # the row is on a subset
    assert table.of_recipe(stored(whole), "nmnist") == []


@pytest.mark.parametrize(
    ("quantized", "held", "says"),
    [
        (0.9950, True, "+0.00 points"),
        (0.9960, True, "+0.10 points"),
        (0.9920, True, "-0.30 points"),
        (0.9919, False, "-0.31 points"),
        (0.5, False, "-49.50 points"),
    ],
)
def test_eight_bits_may_cost_three_tenths_of_a_point(quantized: float, held: bool, says: str) -> None:
    found = check(stored(result("mnist", 2, test_quantized=quantized)), "mnist, seed 2: quantised within 0.3 points")
    assert (found.found.replace("-0.00", "+0.00"), found.held) == (says, held)


@pytest.mark.parametrize(
    ("differing", "held", "says"),
    [
        ({"torch = events": 0, "torch = lava": 0}, True, "0 of 1,010 differ"),
        ({"torch = events": 0, "torch = lava": 3}, False, "3 of 1,010 differ"),
        ({"torch = events": 2, "torch = lava": 3}, False, "5 of 1,010 differ"),
        ({"torch = events": 0, "torch = lava": None}, True, "0 of 1,000 differ"),  # skipped
        ({"torch = events": None, "torch = lava": None}, False, "0 of 0 differ"),  # nothing was compared
        ({}, False, "0 of 0 differ"),
    ],
)
def test_backends_that_differ_are_a_must_that_is_missed(
    differing: dict[str, int | None], held: bool, says: str
) -> None:
    compared = {"torch = events": 1000, "torch = lava": 10}
    found = check(stored(result("mnist", differing=differing, compared=compared)), "mnist, seed 1: backends equal")
    assert (found.found, found.held) == (says, held)
    assert all((pair in found.text) == (count is not None) for pair, count in differing.items())


def seeds(recipe: str, numbers: list[int], percent: float, spikes: float) -> list[dict[str, Any]]:
    return [result(recipe, seed, percent, spikes_per_image=spikes) for seed in numbers]


@pytest.mark.parametrize(
    ("ours", "theirs", "accurate", "sparse", "says"),
    [
        ((99.5, 750), (99.5, 1000), True, True, "25.0 % fewer"),
        ((99.5, 760), (99.5, 1000), True, False, "24.0 % fewer"),
        ((99.4, 500), (99.5, 1000), False, True, "50.0 % fewer"),
        ((99.6, 1100), (99.5, 1000), True, False, "-10.0 % fewer"),
    ],
)
def test_csbp_beside_tssl(
    ours: tuple[float, float], theirs: tuple[float, float], accurate: bool, sparse: bool, says: str
) -> None:
    results = stored(*seeds("mnist", [1, 2, 3], *ours), *seeds("mnist-tssl", [1, 2, 3], *theirs))
    assert check(results, "csbp at least as accurate as tssl").held is accurate
    found = check(results, "csbp has >= 25 % fewer spikes than tssl")
    assert (found.found, found.held) == (says, sparse)


def test_csbp_beside_tssl_is_over_the_seeds_of_both() -> None:
    outlier = seeds("mnist", [4], 10.0, 9000)
    results = stored(*seeds("mnist", [1, 2, 3], 99.5, 700), *outlier, *seeds("mnist-tssl", [1, 2, 3, 5], 99.4, 1000))
    assert check(results, "csbp at least as accurate as tssl").found == "99.50 and 99.40 %"
    assert check(results, "fewer spikes than tssl").found == "30.0 % fewer"


@pytest.mark.parametrize(
    ("ours", "theirs", "says"), [([1, 2, 3], [2, 3], "2, 3"), ([1, 2], [3, 4], "none"), ([], [1, 2, 3], "none")]
)
def test_csbp_beside_tssl_wants_three_seeds_of_both(ours: list[int], theirs: list[int], says: str) -> None:
    results = stored(*seeds("mnist", ours, 99.9, 10), *seeds("mnist-tssl", theirs, 99.4, 1000))
    found = check(results, "csbp at least as accurate as tssl")
    assert (found.found, found.held) == (f"seeds of both: {says}", False)


def test_cifar10_is_compared_where_both_were_run() -> None:
    text = "CIFAR-10 CNN1: csbp above tssl"
    ours, theirs = result("cifar10-cnn1", percent=89.0), result("cifar10-cnn1-tssl", percent=88.9)
    assert check(stored(ours, theirs), text).held
    assert not check(stored(ours | {"test_float": 0.889}, theirs), text).held
    assert not [each for each in table.checks(stored(ours)) if each.text == text]


# --- The table -------------------------------------------------------------------------------------------------------


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table of a Markdown text."""
    blocks = re.findall(r"(?:^\|.*\|\n?)+", text, flags=re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()] for block in blocks]


def test_the_markdown_holds_every_row_must_and_run() -> None:
    results = everything()
    accuracy, musts, runs = tables(table.markdown(results))
    for cells in (accuracy, musts, runs):
        assert len({len(line) for line in cells}) == 1  # no cell too many or too few
    assert len(accuracy) == 2 + len(table.ROWS)
    assert len(musts) == 2 + len(table.checks(results))
    assert [line[0].strip("`") for line in runs[2:]] == [each["command"] for each in results.values()]
    csbp = accuracy[2 + [row.recipe for row in table.ROWS].index("mnist")]
    assert csbp[1] == "csbp (reconstruction)"
    assert csbp[3:9] == [">= 99.4", "99.50 ± 0.00", "99.40 ± 0.00", "1, 2, 3", "20", "700"]
    assert csbp[9] == "conv1 71, conv2 64, hidden 42, output 10"
    assert "events = lava: 0 of" in runs[2][8]


def test_the_markdown_of_no_result_says_so() -> None:
    accuracy, musts, runs = tables(table.markdown({}))
    said = {row.recipe: line[4] for row, line in zip(table.ROWS, accuracy[2:], strict=True)}
    assert said["mnist"] == "not run yet"
    assert said["cifar10-cnn1"] == "not run: needs a GPU"
    assert {line[2] for line in musts[2:]} == {"**no**"}
    assert runs[2:] == []


def test_a_part_of_a_data_set_is_marked_in_the_table_and_named_below() -> None:
    note = "subset: 300 of 60,000 recordings"
    text = table.markdown(stored(result("nmnist", percent=85.0, dataset="nmnist", dataset_note=note)))
    (line,) = [line for line in tables(text)[0] if line[0].startswith("N-MNIST")]
    assert line[3:5] == ["report", "85.00 (subset)"]
    assert f"- nmnist: {note}" in text


def test_a_skipped_backend_is_skipped_in_the_markdown() -> None:
    lava = {"torch = lava": None}
    runs = tables(table.markdown(stored(result("mnist", differing=lava, compared={"torch = lava": 64}))))[2]
    assert runs[2][8] == "torch = lava: skipped"


def test_the_console_shows_the_same_table_and_whether_every_must_is_held() -> None:
    console = Console(width=300, record=True, file=io.StringIO())
    assert table.show(everything(), console)
    text = console.export_text()
    assert "99.50 ± 0.00" in text
    assert "held" in text
    assert "missed" not in text
    missed = everything()
    missed["mnist-stbp 1"]["test_float"] = 0.98
    assert not table.show(missed, console)
    (line,) = [line for line in console.export_text().splitlines() if "mnist-stbp: test accuracy" in line]
    assert "98.00 %" in line
    assert "missed" in line


# --- The program -----------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(table, "DOCS", tmp_path)
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results.json")
    return tmp_path / "results.json"


def program(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments])
    status: int = table.main()
    return status


def test_the_exit_status_says_whether_every_must_is_held(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program(monkeypatch) == 1  # nothing was run
    assert "not run yet" in capsys.readouterr().out
    write_json(results, everything())
    assert program(monkeypatch) == 0
    assert "missed" not in capsys.readouterr().out
    results.write_text("{")
    assert program(monkeypatch) == 2
    assert "results.json" in capsys.readouterr().err


def test_an_edit_that_changes_nothing_is_refused(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for edit, says in (("patience=3", "0 lines for the key 'patience'"), ("epochs", "write KEY=VALUE")):
        assert program(monkeypatch, "run", "mnist", "--set", edit, "--runs", str(tmp_path / "runs")) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(SpikeportError, match="lines for the key 'name'"):
        table.edited("mnist", {"name": '"other"'})
    assert not results.exists()


TINY = {
    "architecture": '"2C3s2-10"',
    "steps": "4",
    "epochs": "2",
    "threshold": "0.2",
    "validation": "1600",
    "test": "60",
    "calibration_samples": "40",
}


def test_a_run_goes_through_the_whole_pipeline_and_is_stored(
    tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIKEPORT_LAVA_PYTHON", str(tmp_path / "no-python"))
    write_json(results, stored(result("mnist")))
    found = table.run("digits", 3, tmp_path / "runs", results, TINY)
    recipe = parse_recipe(found["recipe_text"], "stored")
    assert (recipe.seed, recipe.training.epochs, recipe.network.architecture) == (3, 2, "2C3s2-10")
    assert (found["recipe"], found["seed"], found["edits"]) == ("digits", 3, TINY)
    assert "run digits --seed 3" in found["command"]
    assert "--set epochs=2" in found["command"]
    assert (found["test_samples"], found["epochs"], found["steps"]) == (60, 2, 4)
    assert found["differing"] == {"torch = events": 0, "torch = lava": None}
    assert found["compared"]["torch = events"] == 60 * 4 * (2 * 3 * 3 + 10)
    assert found["spikes_per_image"] > 1
    assert set(found["neurons"]) == set(found["silent_share"])
    assert json.loads(results.read_text()) == table.stored_results(results)
    assert list(table.stored_results(results)) == ["digits 3", "mnist 1"]
    assert table.stored_results(results)["digits 3"] == found
    assert found.keys() == result("mnist").keys()
