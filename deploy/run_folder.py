"""The run folder: which file each stage reads and writes, and how to get at them."""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nir
import numpy as np
import torch

from spikeport.converters.graph import ProcessGraph
from spikeport.converters.lower import lower
from spikeport.converters.nir_reader import read_nir
from spikeport.deploy.chip import Chip
from spikeport.deploy.mapping import Mapping
from spikeport.deploy.timing import Timing
from spikeport.deploy.trace import Trace
from spikeport.models.checkpoint import Trained, TrainingState
from spikeport.models.datasets import Dataset, load_dataset
from spikeport.models.datasets.arrays import arrays_dataset, read_arrays_file
from spikeport.models.errors import SpikeportError
from spikeport.models.files import read_json, write_json, write_text
from spikeport.models.processes import is_first_process
from spikeport.models.recipe import ArraysSection, ImportedRecipe, Recipe, parse_any_recipe, parse_recipe


@dataclass(frozen=True, eq=False)
class RunFolder:
    """A folder that holds one run. Every file is written whole or not at all."""

    path: Path

    @staticmethod
    def create(path: Path, recipe_text: str, restart: bool = False) -> "RunFolder":
        """Make the folder and put the recipe into it; of several processes the first one does.

        Raises SpikeportError where it cannot be written, and TrainingError where it holds the unfinished training of
        another recipe that is not to be given up by `restart`.
        """
        folder = RunFolder(Path(path))
        folder.__dict__["recipe_text"] = recipe_text
        if is_first_process():
            if folder.state_file.is_file() and not restart:
                TrainingState.load(folder.state_file).check_recipe(folder.training_recipe, folder.state_file)
            write_text(folder.recipe_file, recipe_text)
        return folder

    @staticmethod
    def open(path: Path) -> "RunFolder":
        """An existing run folder. Raises SpikeportError where there is none."""
        folder = RunFolder(Path(path))
        if not folder.recipe_file.is_file():
            raise SpikeportError(f"{path} is not a run folder (it has no recipe.toml). Run `spikeport train` first.")
        return folder

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def checkpoint_file(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def state_file(self) -> Path:
        """From what an interrupted training goes on."""
        return self.path / "training.pt"

    def fine_tuning_file(self, graph: ProcessGraph) -> Path:
        """From what an interrupted fine-tuning of these integers goes on."""
        return self.path / f"fine-tuning-{graph.fingerprint()}.pt"

    def forget_fine_tuning(self) -> None:
        """Delete states of fine-tunings, half ones too."""
        for pattern in ("fine-tuning-*.pt", ".fine-tuning-*.pt"):
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)

    @property
    def tensorboard_folder(self) -> Path:
        return self.path / "tensorboard"

    @property
    def nir_file(self) -> Path:
        return self.path / f"{self.recipe.name}.nir"

    @property
    def graph_file(self) -> Path:
        return self.path / "graph.npz"

    def onnx_file(self, kind: str) -> Path:
        """The integer network as ONNX; kind: step or window."""
        return self.path / f"{self.recipe.name}-{kind}.onnx"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def bundle_folder(self) -> Path:
        return self.path / "bundle"

    def trace_file(self, backend: str) -> Path:
        return self.path / f"trace-{backend}.npz"

    def timing_file(self, chip: Chip) -> Path:
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", chip.name)
        return self.path / f"timing-{name}-{chip.digest[:8]}.npz"

    def timing(self, chip: Chip) -> Timing | None:
        """The stored timing on a chip with these very costs; None where `simulate` left none."""
        path = self.timing_file(chip)
        return Timing.load(path, self.graph) if path.is_file() else None

    def mapping(self) -> Mapping:
        return Mapping.from_json(read_json(self.result_file("mapping"), "spikeport map"))

    def forget_timings(self) -> None:
        """Remove stored timings: of another trace or mapping."""
        for path in self.path.glob("timing-*.npz"):
            path.unlink()

    def result_file(self, stage: str) -> Path:
        """JSON with what a stage found out and how long it took."""
        return self.path / f"{stage}.json"

    @cached_property
    def recipe_text(self) -> str:
        try:
            return self.recipe_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpikeportError(f"{self.recipe_file} cannot be read: {error}.") from None

    @cached_property
    def recipe(self) -> Recipe | ImportedRecipe:
        return parse_any_recipe(self.recipe_text, str(self.recipe_file))

    @property
    def training_recipe(self) -> Recipe:
        """The recipe of a network that is trained here. Raises RecipeError where the network was imported."""
        return parse_recipe(self.recipe_text, str(self.recipe_file))

    @property
    def arrays_file(self) -> Path:
        """The spikes that a user gave to an imported network."""
        section = self.recipe.data
        if not isinstance(section, ArraysSection):
            raise SpikeportError(f"{self.path} runs on the data set {section.set}, not on given arrays.")
        return self.path / section.file

    @cached_property
    def data(self) -> Dataset:
        recipe = self.recipe
        if isinstance(recipe, ImportedRecipe) and isinstance(recipe.data, ArraysSection):
            note = str(self.result("import")["data_note"])
            arrays = read_arrays_file(self.arrays_file)
            return arrays_dataset(recipe.data.file, arrays, recipe.imported.output_size, note)
        return load_data(recipe)

    def forget_state(self, everything: bool) -> None:
        """Delete what a training killed while it wrote its state has left; `everything`: the state as well."""
        for half in self.path.glob(f".{self.state_file.stem}-*{self.state_file.suffix}"):
            half.unlink(missing_ok=True)
        if everything:
            self.state_file.unlink(missing_ok=True)

    def trained(self) -> Trained:
        recipe = self.training_recipe
        return Trained.load(self.checkpoint_file, recipe, self.data.image_shape, len(self.data.class_names))

    def float_graph(self) -> ProcessGraph:
        """The network of the NIR file, lowered, before quantisation."""
        recipe = self.recipe
        if isinstance(recipe, ImportedRecipe):
            return lower_imported(read_nir(self.nir_file), recipe)
        return lower(read_nir(self.nir_file), recipe.name)

    @cached_property
    def graph(self) -> ProcessGraph:
        return ProcessGraph.load(self.graph_file)

    @cached_property
    def test_inputs(self) -> dict[str, np.ndarray]:
        """The encoded test set, by input name."""
        return self.encode(self.data.test.images)

    def encode(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Images (n, channels, height, width) as integer spikes (n, steps, *shape of the network's input)."""
        spikes, recipe = encode(self.recipe, images), self.recipe
        if not isinstance(recipe, ImportedRecipe):
            return {"input": spikes}
        shape = recipe.imported.input_shape
        if spikes[0, 0].size != math.prod(shape):
            raise SpikeportError(f"the data set's samples are of shape {spikes.shape[2:]}, the network takes {shape}.")
        return {recipe.imported.input: spikes.reshape(*spikes.shape[:2], *shape)}

    def trace(self, backend: str) -> Trace:
        return Trace.load(self.trace_file(backend))

    def write_result(self, stage: str, value: dict[str, Any]) -> None:
        write_json(self.result_file(stage), value)

    def result(self, stage: str) -> dict[str, Any]:
        value = read_json(self.result_file(stage), f"spikeport {stage.split('-')[0]}")
        if not isinstance(value, dict):
            raise SpikeportError(f"{self.result_file(stage)} is damaged. Run `spikeport {stage.split('-')[0]}` again.")
        return value


def lower_imported(graph: nir.NIRGraph, recipe: ImportedRecipe) -> ProcessGraph:
    """Lower an imported network as its recipe has it. Raises GraphError naming what the chip cannot do."""
    section = recipe.imported
    return lower(
        graph,
        recipe.name,
        dt=section.dt,
        reset=section.reset,
        discretization=section.discretization,
        steps=section.steps,
        message_bits=recipe.encoder.message_bits,
        readout=section.readout,
    )


def load_data(recipe: Recipe | ImportedRecipe) -> Dataset:
    """The data set of a recipe. Raises DataError where it cannot be had."""
    section, steps = recipe.data, recipe.steps
    assert not isinstance(section, ArraysSection), "arrays lie in a run folder"
    return load_dataset(
        section.set,
        section.validation,
        recipe.seed,
        section.test,
        steps=steps,
        bin_ms=section.bin_ms,
        events=section.events,
        downsample=section.downsample,
        subset=section.subset,
    )


def encode(recipe: Recipe | ImportedRecipe, images: np.ndarray) -> np.ndarray:
    """The first images of a split as the recipe's integer spikes, (n, steps, ...), uint8 or int32 by their bits."""
    dtype = torch.uint8 if recipe.encoder.message_bits <= 8 else torch.int32
    spikes = recipe.build_encoder()(torch.from_numpy(images), first_index=0).transpose(0, 1).to(dtype)
    return spikes.contiguous().numpy()
