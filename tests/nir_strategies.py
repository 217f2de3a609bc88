"""Random NIR graphs of every node that a chip can do, with loops, nested graphs and parameters of each neuron's own."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import nir
import numpy as np
from hypothesis import strategies as st

Shape = tuple[int, ...]


def nir_graphs() -> st.SearchStrategy[nir.NIRGraph]:
    """Random graphs, shapes unchecked by the NIR package; failures shrink to few stages."""
    return st.builds(random_nir, st.integers(0, 2**32 - 1), st.integers(1, 4))


def random_nir(seed: int, stages: int = 3) -> nir.NIRGraph:
    """Stages of linear nodes and one population, one after another, some with loops, delays and second branches.

    dt is 1e-3 or, half of the time, 1; the graph's metadata records it, with reset and discretization.
    """
    rng = np.random.default_rng(seed)
    made = _Maker(rng, float(rng.choice([1e-3, 1.0])), _pick(rng, ["zero", "subtract"]))
    shape = _pick(rng, [(5,), (2, 6), (2, 5, 4)])
    made.nodes["in"] = nir.Input({"input": np.array(shape)})
    last = "in"
    for _ in range(stages):
        for _ in range(int(rng.integers(1, 4))):
            last, shape = made.linear(last, shape)
        last = made.population(last, shape)
    made.nodes["out"] = nir.Output({"output": np.array(shape)})
    made.edges.append((last, "out"))
    edges = [made.edges[index] for index in rng.permutation(len(made.edges))]
    metadata = {
        "dt": made.dt,
        "reset": made.reset,
        "discretization": _pick(rng, ["euler", "exponential"]),
        "steps": int(rng.integers(1, 9)),
    }
    return nir.NIRGraph(made.nodes, edges, metadata, type_check=False)


def random_events(graph: nir.NIRGraph, seed: int, samples: int = 3) -> dict[str, np.ndarray]:
    """Binary spikes for each Input node, (samples, steps, *shape)."""
    rng = np.random.default_rng(seed)
    frame = (samples, graph.metadata["steps"])
    return {
        key: (rng.random((*frame, *node.input_type["input"])) < 0.4).astype(np.uint8)
        for key, node in graph.nodes.items()
        if isinstance(node, nir.Input)
    }


def _pick(rng: np.random.Generator, choices: list) -> object:  # type: ignore[type-arg]
    return choices[int(rng.integers(len(choices)))]


@dataclass
class _Maker:
    rng: np.random.Generator
    dt: float
    reset: str
    nodes: dict[str, nir.NIRNode] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)

    def add(self, source: str, node: nir.NIRNode) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes[name] = node
        self.edges.append((source, name))
        return name

    def weight(self, *shape: int) -> np.ndarray:
        return self.rng.normal(0.2, 1, shape) * 2 / math.sqrt(math.prod(shape[1:]))

    # ---- linear nodes ----

    def linear(self, source: str, shape: Shape) -> tuple[str, Shape]:
        kinds: list[Callable[[str, Shape], tuple[str, Shape]]] = [self.scale, self.delay, self.branch]
        if len(shape) == 1:
            kinds += [self.matrix, self.matrix]
        else:
            kinds += [self.flatten, self.conv, self.conv]
        if len(shape) == 3 and min(shape[1:]) > 1:
            kinds.append(self.pool)
        return kinds[int(self.rng.integers(len(kinds)))](source, shape)

    def matrix(self, source: str, shape: Shape) -> tuple[str, Shape]:
        rows = int(self.rng.integers(2, 6))
        weight = self.weight(rows, shape[0])
        biased = self.rng.random() < 0.5
        return self.add(source, nir.Affine(weight, self.rng.normal(0, 0.3, rows)) if biased else nir.Linear(weight)), (
            rows,
        )

    def scale(self, source: str, shape: Shape) -> tuple[str, Shape]:
        return self.add(source, nir.Scale(self.rng.uniform(0.5, 2, shape))), shape

    def flatten(self, source: str, shape: Shape) -> tuple[str, Shape]:
        return self.add(source, nir.Flatten({"input": np.array(shape)}, 0, -1)), (math.prod(shape),)

    def delay(self, source: str, shape: Shape) -> tuple[str, Shape]:
        steps = self.rng.integers(0, 4, shape if self.rng.random() < 0.3 else ())
        return self.add(source, nir.Delay(np.broadcast_to(steps * self.dt, shape).copy())), shape

    def branch(self, source: str, shape: Shape) -> tuple[str, Shape]:
        """Two ways to the same sum."""
        first, _ = self.scale(source, shape)
        second, _ = self.delay(source, shape) if self.rng.random() < 0.5 else self.scale(source, shape)
        joined = self.add(first, nir.Scale(np.ones(shape)))
        self.edges.append((second, joined))
        return joined, shape

    def conv(self, source: str, shape: Shape) -> tuple[str, Shape]:
        axes = len(shape) - 1
        groups = int(_pick(self.rng, [each for each in (1, 2) if shape[0] % each == 0]))  # type: ignore[call-overload]
        channels = groups * int(self.rng.integers(1, 3))
        kernel = [int(self.rng.integers(1, min(3, extent) + 1)) for extent in shape[1:]]
        stride, padding, dilation = ([int(self.rng.integers(low, 3)) for _ in range(axes)] for low in (1, 0, 1))
        reach = [gap * (extent - 1) for gap, extent in zip(dilation, kernel, strict=True)]
        padding = [
            max(pad, (far + 2 - extent) // 2) for pad, far, extent in zip(padding, reach, shape[1:], strict=True)
        ]
        out = [
            (extent + 2 * pad - far - 1) // step + 1
            for extent, pad, far, step in zip(shape[1:], padding, reach, stride, strict=True)
        ]
        weight = self.weight(channels, shape[0] // groups, *kernel)
        bias = self.rng.normal(0, 0.2, channels)
        if axes == 1:
            node: nir.NIRNode = nir.Conv1d(shape[1], weight, stride[0], padding[0], dilation[0], groups, bias)
        else:
            node = nir.Conv2d(shape[1:], weight, tuple(stride), tuple(padding), tuple(dilation), groups, bias)
        return self.add(source, node), (channels, *out)

    def pool(self, source: str, shape: Shape) -> tuple[str, Shape]:
        kernel, stride = self.rng.integers(1, 3, 2), self.rng.integers(1, 3, 2)
        padding = self.rng.integers(0, kernel // 2 + 1)
        kind = nir.SumPool2d if self.rng.random() < 0.5 else nir.AvgPool2d
        out = (np.array(shape[1:]) + 2 * padding - kernel) // stride + 1
        return self.add(source, kind(kernel, stride, padding)), (shape[0], *map(int, out))

    # ---- populations ----

    def population(self, source: str, shape: Shape) -> str:
        node = self.neuron(shape)
        if self.rng.random() < 0.3:
            return self.add(source, self.nested(shape, node))
        name = self.add(source, node)
        if self.rng.random() < 0.5:
            self.loop(name, name, shape)
        if self.rng.random() < 0.3:
            second, _ = self.scale(name, shape)
            again = self.add(second, self.neuron(shape))
            self.loop(again, name, shape)
            return again
        return name

    def loop(self, source: str, target: str, shape: Shape) -> None:
        """From a population back to itself or an earlier one, through a linear node or a delay."""
        if len(shape) == 1 and self.rng.random() < 0.6:
            back = self.add(source, nir.Affine(self.weight(*shape, *shape), self.rng.normal(0, 0.2, shape)))
        elif self.rng.random() < 0.3:
            back, _ = self.delay(source, shape)
        else:
            back, _ = self.scale(source, shape)
        self.edges.append((back, target))

    def nested(self, shape: Shape, node: nir.NIRNode) -> nir.NIRGraph:
        """The population in a graph of its own, with its loop."""
        nodes = {
            "input": nir.Input({"input": np.array(shape)}),
            "neurons": node,
            "back": nir.Scale(self.rng.normal(0, 1, shape)),
            "output": nir.Output({"output": np.array(shape)}),
        }
        edges = [("neurons", "back"), ("input", "neurons"), ("back", "neurons"), ("neurons", "output")]
        return nir.NIRGraph(nodes, edges, {}, type_check=False)

    def neuron(self, shape: Shape) -> nir.NIRNode:
        """Every parameter another one for each neuron, or one for all; some r negative."""

        def each(low: float, high: float) -> np.ndarray:
            return self.rng.uniform(low, high, shape) if own else np.full(shape, self.rng.uniform(low, high))

        own = self.rng.random() < 0.5
        rest = each(-0.2, 0.05) if self.reset == "zero" and self.rng.random() < 0.5 else np.zeros(shape)
        fires = {"v_threshold": each(0.1, 0.5), "v_reset": rest}
        sign = -1.0 if self.rng.random() < 0.1 else 1.0
        kind = self.rng.integers(4)
        if kind == 0:
            return nir.Threshold(each(0.1, 0.6))
        if kind == 1:
            return nir.IF(r=sign * each(0.5, 2) / self.dt, **fires)
        if kind == 2:
            return nir.LIF(tau=self.dt * each(1, 8), r=sign * each(1, 3), v_leak=each(-0.1, 0.1), **fires)
        constants = {"tau_syn": self.dt * each(1, 5), "tau_mem": self.dt * each(1, 8), "v_leak": each(-0.1, 0.1)}
        return nir.CubaLIF(**constants, r=sign * each(1, 3), w_in=each(0.5, 2), **fires)
