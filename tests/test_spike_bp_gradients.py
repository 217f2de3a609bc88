"""Spike-based backpropagation: its forward pass, its one slope for a window, and where its errors go.

The oracle is the published loop, differentiated by torch: errors enter where a neuron fires, the reset ends their way,
and the leak is passed as it were 1. Each neuron's gradient is then multiplied by the slope of its whole window.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_windows import gradient, input_gradient, random_window

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.errors import RecipeError
from spikeport.models.rules import SpikeBP
from spikeport.models.rules.spike_bp import activation_slope

EAGER = pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])


# --- The oracle ------------------------------------------------------------------------------------------------------


class _Spike(torch.autograd.Function):
    """1 where v > threshold, with a slope of 1 there and none elsewhere."""

    @staticmethod
    def forward(ctx: Any, v: torch.Tensor, threshold: float) -> torch.Tensor:
        spikes = (v > threshold).to(v.dtype)
        ctx.save_for_backward(spikes)
        return spikes

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None


def published_loop(x: torch.Tensor, leak: float, threshold: float) -> torch.Tensor:
    v = torch.zeros_like(x[0])
    out = []
    for received in x:
        v = v + received
        spikes = _Spike.apply(v, threshold)
        out.append(spikes)
        v = torch.where(spikes.bool(), 0.0, v)
        v = v + (leak * v - v).detach()
    return torch.stack(out)


def window_slope(spikes: list[float], leak: float, threshold: float) -> float:
    fired = [t for t, s in enumerate(spikes) if s]
    remaining = sum(leak ** (len(spikes) - 1 - t) for t in fired)
    correction = math.log(leak) * remaining / max(len(fired), 1)
    return ((1 if remaining > 1e-3 else 0) + correction) / threshold


@pytest.mark.oracle
@given(
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 30),
    tau_mem=st.floats(1.2, 100) | st.just(math.inf),
    threshold=st.floats(0.2, 3),
    eager=st.booleans(),
)
def test_spikes_and_errors_are_those_of_the_published_loop(
    seed: int, steps: int, tau_mem: float, threshold: float, eager: bool
) -> None:
    x, errors = random_window(seed, steps, 6)
    neuron = CubaLIF(1, tau_mem, threshold)
    rule = SpikeBP(eager=eager)
    values = x.clone().requires_grad_()
    spikes = published_loop(values, neuron.voltage_keep, threshold)
    assert torch.equal(rule(x, neuron), spikes.detach())
    (passed,) = torch.autograd.grad(spikes, values, errors)
    slopes = [window_slope(train.tolist(), neuron.voltage_keep, threshold) for train in spikes.T]
    expected = passed * torch.tensor(slopes, dtype=x.dtype)
    torch.testing.assert_close(input_gradient(x, errors, neuron, rule), expected, rtol=1e-12, atol=1e-12)


# --- By hand ---------------------------------------------------------------------------------------------------------

# leak 1/2, threshold 1: v = 0.8, 0.4 + 0.8 (fires), 0.3, 0.15 + 1 (fires), 0.2
INPUTS, ERRORS, SPIKES = [0.8, 0.8, 0.3, 1, 0.2], [1, 2, 3, 5, 7], [0, 1, 0, 1, 0]
# Two spikes, 3 and 1 steps before the end: f = 1/8 + 1/2, and a' = 1 + ln(1/2) (5/8) / 2 = 1 - 0.2166085
CORRECTED = 0.7833915


@EAGER
def test_every_input_takes_the_error_of_the_next_spike_and_those_after_the_last_none(eager: bool) -> None:
    spikes, found = gradient(INPUTS, ERRORS, CubaLIF(1, 2, 1), SpikeBP(eager=eager))
    assert spikes == SPIKES
    assert found == pytest.approx([2 * CORRECTED, 2 * CORRECTED, 5 * CORRECTED, 5 * CORRECTED, 0], rel=1e-6)
    assert found[4] == 0


@EAGER
def test_without_the_correction_the_slope_is_that_of_a_neuron_without_leak(eager: bool) -> None:
    _, found = gradient(INPUTS, ERRORS, CubaLIF(1, 2, 1), SpikeBP(leak_correction=False, eager=eager))
    assert found == pytest.approx([2, 2, 5, 5, 0])
    # without leak: v = 0.8, 1.6 (fires), 0.3, 1.3 (fires), 0.2, and ln(1) = 0
    spikes, found = gradient(INPUTS, ERRORS, CubaLIF(1, math.inf, 1), SpikeBP(eager=eager))
    assert spikes == SPIKES
    assert found == pytest.approx([2, 2, 5, 5, 0])


@EAGER
def test_the_slope_is_that_of_the_input_in_thresholds(eager: bool) -> None:
    spikes, found = gradient([4 * x for x in INPUTS], ERRORS, CubaLIF(1, 2, 4), SpikeBP(eager=eager))
    assert spikes == SPIKES
    assert found == pytest.approx([error * CORRECTED / 4 for error in (2, 2, 5, 5, 0)], rel=1e-6)


@EAGER
def test_a_neuron_that_never_fired_has_no_error(eager: bool) -> None:
    assert gradient([0.5, 0.2, 0.3], [1, 2, 4], CubaLIF(1, 2, 1), SpikeBP(eager=eager)) == ([0, 0, 0], [0, 0, 0])


@EAGER
def test_a_spike_that_has_leaked_below_a_thousandth_counts_as_none(eager: bool) -> None:
    for steps, slope in ((10, 1 - math.log(2) / 2**9), (11, -math.log(2) / 2**10)):
        spikes, found = gradient([2] + [0] * (steps - 1), [1.0] * steps, CubaLIF(1, 2, 1), SpikeBP(eager=eager))
        assert sum(spikes) == spikes[0] == 1
        assert found == pytest.approx([slope] + [0] * (steps - 1))


@given(st.lists(st.booleans(), min_size=1, max_size=120))
def test_at_the_published_leak_the_correction_takes_at_most_one_percent(train: list[bool]) -> None:
    spikes = torch.tensor(train, dtype=torch.float64)[:, None]
    slope = float(activation_slope(spikes, 0.99, 1.0))
    assert slope == pytest.approx(window_slope(spikes[:, 0].tolist(), 0.99, 1.0))
    assert slope == 0 if not any(train) else 0.98994 <= slope <= 1  # ln(0.99) = -0.010050


# --- What it is defined for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("neuron", "message"),
    [
        (CubaLIF(2, 5), "network.tau_syn = 1"),
        (CubaLIF(1, 5, reset="subtract"), 'network.reset = "zero"'),
        (CubaLIF(1, 1), "network.tau_mem"),
    ],
)
def test_it_is_refused_where_it_is_not_defined(neuron: CubaLIF, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SpikeBP().check(neuron)
    SpikeBP().check(CubaLIF(1, 5))
