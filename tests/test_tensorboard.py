"""Event files of TensorBoard: every epoch once, also after an interruption; a clear error without the package."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from spikeport.deploy.tensorboard import open_events
from spikeport.models.checkpoint import Epoch
from spikeport.models.errors import BackendUnavailableError
from spikeport.models.recipe import load_recipe

EPOCH = Epoch(1, 2.5, 0.75, {"conv1": 0.125}, {"conv1": 0.25}, {"conv1": 0.5}, 640.0)


def test_each_epoch_is_written_once_with_every_figure(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "tensorboard"
    for epochs in (1, 3):  # the second start tells of the first epoch again
        events = open_events(folder, load_recipe("digits"))
        for number in range(1, epochs + 1):
            events.add(replace(EPOCH, epoch=number, loss=2.5 / number))
        events.writer.close()
    found = accumulator.EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss/train")] == [
        (1, 2.5),
        (2, 1.25),
        (3, pytest.approx(2.5 / 3)),
    ]
    last = {tag: found.Scalars(tag)[-1].value for tag in found.Tags()["scalars"]}
    assert last.pop("loss/train") == pytest.approx(2.5 / 3)
    assert last == {
        "accuracy/validation": 0.75,
        "spikes per sample": 640.0,
        "firing rate/conv1": 0.125,
        "dead share/conv1": 0.25,
        "silent share/conv1": 0.5,
    }


def test_without_the_package_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BackendUnavailableError, match=r"spikeport\[tensorboard\]"):
        open_events(tmp_path, load_recipe("digits"))
