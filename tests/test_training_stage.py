"""The stage that trains: what it leaves of networks whose neurons have levels and whose output integrates."""

import json

import numpy as np
import pytest

from spikeport.deploy.cli import main
from spikeport.deploy.run_folder import RunFolder
from spikeport.models.evaluate import evaluate, run_network

RECIPE = """
name = "levels"
[data]
set = "digits"
validation = 180
test = 300
[network]
architecture = "4C3-P2-12-10"
steps = 3
tau_mem = 5.0
tau_syn = 2.0
levels = [1.5]
output = "membrane"
norm = "tdbn"
[rule]
name = "mlf"
[loss]
name = "rate_cross_entropy"
[training]
epochs = 2
batch_size = 100
learning_rate = 2e-2
precision = "bfloat16"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    place = tmp_path_factory.mktemp("levels")
    (place / "levels.toml").write_text(RECIPE)
    assert main(["train", str(place / "levels.toml"), "-o", str(place / "run")]) == 0
    return RunFolder.open(place / "run")


def test_the_float_trace_holds_the_membranes_that_decide(folder: RunFolder) -> None:
    trace, network, data = folder.trace("float"), folder.trained().network, folder.data
    encoder = folder.recipe.build_encoder()
    sent = run_network(network, data.test.images, encoder)
    assert sent["dense2"].dtype == np.float32
    assert trace.membrane is not None
    assert np.array_equal(trace.membrane, sent["dense2"][:, -1].astype(np.float64))
    decided = trace.membrane.argmax(axis=1)
    found = evaluate(network, data.test.images, data.test.labels, encoder, folder.recipe.readout_kind)
    assert found.right == (decided == data.test.labels).sum()
    assert found.accuracy > 0.3  # two epochs; chance is 0.1


def test_sums_of_levels_are_no_trace_and_an_output_that_integrates_never_fires(folder: RunFolder) -> None:
    trace = folder.trace("float")
    assert list(trace.sizes) == ["dense2"]
    assert not trace.spikes("dense2").any()


def test_the_history_counts_the_value_of_a_spike_and_leaves_membranes_out(folder: RunFolder) -> None:
    history = json.loads((folder.path / "train.json").read_text())["history"]
    images = folder.data.validation.images
    sent = run_network(folder.trained().network, images, folder.recipe.build_encoder())
    best = history[json.loads((folder.path / "train.json").read_text())["best_epoch"] - 1]
    fired = {name: array for name, array in sent.items() if name != "dense2"}
    assert best["firing_rate"].keys() == fired.keys() == {"conv1", "dense1"}
    assert max(array.max() for array in fired.values()) == 2
    assert best["spikes_per_sample"] == pytest.approx(sum(array.sum() for array in fired.values()) / len(images))
    for name, array in fired.items():
        assert best["silent_share"][name] == pytest.approx((array == 0).all(axis=1).mean())


def test_the_export_runs_to_the_same_spikes_of_every_level_and_the_same_membranes(folder: RunFolder) -> None:
    assert main(["export", str(folder.path)]) == 0
    found = folder.result("export")
    assert found["mismatches"] == 0
    neurons = 3 * (4 * 6 * 6 + 12)
    assert found["compared"] == 100 * (neurons + 10)
