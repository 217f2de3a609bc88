"""Files of a training: `Trained`, the network that was kept, and the state from which a killed training goes on."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from spikeport.models.errors import SpikeportError, TrainingError
from spikeport.models.files import atomic_path
from spikeport.models.networks import SpikingNetwork, TrainableNetwork, build_network
from spikeport.models.recipe import Recipe

CHECKPOINT_FORMAT = "spikeport-checkpoint"
CHECKPOINT_VERSION = 2
STATE_FORMAT = "spikeport-training"
STATE_VERSION = 1
SECTIONS_OF_TRAINING = ("seed", "data", "network", "encoder", "rule", "loss", "readout", "training")
"""What decides the weights; the rest of a recipe may change between two parts of a training."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch left: the training loss per sample, and the network on the validation split.

    By population: firing_rate, spikes of a neuron in a step (a multi-level spike counts its value); dead_share,
    neurons that fired in no sample; silent_share, neurons that do not fire during a sample, the mean over samples.
    spikes_per_sample: of all populations. An output that integrates has no spikes, and is left out.
    """

    epoch: int
    loss: float
    validation_accuracy: float
    firing_rate: dict[str, float]
    dead_share: dict[str, float]
    silent_share: dict[str, float]
    spikes_per_sample: float


def best_epoch(history: list[Epoch]) -> Epoch:
    """The epoch that is kept: the highest validation accuracy, the last one of equals (a lower learning rate)."""
    return max(history, key=lambda epoch: (epoch.validation_accuracy, epoch.epoch))


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network with its history; the network holds the weights of the best epoch on validation.

    seconds: that training took, over all its parts if it was interrupted.
    """

    network: SpikingNetwork
    recipe: Recipe
    history: list[Epoch] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def best(self) -> Epoch:
        """The epoch that was kept."""
        return best_epoch(self.history)

    def save(self, path: Path) -> None:
        """Write weights, recipe and history to one file."""
        state = {
            "format": CHECKPOINT_FORMAT,
            "version": CHECKPOINT_VERSION,
            "recipe": self.recipe.model_dump(mode="json"),
            "history": [asdict(epoch) for epoch in self.history],
            "seconds": self.seconds,
            "weights": self.network.state_dict(),
        }
        _write(path, state)

    @staticmethod
    def load(path: Path, recipe: Recipe, in_shape: tuple[int, ...], classes: int) -> "Trained":
        """Read a checkpoint. Raises TrainingError where it is missing, damaged or of another network."""
        again = "Run `spikeport train` again."
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            if state["format"] != CHECKPOINT_FORMAT or not state["history"]:
                raise ValueError("not a whole checkpoint")
            if state.get("version", 1) != CHECKPOINT_VERSION:
                raise TrainingError(f"{path} was written by another version of spikeport. {again}")
            network = build_network(recipe, in_shape, classes)
            if Recipe.model_validate(state["recipe"]).network != recipe.network:
                raise TrainingError(f"{path} was trained with another [network] section. {again}")
            network.load_state_dict(state["weights"])
            if not_finite(network):
                raise TrainingError(f"{path} holds weights that are NaN or infinite. {again}")
            history = [Epoch(**epoch) for epoch in state["history"]]
            return Trained(network, recipe, history, float(state["seconds"]))
        except FileNotFoundError:
            raise TrainingError(f"{path} is missing. Run `spikeport train` first.") from None
        except SpikeportError:
            raise
        except Exception as error:  # a damaged file raises anything from zipfile, pickle or torch
            raise TrainingError(f"{path} is damaged ({type(error).__name__}). {again}") from None


def not_finite(network: TrainableNetwork) -> str | None:
    """Name of the first weight that holds a NaN or an infinity."""
    values = network.state_dict().items()
    return next((name for name, value in values if not bool(torch.isfinite(value).all())), None)


@dataclass
class TrainingState:
    """A training after `batch` batches of the epoch that follows `epoch` whole ones.

    Every random number follows from the seed and these two, so that no generator's state is part of it. Tensors lie on
    the CPU.

    data: what tells the training samples from others. loss: summed over the samples of the epoch so far. averaged: the
    running mean of the weights, None where there is none. best: weights of the best epoch so far. seconds: spent.
    """

    recipe: dict[str, Any]
    data: list[int]
    epoch: int
    batch: int
    loss: float
    seconds: float
    history: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]
    averaged: dict[str, torch.Tensor] | None
    optimizer: dict[str, Any]
    best: dict[str, torch.Tensor]

    def save(self, path: Path) -> None:
        """Write the state; the file before it stays whole until this one is."""
        state = {each.name: getattr(self, each.name) for each in fields(self)}
        _write(path, {"format": STATE_FORMAT, "version": STATE_VERSION} | state)

    @staticmethod
    def load(path: Path) -> "TrainingState":
        """Read a state. Raises TrainingError where it is damaged or of another version."""
        remedy = "`spikeport train --restart` begins anew."
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            if state.pop("format") != STATE_FORMAT:
                raise ValueError("not a training state")
            if state.pop("version") != STATE_VERSION:
                raise TrainingError(f"{path} was written by another version of spikeport; {remedy}")
            return TrainingState(**state)
        except SpikeportError:
            raise
        except Exception as error:
            raise TrainingError(f"{path} is damaged ({type(error).__name__}); {remedy}") from None

    def check_recipe(self, recipe: Recipe, path: Path) -> None:
        """Raise TrainingError naming the first key by which the state's recipe differs from this one."""
        found = first_difference(self.recipe, training_sections(recipe))
        if found is not None:
            key, stored, asked = found
            raise TrainingError(
                f"{path} is the unfinished training of another recipe: {key} = {stored!r} there, {asked!r} here.\n"
                "Train into another folder, or give up what is there with --restart."
            )


def training_sections(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides the weights, with every default filled in."""
    return recipe.model_dump(mode="json", include=set(SECTIONS_OF_TRAINING))


def first_difference(one: Any, other: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first dotted key by which two nested tables differ, and both its values; None for one that is missing."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return None if one == other else (key, one, other)
    for part in [*other, *(part for part in one if part not in other)]:
        found = first_difference(one.get(part), other.get(part), f"{key}.{part}" if key else part)
        if found:
            return found
    return None


def _write(path: Path, state: dict[str, Any]) -> None:
    """Write a file whole or not at all. Raises SpikeportError where there is no space; what was there before stays."""
    with atomic_path(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:
            # torch's writer tells of a full disk by a RuntimeError about positions in the file
            unharmed = " What it held before is unharmed." if path.exists() else ""
            raise SpikeportError(f"cannot write {path} as a whole; is the disk full?{unharmed}") from error
