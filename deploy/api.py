"""The Python API: a recipe, from training to a verified network on the chip, in a few calls.

The same functions and files as the command line's stages, without a run folder.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spikeport.converters.graph import ProcessGraph, Reset
from spikeport.converters.lower import lower
from spikeport.converters.nir_float import FloatNetwork
from spikeport.converters.nir_reader import read_nir
from spikeport.converters.nir_timing import Discretization
from spikeport.converters.nir_writer import to_nir, write_nir
from spikeport.converters.qat import IntegerNetwork, fine_tune
from spikeport.converters.quantize import quantize
from spikeport.deploy import event_simulator, lava_backend, torch_backend
from spikeport.deploy.chip import load_chip
from spikeport.deploy.energy import price
from spikeport.deploy.mapping import Mapping, map_network
from spikeport.deploy.run_folder import encode, load_data
from spikeport.deploy.summary import Cost
from spikeport.deploy.timing import Model, Timing, simulate_timing
from spikeport.deploy.trace import Trace, decisions
from spikeport.deploy.verify import Comparison, compare
from spikeport.deploy.workload import count, prepare
from spikeport.models.checkpoint import Trained
from spikeport.models.datasets import Dataset
from spikeport.models.errors import BackendError
from spikeport.models.readouts import ReadoutKind
from spikeport.models.recipe import Recipe, load_recipe
from spikeport.models.trainer import train

__all__ = [
    "FloatNetwork",
    "Network",
    "OnChip",
    "accuracy",
    "convert",
    "convert_file",
    "load_recipe",
    "on_chip",
    "read_file",
    "simulate",
    "train_recipe",
    "verify",
]

INPUT = "input"


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network with the data it was trained on."""

    trained: Trained
    data: Dataset

    @property
    def recipe(self) -> Recipe:
        return self.trained.recipe

    def test_inputs(self, samples: int | None = None) -> dict[str, np.ndarray]:
        """The first test samples as spikes (samples, steps, *shape), by input name; all of them by default."""
        return {INPUT: encode(self.recipe, self.data.test.images[:samples])}

    def to_nir(self, path: Path | str) -> None:
        """Write the network as a NIR file."""
        settings, bits = self.recipe.network, self.recipe.encoder.message_bits
        graph = to_nir(self.trained.network, settings.dt, settings.steps, bits, self.recipe.readout_kind)
        write_nir(graph, Path(path))


def train_recipe(recipe: Recipe) -> Network:
    """Train a recipe on its data set."""
    data = load_data(recipe)
    return Network(train(recipe, data), data)


def convert(network: Network, nir_file: Path | str) -> ProcessGraph:
    """Write NIR, read it back, lower it and quantise it on training samples, and train the integers on where the recipe
    says so: the chip's integers."""
    network.to_nir(nir_file)
    recipe = network.recipe
    samples = encode(recipe, network.data.train.images[: recipe.quantization.calibration_samples])
    graph = lower(read_nir(Path(nir_file)), recipe.name)
    integer, report = quantize(graph, {INPUT: samples}, bits=recipe.quantization.weight_bits)
    epochs = recipe.quantization.fine_tuning.epochs
    if not epochs:
        return integer
    trained = IntegerNetwork(report.graph, integer, report.scales, recipe.rule.build())
    return fine_tune(trained, recipe.with_fine_tuning(epochs), network.data).graph


def read_file(
    path: Path | str,
    *,
    dt: float | None = None,
    reset: Reset | None = None,
    discretization: Discretization | None = None,
) -> FloatNetwork:
    """A network trained elsewhere, from a NIR file: `.run(inputs)` runs any such graph in floats, node by node.

    dt and reset are needed where the file's metadata does not record them. Raises GraphError where the file is wrong.
    """
    return FloatNetwork(read_nir(Path(path)), str(path), dt=dt, reset=reset, discretization=discretization)


def convert_file(
    path: Path | str,
    calibration: dict[str, np.ndarray],
    *,
    dt: float | None = None,
    reset: Reset | None = None,
    discretization: Discretization | None = None,
    readout: ReadoutKind | None = None,
) -> ProcessGraph:
    """Lower a NIR file and quantise it on sample spikes (samples, steps, *shape) by input name: the chip's integers.

    Raises GraphError naming the node that the chip cannot do; `read_file` runs it nevertheless.
    """
    first = next(iter(calibration.values()))
    graph = lower(
        read_nir(Path(path)),
        Path(path).stem,
        dt=dt,
        reset=reset,
        discretization=discretization,
        steps=first.shape[1],
        message_bits=max(1, int(max(array.max() for array in calibration.values())).bit_length()),
        readout=readout,
    )
    integer, _ = quantize(graph, calibration)
    return integer


def simulate(graph: ProcessGraph, inputs: dict[str, np.ndarray], backend: str = "events") -> Trace:
    """Run a graph on a backend: torch, events or lava."""
    match backend:
        case "torch":
            return torch_backend.run(graph, inputs)
        case "events":
            return event_simulator.run(graph, inputs)
        case "lava":
            return lava_backend.run(graph, inputs)
    raise BackendError(f"unknown backend {backend!r}. Known: torch, events, lava.")


def verify(graph: ProcessGraph, first: Trace, second: Trace) -> Comparison:
    """Compare two traces spike for spike; the result prints as one line and names the first difference."""
    return compare(graph, first, second)


@dataclass(frozen=True, eq=False)
class OnChip:
    """A run on a chip: where the network lies, when everything happened, and what one inference costs."""

    mapping: Mapping
    timing: Timing
    cost: Cost


def on_chip(graph: ProcessGraph, trace: Trace, chip: str | Path = "loihi", model: Model = "cycle") -> OnChip:
    """Map a graph onto a chip (a built-in name or a chip file), time a trace of `events` on it and price it.

    Raises DoesNotFitError with what does not fit and by how much.
    """
    costs = load_chip(chip)
    mapping = map_network(graph, costs)
    workload = prepare(graph, mapping, trace)
    counts = count(workload)
    timing = simulate_timing(workload, counts, costs, model)
    return OnChip(mapping, timing, price(workload, costs, counts, timing))


def accuracy(graph: ProcessGraph, trace: Trace, labels: np.ndarray) -> float:
    """Share of samples decided as labelled, 0..1; `labels` may be longer than the trace."""
    return float((decisions(graph.readout, trace) == labels[: trace.samples]).mean())
