"""Lowering NIR to a process graph: the same spikes as the NIR equations, stepped node by node; faults named.

`simulate` below is the reference: it walks the NIR graph as it stands, one node at a time, in float64, and knows
nothing of linear paths, normalised thresholds, stages or constant sources.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import nir
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph_strategies import one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeport.converters.graph import FloatNeuron, Population, ProcessGraph
from spikeport.converters.lower import lower
from spikeport.converters.reference import Reference
from spikeport.models.errors import GraphError

SEEDS = st.integers(0, 2**32 - 1)
SPIKING = (nir.CubaLIF, nir.LIF, nir.IF)
INTEGRATORS = (nir.CubaLI, nir.LI, nir.I)
STEPS = 12
Edges = list[tuple[str, str]]


# ---- the reference --------------------------------------------------------------------------------------------------


@dataclass
class History:
    """By spiking node: spikes and membranes of each step, (steps, samples, *shape)."""

    spikes: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    membrane: dict[str, list[torch.Tensor]] = field(default_factory=dict)


def simulate(
    graph: nir.NIRGraph,
    inputs: dict[str, np.ndarray],
    dt: float,
    reset: str,
    order: list[str],
    late: frozenset[tuple[str, str]] = frozenset(),
) -> History:
    """Step the NIR equations by Euler's method.

    Args:
        inputs: (samples, steps, *shape) by Input node.
        order: the spiking nodes in the order in which they are worked off within a step.
        late: (spiking source, spiking target) pairs whose spikes arrive one step later: what a loop needs.
    """
    samples, steps = next(iter(inputs.values())).shape[:2]
    history = History({key: [] for key in order}, {key: [] for key in order})
    state: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def value(key: str, t: int, target: str) -> torch.Tensor:
        """What leaves a node at step t, as the spiking node `target` sees it."""
        node = graph.nodes[key]
        if isinstance(node, nir.Input):
            return torch.as_tensor(inputs[key][:, t], dtype=torch.float64)
        if isinstance(node, SPIKING):
            when = t - 1 if (key, target) in late else t
            shape = (samples, *np.asarray(node.v_threshold).shape)
            return history.spikes[key][when] if when >= 0 else torch.zeros(shape, dtype=torch.float64)
        return linear(node, arriving(key, t, target))

    def arriving(key: str, t: int, target: str) -> torch.Tensor:
        parts = [value(source, t, target) for source, end in graph.edges if end == key]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    for t in range(steps):
        for key in order:
            node = graph.nodes[key]
            x = arriving(key, t, key)
            rest = torch.zeros_like(x)
            current, membrane = state.get(key, (rest, rest))
            r = tensor(node.r)
            threshold = tensor(np.inf if isinstance(node, INTEGRATORS) else node.v_threshold)
            if isinstance(node, (nir.CubaLIF, nir.CubaLI)):
                current = current + dt / tensor(node.tau_syn) * (-current + tensor(node.w_in) * x)
                drive = tensor(node.v_leak) - membrane + r * current
                membrane = membrane + dt / tensor(node.tau_mem) * drive
            elif isinstance(node, (nir.LIF, nir.LI)):
                membrane = membrane + dt / tensor(node.tau) * (tensor(node.v_leak) - membrane + r * x)
            else:
                membrane = membrane + dt * r * x
            spikes = (membrane > threshold).to(torch.float64)
            if not isinstance(node, INTEGRATORS):
                membrane = membrane * (1 - spikes) if reset == "zero" else membrane - threshold * spikes
            state[key] = current, membrane
            history.spikes[key].append(spikes)
            history.membrane[key].append(membrane)
    return history


def tensor(value: object) -> torch.Tensor:
    return torch.as_tensor(np.asarray(value), dtype=torch.float64)


def linear(node: nir.NIRNode, x: torch.Tensor) -> torch.Tensor:
    """One linear node by itself."""
    match node:
        case nir.Affine():
            return x @ tensor(node.weight).T + tensor(node.bias)
        case nir.Linear():
            return x @ tensor(node.weight).T
        case nir.Scale():
            return x * tensor(node.scale)
        case nir.Flatten():
            return x.flatten(1 + node.start_dim, 1 + node.end_dim if node.end_dim >= 0 else -1)
        case nir.Conv2d():
            geometry = (node.stride, node.padding, node.dilation)
            return F.conv2d(x, tensor(node.weight), tensor(node.bias), *geometry, node.groups)
        case nir.SumPool2d():
            return F.avg_pool2d(x, tuple(node.kernel_size), tuple(node.stride), divisor_override=1)
        case nir.AvgPool2d():
            return F.avg_pool2d(x, tuple(node.kernel_size), tuple(node.stride))
    raise NotImplementedError(type(node))


# ---- random parts ---------------------------------------------------------------------------------------------------


@dataclass
class Maker:
    """Random NIR nodes on one time step."""

    rng: np.random.Generator
    dt: float

    def cuba(self, *shape: int) -> nir.CubaLIF:
        """Every parameter another one for each neuron; a drive of about 1 makes it fire."""
        return nir.CubaLIF(
            tau_syn=self.dt * self.rng.uniform(1, 5, shape),
            tau_mem=self.dt * self.rng.uniform(1, 8, shape),
            r=self.rng.uniform(1, 3, shape),
            v_leak=self.rng.uniform(-0.1, 0.1, shape),
            v_threshold=self.rng.uniform(0.1, 0.5, shape),
            w_in=self.rng.uniform(0.5, 2, shape),
        )

    def lif(self, *shape: int) -> nir.LIF:
        return nir.LIF(
            tau=self.dt * self.rng.uniform(1, 8, shape),
            r=self.rng.uniform(1, 3, shape),
            v_leak=self.rng.uniform(-0.1, 0.1, shape),
            v_threshold=self.rng.uniform(0.1, 0.5, shape),
        )

    def integrator(self, *shape: int) -> nir.IF:
        r = self.rng.uniform(0.5, 2, shape) / self.dt
        return nir.IF(r=r, v_threshold=self.rng.uniform(0.5, 3, shape))

    def neuron(self, *shape: int) -> nir.NIRNode:
        kinds: list[Callable[..., nir.NIRNode]] = [self.cuba, self.lif, self.integrator]
        return kinds[int(self.rng.integers(3))](*shape)

    def membrane(self, kind: type, *shape: int) -> nir.NIRNode:
        """An integrator that only its membrane can be read of."""
        spiking = {nir.CubaLI: self.cuba, nir.LI: self.lif, nir.I: self.integrator}[kind](*shape)
        fields = ("tau_syn", "tau_mem", "tau", "r", "v_leak", "w_in")
        return kind(**{key: value for key, value in vars(spiking).items() if key in fields})

    def weight(self, *shape: int) -> np.ndarray:
        return self.rng.normal(0.2, 1, shape) / np.sqrt(np.prod(shape[1:])) * 2

    def linear(self, n_out: int, n_in: int) -> nir.Linear:
        return nir.Linear(weight=self.weight(n_out, n_in))

    def affine(self, n_out: int, n_in: int) -> nir.Affine:
        return nir.Affine(weight=self.weight(n_out, n_in), bias=self.rng.normal(0, 0.3, n_out))

    def conv(self, out: int, channels: int, side: int, **geometry: object) -> nir.Conv2d:
        settings_ = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1} | geometry
        weight = self.weight(out, channels // int(str(settings_["groups"])), side, side)
        return nir.Conv2d(None, weight, bias=self.rng.normal(0, 0.2, out), **settings_)


def build(nodes: dict[str, nir.NIRNode], edges: Edges, **metadata: object) -> nir.NIRGraph:
    return nir.NIRGraph(nodes=nodes, edges=edges, metadata={"steps": STEPS} | metadata)


def line(*names: str) -> Edges:
    """Edges from each name to the next."""
    return list(itertools.pairwise(names))


def source(*shape: int) -> nir.Input:
    return nir.Input(np.array(shape))


def sink(*shape: int) -> nir.Output:
    return nir.Output(np.array(shape))


def pooling(kind: type, kernel: tuple[int, int], stride: tuple[int, int]) -> nir.NIRNode:
    return kind(kernel_size=np.array(kernel), stride=np.array(stride), padding=np.array([0, 0]))


@dataclass
class Case:
    """A network, its inputs' shapes, its spiking nodes in order, and its loops."""

    graph: nir.NIRGraph
    inputs: dict[str, tuple[int, ...]]
    order: list[str]
    late: frozenset[tuple[str, str]] = frozenset()


def convolutional(make: Maker) -> Case:
    """Scaled input, strided and grouped convolutions with biases, both poolings, a matrix with a bias, all neurons."""
    nodes = {
        "in": source(2, 9, 8),
        "scale": nir.Scale(scale=make.rng.uniform(0.5, 2, (2, 9, 8))),
        "conv1": make.conv(4, 2, 3, stride=(2, 1), padding=(1, 0)),
        "a": make.cuba(4, 5, 6),
        "sum": pooling(nir.SumPool2d, (2, 2), (2, 2)),
        "conv2": make.conv(6, 4, 2, groups=2),
        "average": pooling(nir.AvgPool2d, (1, 2), (1, 1)),
        "b": make.lif(6, 1, 1),
        "flat": nir.Flatten(input_type={"input": np.array([6, 1, 1])}, start_dim=0, end_dim=-1),
        "affine": make.affine(5, 6),
        "c": make.neuron(5),
        "matrix": make.linear(3, 5),
        "d": make.integrator(3),
        "out": sink(3),
    }
    return Case(build(nodes, line(*nodes)), {"in": (2, 9, 8)}, ["a", "b", "c", "d"])


def normalised_input(make: Maker) -> Case:
    """What input normalisation becomes: an affine map, then a zero-padded convolution, so that the bias is a map."""
    nodes = {
        "in": source(2, 5, 6),
        "normal": make.conv(2, 2, 1, groups=2),
        "conv": make.conv(3, 2, 3, padding=(1, 1)),
        "a": make.lif(3, 5, 6) if make.rng.random() < 0.5 else make.cuba(3, 5, 6),
        "out": sink(3, 5, 6),
    }
    return Case(build(nodes, line(*nodes)), {"in": (2, 5, 6)}, ["a"])


def branches(make: Maker) -> Case:
    """Two branches of different depth meet, one of them through two neurons more; two inputs."""
    nodes = {
        "in": source(6),
        "side": source(4),
        "w1": make.affine(5, 6),
        "a": make.neuron(5),
        "w2": make.linear(5, 5),
        "b": make.neuron(5),
        "w3": make.affine(5, 5),
        "c": make.neuron(5),
        "short": make.affine(5, 5),
        "far": make.linear(5, 4),
        "w4": make.linear(5, 5),
        "d": make.neuron(5),
        "out": sink(5),
    }
    edges = line("in", "w1", "a", "w2", "b", "w3", "c", "w4", "d", "out")
    edges += line("a", "short", "d") + line("side", "far", "d")
    return Case(build(nodes, edges), {"in": (6,), "side": (4,)}, ["a", "b", "c", "d"])


def residual(make: Maker) -> Case:
    """Spikes of two populations added before one shared convolution with a bias, and an identity shortcut."""
    conv = make.conv(2, 2, 3, padding=(1, 1))
    nodes = {
        "in": source(2, 4, 5),
        "first": make.conv(2, 2, 3, padding=(1, 1)),
        "a": make.cuba(2, 4, 5),
        "second": make.conv(2, 2, 3, padding=(1, 1)),
        "b": make.lif(2, 4, 5),
        "shared": conv,
        "c": make.cuba(2, 4, 5),
        "out": sink(2, 4, 5),
    }
    edges = line("in", "first", "a", "second", "b", "shared", "c", "out") + line("a", "shared") + line("a", "c")
    return Case(build(nodes, edges), {"in": (2, 4, 5)}, ["a", "b", "c"])


def diamond(make: Maker) -> Case:
    """Two linear paths from one population to another, with biases on both: each bias counts once."""
    nodes = {
        "in": source(4),
        "w0": make.affine(4, 4),
        "a": make.lif(4),
        "stem": make.affine(4, 4),
        "left": make.affine(3, 4),
        "right": make.affine(3, 4),
        "b": make.cuba(3) if make.rng.random() < 0.5 else make.lif(3),
        "out": sink(3),
    }
    edges = line("in", "w0", "a", "stem", "left", "b", "out") + line("stem", "right", "b")
    return Case(build(nodes, edges), {"in": (4,)}, ["a", "b"])


def recurrent(make: Maker) -> Case:
    """The published hard case: CubaLIF with a recurrent map and biases on both, then a readout population."""
    nodes = {
        "in": source(6),
        "w1": make.affine(7, 6),
        "a": make.cuba(7),
        "loop": make.affine(7, 7),
        "w2": make.affine(3, 7),
        "b": make.cuba(3),
        "out": sink(3),
    }
    edges = line("in", "w1", "a", "w2", "b", "out") + line("a", "loop", "a")
    return Case(build(nodes, edges), {"in": (6,)}, ["a", "b"], frozenset({("a", "a")}))


def mutual(make: Maker) -> Case:
    """Two populations feed each other; the one nearer to the input goes first, what comes back is a step late."""
    nodes = {
        "b": make.lif(4),
        "in": source(5),
        "w1": make.linear(4, 5),
        "back": make.linear(4, 4),
        "a": make.cuba(4),
        "w2": make.affine(4, 4),
        "out": sink(4),
    }
    edges = line("in", "w1", "a", "w2", "b", "out") + line("b", "back", "a")
    return Case(build(nodes, edges), {"in": (5,)}, ["a", "b"], frozenset({("b", "a")}))


CASES = [convolutional, normalised_input, branches, residual, diamond, recurrent, mutual]


def events(case: Case, rng: np.random.Generator, samples: int = 3) -> dict[str, np.ndarray]:
    return {name: (rng.random((samples, STEPS, *shape)) < 0.5).astype(np.uint8) for name, shape in case.inputs.items()}


def gain(node: nir.NIRNode, dt: float) -> np.ndarray:
    """What one unit of weighted input adds to the membrane in a step: the unit in which the lowered graph counts."""
    if isinstance(node, nir.IF):
        return dt * node.r
    if isinstance(node, nir.LIF):
        return dt / node.tau * node.r
    return dt / node.tau_syn * node.w_in * dt / node.tau_mem * node.r


@pytest.mark.parametrize("reset", ["zero", "subtract"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@given(SEEDS, st.sampled_from([1.0, 1e-3, 1e-4]))
@settings(max_examples=8)
def test_the_lowered_graph_fires_as_the_equations_do(
    case: Callable[[Maker], Case], reset: str, seed: int, dt: float
) -> None:
    rng = np.random.default_rng(seed)
    made = case(Maker(rng, dt))
    inputs = events(made, rng)
    expected = simulate(made.graph, inputs, dt, reset, made.order, made.late)
    graph = lower(made.graph, "network", dt=dt, reset=reset)  # type: ignore[arg-type]
    run = Reference(graph).run(inputs, record=True)
    assert [population.name for population in graph.populations] == made.order
    for name in made.order:
        spikes = torch.stack(expected.spikes[name], 1)
        assert torch.equal(run.spikes[name].to(torch.float64), spikes), name
        unit = torch.as_tensor(gain(made.graph.nodes[name], dt))
        membrane = torch.stack(expected.membrane[name], 1)
        torch.testing.assert_close(run.v[name] * unit, membrane, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_networks_above_fire_in_every_population(case: Callable[[Maker], Case]) -> None:
    """Neither silent nor saturated, over a few seeds, or the comparison would show little."""
    rates: dict[str, list[float]] = {}
    for seed in range(4):
        rng = np.random.default_rng(seed)
        made = case(Maker(rng, 1.0))
        history = simulate(made.graph, events(made, rng), 1.0, "zero", made.order, made.late)
        for name in made.order:
            rates.setdefault(name, []).append(float(torch.stack(history.spikes[name]).mean()))
    for name, found in rates.items():
        assert 0.02 < np.mean(found) < 0.9, (name, found)


# ---- membranes that are read ----------------------------------------------------------------------------------------


def read_by_membrane(make: Maker, kind: type, shape: str, metadata: dict[str, object]) -> Case:
    """An integrator behind a matrix with a bias, behind a convolution with one, and behind neurons without weights."""
    nodes = {"in": source(2, 4, 4), "conv1": make.conv(3, 2, 3), "a": make.neuron(3, 2, 2)}
    if shape == "conv":
        nodes |= {"conv2": make.conv(2, 3, 1), "v": make.membrane(kind, 2, 2, 2), "out": sink(2, 2, 2)}
    elif shape == "bare":
        nodes |= {"v": make.membrane(kind, 3, 2, 2), "out": sink(3, 2, 2)}
    else:
        flat = nir.Flatten(input_type={"input": np.array([3, 2, 2])}, start_dim=0, end_dim=-1)
        nodes |= {"flat": flat, "w": make.affine(5, 12), "v": make.membrane(kind, 5), "out": sink(5)}
    nodes["v"].metadata = {"dt": make.dt, "discretization": "euler"}
    return Case(build(nodes, line(*nodes), **metadata), {"in": (2, 4, 4)}, ["a", "v"])


@pytest.mark.parametrize("kind", INTEGRATORS)
@pytest.mark.parametrize("shape", ["matrix", "conv", "bare"])
@pytest.mark.parametrize("metadata", [{}, {"readout": "membrane"}], ids=["by default", "by metadata"])
@given(SEEDS, st.sampled_from([1.0, 1e-3]))
@settings(max_examples=4)
def test_an_integrator_before_the_output_is_read_by_its_membrane(
    kind: type, shape: str, metadata: dict[str, object], seed: int, dt: float
) -> None:
    """The membrane of the lowered graph is that of the file, in its unit, at every step and after the last one."""
    rng = np.random.default_rng(seed)
    made = read_by_membrane(Maker(rng, dt), kind, shape, metadata)
    inputs = events(made, rng)
    expected = torch.stack(simulate(made.graph, inputs, dt, "zero", made.order).membrane["v"], 1)
    graph = lower(made.graph, "network", dt=dt, reset="zero")
    assert graph.probed is not None
    assert (graph.probed.name, graph.readout.kind) == ("v", "membrane")
    run = Reference(graph).run(inputs, record=True)
    torch.testing.assert_close(run.v["v"], expected, rtol=1e-9, atol=1e-9)
    assert run.membrane is not None
    assert torch.equal(run.membrane, run.v["v"][:, -1])
    assert torch.equal(Reference(graph).run(inputs).membrane, run.membrane)
    assert not run.spikes["v"].any()


def test_a_network_of_an_integrator_alone_has_no_reset() -> None:
    make = Maker(np.random.default_rng(0), 1e-3)
    nodes = {"in": source(4), "w": make.linear(3, 4), "v": make.membrane(nir.LI, 3), "out": sink(3)}
    nodes["v"].metadata = {"dt": 1e-3}
    graph = lower(build(nodes, line(*nodes)), "network")
    assert (graph.dt, float_neuron(graph.populations[0]).threshold) == (1e-3, np.inf)


def test_an_integrator_of_one_gain_keeps_shared_weights() -> None:
    make = Maker(np.random.default_rng(0), 1.0)
    nodes = {"in": source(2, 4, 4), "conv": make.conv(3, 2, 3), "v": nir.I(r=np.full((3, 2, 2), 0.5))}
    nodes["out"] = sink(3, 2, 2)
    graph = lower(build(nodes, line(*nodes)), "network", dt=1.0)
    np.testing.assert_allclose(graph.projections[0].operator.weight, 0.5 * nodes["conv"].weight)


@pytest.mark.parametrize("kind", INTEGRATORS)
@pytest.mark.parametrize(
    ("edges", "said"),
    [
        ([*line("in", "v", "w", "a", "out")], "feeds 'w': it sends no spikes"),
        ([*line("in", "v", "w", "out")], "feeds 'w': it sends no spikes"),
        ([*line("in", "w", "v", "out"), ("v", "v")], "feeds 'out', 'v': it sends no spikes"),
        ([*line("in", "v", "out"), *line("v", "a", "out")], "feeds 'out', 'a': it sends no spikes"),
    ],
    ids=["before a neuron", "before a linear node", "in a loop", "read and passed on"],
)
def test_an_integrator_elsewhere_is_refused(kind: type, edges: Edges, said: str) -> None:
    make = Maker(np.random.default_rng(0), 1.0)
    every = {"in": source(4), "v": make.membrane(kind, 4), "w": make.linear(4, 4), "a": make.lif(4), "out": sink(4)}
    nodes = {key: node for key, node in every.items() if any(key in edge for edge in edges)}
    with pytest.raises(GraphError, match=rf"'v' \({kind.__name__}\) {said}"):
        lower(build(nodes, edges), "network", dt=1.0, reset="zero")


@pytest.mark.parametrize(
    ("spiking", "readout", "said"),
    [
        (True, "membrane", "'v' has thresholds"),
        (False, "count", "'v' never fires.*'count' of 'v'"),
        (False, "psc", "'v' never fires.*'psc' of 'v'"),
    ],
)
def test_a_readout_that_does_not_fit_its_population_is_refused(spiking: bool, readout: str, said: str) -> None:
    make = Maker(np.random.default_rng(0), 1.0)
    nodes = {"in": source(4), "v": make.lif(4) if spiking else make.membrane(nir.LI, 4), "out": sink(4)}
    with pytest.raises(GraphError, match=said) as caught:
        lower(build(nodes, line(*nodes), readout=readout), "network", dt=1.0, reset="zero")
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(("field_", "value"), [("r", np.nan), ("tau", 0.5), ("tau_syn", 0.5), ("w_in", np.inf)])
def test_an_integrator_that_cannot_be_lowered_is_named(field_: str, value: float) -> None:
    kind = nir.LI if field_ == "tau" else nir.CubaLI
    node = Maker(np.random.default_rng(0), 1.0).membrane(kind, 4)
    getattr(node, field_)[2] = value
    nodes = {"in": source(4), "v": node, "out": sink(4)}
    with pytest.raises(GraphError, match="'v'"):
        lower(build(nodes, line(*nodes)), "network", dt=1.0)


# ---- what the lowered graph looks like ------------------------------------------------------------------------------


def longest_paths(graph: ProcessGraph) -> dict[str, int]:
    """Connections on the longest feed-forward path from an input, by node."""
    found = {node.name: 0 for node in graph.inputs}
    for population in graph.populations:
        found[population.name] = 1 + max(
            found[p.source]
            for p in graph.incoming(population.name)
            if not p.recurrent and not getattr(graph.node(p.source), "constant", False)
        )
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_projection_arrives_on_time(case: Callable[[Maker], Case]) -> None:
    graph = lower(case(Maker(np.random.default_rng(0), 1.0)).graph, "network", dt=1.0, reset="zero")
    paths = longest_paths(graph)
    assert {node.name: node.stage for node in graph.nodes} == paths
    for projection in graph.projections:
        if not projection.recurrent and not getattr(graph.node(projection.source), "constant", False):
            assert paths[projection.source] + 1 + projection.delay == paths[projection.target], projection.name
            assert projection.delay >= 0
        else:
            assert projection.delay == 0
    assert graph.depth == paths[graph.readout.population]


def test_branches_wait_for_the_longest() -> None:
    graph = lower(branches(Maker(np.random.default_rng(0), 1.0)).graph, "network", dt=1.0, reset="zero")
    delays = {(p.source, p.target): p.delay for p in graph.projections if not p.source.startswith("constant")}
    assert delays == {("in", "a"): 0, ("a", "b"): 0, ("b", "c"): 0, ("c", "d"): 0, ("a", "d"): 2, ("side", "d"): 3}


def test_only_loops_are_recurrent() -> None:
    for case in CASES:
        made = case(Maker(np.random.default_rng(0), 1.0))
        graph = lower(made.graph, "network", dt=1.0, reset="zero")
        assert {(p.source, p.target) for p in graph.projections if p.recurrent} == made.late, case.__name__


def lowered_alone(nodes: dict[str, nir.NIRNode], **settings_: object) -> ProcessGraph:
    keywords = {"dt": 1.0, "reset": "zero"} | settings_
    return lower(build(nodes, line(*nodes)), "network", **keywords)  # type: ignore[arg-type]


def float_neuron(population: Population) -> FloatNeuron:
    assert isinstance(population.neuron, FloatNeuron)
    return population.neuron


def test_a_bias_behind_a_synaptic_filter_comes_from_a_constant_source() -> None:
    make = Maker(np.random.default_rng(0), 1.0)
    affine = make.affine(3, 4)
    graph = lowered_alone({"in": source(4), "w": affine, "a": make.cuba(3), "out": sink(3)})
    (constant,) = [node for node in graph.inputs if node.constant]
    (projection,) = graph.outgoing(constant.name)
    assert constant.size == 1  # one neuron for all biases, not one each
    np.testing.assert_array_equal(projection.operator.weight[:, 0], affine.bias)
    assert [node.name for node in graph.event_inputs] == ["in"]


def test_a_bias_without_a_filter_is_a_bias_of_the_neuron() -> None:
    make = Maker(np.random.default_rng(0), 1.0)
    affine, neurons = make.affine(3, 4), make.lif(3)
    graph = lowered_alone({"in": source(4), "w": affine, "a": neurons, "out": sink(3)})
    assert not any(node.constant for node in graph.inputs)
    bias = float_neuron(graph.population("a")).bias
    np.testing.assert_allclose(bias, affine.bias + neurons.v_leak / neurons.r, rtol=1e-12)


def test_a_convolution_keeps_its_shared_weights() -> None:
    made = convolutional(Maker(np.random.default_rng(0), 1.0))
    graph = lower(made.graph, "network", dt=1.0, reset="zero")
    kinds = {(p.source, p.target): p.operator.kind for p in graph.projections if not p.source.startswith("constant")}
    assert kinds["a", "b"] == "conv"
    assert kinds["b", "c"] == "dense"
    pooled = next(p.operator for p in graph.projections if p.target == "b")
    assert pooled.pool is not None


def test_pooling_and_flattening_straight_into_neurons() -> None:
    make = Maker(np.random.default_rng(0), 1.0)
    nodes = {
        "in": source(2, 4, 6),
        "pool": pooling(nir.SumPool2d, (2, 2), (2, 2)),
        "flat": nir.Flatten(input_type={"input": np.array([2, 2, 3])}, start_dim=0, end_dim=-1),
        "a": make.lif(12),
        "out": sink(12),
    }
    made = Case(build(nodes, line(*nodes)), {"in": (2, 4, 6)}, ["a"])
    inputs = events(made, np.random.default_rng(1))
    expected = torch.stack(simulate(made.graph, inputs, 1.0, "zero", ["a"]).spikes["a"], 1)
    graph = lowered_alone(nodes)
    assert torch.equal(Reference(graph).run(inputs).spikes["a"].to(torch.float64), expected)


@pytest.mark.parametrize("where", ["before", "after", "both"])
@pytest.mark.parametrize("matrix", [True, False], ids=["matrix", "neurons"])
def test_scaling_beside_a_flatten_node(where: str, matrix: bool) -> None:
    """Input normalisation before, after or around Flatten, then a matrix or neurons straight away."""
    make = Maker(np.random.default_rng(0), 1.0)
    nodes: dict[str, nir.NIRNode] = {"in": source(2, 2, 3)}
    if where != "after":
        nodes["before"] = nir.Scale(scale=make.rng.uniform(0.5, 2, (2, 2, 3)))
    nodes["flat"] = nir.Flatten(input_type={"input": np.array([2, 2, 3])}, start_dim=0, end_dim=-1)
    if where != "before":
        nodes["after"] = nir.Scale(scale=make.rng.uniform(0.5, 2, 12))
    if matrix:
        nodes["matrix"] = make.affine(12, 12)
    nodes |= {"a": make.lif(12), "out": sink(12)}
    made = Case(build(nodes, line(*nodes)), {"in": (2, 2, 3)}, ["a"])
    inputs = events(made, np.random.default_rng(1))
    expected = torch.stack(simulate(made.graph, inputs, 1.0, "zero", ["a"]).spikes["a"], 1)
    assert torch.equal(Reference(lowered_alone(nodes)).run(inputs).spikes["a"].to(torch.float64), expected)


@pytest.mark.parametrize(
    ("padding", "stride", "expected"), [("same", (1, 1), (1, 2)), ("valid", (2, 2), (0, 0)), ((2, 1), (1, 1), (2, 1))]
)
def test_padding_by_name(padding: object, stride: tuple[int, int], expected: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    conv = nir.Conv2d((5, 6), rng.normal(size=(2, 1, 3, 5)), stride, padding, (1, 1), 1, np.zeros(2))
    plain = F.conv2d(torch.zeros(1, 1, 5, 6), torch.zeros(2, 1, 3, 5), None, stride, expected)
    shape = tuple(plain.shape[1:])
    nodes = {"in": source(1, 5, 6), "conv": conv, "a": Maker(rng, 1.0).lif(*shape), "out": sink(*shape)}
    graph = nir.NIRGraph(nodes, line(*nodes), metadata={"steps": 3}, type_check=False)
    operator = lower(graph, "network", dt=1.0, reset="zero").projections[0].operator
    assert operator.describe()["padding"] == list(expected)
    assert operator.out_shape == shape


# ---- time and reset -------------------------------------------------------------------------------------------------


def simple(**metadata: object) -> nir.NIRGraph:
    make = Maker(np.random.default_rng(0), 1e-3)
    nodes = {"in": source(4), "w1": make.linear(3, 4), "a": make.cuba(3), "w2": make.linear(2, 3), "b": make.lif(2)}
    nodes["out"] = sink(2)
    for name in "ab":
        nodes[name].metadata = dict(metadata)
    return build(nodes, line(*nodes))


def test_metadata_is_enough() -> None:
    graph = lower(simple(dt=1e-3, reset="subtract"), "network")
    assert graph.dt == 1e-3
    assert {float_neuron(p).reset for p in graph.populations} == {"subtract"}
    assert graph.steps == STEPS


def test_steps_bits_and_readout_come_from_the_graph_or_the_caller() -> None:
    recorded = simple(dt=1e-3, reset="zero")
    recorded.metadata |= {"steps": 7, "message_bits": 3, "readout": "psc", "readout_keep": 0.5}
    graph = lower(recorded, "network")
    assert (graph.steps, graph.inputs[0].message_bits) == (7, 3)
    assert (graph.readout.population, graph.readout.kind, graph.readout.keep) == ("b", "psc", 0.5)
    other = lower(recorded, "network", steps=9, message_bits=5)
    assert (other.steps, other.inputs[0].message_bits) == (9, 5)


@pytest.mark.parametrize(
    ("metadata", "given_", "said"),
    [
        ({"reset": "zero"}, {}, "dt is not recorded"),
        ({"dt": 1e-3}, {}, "reset is not recorded"),
        ({"dt": 1e-3, "reset": "zero"}, {"dt": 1e-4}, r"dt is contradictory: 0\.0001, 0\.001"),
        ({"dt": 1e-3, "reset": "zero"}, {"reset": "subtract"}, "reset is contradictory: subtract, zero"),
        ({"dt": 1e-3, "reset": "soft"}, {}, "reset = 'soft' is unknown"),
        ({"dt": 1e-3}, {"reset": "soft"}, "reset = 'soft' is unknown"),
        ({"reset": "zero"}, {"dt": 0.0}, "dt = 0.* positive"),
        ({"reset": "zero"}, {"dt": -1e-3}, "dt = -0.001.* positive"),
        ({"reset": "zero"}, {"dt": float("nan")}, "dt = nan"),
        ({"dt": 1e-3, "reset": "zero", "discretization": "midpoint"}, {}, "discretization = 'midpoint' is unknown"),
        (
            {"dt": 1e-3, "reset": "zero", "discretization": "euler"},
            {"discretization": "exponential"},
            "discretization is contradictory: euler, exponential",
        ),
    ],
)
def test_time_and_reset_that_are_missing_or_contradictory(
    metadata: dict[str, object], given_: dict[str, object], said: str
) -> None:
    with pytest.raises(GraphError, match=said) as caught:
        lower(simple(**metadata), "network", **given_)  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(("given_", "asked"), [({"reset": "zero"}, "--dt"), ({"dt": 1e-3}, "--reset")])
def test_a_missing_choice_is_explained_by_what_others_make_of_this_file(given_: dict[str, object], asked: str) -> None:
    graph = simple()
    graph.nodes["b"].tau[1] = 4e-4
    with pytest.raises(GraphError, match=asked) as caught:
        lower(graph, "network", **given_)  # type: ignore[arg-type]
    said = str(caught.value)
    for meaning in ("0.4 steps to Norse", "4 to snnTorch", "SpikingJelly", "0.0004 to Sinabs", "'b'"):
        assert meaning in said, meaning


def test_what_a_graph_records_holds_for_its_neurons() -> None:
    graph = simple()
    graph.metadata |= {"dt": 1e-3, "reset": "subtract", "discretization": "exponential"}
    lowered = lower(graph, "network")
    assert (lowered.dt, lowered.notes) == (1e-3, {"discretization": "exponential", "reset": "subtract"})


def test_exponential_steps_keep_what_the_equation_keeps() -> None:
    graph = lower(simple(dt=1e-3, reset="zero", discretization="exponential"), "network")
    nodes = simple().nodes
    neuron = float_neuron(graph.population("a"))
    np.testing.assert_allclose(neuron.current_keep, np.exp(-1e-3 / nodes["a"].tau_syn), rtol=1e-14)
    np.testing.assert_allclose(neuron.voltage_keep, np.exp(-1e-3 / nodes["a"].tau_mem), rtol=1e-14)
    assert lower(simple(dt=1.0, reset="zero", discretization="exponential"), "network").dt == 1.0  # far beyond Euler


def test_nodes_that_contradict_each_other() -> None:
    graph = simple(dt=1e-3, reset="zero")
    graph.nodes["b"].metadata["dt"] = 2e-3
    with pytest.raises(GraphError, match="dt is contradictory"):
        lower(graph, "network")


def test_missing_steps_are_asked_for() -> None:
    graph = simple(dt=1e-3, reset="zero")
    graph.metadata = {}
    with pytest.raises(GraphError, match="give steps"):
        lower(graph, "network")
    assert lower(graph, "network", steps=3).steps == 3


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"readout": "loudest"}, "loudest"),
        ({"steps": 0}, "steps"),
        ({"steps": "many"}, "steps"),
        ({"message_bits": 0}, "message_bits|bits"),
        ({"message_bits": -1}, "message_bits|bits"),
        ({"message_bits": 99}, "message_bits|bits"),
        ({"readout_keep": "often"}, "readout_keep"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(metadata: dict[str, object], said: str) -> None:
    """A file from a stranger may record anything."""
    graph = simple(dt=1e-3, reset="zero")
    graph.metadata |= metadata
    with pytest.raises(GraphError, match=said):
        lower(graph, "network")


# ---- what cannot be lowered -----------------------------------------------------------------------------------------


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape)


def test_a_cycle_without_a_neuron_is_drawn() -> None:
    make = Maker(np.random.default_rng(0), 1.0)
    nodes = {"in": source(4), "w": make.linear(4, 4), "back": make.linear(4, 4), "a": make.lif(4), "out": sink(4)}
    graph = build(nodes, [*line("in", "w", "a", "out"), ("w", "back"), ("back", "w")])
    with pytest.raises(GraphError, match=r"cycle without a neuron.* -> ") as caught:
        lower(graph, "network", dt=1.0, reset="zero")
    assert "w" in str(caught.value)
    assert "back" in str(caught.value)


def test_an_output_fed_by_two_nodes_is_refused() -> None:
    make = Maker(np.random.default_rng(0), 1.0)
    nodes = {"in": source(4), "a": make.lif(4), "b": make.lif(4), "out": sink(4)}
    graph = build(nodes, [*line("in", "a", "out"), *line("in", "b", "out")])
    with pytest.raises(GraphError, match="'out' is fed by 'a', 'b'"):
        lower(graph, "network", dt=1.0, reset="zero")


def test_an_output_fed_by_a_linear_node_is_refused() -> None:
    make = Maker(np.random.default_rng(0), 1.0)
    nodes = {"in": source(4), "a": make.lif(4), "w": make.linear(3, 4), "out": sink(3)}
    with pytest.raises(GraphError, match=r"'out' is fed by 'w'.*spiking"):
        lower(build(nodes, line(*nodes)), "network", dt=1.0, reset="zero")


def test_two_outputs_are_refused() -> None:
    make = Maker(np.random.default_rng(0), 1.0)
    nodes = {"in": source(4), "a": make.lif(4), "out": sink(4), "other": sink(4)}
    with pytest.raises(GraphError, match="2 Output nodes"):
        lower(build(nodes, [*line("in", "a", "out"), ("a", "other")]), "network", dt=1.0, reset="zero")


def test_a_network_without_neurons_is_refused() -> None:
    nodes = {"in": source(4), "w": nir.Linear(ones(3, 4)), "out": sink(3)}
    graph = build(nodes, line(*nodes))
    with pytest.raises(GraphError):
        lower(graph, "network", dt=1.0, reset="zero")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tau_mem": 0.5}, r"'a': tau_mem = 0\.5 s is shorter than dt = 1 s"),
        ({"tau_syn": 0.5}, r"'a': tau_syn = 0\.5 s is shorter than dt = 1 s"),
        ({"tau_syn": 0.0}, "tau_syn = 0 s of node 'a' is not positive"),
        ({"tau_mem": -3.0}, "tau_mem = -3 s of node 'a' is not positive"),
        ({"tau_mem": np.nan}, "tau_mem of node 'a'.*NaN"),
        ({"tau_mem": np.inf}, "tau_mem of node 'a'.*infinity"),
        ({"v_threshold": np.nan}, "v_threshold of node 'a'.*NaN"),
    ],
)
def test_a_neuron_that_cannot_be_lowered_is_named(change: dict[str, float], said: str) -> None:
    """One neuron of four is enough."""
    values = {"tau_syn": 2.0, "tau_mem": 2.0, "r": 1.0, "v_leak": 0.0, "v_threshold": 1.0, "v_reset": 0.0, "w_in": 1.0}
    arrays = {key: np.full(4, value) for key, value in values.items()}
    for key, value in change.items():
        arrays[key][2] = value
    with pytest.raises(GraphError, match=said):
        lowered_alone({"in": source(4), "a": nir.CubaLIF(**arrays), "out": sink(4)})


@pytest.mark.parametrize("kind", [nir.LIF, nir.IF])
def test_other_neurons_that_cannot_be_lowered_are_named(kind: type) -> None:
    good = {"tau": ones(3), "r": ones(3), "v_leak": 0 * ones(3), "v_threshold": ones(3), "v_reset": 0 * ones(3)}
    if kind is nir.IF:
        good = {key: good[key] for key in ("r", "v_threshold", "v_reset")}
    for key, value in (("r", np.nan), ("v_reset", np.inf), ("tau", 0.9), ("tau", 0.0)):
        if key in good:
            bad = good | {key: np.array([1.0, value, 1.0])}
            with pytest.raises(GraphError, match="'a'"):
                lowered_alone({"in": source(3), "a": kind(**bad), "out": sink(3)})
    lowered_alone({"in": source(3), "a": kind(**good), "out": sink(3)})


def unchecked(nodes: dict[str, nir.NIRNode], edges: Edges | None = None) -> nir.NIRGraph:
    """A graph whose shapes the NIR package has not looked at."""
    return nir.NIRGraph(nodes, line(*nodes) if edges is None else edges, metadata={"steps": 3}, type_check=False)


@pytest.mark.parametrize(
    ("node", "shape", "size"),
    [
        (nir.Linear(ones(3, 5)), (4,), 3),
        (nir.Linear(ones(2, 3, 4)), (4,), 6),
        (nir.Scale(ones(5)), (4,), 4),
        (nir.Conv2d(None, ones(2, 3, 1, 1), (1, 1), (0, 0), (1, 1), 1, np.zeros(2)), (2, 2, 2), 8),
        (nir.Conv2d(None, ones(2, 2, 3, 3), (1, 1), (0, 0), (1, 1), 1, np.zeros(2)), (2, 2, 2), 8),
        (nir.Conv2d(None, ones(2, 2, 2, 2), (1, 1), "same", (1, 1), 1, np.zeros(2)), (2, 2, 2), (2, 2, 2)),
        (nir.Conv1d(None, ones(2, 2, 2), 1, "same", 1, 1, np.zeros(2)), (2, 4), (2, 4)),
        (nir.Conv1d(None, ones(2, 2, 2), 2, "same", 1, 1, np.zeros(2)), (2, 4), (2, 4)),
        (nir.Conv1d(None, ones(2, 3, 2), 1, 0, 1, 1, np.zeros(2)), (2, 4), (2, 3)),
        (nir.Linear(ones(3, 4)), (2, 4), (2, 3)),
        (nir.Delay(delay=np.full(4, 0.5)), (4,), 4),
        (nir.Delay(delay=np.full(4, 1e9)), (4,), 4),
        (nir.Delay(delay=np.full(4, -1.0)), (4,), 4),
        (nir.Threshold(threshold=ones(3)), (4,), 4),
        (nir.Conv2d(None, ones(2, 2, 1, 1), (1, 1), (0, 0), (1, 1), 1, np.zeros(5)), (2, 2, 2), 8),
        (nir.Conv2d(None, ones(2, 2, 1, 1), (0, 1), (0, 0), (1, 1), 1, np.zeros(2)), (2, 2, 2), 8),
        (nir.SumPool2d(np.array([2, 2]), np.array([2, 2]), np.array([2, 2])), (2, 2, 2), 2),
        (nir.SumPool2d(np.array([3, 3]), np.array([1, 1]), np.array([0, 0])), (2, 2, 2), 2),
        (nir.SumPool2d(np.array([2, 2]), np.array([0, 0]), np.array([0, 0])), (2, 2, 2), 2),
        (nir.AvgPool2d(np.array([2, 2]), np.array([2, 2]), np.array([0, 0])), (8,), 2),
        (nir.Flatten(input_type={"input": np.array([2, 2, 2])}, start_dim=0, end_dim=7), (2, 2, 2), 8),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nir.NIRNode) else None,
)
def test_a_linear_node_that_does_not_fit_is_named(
    node: nir.NIRNode, shape: tuple[int, ...], size: int | tuple[int, ...]
) -> None:
    make = Maker(np.random.default_rng(0), 1.0)
    after = (size,) if isinstance(size, int) else size
    nodes = {"in": source(*shape), "odd one": node, "a": make.lif(*after), "out": sink(*after)}
    with pytest.raises(GraphError, match="'odd one'"):
        lower(unchecked(nodes), "network", dt=1.0, reset="zero")


def test_an_addition_of_different_shapes_is_named() -> None:
    make = Maker(np.random.default_rng(0), 1.0)
    nodes = {"in": source(4), "side": source(3), "a": make.lif(4), "out": sink(4)}
    with pytest.raises(GraphError, match=r"'a' receives different shapes: \[\(3,\), \(4,\)\]"):
        lower(unchecked(nodes, [*line("in", "a", "out"), ("side", "a")]), "network", dt=1.0, reset="zero")


def test_neurons_of_another_size_than_what_arrives_are_named() -> None:
    make = Maker(np.random.default_rng(0), 1.0)
    nodes = {"in": source(4), "a": make.lif(5), "out": sink(5)}
    with pytest.raises(GraphError, match="a"):
        lower(unchecked(nodes), "network", dt=1.0, reset="zero")


def test_a_path_without_shared_weights_names_a_node() -> None:
    """Average pooling, then another factor at each place, straight into neurons: no operator has that form."""
    make = Maker(np.random.default_rng(0), 1.0)
    nodes = {
        "in": source(1, 4, 4),
        "pool": pooling(nir.AvgPool2d, (2, 2), (2, 2)),
        "scale": nir.Scale(scale=make.rng.uniform(1, 2, (1, 2, 2))),
        "a": make.lif(1, 2, 2),
        "out": sink(1, 2, 2),
    }
    try:
        graph = lowered_alone(nodes)
    except GraphError as error:
        said = str(error)
    else:
        made = Case(build(nodes, line(*nodes)), {"in": (1, 4, 4)}, ["a"])
        inputs = events(made, np.random.default_rng(1))
        expected = torch.stack(simulate(made.graph, inputs, 1.0, "zero", ["a"]).spikes["a"], 1)
        assert torch.equal(Reference(graph).run(inputs).spikes["a"].to(torch.float64), expected)
        return
    assert any(name in said for name in ("'a'", "'scale'", "'pool'")), said


def test_neurons_that_no_input_reaches_are_named() -> None:
    make = Maker(np.random.default_rng(0), 1.0)
    nodes = {
        "in": source(4),
        "a": make.lif(4),
        "island": make.lif(4),
        "loop": make.linear(4, 4),
        "out": sink(4),
    }
    edges = [*line("in", "a", "out"), *line("island", "loop", "island")]
    with pytest.raises(GraphError, match="no input reaches node 'island'"):
        lower(unchecked(nodes, edges), "network", dt=1.0, reset="zero")


def test_an_edge_to_nowhere_is_named() -> None:
    graph = simple(dt=1e-3, reset="zero")
    graph.edges.append(("a", "ghost"))
    with pytest.raises(GraphError, match="'ghost'"):
        lower(graph, "network")


@pytest.mark.parametrize("lost", [("in", "w1"), ("a", "w2"), ("b", "out")])
def test_an_unconnected_node_is_named(lost: tuple[str, str]) -> None:
    graph = simple(dt=1e-3, reset="zero")
    graph.edges.remove(lost)
    with pytest.raises(GraphError, match=f"'{lost[0]}'|'{lost[1]}'"):
        lower(graph, "network")
