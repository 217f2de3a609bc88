"""The training loop: one step after the other, selection on the validation split, a state that can be gone on from."""

import copy
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from spikeport.models.augmentation import Augmentation
from spikeport.models.checkpoint import Epoch, Trained, TrainingState, best_epoch, not_finite, training_sections
from spikeport.models.datasets import Dataset
from spikeport.models.diagnose import first_not_finite
from spikeport.models.errors import SpikeportError, TrainingError
from spikeport.models.evaluate import evaluate
from spikeport.models.memory import (
    PROBE_SAMPLES,
    available_memory,
    is_out_of_memory,
    keep_freed_memory,
    step_memory,
)
from spikeport.models.networks import TrainableNetwork, build_network
from spikeport.models.optimizers import make_optimizer, schedule
from spikeport.models.processes import Processes, join_processes
from spikeport.models.recipe import Recipe
from spikeport.models.reproducible import reproducible, seed_of

SECONDS_BETWEEN_STATES = 300.0


def train(
    recipe: Recipe,
    data: Dataset,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    device: str | None = None,
    *,
    state_file: Path | None = None,
    save_every_s: float = SECONDS_BETWEEN_STATES,
) -> Trained:
    """Train a recipe on a data set.

    Args:
        on_epoch: called after each epoch; at once for those that an interrupted training had finished.
        on_batch: called after each batch with (batches done, batches in all).
        device: torch device; a GPU where there is one by default.
        state_file: where the state is written at the end of every epoch and every `save_every_s` seconds. If it is
            there already, training goes on from it, to the same result as without the interruption.

    Started by torchrun, every process takes its share of each batch, and the first one writes the files.

    Raises TrainingError where the loss, a gradient or a weight is not a finite number, where the data do not fit the
    network, where memory runs out, and where the state file is damaged or of another recipe.
    """
    torch.manual_seed(recipe.seed)
    network = build_network(recipe, data.image_shape, len(data.class_names))
    history, seconds = train_network(
        network, recipe, data, on_epoch, on_batch, device, state_file=state_file, save_every_s=save_every_s
    )
    return Trained(network, recipe, history, seconds)


def train_network(
    network: TrainableNetwork,
    recipe: Recipe,
    data: Dataset,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    device: str | None = None,
    *,
    state_file: Path | None = None,
    save_every_s: float = SECONDS_BETWEEN_STATES,
) -> tuple[list[Epoch], float]:
    """Train a network in place, as `train` does, and leave it on the CPU with the weights of the best epoch.

    Returns the history and the seconds that it took, over all parts of an interrupted training.
    """
    _check_data(recipe, data)
    with (
        join_processes(device) as processes,
        reproducible(recipe.training.deterministic),
        keep_freed_memory(processes.device),
    ):
        training = _Training(network, recipe, data, processes)
        training.go_on_from(state_file)
        training.check_memory()
        if on_epoch:
            for epoch in training.history:
                on_epoch(epoch)
        while not training.finished:
            try:
                result = training.run_epoch(state_file, save_every_s, on_batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise TrainingError(f"out of memory. {training.memory_advice()}{_kept(state_file)}") from error
            if on_epoch:
                on_epoch(result)
        return training.history, training.finish()


class _Training:
    """Everything that training changes. `state` and `go_on_from` are each other's inverse."""

    def __init__(self, network: TrainableNetwork, recipe: Recipe, data: Dataset, processes: Processes) -> None:
        self.recipe, self.data, self.processes = recipe, data, processes
        self.settings = settings = recipe.training
        self.encoder = recipe.build_encoder()
        self.loss = recipe.loss.build(recipe.network.tau_syn, recipe.network.output == "membrane")
        self.augment = Augmentation(settings.shift_pixels, settings.flip, settings.rotate_degrees, settings.scale)
        self.images, self.labels = torch.from_numpy(data.train.images), torch.from_numpy(data.train.labels)
        self.batches = -(-len(self.labels) // settings.batch_size)
        self.network = network.to(processes.device)
        self.averaged = copy.deepcopy(self.network) if settings.average else None
        self.parameters = list(self.network.parameters())
        self.optimizer = make_optimizer(settings, self.parameters)
        self.epoch, self.batch, self.total_loss = 0, 0, 0.0
        self.history: list[Epoch] = []
        self.best: dict[str, torch.Tensor] = {}
        self.seconds, self.started = 0.0, time.monotonic()
        self.saved_at = self.started

    @property
    def selected(self) -> TrainableNetwork:
        """The network that is validated and kept."""
        return self.averaged or self.network

    @property
    def finished(self) -> bool:
        """True after the last epoch, or after `patience` epochs without a better validation accuracy."""
        if self.epoch >= self.settings.epochs:
            return True
        if not self.history or self.settings.patience is None:
            return False
        highest = max(epoch.validation_accuracy for epoch in self.history)
        first = next(epoch.epoch for epoch in self.history if epoch.validation_accuracy == highest)
        return self.epoch - first >= self.settings.patience

    def run_epoch(
        self, state_file: Path | None, save_every_s: float, on_batch: Callable[[int, int], None] | None
    ) -> Epoch:
        """The rest of the current epoch, and its validation."""
        shuffler = torch.Generator().manual_seed(seed_of(self.recipe.seed, "order", self.epoch))
        order = torch.randperm(len(self.labels), generator=shuffler)
        for batch, index in enumerate(order.split(self.settings.batch_size)):
            if batch < self.batch:
                continue  # done before the interruption
            self.total_loss += self._step(index, state_file)
            self.batch += 1
            if on_batch:
                on_batch(self.epoch * self.batches + self.batch, self.settings.epochs * self.batches)
            if self.batch < self.batches and time.monotonic() - self.saved_at >= save_every_s:
                self._save(state_file)
        self._average_statistics()
        # weights that overflow silence the network, and its loss then looks like a number
        if name := not_finite(self.network):
            raise TrainingError(
                f"weights of {name!r} became infinite in epoch {self.epoch + 1}. "
                f"Lower training.learning_rate.{_kept(state_file)}"
            )
        result = self._validate()
        if not self.history or result.validation_accuracy >= best_epoch(self.history).validation_accuracy:
            self.best = _on_cpu(self.selected)
        self.history.append(result)
        self.epoch, self.batch, self.total_loss = self.epoch + 1, 0, 0.0
        self._save(state_file)
        return result

    def _step(self, index: torch.Tensor, state_file: Path | None) -> float:
        """Train on the samples with these numbers; returns their loss, summed."""
        place = self.processes.device
        # Each process draws for the whole batch and takes its share then: the samples are those of one process.
        images = self.augment(self.images[index].float(), self._draws("augmentation")).to(place)
        encoded = self.processes.share(self.encoder(images, generator=self._draws("encoder", place)), 1)
        labels = self.processes.share(self.labels[index]).to(place)
        self._seed_dropout()

        def forward() -> torch.Tensor:
            with torch.autocast(place.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
                output = self.network(encoded, output_alone=True)[self.network.output]
            return self.loss(output.float(), labels)

        self.network.train()
        self.network.spike_cost = self.settings.spike_cost * self._steps_done / (self.settings.epochs * self.batches)
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=place)
        if len(labels):
            loss = forward()
            loss.backward()
            loss = loss.detach()
        self.processes.add([loss, *(_gradient(weight) for weight in self.parameters)])
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in self.parameters if weight.grad is not None])
        loss_value, norm_value = torch.stack([loss, norm]).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self._explain(forward if len(labels) else None, state_file)
        if norm_value > self.settings.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * schedule(self.settings, self._steps_done, self.batches)
        self.optimizer.step()
        self._limit_and_average()
        return float(loss_value)

    @torch.no_grad()
    def _limit_and_average(self) -> None:
        limit = self.settings.weight_limit
        if limit is not None:
            for weight in self.parameters:
                if weight.dim() > 1:  # not the scale and shift of a normalisation, nor a bias
                    weight.clamp_(-limit, limit)
        if self.averaged is None:
            return
        # A smaller factor at first: the mean soon forgets the weights that training began with.
        factor = min(self.settings.average, (1 + self._steps_done) / (10 + self._steps_done))
        for mean, weight in zip(self.averaged.parameters(), self.parameters, strict=True):
            mean.lerp_(weight, 1 - factor)
        for kept, buffer in zip(self.averaged.buffers(), self.network.buffers(), strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def _average_statistics(self) -> None:
        """The statistics of a normalisation, which each process takes from its own share, as the mean of all."""
        for network in (self.network, self.averaged):
            buffers = [each for each in (network.buffers() if network else ()) if each.is_floating_point()]
            self.processes.add(buffers)
            for buffer in buffers:
                buffer /= self.processes.size

    def _validate(self) -> Epoch:
        split = self.data.validation
        readout = self.recipe.readout_kind
        found = evaluate(self.selected, split.images, split.labels, self.encoder, readout, self.processes)
        return Epoch(
            epoch=self.epoch + 1,
            loss=self.total_loss / len(self.labels),
            validation_accuracy=found.accuracy,
            firing_rate=found.share("firing_rate"),
            dead_share=found.share("dead_share"),
            silent_share=found.share("silent_share"),
            spikes_per_sample=found.spikes_per_sample,
        )

    def _explain(self, forward: Callable[[], torch.Tensor] | None, state_file: Path | None) -> None:
        """Raise TrainingError naming the layer at which the current step went wrong."""
        self._seed_dropout()
        places = self.processes.gather(first_not_finite(self.network, forward) if forward else None)
        where = next((place for place in places if place), "the sum of the gradients")
        raise TrainingError(
            f"{where} is not a finite number in epoch {self.epoch + 1}, batch {self.batch + 1}. "
            f"Lower training.learning_rate or training.clip_norm.{_kept(state_file)}"
        )

    @property
    def _steps_done(self) -> int:
        return self.epoch * self.batches + self.batch

    def _draws(self, use: str, place: torch.device | None = None) -> torch.Generator:
        """A generator for one use in the current step."""
        seed = seed_of(self.recipe.seed, use, self.epoch, self.batch)
        return torch.Generator(place or torch.device("cpu")).manual_seed(seed)

    def _seed_dropout(self) -> None:
        seed = seed_of(self.recipe.seed, "dropout", self.epoch, self.batch, self.processes.rank)
        # torch.manual_seed takes milliseconds: it writes a stack down for each kind of device that was not used yet
        place = self.processes.device
        if place.type == "cuda":
            torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    # --- Memory

    def check_memory(self) -> None:
        """Raise TrainingError where a step is sure to need more memory than there is."""
        settings = self.settings
        copies = 1 + {"adamw": 2, "sgd": int(settings.momentum > 0)}[settings.optimizer]
        zeros = torch.zeros_like(self.images[:1]).float().to(self.processes.device)
        generator = torch.Generator(self.processes.device)
        encoded = self.encoder(zeros.expand(PROBE_SAMPLES, *zeros.shape[1:]), generator=generator)
        self.memory = step_memory(self.network, encoded, copies, settings.precision == "bfloat16")
        available = available_memory(self.processes.device)
        if available is not None and self.memory.least(self._batch_here) > available:
            raise TrainingError(f"not enough memory. {self.memory_advice()}")

    @property
    def _batch_here(self) -> int:
        """Samples of a batch that this process takes."""
        return -(-min(self.settings.batch_size, len(self.labels)) // self.processes.size)

    def memory_advice(self) -> str:
        available = available_memory(self.processes.device)
        return self.memory.explain(self.settings.batch_size, self.processes.size, available)

    # --- The state

    def state(self) -> TrainingState:
        optimizer = self.optimizer.state_dict()
        return TrainingState(
            recipe=training_sections(self.recipe),
            data=self._data_mark(),
            epoch=self.epoch,
            batch=self.batch,
            loss=self.total_loss,
            seconds=self._seconds(),
            history=[asdict(epoch) for epoch in self.history],
            weights=_on_cpu(self.network),
            averaged=_on_cpu(self.averaged) if self.averaged else None,
            optimizer=optimizer,
            best=self.best,
        )

    def go_on_from(self, path: Path | None) -> None:
        """Take over the state of an interrupted training, where there is one."""
        state: TrainingState | None = None
        error: SpikeportError | None = None
        if path is not None and self.processes.first and path.exists():
            try:
                state = self._checked_state(path)
            except SpikeportError as problem:
                error = problem
        state, error = self.processes.from_first((state, error))
        if error is not None:
            raise error
        if state is None:
            return
        self.network.load_state_dict(state.weights)
        if self.averaged is not None and state.averaged is not None:
            self.averaged.load_state_dict(state.averaged)
        self.optimizer.load_state_dict(state.optimizer)
        self.epoch, self.batch, self.total_loss = state.epoch, state.batch, state.loss
        self.history = [Epoch(**epoch) for epoch in state.history]
        self.best, self.seconds = state.best, state.seconds

    def _checked_state(self, path: Path) -> TrainingState:
        state = TrainingState.load(path)
        state.check_recipe(self.recipe, path)
        if state.data != self._data_mark():
            raise TrainingError(f"{path} was trained on other data. `spikeport train --restart` begins anew.")
        return state

    def _data_mark(self) -> list[int]:
        """Numbers that tell the training samples from others."""
        some = self.data.train.images[:: max(1, len(self.labels) // 100)]
        return [*self.data.train.images.shape, zlib.crc32(self.data.train.labels.tobytes()), zlib.crc32(some.tobytes())]

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def _save(self, path: Path | None) -> None:
        if path is not None and self.processes.first:
            self.state().save(path)
        self.saved_at = time.monotonic()

    def finish(self) -> float:
        """Put the network onto the CPU with the weights of the best epoch; returns the seconds spent."""
        network = self.network.to("cpu")
        network.load_state_dict(self.best)
        network.eval()
        return round(self._seconds(), 3)


def _gradient(weight: torch.nn.Parameter) -> torch.Tensor:
    """The gradient of a weight; zeros where this process had no sample."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def _on_cpu(network: TrainableNetwork) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}


def _kept(state_file: Path | None) -> str:
    """Where the last good state is, as the end of an error."""
    return f"\nThe last good state is kept in {state_file}." if state_file is not None and state_file.exists() else ""


def _check_data(recipe: Recipe, data: Dataset) -> None:
    """Raise TrainingError where a network of the recipe cannot take the data.

    That labels are in range and images are numbers is `Dataset`'s own check.
    """
    steps = recipe.network.steps
    if data.temporal and data.train.images.shape[1] != steps:
        raise TrainingError(
            f"recordings of {data.name!r} have {data.train.images.shape[1]} frames; network.steps = {steps}."
        )
