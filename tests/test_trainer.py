"""Training: repeatable, selected on validation, stopped by numbers that are not finite, kept in a checked file."""

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from graph_strategies import one_thread  # noqa: F401

from spikeport.models import trainer
from spikeport.models.checkpoint import Epoch, Trained
from spikeport.models.datasets import Dataset, Split
from spikeport.models.errors import SpikeportError, TrainingError
from spikeport.models.evaluate import Evaluation, evaluate, run_network
from spikeport.models.losses import Loss, kernel_loss
from spikeport.models.memory import StepMemory, available_memory, step_memory
from spikeport.models.networks import SpikingNetwork, build_network
from spikeport.models.optimizers import schedule
from spikeport.models.readouts import decide
from spikeport.models.recipe import Recipe, parse_recipe
from spikeport.models.trainer import train

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
        shares = (epoch.firing_rate, epoch.dead_share, epoch.silent_share)
        assert all(share.keys() == {"conv1", "dense1"} for share in shares)
        assert all(0 <= value <= 1 for share in shares for value in share.values())


def test_the_reported_figures_are_those_of_the_network_on_validation() -> None:
    result = trained()
    spikes = run_network(result.network, DATA.validation.images, RECIPE.build_encoder())
    decisions = decide("psc", 0.5, spikes["dense1"])
    assert result.best.validation_accuracy == (decisions == DATA.validation.labels).mean()
    for name, array in spikes.items():
        assert result.best.firing_rate[name] == pytest.approx(array.mean())
        silent = ~array.any(axis=1)
        assert result.best.silent_share[name] == pytest.approx(silent.mean())
        assert result.best.dead_share[name] == pytest.approx(silent.all(axis=0).mean())
    sums = [array.sum() for array in spikes.values()]
    assert result.best.spikes_per_sample == pytest.approx(sum(sums) / len(DATA.validation))


def test_the_loss_of_an_epoch_is_that_of_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 16 and a last one of 10 weigh by their samples."""
    monkeypatch.setattr(Loss, "__call__", lambda loss, output, labels: (output * 0).sum() + 2.0 * len(labels))
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

    def validate(network: SpikingNetwork, images: np.ndarray, *_: object) -> Evaluation:
        assert images is DATA.validation.images
        seen.append(weights(network))
        return Evaluation(10, round(10 * accuracies[len(seen) - 1]))

    monkeypatch.setattr(trainer, "evaluate", validate)
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
    """The loss of that batch, counted over the epochs from 1, is multiplied by the value, however often it is taken."""
    calls = itertools.count(1)

    def loss(loss: Loss, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        true = kernel_loss(output, labels, loss.tau_syn)
        return true * value if next(calls) >= batch else true

    monkeypatch.setattr(Loss, "__call__", loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("batch", "where"), [(1, "epoch 1, batch 1"), (6, "epoch 1, batch 6"), (9, "epoch 2, batch 3")]
)
def test_a_loss_that_is_no_number_names_epoch_and_batch(
    value: float, batch: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_loss(batch, value, monkeypatch)
    with pytest.raises(TrainingError, match=r"^the loss is not a finite number") as error:
        train(RECIPE, DATA, device="cpu")
    assert f"{where}." in str(error.value)
    assert "training.learning_rate" in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize("layer", ["conv1", "dense1"])
def test_the_first_layer_whose_output_is_no_number_is_named(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight turns to NaN in the second epoch."""
    steps = itertools.count(1)
    step = torch.optim.AdamW.step

    def spoiled(optimizer: torch.optim.AdamW, closure: None = None) -> object:
        result = step(optimizer, closure)
        if next(steps) == 8:
            weight = optimizer.param_groups[0]["params"][["conv1", "dense1"].index(layer)]
            weight.data.view(-1)[0] = float("nan")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiled)
    with pytest.raises(TrainingError, match=r"epoch 2, batch 3\.") as error:
        train(RECIPE, DATA, device="cpu")
    assert str(error.value).startswith(f"the output of layer '{layer}_weight'")


def test_the_first_layer_whose_gradient_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is a number and its gradient is not: both layers are hit, and the first one is named."""

    def loss(loss: Loss, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return kernel_loss(output, labels, loss.tau_syn) + (output.sum() * 0).sqrt()

    monkeypatch.setattr(Loss, "__call__", loss)
    with pytest.raises(TrainingError, match=r"^the gradient of layer 'conv1_weight' .* epoch 1, batch 1\."):
        train(RECIPE, DATA, device="cpu")


def test_after_a_failure_the_last_good_state_is_there_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_loss(9, float("nan"), monkeypatch)
    with pytest.raises(TrainingError, match=r"last good state is kept in .*training\.pt"):
        train(RECIPE, DATA, device="cpu", state_file=tmp_path / "training.pt")
    monkeypatch.undo()
    again = train(RECIPE, DATA, device="cpu", state_file=tmp_path / "training.pt")
    assert again.history == trained().history


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


# --- The settings of [training]


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.0},
        {"schedule": "constant"},
        {"schedule": "milestones", "milestones": (1,)},
        {"weight_limit": 0.25},
        {"clip_norm": 1e-3},
        {"average": 0.9},
        {"precision": "bfloat16"},
        {"shift_pixels": 1},
        {"flip": True},
        {"rotate_degrees": 20.0},
        {"scale": 0.2},
    ],
    ids=str,
)
def test_each_setting_changes_what_is_trained(settings: dict[str, object]) -> None:
    result = train(with_settings("training", epochs=2, **settings), DATA, device="cpu")
    assert differ(
        weights(result.network), weights(train(with_settings("training", epochs=2), DATA, device="cpu").network)
    )
    assert all(value.dtype == torch.float32 for value in weights(result.network).values())
    assert result.history[1].loss < result.history[0].loss


def test_weights_stay_within_their_limit() -> None:
    result = train(with_settings("training", weight_limit=0.25), DATA, device="cpu")
    largest = [float(value.abs().max()) for value in weights(result.network).values()]
    assert max(largest) <= 0.25
    assert max(float(value.abs().max()) for value in weights(trained().network).values()) > 0.25


def test_schedules() -> None:
    """Four epochs of ten steps."""
    settings = RECIPE.training.model_copy(update={"epochs": 4})

    def factors(**changes: object) -> list[float]:
        changed = settings.model_copy(update=changes)
        return [schedule(changed, step, 10) for step in (0, 9, 10, 20, 29, 30, 39)]

    assert factors(schedule="constant") == [1.0] * 7
    at = factors(schedule="milestones", milestones=(1, 3), decay=0.1)
    assert at == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])
    cosine = factors(schedule="cosine")
    assert cosine[0] == 1
    assert cosine[3] == pytest.approx(0.5)
    assert all(one > other for one, other in itertools.pairwise(cosine))
    assert cosine[-1] < 0.01


def test_the_schedule_reaches_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def recorded(optimizer: torch.optim.AdamW, closure: None = None) -> object:
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    train(with_settings("training", schedule="milestones", milestones=(2,), decay=0.5), DATA, device="cpu")
    assert rates == pytest.approx([2e-2] * 12 + [1e-2] * 6)


def test_with_an_average_the_running_mean_of_the_weights_is_validated_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """w <- f w + (1 - f) new from the initial weights, f = min(average, (1 + step) / (10 + step))."""
    network = build_network(RECIPE, SHAPE, CLASSES)
    torch.manual_seed(RECIPE.seed)
    network = build_network(RECIPE, SHAPE, CLASSES)
    steps = [[value.detach().clone() for value in network.parameters()]]
    step = torch.optim.AdamW.step

    def recorded(optimizer: torch.optim.AdamW, closure: None = None) -> object:
        result = step(optimizer, closure)
        steps.append([value.detach().clone() for value in optimizer.param_groups[0]["params"]])
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    result = train(with_settings("training", epochs=1, average=0.3), DATA, device="cpu")
    expected = steps[0]
    for number, taken in enumerate(steps[1:]):
        factor = min(0.3, (1 + number) / (10 + number))
        expected = [factor * mean + (1 - factor) * value for mean, value in zip(expected, taken, strict=True)]
    for found, wanted, last in zip(result.network.parameters(), expected, steps[-1], strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)
        assert not torch.allclose(found, last, atol=1e-4)


def test_training_stops_early_after_epochs_without_a_better_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([3, 5, 5, 4, 9, 9])
    monkeypatch.setattr(trainer, "evaluate", lambda *_: Evaluation(10, next(accuracies)))
    result = train(with_settings("training", epochs=6, patience=2), DATA, device="cpu")
    assert [epoch.validation_accuracy for epoch in result.history] == [0.3, 0.5, 0.5, 0.4]
    assert result.best.epoch == 3


def test_deterministic_training_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(
        trainer, "evaluate", lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()) or EMPTY
    )
    train(with_settings("training", epochs=1, deterministic=True), DATA, device="cpu")
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()


EMPTY = Evaluation(1, 1)


def test_in_bfloat16_maps_are_reduced_and_what_is_selected_is_float32() -> None:
    recipe = with_settings("training", precision="bfloat16", epochs=8)
    result = train(recipe, DATA, device="cpu")
    assert result.best.validation_accuracy > 0.8
    found = evaluate(result.network, DATA.validation.images, DATA.validation.labels, recipe.build_encoder(), "psc")
    assert found.accuracy == result.best.validation_accuracy


def test_dropout_and_poisson_spikes_repeat_with_the_seed() -> None:
    recipe = with_settings("network", dropout=0.3).model_copy(
        update={"encoder": RECIPE.encoder.model_copy(update={"name": "poisson"})}
    )
    once, again = (train(recipe, DATA, device="cpu") for _ in range(2))
    assert once.history == again.history
    assert differ(weights(once.network), weights(trained().network))


# --- Data and memory that do not fit


def test_recordings_of_another_length_are_refused_before_the_first_step() -> None:
    def recordings(split: Split) -> Split:
        return Split(np.repeat(split.images[:, None], 3, axis=1), split.labels)

    parts = (recordings(part) for part in (DATA.train, DATA.validation, DATA.test))
    data = Dataset("bars", DATA.class_names, *parts, temporal=True)
    with pytest.raises(TrainingError, match=r"have 3 frames; network\.steps = 4"):
        train(RECIPE, data, device="cpu")


def test_images_that_the_network_cannot_take_are_refused_before_the_first_step() -> None:
    with pytest.raises(SpikeportError, match="does not fit"):
        train(with_settings("network", architecture="4C7-P2-3"), DATA, device="cpu")


def test_the_memory_of_a_step_grows_with_the_batch_alone() -> None:
    """What is kept for the backward pass is at least the input sums of every population, once."""
    network, encoder = build_network(RECIPE, SHAPE, CLASSES), RECIPE.build_encoder()
    spikes = 4 * 4 * (4 * 4 * 4 + 3)  # bytes x steps x neurons
    few, more = (step_memory(network, encoder(torch.zeros(n, *SHAPE)), 3, False) for n in (2, 5))
    assert few.kept_per_sample == pytest.approx(more.kept_per_sample, rel=0.1)
    assert spikes <= few.kept_per_sample <= 6 * spikes
    assert few.kept_per_sample < few.per_sample
    assert few.fixed == 3 * 4 * sum(weight.numel() for weight in network.parameters())


def test_a_batch_that_cannot_fit_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "available_memory", lambda device: 25_000)
    with pytest.raises(
        TrainingError, match=r"training\.batch_size = 16 takes about .* at most (\d+) should fit"
    ) as error:
        train(RECIPE, DATA, device="cpu")
    fits = int(str(error.value).split("at most ")[1].split()[0])
    assert 1 <= fits < 16
    train(with_settings("training", batch_size=fits, epochs=1), DATA, device="cpu")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_running_out_of_memory_names_the_batch_size(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(loss: Loss, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(Loss, "__call__", full)
    with pytest.raises(TrainingError, match=r"^out of memory\. A step with training\.batch_size = 16 takes about"):
        train(RECIPE, DATA, device="cpu")


def test_another_runtime_error_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(loss: Loss, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("something else")

    monkeypatch.setattr(Loss, "__call__", broken)
    with pytest.raises(RuntimeError, match="something else"):
        train(RECIPE, DATA, device="cpu")


def test_the_largest_batch_is_the_last_that_fits() -> None:
    memory = StepMemory(fixed=1000, kept_per_sample=70, per_sample=100)
    fits = memory.largest_batch(5000)
    assert memory.total(fits) <= 5000 < memory.total(fits + 1)
    assert memory.largest_batch(900) == 0
    assert "not even one sample fits" in memory.explain(8, 1, 900)
    assert "at most 80 should fit" in memory.explain(100, 2, 5000)


def test_the_free_memory_of_this_machine_is_known() -> None:
    found = available_memory(torch.device("cpu"))
    if found is None:
        pytest.skip("this system has no /proc/meminfo")
    assert 1e6 < found < 1e15


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


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    trained().save(path)
    edit(version=1)(path)
    with pytest.raises(TrainingError, match="another version"):
        load(path)


def test_a_checkpoint_with_weights_that_are_no_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    trained().save(path)
    state = torch.load(path, weights_only=True)
    state["weights"]["maps.dense1_weight.weight"][0, 0] = float("nan")
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
