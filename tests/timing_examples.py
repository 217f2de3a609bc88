"""A timing of a small random network on a chip of few neurons a core, and a full disk, for tests of what is written."""

import functools
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from graph_strategies import random_graph, random_inputs

from spikeport.converters.graph import ProcessGraph
from spikeport.deploy.chip import load_chip
from spikeport.deploy.event_simulator import run
from spikeport.deploy.mapping import Mapping, map_network
from spikeport.deploy.timing import Model, Timing, simulate_timing
from spikeport.deploy.workload import count, prepare


@functools.cache
def timed(seed: int, model: Model = "cycle", neurons: int = 4) -> tuple[ProcessGraph, Mapping, Timing]:
    """A random graph on Loihi with so many neurons a core and four cores a chip's tile, on a mesh of 2 × 2 tiles."""
    chip = load_chip("loihi")
    chip = chip.model_copy(
        update={
            "limits": chip.limits.model_copy(update={"neurons": neurons}),
            "mesh": chip.mesh.model_copy(update={"columns": 2, "rows": 2}),
        }
    )
    graph = random_graph(seed, graded=False)
    mapping = map_network(graph, chip)
    workload = prepare(graph, mapping, run(graph, random_inputs(graph, seed), threads=1))
    return graph, mapping, simulate_timing(workload, count(workload), chip, model, threads=1)


def with_steps(timing: Timing, times: int) -> Timing:
    """The same chip steps, so many times over."""
    return replace(
        timing,
        causes={cause: ticks.repeat(times) for cause, ticks in timing.causes.items()},
        **{
            name: getattr(timing, name).repeat(times, axis=0)
            for name in (
                "step_ticks",
                "critical_core",
                "neuron_ticks",
                "synapse_ticks",
                "stalled",
                "neuron_end",
                "synapses_began",
                "synapses_end",
            )
        },
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full from there on, as far as one file is concerned."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
