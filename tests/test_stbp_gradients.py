"""STBP's and MLF's backward passes against automatic differentiation of the unrolled neuron, and MLF by hand.

The oracle is the neuron's loop as torch operations, with a spike that is a step forwards and a smooth F backwards. The
surrogates of the rule are the derivatives of these:

    rectangular  F = clamp(x / w + 1/2, 0, 1)
    triangular   F = 1/2 + y - y |y| / 2,  y = clamp(x / w, -1, 1)
    arctan       F = arctan(pi x / w) / pi + 1/2
    logistic     F = 1 / (1 + exp(-x / w))
"""

import math
from typing import Any, Literal, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_windows import gradient, input_gradient, random_window

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.rules import MLF, STBP
from spikeport.models.rules.stbp import Surrogate, surrogate_slope

SURROGATES = get_args(Surrogate)
Reset = Literal["zero", "subtract"]
EAGER = pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])


# --- The oracle ------------------------------------------------------------------------------------------------------


def smooth_step(x: torch.Tensor, surrogate: Surrogate, width: float) -> torch.Tensor:
    """F, which rises from 0 to 1."""
    match surrogate:
        case "rectangular":
            return (x / width + 0.5).clamp(0, 1)
        case "triangular":
            y = (x / width).clamp(-1, 1)
            return 0.5 + y - y * y.abs() / 2
        case "arctan":
            return torch.arctan(math.pi * x / width) / math.pi + 0.5
        case "logistic":
            return torch.sigmoid(x / width)


class _Spike(torch.autograd.Function):
    """1 where x > 0, differentiated as F."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, surrogate: Surrogate, width: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.settings = surrogate, width
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            (slope,) = torch.autograd.grad(smooth_step(x, *ctx.settings).sum(), x)
        return gradients[0] * slope, None, None


def unrolled(x: torch.Tensor, neuron: CubaLIF, rule: STBP) -> torch.Tensor:
    """The spikes of a window, every operation of which is differentiated by torch."""
    u = torch.zeros_like(x[0])
    membranes = [torch.zeros_like(x[0]) for _ in neuron.thresholds]
    sent = []
    for received in x:
        u = (1 - 1 / neuron.tau_syn) * u + received / neuron.tau_syn
        total = torch.zeros_like(u)
        for level, threshold in enumerate(neuron.thresholds):
            p = (1 - 1 / neuron.tau_mem) * membranes[level] + u
            s = _Spike.apply(p - threshold, rule.surrogate, rule.width)
            total = total + s
            seen = s if rule.through_reset else s.detach()
            membranes[level] = p * (1 - seen) if neuron.reset == "zero" else p - threshold * seen
        sent.append(total)
    return torch.stack(sent)


def assert_differentiates_as_unrolled(x: torch.Tensor, errors: torch.Tensor, neuron: CubaLIF, rule: STBP) -> None:
    values = x.clone().requires_grad_()
    spikes = unrolled(values, neuron, rule)
    assert torch.equal(rule(x, neuron), spikes.detach())
    (expected,) = torch.autograd.grad(spikes, values, errors)
    torch.testing.assert_close(input_gradient(x, errors, neuron, rule), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.oracle
@given(
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 12),
    tau_syn=st.floats(1, 8),
    tau_mem=st.floats(1, 20) | st.just(math.inf),
    threshold=st.floats(0.2, 2),
    levels=st.sampled_from([(), (2.5,), (2.1, 3.4)]),
    reset=st.sampled_from(get_args(Reset)),
    surrogate=st.sampled_from(SURROGATES),
    width=st.floats(0.2, 3),
    through_reset=st.booleans(),
    eager=st.booleans(),
)
def test_the_rule_is_the_derivative_of_the_unrolled_neuron(
    seed: int,
    steps: int,
    tau_syn: float,
    tau_mem: float,
    threshold: float,
    levels: tuple[float, ...],
    reset: Reset,
    surrogate: Surrogate,
    width: float,
    through_reset: bool,
    eager: bool,
) -> None:
    x, errors = random_window(seed, steps, 7)
    neuron = CubaLIF(tau_syn, tau_mem, threshold, reset, levels)
    assert_differentiates_as_unrolled(x, errors, neuron, STBP(surrogate, width, through_reset, eager=eager))


@pytest.mark.oracle
@pytest.mark.parametrize("through_reset", [True, False])
@pytest.mark.parametrize("reset", get_args(Reset))
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_busy_population_with_every_switch(surrogate: Surrogate, reset: Reset, through_reset: bool) -> None:
    x, errors = random_window(1, 20, 50, scale=3)
    neuron = CubaLIF(2, 4, 0.8, reset)
    rule = STBP(surrogate, 1.3, through_reset)
    assert 0.15 < float(rule(x, neuron).mean()) < 0.6
    assert_differentiates_as_unrolled(x, errors, neuron, rule)
    other = input_gradient(x, errors, neuron, STBP(surrogate, 1.3, not through_reset))
    assert float((other - input_gradient(x, errors, neuron, rule)).abs().max()) > 0.01


@pytest.mark.oracle
@pytest.mark.parametrize("reset", get_args(Reset))
@pytest.mark.parametrize("eager", [True, False])
def test_mlf_is_the_derivative_of_its_unrolled_levels(reset: Reset, eager: bool) -> None:
    x, errors = random_window(2, 10, 50, scale=3)
    assert_differentiates_as_unrolled(x, errors, CubaLIF(1, 4 / 3, 0.6, reset, (1.6, 2.6)), MLF(eager=eager))


# --- The surrogates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0.2, 1.0, 2.5])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_surrogate_has_unit_area(surrogate: Surrogate, width: float) -> None:
    bounds = torch.linspace(-400 * width, 400 * width, 800_001, dtype=torch.float64)
    middles = (bounds[1:] + bounds[:-1]) / 2
    area = float(surrogate_slope(middles, surrogate, width).sum() * (bounds[1] - bounds[0]))
    # beyond 400 widths the arctan keeps 2 / (400 pi^2)
    assert area == pytest.approx(1 - (2 / (400 * math.pi**2) if surrogate == "arctan" else 0), abs=1e-6)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_surrogate_is_the_slope_of_its_smooth_step(surrogate: Surrogate) -> None:
    x = torch.linspace(-3, 3, 1000, dtype=torch.float64)
    numeric = (smooth_step(x + 1e-6, surrogate, 0.7) - smooth_step(x - 1e-6, surrogate, 0.7)) / 2e-6
    torch.testing.assert_close(surrogate_slope(x, surrogate, 0.7), numeric, rtol=0, atol=1e-5)


def test_a_surrogate_does_not_overflow_far_from_the_threshold() -> None:
    far = torch.tensor([-1e30, 1e30])
    for surrogate in SURROGATES:
        assert surrogate_slope(far, surrogate, 0.1).tolist() == [0, 0]


# --- By hand ---------------------------------------------------------------------------------------------------------

PUBLISHED = CubaLIF(tau_syn=1, tau_mem=4 / 3, threshold=0.6, levels=(1.6, 2.6))  # a quarter of the membrane is kept
# The membrane before reset, the spikes, and the steps within half a unit of the threshold, for x = 0.4, 1.4, 2.4:
#   0.6   u = 0.4, 1.5, 2.4      s = 0, 1, 1    f' = 1, 0, 0
#   1.6   u = 0.4, 1.5, 2.775    s = 0, 0, 1    f' = 0, 1, 0
#   2.6   u = 0.4, 1.5, 2.775    s = 0, 0, 1    f' = 0, 0, 1
RISING = [0.4, 1.4, 2.4]


@EAGER
@pytest.mark.parametrize(
    ("level", "sent", "expected"),
    [
        (0.6, [0, 1, 1], [1, 0, 0]),  # from B = 1, 2, 4; neither spike lets anything through
        (1.6, [0, 0, 1], [0.5, 2, 0]),  # a quarter of the error of step 1 leaks back to step 0
        (2.6, [0, 0, 1], [0.25, 1, 4]),  # and here of step 2 to 1 to 0
    ],
)
def test_one_level_of_the_published_neuron_by_hand(
    level: float, sent: list[float], expected: list[float], eager: bool
) -> None:
    spikes, found = gradient(RISING, [1, 2, 4], CubaLIF(1, 4 / 3, level), STBP(eager=eager))
    assert spikes == sent
    assert found == pytest.approx(expected)


@EAGER
def test_the_published_neuron_sends_the_sum_of_its_levels_by_hand(eager: bool) -> None:
    spikes, found = gradient(RISING, [1, 2, 4], PUBLISHED, MLF(eager=eager))
    assert spikes == [0, 1, 3]
    assert found == pytest.approx([1.75, 3, 4])


@EAGER
def test_the_error_through_the_reset_of_a_level_by_hand(eager: bool) -> None:
    # x = 1.3, 1.7, 2.2. Level 1.6: u = 1.3, 2.025, 2.2 with s = 0, 1, 1 and f' = 1, 1, 0; lam = 0 behind the last
    # spike, so step 1 has 2 f' = 2, and lam = 1/2: step 0 has (1 - 1.3/2) f' + 1/2 = 0.85.
    # Level 2.6: u = 1.3, 2.025, 2.70625 with s = 0, 0, 1 and f' = 0, 0, 1: 1/4, 1, 4. Level 0.6: f' = 0 throughout.
    spikes, found = gradient([1.3, 1.7, 2.2], [1, 2, 4], PUBLISHED, MLF(eager=eager))
    assert spikes == [1, 2, 3]
    assert found == pytest.approx([1.1, 3, 4])


@EAGER
def test_the_reset_passes_a_spike_s_error_by_hand(eager: bool) -> None:
    # p = v/2 + x, threshold 1: x = 1.2, 0.8 gives p = 1.2, 0.8 (reset to zero): s = 1, 0, f' = 1, 1.
    # Step 1: B = 2. lam = 1. Step 0: (1 - 1 * 1.2) f' + 1 * (1 - 1) = -0.2; without the reset's path 1.
    neuron = CubaLIF(1, 2, 1)
    assert gradient([1.2, 0.8], [1, 2], neuron, STBP(eager=eager)) == ([1, 0], pytest.approx([-0.2, 2]))
    assert gradient([1.2, 0.8], [1, 2], neuron, STBP(through_reset=False, eager=eager))[1] == pytest.approx([1, 2])
    # By subtraction v = 0.2 and p = 0.9: step 0: (1 - 1 * 1) f' + 1 = 1; without the reset's path 1 + 1.
    neuron = CubaLIF(1, 2, 1, "subtract")
    assert gradient([1.2, 0.8], [1, 2], neuron, STBP(eager=eager)) == ([1, 0], pytest.approx([1, 2]))
    assert gradient([1.2, 0.8], [1, 2], neuron, STBP(through_reset=False, eager=eager))[1] == pytest.approx([2, 2])


# --- MLF -------------------------------------------------------------------------------------------------------------


@EAGER
def test_the_published_neuron_sends_none_to_three_spikes_a_step(eager: bool) -> None:
    x, _ = random_window(3, 20, 100, scale=3)
    assert MLF(eager=eager)(x, PUBLISHED).unique().tolist() == [0, 1, 2, 3]
    two = CubaLIF(1, 4 / 3, 0.6, levels=(1.6,))
    assert MLF(eager=eager)(x, two).unique().tolist() == [0, 1, 2]


def test_mlf_is_stbp_with_a_rectangle_of_width_one_through_the_reset() -> None:
    x, errors = random_window(4, 10, 50, scale=3)
    expected = input_gradient(x, errors, PUBLISHED, STBP("rectangular", 1.0, True))
    assert torch.equal(input_gradient(x, errors, PUBLISHED, MLF()), expected)
