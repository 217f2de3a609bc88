"""Quantisation-aware fine-tuning: the network that is trained is the one that runs, and it gets better."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph_strategies import one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from network_examples import network, settled
from test_quantize import float_network, floats, one_population, spikes

from spikeport.converters.graph import Input, ProcessGraph, Readout
from spikeport.converters.lower import lower
from spikeport.converters.nir_reader import read_nir
from spikeport.converters.nir_writer import to_nir
from spikeport.converters.qat import IntegerNetwork, _Levels, fine_tune
from spikeport.converters.quantize import quantize
from spikeport.converters.reference import Reference
from spikeport.deploy import api, event_simulator, torch_backend
from spikeport.deploy.cli import main
from spikeport.deploy.progress import Silent
from spikeport.deploy.run_folder import RunFolder
from spikeport.deploy.stages import quantize_stage
from spikeport.deploy.trace import decisions
from spikeport.models import trainer
from spikeport.models.errors import QuantizationError, RecipeError
from spikeport.models.loihi_integers import sign_mode, weight_range
from spikeport.models.networks import SpikingNetwork
from spikeport.models.recipe import parse_recipe
from spikeport.models.rules import CSBP, MLF, STBP, TSSL, RateBP, Rule, SpikeBP

RULES: list[Rule] = [CSBP(), TSSL(), SpikeBP(), STBP("arctan"), MLF(), RateBP()]


def feed_forward(seed: int = 2, membrane: bool = False, biased: bool = True) -> ProcessGraph:
    """The network of the tests of quantisation without its loop; with a membrane readout if asked."""
    graph = float_network(seed, biased=biased)
    graph = replace(graph, projections=tuple(p for p in graph.projections if not p.recurrent))
    if not membrane:
        return graph
    last = replace(graph.populations[-1], neuron=floats(np.inf, 0.5, 0.95, 0.05))
    return replace(graph, populations=(*graph.populations[:-1], last), readout=Readout("out", "membrane"))


def integers_of(
    graph: ProcessGraph, bits: int, rule: Rule | None = None, **settings: Any
) -> tuple[IntegerNetwork, ProcessGraph]:
    integer, report = quantize(graph, spikes(graph, samples=8), bits=bits)
    return IntegerNetwork(report.graph, integer, report.scales, rule or STBP(), **settings), integer


def window(graph: ProcessGraph, inputs: dict[str, np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(inputs["in"]).float().transpose(0, 1)


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.booleans(), st.booleans())
@settings(max_examples=12)
def test_what_is_trained_is_what_runs(seed: int, bits: int, membrane: bool, native: bool) -> None:
    """After steps that move many weights: spikes, or membranes, equal those of the exported integers bit for bit."""
    graph = feed_forward(seed, membrane)
    trained, integer = integers_of(graph, bits, native_units=native)
    inputs = spikes(graph, seed, samples=5)
    x = window(graph, inputs)
    first = trained.export()
    for before, after in zip(integer.projections, first.projections, strict=True):
        np.testing.assert_array_equal(before.operator.weight, after.operator.weight)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        output = trained(x)["out"]
        (output[-1, :, 0] - output.sum(dim=0)[:, 1]).sum().backward()
        optimizer.step()
    made = trained.export()
    assert made.fingerprint() != integer.fingerprint()
    with torch.no_grad():
        found = trained(x)
    run = Reference(made).run(inputs)
    for name in ("conv", "inner", "out"):
        if name == "out" and membrane:
            assert run.membrane is not None
            unit = 64 * trained._somata("out").scale
            assert torch.equal((found["out"][-1] * unit).round().to(torch.int64), run.membrane)
        else:
            assert torch.equal(found[name].transpose(0, 1).to(torch.uint8), run.spikes[name])
    for projection, true in zip(made.projections, graph.projections, strict=True):
        low, high, step = weight_range(sign_mode(true.operator.weight), bits)
        weight = projection.operator.weight
        assert low <= weight.min() <= weight.max() <= high
        assert not np.any(weight % step)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_every_rule_trains_the_integers_that_the_backends_run(rule: Rule) -> None:
    graph = feed_forward(5)
    if isinstance(rule, SpikeBP):  # is defined without a synaptic filter
        unfiltered = [replace(p, neuron=replace(p.neuron, current_keep=np.zeros(()))) for p in graph.populations]
        graph = replace(graph, populations=tuple(unfiltered))
    trained, _ = integers_of(graph, 4, rule)
    inputs = spikes(graph, samples=6)
    before = [weight.detach().clone() for weight in trained.parameters()]
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (trained(window(graph, inputs))["out"].mean(dim=0) - 0.5).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, trained.parameters(), strict=True))
    made = trained.export()
    first, second = torch_backend.run(made, inputs, "cpu"), event_simulator.run(made, inputs)
    with torch.no_grad():
        found = trained(window(graph, inputs))
    for name in ("conv", "inner", "out"):
        np.testing.assert_array_equal(first.spikes(name), second.spikes(name))
        np.testing.assert_array_equal(first.spikes(name), found[name].transpose(0, 1).flatten(2).numpy())


def trained_and_lowered(rule: Rule, **settings: Any) -> tuple[SpikingNetwork, ProcessGraph, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = (torch.rand(6, 12, 1, 6, 6, generator=generator) < 0.5).double()
    made = settled(network("4C3-P2-12-3", (1, 6, 6), rule=rule, steps=6, bias=True, **settings), x)
    kind = "membrane" if settings.get("output") == "membrane" else "count"
    return made, lower(to_nir(made, 1e-3, 6, 1, kind), "net"), x


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (STBP("arctan"), {}),
        (STBP("arctan"), {"reset": "subtract", "threshold": 0.6}),
        (STBP("arctan"), {"output": "membrane"}),
        (CSBP(), {"tau_syn": 1.0}),
        (TSSL(), {"threshold": 1.3}),
        (SpikeBP(), {"tau_syn": 1.0}),
    ],
)
def test_gradients_at_eight_bits_are_about_those_of_the_float_network(rule: Rule, settings: dict[str, Any]) -> None:
    """The same weights, biases and units, so that gradients differ by what quantisation changed alone."""
    made, graph, x = trained_and_lowered(rule, **settings)
    inputs = {graph.inputs[0].name: x.transpose(0, 1).to(torch.uint8).numpy()}
    integer, report = quantize(graph, inputs)
    integers = IntegerNetwork(report.graph, integer, report.scales, rule)

    def loss(output: torch.Tensor) -> torch.Tensor:
        return ((output.mean(dim=0) - torch.tensor([0.5, 0.1, 0.3])) ** 2).sum()

    outputs = integers(x.float()), made(x)
    for output in outputs:
        loss(output["dense2"]).backward()
    assert (outputs[0]["dense1"] != outputs[1]["dense1"]).double().mean() < 0.05
    for projection in graph.projections:
        found = integers._synapses(projection.name).weight.grad
        layer = made.maps[f"{projection.target}_weight"]
        assert found is not None
        # behind a filter a bias is the weights of a source that always fires
        source = graph.node(projection.source)
        always = isinstance(source, Input) and source.constant
        wanted = layer.bias.grad if always else layer.weight.grad  # type: ignore[union-attr]
        if always:
            found = found.reshape(len(layer.bias), -1).sum(dim=1)  # type: ignore[arg-type]
        if settings.get("output") == "membrane" and projection.target == "dense2":
            wanted = wanted * 3.0  # the weights into an integrator hold the gain of its filter, 1 / tau_syn
        inside = (found != 0) | (wanted == 0)  # the largest weights may be clipped
        assert inside.double().mean() > 0.6
        assert similar(found[inside], wanted[inside]), projection.name
    biases = {name: integers._somata(name).bias for name in ("conv1", "dense1", "dense2")}
    assert all((bias is not None) == (settings.get("tau_syn") == 1.0) for bias in biases.values())
    for name, bias in biases.items():
        if bias is not None:
            assert bias.grad is not None
            wanted = made.maps[f"{name}_weight"].bias.grad  # type: ignore[union-attr]
            assert similar(bias.grad.reshape(len(wanted), -1).sum(dim=1), wanted), name  # type: ignore[arg-type]


def similar(found: torch.Tensor, wanted: Any) -> bool:
    found, wanted = found.double().flatten(), wanted.flatten()
    cosine = torch.dot(found, wanted) / (found.norm() * wanted.norm())
    return bool(cosine > 0.9 and 0.6 < found.norm() / wanted.norm() < 1.6)


def test_the_cost_of_spikes_spares_them_before_the_output() -> None:
    graph = feed_forward(5)
    trained, _ = integers_of(graph, 6)
    x = window(graph, spikes(graph))
    before = {name: values.mean().item() for name, values in trained(x).items()}
    trained.spike_cost = 0.05
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.02)
    for _ in range(10):
        optimizer.zero_grad()
        trained(x)["out"].sum().mul(0).backward()
        optimizer.step()
    after = {name: values.mean().item() for name, values in trained(x).items()}
    assert after["conv"] < 0.5 * before["conv"]
    assert after["inner"] < 0.5 * before["inner"]
    trained.synapses.zero_grad()
    last = [weight for name, weight in trained.named_parameters() if "inner-out" in name]
    assert all(weight.grad is None or not weight.grad.any() for weight in last)


def test_a_weight_outside_the_levels_moves_only_back_inside() -> None:
    weight = torch.tensor([-9.0, -9.0, 0.2, 9.0, 9.0], requires_grad=True)
    levels = _Levels.apply(weight, 2.0, -4, 3)
    assert torch.equal(levels, torch.tensor([-4.0, -4.0, 0.0, 3.0, 3.0]))
    (levels * torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])).sum().backward()
    assert torch.equal(weight.grad, torch.tensor([0.0, -2.0, 2.0, 2.0, 0.0]))


def test_weights_that_several_levels_share_stay_shared() -> None:
    """A multi-level neuron becomes one population for each of its thresholds, all of one array of weights."""
    generator = torch.Generator().manual_seed(3)
    x = (torch.rand(6, 8, 1, 6, 6, generator=generator) < 0.5).double()
    made = settled(network("4C3-P2-12-3", (1, 6, 6), rule=MLF(), levels=[1.5], steps=6), x)
    graph = lower(to_nir(made, 1e-3, 6, 1, "count"), "net")
    inputs = {graph.inputs[0].name: x.transpose(0, 1).to(torch.uint8).numpy()}
    integer, report = quantize(graph, inputs, bits=5)
    trained = IntegerNetwork(report.graph, integer, report.scales, MLF())
    assert sum(weight.numel() for weight in trained.parameters()) == sum(w.numel() for w in made.parameters())
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
    trained(x.float())[trained.output].sum().backward()
    optimizer.step()
    run, exported = Reference(trained.export()).run(inputs), trained(x.float())
    for name, values in exported.items():
        assert torch.equal(values.transpose(0, 1).to(torch.uint8), run.spikes[name])


def test_graded_inputs_whose_sums_leave_24_bits_stay_exact() -> None:
    graph = one_population(np.random.default_rng(1).normal(0.2, 1.0, (6, 600)) / 400)
    graph = replace(graph, inputs=(replace(graph.inputs[0], message_bits=8),))
    rng = np.random.default_rng(2)
    some = rng.random((5, graph.steps, 600)) < 0.02
    inputs = {"in0": (some * rng.integers(0, 256, some.shape)).astype(np.uint8)}
    integer, report = quantize(graph, inputs)
    trained = IntegerNetwork(report.graph, integer, report.scales, STBP())
    assert trained._synapses("p0").dtype == torch.float64
    found = trained(torch.from_numpy(inputs["in0"]).float().transpose(0, 1))["out"]
    assert 0.05 < found.mean() < 0.8
    assert torch.equal(found.transpose(0, 1).to(torch.uint8), Reference(trained.export()).run(inputs).spikes["out"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"current_keep": np.full(12, 0.5) + np.linspace(0, 0.2, 12)}, "'inner' has a du for each neuron"),
        ({"voltage_keep": np.linspace(0.5, 0.9, 12)}, "'inner' has a dv for each neuron"),
    ],
)
def test_decays_of_single_neurons_are_refused(change: dict[str, np.ndarray], said: str) -> None:
    graph = feed_forward()
    inner = replace(graph.populations[1], neuron=replace(graph.populations[1].neuron, **change))
    with pytest.raises(QuantizationError, match=said):
        integers_of(replace(graph, populations=(graph.populations[0], inner, graph.populations[2])), 8)


def test_loops_and_neurons_of_another_rule_are_refused() -> None:
    with pytest.raises(QuantizationError, match="'inner' is in a loop"):
        integers_of(float_network(), 8)
    graph = feed_forward()
    first = replace(graph.populations[0], neuron=replace(graph.populations[0].neuron, reset="subtract"))
    with pytest.raises(RecipeError, match="reset to zero"):
        integers_of(replace(graph, populations=(first, *graph.populations[1:])), 8, TSSL())


# ---- in a run --------------------------------------------------------------------------------------------------------

RECIPE = """
name = "tuned"
[data]
set = "digits"
validation = 300
test = 300
[network]
architecture = "6C3-P2-10"
steps = 5
tau_mem = 5.0
tau_syn = 3.0
[training]
epochs = 6
batch_size = 50
learning_rate = 2e-2
[quantization]
weight_bits = 3
calibration_samples = 40
[quantization.fine_tuning]
epochs = 3
[chip]
name = "loihi"
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    place = tmp_path_factory.mktemp("tuned")
    (place / "tuned.toml").write_text(RECIPE)
    assert main(["train", str(place / "tuned.toml"), "-o", str(place / "run")]) == 0
    assert main(["export", str(place / "run")]) == 0
    return RunFolder.open(place / "run")


def accuracy(folder: RunFolder) -> float:
    trace = torch_backend.run(folder.graph, folder.test_inputs, "cpu")
    return float((decisions(folder.graph.readout, trace) == folder.data.test.labels).mean())


def test_fine_tuning_wins_back_what_few_bits_lose(run: RunFolder) -> None:
    """On the test set, which decides nothing: several points above post-training quantisation."""
    quantize_stage(run, Silent(), bits=2, fine_tuning_epochs=0)
    before = accuracy(run)
    assert "fine_tuning" not in run.result("quantize")
    quantize_stage(run, Silent(), bits=2)
    found, after = run.result("quantize"), accuracy(run)
    assert after > before + 0.03
    tuned = found["fine_tuning"]
    assert tuned["accuracy"] == max(epoch["validation_accuracy"] for epoch in tuned["history"])
    assert tuned["accuracy"] > tuned["start_accuracy"]
    assert len(tuned["history"]) == 3
    assert all(projection.weight_bits == 2 for projection in run.graph.projections)
    assert not list(run.path.glob("*fine-tuning*"))


def test_an_interrupted_fine_tuning_goes_on_to_the_same_graph(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_stage(run, Silent())
    history = run.result("quantize")["fine_tuning"]["history"]
    step, done = trainer._Training._step, 0

    def killed(self: Any, *arguments: Any) -> float:
        nonlocal done
        done += 1
        if done > 30:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(trainer._Training, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize_stage(run, Silent())
    monkeypatch.setattr(trainer._Training, "_step", step)
    assert len(list(run.path.glob("fine-tuning-*.pt"))) == 1
    assert quantize_stage(run, Silent()).fingerprint() == whole.fingerprint()
    assert run.result("quantize")["fine_tuning"]["history"] == history


def test_a_start_that_no_epoch_betters_is_kept(run: RunFolder) -> None:
    recipe = parse_recipe(RECIPE.replace("epochs = 3", "epochs = 1\nlearning_rate = 1e4"), "test")
    graph = lower(read_nir(run.nir_file), "tuned")
    integer, report = quantize(graph, run.encode(run.data.train.images[:20]), bits=8)
    trained = IntegerNetwork(report.graph, integer, report.scales, CSBP())
    start = trained.export()
    tuned = fine_tune(trained, recipe.with_fine_tuning(1), run.data)
    assert (tuned.best_epoch, tuned.accuracy) == (0, tuned.start_accuracy)
    assert tuned.graph.fingerprint() == start.fingerprint() != trained.export().fingerprint()


def test_the_api_quantises_and_trains_on_as_the_recipe_says(run: RunFolder, tmp_path: Path) -> None:
    trained = api.Network(run.trained(), run.data)
    graph = api.convert(trained, tmp_path / "again.nir")
    assert graph.fingerprint() == quantize_stage(run, Silent()).fingerprint()
