"""Lowering: from a NIR graph in continuous time to a `ProcessGraph` in steps, by linear paths.

Between two spiking populations everything is linear. For each population the walk goes back to its source populations;
each path becomes one projection, and all constants met on the way become one bias. Walking by node, not by path, counts
a bias once however many paths run through it. Populations then get a pipeline stage, and shorter branches a delay.

Neurons are discretised in Euler steps. With g the gain from a weighted input to the membrane, thresholds and biases are
divided by g, so that the weights stay those of the file:

    CubaLIF  current_keep = 1 - dt/tau_syn, voltage_keep = 1 - dt/tau_mem, g = (dt/tau_syn) w_in (dt/tau_mem) r
    LIF      current_keep = 0,              voltage_keep = 1 - dt/tau,     g = (dt/tau) r
    IF       current_keep = 0,              voltage_keep = 1,              g = dt r

An integrator (LI, CubaLI, I) is the same without threshold and reset. It may only be the node before the Output, which
then reads its membrane. Its g goes into the weights, so that v is the membrane of the file.

A constant input to a population with a synaptic filter ramps up through that filter. It is therefore carried by a
constant source that fires at every step; without a filter it is an ordinary neuron bias.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import nir
import numpy as np
import torch

from spikeport.converters import compose
from spikeport.converters.compose import Identity, LinearMap
from spikeport.converters.graph import FloatNeuron, Input, Population, ProcessGraph, Projection, Readout, Reset
from spikeport.converters.nir_reader import check_nir
from spikeport.converters.operators import Dense, Operator, Pair, Shape, SumPool
from spikeport.models.errors import GraphError

SPIKING = (nir.CubaLIF, nir.LIF, nir.IF)
INTEGRATORS = (nir.CubaLI, nir.LI, nir.I)
LINEAR = (nir.Affine, nir.Linear, nir.Scale, nir.Conv2d, nir.Flatten, nir.SumPool2d, nir.AvgPool2d)
CONSTANT_INPUT = "constant"

TIME_HELP = (
    "NIR does not store it. What the writers meant: snnTorch dt=1e-4, Norse dt=1e-3, Sinabs dt=1 (time constants in "
    "steps), SpikingJelly its own dt."
)


@dataclass(frozen=True)
class _Term:
    source: str
    map: LinearMap


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
    steps: int | None = None,
    message_bits: int | None = None,
) -> ProcessGraph:
    """Lower a NIR graph to a float `ProcessGraph`.

    Args:
        dt, reset: needed where the neurons' metadata does not record them; a contradiction is an error. An integrator
            has no reset.
        steps: length of one sample; taken from the graph's metadata by default.
        message_bits: bits of the input's payload; from the metadata, else 1 (binary spikes).

    Raises GraphError naming the node that cannot be lowered and why.
    """
    check_nir(graph, name)
    _check_supported(graph)
    metadata = graph.metadata if isinstance(graph.metadata, dict) else {}
    if steps is None and "steps" not in metadata:
        raise GraphError(f"{name}: how many steps a sample lasts is not recorded; give steps.")
    sample_steps = steps if steps is not None else int(_number(name, metadata, "steps", 0))
    spiking = {key: node for key, node in graph.nodes.items() if isinstance(node, SPIKING)}
    neurons = {key: node for key, node in graph.nodes.items() if isinstance(node, (*SPIKING, *INTEGRATORS))}
    step = float(_agreed(neurons, "dt", dt))
    mode: Reset = "subtract" if spiking and _agreed(spiking, "reset", reset) == "subtract" else "zero"
    walk = _Walk(graph)
    forms = {key: walk.into(key) for key in neurons}
    order, recurrent = _order(graph, neurons, forms)
    bits = message_bits if message_bits is not None else int(_number(name, metadata, "message_bits", 1))
    inputs = [Input(key, _shape(node.input_type["input"]), bits) for key, node in graph.inputs.items()]
    populations: list[Population] = []
    projections: list[Projection] = []
    for key in order:
        node = neurons[key]
        if isinstance(node, INTEGRATORS):
            forms[key] = _gained(key, forms[key], _shrunk(_gain(key, node, step)))
        neuron, constant = _neuron(key, node, forms[key], step, mode)
        populations.append(Population(key, _shape(node.input_type["input"]), neuron))
        for term in forms[key].terms:
            pair = f"{term.source}->{key}"
            parallel = sum(projection.name.split("#")[0] == pair for projection in projections)
            projections.append(
                Projection(
                    name=pair if not parallel else f"{pair}#{parallel + 1}",
                    source=term.source,
                    target=key,
                    operator=compose.finish(term.map),
                    recurrent=(term.source, key) in recurrent,
                )
            )
        if constant is not None:
            source = f"{CONSTANT_INPUT}_{key}"
            fan = Dense((1,), constant.reshape(-1, 1), shape_out=constant.shape)
            inputs.append(Input(source, (1,), constant=True))
            projections.append(Projection(f"{source}->{key}", source, key, fan))
    populations, projections = balance(inputs, populations, projections)
    output = _output_population(graph, walk)
    readout = Readout(
        output,
        str(metadata.get("readout", "count" if output in spiking else "membrane")),  # type: ignore[arg-type]
        _number(name, metadata, "readout_keep", 0.0),
    )
    notes = {"discretization": "euler", "reset": mode}
    return ProcessGraph(name, sample_steps, step, tuple(inputs), tuple(populations), tuple(projections), readout, notes)


def balance(
    inputs: list[Input], populations: list[Population], projections: list[Projection]
) -> tuple[list[Population], list[Projection]]:
    """Give each population its pipeline stage and pad shorter branches with axonal delay.

    A population works one chip step after the latest of its sources; earlier ones wait. Recurrent projections and
    constant sources take no part.
    """
    stage = {node.name: 0 for node in inputs}
    waiting = {node.name for node in inputs if node.constant}
    for population in populations:
        sources = [p.source for p in projections if p.target == population.name and not p.recurrent]
        stage[population.name] = 1 + max((stage[source] for source in sources if source not in waiting), default=0)
    staged = [replace(population, stage=stage[population.name]) for population in populations]
    padded = [
        p if p.recurrent or p.source in waiting else replace(p, delay=stage[p.target] - 1 - stage[p.source])
        for p in projections
    ]
    return staged, padded


class _Walk:
    """Walks back from a node to the spikes that reach it, remembering what it has seen."""

    def __init__(self, graph: nir.NIRGraph) -> None:
        self.graph = graph
        self.sources: dict[str, list[str]] = {key: [] for key in graph.nodes}
        for source, target in graph.edges:
            self.sources[target].append(source)
        self.outputs: dict[str, _LinearForm] = {}
        self.active: list[str] = []

    def into(self, key: str) -> _LinearForm:
        """The sum of everything that arrives at a node."""
        forms = [self.out_of(source) for source in self.sources[key]]
        shapes = {form.shape for form in forms}
        if len(shapes) != 1:
            raise GraphError(f"node {key!r} receives different shapes: {sorted(shapes)}.")
        terms = tuple(term for form in forms for term in form.terms)
        constant = forms[0].constant
        for form in forms[1:]:
            constant = constant + form.constant
        return _LinearForm(terms, constant, forms[0].shape)

    def out_of(self, key: str) -> _LinearForm:
        """What leaves a node: its own spikes, or the linear form after it."""
        node = self.graph.nodes[key]
        if isinstance(node, (nir.Input, *SPIKING)):
            shape = _shape(node.input_type["input"])
            return _LinearForm((_Term(key, Identity(shape, shape)),), np.zeros(shape), shape)
        if key not in self.outputs:
            if key in self.active:
                loop = " -> ".join([*self.active[self.active.index(key) :], key])
                raise GraphError(f"the graph has a cycle without a neuron in it: {loop}.")
            self.active.append(key)
            arriving = self.into(key)
            try:
                self.outputs[key] = _after(node, arriving)
            except (GraphError, ValueError, IndexError) as error:
                raise GraphError(f"node {key!r} ({type(node).__name__}): {error}") from None
            self.active.pop()
        return self.outputs[key]


def _after(node: nir.NIRNode, form: _LinearForm) -> _LinearForm:
    """The linear form after one more linear node."""
    bias: np.ndarray | None = None
    match node:
        case nir.Linear() | nir.Affine():
            weight = np.asarray(node.weight, dtype=np.float64)
            if weight.ndim != 2:
                raise GraphError(f"weights of {weight.ndim} dimensions; only a matrix can be lowered.")
            bias = np.asarray(node.bias, dtype=np.float64) if isinstance(node, nir.Affine) else None
            shape: Shape = (weight.shape[0],)

            def step(first: LinearMap) -> LinearMap:
                return compose.dense(first, weight)

        case nir.Conv2d():
            kernel = np.asarray(node.weight, dtype=np.float64)
            stride, dilation = _pair(node.stride), _pair(node.dilation)
            padding = _padding(node, kernel.shape[2:], stride, dilation)
            groups = int(node.groups)
            shape = compose.conv(Identity(form.shape, form.shape), kernel, stride, padding, dilation, groups).out_shape
            bias = np.broadcast_to(np.asarray(node.bias, dtype=np.float64)[:, None, None], shape)

            def step(first: LinearMap) -> LinearMap:
                return compose.conv(first, kernel, stride, padding, dilation, groups)

        case nir.Scale():
            factor = np.asarray(node.scale, dtype=np.float64)
            shape = form.shape
            if factor.ndim == 1 and len(shape) == 3 and factor.shape[0] == shape[0]:
                factor = factor[:, None, None]

            def step(first: LinearMap) -> LinearMap:
                return compose.scale(first, factor)

        case nir.Flatten():
            shape = _flat(form.shape, int(node.start_dim), int(node.end_dim))

            def step(first: LinearMap) -> LinearMap:
                return compose.flatten(first, shape)

        case nir.SumPool2d() | nir.AvgPool2d():
            if any(_pair(node.padding)):
                raise GraphError("pooling with padding cannot be lowered.")
            window = SumPool(_pair(node.kernel_size), _pair(node.stride))
            shape = window.out_shape(form.shape)
            average = isinstance(node, nir.AvgPool2d)

            def step(first: LinearMap) -> LinearMap:
                return compose.pool(first, window, average)

        case _:
            raise GraphError("this node cannot be lowered.")
    constant = _apply(step(Identity(form.shape, form.shape)), form.constant, shape)
    if bias is not None:
        constant = constant + bias
    return _LinearForm(tuple(_Term(term.source, step(term.map)) for term in form.terms), constant, shape)


def _apply(step: LinearMap, value: np.ndarray, shape: Shape) -> np.ndarray:
    if not value.any():
        return np.zeros(shape)
    operator: Operator = compose.finish(step)
    return operator.apply(torch.as_tensor(value, dtype=torch.float64)[None])[0].numpy().reshape(shape)


def _neuron(
    key: str, node: nir.NIRNode, form: _LinearForm, dt: float, reset: Reset
) -> tuple[FloatNeuron, np.ndarray | None]:
    """Discretise a neuron; the second value is the constant that must pass through its synaptic filter, if any."""
    integrates = isinstance(node, INTEGRATORS)
    if not integrates and np.any(np.asarray(node.v_reset) != 0):
        raise GraphError(f"node {key!r}: a reset potential other than 0 cannot be lowered.")
    gain = np.ones(()) if integrates else _gain(key, node, dt)
    threshold = np.asarray(np.inf if integrates else node.v_threshold, dtype=np.float64)
    current_keep, voltage_keep, leak = np.zeros(()), np.ones(()), np.zeros(())
    if not isinstance(node, (nir.IF, nir.I)):
        tau = _tau(node)
        voltage_keep = 1 - dt / tau
        leak = dt / tau * np.asarray(node.v_leak, dtype=np.float64)
    if isinstance(node, (nir.CubaLIF, nir.CubaLI)):
        current_keep = 1 - dt / np.asarray(node.tau_syn, dtype=np.float64)
    bias = leak / gain
    through_filter: np.ndarray | None = None
    if form.constant.any():
        if np.any(current_keep > 0):
            through_filter = form.constant
        else:
            bias = bias + form.constant
    neuron = FloatNeuron(
        current_keep=_shrunk(current_keep),
        voltage_keep=_shrunk(voltage_keep),
        threshold=_shrunk(threshold / gain),
        bias=_shrunk(bias),
        reset="zero" if integrates else reset,
    )
    return neuron, through_filter


def _gain(key: str, node: nir.NIRNode, dt: float) -> np.ndarray:
    """g: what one unit of weighted input adds to the membrane in the step in which it arrives."""
    for constant in ("tau", "tau_mem", "tau_syn"):
        if hasattr(node, constant) and np.any(np.asarray(getattr(node, constant)) < dt):
            smallest = float(np.min(getattr(node, constant)))
            raise GraphError(f"node {key!r}: {constant} = {smallest:g} s is shorter than dt = {dt:g} s.")
    resistance = np.asarray(node.r, dtype=np.float64)
    gain: np.ndarray = dt * resistance if isinstance(node, (nir.IF, nir.I)) else dt / _tau(node) * resistance
    if isinstance(node, (nir.CubaLIF, nir.CubaLI)):
        gain = gain * (dt / np.asarray(node.tau_syn, dtype=np.float64)) * np.asarray(node.w_in, dtype=np.float64)
    if np.any(gain <= 0):
        raise GraphError(f"node {key!r}: r and w_in must be positive, or the neuron hears its input inverted or not.")
    return gain


def _tau(node: nir.NIRNode) -> np.ndarray:
    """The time constant of the membrane."""
    cuba = isinstance(node, (nir.CubaLIF, nir.CubaLI))
    return np.asarray(node.tau_mem if cuba else node.tau, dtype=np.float64)


def _gained(key: str, form: _LinearForm, gain: np.ndarray) -> _LinearForm:
    """What arrives at a node, times `gain`, one for all or one a neuron."""
    try:
        terms = tuple(_Term(term.source, compose.scale(term.map, gain)) for term in form.terms)
        return _LinearForm(terms, form.constant * np.broadcast_to(gain, form.shape), form.shape)
    except (GraphError, ValueError) as error:
        raise GraphError(f"node {key!r}: {error}") from None


def _shrunk(value: np.ndarray) -> np.ndarray:
    """One number where all entries are equal."""
    value = np.asarray(value, dtype=np.float64)
    return value.reshape(-1)[0].reshape(()) if value.size and (value == value.reshape(-1)[0]).all() else value


def _order(
    graph: nir.NIRGraph, spiking: dict[str, nir.NIRNode], forms: dict[str, _LinearForm]
) -> tuple[list[str], set[tuple[str, str]]]:
    """Populations in topological order, and the (source, target) pairs that run backwards and are recurrent.

    Where only cycles remain, the population nearest to an input goes next and what is missing becomes recurrent.
    """
    needs = {key: {term.source for term in forms[key].terms} & set(spiking) for key in spiking}
    distance = dict.fromkeys(graph.inputs, 0)
    frontier = list(graph.inputs)
    while frontier:
        frontier, last = [], frontier
        for target, form in forms.items():
            if target not in distance and any(term.source in last for term in form.terms):
                distance[target] = 1 + min(distance[t.source] for t in form.terms if t.source in distance)
                frontier.append(target)
    unreached = [key for key in spiking if key not in distance]
    if unreached:
        raise GraphError(f"no input reaches node {unreached[0]!r}.")
    order: list[str] = []
    recurrent = {(key, key) for key in spiking if key in needs[key]}
    remaining = list(spiking)
    while remaining:
        ready = [key for key in remaining if not needs[key] - set(order) - {key}]
        chosen = ready[0] if ready else min(remaining, key=lambda key: distance[key])
        recurrent |= {(source, chosen) for source in needs[chosen] - set(order) if source != chosen}
        order.append(chosen)
        remaining.remove(chosen)
    return order, recurrent


def _output_population(graph: nir.NIRGraph, walk: _Walk) -> str:
    names = list(graph.outputs)
    if len(names) != 1:
        raise GraphError(f"the graph has {len(names)} Output nodes; a decision is read from one.")
    sources = walk.sources[names[0]]
    if len(sources) != 1 or not isinstance(graph.nodes[sources[0]], (*SPIKING, *INTEGRATORS)):
        raise GraphError(
            f"Output node {names[0]!r} is fed by {', '.join(map(repr, sources))}; the decision must be read from one "
            "spiking population, or from one integrator (LI, CubaLI, I)."
        )
    return sources[0]


def _check_supported(graph: nir.NIRGraph) -> None:
    known = (nir.Input, nir.Output, *SPIKING, *INTEGRATORS, *LINEAR)
    for key, node in graph.nodes.items():
        if not isinstance(node, known):
            names = ", ".join(kind.__name__ for kind in (*SPIKING, *INTEGRATORS, *LINEAR))
            raise GraphError(
                f"node {key!r} is of type {type(node).__name__}, which cannot be lowered to the chip. "
                f"Supported: {names}."
            )
        followers = [target for source, target in graph.edges if source == key]
        if isinstance(node, INTEGRATORS) and not all(isinstance(graph.nodes[to], nir.Output) for to in followers):
            raise GraphError(
                f"node {key!r} ({type(node).__name__}) feeds {', '.join(map(repr, followers))}: it sends no spikes, "
                "only a membrane potential, and that can be read by the Output alone."
            )


def _agreed(spiking: dict[str, nir.NIRNode], field: str, given: float | str | None) -> Any:
    """The value of `dt` or `reset` that metadata and caller agree on."""
    found = {key: node.metadata[field] for key, node in spiking.items() if field in (node.metadata or {})}
    values: set[Any] = {float(value) if field == "dt" else str(value) for value in found.values()}
    if given is not None:
        values.add(given)
    if not values:
        raise GraphError(f"{field} is not recorded in the file and was not given. {TIME_HELP}")
    if len(values) > 1:
        raise GraphError(f"{field} is contradictory: {', '.join(str(value) for value in sorted(values, key=str))}.")
    value = values.pop()
    if field == "reset" and value not in ("zero", "subtract"):
        raise GraphError(f"reset = {value!r} is unknown; it is 'zero' or 'subtract'.")
    if field == "dt" and not value > 0:
        raise GraphError(f"dt = {value} must be positive.")
    for key, node in spiking.items():
        scheme = (node.metadata or {}).get("discretization", "euler")
        if scheme != "euler":
            raise GraphError(f"node {key!r}: discretization {scheme!r} is not supported; only 'euler' is.")
    return value


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


def _shape(value: object) -> Shape:
    return tuple(int(extent) for extent in np.atleast_1d(np.asarray(value)))


def _pair(value: object) -> Pair:
    flat = np.atleast_1d(np.asarray(value, dtype=int)).ravel()
    return (int(flat[0]), int(flat[-1]))


def _padding(node: nir.Conv2d, kernel: tuple[int, ...], stride: Pair, dilation: Pair) -> Pair:
    text = node.padding
    if isinstance(text, bytes | np.bytes_):
        text = text.decode()
    if not isinstance(text, str):
        return _pair(text)
    if text == "valid":
        return (0, 0)
    reach = [gap * (extent - 1) for gap, extent in zip(dilation, kernel, strict=True)]
    if stride != (1, 1) or any(extent % 2 for extent in reach):
        raise GraphError("padding 'same' needs stride 1 and an odd kernel.")
    return (reach[0] // 2, reach[1] // 2)


def _flat(shape: Shape, start: int, end: int) -> Shape:
    stop = end if end >= 0 else len(shape) + end
    if not 0 <= start <= stop < len(shape):
        raise GraphError(f"flattening dimensions {start}..{end} of shape {shape} is not possible.")
    size = int(np.prod(shape[start : stop + 1]))
    return (*shape[:start], size, *shape[stop + 1 :])
