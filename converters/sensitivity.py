"""Which population's integers cost accuracy: each one quantised alone, all others in floats, and all but that one.

Populations of both kinds run in one graph: a quantised one sends the same binary spikes as a float one. What is lost
with one alone is due to its own weights, decays and threshold; what is regained without it is what finer numbers for
it could bring.
"""

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from spikeport.converters.graph import ProcessGraph
from spikeport.converters.reference import Reference
from spikeport.models.readouts import decide

STATES_PER_BATCH = 2_000_000


@dataclass(frozen=True)
class PopulationSensitivity:
    """Accuracy with this population alone in integers, and with all in integers but this one; 0..1."""

    population: str
    alone: float
    without: float


@dataclass(frozen=True)
class Sensitivity:
    """Accuracy on so many samples of the float network, of the integer one, and between the two."""

    samples: int
    float_accuracy: float
    integer_accuracy: float
    populations: tuple[PopulationSensitivity, ...]

    @property
    def most_sensitive(self) -> PopulationSensitivity:
        """The population that costs most by itself; of equals, the one without which most is regained."""
        return min(self.populations, key=lambda each: (each.alone, -each.without))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sensitivity(
    graph: ProcessGraph,
    integer: ProcessGraph,
    inputs: dict[str, np.ndarray],
    labels: np.ndarray,
    on_step: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Measure what each population costs.

    Args:
        graph, integer: a float graph and what `spikeport.converters.quantize` made of it.
        inputs: (samples, steps, *shape) by input name. labels: (samples,).
        on_step: called with (runs done, runs in all).
    """
    names = [population.name for population in graph.populations]
    sets = [set(), set(names), *({name} for name in names), *(set(names) - {name} for name in names)]
    found = []
    for chosen in sets:
        found.append(_accuracy(mixed(graph, integer, chosen), inputs, labels))
        if on_step:
            on_step(len(found), len(sets))
    alone, without = found[2 : 2 + len(names)], found[2 + len(names) :]
    rows = map(PopulationSensitivity, names, alone, without)
    return Sensitivity(len(labels), found[0], found[1], tuple(rows))


def mixed(graph: ProcessGraph, integer: ProcessGraph, populations: Collection[str]) -> ProcessGraph:
    """The float graph with these populations, and the projections into them, in integers."""
    integers = {population.name: population for population in integer.populations if population.name in populations}
    incoming = {projection.name: projection for projection in integer.projections if projection.target in populations}
    return ProcessGraph(
        graph.name,
        graph.steps,
        graph.dt,
        graph.inputs,
        tuple(integers.get(population.name, population) for population in graph.populations),
        tuple(incoming.get(projection.name, projection) for projection in graph.projections),
        graph.readout,
    )


def _accuracy(graph: ProcessGraph, inputs: dict[str, np.ndarray], labels: np.ndarray) -> float:
    reference, readout = Reference(graph), graph.readout
    batch = max(1, STATES_PER_BATCH // max(node.size for node in graph.nodes))
    right = 0
    for start in range(0, len(labels), batch):
        run = reference.run({name: array[start : start + batch] for name, array in inputs.items()})
        read = run.spikes[readout.population].flatten(2) if run.membrane is None else run.membrane.flatten(1)
        right += int((decide(readout.kind, readout.keep, read.numpy()) == labels[start : start + batch]).sum())
    return right / len(labels)
