"""`verify`: two traces, spike for spike and membrane for membrane, and where and why they first part."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from spikeport.converters.graph import ProcessGraph
from spikeport.deploy.explain import Explanation, Recorder, explain
from spikeport.deploy.replay import Place
from spikeport.deploy.timing import derived_synops
from spikeport.deploy.trace import Trace, final_membrane
from spikeport.models.errors import SpikeportError


@dataclass(frozen=True)
class Divergence:
    """The first neuron-step in which two traces differ: by sample, then step, then population in graph order.

    first, second: spikes of the two traces there, or v of a membrane that is read, which differs after the last step.
    explanation: the states on both sides, what arrived there, and the causes; None of networks in floats.
    """

    place: Place
    first: float
    second: float
    explanation: Explanation | None

    def __str__(self) -> str:
        at = self.place
        place = f"{at.population}, sample {at.sample}, step {at.step}, neuron {at.neuron}"
        values = f"{self.first} against {self.second} spikes"
        if at.membrane:
            values = f"membrane v {self.first} against {self.second} after this last step"
        text = f"first difference at {place}: {values}"
        if self.explanation is None:
            return text
        known = [side for side in self.explanation.sides if side.u is not None]
        text += "".join(f"; {side.backend}: input {side.current}, u {side.u}, v {side.v}" for side in known)
        return f"{text}. {self.explanation}" if str(self.explanation) else text


@dataclass(frozen=True)
class Layer:
    """Agreement of one population: neuron-steps compared and differing, spikes on both sides, and where it first
    differs (None where it does not)."""

    population: str
    neurons: int
    compared: int
    spikes: tuple[int, int]
    mismatches: int
    first_sample: int | None
    first_step: int | None


@dataclass(frozen=True)
class Comparison:
    """compared: neuron-steps looked at; spikes: those in which the first backend fired; mismatches: how many differ.
    membranes, membrane_mismatches: last membranes looked at, one a sample and neuron of a membrane readout, and how
    many differ. graphs: fingerprints of the networks that ran.
    """

    first: str
    second: str
    graphs: tuple[str, str]
    samples: int
    layers: tuple[Layer, ...]
    divergence: Divergence | None
    membranes: int = 0
    membrane_mismatches: int = 0

    @property
    def compared(self) -> int:
        return sum(layer.compared for layer in self.layers)

    @property
    def spikes(self) -> int:
        return sum(layer.spikes[0] for layer in self.layers)

    @property
    def mismatches(self) -> int:
        return sum(layer.mismatches for layer in self.layers)

    @property
    def by_population(self) -> dict[str, int]:
        """Differing neuron-steps of each population."""
        return {layer.population: layer.mismatches for layer in self.layers}

    @property
    def equal(self) -> bool:
        """Neither a spike nor a membrane differs."""
        return self.mismatches == self.membrane_mismatches == 0

    def to_json(self) -> dict[str, Any]:
        sums = {key: getattr(self, key) for key in ("compared", "spikes", "mismatches", "by_population")}
        return asdict(self) | sums

    def __str__(self) -> str:
        head = (
            f"{self.first} and {self.second}: {self.mismatches} of {self.compared} neuron-steps differ "
            f"({self.samples} samples, {self.spikes} spikes)"
        )
        if self.membranes:
            head += f", {self.membrane_mismatches} of {self.membranes} membranes that are read"
        return head if self.divergence is None else f"{head}; {self.divergence}"


def compare(
    graph: ProcessGraph,
    first: Trace,
    second: Trace,
    inputs: dict[str, np.ndarray] | None = None,
    other: ProcessGraph | None = None,
    recorders: tuple[Recorder | None, Recorder | None] = (None, None),
) -> Comparison:
    """Compare the spikes of every population, and the membrane that is read, on the samples that both traces have.

    Args:
        inputs: the samples that were run. Only a graded input needs them, to explain a difference behind it.
        other: the network of the second trace, where it is not `graph`: its populations must be those of `graph`.
        recorders: of each trace, to run a sample again with its states.

    Raises SpikeportError where a trace belongs to another network, was made from other inputs, or lacks the membrane.
    """
    graphs = (graph, other or graph)
    for which, network, trace in zip(("first", "second"), graphs, (first, second), strict=True):
        trace.check_graph(network, f"the {which} trace ({trace.backend})")
    _check_networks(*graphs)
    samples = min(first.samples, second.samples)
    cut = slice(0, samples)
    _check_inputs(graph, first, second, cut)
    layers = tuple(_layer(population.name, first, second, cut) for population in graph.populations)
    earliest = _earliest_spike(layers, first, second)
    membranes = membrane_mismatches = 0
    values: tuple[float, float] | None = None
    if graph.probed is not None:
        ends = [final_membrane(graph.readout, trace)[cut] for trace in (first, second)]
        unequal = np.argwhere(ends[0] != ends[1])
        membranes, membrane_mismatches = ends[0].size, len(unequal)
        last = graph.steps - 1
        if len(unequal) and (earliest is None or (int(unequal[0, 0]), last) < (earliest.sample, earliest.step)):
            sample, neuron = (int(i) for i in unequal[0])
            earliest = Place(graph.probed.name, sample, last, neuron, membrane=True)
            values = ends[0][sample, neuron].item(), ends[1][sample, neuron].item()
    divergence = None
    if earliest is not None:
        here, there = values or (_spike(first, earliest), _spike(second, earliest))
        divergence = Divergence(earliest, here, there, explain(graphs, (first, second), inputs, earliest, recorders))
    return Comparison(
        first=first.backend,
        second=second.backend,
        graphs=(first.graph, second.graph),
        samples=samples,
        layers=layers,
        divergence=divergence,
        membranes=membranes,
        membrane_mismatches=membrane_mismatches,
    )


def _check_networks(first: ProcessGraph, second: ProcessGraph) -> None:
    """Raise SpikeportError where the networks have not the same populations, steps and readout."""
    extents = [
        ({node.name: node.size for node in graph.event_nodes}, graph.steps, graph.probed and graph.probed.name)
        for graph in (first, second)
    ]
    for what, here, there in zip(("populations", "steps", "membrane that is read"), *extents, strict=True):
        if here != there:
            raise SpikeportError(f"the two networks differ in their {what}: {here} and {there}.")


def _check_inputs(graph: ProcessGraph, first: Trace, second: Trace, cut: slice) -> None:
    """Raise SpikeportError where both traces tell their inputs and these differ."""
    for node in graph.event_inputs:
        if node.name not in first.packed or node.name not in second.packed:
            continue
        unequal = np.argwhere(first.packed[node.name][cut] != second.packed[node.name][cut])
        if len(unequal):
            sample, step = unequal[0, :2]
            raise SpikeportError(
                f"the {first.backend} and {second.backend} traces were made from other inputs: {node.name!r} differs "
                f"first in sample {sample}, step {step}.\nRun both on the same samples."
            )


def _layer(name: str, first: Trace, second: Trace, cut: slice) -> Layer:
    here, there = first.packed[name][cut], second.packed[name][cut]
    differing = np.bitwise_xor(here, there)
    mismatches = int(np.bitwise_count(differing).sum(dtype=np.int64))
    sample, step = (int(i) for i in np.argwhere(differing.any(axis=-1))[0]) if mismatches else (None, None)
    size = first.sizes[name]
    counts = tuple(int(np.bitwise_count(packed).sum(dtype=np.int64)) for packed in (here, there))
    compared = here.shape[0] * here.shape[1] * size
    return Layer(name, size, compared, (counts[0], counts[1]), mismatches, sample, step)


def _earliest_spike(layers: tuple[Layer, ...], first: Trace, second: Trace) -> Place | None:
    differing = [
        (layer.first_sample, layer.first_step, rank)
        for rank, layer in enumerate(layers)
        if layer.first_sample is not None and layer.first_step is not None
    ]
    if not differing:
        return None
    sample, step, rank = min(differing)
    name = layers[rank].population
    bits = np.unpackbits(np.bitwise_xor(first.packed[name][sample, step], second.packed[name][sample, step]))
    return Place(name, sample, step, int(bits.argmax()))


def _spike(trace: Trace, at: Place) -> int:
    return int(trace.spikes(at.population, slice(at.sample, at.sample + 1))[0, at.step, at.neuron])


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
