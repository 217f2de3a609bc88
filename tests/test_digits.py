"""The main job on real data, as `make demo` runs it, and what it promises."""

import json
from pathlib import Path

import pytest

from spikeport.deploy.cli import main
from spikeport.deploy.lava_backend import find_interpreter
from spikeport.deploy.summary import Summary
from spikeport.models.errors import BackendUnavailableError
from spikeport.models.recipe import builtin_recipes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("digits")
    assert main(["run", "digits", "-o", str(place)]) == 0
    return place


@pytest.fixture(scope="module")
def summary(folder: Path) -> Summary:
    return Summary.load(folder / "summary.json")


def test_the_network_classifies_the_test_set(summary: Summary) -> None:
    assert summary.accuracy.float.samples == 360
    assert summary.accuracy.float.accuracy >= 0.97
    assert summary.accuracy.simulated.accuracy >= 0.97
    assert summary.accuracy.simulated == summary.accuracy.quantized


def test_every_backend_computes_the_same_spikes(summary: Summary) -> None:
    events = next(pair for pair in summary.comparisons if pair.second == "events")
    assert (events.samples, events.mismatches) == (360, 0)
    assert events.spikes > 100_000


def test_lava_computes_the_same_spikes_on_64_samples(summary: Summary) -> None:
    try:
        find_interpreter()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    lava = next(pair for pair in summary.comparisons if pair.second == "lava")
    assert (lava.samples, lava.mismatches) == (64, 0)


def test_counted_synaptic_operations_equal_the_derived_ones(summary: Summary) -> None:
    assert len(summary.synop_checks) == 4
    for check in summary.synop_checks:
        assert check.counted == check.derived > 0


def test_the_network_fits_and_has_a_cost_with_sources(summary: Summary) -> None:
    assert 0 < summary.chip.cores_used <= summary.chip.cores_available
    assert all(limit.used <= limit.available for limit in summary.chip.limits)
    assert summary.cost.cycles_per_inference > 0
    assert summary.cost.energy_low_nj <= summary.cost.energy_nj_per_inference <= summary.cost.energy_high_nj
    assert all(constant.source for constant in summary.cost.constants)


def test_the_recipe_in_the_summary_is_the_built_in_one(summary: Summary) -> None:
    assert summary.recipe == builtin_recipes()["digits"]


def test_run_is_the_stages_in_a_row_and_without_lava_it_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPIKEPORT_LAVA_PYTHON", str(tmp_path / "no-python"))
    recipe, run, stages = tmp_path / "short.toml", tmp_path / "run", tmp_path / "stages"
    recipe.write_text(builtin_recipes()["digits"].replace("epochs = 30", "epochs = 2"))
    assert main(["run", str(recipe), "-o", str(run)]) == 0
    assert "skipped" in capsys.readouterr().out
    assert "no-python" in (Summary.load(run / "summary.json").accuracy.lava_skipped or "")
    assert main(["train", str(recipe), "-o", str(stages)]) == 0
    for stage in ("export", "quantize", "map", "simulate", "verify", "report"):
        assert main([stage, str(stages)]) == 0
    first, second = (json.loads((place / "summary.json").read_text()) for place in (run, stages))
    for value in (first, second):
        for measured in ("seconds", "gpu", "gpu_skipped"):
            del value[measured]
        del value["accuracy"]["lava_skipped"]  # the stages were not asked for Lava
        value["comparisons"] = [pair for pair in value["comparisons"] if pair["second"] != "lava"]
    assert first["training"]["epochs"] == 2
    assert first == second
