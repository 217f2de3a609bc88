"""The cost of a spike: an error of every spike before the output, which training raises from nothing."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from graph_strategies import one_thread  # noqa: F401
from network_examples import network, settled
from rule_windows import input_gradient, random_window

from spikeport.models.checkpoint import Trained
from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.datasets import Dataset, Split
from spikeport.models.networks import SpikingNetwork
from spikeport.models.recipe import parse_recipe
from spikeport.models.rules import CSBP, MLF, STBP, TSSL, RateBP, Rule, SpikeBP, window_compiled
from spikeport.models.trainer import train

CASES: dict[str, tuple[Rule, CubaLIF]] = {
    "csbp": (CSBP(), CubaLIF(3, 5, 0.7)),
    "csbp, shift": (CSBP("shift"), CubaLIF(3, 5, 0.7, "subtract")),
    "tssl": (TSSL(), CubaLIF(3, 5, 0.7)),
    "tssl, timing": (TSSL("timing"), CubaLIF(3, 5, 0.7)),
    "stbp": (STBP(), CubaLIF(2, 4, 0.7, "subtract")),
    "mlf": (MLF(), CubaLIF(1, 4 / 3, 0.6, levels=(1.6, 2.6))),
    "spike_bp": (SpikeBP(), CubaLIF(1, 2, 0.9)),
    "rate_bp": (RateBP(), CubaLIF(3, 5, 1)),
}
EACH_RULE = pytest.mark.parametrize(("rule", "neuron"), CASES.values(), ids=CASES.keys())


# --- A rule ----------------------------------------------------------------------------------------------------------


@EACH_RULE
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_the_gradient_is_that_of_the_errors_plus_the_cost(rule: Rule, neuron: CubaLIF, eager: bool) -> None:
    x, errors = random_window(0, 8, 60, scale=3)
    rule = replace(rule, eager=eager)
    found = input_gradient(x, errors, neuron, replace(rule, spike_cost=0.3))
    expected = input_gradient(x, errors + 0.3, neuron, rule)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    assert not torch.allclose(found, input_gradient(x, errors, neuron, rule))
    assert torch.equal(replace(rule, spike_cost=0.3)(x, neuron), rule(x, neuron))  # the same spikes


@EACH_RULE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_compiled_window_adds_the_cost_as_the_eager_one_does(
    rule: Rule, neuron: CubaLIF, dtype: torch.dtype
) -> None:
    x, errors = (each.to(dtype) for each in random_window(1, 8, 60, scale=3))
    costly = replace(rule, spike_cost=0.3)
    assert window_compiled.handles(x, costly)
    wide = torch.promote_types(dtype, torch.float32)
    found = input_gradient(x, errors, neuron, costly)
    expected = input_gradient(x.to(wide), errors.to(wide), neuron, replace(costly, eager=True))
    assert found.dtype == dtype
    largest = expected.abs().amax(dim=0)
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 1e-2}[dtype]
    assert bool(((found.to(wide) - expected).abs() <= tolerance * (largest + 1e-3)).all())


@EACH_RULE
def test_a_small_cost_is_not_lost_beside_large_errors_in_bfloat16(rule: Rule, neuron: CubaLIF) -> None:
    """bfloat16 has no number between 1 and 1 + 1/128: the cost is added before the result is rounded to it."""
    x, errors = (each.bfloat16() for each in random_window(1, 8, 2000, scale=3))
    costly = replace(rule, spike_cost=1e-3)
    found = input_gradient(x, errors, neuron, costly)
    expected = input_gradient(x.float(), errors.float(), neuron, costly).bfloat16()
    without = input_gradient(x.float(), errors.float(), neuron, rule).bfloat16()
    far = expected != without
    assert int(far.sum()) > 500
    assert float((found == expected)[far].double().mean()) > 0.9


def test_the_cost_of_a_rate_is_that_of_its_spikes() -> None:
    """A mean of 1 over a window are as many spikes as it has steps."""
    rule, neuron = CASES["rate_bp"]
    assert isinstance(rule, RateBP)
    means, errors = random_window(2, 1, 50)

    def gradient(rule: RateBP, error: torch.Tensor) -> torch.Tensor:
        x = means[0].clone().requires_grad_()
        (found,) = torch.autograd.grad(rule.rate(x, x.detach().sigmoid(), neuron, 8), x, error)
        return found

    found = gradient(replace(rule, spike_cost=0.3), errors[0])
    torch.testing.assert_close(found, gradient(rule, errors[0] + 8 * 0.3))
    assert not torch.allclose(found, gradient(rule, errors[0]))


# --- A network -------------------------------------------------------------------------------------------------------


def gradients(made: SpikingNetwork, x: torch.Tensor, cost: float, written_out: bool) -> dict[str, torch.Tensor]:
    """dL/dw of a sum over the output, with the cost in the network or as a part of the loss."""
    made.spike_cost = 0.0 if written_out else cost
    found = made(x)
    loss = (found[made.output] * torch.linspace(-1, 1, 3)).sum()
    if written_out:
        loss = loss + cost * torch.stack([s.sum() for name, s in found.items() if name != made.output]).sum()
    made.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in made.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("output", ["spikes", "membrane"])
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("4C3-P2-8-3", {}), ("4C3p1-R4-A-3", {"norm": "tdbn"}), ("4C3-P2-8-3", {"levels": (1.5,)})],
    ids=["plain", "residual", "levels"],
)
@pytest.mark.parametrize("rule", [CSBP(), STBP()], ids=["csbp", "stbp"])
def test_the_cost_is_that_of_every_spike_before_the_output(
    architecture: str, settings: dict[str, object], output: str, rule: Rule
) -> None:
    x = torch.randint(0, 2, (5, 4, 1, 6, 6), generator=torch.Generator().manual_seed(0)).double()
    made = settled(network(architecture, (1, 6, 6), 3, rule, **({"threshold": 0.4, "output": output} | settings)), x)
    assert all(bool(spikes.any()) for spikes in made(x).values())
    found, expected = gradients(made, x, 0.2, False), gradients(made, x, 0.2, True)
    without = gradients(made, x, 0.0, False)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
    *hidden, last = found
    assert all(not torch.allclose(found[name], without[name]) for name in hidden)
    assert torch.equal(found[last], without[last])  # what the output's spikes do is the loss's matter alone


def test_a_network_of_rates_pays_for_the_spikes_before_its_output() -> None:
    made = network("12-3", (6,), 3, RateBP(), threshold=0.4).double()
    x = torch.randint(0, 2, (5, 4, 6), generator=torch.Generator().manual_seed(0)).double()
    found, without = gradients(made, x, 0.2, False), gradients(made, x, 0.0, False)
    (hidden, last) = found
    mean = (x.mean(dim=0) @ made.maps[hidden.split(".")[1]].weight.T).detach()
    slope = RateBP().slope(mean, made.neuron, 5)  # dL/dw = sum over samples of cost steps r'(I) times the mean input
    expected = (0.2 * 5 * slope).T @ x.mean(dim=0)
    torch.testing.assert_close(found[hidden] - without[hidden], expected)
    assert torch.equal(found[last], without[last])


# --- Training --------------------------------------------------------------------------------------------------------

SHAPE = (1, 6, 6)
TEXT = """
name = "bars"
seed = 7
[data]
set = "digits"
validation = 30
[network]
architecture = "6C3-P2-3"
steps = 4
tau_mem = 5.0
tau_syn = 2.0
[training]
epochs = 6
batch_size = 16
learning_rate = 2e-2
spike_cost = 0.0
"""


def bars(n: int, seed: int) -> Split:
    """A bright bar at the top, in the middle or at the bottom of a noisy image: which one is the class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 3)
    images = rng.uniform(0, 0.4, (n, *SHAPE)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] += 0.6
    return Split(images, labels)


DATA = Dataset("bars", ("top", "middle", "bottom"), bars(90, 0), bars(30, 1), bars(30, 2))


@cache
def trained(cost: float, learning_rate: str = "2e-2", rule: str = "csbp") -> Trained:
    text = TEXT.replace("spike_cost = 0.0", f"spike_cost = {cost}").replace("2e-2", learning_rate)
    return train(parse_recipe(f'{text}[rule]\nname = "{rule}"', "bars"), DATA, device="cpu")


def test_the_cost_rises_from_nothing_over_the_steps_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = []
    forward = SpikingNetwork.forward

    def watched(self: SpikingNetwork, x: torch.Tensor, output_alone: bool = False) -> dict[str, torch.Tensor]:
        if self.training and torch.is_grad_enabled() and x.shape[1] > 2:  # no probe of the memory
            costs.append(self.spike_cost)
        return forward(self, x, output_alone)

    monkeypatch.setattr(SpikingNetwork, "forward", watched)
    trained.__wrapped__(0.6)
    steps = 6 * 6
    assert costs[0] == 0.0
    assert costs[-steps:] == pytest.approx([0.6 * step / steps for step in range(steps)])


@pytest.mark.parametrize(("rule", "cost"), [("csbp", 2e-2), ("tssl", 2e-2), ("stbp", 5e-3), ("rate_bp", 2e-2)])
def test_a_network_that_pays_for_its_spikes_fires_less_and_learns_as_well(rule: str, cost: float) -> None:
    plain, thrifty = trained(0.0, rule=rule).history[-1], trained(cost, rule=rule).history[-1]
    assert thrifty.spikes_per_sample < 0.8 * plain.spikes_per_sample
    assert thrifty.validation_accuracy >= plain.validation_accuracy - 0.1
    assert plain.validation_accuracy > 0.6


def test_the_loss_that_is_shown_is_without_the_cost() -> None:
    plain, thrifty = trained(0.0, learning_rate="1e-12"), trained(2e-2, learning_rate="1e-12")
    assert thrifty.history == plain.history
