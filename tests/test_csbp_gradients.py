"""CSBP's gradients: exact in continuous time, and reached as the step shrinks.

The oracle is a LIF neuron in continuous time, simulated event by event with spike times found by bisection:

    tau_syn I' = -I + tau_syn sum_i w_i delta(t - t_i),   V' = -V / tau_mem + I,   V -> 0 where V reaches the threshold

At a crossing V equals the threshold, so reset to zero and reset by subtraction are the same trajectory here. Their
recursions differ (one error per neighbour, one per every earlier spike) and must give the same numbers.
"""

import math
from functools import cache
from typing import Literal, NamedTuple, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_windows import gradient

from spikeport.models.cuba_lif import CubaLIF, filter_errors, filter_spikes, simulate
from spikeport.models.rules.csbp import CSBP, spike_time_errors

TAU_MEM, TAU_SYN, THRESHOLD = 10.0, 4.0, 1.0
HORIZON = 50.0
INPUTS = 40

Reset = Literal["zero", "subtract"]
RESETS = get_args(Reset)


# --- The oracle ------------------------------------------------------------------------------------------------------


class Scenario(NamedTuple):
    """Input spikes of one neuron: a weight and a time each."""

    weights: np.ndarray
    times: np.ndarray


def scenario(seed: int) -> Scenario:
    """40 input spikes at distinct multiples of 0.1, so that every step h used below has them on its grid."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(-0.2, 0.35, INPUTS)
    return Scenario(weights, np.sort(rng.choice(400, INPUTS, replace=False)) / 10)


def kernel(s: np.ndarray) -> np.ndarray:
    """Membrane response to one input spike of weight 1, 0 before it."""
    s = np.maximum(s, 0)
    return TAU_MEM * TAU_SYN / (TAU_MEM - TAU_SYN) * (np.exp(-s / TAU_MEM) - np.exp(-s / TAU_SYN))


def kernel_slope(s: np.ndarray) -> np.ndarray:
    after, s = s > 0, np.maximum(s, 0)
    slope = np.exp(-s / TAU_SYN) / TAU_SYN - np.exp(-s / TAU_MEM) / TAU_MEM
    return np.where(after, TAU_MEM * TAU_SYN / (TAU_MEM - TAU_SYN) * slope, 0)


def spike_times(weights: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Output spike times to machine precision."""
    order = np.argsort(times)
    now = current = membrane = 0.0
    fired: list[float] = []
    for at, jump in zip([*times[order], HORIZON], [*weights[order], 0.0], strict=True):
        while True:
            # between two input spikes V(s) = slow exp(-s / tau_mem) + fast exp(-s / tau_syn)
            fast = -current * TAU_MEM * TAU_SYN / (TAU_MEM - TAU_SYN)
            slow = membrane - fast

            def voltage(s: float, slow: float = slow, fast: float = fast) -> float:
                return slow * math.exp(-s / TAU_MEM) + fast * math.exp(-s / TAU_SYN)

            peak = 0.0
            if current > 0 and slow > 0:  # V rises up to its only maximum
                peak = min(math.log(-fast * TAU_MEM / (slow * TAU_SYN)) / (1 / TAU_SYN - 1 / TAU_MEM), at - now)
            if peak <= 0 or voltage(peak) <= THRESHOLD:
                break
            below, above = 0.0, peak
            while below < (middle := (below + above) / 2) < above:
                below, above = (middle, above) if voltage(middle) < THRESHOLD else (below, middle)
            now += above
            fired.append(now)
            current *= math.exp(-above / TAU_SYN)
            membrane = 0.0
        membrane = voltage(at - now)
        current = current * math.exp(-(at - now) / TAU_SYN) + jump
        now = at
    return np.array(fired)


def cost(t: np.ndarray) -> np.ndarray:
    """The loss of a spike at t; the loss of a spike train is their sum."""
    return 3 * np.sin(t / 5) + t / 10


def cost_slope(t: np.ndarray) -> np.ndarray:
    return 0.6 * np.cos(t / 5) + 0.1


def slopes(inputs: Scenario, fired: np.ndarray) -> np.ndarray:
    """V' at each spike: I(t_k) - threshold / tau_mem."""
    lag = fired[:, None] - inputs.times
    current = np.where(lag >= 0, np.exp(-np.maximum(lag, 0) / TAU_SYN), 0) @ inputs.weights
    return current - THRESHOLD / TAU_MEM


def chain_factors(inputs: Scenario, fired: np.ndarray) -> np.ndarray:
    """DBSFT: how far each spike moves the next one."""
    slope = slopes(inputs, fired)
    return (slope[:-1] + THRESHOLD / TAU_MEM) * np.exp(-np.diff(fired) / TAU_MEM) / slope[1:]


def exact_gradients(inputs: Scenario, reset: Reset, *, across_spikes: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """dL/dw and dL/dt of the input spikes by DSFT and DBSFT in continuous time."""
    fired = spike_times(*inputs)
    slope = slopes(inputs, fired)
    error = cost_slope(fired)
    by_weight, by_time = np.zeros(INPUTS), np.zeros(INPUTS)
    later = 0.0  # subtract: sum over later spikes of their error / slope, decayed to this spike
    for k in reversed(range(len(fired))):
        response = kernel(fired[k] - inputs.times)
        moved = kernel_slope(fired[k] - inputs.times)
        if reset == "zero":
            if across_spikes and k + 1 < len(fired):
                error[k] += error[k + 1] * chain_factors(inputs, fired)[k]
            if k > 0:
                decay = math.exp(-(fired[k] - fired[k - 1]) / TAU_MEM)
                response = response - decay * kernel(fired[k - 1] - inputs.times)
                moved = moved - decay * kernel_slope(fired[k - 1] - inputs.times)
        else:
            if k + 1 < len(fired):
                later *= math.exp(-(fired[k + 1] - fired[k]) / TAU_MEM)
            if across_spikes:
                error[k] += THRESHOLD / TAU_MEM * later
            later += error[k] / slope[k]
        by_weight -= error[k] * response / slope[k]
        by_time += error[k] * inputs.weights * moved / slope[k]
    return by_weight, by_time


def finite_differences(inputs: Scenario, step: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """dL/dw and dL/dt by central differences of the simulated spike times."""

    def loss(weights: np.ndarray, times: np.ndarray) -> float:
        return float(cost(spike_times(weights, times)).sum())

    w, t = inputs
    moves = step * np.eye(INPUTS)
    by_weight = [loss(w + move, t) - loss(w - move, t) for move in moves]
    by_time = [loss(w, t + move) - loss(w, t - move) for move in moves]
    return np.array(by_weight) / (2 * step), np.array(by_time) / (2 * step)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# Scenarios of 6 to 13 output spikes. Well-conditioned: a finer step changes neither their number nor the chain much.
SCENARIOS = (30, 55, 108, 141, 154, 159, 184, 230, 248, 269, 292)


def test_the_scenarios_are_well_conditioned_and_have_chains_of_spikes() -> None:
    for seed in SCENARIOS:
        inputs = scenario(seed)
        fired = spike_times(*inputs)
        assert len(fired) >= 6
        assert fired[-1] < HORIZON - 1
        assert slopes(inputs, fired).min() > 0.19
        assert chain_factors(inputs, fired).max() < 1.6


@pytest.mark.parametrize("seed", [30, 154, 248])
def test_dsft_and_dbsft_equal_finite_differences_of_the_spike_times(seed: int) -> None:
    inputs = scenario(seed)
    numeric = finite_differences(inputs)
    for reset in RESETS:
        exact = exact_gradients(inputs, reset)
        cut = exact_gradients(inputs, reset, across_spikes=False)
        for found, without, expected in zip(exact, cut, numeric, strict=True):
            scale = np.abs(expected).max()
            assert np.abs(found - expected).max() / scale < 1e-6
            assert np.abs(without - expected).max() / scale > 0.1


# --- The discrete rule, as the step shrinks --------------------------------------------------------------------------


def discrete_gradients(h: float, reset: Reset, *, across_spikes: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """dL/dw (scenarios, inputs) and output spike counts of the project's neuron and rule in steps of h.

    tau in steps is 1 / (1 - exp(-h / tau)), so that its factors 1 - 1/tau are the exact decays of a step. Then
    u = current h where an input spike of weight w arrives as x = w h tau_syn, and p - v = V' h. For reset by
    subtraction h becomes the exact response kernel(h) to a spike one step ago. Reset to zero loses the overshoot,
    on average the input of half a step, which the slightly larger h makes up for.
    """
    inputs = [scenario(seed) for seed in SCENARIOS]
    tau_syn, tau_mem = (1 / (1 - math.exp(-h / tau)) for tau in (TAU_SYN, TAU_MEM))
    gain = h if reset == "zero" else float(kernel(np.array(h)))
    weights = torch.tensor(np.stack([i.weights for i in inputs]), requires_grad=True)
    steps = torch.tensor(np.stack([np.rint(i.times / h).astype(int) for i in inputs]))
    x = torch.zeros(round(HORIZON / h), len(inputs), dtype=torch.float64)
    column = torch.arange(len(inputs))[:, None].expand_as(steps)
    x = x.index_put((steps, column), weights * gain * tau_syn, accumulate=True)
    rule = CSBP("shift", 1e-9, across_spikes, dead_neuron_rule=False, eager=True)
    spikes = rule(x, CubaLIF(tau_syn, tau_mem, THRESHOLD, reset))
    # a spike in step t is a crossing within (t h, (t + 1) h]
    (spikes * torch.tensor(cost((np.arange(len(x)) + 0.5) * h))[:, None]).sum().backward()
    assert weights.grad is not None
    return weights.grad.numpy(), spikes.detach().sum(0).numpy()


@cache
def discrete_errors(h: float, reset: Reset, across_spikes: bool = True) -> dict[int, float]:
    """Relative error of dL/dw by scenario; only where the step finds the same number of spikes."""
    found, counts = discrete_gradients(h, reset, across_spikes=across_spikes)
    errors = {}
    for seed, by_weight, count in zip(SCENARIOS, found, counts, strict=True):
        inputs = scenario(seed)
        if count == len(spike_times(*inputs)):
            errors[seed] = relative_error(by_weight, exact_gradients(inputs, "zero")[0])
    return errors


@pytest.mark.parametrize("reset", RESETS)
def test_the_discrete_rule_is_within_one_percent_of_the_exact_gradient_at_a_fine_step(reset: Reset) -> None:
    errors = discrete_errors(0.02, reset)
    without = discrete_errors(0.02, reset, across_spikes=False)
    for seed in (30, 108, 269, 292):
        assert errors[seed] <= 0.01
        assert without[seed] > 0.1


@pytest.mark.parametrize("reset", RESETS)
def test_the_discrete_rule_converges_at_first_order_in_the_step(reset: Reset) -> None:
    """Spike times are rounded to the step, so a single error is C h with C of either sign; the median is regular."""
    steps = np.array([0.1, 0.05, 0.02, 0.01])
    medians = []
    for h in steps:
        errors = discrete_errors(float(h), reset)
        assert len(errors) == len(SCENARIOS)
        medians.append(np.median(list(errors.values())))
    assert (np.array(medians) <= 0.75 * steps).all(), medians
    order = np.polyfit(np.log(steps), np.log(medians), 1)[0]
    assert 0.75 < order < 1.5
    assert np.median(list(discrete_errors(0.01, reset, across_spikes=False).values())) > 0.1


# --- From the error of a filtered output to the error of a spike time ------------------------------------------------


TRAINS = st.lists(st.booleans(), min_size=1, max_size=12)
ERRORS = st.lists(st.floats(-10, 10), min_size=12, max_size=12)


@given(TRAINS, ERRORS, st.floats(1, 20))
def test_shift_is_the_change_of_the_loss_when_a_spike_moves_one_step_later(
    train: list[bool], errors: list[float], tau: float
) -> None:
    spikes = torch.tensor(train, dtype=torch.float64)
    g = torch.tensor(errors[: len(train)], dtype=torch.float64)
    found = spike_time_errors(filter_errors(g, tau), "shift")
    for t in range(len(train)):
        before, after = spikes.clone(), spikes.clone()
        before[t], after[t] = 1, 0
        if t + 1 < len(train):  # a spike that leaves the window has no trace in it
            before[t + 1], after[t + 1] = 0, 1
        change = g @ (filter_spikes(after, tau) - filter_spikes(before, tau))
        assert float(found[t]) == pytest.approx(float(change), abs=1e-9)


@given(TRAINS, ERRORS, st.floats(1, 20))
def test_existence_is_the_change_of_the_loss_when_a_spike_is_removed(
    train: list[bool], errors: list[float], tau: float
) -> None:
    spikes = torch.tensor(train, dtype=torch.float64)
    g = torch.tensor(errors[: len(train)], dtype=torch.float64)
    found = spike_time_errors(filter_errors(g, tau), "existence")
    for t in range(len(train)):
        present, absent = spikes.clone(), spikes.clone()
        present[t], absent[t] = 1, 0
        change = g @ (filter_spikes(absent, tau) - filter_spikes(present, tau))
        assert float(found[t]) == pytest.approx(float(change), abs=1e-9)


# --- By hand, three steps each ---------------------------------------------------------------------------------------


def filtered(errors: list[float], tau: float) -> list[float]:
    """dL/dx from dL/du."""
    return filter_errors(torch.tensor(errors, dtype=torch.float64), tau).tolist()


HALVES = CubaLIF(tau_syn=2, tau_mem=2, threshold=1)  # u = u/2 + x/2, p = v/2 + u
EAGER = pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])


@EAGER
@pytest.mark.parametrize(
    ("spike_error", "across_spikes", "first"),
    [
        # x = 3, 0, 2 gives u = 1.5, 0.75, 1.375 and p = 1.5, 0.75, 1.75: spike, silent, spike, with rise 1.5, -, 1.
        # From B = 1, 2, 4, the last spike: delta = 4 / 1, lam = 2; silent: delta = 2, lam = 1; then the first spike.
        ("existence", True, (1 + 1 * 1.5) / 1.5),
        ("existence", False, 1 / 1.5),
        ("shift", True, (-(2 - 1) + 1 * 1.5) / 1.5),
        ("shift", False, -(2 - 1) / 1.5),
    ],
)
def test_spike_silent_spike_with_reset_to_zero(
    spike_error: Literal["existence", "shift"], across_spikes: bool, first: float, eager: bool
) -> None:
    rule = CSBP(spike_error, 0.5, across_spikes, dead_neuron_rule=False, eager=eager)
    spikes, found = gradient([3, 0, 2], [1, 2, 4], HALVES, rule)
    assert spikes == [1, 0, 1]
    by_current = [first, 2, 4]
    assert found == pytest.approx([by_current[0] / 2 + 2 / 2, 2 / 2 + 4 / 4, 4 / 2])
    assert found == pytest.approx(filtered(by_current, 2))


@EAGER
@pytest.mark.parametrize(
    ("spike_error", "across_spikes", "first"),
    [
        # The same input keeps v = 0.5 after the first spike: p = 1.5, 1.0 (not above the threshold), 1.875, rise 0.875.
        # Last spike: delta = 4 / 0.875 = 32/7; silent: 16/7; first: lam = 8/7, and the reset removes threshold / 2.
        ("existence", True, 8 / 7 + (1 + 8 / 7 / 2) / 1.5),
        ("existence", False, 8 / 7 + 1 / 1.5),
        ("shift", True, 8 / 7 + (-(2 - 1) + 8 / 7 / 2) / 1.5),
        ("shift", False, 8 / 7 - (2 - 1) / 1.5),
    ],
)
def test_spike_silent_spike_with_reset_by_subtraction(
    spike_error: Literal["existence", "shift"], across_spikes: bool, first: float, eager: bool
) -> None:
    neuron = CubaLIF(2, 2, 1, "subtract")
    rule = CSBP(spike_error, 0.5, across_spikes, dead_neuron_rule=False, eager=eager)
    spikes, found = gradient([3, 0, 2], [1, 2, 4], neuron, rule)
    assert spikes == [1, 0, 1]
    assert found == pytest.approx(filtered([first, 16 / 7, 32 / 7], 2))


def logistic_slope(x: float) -> float:
    sigmoid = 1 / (1 + math.exp(-x / 0.2))
    return sigmoid * (1 - sigmoid) / 0.2


@EAGER
def test_the_dead_neuron_rule_replaces_the_error_of_quiet_steps_and_leaves_the_chain_alone(eager: bool) -> None:
    neuron = CubaLIF(tau_syn=1, tau_mem=2, threshold=1)  # u = x; a silent step is a quiet one
    # p = 2, 0.5, 1.25: spike, quiet, spike with rise 0.75. The last spike's delta is 4 / 0.75; a half remains in lam,
    # and a quarter past the quiet step.
    last = 4 / 0.75
    first = (1 + last / 4 * 2) / 2
    spikes, found = gradient([2, 0.5, 1], [1, 2, 4], neuron, CSBP(slope_floor=0.5, eager=eager))
    assert spikes == [1, 0, 1]
    assert found == pytest.approx([first, 2 * logistic_slope(-0.5), last])
    _, without = gradient([2, 0.5, 1], [1, 2, 4], neuron, CSBP(slope_floor=0.5, dead_neuron_rule=False, eager=eager))
    assert without == pytest.approx([first, last / 2, last])


@EAGER
def test_the_dead_neuron_rule_ends_where_the_filtered_output_reaches_a_quarter_of_a_spike(eager: bool) -> None:
    # with tau_syn 2 the trace after a spike is 1/2, 1/4, 1/8, 1/16, and a step is quiet below 1/8
    x, errors = [3.0, -3, 0, 0], [0.0, 1, 1, 1]
    spikes, found = gradient(x, errors, HALVES, CSBP(eager=eager))
    assert spikes == [1, 0, 0, 0]
    membrane = float(simulate(torch.tensor(x, dtype=torch.float64)[:, None], HALVES).membrane[3])
    assert found == pytest.approx(filtered([0, 0, 0, logistic_slope(membrane - 1)], 2))


@EAGER
def test_a_neuron_that_never_fires_learns_by_the_dead_neuron_rule_alone(eager: bool) -> None:
    silent, none = gradient([0.5, 0.5, 0.5], [1, 2, 4], HALVES, CSBP(dead_neuron_rule=False, eager=eager))
    assert (silent, none) == ([0, 0, 0], [0, 0, 0])
    membrane = [0.25, 0.125 + 0.375, 0.25 + 0.4375]
    _, found = gradient([0.5, 0.5, 0.5], [1, 2, 4], HALVES, CSBP(eager=eager))
    by_current = [error * logistic_slope(p - 1) for error, p in zip([1, 2, 4], membrane, strict=True)]
    assert found == pytest.approx(filtered(by_current, 2))


# --- The floor of the slope ------------------------------------------------------------------------------------------


@EAGER
def test_a_grazing_spike_is_divided_by_the_floor(eager: bool) -> None:
    neuron = CubaLIF(tau_syn=1, tau_mem=10, threshold=1)  # v keeps 0.9: p = 1 (silent), then 0.9 + 0.1002 rises by 2e-4
    for floor in (0.5, 1e-2, 1e-9):
        rule = CSBP(slope_floor=floor, dead_neuron_rule=False, eager=eager)
        spikes, found = gradient([1, 0.1002], [0, 3], neuron, rule)
        assert spikes == [0, 1]
        assert found[1] == pytest.approx(3 / max(floor, 2e-4), rel=1e-6)


@given(st.integers(0, 2**31), st.sampled_from(["existence", "shift"]), st.sampled_from([0.05, 0.5, 2.0]), st.booleans())
def test_the_floor_bounds_the_gradient(
    seed: int, spike_error: Literal["existence", "shift"], floor: float, eager: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64).mul(2).requires_grad_()
    errors = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    rule = CSBP(spike_error, floor, across_spikes=False, dead_neuron_rule=False, eager=eager)
    rule(x, CubaLIF()).backward(errors)
    assert x.grad is not None
    # |dL/du| <= |g| / floor where nothing crosses a spike, and the synaptic filter has unit area
    assert float(x.grad.abs().max()) <= float(spike_time_errors(errors, spike_error).abs().max()) / floor * (1 + 1e-12)
