"""The losses: their values and gradients against the equations, and which label and setting each reads."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikeport.models.cuba_lif import filter_errors, filter_spikes
from spikeport.models.losses import Loss, LossName, count_loss, kernel_loss, squared_error

LABELS = torch.tensor([2, 0, 2])


def outputs(steps: int, seed: int = 0) -> torch.Tensor:
    """Real numbers for spikes, (steps, 3, 4): every loss is smooth in them but for the count's dead zones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, 3, 4, generator=generator, dtype=torch.float64)


def gradient(loss: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, output)
    return found


# --- kernel ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "pattern"),
    [
        (1, [0]),
        (2, [0, 1]),
        (5, [0, 1, 1, 1, 1]),
        (9, [0, 1, 1, 1, 1, 1, 1, 1, 1]),
        (10, [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]),
        (11, [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]),
    ],
)
def test_the_desired_train_of_the_true_class_and_silence_elsewhere_cost_nothing(steps: int, pattern: list[int]) -> None:
    spikes = torch.zeros(steps, 3, 4)
    spikes[:, torch.arange(3), LABELS] = torch.tensor(pattern, dtype=torch.float32)[:, None]
    assert float(kernel_loss(spikes, LABELS, 3.0)) == 0
    for t in range(steps):  # and any other train something
        for neuron in range(4):
            spikes[t, 1, neuron] = 1 - spikes[t, 1, neuron]
            assert float(kernel_loss(spikes, LABELS, 3.0)) > 0
            spikes[t, 1, neuron] = 1 - spikes[t, 1, neuron]


def test_the_kernel_loss_by_hand() -> None:
    # tau 2, 2 steps, desired 0, 1. The true class fires at once: a = 1/2, 1/4 against 0, 1/2. Another fires at the end:
    # 0, 1/2 against 0, 0. L = (1/4 + 1/16) / 2 + (1/4) / 2.
    spikes = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert float(kernel_loss(spikes, torch.tensor([0]), 2.0)) == pytest.approx(9 / 32)


@pytest.mark.parametrize("steps", [1, 5, 12])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_gradient_of_the_kernel_loss_is_a_finite_difference(steps: int, tau: float) -> None:
    output = outputs(steps).requires_grad_()
    found = gradient(kernel_loss(output, LABELS, tau), output)
    with torch.no_grad():
        for index in ((0, 0, 2), (steps - 1, 0, 2), (steps // 2, 1, 0), (steps // 2, 1, 3), (0, 2, 1)):
            move = torch.zeros_like(output)
            move[index] = 1e-5
            ends = [float(kernel_loss(output + sign * move, LABELS, tau)) for sign in (1, -1)]
            assert float(found[index]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-6)


@pytest.mark.parametrize("steps", [5, 12])
def test_the_error_of_the_kernel_loss_is_the_difference_of_the_filtered_trains_filtered_back(steps: int) -> None:
    output = outputs(steps).requires_grad_()
    desired = torch.zeros_like(output)
    for sample, label in enumerate(LABELS.tolist()):
        for t in range(1, steps, 2 if steps >= 10 else 1):
            desired[t, sample, label] = 1
    difference = filter_spikes(output.detach() - desired, 3.0)
    expected = filter_errors(difference, 3.0)
    torch.testing.assert_close(gradient(kernel_loss(output, LABELS, 3.0), output), expected)


# --- count -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.integers(1, 12), st.floats(0, 4), st.floats(-1, 1))
def test_the_error_of_the_count_is_the_same_at_every_step_and_none_where_settled(
    seed: int, steps: int, desired: float, undesired: float
) -> None:
    output = outputs(steps, seed).requires_grad_()
    # the filtered output is the variable; tau 1 makes it the output itself
    found = gradient(count_loss(output, LABELS, 1.0, desired, undesired), output)
    for sample, label in enumerate(LABELS.tolist()):
        for neuron in range(4):
            total = float(output.detach()[:, sample, neuron].sum())
            if neuron == label:
                error = min(total - desired, 0) / steps
            else:
                error = max(total - undesired, 0) / steps
            assert found[:, sample, neuron].tolist() == pytest.approx([error] * steps, abs=1e-6)


def test_the_count_is_that_of_the_filtered_output() -> None:
    output = outputs(6).requires_grad_()
    trace = filter_spikes(output, 3.0).detach().requires_grad_()
    through_trace = gradient(count_loss(trace, LABELS, 1.0, 4.0, 0.5), trace)
    found = gradient(count_loss(output, LABELS, 3.0, 4.0, 0.5), output)
    torch.testing.assert_close(found, filter_errors(through_trace, 3.0))
    assert found.count_nonzero() > 20


def test_the_count_loss_by_hand() -> None:
    # 4 steps, tau 1, desired 3, undesired 1, label 0. Counts 1 and 2: e = -2/4 and 1/4, L = (4/2) (1/4 + 1/16).
    spikes = torch.tensor([[1, 1], [0, 1], [0, 0], [0, 0]], dtype=torch.float32)[:, None]
    assert float(count_loss(spikes, torch.tensor([0]), 1.0, 3.0, 1.0)) == pytest.approx(5 / 8)
    # counts 4 and 0 lie beyond what is asked of either
    settled = torch.tensor([[1, 0]] * 4, dtype=torch.float32)[:, None]
    assert float(count_loss(settled, torch.tensor([0]), 1.0, 3.0, 1.0)) == 0
    # and with the labels exchanged neither does: e = -3/4 and 3/4
    assert float(count_loss(settled, torch.tensor([1]), 1.0, 3.0, 1.0)) == pytest.approx(2 * 2 * 9 / 16)


# --- squared_error ---------------------------------------------------------------------------------------------------


def test_the_squared_error_is_of_the_last_membrane_over_the_number_of_steps() -> None:
    # 2 steps, the last at 3, -1: (3/2 - 1)^2 + (1/2)^2 for label 0, (3/2)^2 + (-1/2 - 1)^2 for label 1
    membrane = torch.tensor([[[9.0, 9.0]], [[3.0, -1.0]]])
    assert float(squared_error(membrane, torch.tensor([0]))) == pytest.approx(0.5)
    assert float(squared_error(membrane, torch.tensor([1]))) == pytest.approx(4.5)


def test_the_error_of_the_squared_error_enters_at_the_last_step_alone() -> None:
    output = outputs(5).requires_grad_()
    found = gradient(squared_error(output, LABELS), output)
    wanted = torch.zeros(3, 4, dtype=torch.float64)
    wanted[[0, 1, 2], LABELS] = 1
    torch.testing.assert_close(found[-1], 2 / 5 * (output[-1].detach() / 5 - wanted))
    assert not found[:-1].any()


# --- All of them -----------------------------------------------------------------------------------------------------

LOSSES: list[LossName] = ["kernel", "count", "rate_cross_entropy", "squared_error"]


def test_the_cross_entropy_is_of_the_gain_times_the_mean_output() -> None:
    output = torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]]])  # means 1/2 and 1, times 2: the odds are 1 to e
    for label, cost in ((0, math.log(1 + math.e)), (1, math.log(1 + 1 / math.e))):
        found = Loss("rate_cross_entropy", gain=2.0)(output, torch.tensor([label]))
        assert float(found) == pytest.approx(cost)


def test_a_loss_is_found_by_its_name_and_reads_its_own_settings() -> None:
    output = outputs(5)
    settings = {"tau_syn": 2.5, "desired": 1.5, "undesired": -0.5, "gain": 7.0}
    logits = 7.0 * output.mean(dim=0)
    expected = {
        "kernel": kernel_loss(output, LABELS, 2.5),
        "count": count_loss(output, LABELS, 2.5, 1.5, -0.5),
        "rate_cross_entropy": (logits.logsumexp(dim=1) - logits[[0, 1, 2], LABELS]).sum(),
        "squared_error": squared_error(output, LABELS),
    }
    for name in LOSSES:
        torch.testing.assert_close(Loss(name, **settings)(output, LABELS), expected[name])
    assert len({round(float(value), 6) for value in expected.values()}) == 4


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_summed_over_the_batch_and_reads_the_label_of_each_sample(name: LossName) -> None:
    loss, output = Loss(name), outputs(5)
    alone = [float(loss(output[:, [n]], LABELS[[n]])) for n in range(3)]
    assert float(loss(output, LABELS)) == pytest.approx(sum(alone))
    moved = LABELS.roll(1)
    assert float(loss(output, moved)) != pytest.approx(sum(alone))
    order = [2, 0, 1]
    assert float(loss(output[:, order], LABELS[order])) == pytest.approx(sum(alone))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_loss_keeps_the_type_and_falls_along_its_gradient(name: LossName, dtype: torch.dtype) -> None:
    loss, output = Loss(name), outputs(5).to(dtype).requires_grad_()
    before = loss(output, LABELS)
    found = gradient(before, output)
    assert before.dtype == found.dtype == dtype
    assert float(loss(output.detach() - 1e-3 * found, LABELS)) < float(before.detach())


def test_the_mean_output_of_an_integrator_is_its_last_membrane_over_the_steps() -> None:
    currents = torch.tensor([[[1.0, 0.0]], [[0.5, 2.0]], [[3.0, 1.0]]], dtype=torch.float64)
    labels = torch.tensor([1])
    of_membranes = Loss("rate_cross_entropy", gain=2.0, membrane=True)(currents.cumsum(dim=0), labels)
    of_currents = Loss("rate_cross_entropy", gain=2.0)(currents, labels)
    torch.testing.assert_close(of_membranes, of_currents)
