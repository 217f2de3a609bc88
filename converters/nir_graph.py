"""A NIR graph made plain: nested graphs inlined, shapes inferred, parameters filled in, every fault named.

The NIR package checks types where it can infer them, stops at nested graphs and believes what a node says of itself.
Here every node's shape follows from what arrives at it, and what the node or the file says of it must agree.
"""

import copy
import heapq
import math
from collections import deque
from typing import Any

import nir
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from spikeport.converters.operators import Shape
from spikeport.models.errors import GraphError

SPIKING = (nir.CubaLIF, nir.LIF, nir.IF)
INTEGRATORS = (nir.CubaLI, nir.LI, nir.I)
NEURONS = (*SPIKING, *INTEGRATORS)
POPULATIONS = (*NEURONS, nir.Threshold)
"""What closes a loop: it may hear from the step before what it sends in this one."""
CONVOLUTIONS = (nir.Conv1d, nir.Conv2d)
POOLS = (nir.SumPool2d, nir.AvgPool2d)

PARAMETERS: dict[type[nir.NIRNode], tuple[str, ...]] = {
    nir.CubaLIF: ("tau_syn", "tau_mem", "r", "v_leak", "v_threshold", "v_reset", "w_in"),
    nir.LIF: ("tau", "r", "v_leak", "v_threshold", "v_reset"),
    nir.IF: ("r", "v_threshold", "v_reset"),
    nir.CubaLI: ("tau_syn", "tau_mem", "r", "v_leak", "w_in"),
    nir.LI: ("tau", "r", "v_leak"),
    nir.I: ("r",),
    nir.Threshold: ("threshold",),
    nir.Delay: ("delay",),
    nir.Scale: ("scale",),
}
"""The parameters of nodes that work on each element by itself, one value for all or one for each."""

TIME_CONSTANTS = ("tau", "tau_mem", "tau_syn")
INHERITED = ("dt", "reset", "discretization")
"""What the metadata of a graph says of all of its neurons."""

LARGEST_NODE = 1 << 27
"""Elements that one node may send."""

LARGEST_COUNT = {"nodes": 1 << 14, "edges": 1 << 17}
"""Of a whole graph, everything nested in it included."""


def plain(graph: nir.NIRGraph, origin: str) -> nir.NIRGraph:
    """The same network as one flat graph; the graph that is given stays as it is.

    A node `b` of a nested graph `a` becomes `a.b`. Every node carries its input and output type. Parameters of neurons,
    Threshold and Delay are float64 of the shape that arrives; a convolution's and a pooling's geometry is a tuple of
    ints ('same' stays text). What the metadata of a graph says of dt, reset and discretization holds for each of its
    neurons that does not say otherwise.

    Raises GraphError naming the node or edge that is wrong; `origin` names the graph.
    """
    flat = _Flat(origin)
    flat.add(graph, "", {})
    flat.splice_ports()
    _check_edges(flat)
    nodes = {key: copy.copy(node) for key, node in flat.nodes.items()}
    for key, node in nodes.items():
        _check_values(origin, key, node)
    _infer_shapes(origin, nodes, flat.successors)
    metadata = graph.metadata if isinstance(graph.metadata, dict) else {}
    return nir.NIRGraph(nodes, list(flat.edges), dict(metadata), type_check=False)


def out_shape(node: nir.NIRNode) -> Shape:
    """Shape of what leaves a node of a plain graph."""
    return tuple(int(extent) for extent in node.output_type["output"])


class _Flat:
    """Nodes and edges of a graph and of all graphs in it."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.nodes: dict[str, nir.NIRNode] = {}
        self.edges: dict[tuple[str, str], None] = {}
        self.successors: dict[str, dict[str, None]] = {}
        self.predecessors: dict[str, dict[str, None]] = {}
        self.ports: list[str] = []
        """Input and Output nodes of nested graphs, through which edges pass."""

    def add(self, graph: nir.NIRGraph, prefix: str, inherited: dict[str, Any]) -> None:
        own = graph.metadata if isinstance(graph.metadata, dict) else {}
        inherited = inherited | {key: own[key] for key in INHERITED if key in own}
        ends: dict[str, tuple[str, str]] = {}
        for key, node in graph.nodes.items():
            name = prefix + key
            if isinstance(node, nir.NIRGraph):
                self.add(node, name + ".", inherited)
                ends[key] = self._ports_of(node, name)
                continue
            if name in self.nodes:
                raise GraphError(f"{self.origin} has two nodes named {name!r}, one of them in a nested graph.")
            if isinstance(node, NEURONS) and inherited:
                node = copy.copy(node)
                node.metadata = inherited | (node.metadata or {})
            self.nodes[name] = node
            self.successors[name], self.predecessors[name] = {}, {}
            ends[key] = (name, name)
            if prefix and isinstance(node, (nir.Input, nir.Output)):
                self.ports.append(name)
        self._check_count("nodes", len(self.nodes))
        for edge in graph.edges:
            for end in edge:
                if end not in ends:
                    raise GraphError(
                        f"{self.origin}: edge {prefix}{edge[0]} -> {prefix}{edge[1]} refers to {prefix + str(end)!r}, "
                        "which is not a node."
                    )
            self._connect(ends[edge[0]][1], ends[edge[1]][0])

    def _ports_of(self, graph: nir.NIRGraph, name: str) -> tuple[str, str]:
        """Where edges enter and leave a nested graph."""
        ports = []
        for kind in (nir.Input, nir.Output):
            found = [key for key, node in graph.nodes.items() if isinstance(node, kind)]
            if len(found) != 1:
                raise GraphError(
                    f"{self.origin}: the nested graph {name!r} has {len(found)} {kind.__name__} nodes; an edge names "
                    "only the graph, so it needs one."
                )
            ports.append(f"{name}.{found[0]}")
        return ports[0], ports[1]

    def _connect(self, source: str, target: str) -> None:
        if target in self.successors[source]:
            raise GraphError(f"{self.origin}: edge {source} -> {target} is there twice.")
        self.edges[source, target] = self.successors[source][target] = self.predecessors[target][source] = None

    def splice_ports(self) -> None:
        """Join what enters and leaves each port of a nested graph."""
        for port in self.ports:
            before, after = self.predecessors.pop(port), self.successors.pop(port)
            if port in after:
                raise GraphError(f"{self.origin}: the graph has a cycle without a neuron in it, through {port!r}.")
            for side, found in (("input", before), ("output", after)):
                if not found:
                    raise GraphError(f"{self.origin}: nothing is connected to the {side} of node {port!r}.")
            del self.nodes[port]
            for source in before:
                del self.successors[source][port], self.edges[source, port]
            for target in after:
                del self.predecessors[target][port], self.edges[port, target]
            self._check_count("edges", len(self.edges) + len(before) * len(after))
            for source in before:
                for target in after:
                    self._connect(source, target)

    def _check_count(self, what: str, count: int) -> None:
        if count > LARGEST_COUNT[what]:
            raise GraphError(f"{self.origin} has more than {LARGEST_COUNT[what]} {what}.")


def _check_edges(flat: _Flat) -> None:
    for kind in (nir.Input, nir.Output):
        if not any(isinstance(node, kind) for node in flat.nodes.values()):
            raise GraphError(f"{flat.origin} has no {kind.__name__} node.")
    sides = (("the input", flat.predecessors, nir.Input), ("the output", flat.successors, nir.Output))
    for side, joined, end in sides:
        for key, node in flat.nodes.items():
            if bool(joined[key]) == isinstance(node, end):
                what = "something" if isinstance(node, end) else "nothing"
                raise GraphError(
                    f"{flat.origin}: {what} is connected to {side} of node {key!r} ({type(node).__name__})."
                )


def _check_values(origin: str, key: str, node: nir.NIRNode) -> None:
    for name, value in vars(node).items():
        if name in ("input_type", "output_type", "metadata"):
            continue
        array = np.asarray(value) if isinstance(value, (np.ndarray, np.generic, int, float)) else None
        if array is None:
            if name in ("weight", "bias", *(each for names in PARAMETERS.values() for each in names)):
                raise GraphError(f"{origin}: {name} of node {key!r} is no array of numbers.")
            continue
        if array.dtype.kind not in "biuf":
            raise GraphError(f"{origin}: {name} of node {key!r} holds {array.dtype}, not real numbers.")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise GraphError(f"{origin}: {name} of node {key!r} holds NaN or infinity.")
        if name in TIME_CONSTANTS and array.size and float(array.min()) <= 0:
            raise GraphError(f"{origin}: {name} = {float(array.min()):g} s of node {key!r} is not positive.")
        if name == "delay" and array.size and float(array.min()) < 0:
            raise GraphError(f"{origin}: delay = {float(array.min()):g} s of node {key!r} is negative.")


def _infer_shapes(origin: str, nodes: dict[str, nir.NIRNode], successors: dict[str, dict[str, None]]) -> None:
    sent: dict[str, Shape] = {}
    waiting: deque[str] = deque()

    def settle(key: str, arriving: Shape) -> None:
        node = nodes[key]
        try:
            sent[key] = _settled(node, arriving)
        except GraphError as error:
            raise GraphError(f"{origin}: node {key!r} ({type(node).__name__}): {error}") from None
        if math.prod(sent[key]) > LARGEST_NODE:
            raise GraphError(
                f"{origin}: node {key!r} ({type(node).__name__}) sends {sent[key]}, more than {LARGEST_NODE} values."
            )
        entering = sent[key] if isinstance(node, nir.Input) else arriving
        node.input_type, node.output_type = {"input": np.array(entering)}, {"output": np.array(sent[key])}
        waiting.append(key)

    for key, node in nodes.items():
        if isinstance(node, nir.Input):
            settle(key, ())
    while waiting:
        source = waiting.popleft()
        for target in successors[source]:
            if target not in sent:
                settle(target, sent[source])
    for key in nodes:
        if key not in sent:
            raise GraphError(f"{origin}: no input reaches node {key!r}.")
    arriving: dict[str, set[Shape]] = {key: set() for key in nodes}
    for source, targets in successors.items():
        for target in targets:
            arriving[target].add(sent[source])
    for key, shapes in arriving.items():
        if len(shapes) > 1:
            raise GraphError(f"{origin}: node {key!r} receives different shapes: {sorted(shapes)}.")


def _declared(types: dict[str, Any] | None, end: str) -> Shape | None:
    """The shape that a node says of itself, None where it says nothing."""
    value = types.get(end) if types else None
    if value is None:
        return None
    try:
        shape = np.atleast_1d(np.asarray(value))
        if shape.ndim != 1 or shape.dtype.kind not in "iu" or not 1 <= shape.size <= 8 or (shape < 1).any():
            raise ValueError
    except (TypeError, ValueError):
        raise GraphError(f"it declares {str(value)[:60]}, which is no shape.") from None
    return tuple(int(extent) for extent in shape)


def _settled(node: nir.NIRNode, arriving: Shape) -> Shape:
    """Fit a node to the shape that arrives, and say what leaves it."""
    match node:
        case nir.Input():
            declared = _declared(node.input_type, "input")
            if declared is None:
                raise GraphError("it declares no shape.")
            return declared
        case nir.Output():
            _check_declared(_declared(node.output_type, "output"), arriving)
            return arriving
        case nir.Linear() | nir.Affine():
            return _matrix(node, arriving)
        case nir.Conv1d() | nir.Conv2d():
            return _convolution(node, arriving)
        case nir.SumPool2d() | nir.AvgPool2d():
            return _pooling(node, arriving)
        case nir.Flatten():
            return _flattened(node, arriving)
    if type(node) not in PARAMETERS:
        raise GraphError("its type is not one of NIR's.")
    for name in PARAMETERS[type(node)]:
        value = np.asarray(getattr(node, name), dtype=np.float64)
        if isinstance(node, nir.Scale) and value.shape == arriving[:1] and len(arriving) == 3:
            value = value[:, None, None]  # one factor a channel
        try:
            setattr(node, name, np.broadcast_to(value, arriving))
        except ValueError:
            raise GraphError(f"{name} is of shape {value.shape}, but {arriving} arrives.") from None
    return arriving


def _check_declared(declared: Shape | None, arriving: Shape) -> None:
    if declared is not None and declared != arriving:
        raise GraphError(f"it declares the shape {declared}, but {arriving} arrives.")


def _matrix(node: nir.Linear | nir.Affine, arriving: Shape) -> Shape:
    weight = np.asarray(node.weight)
    if weight.ndim != 2:
        raise GraphError(f"its weight has {weight.ndim} dimensions; a matrix has 2.")
    rows, columns = weight.shape
    if arriving[-1] != columns:
        raise GraphError(f"its weight has {columns} columns, but {arriving} arrives.")
    if isinstance(node, nir.Affine):
        node.bias = _bias(node.bias, rows)
    return (*arriving[:-1], rows)


def _bias(value: Any, count: int) -> np.ndarray:
    bias = np.asarray(value)
    if bias.size not in (1, count) or bias.ndim > 1:
        raise GraphError(f"its bias is of shape {bias.shape} for {count} outputs.")
    return np.broadcast_to(bias.reshape(-1), (count,))


def _convolution(node: nir.Conv1d | nir.Conv2d, arriving: Shape) -> Shape:
    axes = 1 if isinstance(node, nir.Conv1d) else 2
    weight = np.asarray(node.weight)
    if weight.ndim != axes + 2 or min(weight.shape) < 1:
        raise GraphError(f"its weight is of shape {weight.shape}; it needs {axes + 2} dimensions.")
    if len(arriving) != axes + 1:
        raise GraphError(f"it works on {axes + 1} dimensions, but {arriving} arrives.")
    node.stride = _integers("stride", node.stride, axes, 1)
    node.dilation = _integers("dilation", node.dilation, axes, 1)
    (node.groups,) = _integers("groups", node.groups, 1, 1)
    if arriving[0] != weight.shape[1] * node.groups or weight.shape[0] % node.groups:
        raise GraphError(
            f"its weight of shape {weight.shape} with {node.groups} groups does not fit {arriving[0]} channels."
        )
    reach = [gap * (extent - 1) for gap, extent in zip(node.dilation, weight.shape[2:], strict=True)]
    padding = node.padding.decode() if isinstance(node.padding, bytes | np.bytes_) else node.padding
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise GraphError(f"padding is {padding[:20]!r}; as text it is 'same' or 'valid'.")
        if padding == "same" and node.stride != (1,) * axes:
            raise GraphError("padding 'same' needs stride 1.")
        node.padding = (
            "same"
            if padding == "same" and any(extent % 2 for extent in reach)
            else tuple(extent // 2 if padding == "same" else 0 for extent in reach)
        )
    else:
        node.padding = _integers("padding", padding, axes, 0)
    node.bias = _bias(np.zeros(1, weight.dtype) if node.bias is None else node.bias, weight.shape[0])
    if node.input_shape is not None:
        _check_declared((arriving[0], *_integers("input_shape", node.input_shape, axes, 1)), arriving)
    node.input_shape = arriving[1] if axes == 1 else arriving[1:]
    if node.padding == "same":
        return (weight.shape[0], *arriving[1:])
    wide = [extent + 2 * pad for extent, pad in zip(arriving[1:], node.padding, strict=True)]
    out = tuple((extent - far - 1) // step + 1 for extent, far, step in zip(wide, reach, node.stride, strict=True))
    if min(out) < 1:
        raise GraphError(f"its kernel {weight.shape[2:]} is larger than what arrives, {arriving[1:]}.")
    return (weight.shape[0], *out)


def _pooling(node: nir.SumPool2d | nir.AvgPool2d, arriving: Shape) -> Shape:
    if len(arriving) != 3:
        raise GraphError(f"it pools images, but {arriving} arrives.")
    node.kernel_size = _integers("kernel_size", node.kernel_size, 2, 1)
    node.stride = _integers("stride", node.stride, 2, 1)
    node.padding = _integers("padding", node.padding, 2, 0)
    if any(2 * pad > extent for pad, extent in zip(node.padding, node.kernel_size, strict=True)):
        raise GraphError(f"its padding {node.padding} is more than half of its kernel {node.kernel_size}.")
    sides = zip(arriving[1:], node.padding, node.kernel_size, node.stride, strict=True)
    rows, columns = ((extent + 2 * pad - kernel) // step + 1 for extent, pad, kernel, step in sides)
    if min(rows, columns) < 1:
        raise GraphError(f"its kernel {node.kernel_size} is larger than what arrives, {arriving[1:]}.")
    return (arriving[0], rows, columns)


def _flattened(node: nir.Flatten, arriving: Shape) -> Shape:
    node.start_dim, node.end_dim = (
        _integers(name, getattr(node, name), 1, -len(arriving))[0] for name in ("start_dim", "end_dim")
    )
    _check_declared(_declared(node.input_type, "input"), arriving)
    start, end = (place % len(arriving) if place < 0 else place for place in (node.start_dim, node.end_dim))
    if not start <= end < len(arriving):
        raise GraphError(f"flattening dimensions {node.start_dim}..{node.end_dim} of shape {arriving} is not possible.")
    return (*arriving[:start], math.prod(arriving[start : end + 1]), *arriving[end + 1 :])


def _integers(name: str, value: Any, count: int, least: int) -> tuple[int, ...]:
    """One integer an axis; a single one holds for all."""
    array = np.atleast_1d(np.asarray(value))
    if array.dtype.kind not in "iu" or array.shape not in ((1,), (count,)) or int(array.min()) < least:
        raise GraphError(f"{name} = {str(value)[:40]}; it takes {count} whole numbers of at least {least}.")
    whole = tuple(int(entry) for entry in array)
    return whole if len(whole) == count else whole * count


def schedule(graph: nir.NIRGraph, holding: frozenset[str]) -> tuple[list[str], frozenset[tuple[str, str]]]:
    """In which order the nodes of a plain graph are worked off within a step, and which edges are recurrent.

    A recurrent edge carries what its source sent a step before; all others carry what it sends in the same step. In
    every loop the neuron nearest to an input comes first, and what enters it from the loop is recurrent. `holding`
    names the nodes that need nothing of the step itself (a Delay of a step or more): they close no loop.

    Raises GraphError where a loop has no neuron in it.
    """
    wiring_order(graph)
    names = list(graph.nodes)
    place = {key: index for index, key in enumerate(names)}
    edges = {edge for edge in graph.edges if edge[1] not in holding}
    distance = _distance(graph)
    recurrent: set[tuple[str, str]] = set()
    while loops := _loops(names, place, edges):
        for loop in loops:
            neurons = (key for key in loop if isinstance(graph.nodes[key], POPULATIONS))
            first = min(neurons, key=lambda key: (distance[key], place[key]))
            recurrent |= {edge for edge in edges if edge[1] == first and edge[0] in loop}
        edges -= recurrent
    return _sorted(names, edges), frozenset(recurrent)


def wiring_order(graph: nir.NIRGraph) -> list[str]:
    """The nodes of a plain graph, each after all that reach it through nodes without a state of their own.

    Raises GraphError where a loop has no neuron in it: its output would have to be known before it is computed.
    """
    names = list(graph.nodes)
    edges = {edge for edge in graph.edges if not isinstance(graph.nodes[edge[0]], POPULATIONS)}
    order = _sorted(names, edges)
    if len(order) < len(names):
        place = {key: index for index, key in enumerate(names)}
        raise GraphError(
            f"the graph has a cycle without a neuron in it: {_drawn(_loops(names, place, edges)[0], edges)}."
        )
    return order


def _sorted(names: list[str], edges: set[tuple[str, str]]) -> list[str]:
    """Each node after its sources, else in the order of `names`; what lies in or behind a loop is left out."""
    place = {key: index for index, key in enumerate(names)}
    waiting = dict.fromkeys(names, 0)
    followers: dict[str, list[str]] = {key: [] for key in names}
    for source, target in edges:
        waiting[target] += 1
        followers[source].append(target)
    ready = [place[key] for key in names if not waiting[key]]
    heapq.heapify(ready)
    order: list[str] = []
    while ready:
        key = names[heapq.heappop(ready)]
        order.append(key)
        for target in followers[key]:
            waiting[target] -= 1
            if not waiting[target]:
                heapq.heappush(ready, place[target])
    return order


def _loops(names: list[str], place: dict[str, int], edges: set[tuple[str, str]]) -> list[dict[str, None]]:
    """The sets of nodes that reach each other."""
    rows, columns = ([place[edge[end]] for edge in edges] for end in (0, 1))
    matrix = csr_array((np.ones(len(edges)), (rows, columns)), shape=(len(names), len(names)))
    label = connected_components(matrix, directed=True, connection="strong")[1]
    members: dict[int, dict[str, None]] = {}
    for key, group in zip(names, label.tolist(), strict=True):
        members.setdefault(group, {})[key] = None
    return [loop for loop in members.values() if len(loop) > 1 or (next(iter(loop)),) * 2 in edges]


def _distance(graph: nir.NIRGraph) -> dict[str, int]:
    """Edges on the shortest way from an input, by node."""
    followers: dict[str, list[str]] = {key: [] for key in graph.nodes}
    for source, target in graph.edges:
        followers[source].append(target)
    distance = {key: 0 for key, node in graph.nodes.items() if isinstance(node, nir.Input)}
    waiting = deque(distance)
    while waiting:
        key = waiting.popleft()
        for target in followers[key]:
            if target not in distance:
                distance[target] = distance[key] + 1
                waiting.append(target)
    return distance


def _drawn(loop: dict[str, None], edges: set[tuple[str, str]]) -> str:
    """One way around, as text."""
    inside: dict[str, str] = {}
    for source, target in sorted(edges):
        if source in loop and target in loop:
            inside.setdefault(source, target)
    way = [next(iter(loop))]
    while way.count(way[-1]) < 2:
        way.append(inside[way[-1]])
    return " -> ".join(way[way.index(way[-1]) :])
