"""`spikeport import MODEL.onnx`: an ANN becomes a run folder on which every later stage works."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from graph_strategies import one_thread  # noqa: F401
from onnx_models import trained_on_digits

from spikeport.converters.ann import forward
from spikeport.converters.onnx_reader import read_onnx
from spikeport.deploy.cli import main
from spikeport.deploy.run_folder import RunFolder
from spikeport.deploy.summary import Summary
from spikeport.models.datasets import load_dataset
from spikeport.models.recipe import ImportedRecipe

SAMPLES = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_on_digits(tmp_path_factory.mktemp("onnx") / "digits.onnx")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Digits as the user's own file of images."""
    data = load_dataset("digits", 200, 0)
    calibration = data.train.images[:100]
    arrays = {"x": data.test.images[:SAMPLES], "y": data.test.labels[:SAMPLES], "x_calibration": calibration}
    np.savez(tmp_path / "images.npz", **arrays)
    return tmp_path / "images.npz"


def run(*arguments: str | Path) -> int:
    return main(list(map(str, arguments)))


def test_every_stage_works_on_a_converted_ann(
    model: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run("import", model, "--inputs", inputs, "-o", folder) == 0
    found = RunFolder.open(folder).result("import")
    with np.load(inputs) as stored:
        images, labels = stored["x"], stored["y"]
    ann = read_onnx(model)
    decided = forward(ann, torch.from_numpy(images))[ann.output].argmax(dim=1).numpy()
    assert found["ann_accuracy"] == pytest.approx((decided == labels).mean())
    assert found["float_accuracy"] >= found["ann_accuracy"] - 0.05
    assert f"the ANN decides {found['ann_accuracy']:.2%} of 40" in capsys.readouterr().out
    for stage in ("quantize", "map", "simulate", "verify", "report"):
        assert run(stage, folder) == 0, stage
    summary = Summary.model_validate(json.loads((folder / "summary.json").read_text()))
    assert summary.training.imported.startswith("digits.onnx: an ANN of ")
    assert summary.accuracy.simulated.accuracy >= found["ann_accuracy"] - 0.05
    assert {pair.mismatches for pair in summary.comparisons if pair.skipped is None} == {0}


def test_the_data_of_a_recipe_are_sent_as_the_conversion_says(model: Path, tmp_path: Path) -> None:
    options = ["--steps", "6", "--message-bits", "3", "--percentile", "99"]
    assert run("import", model, "--recipe", "digits", "-o", tmp_path / "run", *options) == 0
    place = RunFolder.open(tmp_path / "run")
    recipe = place.recipe
    assert isinstance(recipe, ImportedRecipe)
    assert recipe.imported.conversion is not None
    assert (recipe.steps, recipe.encoder.message_bits, recipe.imported.conversion.percentile) == (6, 3, 99)
    sent = place.test_inputs["input"]
    assert sent.shape[1:] == (6, 1, 8, 8)
    assert (sent == sent[:, :1]).all()
    np.testing.assert_allclose(sent[:, 0], 7 * place.data.test.images, atol=0.5 + 1e-5)
    assert place.trace("float").samples == len(place.data.test)


def test_one_bit_sends_rates(model: Path, inputs: Path, tmp_path: Path) -> None:
    assert run("import", model, "--inputs", inputs, "-o", tmp_path / "run", "--message-bits", "1") == 0
    place = RunFolder.open(tmp_path / "run")
    with np.load(inputs) as stored:
        counts = np.rint(stored["x"] * 16).reshape(SAMPLES, -1)
    sent = place.test_inputs["input"].reshape(SAMPLES, 16, -1)
    assert sent.max() == 1
    np.testing.assert_allclose(sent.sum(axis=1), counts, atol=1)


def test_images_that_the_ann_takes_normalised_are_normalised(model: Path, inputs: Path, tmp_path: Path) -> None:
    """The same ANN on images that stand for (x - 0.5) / 0.25: not the decisions of before, but those of the ANN."""
    arguments = ["--inputs", inputs, "-o", tmp_path / "run", "--mean", "0.5", "--std", "0.25"]
    assert run("import", model, *arguments) == 0
    with np.load(inputs) as stored:
        images, labels = stored["x"], stored["y"]
    ann = read_onnx(model)
    decided = forward(ann, torch.from_numpy((images - 0.5) / 0.25))[ann.output].argmax(dim=1).numpy()
    assert RunFolder.open(tmp_path / "run").result("import")["ann_accuracy"] == pytest.approx(
        (decided == labels).mean()
    )


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--dt", "1e-3"], 2, "--dt is not about .onnx files"),
        (["--mean", "a,b"], 2, "'a,b' is not one number"),
        (["--mean", "0.1,0.2"], 2, "do not fit the 1 channels"),
        (["--std", "0"], 2, "must be positive"),
    ],
)
def test_wrong_options_are_named(
    options: list[str],
    status: int,
    message: str,
    model: Path,
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("import", model, "--inputs", inputs, "-o", tmp_path / "run", *options) == status
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.full((3, 1, 8, 8), 200, np.uint8), "values in 0..1"),
        (np.full((3, 1, 8, 8), np.nan), "values in 0..1"),
        (np.zeros((3, 1, 8, 9)), "takes inputs of shape (1, 8, 8)"),
        (np.zeros(64), "it takes (samples, ...)"),
    ],
)
def test_wrong_images_are_named(
    x: np.ndarray, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "x.npz", x=x)
    assert run("import", model, "--inputs", tmp_path / "x.npz", "-o", tmp_path / "run") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
