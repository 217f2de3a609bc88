"""Convolutions that cost what the spikes do: torch's values and gradients, whatever the shape, density and threads."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_windows import three_threads  # noqa: F401
from torch import nn

from spikeport.models import spike_convolution
from spikeport.models.spike_convolution import convolve_layer, geometry_of, handles

pytestmark = pytest.mark.oracle


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer is too small or too dense."""
    for name, value in (("LEAST_WORK", 0), ("FEWEST_CHANNELS", 1), ("DENSEST", 1.0), ("DENSEST_GRADIENT", 1.0)):
        monkeypatch.setattr(spike_convolution, name, value)


def spikes(shape: tuple[int, ...], density: float, dtype: torch.dtype) -> torch.Tensor:
    """Sums of up to four spikes; images lie pixel by pixel."""
    x = torch.where(torch.rand(shape) < density, torch.randint(1, 5, shape).to(dtype), 0)
    return x.contiguous(memory_format=torch.channels_last)


def results(layer: nn.Conv2d, x: torch.Tensor, *, sparse: bool) -> list[torch.Tensor]:
    """Output, and the gradients of the input and the parameters for random errors."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = convolve_layer(layer, x) if sparse else layer(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype))
    return [out.detach(), x.grad, *(each.grad for each in layer.parameters())]


def assert_as_torch(layer: nn.Conv2d, x: torch.Tensor) -> None:
    layer = layer.to(x.dtype)
    geometry = geometry_of(layer)
    assert geometry is not None
    assert handles(x, layer.weight, geometry)
    # rounding grows with the number of terms, of which a gradient of weights has most
    terms = max(2, x.numel())
    tolerance = 4 * torch.finfo(x.dtype).eps * math.sqrt(terms)
    for found, expected in zip(results(layer, x, sparse=True), results(layer, x, sparse=False), strict=True):
        assert found.shape == expected.shape
        scale = float(expected.abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


DTYPES = st.sampled_from([torch.float32, torch.float64])
DENSITIES = st.sampled_from([0.0, 0.1, 0.3, 1.0])


@given(
    samples=st.integers(0, 4),
    channels=st.integers(1, 20),
    outputs=st.sampled_from([1, 15, 16, 40, 64, 100]),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 10)),
    padding=st.tuples(st.integers(0, 6), st.integers(0, 11)),
    spare=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    density=DENSITIES,
    dtype=DTYPES,
    bias=st.booleans(),
)
def test_a_convolution_gives_what_torch_does(
    samples: int,
    channels: int,
    outputs: int,
    kernel: tuple[int, int],
    padding: tuple[int, int],
    spare: tuple[int, int],
    density: float,
    dtype: torch.dtype,
    bias: bool,
) -> None:
    torch.manual_seed(samples)
    size = tuple(max(1, k - 2 * p) + more for k, p, more in zip(kernel, padding, spare, strict=True))
    layer = nn.Conv2d(channels, outputs, kernel, padding=padding, bias=bias)
    assert_as_torch(layer, spikes((samples, channels, *size), density, dtype))


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("samples", [1, 2, 500])
def test_several_threads_give_what_torch_does(samples: int) -> None:
    assert_as_torch(nn.Conv2d(6, 40, 3, padding=1), spikes((samples, 6, 7, 8), 0.2, torch.float32))


@pytest.mark.usefixtures("three_threads")
def test_the_same_bits_every_time() -> None:
    layer, x = nn.Conv2d(8, 20, 5), spikes((50, 8, 9, 9), 0.3, torch.float32)
    first = results(layer, x, sparse=True)
    for _ in range(3):
        for again, once in zip(results(layer, x, sparse=True), first, strict=True):
            assert torch.equal(again, once)


def test_gradients_are_those_of_finite_differences() -> None:
    x = spikes((2, 4, 4, 4), 0.3, torch.float64).requires_grad_()
    layer = nn.Conv2d(4, 6, 3, padding=1).double()
    assert torch.autograd.gradcheck(lambda x: convolve_layer(layer, x), [x])


def test_inputs_of_any_layout() -> None:
    x = spikes((6, 9, 8, 8), 0.3, torch.float32)
    layer = nn.Conv2d(9, 12, 3, bias=False)
    for each in (x.contiguous(), x[::2], x[:, :, :, 1:], x.transpose(2, 3), x[:1].expand_as(x)):
        assert_as_torch(layer, each)


def test_without_the_instruction_that_packs_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba import njit
    from numpy import array, float32, int32, zeros

    monkeypatch.setattr(spike_convolution, "get_host_cpu_features", dict)
    compress = spike_convolution._compress
    packed = njit(lambda x, values, rows: compress(x, 1, 4, 7, values, rows, 2))
    values, rows = zeros(10, float32), zeros(10, int32)
    assert packed(array([9, 0, 5, 0, -3, 9], float32), values, rows) == 4
    assert values[2:4].tolist() == [5, -3]
    assert rows[2:4].tolist() == [8, 10]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Conv2d(8, 8, 3, dilation=2),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(8, 8, (1, 11)),
    ],
)
def test_other_layers_are_left_to_torch(layer: nn.Conv2d) -> None:
    x = spikes((2, 8, 12, 12), 0.1, torch.float32)
    geometry = geometry_of(layer)
    assert geometry is None or not handles(x, layer.weight, geometry)
    assert torch.equal(convolve_layer(layer, x), layer(x))


def is_sparse(out: torch.Tensor) -> bool:
    return "_Convolution" in str(out.grad_fn)


def test_what_torch_does_faster_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Conv2d(8, 16, 3, bias=False), spikes((50, 8, 9, 9), 0.2, torch.float32)
    assert is_sparse(convolve_layer(layer, x))
    with torch.autocast("cpu", torch.bfloat16):
        assert convolve_layer(layer, x).dtype == torch.bfloat16
    monkeypatch.setattr(spike_convolution, "DENSEST_GRADIENT", 0.1)
    assert_as_torch(layer, x)
    monkeypatch.setattr(spike_convolution, "DENSEST", 0.1)
    assert not is_sparse(convolve_layer(layer, x))
    monkeypatch.setattr(spike_convolution, "DENSEST", 0.5)
    monkeypatch.setattr(spike_convolution, "LEAST_WORK", 10**9)
    assert not is_sparse(convolve_layer(layer, x))


def test_hooks_of_a_layer_still_run() -> None:
    layer, x = nn.Conv2d(8, 16, 3), spikes((50, 8, 9, 9), 0.2, torch.float32)
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    out = convolve_layer(layer, x)
    assert seen[0] is out
