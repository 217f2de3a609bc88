"""The training loop: AdamW, cosine schedule, gradient clipping, selection on the validation split."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from spikeport.models.datasets import Dataset, Split
from spikeport.models.errors import SpikeportError, TrainingError
from spikeport.models.files import atomic_path
from spikeport.models.losses import kernel_loss
from spikeport.models.networks import SpikingNetwork, parse_architecture
from spikeport.models.readouts import decide
from spikeport.models.recipe import Recipe

EVALUATION_BATCH = 500
CHECKPOINT_FORMAT = "spikeport-checkpoint"


@dataclass(frozen=True)
class Epoch:
    """What one epoch left: training loss per sample, validation accuracy, firing rate and dead share by population."""

    epoch: int
    loss: float
    validation_accuracy: float
    firing_rate: dict[str, float]
    dead_share: dict[str, float]


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network with its history; the network holds the weights of the best epoch on validation."""

    network: SpikingNetwork
    recipe: Recipe
    history: list[Epoch] = field(default_factory=list)

    @property
    def best(self) -> Epoch:
        """The epoch that was kept: the highest validation accuracy, the last one of equals (a lower learning rate)."""
        return max(self.history, key=lambda epoch: (epoch.validation_accuracy, epoch.epoch))

    def save(self, path: Path) -> None:
        """Write weights, recipe and history to one file."""
        state = {
            "format": CHECKPOINT_FORMAT,
            "recipe": self.recipe.model_dump(mode="json"),
            "history": [asdict(epoch) for epoch in self.history],
            "weights": self.network.state_dict(),
        }
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    @staticmethod
    def load(path: Path, recipe: Recipe, in_shape: tuple[int, ...], classes: int) -> "Trained":
        """Read a checkpoint. Raises TrainingError where it is missing, damaged or of another network."""
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            if state["format"] != CHECKPOINT_FORMAT or not state["history"]:
                raise ValueError("not a whole checkpoint")
            network = build_network(recipe, in_shape, classes)
            if Recipe.model_validate(state["recipe"]).network != recipe.network:
                raise TrainingError(f"{path} was trained with another [network] section. Run `spikeport train` again.")
            network.load_state_dict(state["weights"])
            _check_weights(network, f"{path} holds weights that are NaN or infinite. Run `spikeport train` again.")
            return Trained(network, recipe, [Epoch(**epoch) for epoch in state["history"]])
        except FileNotFoundError:
            raise TrainingError(f"{path} is missing. Run `spikeport train` first.") from None
        except SpikeportError:
            raise
        except Exception as error:  # a damaged file raises anything from zipfile, pickle or torch
            raise TrainingError(f"{path} is damaged ({type(error).__name__}). Run `spikeport train` again.") from None


def _seed(seed: int) -> None:
    """Seed everything that training draws from: initial weights and order of samples both come from torch."""
    torch.manual_seed(seed)


def build_network(recipe: Recipe, in_shape: tuple[int, ...], classes: int) -> SpikingNetwork:
    """The untrained network of a recipe."""
    specs = parse_architecture(recipe.network.architecture, in_shape, classes)
    return SpikingNetwork(specs, recipe.network.neuron(), recipe.rule.build(), recipe.build_encoder().unit)


def train(
    recipe: Recipe,
    data: Dataset,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    device: str | None = None,
) -> Trained:
    """Train a recipe on a data set.

    Args:
        on_epoch: called after each epoch. on_batch: called after each batch with (batches done, batches in all).
        device: torch device; a GPU where there is one by default.

    Raises TrainingError where the loss is not a finite number.
    """
    _seed(recipe.seed)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = recipe.training
    encoder = recipe.build_encoder()
    network = build_network(recipe, data.image_shape, len(data.class_names)).to(place)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.999)
    )
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings.average))
    kept = cast(SpikingNetwork, averaged.module)
    batches = -(-len(data.train) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    images, labels = torch.from_numpy(data.train.images), torch.from_numpy(data.train.labels)
    shuffler = torch.Generator().manual_seed(recipe.seed)
    history: list[Epoch] = []
    best_weights: dict[str, torch.Tensor] = {}
    for epoch in range(1, settings.epochs + 1):
        order = torch.randperm(len(labels), generator=shuffler)
        total = 0.0
        for batch, index in enumerate(order.split(settings.batch_size)):
            picked = _shifted(images[index], settings.shift_pixels, shuffler)
            output = network(encoder(picked.to(place)))[network.output]
            loss = kernel_loss(output, labels[index].to(place), network.neuron.tau_syn)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                raise TrainingError(
                    f"the loss or its gradient is not a finite number in epoch {epoch}, batch {batch + 1}. "
                    "Lower training.learning_rate or raise rule.slope_floor."
                )
            optimizer.step()
            schedule.step()
            averaged.update_parameters(network)
            total += loss.item()
            if on_batch:
                on_batch((epoch - 1) * batches + batch + 1, settings.epochs * batches)
        # weights that overflow silence the network, and its loss then looks like a number
        _check_weights(network, f"weights became infinite in epoch {epoch}. Lower training.learning_rate.")
        result = _validate(kept, data.validation, encoder, epoch, total / len(labels))
        if not history or result.validation_accuracy >= max(e.validation_accuracy for e in history):
            best_weights = {key: value.detach().cpu().clone() for key, value in kept.state_dict().items()}
        history.append(result)
        if on_epoch:
            on_epoch(result)
    network.to("cpu").load_state_dict(best_weights)
    return Trained(network, recipe, history)


def _check_weights(network: SpikingNetwork, message: str) -> None:
    if not all(torch.isfinite(value).all() for value in network.state_dict().values()):
        raise TrainingError(message)


def _shifted(images: torch.Tensor, pixels: int, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by up to `pixels` in both directions, zeros moved in."""
    if not pixels:
        return images
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, [pixels] * 4)
    offsets = torch.randint(0, 2 * pixels + 1, (2, len(images)), generator=generator)
    rows = (offsets[0][:, None] + torch.arange(height))[:, None, :, None]
    columns = (offsets[1][:, None] + torch.arange(width))[:, None, None, :]
    channel = torch.arange(images.shape[1])[None, :, None, None]
    return padded[torch.arange(len(images))[:, None, None, None], channel, rows, columns]


@torch.no_grad()
def run_network(
    network: SpikingNetwork,
    images: np.ndarray,
    encoder: Callable[[torch.Tensor], torch.Tensor],
    batch: int = EVALUATION_BATCH,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Spikes of every population as uint8 (samples, steps, *shape) on images (samples, ...)."""
    place = next(network.parameters()).device
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(images), batch):
        values = torch.from_numpy(images[start : start + batch]).to(place)
        for name, spikes in network(encoder(values)).items():
            parts.setdefault(name, []).append(spikes.transpose(0, 1).to(torch.uint8).cpu().numpy())
        if on_batch:
            on_batch(min(start + batch, len(images)))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _validate(network: SpikingNetwork, split: Split, encoder: Any, epoch: int, loss: float) -> Epoch:
    spikes = run_network(network, split.images, encoder)
    decisions = decide("psc", network.neuron.current_keep, spikes[network.output])
    return Epoch(
        epoch=epoch,
        loss=loss,
        validation_accuracy=float((decisions == split.labels).mean()),
        firing_rate={name: float(array.mean()) for name, array in spikes.items()},
        dead_share={name: float((~array.any(axis=(0, 1))).mean()) for name, array in spikes.items()},
    )
