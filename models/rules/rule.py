"""What the rules have in common: a time window that runs forward as the neuron does, and backward as the rule says.

Windows run eagerly (plain torch operations, the readable reference), compiled on the CPU (`window_compiled`) or fused
on a GPU (`window_triton`); the three agree to float tolerance. A window keeps its input sums alone for the backward
pass and simulates again there.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import torch

from spikeport.models.cuba_lif import CubaLIF, Window, filter_errors, filter_spikes, fire
from spikeport.models.pooling import Pooling
from spikeport.models.rules import window_compiled, window_triton


@dataclass(frozen=True)
class Rule(ABC):
    """A learning rule.

    eager: keep to plain torch operations on every device.
    spike_cost: what each spike adds to the loss; in the backward pass alone, as an error of every spike.
    """

    title: ClassVar[str]
    """Name in tables and reports; says "reconstructed" where the method's text is not public."""
    rate_level: ClassVar[bool] = False
    """True where the error travels once for the whole window, between mean inputs and mean spikes."""

    eager: bool = field(default=False, kw_only=True)
    spike_cost: float = field(default=0.0, kw_only=True)

    def __call__(self, x: torch.Tensor, neuron: CubaLIF, steps: int | None = None) -> torch.Tensor:
        """Spikes of a window (steps, batch, ...), with the rule as their backward pass.

        x: weighted sums of input spikes, (steps, batch, ...), or (1, batch, ...), the same at each of `steps`. A
        multi-level neuron sends 0..K, the sum of its levels.
        """
        spikes: torch.Tensor = _RuleWindow.apply(x, neuron, self, steps or len(x), None)
        return spikes

    def pooled(self, x: torch.Tensor, neuron: CubaLIF, pooling: Pooling, steps: int | None = None) -> torch.Tensor:
        """Pooled spikes (steps, batch, channels, ...) of a window of images x (steps, batch, channels, height, width).

        The same as pooling the spikes of the window; in one pass where that is compiled.
        """
        if _fused(x, self) is window_compiled and window_compiled.pools(x, pooling) and not self.rate_level:
            spikes: torch.Tensor = _RuleWindow.apply(x, neuron, self, steps or len(x), pooling)
            return spikes
        return pooling(self(x, neuron, steps))

    @abstractmethod
    def current_errors(
        self, window: Window, spike_errors: torch.Tensor, neuron: CubaLIF, threshold: float
    ) -> torch.Tensor:
        """dL/du of one level's window, from B = dL/ds; both (steps, batch, ...)."""

    def input_errors(self, x: torch.Tensor, spike_errors: torch.Tensor, neuron: CubaLIF) -> torch.Tensor:
        """dL/dx of a window, from its inputs x and B = dL/ds; all (steps, batch, ...)."""
        current = filter_spikes(x, neuron.tau_syn)
        errors = torch.zeros_like(x)
        for threshold in neuron.thresholds:
            errors = errors + self.current_errors(fire(current, neuron, threshold), spike_errors, neuron, threshold)
        return filter_errors(errors, neuron.tau_syn)

    def window_errors(
        self, x: torch.Tensor, spike_errors: torch.Tensor, neuron: CubaLIF, pooling: Pooling | None = None
    ) -> torch.Tensor:
        """The backward pass of a window, dL/dx in x's shape: `input_errors` with the cost of spikes, fused where that
        can be."""
        fused = None if self.rate_level else _fused(x, self)
        if fused is window_compiled:
            return window_compiled.backward(x, spike_errors, neuron, self, pooling)
        wide = torch.promote_types(x.dtype, torch.float32)
        if len(x) < len(spike_errors):
            at_each = self.window_errors(_at_each_step(x, len(spike_errors)), spike_errors, neuron)
            return at_each.sum(dim=0, keepdim=True, dtype=wide).to(x.dtype)
        if fused:
            return window_triton.backward(x, spike_errors, neuron, self)
        if self.spike_cost:  # in bfloat16 a small cost would be lost beside the error
            spike_errors = spike_errors.to(wide) + self.spike_cost
        return self.input_errors(x, spike_errors, neuron).to(x.dtype)

    def check(self, neuron: CubaLIF) -> None:  # noqa: B027  most rules are defined for every neuron
        """Raise RecipeError where the rule is not defined for this neuron."""


class _RuleWindow(torch.autograd.Function):
    """With `pooling`, only where the compiled windows take it."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, neuron: CubaLIF, rule: Rule, steps: int, pooling: Pooling | None
    ) -> torch.Tensor:
        ctx.neuron, ctx.rule, ctx.pooling = neuron, rule, pooling
        ctx.save_for_backward(x)
        fused = _fused(x, rule)
        if fused is window_compiled:
            return window_compiled.forward(x, neuron, steps, pooling)
        x = _at_each_step(x, steps)
        if fused:
            return window_triton.forward(x, neuron)
        current = filter_spikes(x, neuron.tau_syn)
        spikes = torch.zeros_like(current)
        for threshold in neuron.thresholds:
            spikes += fire(current, neuron, threshold).spikes
        return spikes

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (x,), rule = ctx.saved_tensors, ctx.rule
        return rule.window_errors(x, gradients[0], ctx.neuron, ctx.pooling), None, None, None, None


def _at_each_step(x: torch.Tensor, steps: int) -> torch.Tensor:
    """(steps, ...) from that or (1, ...)."""
    return x.expand(steps, *x.shape[1:])


def _fused(x: torch.Tensor, rule: Rule) -> ModuleType | None:
    """The fused windows that take x under a rule; None where the eager ones have to do."""
    return next((windows for windows in (window_triton, window_compiled) if windows.handles(x, rule)), None)


def dead_neuron_errors(window: Window, spike_errors: torch.Tensor, neuron: CubaLIF, threshold: float) -> torch.Tensor:
    """B f'(p - threshold) on quiet steps, NaN elsewhere (steps, batch, ...).

    Timing gradients cannot create a first spike. Quiet steps, where the filtered output is below 1 / (4 tau_syn), get
    the derivative of a logistic f of width 0.2 instead, as TSSL-BP's code has it.
    """
    quiet = filter_spikes(window.spikes, neuron.tau_syn) < 1 / (4 * neuron.tau_syn)
    return torch.where(quiet, spike_errors * logistic_slope(window.membrane - threshold), torch.nan)


SURROGATE_WIDTH = 0.2
SURROGATE_CLIP = 8.0


def logistic_slope(distance: torch.Tensor) -> torch.Tensor:
    """f'(x) of a logistic f of width 0.2, as TSSL-BP's code clips it."""
    z = (-distance / SURROGATE_WIDTH).clamp(-SURROGATE_CLIP, SURROGATE_CLIP).exp()
    return z / (SURROGATE_WIDTH * (1 + z) ** 2)


def next_step(values: torch.Tensor) -> torch.Tensor:
    """values[t + 1] at t, 0 at the last step."""
    return torch.cat([values[1:], torch.zeros_like(values[:1])])
