"""`suspects`: which known faults make a backend fire what it fired, where that is not what its network says.

Each fault is put into the one population that differs, which then runs on the spikes that the backend's own populations
sent. A fault is named only where it gives every spike of the population, in every sample that is tried.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from spikeport.converters.graph import ProcessGraph
from spikeport.deploy.differences import permutation
from spikeport.deploy.faults import Cause, Fault, faults
from spikeport.deploy.replay import Cell, Place, States, lagging, replay, sent_spikes
from spikeport.deploy.trace import Trace

SAMPLES_BEFORE, SAMPLES_TRIED = 4, 256
"""Samples on which a fault must give the very spikes of a side: so many before the first difference, and in all."""
MOST_STATES = 4_000_000
"""Neuron-steps of the samples on which faults are tried, which bounds memory and time; at least one sample is taken."""
MOST_STREAMED_STEPS = 20_000
"""Up to so many steps before the difference, a state that was not reset between samples is among the known faults."""


@dataclass(frozen=True, eq=False)
class _Evidence:
    """Samples of a side: what its sources sent, and what it fired and held. Arrays (samples, steps, n)."""

    sent: dict[str, np.ndarray]
    fired: np.ndarray
    membranes: np.ndarray | None
    steps: int

    def fits(self, states: States) -> bool:
        held = self.membranes is None or np.array_equal(states.v[:, -1], self.membranes)
        return held and np.array_equal(states.spikes, self.fired)

    def run(self, cell: Cell, keep_state: bool = False) -> States:
        return replay(cell, self.sent, len(self.fired), self.steps, keep_state)


@dataclass(frozen=True, eq=False)
class Scene:
    """A side that does not follow its graph, where it first shows.

    other: the trace of the other side. inputs: what was run, None where both traces tell it.
    """

    graph: ProcessGraph
    trace: Trace
    other: Trace
    inputs: dict[str, np.ndarray] | None
    place: Place

    @property
    def cell(self) -> Cell:
        return Cell.of(self.graph, self.place.population)

    def evidence(self, samples: slice) -> _Evidence:
        name = self.place.population
        sources = {projection.source for projection in self.graph.incoming(name)}
        sent = sent_spikes(self.graph, sources, (self.trace, self.other), self.inputs, samples)
        assert sent is not None, "a side without its graded inputs is not known not to follow its graph"
        probed = self.graph.probed is not None and self.graph.probed.name == name
        membranes = self.trace.membrane[samples] if probed and self.trace.membrane is not None else None
        return _Evidence(sent, self.trace.spikes(name, samples), membranes, self.graph.steps)


def suspects(scene: Scene) -> tuple[list[Cause], Fault | None]:
    """The known faults that give exactly what the side fired; one cause that says so where none does.

    Beside them the first of those faults that lies in the population's parameters, weights or arrival times.
    """
    place, backend, cell = scene.place, scene.trace.backend, scene.cell
    count = max(1, min(SAMPLES_TRIED, MOST_STATES // (scene.graph.steps * cell.population.size)))
    start = max(0, place.sample - min(SAMPLES_BEFORE, count - 1))
    alone = scene.evidence(slice(place.sample, place.sample + 1))
    several = scene.evidence(slice(start, min(start + count, scene.trace.samples)))
    right = several.run(cell)
    wrong = int((right.spikes != several.fired).sum())
    wrong += 0 if several.membranes is None else int((right.v[:, -1] != several.membranes).sum())
    explains = f"this explains all {wrong:,} differences in {len(several.fired):,} samples"
    tried, found, first = 0, [], None
    for fault in faults(cell):
        tried += 1
        if alone.fits(alone.run(fault.cell)) and several.fits(several.run(fault.cell)):
            where = f"{fault.where}: " if fault.where != place.population else ""
            text = f"{backend} computes {place.population} as if {where}{fault.text}; {explains}"
            found.append(Cause(fault.where, fault.what, text, backend))
            first = first or fault
    found += _in_the_spikes(scene, right, several)
    if not found:
        neurons = int((right.spikes != several.fired).any(axis=(0, 1)).sum())
        text = (
            f"{backend} does not compute {place.population} as its graph says: the same spikes arrive, {neurons:,} of "
            f"{cell.population.size:,} neurons fire otherwise, and none of {tried} known faults gives that"
        )
        found.append(Cause(place.population, "unknown", text, backend))
    return found, first


def _in_the_spikes(scene: Scene, right: States, several: _Evidence) -> Iterator[Cause]:
    """Faults that the spikes themselves show: at another step, of other neurons, without a reset between samples."""
    name, backend, sample = scene.place.population, scene.trace.backend, scene.place.sample
    if several.membranes is None:
        for by, when in ((1, "late"), (-1, "early")):
            if np.array_equal(lagging(right.spikes, by), several.fired):
                text = f"the spikes of {name} are right, but {backend} gives them one step {when}"
                yield Cause(name, "shifted spikes", text, backend)
        rasters = [x.reshape(-1, x.shape[2]).T for x in (right.spikes, several.fired)]
        order = permutation(*rasters)
        if order is not None:
            moved = np.flatnonzero([not np.array_equal(*pair) for pair in zip(*rasters, strict=True)])
            text = f"the spikes of {name} are right, but of other neurons: in {backend} neuron {moved[0]} fires as "
            yield Cause(name, "permuted neurons", f"{text}{order[moved[0]]} should, {moved.size:,} are moved", backend)
    if sample > 0 and (sample + 1) * scene.graph.steps <= MOST_STREAMED_STEPS:
        stream = scene.evidence(slice(0, sample + 1))
        if stream.fits(stream.run(scene.cell, keep_state=True)):
            text = f"{backend} does not reset {name} between samples: its state is carried over from the one before"
            yield Cause(name, "carried-over state", text, backend)
