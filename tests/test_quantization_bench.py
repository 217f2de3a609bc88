"""The table of accuracies at few bits: what it prints, and when a must is missed."""

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def quantization() -> ModuleType:
    """`bench/quantization.py`, which is a program and no part of the package."""
    path = Path(__file__).parent.parent / "bench" / "quantization.py"
    spec = importlib.util.spec_from_file_location("bench_quantization", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def figures(accuracy: float, spikes: float = 1000.0) -> dict[str, float]:
    return {"accuracy": accuracy, "spikes": spikes}


def run() -> dict[str, Any]:
    bits = {
        str(bits): {"ptq": figures(0.99 - 0.1 / bits**2), "qat": figures(0.991), "epochs": 5, "best_epoch": bits % 5}
        for bits in (8, 6, 4, 3, 2)
    }
    bits["8"]["ptq"] = figures(0.9892)
    return {
        "mnist, seed 1": {
            "dataset": "mnist",
            "dataset_note": "all of it",
            "test_samples": 10_000,
            "float": figures(0.9902, 1234.5),
            "bits": bits,
        }
    }


def test_musts_are_held_at_their_very_value(quantization: ModuleType) -> None:
    assert quantization.missing(run()) == []
    text = quantization.markdown(run())
    assert "| mnist, seed 1 | 99.02 | 2 | 96.50 | 99.10 | 1,234 | 1,000 | 1,000 | 2 of 5 |" in text
    assert "All musts are held." in text


@pytest.mark.parametrize(
    ("bits", "method", "accuracy", "said"),
    [("8", "ptq", 0.9891, "PTQ at 8 bits is 0.11 points below"), ("4", "qat", 0.9851, "QAT at 4 bits is 0.51 points")],
)
def test_a_missed_must_is_named(bits: str, method: str, accuracy: float, said: str, quantization: ModuleType) -> None:
    results = run()
    results["mnist, seed 1"]["bits"][bits][method] = figures(accuracy)
    (line,) = quantization.missing(results)
    assert line.startswith("mnist, seed 1: ")
    assert said in line
    assert said in quantization.markdown(results)
    lacking = copy.deepcopy(results)
    del lacking["mnist, seed 1"]["bits"][bits]
    assert quantization.missing(lacking) == [f"mnist, seed 1: {bits} bits not run"]


def test_a_run_that_is_not_there_is_named_with_the_command_that_makes_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quantization: ModuleType,
) -> None:
    arguments = ["quantization.py", str(tmp_path / "fashion-fc-1"), "--json", str(tmp_path / "results.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert quantization.main() == 1
    assert "make accuracy-run NAME=fashion-fc SEED=1" in " ".join(capsys.readouterr().out.split())
