"""TSSL-BP's backward pass against the equations of the authors' code, written out neuron by neuron, and by hand.

The oracle takes g[t] = dL/da[t], the error of the filtered output, and sums it over the filter's whole tail:

    B[t] = sum over m >= t of kappa[m - t] g[m],   kappa[n] = (1/tau_syn) (1 - 1/tau_syn)^n
"""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_windows import gradient, input_gradient, random_window

from spikeport.models.cuba_lif import CubaLIF, Window, filter_errors, filter_spikes, simulate
from spikeport.models.errors import RecipeError
from spikeport.models.rules import TSSL

Mode = Literal["author", "timing"]
EAGER = pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])


# --- The oracle ------------------------------------------------------------------------------------------------------


def summed_errors(g: list[float], tau: float) -> list[float]:
    """B of one neuron, by the sum over all later steps."""
    steps = len(g)
    return [sum((1 - 1 / tau) ** (m - t) / tau * g[m] for m in range(t, steps)) for t in range(steps)]


def reference_errors(x: list[float], g: list[float], neuron: CubaLIF, *, dead_neuron_rule: bool) -> list[float]:
    """dL/dI of one neuron that sends filtered spikes a and receives the current I = x."""
    tau_s, theta_m = neuron.tau_syn, 1 / neuron.tau_mem
    v = a = 0.0
    s, u, du, trace = [], [], [], []
    for current in x:
        du.append(-theta_m * v + current)
        u.append(v + du[-1])
        s.append(float(u[-1] > neuron.threshold))
        v = u[-1] * (1 - s[-1])
        a += (s[-1] - a) / tau_s
        trace.append(a)
    errors = summed_errors(g, tau_s)
    out = [0.0] * len(x)
    psi = 0.0
    for t in reversed(range(len(x))):
        q = s[t] * min(max(1 / du[t], 0), 8)
        out[t] = q * errors[t]
        if t < len(x) - 1:
            out[t] += psi * theta_m * u[t] * q + psi * (1 - theta_m) * (1 - s[t])
        psi = out[t] if s[t] else psi * (1 - theta_m)
        if dead_neuron_rule and trace[t] < 1 / (4 * tau_s):
            z = min(max(-(u[t] - neuron.threshold) / 0.2, -8), 8)
            out[t] = errors[t] * math.exp(z) / (0.2 * (1 + math.exp(z)) ** 2)
    return out


@pytest.mark.oracle
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.floats(1, 20))
def test_the_recursion_of_the_filtered_error_is_the_sum_over_all_later_steps(g: list[float], tau: float) -> None:
    found = filter_errors(torch.tensor(g, dtype=torch.float64), tau)
    assert found.tolist() == pytest.approx(summed_errors(g, tau), abs=1e-6)


@pytest.mark.oracle
@given(
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 15),
    tau_syn=st.floats(1, 8),
    tau_mem=st.floats(1, 20),
    threshold=st.floats(0.2, 2),
    dead_neuron_rule=st.booleans(),
)
def test_the_rule_gives_what_the_authors_code_gives(
    seed: int, steps: int, tau_syn: float, tau_mem: float, threshold: float, dead_neuron_rule: bool
) -> None:
    """The filter is the receiver's here and the sender's there: dL/dI there is dL/du here, before its filter."""
    neuron = CubaLIF(tau_syn, tau_mem, threshold)
    current, g = random_window(seed, steps, 5)
    window = simulate(current, CubaLIF(1, tau_mem, threshold))
    rule = TSSL(dead_neuron_rule=dead_neuron_rule)
    found = rule.current_errors(window, filter_errors(g, tau_syn), neuron, threshold)
    for n in range(5):
        expected = reference_errors(current[:, n].tolist(), g[:, n].tolist(), neuron, dead_neuron_rule=dead_neuron_rule)
        assert found[:, n].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


# --- By hand, three steps each ---------------------------------------------------------------------------------------

PLAIN = CubaLIF(tau_syn=1, tau_mem=2, threshold=1)  # u = x, p = v/2 + x; every step without a spike is quiet
# x = 2, 1/2, 1 gives p = 2, 1/2, 5/4: spike, silent, spike, with rise 2, -, 3/4. Backwards from B = 1, 2, 4:
#   last spike    q = 4/3, delta = 4 q = 16/3
#   silent        delta = (1 - 1/2) 16/3 = 8/3
#   first spike   q = 1/2, delta = 1 q + 8/3 (1/2) 2 q = 1/2 + 4/3
SPIKE_SILENT_SPIKE = [2, 0.5, 1]


@EAGER
def test_a_spike_takes_its_own_error_and_that_of_the_next_spike_through_the_reset(eager: bool) -> None:
    spikes, found = gradient(SPIKE_SILENT_SPIKE, [1, 2, 4], PLAIN, TSSL(dead_neuron_rule=False, eager=eager))
    assert spikes == [1, 0, 1]
    assert found == pytest.approx([11 / 6, 8 / 3, 16 / 3])


@EAGER
def test_the_error_of_the_first_spike_is_that_of_the_reset_alone_where_none_arrives(eager: bool) -> None:
    _, found = gradient(SPIKE_SILENT_SPIKE, [0, 0, 4], PLAIN, TSSL(dead_neuron_rule=False, eager=eager))
    assert found == pytest.approx([4 / 3, 8 / 3, 16 / 3])


@EAGER
def test_the_dead_neuron_rule_overrides_a_quiet_step_and_leaves_the_chain_behind_it_alone(eager: bool) -> None:
    _, found = gradient(SPIKE_SILENT_SPIKE, [1, 2, 4], PLAIN, TSSL(eager=eager))
    # the membrane is 1/2 below the threshold: f' = 0.3505186, times B = 2; the first spike's 11/6 still has psi = 8/3
    assert found == pytest.approx([11 / 6, 0.7010372, 16 / 3])


@EAGER
def test_the_timing_mode_takes_the_error_of_a_spike_that_moves(eager: bool) -> None:
    # E = B[t] - B[t+1] = -1, -2, 4
    rule = TSSL("timing", dead_neuron_rule=False, eager=eager)
    _, found = gradient(SPIKE_SILENT_SPIKE, [1, 2, 4], PLAIN, rule)
    assert found == pytest.approx([-1 / 2 + 4 / 3, 8 / 3, 16 / 3])


@EAGER
@pytest.mark.parametrize("mode", ["author", "timing"])
def test_the_dead_neuron_rule_takes_the_error_of_existence_in_both_modes(mode: Mode, eager: bool) -> None:
    spikes, found = gradient([0.5, 0.25, 0.5], [1, 2, 4], PLAIN, TSSL(mode, eager=eager))
    assert spikes == [0, 0, 0]
    # p = 1/2, 1/2, 3/4: f'(-1/2) = 0.3505186, f'(-1/4) = 0.8655239
    assert found == pytest.approx([0.3505186, 0.7010372, 3.4620957], rel=1e-6)
    _, without = gradient([0.5, 0.25, 0.5], [1, 2, 4], PLAIN, TSSL(mode, dead_neuron_rule=False, eager=eager))
    assert without == [0, 0, 0]


@EAGER
def test_the_error_passes_the_synaptic_filter(eager: bool) -> None:
    # tau_syn = tau_mem = 2 and x = 3, 0, 2: u = 3/2, 3/4, 11/8 and p = 3/2, 3/4, 7/4; rise 3/2, -, 1. The trace of
    # the first spike is 1/2, 1/4, so no step is quiet (below 1/8). dL/du = 2/3 + 2 (1/2) (3/2) (2/3), 2, 4.
    spikes, found = gradient([3, 0, 2], [1, 2, 4], CubaLIF(2, 2, 1), TSSL(eager=eager))
    assert spikes == [1, 0, 1]
    assert found == pytest.approx([11 / 6, 2, 2])


@EAGER
def test_the_inverse_slope_is_clipped_to_eight(eager: bool) -> None:
    # p = 1 (not above the threshold), then 1.1, a rise of 0.1
    spikes, found = gradient([1, 0.6], [0, 3], PLAIN, TSSL(dead_neuron_rule=False, eager=eager))
    assert spikes == [0, 1]
    assert found == pytest.approx([12, 24])


@EAGER
def test_a_step_is_quiet_while_the_filtered_output_is_below_a_quarter_of_a_spike(eager: bool) -> None:
    # the trace after the spike is 1/2, 1/4, 1/8, 1/16: the last step alone is below 1/8. There p = -0.5625, which is
    # 7.8125 widths below the threshold: f' = 5 e^-7.8125 / (1 + e^-7.8125)^2 = 0.002021589
    spikes, found = gradient([3, -3, 0, 0], [0, 1, 1, 1], CubaLIF(2, 2, 1), TSSL(eager=eager))
    assert spikes == [1, 0, 0, 0]
    last = 0.002021589
    assert found == pytest.approx([last / 16, last / 8, last / 4, last / 2], rel=1e-5)


@EAGER
def test_the_surrogate_of_a_quiet_step_stops_falling_eight_widths_away(eager: bool) -> None:
    _, found = gradient([-1, -30, -400], [1, 1, 1], PLAIN, TSSL(eager=eager))
    assert found == pytest.approx([0.00167619] * 3, rel=1e-5)


def test_a_spike_on_a_falling_membrane_carries_nothing() -> None:
    """No simulated neuron has one, as a membrane that did not fire is at most at the threshold."""
    spikes, rise = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.2], [-0.1]])
    window = Window(spikes, current=rise, membrane=torch.tensor([[1.2], [1.1]]), rise=rise)
    found = TSSL(dead_neuron_rule=False).current_errors(window, torch.tensor([[1.0], [2.0]]), PLAIN, 1.0)
    assert found.flatten().tolist() == [0, 0]


# --- The true timing gradient ----------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.integers(0, 8), st.floats(1, 8), st.floats(0.2, 3))
def test_the_timing_mode_is_the_change_of_the_loss_when_the_spike_moves_one_step(
    seed: int, at: int, tau_syn: float, excess: float
) -> None:
    """dL/du = dL/dt dt/du with dt/du = -1 / rise; the loss is linear in the filtered output."""
    g = random_window(seed, 9)[1]
    x = torch.zeros(9, dtype=torch.float64)
    x[at] = 1 + excess  # fires at this step alone
    neuron = CubaLIF(1, 5, 1)

    def loss(step: int) -> float:
        train = torch.zeros_like(x)
        if step < len(train):  # a spike that leaves the window has no trace in it
            train[step] = 1
        return float(g @ filter_spikes(train, tau_syn))

    found = input_gradient(x, filter_errors(g, tau_syn), neuron, TSSL("timing", dead_neuron_rule=False))
    assert float(found[at]) == pytest.approx(-(loss(at + 1) - loss(at)) / (1 + excess), abs=1e-9)


# --- What it is defined for ------------------------------------------------------------------------------------------


def test_it_is_refused_for_a_reset_by_subtraction() -> None:
    with pytest.raises(RecipeError, match="reset to zero"):
        TSSL().check(CubaLIF(reset="subtract"))
    TSSL().check(CubaLIF())
