"""Every built-in recipe trains: two steps on random data of its data set's shape, with its own network and rule.

The CIFAR-10 recipes are meant for a GPU; here they take a smoke run, and a small version of each goes to the chip.
"""

import math

import numpy as np
import pytest
import torch

from spikeport.converters.lower import lower
from spikeport.converters.nir_writer import to_nir
from spikeport.converters.quantize import quantize
from spikeport.deploy import event_simulator, torch_backend
from spikeport.deploy.verify import compare
from spikeport.models.checkpoint import Trained
from spikeport.models.datasets import Dataset, Split
from spikeport.models.recipe import Recipe, builtin_recipes, load_recipe
from spikeport.models.trainer import train

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
SMALLER = {"cnn1": "8C3p1-16C3p1-P2-16C3p1-P4-32-10", "ds-resnet20": "ds-resnet8:4-6-8"}


def random_data(recipe: Recipe, samples: int) -> Dataset:
    rng = np.random.default_rng(0)
    temporal = recipe.data.set == "nmnist"
    shape = (recipe.network.steps, 2, 34, 34) if temporal else SHAPES[recipe.data.set]

    def split(count: int) -> Split:
        images = rng.random((count, *shape), dtype=np.float32)
        images = (images < 0.05).astype(np.uint8) if temporal else images
        return Split(images, np.arange(count, dtype=np.int64) % 10)

    classes = tuple("0123456789")
    return Dataset(recipe.data.set, classes, split(samples), split(2), split(2), temporal=temporal)


def trained_briefly(recipe: Recipe) -> tuple[Trained, Dataset]:
    section = recipe.training.model_copy(update={"epochs": 1, "batch_size": 2, "milestones": ()})
    data = random_data(recipe, 4)
    return train(recipe.model_copy(update={"training": section}), data), data


LARGE = {"cifar10-cnn1", "cifar10-cnn1-tssl", "cifar10-ds-resnet20"}
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in builtin_recipes()]


@pytest.mark.parametrize("name", NAMES)
def test_a_built_in_recipe_takes_two_steps(name: str) -> None:
    trained, _ = trained_briefly(load_recipe(name))
    assert len(trained.history) == 1
    assert math.isfinite(trained.best.loss)
    assert all(value.isfinite().all() for value in trained.network.state_dict().values())


@pytest.mark.parametrize("name", ["cifar10-cnn1", "cifar10-cnn1-tssl", "cifar10-ds-resnet20"])
def test_a_small_version_of_a_recipe_for_a_gpu_reaches_the_chip(name: str) -> None:
    recipe = load_recipe(name)
    section = recipe.network.model_copy(update={"architecture": SMALLER[recipe.network.architecture]})
    recipe = recipe.model_copy(update={"network": section})
    trained, data = trained_briefly(recipe)
    bits = recipe.encoder.message_bits
    graph = lower(to_nir(trained.network, section.dt, section.steps, bits, recipe.readout_kind), name)
    values = recipe.build_encoder()(torch.from_numpy(data.train.images), first_index=0)
    inputs = {"input": values.transpose(0, 1).round().long().numpy().astype(np.uint8)}
    integer, _ = quantize(graph, inputs)
    comparison = compare(integer, torch_backend.run(integer, inputs), event_simulator.run(integer, inputs), inputs)
    assert comparison.equal
    assert comparison.spikes > 0
