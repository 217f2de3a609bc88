"""`ProcessGraph`: the chip level of a network, what Lava calls a process graph.

Populations of current-based LIF neurons, joined by projections. The same graph holds floats (after lowering) or the
chip's integers (after quantisation); which of the two is told by the type of its neurons. Passes are pure functions
from graph to graph.

Time. A population of stage l works on sample step t at chip step t + l, because every connection takes one chip step.
A feed-forward projection therefore satisfies `target.stage == source.stage + 1 + delay`; inputs have stage 0 and reach
the first populations (stage 1) one step later. A recurrent projection carries the spikes of the previous sample step.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from spikeport.converters.operators import Operator, Shape, operator_from
from spikeport.models.errors import GraphError, SpikeportError
from spikeport.models.files import read_arrays, write_arrays
from spikeport.models.loihi_integers import MAX_THRESHOLD, MAX_WEIGHT_BITS
from spikeport.models.readouts import ReadoutKind

FORMAT = "spikeport-process-graph"
FORMAT_VERSION = 1
MAX_MESSAGE_BITS = 32

Reset = Literal["zero", "subtract"]


@dataclass(frozen=True, eq=False)
class FloatNeuron:
    """CUBA LIF in steps: u = current_keep u + a;  v = voltage_keep v + u + bias;  spike where v > threshold.

    Each array is of shape () or of the population's shape. `current_keep` 0 means no synaptic filter. An infinite
    threshold makes an integrator, which never fires: only the population of a membrane readout may have it.
    """

    current_keep: np.ndarray
    voltage_keep: np.ndarray
    threshold: np.ndarray
    bias: np.ndarray
    reset: Reset = "zero"


@dataclass(frozen=True, eq=False)
class LoihiNeuron:
    """CUBA LIF in Loihi's integers (`spikeport.models.loihi_integers` has the step).

    du, dv: 12 bit unsigned decays in 1/4096; vth: 17 bit; bias = bias_mant << bias_exp. Arrays of shape () or of the
    population's shape, int64. `ds_offset` is the register added to du (1 in Lava's model). The population of a membrane
    readout has the largest vth; a v beyond it fires and resets like any other.
    """

    du: np.ndarray
    dv: np.ndarray
    vth: np.ndarray
    bias_mant: np.ndarray
    bias_exp: np.ndarray
    ds_offset: int = 1
    reset: Reset = "zero"


Neuron = FloatNeuron | LoihiNeuron


@dataclass(frozen=True)
class Input:
    """Spikes from outside. `message_bits` 1: binary events; more: graded, unsigned payloads of that many bits.

    `constant` marks a source that fires at every step by itself (a bias that passes through the synaptic filter).
    """

    name: str
    shape: Shape
    message_bits: int = 1
    constant: bool = False
    stage: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Population:
    """Neurons of one kind. `stage` is the chip step, counted from the input, at which they work on a sample's step."""

    name: str
    shape: Shape
    neuron: Neuron
    stage: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Projection:
    """Spikes of `source` times a linear operator, times 2^exponent, into the current of `target`.

    weight_bits: that the chip stores of a weight. Weights of fewer bits are the same numbers in wider steps
    (`spikeport.models.loihi_integers.weight_range`), so that this decides memory and no spikes.
    """

    name: str
    source: str
    target: str
    operator: Operator
    exponent: int = 0
    delay: int = 0
    recurrent: bool = False
    weight_bits: int = MAX_WEIGHT_BITS


@dataclass(frozen=True)
class Readout:
    """How a decision is read from a population (`spikeport.models.readouts` defines the kinds)."""

    population: str
    kind: ReadoutKind = "count"
    keep: float = 0.0


@dataclass(frozen=True, eq=False)
class ProcessGraph:
    """A network at the chip level. `populations` are in topological order; `steps` is the length of one sample."""

    name: str
    steps: int
    dt: float
    inputs: tuple[Input, ...]
    populations: tuple[Population, ...]
    projections: tuple[Projection, ...]
    readout: Readout
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def is_integer(self) -> bool:
        """True after quantisation."""
        return all(isinstance(population.neuron, LoihiNeuron) for population in self.populations)

    @property
    def depth(self) -> int:
        """Chip steps from the input to the readout population."""
        return self.population(self.readout.population).stage

    @property
    def probed(self) -> Population | None:
        """The population whose membrane decides; None where spikes do."""
        return self.population(self.readout.population) if self.readout.kind == "membrane" else None

    def population(self, name: str) -> Population:
        """The population of that name."""
        node = self.node(name)
        if not isinstance(node, Population):
            raise GraphError(f"{name!r} is an input, not a population.")
        return node

    def node(self, name: str) -> Input | Population:
        """The input or population of that name."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise GraphError(f"the graph has no input or population named {name!r}.")

    @property
    def nodes(self) -> list[Input | Population]:
        """Inputs, then populations, in order."""
        return [*self.inputs, *self.populations]

    @property
    def event_nodes(self) -> list[Input | Population]:
        """All nodes whose spikes a trace holds: the inputs that the caller feeds, then the populations."""
        return [*self.event_inputs, *self.populations]

    def incoming(self, name: str) -> list[Projection]:
        return [projection for projection in self.projections if projection.target == name]

    def outgoing(self, name: str) -> list[Projection]:
        return [projection for projection in self.projections if projection.source == name]

    @property
    def event_inputs(self) -> list[Input]:
        """The inputs that the caller feeds (all but the constant ones)."""
        return [node for node in self.inputs if not node.constant]

    def fingerprint(self) -> str:
        """Hex digest over everything that decides the spikes; equal graphs have equal ones. Made once: arrays of a
        graph are not written to."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        header, arrays = _pack(self)
        header = {key: value for key, value in header.items() if key not in ("notes", "name")}
        for projection in header["projections"]:
            del projection["weight_bits"]
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        for key in sorted(arrays):
            digest.update(key.encode() + str(arrays[key].dtype).encode())
            digest.update(np.ascontiguousarray(arrays[key]).data)
        return digest.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write the graph to one .npz file, without pickle."""
        write_arrays(path, *_pack(self))

    @staticmethod
    def load(path: Path) -> "ProcessGraph":
        """Read a graph written by `save`."""
        header, arrays = read_arrays(path, "spikeport quantize")
        if not isinstance(header, dict) or (header.get("format"), header.get("version")) != (FORMAT, FORMAT_VERSION):
            raise SpikeportError(f"{path} is not a process graph of version {FORMAT_VERSION}.")
        try:
            return _unpack(header, arrays)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise SpikeportError(
                f"{path} contradicts itself ({type(error).__name__}: {error}). Run `spikeport quantize` again."
            ) from None


def with_populations(graph: ProcessGraph, populations: Iterable[Population]) -> ProcessGraph:
    """The same graph with other populations of the same names."""
    return replace(graph, populations=tuple(populations))


def _check(graph: ProcessGraph) -> None:
    names = [node.name for node in graph.nodes]
    if len(set(names)) != len(names):
        raise GraphError(f"graph {graph.name!r} has two nodes of one name among {names}.")
    if len({projection.name for projection in graph.projections}) != len(graph.projections):
        raise GraphError(f"graph {graph.name!r} has two projections of one name.")
    for node in graph.inputs:
        if not 1 <= node.message_bits <= MAX_MESSAGE_BITS:
            raise GraphError(f"input {node.name!r}: message_bits = {node.message_bits}, not 1..{MAX_MESSAGE_BITS}.")
    if graph.readout.kind not in get_args(ReadoutKind):
        raise GraphError(f"readout {graph.readout.kind!r} is unknown. Known: {', '.join(get_args(ReadoutKind))}.")
    if graph.steps < 1:
        raise GraphError(f"graph {graph.name!r} has {graph.steps} steps; a sample needs at least one.")
    position = {name: index for index, name in enumerate(names)}
    for projection in graph.projections:
        source, target = graph.node(projection.source), graph.population(projection.target)
        operator = projection.operator
        if math.prod(operator.in_shape) != source.size or math.prod(operator.out_shape) != target.size:
            raise GraphError(
                f"projection {projection.name!r} maps {operator.in_shape} to {operator.out_shape}, but joins "
                f"{source.name} {source.shape} to {target.name} {target.shape}."
            )
        if projection.recurrent and isinstance(source, Input):
            raise GraphError(f"projection {projection.name!r} comes from an input and is marked recurrent.")
        if not projection.recurrent:
            if position[source.name] >= position[target.name]:
                raise GraphError(f"projection {projection.name!r} runs backwards and is not marked recurrent.")
            constant = isinstance(source, Input) and source.constant
            if not constant and target.stage != source.stage + 1 + projection.delay:
                raise GraphError(
                    f"projection {projection.name!r} arrives at stage {source.stage + 1 + projection.delay}, but "
                    f"{target.name} works at stage {target.stage}."
                )
    graph.population(graph.readout.population)
    _check_integrators(graph)


def _check_integrators(graph: ProcessGraph) -> None:
    """Only the population of a membrane readout never fires, and nothing comes from it."""
    kind = graph.readout.kind
    for population in graph.populations:
        neuron, probed = population.neuron, population is graph.probed
        if isinstance(neuron, FloatNeuron):
            integrates = np.isposinf(neuron.threshold)
            if not probed and integrates.any():
                raise GraphError(
                    f"population {population.name!r} never fires (its threshold is infinite); only the population of "
                    f"the readout 'membrane' may, and the readout is {kind!r} of {graph.readout.population!r}."
                )
        else:
            integrates = np.asarray(neuron.vth) == MAX_THRESHOLD
        if probed and not integrates.all():
            raise GraphError(
                f"the readout 'membrane' reads a population that never fires, but {population.name!r} has thresholds: "
                f"give it the largest (infinite in floats, {MAX_THRESHOLD} in integers) or read its spikes."
            )
        if probed and graph.outgoing(population.name):
            raise GraphError(
                f"projection {graph.outgoing(population.name)[0].name!r} comes from {population.name!r}, which never "
                "fires: its membrane is the readout."
            )


_NEURON_ARRAYS = {
    FloatNeuron: ("current_keep", "voltage_keep", "threshold", "bias"),
    LoihiNeuron: ("du", "dv", "vth", "bias_mant", "bias_exp"),
}


def _pack(graph: ProcessGraph) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    arrays: dict[str, np.ndarray] = {}
    populations, projections = [], []
    for index, population in enumerate(graph.populations):
        neuron = population.neuron
        for key in _NEURON_ARRAYS[type(neuron)]:
            arrays[f"population{index}.{key}"] = np.asarray(getattr(neuron, key))
        populations.append(
            {
                "name": population.name,
                "shape": list(population.shape),
                "stage": population.stage,
                "neuron": type(neuron).__name__,
                "reset": neuron.reset,
                "ds_offset": neuron.ds_offset if isinstance(neuron, LoihiNeuron) else None,
            }
        )
    for index, projection in enumerate(graph.projections):
        operator = projection.operator
        arrays[f"projection{index}.weight"] = operator.weight
        if operator.kind == "sparse":
            arrays[f"projection{index}.source"] = operator.source  # type: ignore[attr-defined]
            arrays[f"projection{index}.target"] = operator.target  # type: ignore[attr-defined]
        fields = ("name", "source", "target", "exponent", "delay", "recurrent", "weight_bits")
        projections.append({key: getattr(projection, key) for key in fields} | {"operator": operator.describe()})
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "name": graph.name,
        "steps": graph.steps,
        "dt": graph.dt,
        "inputs": [asdict(node) | {"shape": list(node.shape)} for node in graph.inputs],
        "populations": populations,
        "projections": projections,
        "readout": asdict(graph.readout),
        "notes": graph.notes,
    }
    return header, arrays


def _unpack(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> ProcessGraph:
    populations, projections = [], []
    for index, entry in enumerate(header["populations"]):
        kind = FloatNeuron if entry["neuron"] == "FloatNeuron" else LoihiNeuron
        values: dict[str, Any] = {key: arrays[f"population{index}.{key}"] for key in _NEURON_ARRAYS[kind]}
        if kind is LoihiNeuron:
            values["ds_offset"] = entry["ds_offset"]
        neuron = kind(**values, reset=entry["reset"])
        populations.append(Population(entry["name"], tuple(entry["shape"]), neuron, entry["stage"]))
    for index, entry in enumerate(header["projections"]):
        prefix = f"projection{index}."
        own = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
        operator = operator_from(entry["operator"], own)
        rest = {key: value for key, value in entry.items() if key != "operator"}
        projections.append(Projection(operator=operator, **rest))
    return ProcessGraph(
        name=header["name"],
        steps=header["steps"],
        dt=header["dt"],
        inputs=tuple(Input(**(entry | {"shape": tuple(entry["shape"])})) for entry in header["inputs"]),
        populations=tuple(populations),
        projections=tuple(projections),
        readout=Readout(**header["readout"]),
        notes=header["notes"],
    )
