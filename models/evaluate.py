"""Running a network without training it: its spikes, its decisions, and how much its neurons fire.

Always in float32 (float64 for a network made so), whatever the precision of training: what is selected is what is
exported.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from spikeport.models.encoders import Encoder
from spikeport.models.networks import TrainableNetwork
from spikeport.models.processes import Processes
from spikeport.models.readouts import ReadoutKind, decide

EVALUATION_BATCH = 500
EVALUATION_VALUES = 1 << 26
"""Neurons times steps times samples of a batch, at most: a quarter of a gigabyte of spikes in float32."""


@torch.no_grad()
def run_batches(
    network: TrainableNetwork,
    images: np.ndarray,
    encoder: Encoder,
    batch: int | None = None,
    processes: Processes | None = None,
) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
    """Run a network on images (samples, ...), batch by batch.

    Yields which samples ran, and what each population sent, (steps, batch, *shape); an output that integrates gives
    its membranes instead. With several processes, each runs every so manieth batch.
    """
    weight = next(network.parameters())
    processes = processes or Processes()

    def run(part: slice) -> dict[str, torch.Tensor]:
        values = torch.from_numpy(images[part]).to(weight.device, weight.dtype)
        outputs: dict[str, torch.Tensor] = network(encoder(values, first_index=part.start))
        return outputs

    training = network.training
    network.eval()
    try:
        if batch is None:
            values = sum(spikes.numel() for spikes in run(slice(0, 1)).values())
            batch = min(EVALUATION_BATCH, max(1, EVALUATION_VALUES // values))
        starts = range(0, len(images), batch)
        for start in starts[processes.rank :: processes.size]:
            part = slice(start, min(start + batch, len(images)))
            yield part, run(part)
    finally:
        network.train(training)


def run_network(
    network: TrainableNetwork,
    images: np.ndarray,
    encoder: Encoder,
    batch: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """What every population sent on images (samples, ...): (samples, steps, *shape).

    Spikes are uint8; an output that integrates gives its membranes in the type of the weights.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for done, outputs in run_batches(network, images, encoder, batch):
        for name, values in outputs.items():
            dtype = values.dtype if is_membrane(network, name) else torch.uint8
            parts.setdefault(name, []).append(values.transpose(0, 1).to(dtype).cpu().numpy())
        if on_batch:
            on_batch(done.stop)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def is_membrane(network: TrainableNetwork, population: str) -> bool:
    """True for an output that integrates and never fires."""
    return network.populations[population].integrates


def read_classes(kind: ReadoutKind, keep: float, output: torch.Tensor) -> np.ndarray:
    """Class of each sample, int64 (batch,), from what the output sent, (steps, batch, classes).

    keep: factor of the output's filtered spikes that survives a step.
    """
    if kind == "membrane":
        return decide(kind, keep, output[-1].cpu().numpy())
    return decide(kind, keep, output.transpose(0, 1).to(torch.uint8).cpu().numpy())


@dataclass
class Activity:
    """How much a population fired, summed over the samples seen so far.

    samples, steps: seen. spikes: in all; a multi-level spike counts its value. silent: neurons that did not fire
    during a sample, summed over samples. fired: which neurons fired in any sample, (neurons,).
    """

    steps: int
    fired: torch.Tensor
    samples: int = 0
    spikes: float = 0.0
    silent: int = 0

    def add(self, spikes: torch.Tensor) -> None:
        """Count spikes (steps, batch, ...)."""
        fired = spikes.ne(0).any(dim=0).flatten(1)
        self.samples += len(fired)
        self.spikes += float(spikes.sum(dtype=torch.float64))
        self.silent += fired.numel() - int(fired.sum())
        self.fired |= fired.any(dim=0)

    @property
    def firing_rate(self) -> float:
        """Spikes of a neuron in a step."""
        return self.spikes / (self.samples * self.steps * len(self.fired))

    @property
    def spikes_per_sample(self) -> float:
        return self.spikes / self.samples

    @property
    def silent_share(self) -> float:
        """Share of the neurons that do not fire during a sample, the mean over samples."""
        return self.silent / (self.samples * len(self.fired))

    @property
    def dead_share(self) -> float:
        """Share of the neurons that fired in no sample."""
        return 1 - int(self.fired.sum()) / len(self.fired)


@dataclass
class Evaluation:
    """A network on a split: share of right decisions, and the activity of each population that fires."""

    samples: int = 0
    right: int = 0
    activity: dict[str, Activity] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return self.right / self.samples

    @property
    def spikes_per_sample(self) -> float:
        """Spikes of all populations."""
        return sum(each.spikes_per_sample for each in self.activity.values())

    def share(self, what: str) -> dict[str, float]:
        """A property of `Activity` by population."""
        return {name: float(getattr(each, what)) for name, each in self.activity.items()}


def evaluate(
    network: TrainableNetwork,
    images: np.ndarray,
    labels: np.ndarray,
    encoder: Encoder,
    readout: ReadoutKind,
    processes: Processes | None = None,
) -> Evaluation:
    """Decisions and activity of a network on a split; no more than one batch of spikes is held at a time.

    With several processes each runs a part, and all return the whole.
    """
    found = Evaluation()
    for part, outputs in run_batches(network, images, encoder, processes=processes):
        decisions = read_classes(readout, network.neuron.current_keep, outputs[network.output])
        found.right += int((decisions == labels[part]).sum())
        found.samples += len(decisions)
        for name, spikes in outputs.items():
            if is_membrane(network, name):
                continue
            if name not in found.activity:
                neurons = spikes[0, 0].numel()
                found.activity[name] = Activity(
                    len(spikes), torch.zeros(neurons, dtype=torch.bool, device=spikes.device)
                )
            found.activity[name].add(spikes)
    return found if processes is None else _merged(processes.gather(found))


def _merged(parts: list[Evaluation]) -> Evaluation:
    """The evaluations of several processes, each of other samples, as one."""
    whole = Evaluation(sum(part.samples for part in parts), sum(part.right for part in parts))
    for part in parts:
        for name, each in part.activity.items():
            if name not in whole.activity:
                whole.activity[name] = Activity(each.steps, torch.zeros_like(each.fired, device="cpu"))
            total = whole.activity[name]
            total.samples += each.samples
            total.spikes += each.spikes
            total.silent += each.silent
            total.fired |= each.fired.cpu()
    return whole
