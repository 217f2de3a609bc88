"""Windows by a learning rule: one neuron's as lists of numbers, random ones, and the threads that they run on."""

from collections.abc import Iterator, Sequence

import pytest
import torch

from spikeport.models.cuba_lif import CubaLIF
from spikeport.models.rules import Rule


@pytest.fixture
def three_threads() -> Iterator[None]:
    """For modules that import it."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def gradient(
    x: Sequence[float], errors: Sequence[float], neuron: CubaLIF, rule: Rule
) -> tuple[list[float], list[float]]:
    """Spikes and dL/dx of one neuron in float64, from its inputs and dL/ds."""
    values = torch.tensor(x, dtype=torch.float64)[:, None].requires_grad_()
    spikes = rule(values, neuron)
    spikes.backward(torch.tensor(errors, dtype=torch.float64)[:, None])
    assert values.grad is not None
    return spikes[:, 0].tolist(), values.grad[:, 0].tolist()


def random_window(seed: int, *shape: int, scale: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and dL/ds in float64, from a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    x, errors = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return x * scale, errors


def input_gradient(x: torch.Tensor, errors: torch.Tensor, neuron: CubaLIF, rule: Rule) -> torch.Tensor:
    """dL/dx of a window, from its inputs and dL/ds."""
    values = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(rule(values, neuron), values, errors)
    return found
