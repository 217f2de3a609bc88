"""Event files for TensorBoard, in a run folder's `tensorboard/`."""

from pathlib import Path

from spikeport.models.checkpoint import Epoch
from spikeport.models.errors import BackendUnavailableError
from spikeport.models.recipe import Recipe


class Events:
    """Writes each epoch as scalars. Use `open_events`."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))
        self.writer.add_text("recipe", recipe.model_dump_json(indent=2))

    def add(self, epoch: Epoch) -> None:
        scalars = {
            "loss/train": epoch.loss,
            "accuracy/validation": epoch.validation_accuracy,
            "spikes per sample": epoch.spikes_per_sample,
        }
        by_population = {
            "firing rate": epoch.firing_rate,
            "dead share": epoch.dead_share,
            "silent share": epoch.silent_share,
        }
        for what, values in by_population.items():
            scalars |= {f"{what}/{name}": value for name, value in values.items()}
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, epoch.epoch)
        self.writer.flush()


def open_events(folder: Path, recipe: Recipe) -> Events:
    """Begin event files in a folder, in place of those of an earlier start: training tells of every epoch again.

    Raises BackendUnavailableError where the package `tensorboard` is not installed.
    """
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    try:
        return Events(folder, recipe)
    except ImportError:
        raise BackendUnavailableError(
            "--tensorboard needs the package tensorboard. Install it with: pip install 'spikeport[tensorboard]'"
        ) from None
