"""Pooling: torch's values, and a window that pools its own spikes gives what pooling them afterwards gives."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from network_examples import network, settled
from rule_windows import random_window, three_threads  # noqa: F401

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.pooling import Pooling
from spikeport.models.rules import CSBP, MLF, STBP, TSSL, RateBP, Rule, SpikeBP, window_compiled

pytestmark = pytest.mark.oracle

PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 4))
RULES: dict[str, tuple[Rule, CubaLIF]] = {
    "csbp": (CSBP(), CubaLIF(3, 5, 0.6, "subtract")),
    "csbp, spikes cost": (CSBP(spike_cost=0.3), CubaLIF(3, 5, 0.6)),
    "tssl": (TSSL(), CubaLIF(3, 5, 0.6)),
    "stbp": (STBP(), CubaLIF(2, 5, 0.6)),
    "mlf": (MLF(), CubaLIF(2, 5, 0.6, levels=(1.2, 2.0))),
    "spike_bp": (SpikeBP(), CubaLIF(1, 5, 0.6)),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """(steps, batch, channels, height, width), with the channels of a pixel side by side."""
    return x.movedim(2, 4).contiguous().movedim(4, 2)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": channels_last,
    "rows and columns swapped": lambda x: channels_last(x.transpose(3, 4)).transpose(3, 4),
}


def is_one_pass(pooled: torch.Tensor) -> bool:
    """True where the window has pooled by itself."""
    return "RuleWindow" in type(pooled.grad_fn).__name__


def assert_pools_as_afterwards(rule: Rule, neuron: CubaLIF, x: torch.Tensor, pooling: Pooling) -> None:
    """The same pooled spikes, and the same dL/dx to the rounding of the type."""
    ours, theirs = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
    found, expected = rule.pooled(ours, neuron, pooling), pooling(rule(theirs, neuron))
    assert is_one_pass(found)
    assert found.dtype == expected.dtype == x.dtype
    assert expected.any()
    assert torch.equal(found, expected)
    errors = random_window(1, *expected.shape)[1].to(x.dtype)
    (gradient,) = torch.autograd.grad(found, ours, errors)
    (reference,) = torch.autograd.grad(expected, theirs, errors)
    rounding = 4 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(gradient, reference, rtol=rounding, atol=rounding)


@given(
    leading=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    size=st.tuples(st.integers(1, 5), st.integers(4, 9), st.integers(4, 9)),
    kernel=PAIRS,
    stride=PAIRS,
    average=st.booleans(),
)
def test_pooling_is_torchs(
    leading: list[int], size: tuple[int, int, int], kernel: tuple[int, int], stride: tuple[int, int], average: bool
) -> None:
    x = random_window(0, *leading, *size)[0]
    pooling = Pooling(kernel, stride, average)
    expected = F.avg_pool2d(x.flatten(0, -4), kernel, stride, divisor_override=None if average else 1)
    assert torch.equal(pooling(x), expected.unflatten(0, leading))
    assert pooling.shape(x.shape) == pooling(x).shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_a_window_pools_its_own_spikes(name: str, dtype: torch.dtype, layout: str) -> None:
    rule, neuron = RULES[name]
    x = LAYOUTS[layout](random_window(0, 4, 3, 5, 6, 8, scale=1.0)[0].to(dtype))
    for kernel in ((2, 2), (3, 2), (1, 8), (6, 1)):
        for average in (False, True):
            assert_pools_as_afterwards(rule, neuron, x, Pooling(kernel, kernel, average))


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("images", [1, 2, 37])
@pytest.mark.parametrize("channels", [1, 16, 17])
def test_windows_of_pools_are_not_torn_between_blocks(
    images: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = random_window(0, 3, images, channels, 4, 6, scale=1.0)[0]
    for values in (1, 1000, 1_000_000):
        monkeypatch.setattr(window_compiled, "BLOCK_VALUES", values)
        monkeypatch.setattr(window_compiled, "SMALLEST_TILE", min(values, 512))
        assert_pools_as_afterwards(*RULES["csbp"], x, Pooling((2, 3), (2, 3)))


@pytest.mark.parametrize(
    ("rule", "dtype", "pooling"),
    [
        (CSBP(), torch.float32, Pooling((2, 2), (1, 2))),  # windows that overlap
        (CSBP(), torch.float32, Pooling((2, 2), (3, 2))),  # that leave gaps
        (CSBP(), torch.float32, Pooling((4, 2), (4, 2))),  # and a remainder
        (CSBP(), torch.float16, Pooling((2, 2), (2, 2))),
        (CSBP(eager=True), torch.float32, Pooling((2, 2), (2, 2))),
        (RateBP(), torch.float32, Pooling((2, 2), (2, 2))),
    ],
)
def test_elsewhere_the_spikes_are_pooled_afterwards(rule: Rule, dtype: torch.dtype, pooling: Pooling) -> None:
    x = random_window(0, 3, 2, 3, 6, 6)[0].to(dtype).requires_grad_()
    found = rule.pooled(x, CubaLIF(), pooling)
    assert not is_one_pass(found)
    assert torch.equal(found, pooling(rule(x, CubaLIF())))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_image_that_stands_for_all_steps(dtype: torch.dtype, layout: str) -> None:
    x = LAYOUTS[layout](random_window(0, 1, 2, 3, 6, 8)[0].abs().to(dtype)).requires_grad_()
    pooling = Pooling((2, 2), (2, 2))
    found = CSBP().pooled(x, CubaLIF(), pooling, 5)
    assert is_one_pass(found)
    alone = x.detach().clone().requires_grad_()
    expected = pooling(CSBP()(alone, CubaLIF(), 5))
    assert found.shape == (5, 2, 3, 3, 4)
    assert expected.any()
    assert torch.equal(found, expected)
    errors = random_window(1, *expected.shape)[1].to(dtype)
    (gradient,) = torch.autograd.grad(found, x, errors)
    (reference,) = torch.autograd.grad(expected, alone, errors)
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, reference, rtol=rounding, atol=rounding)


def test_no_image_at_all() -> None:
    x = torch.zeros(3, 0, 2, 4, 4, requires_grad=True)
    found = CSBP().pooled(x, CubaLIF(), Pooling((2, 2), (2, 2)))
    assert found.shape == (3, 0, 2, 2, 2)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.shape == x.shape


@pytest.mark.parametrize("pool", ["sum", "average", "neurons"])
@pytest.mark.parametrize("rule", [STBP(), RateBP()], ids=str)
def test_a_network_asked_for_its_output_alone_computes_the_same(rule: Rule, pool: str) -> None:
    x = (random_window(0, 5, 3, 1, 14, 14)[0] > 0).double()
    made = settled(network("4C3-P2-4C3-P2-7", (1, 14, 14), 7, threshold=0.1, rule=rule, pool=pool), x)
    results = []
    for alone in (False, True):
        made.zero_grad()
        found = made(x, output_alone=alone)
        assert ("conv1" in found) is not (alone and not rule.rate_level)
        output = found[made.output]
        output.backward(random_window(1, *output.shape)[1])
        results.append([output.detach(), *(weight.grad for weight in made.parameters() if weight.grad is not None)])
    assert results[0][0].any()
    assert len(results[0]) == 1 + len(list(made.parameters()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_spikes_that_others_read_too_are_not_pooled_away() -> None:
    """A residual block's shortcut and its convolution both read the population before them."""
    x = (random_window(0, 5, 3, 1, 8, 8)[0] > 0).double()
    made = settled(network("4C3-R4s2-5", (1, 8, 8), 5, threshold=0.1, block="early"), x)
    found, alone = made(x), made(x, output_alone=True)
    assert found[made.output].any()
    assert list(alone) == list(found)
    assert torch.equal(found[made.output], alone[made.output])
