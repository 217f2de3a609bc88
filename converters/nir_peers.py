"""Writing NIR such that Norse, snnTorch, Sinabs or SpikingJelly load it and fire as we do.

Each of them reads NIR in a way of its own: with a step of its own, ignoring some parameters, refusing others, and with
gaps among the nodes. The same network is therefore stated in each one's terms: its step, its form of a neuron, weights
that have taken on what it would ignore. The result is plain NIR that means the same to us, as its metadata says.

What they do on import (Norse 1.1, snnTorch 1.0, Sinabs 3.1, SpikingJelly 2.0, with nirtorch 2.6; read from their code):

    norse         Euler, dt given (1e-3); r of LIF and IF ignored; resets to 0, CubaLIF alone as it is told; no averages
    snntorch      Euler, dt = 1e-4; resets to 0; one threshold a population; IF becomes a leaky neuron; a direct loop of
                  a neuron and a matrix fails, one more node in it helps
    sinabs        exponential, dt = 1; r ignored, the input of an LIF taken in full; subtracts; several spikes a step,
                  membranes of IF from -threshold (both to be switched off after loading); no current-based neurons
    spikingjelly  Euler, dt given (1e-4); resets to v_reset; every parameter one for all of a population; no groups

None of them has Scale, and what a loop carries is 0 in the first step, so biases in it are moved in front of it.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import nir
import numpy as np

from spikeport.converters.compose import ungrouped
from spikeport.converters.nir_float import holding_nodes
from spikeport.converters.nir_graph import NEURONS, SPIKING, out_shape, plain, schedule
from spikeport.converters.nir_timing import Dynamics, Timing, dynamics
from spikeport.converters.nir_writer import NO_LEAK, reciprocal
from spikeport.models.errors import GraphError

Peer = Literal["norse", "snntorch", "sinabs", "spikingjelly"]


@dataclass(frozen=True)
class _Terms:
    """What a peer takes."""

    title: str
    dt: float
    resets: tuple[str, ...]
    nodes: tuple[type[nir.NIRNode], ...]
    loops: bool = True
    by_depth: bool = False
    """It runs nodes in the order in which it meets them, depth first, and returns what the last one sends."""


_COMMON = (nir.Input, nir.Output, nir.Affine, nir.Conv2d, nir.SumPool2d, nir.Flatten, nir.LIF)

PEERS: dict[str, _Terms] = {
    "norse": _Terms("Norse", 1e-3, ("zero", "subtract"), (*_COMMON, nir.IF, nir.CubaLIF), by_depth=True),
    "snntorch": _Terms("snnTorch", 1e-4, ("zero",), (*_COMMON, nir.AvgPool2d, nir.Conv1d, nir.CubaLIF)),
    "sinabs": _Terms("Sinabs", 1.0, ("subtract",), (*_COMMON, nir.IF), loops=False, by_depth=True),
    "spikingjelly": _Terms("SpikingJelly", 1e-4, ("zero",), (*_COMMON, nir.AvgPool2d, nir.Conv1d, nir.IF, nir.CubaLIF)),
}


def for_peer(graph: nir.NIRGraph, timing: Timing, peer: Peer) -> nir.NIRGraph:
    """The same network, step by step, in the terms of a peer; dt, reset and discretization stand in the metadata.

    Raises GraphError naming the node that the peer cannot do.
    """
    terms = PEERS[peer]
    flat = plain(graph, terms.title)
    if timing.reset not in terms.resets and any(isinstance(node, SPIKING) for node in flat.nodes.values()):
        raise GraphError(
            f"{terms.title} reads NIR with reset {terms.resets[0]!r} only; this network has {timing.reset!r}."
        )
    _, recurrent = schedule(flat, holding_nodes(flat, timing))
    if recurrent and not terms.loops:
        raise GraphError(f"{terms.title} reads no loops; this network has {_edge(next(iter(recurrent)))}.")
    made = _Restated(flat, timing, peer)
    made.linear_nodes()
    made.biases_out_of_loops(recurrent)
    made.neurons()
    if peer == "snntorch":
        made.longer_loops()
    for key, node in made.nodes.items():
        if not isinstance(node, terms.nodes):
            raise GraphError(f"node {key!r} ({type(node).__name__}): {terms.title} reads none.")
    if terms.by_depth:
        made.edges = _by_depth(terms.title, made, recurrent)
    chosen = {"dt": terms.dt, "discretization": "exponential" if peer == "sinabs" else "euler", "reset": timing.reset}
    for node in made.nodes.values():
        if isinstance(node, NEURONS):
            node.metadata = (node.metadata or {}) | chosen
    metadata = {key: value for key, value in flat.metadata.items() if key not in chosen}
    return nir.NIRGraph(made.nodes, made.edges, metadata, type_check=False)


class _Restated:
    """A plain graph on its way into a peer's terms."""

    def __init__(self, graph: nir.NIRGraph, timing: Timing, peer: Peer) -> None:
        self.nodes = {key: copy.copy(node) for key, node in graph.nodes.items()}
        self.edges: list[tuple[str, str]] = list(graph.edges)
        self.timing = timing
        self.peer = peer
        self.terms = PEERS[peer]

    def linear_nodes(self) -> None:
        """Matrices with a bias, kernels without groups, averages as sums where there are none, no factors."""
        for key, node in list(self.nodes.items()):
            match node:
                case nir.Linear():
                    self.nodes[key] = self._replaced(node, nir.Affine(node.weight, np.zeros(len(node.weight))))
                case nir.Conv1d() | nir.Conv2d() if node.groups > 1:
                    node.weight, node.groups = ungrouped(np.asarray(node.weight), node.groups), 1
                case nir.AvgPool2d() if nir.AvgPool2d not in self.terms.nodes:
                    kernel, stride, padding = node.kernel_size, node.stride, node.padding
                    self.nodes[key] = self._replaced(node, nir.SumPool2d(kernel, stride, padding))
                    self._push(key, key, 1 / math.prod(kernel))
                case nir.Scale():
                    factor = np.unique(node.scale)
                    if factor.size != 1:
                        raise GraphError(f"node {key!r} (Scale): {self.terms.title} reads none; make it one factor.")
                    self._push(key, key, float(factor[0]))
                    self._remove(key)
        for key, node in self.nodes.items():
            if isinstance(node, nir.SumPool2d) and any(node.padding):
                raise GraphError(f"node {key!r} (SumPool2d): {self.terms.title} pools without padding.")
        for node in self.nodes.values():
            if isinstance(node, (nir.Affine, nir.Conv1d, nir.Conv2d)):
                node.weight, node.bias = (np.array(value, np.float32) for value in (node.weight, node.bias))
            if isinstance(node, nir.Conv1d):
                node.stride, node.padding, node.dilation = (
                    value if isinstance(value, str) else int(value[0])
                    for value in (node.stride, node.padding, node.dilation)
                )
            if isinstance(node, (nir.SumPool2d, nir.AvgPool2d)):
                for name in ("kernel_size", "stride", "padding"):
                    setattr(node, name, np.array(getattr(node, name)))

    def _replaced(self, old: nir.NIRNode, new: nir.NIRNode) -> nir.NIRNode:
        new.input_type, new.output_type = old.input_type, old.output_type
        return new

    def _push(self, origin: str, key: str, factor: float) -> None:
        """Take a factor of what leaves a node into the weights that it meets next."""
        for target in [target for source, target in self.edges if source == key]:
            node = self.nodes[target]
            if isinstance(node, (nir.Flatten, nir.SumPool2d)):
                if len([source for source, other in self.edges if other == target]) > 1:
                    raise GraphError(f"the factor of node {origin!r} meets a sum in {target!r}, and no weights before.")
                self._push(origin, target, factor)
            elif isinstance(node, (nir.Affine, nir.Linear, nir.Conv1d, nir.Conv2d)):
                if len([source for source, other in self.edges if other == target]) > 1:
                    raise GraphError(f"the factor of node {origin!r} is only that of a part of what {target!r} hears.")
                node.weight = np.asarray(node.weight, np.float64) * factor
            else:
                raise GraphError(
                    f"node {origin!r}: {self.terms.title} has no factors, and before {target!r} "
                    f"({type(node).__name__}) are no weights to take it."
                )

    def _remove(self, key: str) -> None:
        before = [source for source, target in self.edges if target == key]
        after = [target for source, target in self.edges if source == key]
        self.edges = [edge for edge in self.edges if key not in edge]
        self.edges += [(source, target) for source in before for target in after]
        del self.nodes[key]

    def biases_out_of_loops(self, recurrent: frozenset[tuple[str, str]]) -> None:
        """Move the bias of what enters a neuron from a loop into the bias of what enters it from before."""
        for source, target in recurrent:
            node = self.nodes.get(source)
            if not isinstance(node, nir.Affine) or not np.any(node.bias):
                continue
            others = (other for other, end in self.edges if end == target and other != source)
            takes = [
                other
                for other in others
                if isinstance(self.nodes[other], nir.Affine)
                and [end for start, end in self.edges if start == other] == [target]
            ]
            leads = [end for start, end in self.edges if start == source]
            if not takes or leads != [target]:
                raise GraphError(
                    f"node {source!r}: {self.terms.title} leaves a bias in a loop out of the first step, and no Affine "
                    f"before {target!r} can take it."
                )
            first = self.nodes[takes[0]]
            first.bias, node.bias = first.bias + node.bias, np.zeros_like(node.bias)

    def neurons(self) -> None:
        for key, node in self.nodes.items():
            if not isinstance(node, NEURONS):
                continue
            if not isinstance(node, SPIKING):
                raise GraphError(f"node {key!r} ({type(node).__name__}): {self.terms.title} reads none.")
            for name in ("v_reset", "v_leak"):
                if np.any(np.asarray(getattr(node, name, 0.0)) != 0):
                    raise GraphError(f"node {key!r}: with {self.terms.title}, {name} has to be 0.")
            self.nodes[key] = self._neuron(key, node)

    def _neuron(self, key: str, node: nir.NIRNode) -> nir.NIRNode:
        step = dynamics(key, node, self.timing)
        if np.any(step.gain <= 0):
            raise GraphError(f"node {key!r}: {self.terms.title} takes positive r and w_in only.")
        shape = out_shape(node)
        threshold = np.asarray(node.v_threshold) / step.gain
        if self.peer in ("snntorch", "spikingjelly"):
            for value in (threshold, step.voltage_keep, step.current_keep):
                if not np.allclose(value, np.ravel(value)[0], rtol=1e-12):
                    raise GraphError(f"node {key!r}: {self.terms.title} takes one value for a whole population.")

        def full(value: np.ndarray | float) -> np.ndarray:
            return np.array(np.broadcast_to(np.asarray(value, np.float64), shape))

        dt = self.terms.dt
        fires = {"v_reset": full(0.0)}
        keeps_all = bool(np.all(step.voltage_keep == 1))
        if np.any(step.current_keep > 0) or (self.peer == "norse" and self.timing.reset == "subtract"):
            return self._cuba(key, step, threshold)
        if keeps_all and self.peer != "snntorch":
            made: nir.NIRNode = nir.IF(r=full(reciprocal(dt)), v_threshold=full(threshold), **fires)
        elif self.peer == "sinabs":
            keep = step.voltage_keep
            if np.any(keep <= 0):
                raise GraphError(f"node {key!r}: Sinabs has no membrane that forgets within a step.")
            if len(shape) > 1:
                raise GraphError(f"node {key!r}: Sinabs reads LIF of flat populations only, of images IF.")
            tau, r = -1 / np.log(keep), 1 / (1 - keep)
            made = nir.LIF(tau=full(tau), r=full(r), v_leak=full(0.0), v_threshold=full(threshold), **fires)
        else:
            # with r = 1, as Norse has it, one step adds (1 - keep) of the input
            tau = np.minimum(1 / np.maximum(1 - step.voltage_keep, 1 / NO_LEAK), NO_LEAK)
            r = tau if keeps_all else np.ones(())
            level = threshold if keeps_all else threshold * (1 - step.voltage_keep)
            made = nir.LIF(tau=full(tau * dt), r=full(r), v_leak=full(0.0), v_threshold=full(level), **fires)
        made.metadata = dict(node.metadata or {})
        return made

    def _cuba(self, key: str, step: Dynamics, threshold: np.ndarray) -> nir.NIRNode:
        """w_in = tau_syn / dt and r = tau_mem / dt: the input adds to the current, and the current to the membrane."""
        node = self.nodes[key]
        shape, dt = out_shape(node), self.terms.dt
        tau_syn, tau_mem = (
            1 / np.maximum(1 - np.asarray(keep), 1 / NO_LEAK) for keep in (step.current_keep, step.voltage_keep)
        )
        values = {
            "tau_syn": tau_syn * dt,
            "tau_mem": tau_mem * dt,
            "r": tau_mem,
            "w_in": tau_syn,
            "v_leak": 0.0,
            "v_threshold": threshold,
            "v_reset": 0.0,
        }
        arrays = {
            name: np.array(np.broadcast_to(np.asarray(value, np.float64), shape)) for name, value in values.items()
        }
        return nir.CubaLIF(**arrays, metadata=dict(node.metadata or {}))

    def longer_loops(self) -> None:
        """Put a node that does nothing between a neuron and the matrix through which it hears itself."""
        for source, target in list(self.edges):
            node = self.nodes[source]
            if isinstance(node, NEURONS) and (target, source) in self.edges:
                name = f"{source}.loop"
                shape = np.array(out_shape(node))
                self.nodes[name] = nir.Flatten({"input": shape}, 0, 0)
                self.edges.remove((source, target))
                self.edges += [(source, name), (name, target)]


def _by_depth(title: str, made: _Restated, recurrent: frozenset[tuple[str, str]]) -> list[tuple[str, str]]:
    """The edges such that walking them depth first meets each node after its sources, and the Output last.

    Raises GraphError where no order of edges does: where branches meet again.
    """
    onward = {key for key, node in made.nodes.items() if isinstance(node, nir.Output)}
    grown = True
    while grown:  # all that the Output hears of without a loop
        more = {s for s, t in made.edges if t in onward and (s, t) not in recurrent} - onward
        onward |= more
        grown = bool(more)
    sorted_edges = sorted(made.edges, key=lambda edge: edge[1] in onward)
    followers: dict[str, list[str]] = {}
    for source, target in sorted_edges:
        followers.setdefault(source, []).append(target)
    met: list[str] = []
    waiting = [key for key, node in made.nodes.items() if isinstance(node, nir.Input)][:1]
    while waiting:
        key = waiting.pop()
        if key not in met:
            met.append(key)
            waiting.extend(reversed(followers.get(key, [])))
    for source, target in sorted_edges:
        if (source, target) not in recurrent and met.index(source) > met.index(target):
            raise GraphError(
                f"{title} would run node {target!r} before {source!r}, which it hears: no branches that meet."
            )
    if followers.get(met[-1]):
        raise GraphError(f"{title} would return what node {met[-1]!r} sends instead of the Output.")
    return sorted_edges


def _edge(edge: tuple[str, str]) -> str:
    return f"{edge[0]!r} -> {edge[1]!r}"
