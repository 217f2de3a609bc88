"""Lowering: from a NIR graph in continuous time to a `ProcessGraph` in steps, by linear paths.

Between two spiking populations everything is linear. For each population the walk goes back to its source populations;
each path becomes one projection, and all constants met on the way become one bias. Walking by node, not by path, counts
a bias once however many paths run through it. Populations then get a pipeline stage, and shorter branches a delay.

`spikeport.converters.nir_timing` makes a neuron an update in steps. With g = current_gain voltage_gain, what a weighted
input adds to the membrane at once, thresholds and biases are divided by g, so that the weights stay those of the file;
where some g is not positive it goes into the weights instead. Membranes are counted from v_reset, where they start.

An integrator (LI, CubaLI, I) is the same without threshold and reset. It may only be the node before the Output, which
then reads its membrane. Its g goes into the weights, so that v is the membrane of the file. A Threshold is a neuron
that forgets its membrane within a step.

A constant input to a population with a synaptic filter ramps up through that filter. It is therefore carried by a
constant source that fires at every step; without a filter it is an ordinary neuron bias.

Loops carry the spikes of the step before (`spikeport.converters.nir_graph.schedule`). A Delay of k steps becomes relay
populations, which pass on what another one sent a step before; the last step is that of the projection itself.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import nir
import numpy as np
import torch

from spikeport.converters import compose
from spikeport.converters.compose import Identity, LinearMap
from spikeport.converters.graph import FloatNeuron, Input, Population, ProcessGraph, Projection, Readout, Reset
from spikeport.converters.nir_float import check_reset, holding_nodes
from spikeport.converters.nir_graph import INTEGRATORS, POPULATIONS, SPIKING, out_shape, plain, schedule, wiring_order
from spikeport.converters.nir_timing import Discretization, Dynamics, Timing, dynamics, timing_of, whole_steps
from spikeport.converters.operators import Dense, OneToOne, Operator, Shape, SumPool
from spikeport.models.errors import GraphError
from spikeport.models.readouts import ReadoutKind

FIRING = (*SPIKING, nir.Threshold)
CONSTANT_INPUT = "constant"

LARGEST_PATHS = 4096
"""Linear paths that may meet in one node; each becomes a projection of its own."""

LARGEST_DELAY = 1024
"""Steps that a Delay may last on the chip; each takes a relay population."""


@dataclass(frozen=True)
class _Term:
    """Mapped spikes of a source, sent `lag` steps ago."""

    source: str
    map: LinearMap
    lag: int = 0


@dataclass(frozen=True)
class _LinearForm:
    """What arrives at a node: a sum of mapped source spikes and a constant of shape `shape`."""

    terms: tuple[_Term, ...]
    constant: np.ndarray
    shape: Shape


def lower(
    graph: nir.NIRGraph,
    name: str,
    *,
    dt: float | None = None,
    reset: Reset | None = None,
    discretization: Discretization | None = None,
    steps: int | None = None,
    message_bits: int | None = None,
    readout: ReadoutKind | None = None,
) -> ProcessGraph:
    """Lower a NIR graph to a float `ProcessGraph`.

    Args:
        dt, reset: needed where the neurons' metadata does not record them; a contradiction is an error. An integrator
            has no reset.
        discretization: euler (the default) or exponential, where the metadata does not record it.
        steps: length of one sample; taken from the graph's metadata by default.
        message_bits: bits of the input's payload; from the metadata, else 1 (binary spikes).
        readout: how the decision is read; from the metadata, else by spike count, or the membrane of an integrator.

    Raises GraphError naming the node that cannot be lowered and why.
    """
    graph = plain(graph, name)
    _check_supported(graph)
    metadata = graph.metadata
    if steps is None and "steps" not in metadata:
        raise GraphError(f"{name}: how many steps a sample lasts is not recorded; give steps.")
    sample_steps = steps if steps is not None else int(_number(name, metadata, "steps", 0))
    timing = timing_of(graph, name, dt=dt, reset=reset, discretization=discretization)
    order, recurrent = schedule(graph, holding_nodes(graph, timing))
    forms = _forms(graph, timing, recurrent)
    bits = message_bits if message_bits is not None else int(_number(name, metadata, "message_bits", 1))
    inputs = [Input(key, out_shape(node), bits) for key, node in graph.nodes.items() if isinstance(node, nir.Input)]
    relays = _Relays({node.name: node for node in inputs}, {key: out_shape(node) for key, node in graph.nodes.items()})
    populations: list[Population] = []
    projections: list[Projection] = []
    for key in (key for key in order if isinstance(graph.nodes[key], POPULATIONS)):
        node, form = graph.nodes[key], forms[key]
        neuron, gain, constant = _neuron(key, node, form.constant, timing)
        if gain is not None:
            form = _gained(key, form, gain)
        populations.append(Population(key, out_shape(node), neuron))
        for term in form.terms:
            pair = f"{term.source}->{key}"
            parallel = sum(projection.name.split("#")[0] == pair for projection in projections)
            projections.append(
                Projection(
                    name=pair if not parallel else f"{pair}#{parallel + 1}",
                    source=relays.after(term.source, term.lag - 1) if term.lag else term.source,
                    target=key,
                    operator=compose.finish(term.map),
                    recurrent=term.lag > 0,
                )
            )
        if constant is not None:
            source = f"{CONSTANT_INPUT}_{key}"
            fan = Dense((1,), constant.reshape(-1, 1), shape_out=constant.shape)
            inputs.append(Input(source, (1,), constant=True))
            projections.append(Projection(f"{source}->{key}", source, key, fan))
    populations = relays.among(populations)
    populations, projections = balance(inputs, populations, [*projections, *relays.projections])
    output = _output_population(graph)
    read = Readout(output, readout or readout_kind(graph), _number(name, metadata, "readout_keep", 0.0))
    notes = {"discretization": timing.discretization, "reset": timing.reset}
    return ProcessGraph(
        name, sample_steps, timing.dt, tuple(inputs), tuple(populations), tuple(projections), read, notes
    )


def readout_kind(graph: nir.NIRGraph) -> ReadoutKind:
    """How a plain graph's decision is read: as its metadata says, else by what its output can give."""
    outputs = set(graph.outputs)
    fires = any(isinstance(graph.nodes[source], FIRING) for source, target in graph.edges if target in outputs)
    kind: ReadoutKind = graph.metadata.get("readout", "count" if fires else "membrane")
    return kind


def balance(
    inputs: list[Input], populations: list[Population], projections: list[Projection]
) -> tuple[list[Population], list[Projection]]:
    """Give each population its pipeline stage and pad shorter branches with axonal delay.

    A population works one chip step after the latest of its sources; earlier ones wait. The spikes of the step before,
    where they come from an earlier population, may arrive at its own stage. Spikes that go back, to populations that
    work before or beside theirs, and constant sources take no part.
    """
    stage = {node.name: 0 for node in inputs}
    place = {population.name: index for index, population in enumerate(populations)}
    waiting = {node.name for node in inputs if node.constant}
    for population in populations:
        into = [p for p in projections if p.target == population.name and p.source not in waiting]
        now = [stage[p.source] + 1 for p in into if not p.recurrent]
        before = [stage[p.source] for p in into if p.recurrent and place[p.source] < place[p.target]]
        stage[population.name] = max([1, *now, *before])
    staged = [replace(population, stage=stage[population.name]) for population in populations]

    def padding(projection: Projection) -> int:
        if projection.recurrent:
            return max(0, stage[projection.target] - stage[projection.source])
        return stage[projection.target] - 1 - stage[projection.source]

    return staged, [p if p.source in waiting else replace(p, delay=padding(p)) for p in projections]


class _Relays:
    """Populations that pass on what another one, or an input, sent a number of steps before."""

    def __init__(self, inputs: dict[str, Input], shapes: dict[str, Shape]) -> None:
        self.inputs = inputs
        self.shapes = shapes
        self.made: dict[str, list[str]] = {}
        self.projections: list[Projection] = []

    def after(self, source: str, steps: int) -> str:
        """The population that sends what `source` sent `steps` steps before; an input's spikes pass one of their own,
        as only populations send to themselves."""
        chain = self.made.setdefault(source, [])
        start = 0 if source in self.inputs else 1
        if start == 0 and self.inputs[source].message_bits > 1:
            raise GraphError(f"input {source!r} carries payloads of several bits, which no relay can delay.")
        for step in range(start + len(chain), steps + 1):
            name = f"{source}.after{step}"
            before = chain[-1] if chain else source
            operator = OneToOne(self.shapes[source], np.ones(math.prod(self.shapes[source])))
            self.projections.append(Projection(f"{before}->{name}", before, name, operator, recurrent=step > 0))
            chain.append(name)
        return source if steps < start else chain[steps - start]

    def among(self, populations: list[Population]) -> list[Population]:
        """The populations with the relays of each behind it, and those of inputs first."""
        zero = np.zeros(())
        neuron = FloatNeuron(zero, zero, np.asarray(0.5), zero)
        of = {
            source: [Population(name, self.shapes[source], neuron) for name in chain]
            for source, chain in self.made.items()
        }
        first = itertools.chain.from_iterable(of.get(key, []) for key in self.inputs)
        rest = (each for population in populations for each in (population, *of.get(population.name, [])))
        return [*first, *rest]


def _forms(graph: nir.NIRGraph, timing: Timing, recurrent: frozenset[tuple[str, str]]) -> dict[str, _LinearForm]:
    """What arrives at each population, by linear paths from the spikes that reach it."""
    sources: dict[str, list[str]] = {key: [] for key in graph.nodes}
    for source, target in graph.edges:
        sources[target].append(source)
    leaving: dict[str, _LinearForm] = {}
    for key, node in graph.nodes.items():
        if isinstance(node, (nir.Input, *POPULATIONS)):
            shape = out_shape(node)
            leaving[key] = _LinearForm((_Term(key, Identity(shape, shape)),), np.zeros(shape), shape)
    for key in wiring_order(graph):
        node = graph.nodes[key]
        if key in leaving:
            continue
        arriving = _sum(key, [_late(leaving[source], (source, key) in recurrent) for source in sources[key]])
        try:
            leaving[key] = _after(key, node, arriving, timing)
        except (GraphError, ValueError, IndexError) as error:
            raise GraphError(f"node {key!r} ({type(node).__name__}): {error}") from None
    return {
        key: _sum(key, [_late(leaving[source], (source, key) in recurrent) for source in sources[key]])
        for key, node in graph.nodes.items()
        if isinstance(node, POPULATIONS)
    }


def _late(form: _LinearForm, recurrent: bool) -> _LinearForm:
    if not recurrent:
        return form
    return replace(form, terms=tuple(replace(term, lag=term.lag + 1) for term in form.terms))


def _sum(key: str, forms: list[_LinearForm]) -> _LinearForm:
    terms = tuple(term for form in forms for term in form.terms)
    if len(terms) > LARGEST_PATHS:
        raise GraphError(f"node {key!r}: more than {LARGEST_PATHS} linear paths meet in it; put a neuron on the way.")
    constant = forms[0].constant
    for form in forms[1:]:
        constant = constant + form.constant
    return _LinearForm(terms, constant, forms[0].shape)


def _after(key: str, node: nir.NIRNode, form: _LinearForm, timing: Timing) -> _LinearForm:
    """The linear form after one more linear node."""
    bias: np.ndarray | None = None
    shape = out_shape(node)
    match node:
        case nir.Output():
            return form
        case nir.Delay():
            return _delayed(form, whole_steps(key, node, timing))
        case nir.Linear() | nir.Affine():
            weight = np.asarray(node.weight, dtype=np.float64)
            if form.shape != weight.shape[1:]:
                raise GraphError(f"a matrix on {form.shape} works on the last dimension alone; flatten it before.")
            bias = np.asarray(node.bias, dtype=np.float64) if isinstance(node, nir.Affine) else None

            def step(first: LinearMap) -> LinearMap:
                return compose.dense(first, weight)

        case nir.Conv1d() | nir.Conv2d():
            if node.padding == "same":
                raise GraphError("padding 'same' of an even kernel pads one side more than the other.")
            # along one axis is along the width of an image one pixel high
            lead = (1,) * (4 - np.ndim(node.weight))
            kernel = np.asarray(node.weight, dtype=np.float64).reshape(
                *node.weight.shape[:2], *lead, *node.weight.shape[2:]
            )
            image = (form.shape[0], *lead, *form.shape[1:])
            stride, dilation = (*lead, *node.stride), (*lead, *node.dilation)
            padding = (*(0,) * len(lead), *node.padding)
            bias = np.broadcast_to(np.asarray(node.bias, np.float64).reshape(-1, *(1,) * (len(shape) - 1)), shape)

            def step(first: LinearMap) -> LinearMap:
                seen = compose.flatten(first, image)
                return compose.flatten(compose.conv(seen, kernel, stride, padding, dilation, node.groups), shape)

        case nir.Scale():
            factor = np.asarray(node.scale, dtype=np.float64)

            def step(first: LinearMap) -> LinearMap:
                return compose.scale(first, factor.reshape(first.out_shape))

        case nir.Flatten():

            def step(first: LinearMap) -> LinearMap:
                return compose.flatten(first, shape)

        case nir.SumPool2d() | nir.AvgPool2d():
            window = SumPool(node.kernel_size, node.stride)
            average = isinstance(node, nir.AvgPool2d)
            channels = form.shape[0]
            cells = np.full((channels, 1, *node.kernel_size), 1 / math.prod(node.kernel_size) if average else 1.0)

            def step(first: LinearMap) -> LinearMap:
                if any(node.padding):
                    return compose.conv(first, cells, node.stride, node.padding, (1, 1), channels)
                return compose.pool(first, window, average)

        case _:
            raise TypeError(f"no linear form after a {type(node).__name__}.")
    constant = _apply(step(Identity(form.shape, form.shape)), form.constant, shape)
    if bias is not None:
        constant = constant + bias
    terms = tuple(replace(term, map=step(term.map)) for term in form.terms)
    return _LinearForm(terms, constant, shape)


def _delayed(form: _LinearForm, steps: np.ndarray) -> _LinearForm:
    """Each element as many steps later. What is constant stays so: it was there before the first step."""
    if int(steps.max()) > LARGEST_DELAY:
        raise GraphError(f"a delay of {int(steps.max())} steps takes as many relays; {LARGEST_DELAY} is the limit.")
    terms = []
    for lag in np.unique(steps).tolist():
        mask = np.asarray(steps == lag, dtype=np.float64)
        for term in form.terms:
            some = term.map if mask.all() else compose.scale(term.map, mask.reshape(term.map.out_shape))
            terms.append(_Term(term.source, some, term.lag + lag))
    if len(terms) > LARGEST_PATHS:
        raise GraphError(f"its delays differ so much that {len(terms)} paths lead through it.")
    return _LinearForm(tuple(terms), form.constant, form.shape)


def _apply(step: LinearMap, value: np.ndarray, shape: Shape) -> np.ndarray:
    if not value.any():
        return np.zeros(shape)
    operator: Operator = compose.finish(step)
    mapped = operator.apply(torch.as_tensor(value.reshape(1, *operator.in_shape), dtype=torch.float64))
    return mapped[0].numpy().reshape(shape)


def _neuron(
    key: str, node: nir.NIRNode, arriving: np.ndarray, timing: Timing
) -> tuple[FloatNeuron, np.ndarray | None, np.ndarray | None]:
    """A neuron in steps, driven by the constant `arriving` besides its spikes.

    The second value is the gain that its weights have to take on, if any; the third the constant that must pass through
    its synaptic filter, if any.
    """
    one, zero = np.ones(()), np.zeros(())
    if isinstance(node, nir.Threshold):
        step, rest, threshold = Dynamics(zero, one, zero, one, zero), zero, np.asarray(node.threshold)
    else:
        check_reset(key, node, timing)
        step = dynamics(key, node, timing)
        fires = isinstance(node, SPIKING)
        rest = np.asarray(node.v_reset, dtype=np.float64) if fires else zero
        threshold = np.asarray(node.v_threshold if fires else np.inf, dtype=np.float64) - rest
    gain = step.gain
    into_weights = isinstance(node, INTEGRATORS) or bool(np.any(gain <= 0))
    scale = one if into_weights else gain
    constant = arriving * gain if into_weights else arriving
    bias = (step.leak - (1 - step.voltage_keep) * rest) / scale
    filtered = bool(np.any(step.current_keep > 0)) and bool(constant.any())
    neuron = FloatNeuron(
        current_keep=_shrunk(step.current_keep),
        voltage_keep=_shrunk(step.voltage_keep),
        threshold=_shrunk(threshold / scale),
        bias=_shrunk(bias if filtered else bias + constant),
        reset=timing.reset if isinstance(node, SPIKING) else "zero",
    )
    return neuron, _shrunk(gain) if into_weights else None, np.asarray(constant) if filtered else None


def _gained(key: str, form: _LinearForm, gain: np.ndarray) -> _LinearForm:
    """What arrives at a node, times `gain`, one for all or one a neuron."""
    try:
        terms = tuple(
            replace(term, map=compose.scale(term.map, gain.reshape(term.map.out_shape) if gain.ndim else gain))
            for term in form.terms
        )
    except (GraphError, ValueError) as error:
        raise GraphError(f"node {key!r}: {error}") from None
    return replace(form, terms=terms)


def _shrunk(value: np.ndarray) -> np.ndarray:
    """One number where all entries are equal."""
    value = np.asarray(value, dtype=np.float64)
    return value.reshape(-1)[0].reshape(()) if value.size and (value == value.reshape(-1)[0]).all() else value


def _output_population(graph: nir.NIRGraph) -> str:
    names = list(graph.outputs)
    if len(names) != 1:
        raise GraphError(f"the graph has {len(names)} Output nodes; a decision is read from one.")
    sources: list[str] = [source for source, target in graph.edges if target == names[0]]
    if len(sources) != 1 or not isinstance(graph.nodes[sources[0]], POPULATIONS):
        raise GraphError(
            f"Output node {names[0]!r} is fed by {', '.join(map(repr, sources))}; the decision must be read from one "
            "spiking population, or from one integrator (LI, CubaLI, I). Any graph runs in floats "
            "(spikeport.converters.nir_float)."
        )
    return sources[0]


def _check_supported(graph: nir.NIRGraph) -> None:
    for key, node in graph.nodes.items():
        if not isinstance(node, INTEGRATORS):
            continue
        followers = [target for source, target in graph.edges if source == key]
        if not all(isinstance(graph.nodes[to], nir.Output) for to in followers):
            raise GraphError(
                f"node {key!r} ({type(node).__name__}) feeds {', '.join(map(repr, followers))}: it sends no spikes, "
                "only a membrane potential, which on the chip the Output alone can read. It runs in floats "
                "(spikeport.converters.nir_float); for the chip, put a spiking neuron in its place."
            )


def _number(name: str, metadata: dict[str, Any], key: str, default: float) -> float:
    """A number of the graph's metadata."""
    value = metadata.get(key, default)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise GraphError(f"{name}: the metadata has {key} = {value!r}, which is no number.")
    return number
