"""`explain`: why two traces first differ where they do.

Up to its first difference everything that flows into the differing population is the same in both traces, so the cause
lies in that population or in a projection into it. Each side is held against its graph by `replay`, on its own spikes:

- Where both follow their graphs, these differ, and what differs is named (`differences`).
- Where one does not, its backend computed something else: known faults are tried one after another, and those are named
  that give exactly the spikes that it fired (`suspects`).

Where the states of both sides are known, the quantity that parts first (incoming current, u, v, spike, reset) tells in
which term of the equations the cause lies.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from spikeport.converters.graph import LoihiNeuron, ProcessGraph, Projection
from spikeport.deploy.differences import differences
from spikeport.deploy.faults import Cause
from spikeport.deploy.replay import Cell, Place, States, replay, sent_spikes
from spikeport.deploy.suspects import Scene, suspects
from spikeport.deploy.trace import Trace

MOST_INCOMING = 12
"""Incoming spikes listed; the largest ones."""
Recorder = Callable[[dict[str, np.ndarray]], Trace | None]
"""Runs the inputs of one sample again on a side's backend; their trace with u and v, or None where that cannot be."""


@dataclass(frozen=True)
class Side:
    """One trace at the neuron and step of the first difference.

    follows: the trace has the spikes that its graph's equations make of what its populations sent, up to here; None
    where a graded input is not known. origin: where u and v come from: the graph's equations on those spikes, the
    backend, or the equations with the fault that explains its spikes. `membrane` is v as it met the threshold, v that
    after the reset; what is not known is None.
    """

    backend: str
    follows: bool | None
    origin: Literal["replayed", "recorded", "as if", "unknown"]
    spike: int
    threshold: int
    bias: int
    current: int | None = None
    u_before: int | None = None
    u: int | None = None
    v_before: int | None = None
    membrane: int | None = None
    v: int | None = None


@dataclass(frozen=True)
class Incoming:
    """Spikes of one source neuron that arrive at the differing neuron in the differing step.

    step: of the sample, in which the source fired them. delay: axonal delay of the projection in chip steps. Of each
    side: `weights`, the sum of the synapses before the exponent, and `currents`, what arrives; None where none does.
    """

    projection: str
    source: str
    neuron: int
    step: int
    delay: int
    weights: tuple[int | None, int | None]
    currents: tuple[float | None, float | None]


@dataclass(frozen=True)
class StateDifference:
    """The first quantity in which the two sides' states part, in the order in which a step computes them."""

    step: int
    neuron: int
    quantity: str
    first: int
    second: int
    hint: str


@dataclass(frozen=True)
class Explanation:
    """Why two traces part.

    incoming: the largest spikes that arrive at the neuron in that step; left_out: how many more there are, and their
    currents on each side together. causes: at the differing population; elsewhere: other differences of the two graphs.
    """

    sides: tuple[Side, Side]
    incoming: tuple[Incoming, ...]
    left_out: int
    left_out_currents: tuple[float, float]
    state: StateDifference | None
    causes: tuple[Cause, ...]
    elsewhere: tuple[Cause, ...] = ()

    def __str__(self) -> str:
        texts = [str(cause) for cause in self.causes] or ([self.state.hint] if self.state else [])
        return "; ".join(texts)


@dataclass(frozen=True, eq=False)
class _View:
    """One side: its graph and trace, the population's cell, and what is known of it in the differing sample.

    sent: what the sources sent. states: what the cell makes of it. again: the sample alone, run again with its states,
    where it gave the same spikes. assumed: cell and states are those with the fault that explains the spikes.
    """

    graph: ProcessGraph
    trace: Trace
    cell: Cell
    place: Place
    sent: dict[str, np.ndarray] | None
    states: States | None
    follows: bool | None
    again: Trace | None = None
    assumed: bool = False

    @staticmethod
    def of(
        graph: ProcessGraph, traces: tuple[Trace, Trace], inputs: dict[str, np.ndarray] | None, place: Place
    ) -> "_View":
        cell, trace = Cell.of(graph, place.population), traces[0]
        sources = {arm.projection.source for arm in cell.arms}
        sent = sent_spikes(graph, sources, traces, inputs, slice(place.sample, place.sample + 1))
        if sent is None:
            return _View(graph, trace, cell, place, None, None, None)
        states = replay(cell, sent, 1, graph.steps)
        spikes = trace.spikes(place.population, slice(place.sample, place.sample + 1))
        follows = np.array_equal(states.spikes[0, : place.step + 1], spikes[0, : place.step + 1])
        if place.membrane and trace.membrane is not None:
            follows = follows and np.array_equal(states.v[0, -1], trace.membrane[place.sample])
        return _View(graph, trace, cell, place, sent, states, follows)

    def as_if(self, cell: Cell) -> "_View":
        """The view with the cell that explains its spikes."""
        assert self.sent is not None
        return replace(self, cell=cell, states=replay(cell, self.sent, 1, self.graph.steps), assumed=True)

    @property
    def recorded(self) -> dict[str, np.ndarray] | None:
        """u and v, perhaps a, of the population in the differing sample, (steps, n), as the backend recorded them."""
        trace, sample = (self.trace, self.place.sample) if self.again is None else (self.again, 0)
        kept = trace.states.get(self.place.population)
        return None if kept is None else {key: values[sample] for key, values in kept.items()}

    def repeated(self, again: Trace) -> bool:
        """The sample run alone gave the spikes that it gave among the others."""
        sample = self.place.sample
        names = (population.name for population in self.graph.populations)
        return all(np.array_equal(again.packed[name][0], self.trace.packed[name][sample]) for name in names)

    def side(self) -> Side:
        step, neuron = self.place.step, self.place.neuron
        known = self.known()
        spike = self.trace.spikes(self.place.population, slice(self.place.sample, self.place.sample + 1))
        origin: Literal["replayed", "recorded", "as if", "unknown"] = "unknown"
        if known is not None:
            origin = "replayed" if self.follows else "as if" if self.assumed else "recorded"

        def value(key: str) -> int | None:
            return None if known is None else _number(known[key], step, neuron)

        return Side(
            backend=self.trace.backend,
            follows=self.follows,
            origin=origin,
            spike=int(spike[0, step, neuron]),
            threshold=int(self.cell.threshold[neuron]),
            bias=int(self.cell.bias[neuron]),
            current=value("current"),
            u_before=value("u_before"),
            u=value("u"),
            v_before=value("v_before"),
            membrane=value("membrane"),
            v=value("v"),
        )

    def known(self) -> dict[str, np.ndarray | None] | None:
        """Quantities (steps, n) of the differing sample in the order of a step; None where none is known.

        A side that follows its graph has the states of its replay; one that does not has what it recorded, or what the
        fault makes that explains it, or nothing.
        """
        if (self.follows or self.assumed) and self.states is not None:
            s = self.states
            found = (("current", s.a), ("u_before", s.u_before), ("u", s.u), ("v_before", s.v_before))
            rest = (("membrane", s.membrane), ("spike", s.spikes), ("v", s.v))
            return {key: values[0] for key, values in (*found, *rest)}
        kept = self.recorded
        if kept is None:
            return None
        sample = self.place.sample
        fired = self.trace.spikes(self.place.population, slice(sample, sample + 1))[0]
        u, v = kept["u"], kept["v"]
        u_before, v_before = (np.concatenate([np.zeros_like(x[:1]), x[:-1]]) for x in (u, v))
        # before a reset v was never stored, so it is known only where no spike was
        membrane = np.ma.masked_array(v, mask=fired.astype(bool))
        return {
            "current": kept.get("a"),
            "u_before": u_before,
            "u": u,
            "v_before": v_before,
            "membrane": membrane,
            "spike": fired,
            "v": v,
        }


def _number(array: np.ndarray | None, step: int, neuron: int) -> int | None:
    value = None if array is None else array[step, neuron]
    return None if value is None or value is np.ma.masked else int(value)


def explain(
    graphs: tuple[ProcessGraph, ProcessGraph],
    traces: tuple[Trace, Trace],
    inputs: dict[str, np.ndarray] | None,
    place: Place,
    recorders: tuple[Recorder | None, Recorder | None] = (None, None),
) -> Explanation | None:
    """Explain the first difference of two traces; None for networks in floats.

    Args:
        graphs: of each trace; the same one twice where one network ran on two backends.
        inputs: what was run; needed only where a graded input flows into the differing population.
        recorders: of each side, asked for the states of one that does not follow its graph.
    """
    if not all(isinstance(graph.population(place.population).neuron, LoihiNeuron) for graph in graphs):
        return None
    causes: list[Cause] = []
    elsewhere: list[Cause] = []
    if graphs[0] is not graphs[1]:
        here = {place.population, *(arm.name for graph in graphs for arm in graph.incoming(place.population))}
        for cause in differences(*graphs):
            (causes if cause.where in here else elsewhere).append(cause)
    views = []
    for graph, pair, recorder in zip(graphs, (traces, traces[::-1]), recorders, strict=True):
        view = _View.of(graph, pair, inputs, place)
        if view.follows is False:
            guessed, fault = suspects(Scene(graph, *pair, inputs, place))
            view, alone = _with_states(view, pair[1], inputs, recorder)
            causes += [*guessed, *alone]
            if view.recorded is None and fault is not None:
                view = view.as_if(fault.cell)
        views.append(view)
    incoming = _incoming(*views)
    return Explanation(
        sides=(views[0].side(), views[1].side()),
        incoming=tuple(incoming[:MOST_INCOMING]),
        left_out=max(0, len(incoming) - MOST_INCOMING),
        left_out_currents=(_sum(incoming[MOST_INCOMING:], 0), _sum(incoming[MOST_INCOMING:], 1)),
        state=_state_difference(*views),
        causes=tuple(causes),
        elsewhere=tuple(elsewhere),
    )


def _with_states(
    view: _View, other: Trace, inputs: dict[str, np.ndarray] | None, recorder: Recorder | None
) -> tuple[_View, list[Cause]]:
    """The view with states of a run of the sample alone, where it lacks them; a cause where that run differs."""
    if view.recorded is not None or recorder is None:
        return view, []
    sample, backend = view.place.sample, view.trace.backend
    nodes = {node.name: node for node in view.graph.event_inputs}
    sent = sent_spikes(view.graph, nodes, (view.trace, other), inputs, slice(sample, sample + 1))
    if sent is None:
        return view, []
    again = recorder({name: values.reshape(1, -1, *nodes[name].shape) for name, values in sent.items()})
    if again is None or view.repeated(again):
        return replace(view, again=again), []
    text = (
        f"run again alone, sample {sample} gives other spikes than the {backend} trace has: that depends on the "
        "samples before, or was made by another bundle"
    )
    return view, [Cause(view.place.population, "not repeated", text, backend)]


# ---- incoming spikes -------------------------------------------------------------------------------------------------


_Arrival = tuple[str, str, int, int, int]
"""Projection, source, source neuron, step in which it fired, axonal delay."""


def _incoming(first: _View, second: _View) -> list[Incoming]:
    """What arrives at the neuron in that step, on either side, the largest currents first."""
    sides = _arriving(first), _arriving(second)
    found = []
    for key in {**sides[0], **sides[1]}:
        (weight, current), (other_weight, other_current) = (side.get(key, (None, None)) for side in sides)
        found.append(Incoming(*key, (weight, other_weight), (current, other_current)))
    return sorted(found, key=lambda each: -max(abs(current or 0) for current in each.currents))


def _sum(incoming: list[Incoming], side: int) -> float:
    return sum(each.currents[side] or 0.0 for each in incoming)


def _arriving(view: _View) -> dict[_Arrival, tuple[int, float]]:
    """Weight and current of each spike that arrives."""
    found: dict[_Arrival, tuple[int, float]] = {}
    for arm in view.cell.arms:
        projection, step = arm.projection, view.place.step - arm.lag
        if step < 0 or view.sent is None:
            continue
        payloads = view.sent[projection.source][0, step]
        weights = _weights_into(projection, view.place.neuron)
        for neuron in np.flatnonzero((payloads != 0) & (weights != 0)).tolist():
            current = int(weights[neuron]) * int(payloads[neuron]) * 2.0**projection.exponent
            key = (projection.name, projection.source, neuron, step, projection.delay)
            found[key] = int(weights[neuron]), current
    return found


def _weights_into(projection: Projection, neuron: int) -> np.ndarray:
    """Sum of the synapses from each source neuron into one target neuron, int64 (n_in,)."""
    operator = projection.operator
    unit = torch.zeros((1, operator.n_out), dtype=torch.float64)
    unit[0, neuron] = 1
    weights: np.ndarray = operator.transpose_apply(unit.reshape(1, *operator.out_shape)).round().long().numpy()
    return weights.reshape(-1)


# ---- states ----------------------------------------------------------------------------------------------------------

_HINTS = {
    "incoming current": "the same spikes arrive, but make another current: weights, exponent, layout or arrival time "
    "of a projection into {population}",
    "u": "the same current arrives, but u differs: the decay of the current (du, ds_offset) of {population}",
    "u or incoming current": "u differs: a projection into {population}, or its decay of the current (du, ds_offset)",
    "v, without a v before": "u agrees, and v starts from 0: the bias of {population}",
    "v": "u agrees, but v differs: the bias or the decay of the voltage (dv) of {population}",
    "spike": "v agrees, but not the spike: the threshold of {population}",
    "v after the reset": "the spike agrees, but not v after it: the reset of {population}",
}


def _state_difference(first: _View, second: _View) -> StateDifference | None:
    """The first state that differs within the sample, up to the step of the first difference."""
    states = first.known(), second.known()
    if states[0] is None or states[1] is None:
        return None
    place = first.place
    for step in range(place.step + 1):
        for key in ("current", "u", "membrane", "spike", "v"):
            here, there = states[0][key], states[1][key]
            if here is None or there is None:
                continue
            unequal = np.flatnonzero(np.ma.filled(here[step] != there[step], False))
            if not unequal.size:
                continue
            # where the neuron that fired differently is among several, it is the one to look at
            neuron = place.neuron if place.neuron in unequal else int(unequal[0])
            values = int(here[step, neuron]), int(there[step, neuron])
            quantity = _quantity(key, states[0], states[1], step, neuron)
            name = quantity.split(",")[0]
            return StateDifference(step, neuron, name, *values, _HINTS[quantity].format(population=place.population))
    return None


def _quantity(
    key: str, first: dict[str, np.ndarray | None], second: dict[str, np.ndarray | None], step: int, neuron: int
) -> str:
    """What a difference in a state means, given that everything before it agrees."""
    if key == "u" and (first["current"] is None or second["current"] is None):
        started = _number(first["u_before"], step, neuron)
        return "u or incoming current" if started else "incoming current"
    if key == "membrane":
        return "v" if _number(first["v_before"], step, neuron) else "v, without a v before"
    return {"current": "incoming current", "u": "u", "spike": "spike", "v": "v after the reset"}[key]
