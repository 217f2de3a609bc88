"""Training under torchrun: two processes on the CPU take the same steps as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spikeport.deploy.cli import main
from spikeport.deploy.run_folder import RunFolder
from spikeport.models.processes import Processes

RECIPE = """
name = "small"
seed = 5
[data]
set = "digits"
validation = 1000
test = 497
[network]
architecture = "8C3p1-P2-32-10"
steps = 5
output = "membrane"
tau_mem = 5.0
tau_syn = 2.0
[encoder]
name = "poisson"
[rule]
name = "stbp"
[loss]
name = "rate_cross_entropy"
[training]
epochs = 2
batch_size = 23
optimizer = "sgd"
learning_rate = 5e-3
clip_norm = 20.0
average = 0.5
shift_pixels = 1
"""


def train_on_two_processes(recipe: Path, folder: Path) -> str:
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "spikeport.deploy.cli", "train"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(recipe), "-o", str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_give_the_loss_curve_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last batch has one sample, so that one process takes none; batches of 23 are shared unevenly.

    SGD and a smooth loss: sums in another order stay roundings. AdamW divides small gradients by their size, so that a
    rounding becomes another spike within a few steps, and the curves part by some tenths of a percent.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = tmp_path / "small.toml"
    recipe.write_text(RECIPE)
    assert main(["train", str(recipe), "-o", str(tmp_path / "by-1")]) == 0
    said = {1: capsys.readouterr().out, 2: train_on_two_processes(recipe, tmp_path / "by-2")}
    one, two = (json.loads((tmp_path / f"by-{n}" / "train.json").read_text())["history"] for n in (1, 2))
    assert [epoch["loss"] for epoch in two] == pytest.approx([epoch["loss"] for epoch in one], rel=1e-4)
    assert two[1]["loss"] < 0.95 * two[0]["loss"]
    for key in ("validation_accuracy", "spikes_per_sample"):
        assert [epoch[key] for epoch in two] == pytest.approx([epoch[key] for epoch in one], rel=0.01)
    # the first process alone writes and prints
    assert sorted(os.listdir(tmp_path / "by-2")) == sorted(os.listdir(tmp_path / "by-1"))
    assert said[2].count("epoch 1 of 2") == said[1].count("epoch 1 of 2") == 1
    assert said[2].count("best epoch") == 1
    weights = [
        torch.load(RunFolder(tmp_path / f"by-{n}").checkpoint_file, weights_only=True)["weights"] for n in (1, 2)
    ]
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-4), name


@pytest.mark.parametrize(("samples", "size"), [(1, 1), (7, 1), (7, 2), (8, 3), (2, 3)])
def test_shares_are_the_whole_batch(samples: int, size: int) -> None:
    values = torch.arange(2 * samples).view(2, samples)
    shares = [Processes(rank, size).share(values, 1) for rank in range(size)]
    assert torch.equal(torch.cat(shares, 1), values)
    counts = [share.shape[1] for share in shares]
    assert max(counts) - min(counts) <= 1


def test_a_process_alone_adds_and_gathers_nothing() -> None:
    alone, values = Processes(), torch.ones(3)
    alone.add([values])
    assert values.tolist() == [1, 1, 1]
    assert alone.gather("x") == ["x"]
    assert alone.from_first("x") == "x"
