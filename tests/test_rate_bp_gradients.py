"""Rate-based backpropagation: the simulated rate, the curve fitted to it, and errors by the curve's slope."""

import itertools
import math
from typing import Literal

import numpy as np
import pytest
import torch
from rule_windows import input_gradient, random_window

from spikeport.models.cuba_lif import CubaLIF, simulate
from spikeport.models.rules import RateBP
from spikeport.models.rules.rate_bp import fit_curves, simulated_rates

Reset = Literal["zero", "subtract"]
LEVELS = (1.6, 2.6)


def fitted_rate(mean_input: torch.Tensor, neuron: CubaLIF, steps: int) -> torch.Tensor:
    return torch.stack([curve.rate(mean_input) for curve in fit_curves(neuron, steps)]).sum(dim=0)


# --- The simulated rate ----------------------------------------------------------------------------------------------


def constant_input_rate(current: float, neuron: CubaLIF) -> float:
    """Spikes a step under a constant input, reset to zero: after n steps from rest the membrane is at
    I (1 - alpha^n) / (1 - alpha) = I tau (1 - alpha^n), and it fires at the first n that takes it above the threshold.
    """
    ratio = neuron.threshold / (current * neuron.tau_mem)
    return 0.0 if ratio >= 1 else 1 / (1 + math.floor(math.log(1 - ratio) / math.log(neuron.voltage_keep)))


@pytest.mark.oracle
@pytest.mark.parametrize(("tau", "steps"), [(2, 50), (5, 100), (20, 1000)])
def test_under_constant_input_a_neuron_fires_at_the_rate_of_the_formula(tau: float, steps: int) -> None:
    neuron = CubaLIF(1, tau, 1)
    currents = torch.linspace(0.3, 21.3, 300, dtype=torch.float64) / tau
    found = simulate(currents.expand(steps, -1), neuron).spikes.mean(dim=0)
    expected = np.array([constant_input_rate(float(current), neuron) for current in currents])
    assert (expected == 0).any()
    assert (expected == 1).any()
    assert np.abs(found.numpy() - expected).max() < 1 / steps
    assert torch.equal(RateBP()(currents.expand(steps, -1), neuron).mean(dim=0), found)


@pytest.mark.oracle
def test_the_rates_that_the_curve_is_fitted_to_are_those_of_the_formula_without_noise() -> None:
    neuron = CubaLIF(1, 5, 1)
    inputs, (found,) = simulated_rates(neuron, 100, noise=0.0)
    expected = np.array([constant_input_rate(float(i), neuron) if i > 0 else 0.0 for i in inputs])
    assert np.abs(found.numpy() - expected).max() < 0.01


# --- The fitted curve ------------------------------------------------------------------------------------------------

STEPS = 10
"""Of most windows here: a neuron is fitted once for each length."""

NEURONS = {
    "filtered": CubaLIF(3, 5, 1),
    "subtracting": CubaLIF(3, 5, 1, "subtract"),
    "unfiltered": CubaLIF(1, 2, 0.5),
    "leakless": CubaLIF(1, math.inf, 1),
    "leakless subtracting": CubaLIF(1, math.inf, 30, "subtract"),
    "multi-level": CubaLIF(1, 4 / 3, 0.6, "zero", LEVELS),
    "multi-level subtracting": CubaLIF(1, 4 / 3, 0.6, "subtract", LEVELS),
}


@pytest.mark.parametrize(
    ("name", "steps"),
    [*((name, STEPS) for name in NEURONS), *itertools.product(("filtered", "multi-level subtracting"), (5, 20))],
)
def test_the_curve_is_within_one_spike_a_window_of_the_simulated_rate(name: str, steps: int) -> None:
    neuron = NEURONS[name]
    inputs, rates = simulated_rates(neuron, steps)
    simulated = rates.sum(dim=0)
    # the inputs reach from silence to nearly every spike that a filter which rises from rest leaves
    assert float(simulated.min()) < 0.02 * len(rates)
    assert float(simulated.max()) > 0.85 * len(rates)
    assert float((fitted_rate(inputs, neuron, steps) - simulated).abs().max()) < 1 / steps


def test_the_curve_holds_for_inputs_that_it_was_not_fitted_to() -> None:
    neuron = NEURONS["filtered"]
    inputs = torch.linspace(-1, 3, 41, dtype=torch.float64)
    noise = torch.randn(STEPS, 2000, 41, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    measured = simulate(inputs + noise, neuron).spikes.mean(dim=(0, 1))
    assert float((fitted_rate(inputs, neuron, STEPS) - measured).abs().max()) < 0.05


@pytest.mark.parametrize(("neuron", "steps"), [(CubaLIF(8, 64, 1), 1), (CubaLIF(20, 1, 1), 2), (CubaLIF(3, 5, 1), 1)])
def test_windows_too_short_to_fire_much_have_a_curve_too(neuron: CubaLIF, steps: int) -> None:
    inputs, rates = simulated_rates(neuron, steps)
    fitted = fitted_rate(inputs, neuron, steps)
    assert float((fitted - rates[0]).abs().max()) < 0.02
    assert bool(RateBP().slope(inputs, neuron, steps).isfinite().all())


@pytest.mark.parametrize("neuron", NEURONS.values(), ids=NEURONS.keys())
def test_the_slope_is_that_of_the_curve(neuron: CubaLIF) -> None:
    inputs = neuron.threshold * torch.linspace(-3, 8, 500, dtype=torch.float64)
    step = 1e-5 * neuron.threshold
    numeric = (fitted_rate(inputs + step, neuron, STEPS) - fitted_rate(inputs - step, neuron, STEPS)) / (2 * step)
    found = RateBP(slope_limit=math.inf).slope(inputs, neuron, STEPS)
    torch.testing.assert_close(found, numeric, rtol=0, atol=1e-6)
    assert float(found.max()) > 0.1 / neuron.threshold


def test_the_slope_is_limited_in_units_of_the_threshold() -> None:
    inputs = torch.linspace(-1, 3, 100, dtype=torch.float64)
    for threshold in (0.5, 1.0, 4.0):
        neuron = CubaLIF(1, 5, threshold)
        free = RateBP(math.inf).slope(inputs * threshold, neuron, STEPS)
        limited = RateBP(0.3).slope(inputs * threshold, neuron, STEPS)
        assert float(free.max()) > 0.4 / threshold
        assert torch.equal(limited, free.clamp(max=0.3 / threshold))


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("neuron", NEURONS.values(), ids=NEURONS.keys())
def test_with_rates_for_spikes_the_gradients_of_a_network_are_finite_differences(neuron: CubaLIF) -> None:
    """Two layers in which each neuron sends r(I) instead of its measured mean spikes."""
    steps, rule = STEPS, RateBP(slope_limit=math.inf)
    generator = torch.Generator().manual_seed(0)
    received = torch.rand(3, 6, generator=generator, dtype=torch.float64)
    target = torch.rand(3, 2, generator=generator, dtype=torch.float64)
    first = neuron.threshold * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    second = neuron.threshold * torch.randn(2, 5, generator=generator, dtype=torch.float64)

    def loss(weights: list[torch.Tensor], *, by_rule: bool) -> torch.Tensor:
        sent = received
        for w in weights:
            mean_input = sent @ w.T
            mean_spikes = fitted_rate(mean_input, neuron, steps)
            sent = rule.rate(mean_input, mean_spikes.detach(), neuron, steps) if by_rule else mean_spikes
        return (sent - target).square().sum()

    weights = [first.requires_grad_(), second.requires_grad_()]
    found = torch.autograd.grad(loss(weights, by_rule=True), weights)
    step = 1e-5 * neuron.threshold
    with torch.no_grad():
        for layer, gradient in enumerate(found):
            numeric = torch.empty_like(gradient)
            for index in np.ndindex(*gradient.shape):
                ends = []
                for sign in (1, -1):
                    moved = [w.clone() for w in weights]
                    moved[layer][index] += sign * step
                    ends.append(float(loss(moved, by_rule=False)))
                numeric[index] = (ends[0] - ends[1]) / (2 * step)
            assert float(numeric.abs().max()) * neuron.threshold > 1e-3
            torch.testing.assert_close(gradient, numeric, rtol=0, atol=1e-6)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("neuron", NEURONS.values(), ids=NEURONS.keys())
def test_a_window_and_its_means_give_the_same_gradients(neuron: CubaLIF, eager: bool) -> None:
    """A loss of mean spikes through two layers: over all steps at once, and with the errors of means alone."""
    steps, rule = STEPS, RateBP(eager=eager)
    received, target = random_window(1, steps, 4, 6)
    generator = torch.Generator().manual_seed(2)
    first = neuron.threshold * torch.randn(5, 6, generator=generator, dtype=torch.float64)
    second = neuron.threshold * torch.randn(3, 5, generator=generator, dtype=torch.float64)
    weights = [first.requires_grad_(), second.requires_grad_()]

    windows = received
    sent = received.mean(dim=0)
    for w in weights:
        windows = rule(windows @ w.T, neuron)
        sent = rule.rate(sent @ w.T, windows.mean(dim=0).detach(), neuron, steps)
    assert torch.equal(sent, windows.mean(dim=0))

    wanted = target[0, :, :3]
    by_steps = torch.autograd.grad((windows.mean(dim=0) - wanted).square().sum(), weights)
    by_means = torch.autograd.grad((sent - wanted).square().sum(), weights)
    for found, expected in zip(by_steps, by_means, strict=True):
        assert float(expected.abs().max()) > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_every_step_of_a_window_has_the_same_error() -> None:
    x, errors = random_window(3, STEPS, 5)
    neuron = CubaLIF(3, 5, 1)
    found = input_gradient(x, errors, neuron, RateBP())
    expected = RateBP().slope(x.mean(dim=0), neuron, STEPS) * errors.mean(dim=0)
    torch.testing.assert_close(found, expected.expand(STEPS, -1), rtol=1e-12, atol=0)
