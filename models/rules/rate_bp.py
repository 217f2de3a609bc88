"""Rate-based backpropagation (reconstructed): the derivative of a fitted rate-current curve as the gradient.

After Lan & Chen, 计算机工程与应用 58(10):87-92, 2022. Only the abstract is public, so this formulation is ours.

A neuron is simulated over the recipe's window for a range of mean inputs, and an explicit expression r(I) is fitted to
the mean spikes a step that it answers with:

    r(I) = m y / (y + k),    y = softplus((I - a) / d)

m is the rate at which the curve saturates, a and d the place and width of the corner at threshold. A multi-level neuron
has one such curve for each level, and r is their sum. The neuron starts at rest and its synaptic filter rises slowly;
the fit takes that in. The simulated inputs vary from step to step as sums of spikes do, here by a normal distribution
whose deviation is the threshold.

Errors then travel once for the whole window, between mean inputs and mean spikes, whatever the number of steps:

    dL/d mean(x) = r'(mean(x)) dL/d mean(s)
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch

from spikeport.models.cuba_lif import CubaLIF, Window, filter_spikes, fire
from spikeport.models.rules.rule import Rule

FIT_INPUTS = 161
FIT_STEPS = 8_192
"""Steps simulated at each mean input, in trials of a window each."""


@dataclass(frozen=True)
class RateBP(Rule):
    """Settings of the rule. slope_limit: largest r', in spikes a step for a mean input of one threshold."""

    title: ClassVar[str] = "rate-based BP (reconstructed)"
    rate_level: ClassVar[bool] = True

    slope_limit: float = 5.0

    def current_errors(
        self, window: Window, spike_errors: torch.Tensor, neuron: CubaLIF, threshold: float
    ) -> torch.Tensor:
        raise NotImplementedError("the error of a rate is one for the whole window; see input_errors")

    def input_errors(self, x: torch.Tensor, spike_errors: torch.Tensor, neuron: CubaLIF) -> torch.Tensor:
        """The same error at every step: r'(mean(x)) times the mean of B."""
        wide = torch.promote_types(x.dtype, torch.float32)
        slope = self.slope(x.mean(dim=0, dtype=wide), neuron, x.shape[0])
        return (slope * spike_errors.mean(dim=0, dtype=wide)).to(x.dtype).expand_as(x)

    def rate(self, mean_input: torch.Tensor, mean_spikes: torch.Tensor, neuron: CubaLIF, steps: int) -> torch.Tensor:
        """The measured `mean_spikes` (batch, ...), differentiable by `mean_input` through the fitted curve."""
        out: torch.Tensor = _Rate.apply(mean_input, mean_spikes, self, neuron, steps)
        return out

    def slope(self, mean_input: torch.Tensor, neuron: CubaLIF, steps: int) -> torch.Tensor:
        """r' at a mean input, elementwise."""
        limit = self.slope_limit / neuron.threshold
        slopes = [curve.slope(mean_input) for curve in fit_curves(neuron, steps)]
        return torch.stack(slopes).sum(dim=0).clamp(max=limit)


class _Rate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mean_input: torch.Tensor, mean_spikes: torch.Tensor, rule: RateBP, neuron: CubaLIF, steps: int
    ) -> torch.Tensor:
        ctx.save_for_backward(mean_input)
        ctx.settings = rule, neuron, steps
        return mean_spikes.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        rule, neuron, steps = ctx.settings
        (mean_input,) = ctx.saved_tensors
        error = gradients[0] + rule.spike_cost * steps
        return rule.slope(mean_input, neuron, steps) * error, None, None, None, None


@dataclass(frozen=True)
class RateCurve:
    """r(I) = m y / (y + k), y = softplus((I - a) / d), in spikes a step; m, k and d are positive."""

    m: float
    k: float
    a: float
    d: float

    def rate(self, mean_input: torch.Tensor) -> torch.Tensor:
        """r at a mean input, elementwise."""
        y = torch.nn.functional.softplus((mean_input - self.a) / self.d)
        return self.m * y / (y + self.k)

    def slope(self, mean_input: torch.Tensor) -> torch.Tensor:
        """r' at a mean input, elementwise, in closed form."""
        scaled = (mean_input - self.a) / self.d
        y = torch.nn.functional.softplus(scaled)
        return (self.m * self.k / self.d) * torch.sigmoid(scaled) / (y + self.k) ** 2


@cache
def fit_curves(neuron: CubaLIF, steps: int) -> tuple[RateCurve, ...]:
    """The curve of each level of a neuron over a window of `steps`, fitted to its simulated answer to noisy inputs."""
    inputs, rates = simulated_rates(neuron, steps)
    return tuple(_fit(inputs, level, neuron.threshold) for level in rates)


def _fit(inputs: torch.Tensor, rates: torch.Tensor, threshold: float) -> RateCurve:
    from scipy.optimize import least_squares

    def distances(parameters: np.ndarray) -> np.ndarray:
        return (_curve(parameters, threshold).rate(inputs) - rates).numpy()

    # the corner is first put where the rate passes half its height
    height = max(float(rates.max()), 1e-3)
    middle = float(inputs[int((rates < height / 2).sum().clamp(max=len(inputs) - 1))]) / threshold
    start = (np.log(height), 0.0, middle, np.log(0.5))
    return _curve(least_squares(distances, start, method="lm", max_nfev=20_000).x, threshold)


def _curve(found: np.ndarray, threshold: float) -> RateCurve:
    m, k, d = (float(np.exp(np.clip(found[index], -12, 12))) for index in (0, 1, 3))
    return RateCurve(m, k, float(found[2]) * threshold, d * threshold)


def simulated_rates(neuron: CubaLIF, steps: int, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean inputs (n,) and the mean spikes a step (levels, n) that a neuron answers with over a window.

    noise: standard deviation of the input of each step, in thresholds.
    """
    generator = torch.Generator().manual_seed(0)
    highest = 3.0 * max(neuron.thresholds)
    inputs = torch.linspace(-2.0 * neuron.threshold, highest, FIT_INPUTS, dtype=torch.float64)
    shape = (steps, -(-FIT_STEPS // steps), FIT_INPUTS)
    x = inputs + noise * neuron.threshold * torch.randn(shape, generator=generator, dtype=torch.float64)
    current = filter_spikes(x, neuron.tau_syn)
    rates = [fire(current, neuron, threshold).spikes.mean(dim=(0, 1)) for threshold in neuron.thresholds]
    return inputs, torch.stack(rates)
