"""Where a training step first went wrong: the layer whose output or gradient is not a finite number."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from spikeport.models.networks import TrainableNetwork


def first_not_finite(network: TrainableNetwork, loss_of_step: Callable[[], torch.Tensor]) -> str | None:
    """Run a step again and name the first place, in forward order, that is not finite; None where all is.

    loss_of_step: runs the network forward and returns the loss. The weights must be those of the failed step.
    """
    found: list[str] = []
    order: list[nn.Module] = []
    names = {module: name.removeprefix("maps.") for name, module in network.named_modules() if name}

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        order.append(module)
        if isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
            found.append(f"the output of layer {names[module]!r}")

    leaves = [module for module in names if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(watch) for module in leaves]
    try:
        network.zero_grad(set_to_none=True)
        loss = loss_of_step()
        if found:
            return found[0]
        if not torch.isfinite(loss):
            return "the loss"
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    gradients = ((names[module], parameter.grad) for module in order for parameter in module.parameters())
    wrong = (name for name, gradient in gradients if gradient is not None and not torch.isfinite(gradient).all())
    return next((f"the gradient of layer {name!r}" for name in wrong), None)
