"""One process of `bench/train_speed.py` that trains with our trainer: prints what it measured as JSON.

    python bench/train_ours.py '{"network": "mnist", "variant": "csbp"}'

A step is the trainer's own: it draws the batch, encodes it, clips the gradient and looks at the loss. With "window" as
the network, it is the forward and backward pass of one population alone, for each number of steps.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import train_step
from train_step import Job

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.datasets.base import Dataset, Split
from spikeport.models.memory import keep_freed_memory
from spikeport.models.networks import build_network
from spikeport.models.processes import join_processes
from spikeport.models.recipe import Recipe
from spikeport.models.rules import CSBP, STBP, TSSL
from spikeport.models.rules.rate_bp import fit_curves
from spikeport.models.trainer import _Training

WINDOW = (15, 24, 24)
"""Shape of the first population of the MNIST network: out of any cache at 5 steps already."""


def recipe(job: Job) -> Recipe:
    """The network of a job under one of our rules."""
    encoder = train_step.ENCODERS[job.network]
    return Recipe.model_validate(
        {
            "name": job.network,
            "data": {"set": "mnist", "validation": job.batch},
            "network": {
                "architecture": train_step.ARCHITECTURES[job.network],
                "steps": job.steps,
                "tau_mem": train_step.TAU_MEM,
                "tau_syn": 1.0,  # as the peers' neurons; ours run the filter all the same
                "threshold": train_step.THRESHOLD,
            },
            "encoder": {"name": encoder, "message_bits": train_step.MESSAGE_BITS if encoder == "graded" else 1},
            "rule": {"name": job.variant},
            "loss": {"name": "rate_cross_entropy", "gain": train_step.LOSS_GAIN},
            "training": {
                "epochs": 1,
                "batch_size": job.batch,
                "learning_rate": train_step.LEARNING_RATE,
                "schedule": "constant",
                "clip_norm": train_step.CLIP_NORM,
                "precision": job.precision,
            },
        }
    )


def train(job: Job) -> dict[str, Any]:
    """Measure the steps of a training."""
    images, labels = train_step.images_and_labels(job.batch)
    split = Split(images.numpy(), labels.numpy())
    data = Dataset("random", tuple(map(str, range(train_step.CLASSES))), split, split, split)
    index = torch.arange(job.batch)
    asked = recipe(job)
    if job.variant == "rate_bp":
        fit_curves(asked.network.neuron(), job.steps)  # once a training, so no part of a step
    with join_processes("cpu") as processes, keep_freed_memory(processes.device):
        code = load_windows()
        torch.manual_seed(asked.seed)
        network = build_network(asked, data.image_shape, len(data.class_names))
        training = _Training(network, asked, data, processes)
        network.rule = replace(network.rule, eager=job.eager)
        with torch.no_grad():
            for weight, first in zip(training.parameters, train_step.first_weights(job.network), strict=True):
                weight.copy_(first)
            encoded = training.encoder(images)
            with job.autocast():
                found = train_step.rates([encoded * network.input_unit, *network(encoded).values()])
        del encoded

        def step() -> None:
            training._step(index, None)
            training.batch += 1

        ran = "torch operations" if job.eager else "compiled windows"
        return train_step.measure(step, job) | {"rates": found, "ran": ran, "code_mib": code}


def load_windows() -> float:
    """Memory that the machine code of the compiled windows takes, MiB; loaded for the eager version as well, so that
    peaks differ by what a step needs."""
    before = train_step.memory_mib("VmRSS")
    x = torch.zeros((2, 1, 64), requires_grad=True)
    STBP()(x, CubaLIF()).sum().backward()
    return train_step.memory_mib("VmRSS") - before


def windows(job: Job, all_steps: Iterable[int]) -> dict[str, Any]:
    """Median seconds of a population's window, forward and backward, by its number of steps."""
    rule = {"csbp": CSBP(), "stbp": STBP(), "tssl": TSSL()}[job.variant]
    neuron = CubaLIF(1.0, train_step.TAU_MEM, train_step.THRESHOLD)
    draws = torch.Generator().manual_seed(3)
    found = {}
    with keep_freed_memory(torch.device("cpu")):
        for steps in all_steps:
            x = (0.5 * torch.randn((steps, job.batch, *WINDOW), generator=draws)).requires_grad_()
            errors = torch.randn(x.shape, generator=draws)
            times = []
            for _ in range(job.warm_up + job.counted):
                started = time.perf_counter()
                rule(x, neuron).backward(errors)
                times.append(time.perf_counter() - started)
                x.grad = None
            found[str(steps)] = statistics.median(times[job.warm_up :])
    return found


if __name__ == "__main__":
    given = Job.from_arguments()
    if given.network == "window":
        print(json.dumps(windows(given, map(int, sys.argv[2:]))))
    else:
        print(json.dumps(train(given)))
