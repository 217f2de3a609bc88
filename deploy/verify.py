"""`verify`: two traces of one graph, spike for spike and membrane for membrane, and where they first part."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from spikeport.converters.graph import ProcessGraph
from spikeport.converters.reference import Reference
from spikeport.deploy.timing import derived_synops
from spikeport.deploy.trace import Trace, final_membrane
from spikeport.models.errors import SpikeportError


@dataclass(frozen=True)
class Divergence:
    """The first neuron-step in which two traces differ: by sample, then step, then population in graph order.

    first, second: spikes of the two backends there, or v of a membrane that is read, which differs at the last step.
    current, u, v: what the torch reference computes there (v after reset; `current` is the summed synaptic input),
    absent where the inputs were not given.
    """

    population: str
    sample: int
    step: int
    neuron: int
    first: int
    second: int
    what: Literal["spikes", "membrane"] = "spikes"
    current: int | None = None
    u: int | None = None
    v: int | None = None

    def __str__(self) -> str:
        place = f"{self.population}, sample {self.sample}, step {self.step}, neuron {self.neuron}"
        state = "" if self.u is None else f" (reference: input {self.current}, u {self.u}, v {self.v})"
        values = f"{self.first} against {self.second} spikes"
        if self.what == "membrane":
            values = f"membrane v {self.first} against {self.second} after this last step"
        return f"first difference at {place}: {values}{state}"


@dataclass(frozen=True)
class Comparison:
    """compared: neuron-steps looked at; spikes: those in which the first backend fired; mismatches: how many differ.
    membranes, membrane_mismatches: last membranes looked at, one a sample and neuron of a membrane readout, and how
    many differ.
    """

    first: str
    second: str
    samples: int
    compared: int
    spikes: int
    mismatches: int
    by_population: dict[str, int]
    divergence: Divergence | None
    membranes: int = 0
    membrane_mismatches: int = 0

    @property
    def equal(self) -> bool:
        """Neither a spike nor a membrane differs."""
        return self.mismatches == self.membrane_mismatches == 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = (
            f"{self.first} and {self.second}: {self.mismatches} of {self.compared} neuron-steps differ "
            f"({self.samples} samples, {self.spikes} spikes)"
        )
        if self.membranes:
            head += f", {self.membrane_mismatches} of {self.membranes} membranes that are read"
        return head if self.divergence is None else f"{head}; {self.divergence}"


def compare(
    graph: ProcessGraph, first: Trace, second: Trace, inputs: dict[str, np.ndarray] | None = None
) -> Comparison:
    """Compare the spikes of every population, and the membrane that is read, on the samples that both traces have.

    Args:
        inputs: the samples that were run, to show the reference's state where the traces first differ.

    Raises SpikeportError where a trace belongs to another graph or lacks the membrane.
    """
    for trace in (first, second):
        if trace.graph != graph.fingerprint():
            raise SpikeportError(
                f"the {trace.backend} trace was made with another network (graph {trace.graph}, here "
                f"{graph.fingerprint()}). Run `spikeport simulate` again."
            )
    samples = min(first.samples, second.samples)
    cut = slice(0, samples)
    by_population: dict[str, int] = {}
    earliest: Divergence | None = None
    for population in graph.populations:
        name = population.name
        differing = np.bitwise_xor(first.packed[name][cut], second.packed[name][cut])
        by_population[name] = int(np.bitwise_count(differing).sum(dtype=np.int64))
        if by_population[name]:
            sample, step = (int(i) for i in np.argwhere(differing.any(axis=-1))[0])
            if earliest is None or (sample, step) < (earliest.sample, earliest.step):
                neuron = int(np.unpackbits(differing[sample, step]).argmax())
                here, there = (int(t.spikes(name, slice(sample, sample + 1))[0, step, neuron]) for t in (first, second))
                earliest = Divergence(name, sample, step, neuron, here, there)
    membranes = membrane_mismatches = 0
    if graph.probed is not None:
        ends = [final_membrane(graph.readout, trace)[cut] for trace in (first, second)]
        unequal = np.argwhere(ends[0] != ends[1])
        membranes, membrane_mismatches = ends[0].size, len(unequal)
        last = graph.steps - 1
        if len(unequal) and (earliest is None or (int(unequal[0, 0]), last) < (earliest.sample, earliest.step)):
            sample, neuron = (int(i) for i in unequal[0])
            here, there = (int(end[sample, neuron]) for end in ends)
            earliest = Divergence(graph.probed.name, sample, last, neuron, here, there, "membrane")
    if earliest is not None and inputs is not None:
        earliest = _explain(graph, earliest, inputs)
    return Comparison(
        first=first.backend,
        second=second.backend,
        samples=samples,
        compared=samples * graph.steps * sum(population.size for population in graph.populations),
        spikes=sum(int(first.spike_counts(p.name)[cut].sum()) for p in graph.populations),
        mismatches=sum(by_population.values()),
        by_population=by_population,
        divergence=earliest,
        membranes=membranes,
        membrane_mismatches=membrane_mismatches,
    )


def _explain(graph: ProcessGraph, found: Divergence, inputs: dict[str, np.ndarray]) -> Divergence:
    sample = {name: array[found.sample : found.sample + 1] for name, array in inputs.items()}
    run = Reference(graph).run(sample, record=True)

    def at(values: Any) -> int:
        return int(values[found.population][0, found.step].flatten()[found.neuron])

    fields = asdict(found) | {"current": at(run.currents), "u": at(run.u), "v": at(run.v)}
    return Divergence(**fields)


@dataclass(frozen=True)
class SynopComparison:
    """Synaptic operations of one projection over all samples: counted by a simulator, derived from a trace."""

    projection: str
    counted: int
    derived: int
    steps_that_differ: int


def compare_synops(graph: ProcessGraph, counted: Trace, reference: Trace) -> list[SynopComparison]:
    """Hold the simulator's counts against those that follow from the reference's spikes, for every step."""
    derived = derived_synops(graph, reference)
    return [
        SynopComparison(
            projection.name,
            int(counted.synops[projection.name].sum()),
            int(derived[projection.name].sum()),
            int((counted.synops[projection.name] != derived[projection.name]).sum()),
        )
        for projection in graph.projections
    ]
