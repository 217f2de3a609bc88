"""A training that is killed goes on to the same result, bit for bit, and never takes up the state of another recipe."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from spikeport.deploy.cli import cli
from spikeport.deploy.run_folder import RunFolder
from spikeport.models import checkpoint
from spikeport.models.checkpoint import Trained, TrainingState, first_difference
from spikeport.models.datasets import Dataset, Split
from spikeport.models.errors import SpikeportError, TrainingError
from spikeport.models.evaluate import evaluate
from spikeport.models.recipe import Recipe, parse_recipe
from spikeport.models.trainer import train

TEXT = """
name = "blobs"
seed = 3
[data]
set = "digits"
validation = 20
[network]
architecture = "4C3-P2-3"
steps = 3
tau_mem = 5.0
tau_syn = 2.0
norm = "tdbn"
dropout = 0.2
[encoder]
name = "poisson"
[training]
epochs = 3
batch_size = 8
learning_rate = 2e-2
average = 0.9
shift_pixels = 1
flip = true
"""
RECIPE = parse_recipe(TEXT, "blobs")
BATCHES = 5


def blobs(n: int, seed: int) -> Split:
    """A bright row of a noisy image: which one is the class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 3)
    images = rng.uniform(0, 0.5, (n, 1, 6, 6)).astype(np.float32)
    images[np.arange(n), 0, 2 * labels] += 0.5
    return Split(images, labels)


DATA = Dataset("blobs", ("a", "b", "c"), blobs(40, 0), blobs(20, 1), blobs(20, 2))


class Killed(BaseException):
    """In the place of a kill, where a process of its own would prove no more."""


def stop_after(batches: int, state_file: Path, save_every_s: float = 0.0) -> None:
    def on_batch(done: int, total: int) -> None:
        if done == batches:
            raise Killed

    with pytest.raises(Killed):
        train(RECIPE, DATA, on_batch=on_batch, device="cpu", state_file=state_file, save_every_s=save_every_s)


@pytest.fixture(scope="module")
def whole() -> Trained:
    """The training without an interruption."""
    return train(RECIPE, DATA, device="cpu")


def assert_same(found: Trained, expected: Trained) -> None:
    assert found.history == expected.history
    for name, value in expected.network.state_dict().items():
        assert torch.equal(found.network.state_dict()[name], value), name


# --- Killed


CHILD = """
import json, os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_resume
from spikeport.models.rules import window_compiled
from spikeport.models.trainer import train

folder, save = Path(sys.argv[2]), torch.save
state_file = folder / "training.pt"

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def train_until(moment, count):
    def on_batch(done, total):
        if moment == "batch" and done == count:
            kill()

    def on_epoch(epoch):
        if moment == "epoch" and epoch.epoch == count:
            kill()

    def write_half(state, path):
        save(state, path)
        if moment == "write" and (state["epoch"], state["batch"]) == divmod(count, test_resume.BATCHES):
            os.truncate(path, os.path.getsize(path) // 2)
            kill()

    torch.save = write_half
    done = train(test_resume.RECIPE, test_resume.DATA, on_epoch, on_batch, "cpu",
                 state_file=state_file, save_every_s=0.0)
    done.save(folder / "checkpoint.pt")

# Each part is a process of its own. They are forked, because what torch imports with its first optimizer, and loading
# compiled code, takes longer than all of them.
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
window = torch.zeros(3, 1, 1)
rule, neuron = test_resume.RECIPE.rule.build(), test_resume.RECIPE.network.neuron()
window_compiled.forward(window, neuron, len(window))
window_compiled.backward(window, window, neuron, rule)
for part, (moment, count) in enumerate(json.loads(sys.argv[3])):
    if not os.fork():
        train_until(moment, count)
        os._exit(0)
    print(os.WTERMSIG(os.wait()[1]), len(list(folder.glob(".training-*"))))
    shutil.copy(state_file, folder / f"after-{part}.pt")
"""


def test_a_training_killed_again_and_again_ends_as_if_it_never_was(tmp_path: Path, whole: Trained) -> None:
    """In the middle of an epoch, during the write of a state, between two epochs, and then to the end."""
    moments = json.dumps([("batch", 3), ("write", BATCHES + 2), ("epoch", 2), ("never", 0)])
    arguments = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path), moments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    killed = signal.SIGKILL.value
    # the signal that ended each part, and the half-written states that lie about: one, from the kill during a write
    assert [line.split() for line in done.stdout.splitlines()] == [
        [str(killed), "0"],
        [str(killed), "1"],
        [str(killed), "1"],
        ["0", "1"],
    ]
    states = [TrainingState.load(tmp_path / f"after-{part}.pt") for part in range(4)]
    assert [(state.epoch, state.batch) for state in states] == [(0, 2), (1, 1), (2, 0), (3, 0)]
    found = Trained.load(tmp_path / "checkpoint.pt", RECIPE, DATA.image_shape, 3)
    assert_same(found, whole)
    one, other = (
        evaluate(each.network, DATA.test.images, DATA.test.labels, RECIPE.build_encoder(), "psc")
        for each in (found, whole)
    )
    assert one.right == other.right
    assert one.spikes_per_sample == other.spikes_per_sample


@pytest.mark.parametrize(
    "batches", [1, 2, 4, BATCHES, BATCHES + 1, 2 * BATCHES - 1, 2 * BATCHES, 3 * BATCHES - 1, 3 * BATCHES]
)
def test_an_interruption_after_any_batch_changes_nothing(batches: int, tmp_path: Path, whole: Trained) -> None:
    stop_after(batches, tmp_path / "training.pt")
    assert_same(train(RECIPE, DATA, device="cpu", state_file=tmp_path / "training.pt"), whole)


def test_without_time_for_a_state_within_the_epoch_its_beginning_is_gone_on_from(
    tmp_path: Path, whole: Trained
) -> None:
    stop_after(2 * BATCHES - 1, tmp_path / "training.pt", save_every_s=3600)
    state = TrainingState.load(tmp_path / "training.pt")
    assert (state.epoch, state.batch) == (1, 0)
    batches: list[int] = []
    again = train(
        RECIPE,
        DATA,
        on_batch=lambda done, total: batches.append(done),
        device="cpu",
        state_file=tmp_path / "training.pt",
    )
    assert batches == list(range(BATCHES + 1, 3 * BATCHES + 1))
    assert_same(again, whole)


def test_a_finished_training_is_not_repeated_and_tells_of_its_epochs(tmp_path: Path, whole: Trained) -> None:
    train(RECIPE, DATA, device="cpu", state_file=tmp_path / "training.pt")
    epochs: list[object] = []
    again = train(
        RECIPE, DATA, epochs.append, lambda *_: pytest.fail("trained"), "cpu", state_file=tmp_path / "training.pt"
    )
    assert epochs == whole.history
    assert_same(again, whole)


def test_a_stop_by_patience_is_still_one_after_an_interruption(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(
        update={"training": RECIPE.training.model_copy(update={"patience": 1, "epochs": 8, "learning_rate": 1e-9})}
    )
    stopped = train(recipe, DATA, device="cpu", state_file=tmp_path / "training.pt")
    assert len(stopped.history) < 8
    assert train(recipe, DATA, device="cpu", state_file=tmp_path / "training.pt").history == stopped.history


# --- Of another recipe, of other data, damaged


def changed(section: str, **settings: object) -> Recipe:
    return RECIPE.model_copy(update={section: getattr(RECIPE, section).model_copy(update=settings)})


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        (changed("training", learning_rate=0.1), "training.learning_rate = 0.02 there, 0.1 here"),
        (changed("training", patience=3), "training.patience = None there, 3 here"),
        (changed("network", tau_mem=6.0), "network.tau_mem = 5.0 there, 6.0 here"),
        (changed("loss", name="count"), "loss.name = 'kernel' there, 'count' here"),
        (RECIPE.model_copy(update={"seed": 4}), "seed = 3 there, 4 here"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_state_of_another_recipe_is_refused_with_the_key_that_differs(
    recipe: Recipe, what: str, tmp_path: Path
) -> None:
    stop_after(2, tmp_path / "training.pt")
    before = (tmp_path / "training.pt").read_bytes()
    with pytest.raises(TrainingError, match="another recipe") as error:
        train(recipe, DATA, device="cpu", state_file=tmp_path / "training.pt")
    assert what in str(error.value)
    assert "--restart" in str(error.value)
    assert (tmp_path / "training.pt").read_bytes() == before


def test_a_state_serves_a_recipe_for_another_chip(tmp_path: Path, whole: Trained) -> None:
    stop_after(2, tmp_path / "training.pt")
    assert_same(train(changed("chip", name="loihi2"), DATA, device="cpu", state_file=tmp_path / "training.pt"), whole)


def test_a_state_of_other_data_is_refused(tmp_path: Path) -> None:
    stop_after(2, tmp_path / "training.pt")
    other = Dataset("blobs", DATA.class_names, blobs(40, 5), DATA.validation, DATA.test)
    with pytest.raises(TrainingError, match="other data"):
        train(RECIPE, other, device="cpu", state_file=tmp_path / "training.pt")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "list", "version"])
def test_a_damaged_state_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    stop_after(2, path)
    match damage:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-300])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("no state")
        case "list":
            torch.save([1, 2], path)
        case "version":
            torch.save(torch.load(path, weights_only=True) | {"version": 0}, path)
    with pytest.raises(TrainingError, match="another version" if damage == "version" else "damaged") as error:
        train(RECIPE, DATA, device="cpu", state_file=path)
    assert "--restart" in str(error.value)


def test_the_first_difference_of_two_tables() -> None:
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 2}}) is None
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == ("a.c", None, 2)
    assert first_difference({"a": {"b": 1, "d": 3}}, {"a": {"b": 1}}) == ("a.d", 3, None)
    assert first_difference({"a": 1}, {"a": [1]}) == ("a", 1, [1])


# --- No space


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0\nmore"),
    ],
    ids=["errno", "torch"],
)
def test_no_space_for_a_state_is_one_error_and_the_state_before_stays(
    error: Exception, tmp_path: Path, whole: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, save, writes = tmp_path / "training.pt", torch.save, iter(range(100))

    def full(state: object, where: Path) -> None:
        if next(writes) == 2:
            Path(where).write_bytes(b"half")
            raise error
        save(state, where)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(SpikeportError, match=r"cannot write .*training\.pt") as found:
        train(RECIPE, DATA, device="cpu", state_file=path)
    assert len(str(found.value).splitlines()) == 1
    assert [item.name for item in tmp_path.iterdir()] == ["training.pt"]
    monkeypatch.undo()
    assert_same(train(RECIPE, DATA, device="cpu", state_file=path), whole)


def test_a_file_that_the_system_cuts_short_is_no_state(tmp_path: Path, whole: Trained) -> None:
    """A real write that fails: the system lets files grow to four kilobytes and no further."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "training.pt"
    stop_after(BATCHES + 1, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(SpikeportError, match=r"cannot write .*training\.pt") as found:
            train(RECIPE, DATA, device="cpu", state_file=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(str(found.value).splitlines()) == 1
    assert [item.name for item in tmp_path.iterdir()] == ["training.pt"]
    assert path.read_bytes() == before
    assert_same(train(RECIPE, DATA, device="cpu", state_file=path), whole)


# --- On the command line


DIGITS = (
    TEXT.replace("validation = 20", "validation = 180\ntest = 200")
    .replace("4C3-P2-3", "2C3s2-10")
    .replace("epochs = 3\nbatch_size = 8", "epochs = 2\nbatch_size = 709")
)


def run_cli(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, list(arguments))
    if isinstance(result.exception, SpikeportError):
        return 2, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_command_goes_on_refuses_and_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, folder = tmp_path / "blobs.toml", RunFolder(tmp_path / "run")
    recipe.write_text(DIGITS)
    whole = tmp_path / "whole"
    assert run_cli("train", str(recipe), "-o", str(whole))[0] == 0
    assert sorted(item.name for item in whole.iterdir()) == [
        "checkpoint.pt",
        "recipe.toml",
        "trace-float.npz",
        "train.json",
    ]

    from spikeport.deploy import stages

    plain = stages.train

    def interrupted(*arguments: object, **options: object) -> Trained:
        def on_batch(done: int, total: int) -> None:
            if done == 3:
                raise KeyboardInterrupt

        return plain(*arguments[:3], on_batch, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(stages, "train", interrupted)
    run_cli("train", str(recipe), "-o", str(folder.path), "--save-every", "0")
    monkeypatch.undo()
    assert folder.state_file.is_file()
    (folder.path / ".training-half.pt").write_bytes(b"left by a kill")

    other = tmp_path / "other.toml"
    other.write_text(DIGITS.replace("2e-2", "1e-3"))
    status, text = run_cli("train", str(other), "-o", str(folder.path))
    assert status == 2
    assert "training.learning_rate = 0.02 there, 0.001 here" in text
    assert folder.recipe_file.read_text() == DIGITS  # nothing is lost

    assert run_cli("train", str(recipe), "-o", str(folder.path))[0] == 0
    assert sorted(item.name for item in folder.path.iterdir()) == sorted(item.name for item in whole.iterdir())
    one, again = (json.loads((each / "train.json").read_text()) for each in (whole, folder.path))
    assert {**again, "seconds": 0} == {**one, "seconds": 0}
    decided = [RunFolder(each).trace("float").packed["dense1"] for each in (whole, folder.path)]
    assert np.array_equal(*decided)


def test_restart_gives_up_the_state(tmp_path: Path) -> None:
    recipe, folder = tmp_path / "blobs.toml", tmp_path / "run"
    recipe.write_text(DIGITS)
    folder.mkdir()
    (folder / "training.pt").write_bytes(b"not a state")
    status, text = run_cli("train", str(recipe), "-o", str(folder))
    assert status == 2
    assert "damaged" in text
    assert run_cli("train", str(recipe), "-o", str(folder), "--restart")[0] == 0
    assert not (folder / "training.pt").exists()
