"""Running NIR in floats: what a file itself says, held to hand-worked cases and to the lowered network's spikes."""

import itertools

import nir
import numpy as np
import pytest
import torch
from graph_strategies import one_thread  # noqa: F401
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from nir_strategies import nir_graphs, random_events, random_nir

from spikeport.converters.lower import lower
from spikeport.converters.nir_float import FloatNetwork
from spikeport.converters.quantize import quantize
from spikeport.converters.reference import Reference
from spikeport.deploy import event_simulator, torch_backend
from spikeport.deploy.verify import compare
from spikeport.models.errors import GraphError, QuantizationError

ONE = np.ones(1)


def chain(*nodes: nir.NIRNode, **metadata: object) -> nir.NIRGraph:
    """One value in, the nodes one after another as `n1`, `n2`..., one value out."""
    every = {"in": nir.Input(np.array([1])), **{f"n{index}": node for index, node in enumerate(nodes, 1)}}
    every["out"] = nir.Output(np.array([1]))
    return nir.NIRGraph(every, list(itertools.pairwise(every)), metadata, type_check=False)


def sent(graph: nir.NIRGraph, values: list[float], node: str = "out", **timing: object) -> list[float]:
    """What a node sends for one sample of one value a step."""
    network = FloatNetwork(graph, "network", **({"dt": 1.0, "reset": "zero"} | timing))  # type: ignore[arg-type]
    out = network.run({"in": np.array(values).reshape(1, -1, 1)})
    return out[node][0, :, 0].tolist()


def lif(tau: float = 2.0, threshold: float = 1.0, **others: float) -> nir.LIF:
    values = {"r": 1.0, "v_leak": 0.0} | others
    return nir.LIF(tau=tau * ONE, v_threshold=threshold * ONE, **{key: value * ONE for key, value in values.items()})


# ---- the law: a lowered network fires as the file's nodes do --------------------------------------------------------


@given(nir_graphs(), st.integers(0, 2**32 - 1))
@settings(max_examples=80)
def test_a_lowered_network_fires_as_its_nodes_do(graph: nir.NIRGraph, seed: int) -> None:
    inputs = random_events(graph, seed)
    network = FloatNetwork(graph, "network")
    expected = network.run(inputs)
    lowered = lower(graph, "network")
    run = Reference(lowered).run(inputs)
    for population in lowered.populations:
        if population.name in expected:  # the rest are relays
            found = run.spikes[population.name].to(torch.float64)
            assert torch.equal(found, expected[population.name]), population.name


@given(nir_graphs(), st.integers(0, 2**32 - 1))
@settings(max_examples=12)
def test_what_is_lowered_can_be_quantised_and_runs_alike(graph: nir.NIRGraph, seed: int) -> None:
    """Relays and loops of one population included; of loops over several, quantisation says that it cannot."""
    inputs = random_events(graph, seed)
    try:
        integer, _ = quantize(lower(graph, "network"), inputs)
    except QuantizationError:
        reject()
    assert compare(integer, torch_backend.run(integer, inputs), event_simulator.run(integer, inputs)).equal


def test_these_networks_have_everything_in_them_and_fire() -> None:
    seen: set[str] = set()
    rates: dict[str, list[float]] = {}
    loops = nested = relays = 0
    for seed in range(80):
        graph = random_nir(seed)
        network = FloatNetwork(graph, "network")
        out = network.run(random_events(graph, seed))
        for key, node in network.graph.nodes.items():
            kind = type(node).__name__
            seen.add(kind)
            if isinstance(node, (nir.IF, nir.LIF, nir.CubaLIF, nir.Threshold)):
                rates.setdefault(kind, []).append(float(out[key].mean()))
        loops += bool(network.recurrent)
        nested += any(isinstance(node, nir.NIRGraph) for node in graph.nodes.values())
        relays += any(".after" in population.name for population in lower(graph, "network").populations)
    assert seen >= {"Affine", "Linear", "Scale", "Conv1d", "Conv2d", "Delay", "Flatten", "SumPool2d", "AvgPool2d"}
    assert min(loops, nested, relays) >= 10
    for kind in ("IF", "LIF", "CubaLIF", "Threshold"):
        assert 0.1 < np.mean(rates[kind]) < 0.8, (kind, np.mean(rates[kind]))


@given(nir_graphs(), st.randoms(use_true_random=False))
@settings(max_examples=15)
def test_the_order_of_edges_means_nothing(graph: nir.NIRGraph, random: object) -> None:
    inputs = random_events(graph, 0)
    first = FloatNetwork(graph, "network").run(inputs, ["out"])
    random.shuffle(graph.edges)  # type: ignore[attr-defined]
    assert torch.equal(FloatNetwork(graph, "network").run(inputs, ["out"])["out"], first["out"])


# ---- node by node, worked by hand -----------------------------------------------------------------------------------


def test_euler_and_exponential_steps() -> None:
    assert sent(chain(lif(threshold=9.0)), [1, 0], "n1") == [0, 0]
    integrator = nir.LI(tau=2 * ONE, r=3 * ONE, v_leak=0.5 * ONE)
    assert sent(chain(integrator), [1, 0], "n1") == [1.75, 1.125]
    keep = np.exp(-0.5)
    first = (1 - keep) * 3.5
    found = sent(chain(integrator), [1, 0], "n1", discretization="exponential")
    assert found == pytest.approx([first, keep * first + (1 - keep) * 0.5], rel=1e-14)


def test_an_exponential_step_is_exact_for_an_input_that_is_held() -> None:
    """Two steps of dt and one of 2 dt end at the same membrane, as no Euler step would."""
    integrator = nir.LI(tau=2 * ONE, r=3 * ONE, v_leak=0.5 * ONE)
    fine = sent(chain(integrator), [1] * 6, "n1", discretization="exponential", dt=0.5)
    coarse = sent(chain(integrator), [1] * 3, "n1", discretization="exponential", dt=1.0)
    assert fine[1::2] == pytest.approx(coarse, rel=1e-14)


def test_the_current_moves_before_the_membrane() -> None:
    node = nir.CubaLI(tau_syn=2 * ONE, tau_mem=4 * ONE, r=2 * ONE, v_leak=0 * ONE, w_in=4 * ONE)
    assert sent(chain(node), [1, 0], "n1") == [1.0, 1.25]  # I = 2, 1; v = 2/4 2, 3/4 v + 2/4 1


def test_integrators_work_in_the_middle_of_a_network() -> None:
    """An LI between two neurons: its membrane is what the second one receives."""
    graph = chain(nir.LI(tau=2 * ONE, r=2 * ONE, v_leak=0 * ONE), nir.IF(r=ONE, v_threshold=1.7 * ONE))
    assert sent(graph, [1, 1, 0, 0], "n1") == [1.0, 1.5, 0.75, 0.375]
    assert sent(graph, [1, 1, 0, 0]) == [0, 1, 0, 0]
    with pytest.raises(GraphError, match=r"'n1' \(LI\) feeds 'n2'.*runs in floats"):
        lower(graph, "network", dt=1.0, reset="zero", steps=4)


def test_a_threshold_is_strict_and_forgets() -> None:
    assert sent(chain(nir.Threshold(0.5 * ONE)), [0.5, 0.6, 0.0, 2.0]) == [0, 1, 0, 1]


def test_a_membrane_starts_at_its_reset_potential_and_returns_to_it() -> None:
    node = nir.IF(r=ONE, v_threshold=ONE, v_reset=-ONE)
    assert sent(chain(node), [1, 1, 0.5, 2, 0.5]) == [0, 0, 1, 0, 1]  # from -1, and back to it
    with pytest.raises(GraphError, match=r"'n1'.*reset potential"):
        sent(chain(node), [1], reset="subtract")


def test_delays_of_whole_steps_and_between() -> None:
    assert sent(chain(nir.Delay(2 * ONE)), [1, 2, 3, 4]) == [0, 0, 1, 2]
    assert sent(chain(nir.Delay(0.25 * ONE)), [1, 2, 3, 4]) == [0.75, 1.75, 2.75, 3.75]
    assert sent(chain(nir.Delay(1.5 * ONE)), [1, 2, 3, 4]) == [0, 0.5, 1.5, 2.5]
    assert sent(chain(nir.Delay(0.3 * ONE)), [1, 2, 3, 4], dt=0.1) == [0, 0, 0, 1]
    assert sent(chain(nir.Delay(1e12 * ONE)), [1, 2, 3, 4]) == [0, 0, 0, 0]
    with pytest.raises(GraphError, match=r"'n1' \(Delay\).*0\.25 steps"):
        lower(chain(nir.Delay(0.25 * ONE), lif()), "network", dt=1.0, reset="zero", steps=4)


def test_a_delay_in_a_loop_is_the_whole_delay_of_the_loop() -> None:
    """A neuron that fires at once when hit hears itself three steps later, and only then."""
    nodes = {
        "in": nir.Input(np.array([1])),
        "a": nir.IF(r=ONE, v_threshold=0.5 * ONE),
        "wait": nir.Delay(3 * ONE),
        "out": nir.Output(np.array([1])),
    }
    graph = nir.NIRGraph(nodes, [("in", "a"), ("a", "wait"), ("wait", "a"), ("a", "out")], type_check=False)
    assert sent(graph, [1, 0, 0, 0, 0, 0, 0]) == [1, 0, 0, 1, 0, 0, 1]
    lowered = lower(graph, "network", dt=1.0, reset="zero", steps=7)
    run = Reference(lowered).run({"in": np.array([1, 0, 0, 0, 0, 0, 0]).reshape(1, 7, 1)})
    assert run.spikes["a"].flatten().tolist() == [1, 0, 0, 1, 0, 0, 1]


def test_a_bias_in_a_loop_is_there_from_the_first_step() -> None:
    nodes = {
        "in": nir.Input(np.array([1])),
        "a": nir.IF(r=ONE, v_threshold=0.75 * ONE),
        "back": nir.Affine(-np.ones((1, 1)), 0.5 * ONE),
        "out": nir.Output(np.array([1])),
    }
    graph = nir.NIRGraph(nodes, [("in", "a"), ("a", "back"), ("back", "a"), ("a", "out")], type_check=False)
    assert sent(graph, [0, 0, 0, 0, 0, 0]) == [0, 1, 0, 0, 0, 1]  # v: 0.5, 1 fires, -0.5, 0, 0.5, 1 fires


def test_nested_graphs_are_found_under_dotted_names() -> None:
    inner = chain(lif())
    outer = chain(nir.Scale(2 * ONE), inner, nir.Scale(3 * ONE))
    network = FloatNetwork(chain(outer), "network", dt=1.0, reset="zero")
    assert [key for key in network.order if "." in key] == ["n1.n1", "n1.n2.n1", "n1.n3"]
    assert sent(chain(outer), [2, 0], "n1.n3") == [3, 0]


def test_inputs_that_do_not_fit_are_named() -> None:
    network = FloatNetwork(chain(lif()), "network", dt=1.0, reset="zero")
    with pytest.raises(GraphError, match=r"\['other'\].*\['in'\]"):
        network.run({"other": np.zeros((1, 2, 1))})
    with pytest.raises(GraphError, match=r"'in' is of shape \(1, 2, 3\)"):
        network.run({"in": np.zeros((1, 2, 3))})
