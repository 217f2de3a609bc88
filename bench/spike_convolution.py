"""Convolutions of spikes beside torch's, for the layers of the speed table's networks: from which share of values that
are not zero `spikeport.models.spike_convolution` leaves a layer to torch.

    python bench/spike_convolution.py

Milliseconds of processor time on one thread in float32, each the best of alternating runs, so that other work on the
machine counts little: the forward pass, and the gradient of the weights.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import train_step

from spikeport.models import spike_convolution
from spikeport.models.memory import keep_freed_memory

SAMPLES = 500
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.4)
REPEATED = 12


def layers() -> dict[tuple[int, ...], tuple[nn.Conv2d, tuple[int, ...]]]:
    """The layers that are handled, with the shapes of their inputs, by the shapes of their weights."""
    found: dict[tuple[int, ...], tuple[nn.Conv2d, tuple[int, ...]]] = {}
    for network in train_step.ARCHITECTURES:
        side = train_step.IMAGE[1]
        for layer in train_step.layers(network):
            side //= 2 if layer.pooled else 1
            if len(layer.weight) == 2:
                continue
            outputs, channels, kernel, _ = layer.weight
            made = nn.Conv2d(channels, outputs, kernel, padding=layer.padding, bias=False)
            made = made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            shape = (SAMPLES, channels, side, side)
            side += 2 * layer.padding - kernel + 1
            geometry = spike_convolution.geometry_of(made)
            if geometry is not None and spike_convolution.handles(torch.empty(shape), made.weight, geometry):
                found[layer.weight] = made, shape
    return found


def best(runs: list[Callable[[], object]]) -> list[float]:
    """Milliseconds of processor time of each."""
    found = [float("inf")] * len(runs)
    for _ in range(REPEATED):
        for i, run in enumerate(runs):
            started = time.thread_time()
            run()
            found[i] = min(found[i], 1e3 * (time.thread_time() - started))
    return found


def measure(layer: nn.Conv2d, shape: tuple[int, ...], density: float) -> list[float]:
    """Milliseconds: forward with torch and here, gradient of the weights with torch and here."""
    x = (torch.rand(shape) < density).float().contiguous(memory_format=torch.channels_last)
    outputs = [layer(x), spike_convolution.convolve_layer(layer, x)]
    errors = torch.randn_like(outputs[0])

    def gradient(out: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(out, list(layer.parameters()), errors, retain_graph=True)

    forward = [lambda: layer(x), lambda: spike_convolution.convolve_layer(layer, x)]
    return best([*forward, *map(gradient, outputs)])


def main() -> None:
    """Measure at every density, whatever the thresholds are."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    spike_convolution.DENSEST = spike_convolution.DENSEST_GRADIENT = 1.0
    print(f"{'weights':>18} {'not zero':>8} {'torch':>8} {'here':>8} {'gradient: torch':>16} {'here':>8}")
    with keep_freed_memory(torch.device("cpu")):
        for weight, (layer, shape) in layers().items():
            for density in DENSITIES:
                torch_ms, here_ms, torch_gradient_ms, here_gradient_ms = measure(layer, shape, density)
                print(
                    f"{'x'.join(map(str, weight)):>18} {density:8.2f} {torch_ms:8.2f} {here_ms:8.2f}"
                    f" {torch_gradient_ms:16.2f} {here_gradient_ms:8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
