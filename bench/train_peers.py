"""One process of `bench/train_speed.py` that trains with a peer, in .venv-interop: prints what it measured as JSON.

    .venv-interop/bin/python bench/train_peers.py '{"network": "mnist", "variant": "snntorch"}'

The neuron is the same everywhere: v[t] = (1 - 1/tau_mem) v[t-1] + x[t], reset to zero. A step does what ours does: it
encodes the images, and takes the norm of the gradient to clip it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import train_step
from train_step import Job, Layer

Network = Callable[[torch.Tensor], list[torch.Tensor]]
"""From spikes (steps, batch, ...) to the spikes of every population, (steps, batch, ...)."""


def maps(layer: Layer, weight: torch.Tensor) -> list[nn.Module]:
    """What lies between two populations: pooling, flattening, and the weights."""
    found: list[nn.Module] = [nn.AvgPool2d(2, divisor_override=1)] if layer.pooled else []
    linear: nn.Conv2d | nn.Linear
    if len(layer.weight) == 4:
        channels, before, kernel, _ = layer.weight
        linear = nn.Conv2d(before, channels, kernel, padding=layer.padding, bias=False)
    else:
        found.append(nn.Flatten())
        linear = nn.Linear(layer.weight[1], layer.weight[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return [*found, linear]


def snntorch(job: Job) -> tuple[Network, nn.Module]:
    """Leaky neurons, one time step of the whole network after the other, as in snnTorch's examples.

    "snntorch once" takes frames that are the same at every step through the first weights once, outside the loop.
    """
    import snntorch
    from snntorch import surrogate

    def rectangle(membrane: torch.Tensor, error: torch.Tensor, spikes: torch.Tensor) -> torch.Tensor:
        return error * (membrane.abs() < 0.5)

    linear, neurons = nn.ModuleList(), nn.ModuleList()
    for layer, weight in zip(train_step.layers(job.network), train_step.first_weights(job.network), strict=True):
        linear.append(nn.Sequential(*maps(layer, weight)))
        neurons.append(
            snntorch.Leaky(
                1 - 1 / train_step.TAU_MEM,
                train_step.THRESHOLD,
                spike_grad=surrogate.custom_surrogate(rectangle),
                reset_mechanism="zero",
            )
        )

    def forward(x: torch.Tensor) -> list[torch.Tensor]:
        membranes = [neuron.reset_mem() for neuron in neurons]
        fired: list[list[torch.Tensor]] = [[] for _ in neurons]
        first = linear[0](x[0]) if job.variant == "snntorch once" else None
        for spikes in x:
            for index, neuron in enumerate(neurons):
                current = linear[index](spikes) if index or first is None else first
                spikes, membranes[index] = neuron(current, membranes[index])
                fired[index].append(spikes)
        return [torch.stack(each) for each in fired]

    return forward, linear


def spikingjelly(job: Job) -> tuple[Network, nn.Module]:
    """LIFNode over all steps at once. It has no choice of a backend since 2.0: the device and the surrogate decide.

    "spikingjelly rectangle" has our surrogate, "spikingjelly triangle" the nearest one among those of its own operator.
    Frames that are the same at every step go through the first weights once.
    """
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    rectangle = job.variant == "spikingjelly rectangle"
    parts: list[nn.Module] = []
    for each, weight in zip(train_step.layers(job.network), train_step.first_weights(job.network), strict=True):
        parts.append(layer.SeqToANNContainer(*maps(each, weight)))
        parts.append(
            neuron.LIFNode(
                tau=train_step.TAU_MEM,
                decay_input=False,
                v_threshold=train_step.THRESHOLD,
                v_reset=0.0,
                surrogate_function=surrogate.Rect(1.0) if rectangle else surrogate.PiecewiseQuadratic(1.0),
                step_mode="m",
            )
        )
    network = nn.Sequential(*parts)

    def forward(x: torch.Tensor) -> list[torch.Tensor]:
        functional.reset_net(network)
        fired = []
        for index, part in enumerate(network):
            if index == 0 and x.stride(0) == 0:
                once = part(x[:1])
                x = once.expand(job.steps, *once.shape[1:])
                continue
            x = part(x)
            if isinstance(part, neuron.LIFNode):
                fired.append(x)
        return fired

    return forward, network


def functions_called(step: Callable[[], object], package: str) -> list[str]:
    """The functions of a package's neurons that a step runs: what its backend really is."""
    folder, seen = f"/{package}/", set()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and folder in code.co_filename:
            seen.add(f"{code.co_filename.rsplit(folder, 1)[1]}:{code.co_name}")

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return sorted(
        name for name in seen if name.startswith(("_ops/lif/", "_ops/surrogate", "_neurons/")) and "_check" not in name
    )


def main() -> None:
    job = Job.from_arguments()
    package = job.variant.split()[0]
    forward, network = (snntorch if package == "snntorch" else spikingjelly)(job)
    images, labels = train_step.images_and_labels(job.batch)
    x = train_step.frames(images, job)
    optimizer = torch.optim.AdamW(network.parameters(), train_step.LEARNING_RATE)
    with torch.no_grad(), job.autocast():
        found = train_step.rates([x, *forward(x)])

    def step() -> float:
        optimizer.zero_grad()
        encoded = train_step.frames(images, job)
        with job.autocast():
            rate = forward(encoded)[-1].float().mean(dim=0)
            loss = nn.functional.cross_entropy(train_step.LOSS_GAIN * rate, labels, reduction="sum")
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), train_step.CLIP_NORM)
        optimizer.step()
        return loss.item()

    measured = train_step.measure(step, job)
    print(json.dumps(measured | {"rates": found, "ran": functions_called(step, package)}))


if __name__ == "__main__":
    main()
