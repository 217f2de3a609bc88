"""`replay`: one population run alone, on the spikes that its sources sent according to a trace.

What a trace's own spikes make of the equations of its graph: where the trace has another spike, the fault is in this
population or in a projection into it, and nowhere before.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.reference import Reference
from spikeport.deploy.trace import Trace
from spikeport.models.loihi_integers import THRESHOLD_SHIFT, IntegerState, integrate, shift_bias


@dataclass(frozen=True)
class Place:
    """Population, sample, step and flat neuron index; `membrane`: its last membrane differs, and no spike before."""

    population: str
    sample: int
    step: int
    neuron: int
    membrane: bool = False


@dataclass(frozen=True, eq=False)
class Arm:
    """A projection into the population, and by how many sample steps its spikes lag: 0, or 1 where it is recurrent."""

    projection: Projection
    lag: int


@dataclass(frozen=True, eq=False)
class Cell:
    """A population of an integer graph with everything that flows into it."""

    population: Population
    arms: tuple[Arm, ...]

    @staticmethod
    def of(graph: ProcessGraph, name: str) -> "Cell":
        return Cell(graph.population(name), tuple(Arm(p, int(p.recurrent)) for p in graph.incoming(name)))

    @property
    def neuron(self) -> LoihiNeuron:
        assert isinstance(self.population.neuron, LoihiNeuron)
        return self.population.neuron

    def with_arm(self, index: int, arm: Arm) -> "Cell":
        return replace(self, arms=(*self.arms[:index], arm, *self.arms[index + 1 :]))

    def with_neuron(self, neuron: LoihiNeuron) -> "Cell":
        return replace(self, population=replace(self.population, neuron=neuron))

    @cached_property
    def threshold(self) -> np.ndarray:
        """What v is compared with, by neuron, int64 (n,)."""
        return self._flat(np.asarray(self.neuron.vth) << THRESHOLD_SHIFT)

    @cached_property
    def bias(self) -> np.ndarray:
        """What each step adds to v, by neuron, int64 (n,)."""
        mant, exponent = (torch.as_tensor(np.asarray(x)) for x in (self.neuron.bias_mant, self.neuron.bias_exp))
        return self._flat(shift_bias(mant, exponent).numpy())

    def _flat(self, values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values, self.population.shape).reshape(-1)


@dataclass(frozen=True, eq=False)
class States:
    """What the neurons of a cell did, each int64 (samples, steps, n).

    a: summed synaptic input. u, v: after the step (v after reset). membrane: v as it met the threshold.
    u_before, v_before: at the end of the step before, 0 at the first.
    """

    spikes: np.ndarray
    a: np.ndarray
    u: np.ndarray
    v: np.ndarray
    u_before: np.ndarray
    v_before: np.ndarray
    membrane: np.ndarray


def sent_spikes(
    graph: ProcessGraph,
    names: Iterable[str],
    traces: tuple[Trace, ...],
    inputs: dict[str, np.ndarray] | None,
    samples: slice,
) -> dict[str, np.ndarray] | None:
    """Spikes or payloads (samples, steps, size) that each named node sent; None where one of them is not known.

    Args:
        traces: spikes of populations are those of the first; inputs are looked for in all of them.
        inputs: what was run, which a graded input cannot do without: a trace keeps its events, not their payloads.
    """
    found = {}
    for name in names:
        node = graph.node(name)
        holds = [trace for trace in (traces[:1] if isinstance(node, Population) else traces) if name in trace.packed]
        if isinstance(node, Input) and node.constant:
            found[name] = np.ones((samples.stop - samples.start, graph.steps, node.size), np.int64)
        elif isinstance(node, Input) and inputs is not None and name in inputs:
            part = inputs[name][samples]
            found[name] = part.reshape(*part.shape[:2], -1).astype(np.int64)
        elif holds and (isinstance(node, Population) or node.message_bits == 1):
            found[name] = holds[0].spikes(name, samples).astype(np.int64)
        else:
            return None
    return found


def replay(cell: Cell, sent: dict[str, np.ndarray], samples: int, steps: int, keep_state: bool = False) -> States:
    """Run a cell on what its sources sent, arrays (samples, steps, size) by source.

    Args:
        keep_state: do not reset the state between the samples, as a chip would that missed its reset.
    """
    frame = (1, samples * steps) if keep_state else (samples, steps)
    name = cell.population.name
    # one input always: a population that nothing flows into runs too
    nodes, projections, arrays = [Input("", (1,))], [], {"": np.zeros((*frame, 1), np.uint8)}
    for arm in cell.arms:
        projection = arm.projection
        values = lagging(sent[projection.source].reshape(*frame, -1), arm.lag)
        bits = max(1, int(values.max(initial=0)).bit_length())
        nodes.append(Input(projection.name, (values.shape[2],), bits))
        arrays[projection.name] = values
        projections.append(replace(projection, source=projection.name, delay=0, recurrent=False))
    population = replace(cell.population, stage=1)
    graph = ProcessGraph(name, frame[1], 1.0, tuple(nodes), (population,), tuple(projections), Readout(name))
    run = Reference(graph).run(arrays, record=True)

    def flat(values: torch.Tensor) -> np.ndarray:
        array: np.ndarray = values.to(torch.int64).numpy().reshape(samples, steps, -1)
        return array

    a, u, v = (flat(values[name]) for values in (run.currents, run.u, run.v))
    u_before, v_before = (lagging(x.reshape(*frame, -1), 1).reshape(x.shape) for x in (u, v))
    return States(flat(run.spikes[name]), a, u, v, u_before, v_before, membrane(cell, u_before, v_before, a))


def membrane(cell: Cell, u_before: np.ndarray, v_before: np.ndarray, a: np.ndarray) -> np.ndarray:
    """v as it meets the threshold, from the state before and the synaptic input, each (..., n)."""
    neuron = cell.neuron
    du, dv = (torch.as_tensor(cell._flat(np.asarray(values)).copy()) for values in (neuron.du, neuron.dv))
    before = IntegerState(torch.as_tensor(u_before), torch.as_tensor(v_before))
    bias = torch.as_tensor(cell.bias.copy())
    after = integrate(before, torch.as_tensor(a), du=du, dv=dv, bias=bias, ds_offset=neuron.ds_offset)
    array: np.ndarray = after.v.numpy()
    return array


def lagging(values: np.ndarray, lag: int) -> np.ndarray:
    """(samples, steps, n) moved later by `lag` steps, or earlier where it is negative; zeros come in."""
    moved = np.zeros_like(values)
    steps = values.shape[1]
    moved[:, max(lag, 0) : steps + min(lag, 0)] = values[:, max(-lag, 0) : steps - max(lag, 0)]
    return moved
