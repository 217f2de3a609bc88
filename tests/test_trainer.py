"""Training: repeatable, selected on validation, stopped by a loss that is no number, kept in a file that is checked."""

import itertools
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from spikeport.models import trainer
from spikeport.models.datasets import Dataset, Split
from spikeport.models.encoders import Encoder
from spikeport.models.errors import TrainingError
from spikeport.models.losses import kernel_loss
from spikeport.models.networks import SpikingNetwork
from spikeport.models.readouts import decide
from spikeport.models.recipe import Recipe, parse_recipe
from spikeport.models.trainer import Epoch, Trained, build_network, run_network, train

SHAPE = (1, 6, 6)
CLASSES = 3
RECIPE = parse_recipe(
    """
    name = "bars"
    seed = 7
    [data]
    set = "digits"
    validation = 30
    [network]
    architecture = "4C3-P2-3"
    steps = 4
    tau_mem = 5.0
    tau_syn = 2.0
    [training]
    epochs = 3
    batch_size = 16
    learning_rate = 2e-2
    """,
    "bars",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bars(n: int, seed: int) -> Split:
    """A bright bar at the top, in the middle or at the bottom of a noisy image: which one is the class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % CLASSES)
    images = rng.uniform(0, 0.4, (n, *SHAPE)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] += 0.6
    return Split(images, labels)


DATA = Dataset("bars", ("top", "middle", "bottom"), bars(90, 0), bars(30, 1), bars(30, 2))


def with_settings(section: str, **settings: object) -> Recipe:
    old = getattr(RECIPE, section)
    return RECIPE.model_copy(update={section: old.model_copy(update=settings)})


@cache
def trained() -> Trained:
    return train(RECIPE, DATA, device="cpu")


def weights(network: SpikingNetwork) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_equal_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(value, other[name]) for name, value in one.items())


# --- Repeatable


def test_the_same_seed_gives_the_same_weights_and_history() -> None:
    torch.manual_seed(123)  # what was drawn before does not matter
    again = train(RECIPE, DATA, device="cpu")
    assert again.history == trained().history
    assert_equal_weights(weights(again.network), weights(trained().network))


def test_another_seed_gives_other_weights() -> None:
    other = train(RECIPE.model_copy(update={"seed": 8}), DATA, device="cpu")
    assert differ(weights(other.network), weights(trained().network))
    assert other.history != trained().history


def test_training_learns_a_separable_task() -> None:
    result = train(with_settings("training", epochs=8), DATA, device="cpu")
    assert result.best.validation_accuracy > 0.9
    assert result.history[-1].loss < result.history[0].loss / 2
    spikes = run_network(result.network, DATA.test.images, RECIPE.build_encoder())[result.network.output]
    decisions = decide("psc", result.network.neuron.current_keep, spikes)
    assert (decisions == DATA.test.labels).mean() > 0.9


def test_each_epoch_is_reported_with_the_firing_of_each_population() -> None:
    epochs: list[Epoch] = []
    batches: list[tuple[int, int]] = []
    result = train(RECIPE, DATA, epochs.append, lambda done, of: batches.append((done, of)), device="cpu")
    assert epochs == result.history
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3]
    assert batches == [(i, 18) for i in range(1, 19)]  # 90 samples are 6 batches of at most 16
    for epoch in epochs:
        assert epoch.firing_rate.keys() == epoch.dead_share.keys() == {"conv1", "dense1"}
        assert all(0 <= value <= 1 for value in (*epoch.firing_rate.values(), *epoch.dead_share.values()))


def test_the_reported_figures_are_those_of_the_network_on_validation() -> None:
    result = trained()
    spikes = run_network(result.network, DATA.validation.images, RECIPE.build_encoder())
    decisions = decide("psc", 0.5, spikes["dense1"])
    assert result.best.validation_accuracy == (decisions == DATA.validation.labels).mean()
    for name, array in spikes.items():
        assert result.best.firing_rate[name] == pytest.approx(array.mean())
        silent = (array.reshape(-1, *array.shape[2:]) == 0).all(axis=0)
        assert result.best.dead_share[name] == pytest.approx(silent.mean())


def test_the_loss_of_an_epoch_is_that_of_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 16 and a last one of 10 weigh by their samples."""
    monkeypatch.setattr(trainer, "kernel_loss", lambda output, labels, tau: (output * 0).sum() + 2.0 * len(labels))
    result = train(with_settings("training", epochs=1), DATA, device="cpu")
    assert result.history[0].loss == pytest.approx(2.0)


# --- Selected on validation


@pytest.mark.parametrize(
    ("accuracies", "best"), [((0.5, 0.9, 0.9, 0.7), 3), ((0.9, 0.5, 0.5, 0.5), 1), ((0.1, 0.2), 2)]
)
def test_the_last_epoch_of_the_best_validation_accuracy_is_kept(
    accuracies: tuple[float, ...], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def validate(network: SpikingNetwork, split: Split, encoder: Encoder, epoch: int, loss: float) -> Epoch:
        seen.append(weights(network))
        assert split is DATA.validation
        return Epoch(epoch, loss, accuracies[epoch - 1], {}, {})

    monkeypatch.setattr(trainer, "_validate", validate)
    result = train(with_settings("training", epochs=len(accuracies)), DATA, device="cpu")
    assert result.best.epoch == best
    assert len(result.history) == len(accuracies)
    assert all(differ(one, other) for one, other in itertools.pairwise(seen))
    assert_equal_weights(weights(result.network), seen[best - 1])


def test_the_test_images_are_never_looked_at() -> None:
    blind = Split(np.zeros_like(DATA.test.images), np.zeros_like(DATA.test.labels))
    other = Dataset("bars", DATA.class_names, DATA.train, DATA.validation, blind)
    assert_equal_weights(weights(train(RECIPE, other, device="cpu").network), weights(trained().network))


# --- Stopped by a loss that is no number


def failing_loss(batch: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of that batch, counted over the epochs from 1, is multiplied by the value."""
    calls = itertools.count(1)

    def loss(output: torch.Tensor, labels: torch.Tensor, tau_syn: float) -> torch.Tensor:
        true = kernel_loss(output, labels, tau_syn)
        return true * value if next(calls) == batch else true

    monkeypatch.setattr(trainer, "kernel_loss", loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("batch", "where"), [(1, "epoch 1, batch 1"), (6, "epoch 1, batch 6"), (9, "epoch 2, batch 3")]
)
def test_a_loss_that_is_no_number_names_epoch_and_batch(
    value: float, batch: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_loss(batch, value, monkeypatch)
    with pytest.raises(TrainingError, match="not a finite number") as error:
        train(RECIPE, DATA, device="cpu")
    assert f"{where}." in str(error.value)
    assert "training.learning_rate" in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize("dead_neuron_rule", [True, False])
@pytest.mark.parametrize("learning_rate", [1e20, 1e37])
def test_an_absurd_learning_rate_ends_in_finite_weights_or_an_error(
    learning_rate: float, dead_neuron_rule: bool
) -> None:
    """Weights that overflow silence the network; its loss is then a number, and nobody would see it."""
    settings = with_settings("training", learning_rate=learning_rate, epochs=2)
    recipe = settings.model_copy(
        update={"rule": settings.rule.model_copy(update={"dead_neuron_rule": dead_neuron_rule})}
    )
    try:
        result = train(recipe, DATA, device="cpu")
    except TrainingError:
        return
    assert all(torch.isfinite(value).all() for value in result.network.state_dict().values())


# --- Shifted images


def test_shifted_images_are_windows_of_the_padded_ones() -> None:
    images = torch.rand(40, 2, 5, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    moved = trainer._shifted(images, 1, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(images, [1, 1, 1, 1])
    offsets = []
    for image, source in zip(moved, padded, strict=True):
        fits = [
            (row, column)
            for row in range(3)
            for column in range(3)
            if torch.equal(image, source[:, row : row + 5, column : column + 4])
        ]
        assert len(fits) == 1
        offsets += fits
    assert len(set(offsets)) == 9  # every direction, each image by itself


def test_images_are_shifted_only_where_the_recipe_says_so() -> None:
    shifted = train(with_settings("training", shift_pixels=1), DATA, device="cpu")
    assert differ(weights(shifted.network), weights(trained().network))
    assert trainer._shifted(torch.ones(1, 1, 2, 2), 0, torch.Generator()).tolist() == [[[[1, 1], [1, 1]]]]


# --- Checkpoints


def load(path: Path, recipe: Recipe = RECIPE) -> Trained:
    return Trained.load(path, recipe, SHAPE, CLASSES)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    trained().save(path)
    assert [item.name for item in tmp_path.iterdir()] == ["weights.pt"]
    found = load(path)
    assert found.history == trained().history
    assert found.best == trained().best
    assert found.recipe == RECIPE
    assert_equal_weights(weights(found.network), weights(trained().network))
    expected = run_network(trained().network, DATA.test.images, RECIPE.build_encoder())
    for name, spikes in run_network(found.network, DATA.test.images, RECIPE.build_encoder()).items():
        assert np.array_equal(spikes, expected[name])


@pytest.mark.parametrize(
    "settings",
    [{"architecture": "5C3-P2-3"}, {"tau_mem": 6.0}, {"steps": 5}, {"threshold": 0.5}, {"reset": "subtract"}],
    ids=str,
)
def test_a_checkpoint_of_another_network_is_refused(settings: dict[str, object], tmp_path: Path) -> None:
    """Also where the weights would fit: other time constants make another network."""
    trained().save(tmp_path / "weights.pt")
    with pytest.raises(TrainingError, match=r"another \[network\]") as error:
        load(tmp_path / "weights.pt", with_settings("network", **settings))
    assert "weights.pt" in str(error.value)
    assert "spikeport train" in str(error.value)


def test_a_checkpoint_serves_another_chip(tmp_path: Path) -> None:
    trained().save(tmp_path / "weights.pt")
    recipe = with_settings("chip", name="loihi-sanafe")
    assert load(tmp_path / "weights.pt", recipe).recipe == recipe


def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"weights\.pt is missing\. Run `spikeport train` first"):
        load(tmp_path / "weights.pt")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def replace_by_text(path: Path) -> None:
    path.write_text("no checkpoint")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_weights_alone(path: Path) -> None:
    torch.save(trained().network.state_dict(), path)


def replace_by_a_list(path: Path) -> None:
    torch.save([1, 2, 3], path)


def edit(**changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        torch.save({**torch.load(path, weights_only=True), **changes}, path)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        replace_by_text,
        empty,
        replace_by_weights_alone,
        replace_by_a_list,
        edit(weights={}),
        edit(recipe={"name": "x"}),
        edit(history=[{"epoch": 1}]),
        edit(format="something else"),
        edit(history=[]),
    ],
    ids=["truncated", "text", "empty", "weights", "list", "no weights", "recipe", "history", "format", "no history"],
)
def test_a_damaged_checkpoint_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    trained().save(path)
    damage(path)
    with pytest.raises(TrainingError, match="damaged") as error:
        load(path)
    assert str(path) in str(error.value)
    assert "spikeport train" in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_a_checkpoint_with_weights_that_are_no_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    trained().save(path)
    state = torch.load(path, weights_only=True)
    state["weights"]["maps.dense1.weight"][0, 0] = float("nan")
    torch.save(state, path)
    with pytest.raises(TrainingError):
        load(path)


def test_a_checkpoint_is_read_without_running_code_from_it(tmp_path: Path) -> None:
    path, trace = tmp_path / "weights.pt", tmp_path / "ran"
    torch.save({"format": "spikeport-checkpoint", "recipe": _Touch(trace)}, path)
    with pytest.raises(TrainingError, match="damaged"):
        load(path)
    assert not trace.exists()


class _Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


# --- Running a network


@pytest.mark.parametrize("n", [1, 7, 30])
def test_running_a_network_gives_every_population_for_every_sample(n: int) -> None:
    done: list[int] = []
    network = build_network(RECIPE, SHAPE, CLASSES)
    spikes = run_network(network, DATA.test.images[:n], RECIPE.build_encoder(), batch=7, on_batch=done.append)
    assert {name: array.shape for name, array in spikes.items()} == {"conv1": (n, 4, 4, 4, 4), "dense1": (n, 4, 3)}
    assert all(array.dtype == np.uint8 and set(np.unique(array)) <= {0, 1} for array in spikes.values())
    assert done == [min(i, n) for i in range(7, n + 7, 7)]


def test_samples_do_not_see_each_other() -> None:
    network, encoder = trained().network, RECIPE.build_encoder()
    together = run_network(network, DATA.test.images, encoder)
    assert together["conv1"].any()
    for n in (0, 13, 29):
        alone = run_network(network, DATA.test.images[n : n + 1], encoder)
        for name, array in alone.items():
            assert (array[0] != together[name][n]).mean() <= 0.01  # sums in another order may graze the threshold
    in_parts = run_network(network, DATA.test.images, encoder, batch=11)
    assert all((in_parts[name] != array).mean() <= 0.01 for name, array in together.items())


# --- The loss


def test_the_loss_is_the_distance_of_the_filtered_trains() -> None:
    """Two steps, tau_syn 2. Desired: the true class fires at the second step only, the other never."""
    spikes = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # (steps, batch, classes)
    # class 0 is true: filtered output 1/2, 1/4 against 0, 1/2; class 1: 0, 1/2 against 0, 0
    expected = 0.5 * (0.5**2 + 0.25**2 + 0.5**2)
    assert float(kernel_loss(spikes, torch.tensor([0]), 2.0)) == pytest.approx(expected)


def test_the_loss_vanishes_for_the_desired_train_alone() -> None:
    desired = torch.zeros(5, 2, 3)
    desired[1:, 0, 2] = desired[1:, 1, 0] = 1
    assert float(kernel_loss(desired, torch.tensor([2, 0]), 3.0)) == 0
    assert float(kernel_loss(desired, torch.tensor([0, 2]), 3.0)) > 0


def test_with_an_average_the_running_mean_of_the_weights_is_validated_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """w <- average w + (1 - average) new, from the weights after the first step."""
    steps: list[dict[str, torch.Tensor]] = []
    step = torch.optim.AdamW.step

    def recorded(optimizer: torch.optim.AdamW, closure: None = None) -> object:
        result = step(optimizer, closure)
        steps.append({str(i): value.detach().clone() for i, value in enumerate(optimizer.param_groups[0]["params"])})
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    result = train(with_settings("training", epochs=1, average=0.8), DATA, device="cpu")
    expected = steps[0]
    for taken in steps[1:]:
        expected = {key: 0.8 * expected[key] + 0.2 * value for key, value in taken.items()}
    for found, wanted, last in zip(result.network.parameters(), expected.values(), steps[-1].values(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)
        assert not torch.allclose(found, last, atol=1e-4)
