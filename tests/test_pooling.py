"""Sum pooling: torch's values and, where the compiled backward pass runs, torch's gradients bit for bit."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rule_windows import three_threads  # noqa: F401

from spikeport.models.pooling import sum_pool
from spikeport.models.rules import window_compiled

pytestmark = pytest.mark.oracle

Pair = tuple[int, int]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": channels_last,
    "every second column": lambda x: x.repeat_interleave(2, dim=3)[:, :, :, ::2],
    "every second image, channels last": lambda x: channels_last(x.repeat_interleave(2, dim=0))[::2],
    "rows and columns swapped": lambda x: channels_last(x.transpose(2, 3)).transpose(2, 3),
    "one image for all": lambda x: x[:1].expand_as(x),
    "one number for all": lambda x: x[:1, :1, :1, :1].expand_as(x),
}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_as_torch(x: torch.Tensor, kernel: Pair, stride: Pair, seed: int, errors_layout: str) -> torch.Tensor:
    """The pooled values, after both have been compared and their gradients too."""
    ours, theirs = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
    found, expected = sum_pool(ours, kernel, stride), F.avg_pool2d(theirs, kernel, stride, divisor_override=1)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    errors = LAYOUTS[errors_layout](random(seed, *expected.shape).to(x.dtype))
    before = errors.clone()
    (gradient,) = torch.autograd.grad(found, ours, errors)
    (reference,) = torch.autograd.grad(expected, theirs, errors)
    assert gradient.dtype == reference.dtype
    assert torch.equal(gradient, reference)
    assert torch.equal(errors, before)
    return found


def is_compiled(found: torch.Tensor) -> bool:
    return "SumPool" in type(found.grad_fn).__name__


PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(4, 9), st.integers(4, 9)),
    kernel=PAIRS,
    stride=PAIRS | st.none(),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
    errors_layout=st.sampled_from(list(LAYOUTS)),
    seed=st.integers(0, 2**31),
)
def test_any_size_kernel_stride_type_and_layout(
    shape: tuple[int, int, int, int],
    kernel: Pair,
    stride: Pair | None,
    dtype: torch.dtype,
    layout: str,
    errors_layout: str,
    seed: int,
) -> None:
    x = LAYOUTS[layout]((3 * random(seed, *shape)).to(dtype))
    assert_as_torch(x, kernel, stride or kernel, seed + 1, errors_layout)


@pytest.mark.parametrize("errors_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("size", [(8, 6), (9, 7), (3, 2)], ids=str)  # rows and columns left over; one window
def test_windows_side_by_side_in_channels_last_are_compiled(size: Pair, dtype: torch.dtype, errors_layout: str) -> None:
    x = channels_last(random(0, 2, 5, *size).to(dtype))
    found = assert_as_torch(x, (3, 2), (3, 2), 1, errors_layout)
    assert is_compiled(found)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_no_convolution_before_a_pool_has_to_reorder_its_errors() -> None:
    x = channels_last(random(0, 2, 5, 7, 7)).requires_grad_()
    (gradient,) = torch.autograd.grad(sum_pool(x, (2, 2), (2, 2)).sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(gradient[:, :, :6, :6], torch.ones(2, 5, 6, 6))
    assert not gradient[:, :, 6].any()  # the row and the column that no window takes
    assert not gradient[:, :, :, 6].any()


@pytest.mark.parametrize(
    ("layout", "dtype", "stride", "learns"),
    [
        ("contiguous", torch.float32, (2, 2), True),
        ("channels last", torch.float16, (2, 2), True),
        ("channels last", torch.float32, (1, 2), True),  # windows that overlap
        ("channels last", torch.float32, (3, 2), True),  # and that leave gaps
        ("channels last", torch.float32, (2, 2), False),
    ],
)
def test_what_is_not_compiled_is_left_to_torch(layout: str, dtype: torch.dtype, stride: Pair, learns: bool) -> None:
    x = LAYOUTS[layout](random(0, 2, 3, 8, 8).to(dtype)).requires_grad_(learns)
    found = sum_pool(x, (2, 2), stride)
    assert not is_compiled(found)
    assert found.requires_grad == learns
    assert torch.equal(found, F.avg_pool2d(x, 2, stride, divisor_override=1))


def test_no_gradient_is_kept_where_none_is_wanted() -> None:
    x = channels_last(random(0, 2, 3, 8, 8)).requires_grad_()
    with torch.no_grad():
        assert not sum_pool(x, (2, 2), (2, 2)).requires_grad


def test_no_image_at_all() -> None:
    x = channels_last(torch.zeros(0, 3, 8, 8)).requires_grad_()
    found = sum_pool(x, (2, 2), (2, 2))
    assert found.shape == (0, 3, 4, 4)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.shape == x.shape


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("images", [1, 63, 64, 65, 300])
def test_images_shared_among_threads(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_compiled, "BLOCK_VALUES", 1)
    x = channels_last(random(0, images, 3, 5, 4))
    assert is_compiled(assert_as_torch(x, (2, 2), (2, 2), 1, "channels last"))
