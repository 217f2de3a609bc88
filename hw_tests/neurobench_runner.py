"""Runs NeuroBench's own metrics on networks from an .npz file; `test_neurobench.py` starts it as a program.

It knows nothing of spikeport: a network is a torch module of `nn.Linear` and `nn.Conv2d` layers, summing pools, and
Loihi's neuron in plain int64. Usage: neurobench_runner.py NETWORKS.npz RESULTS.npz, or --version.
"""

import json
import sys
from typing import Any

import numpy as np
import torch
from neurobench import __version__
from neurobench.benchmarks import Benchmark
from neurobench.metrics.static import ConnectionSparsity
from neurobench.metrics.utils.layers import single_layer_MACs
from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
from neurobench.models import TorchModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Spiking(nn.Module):
    """Current-based leaky integrate-and-fire neurons in Loihi's integers, reset to zero."""

    def __init__(self, du: int, dv: int, vth: int) -> None:
        super().__init__()
        self.du, self.dv, self.vth = du, dv, vth
        self.u = self.v = torch.zeros((), dtype=torch.int64)

    def rest(self) -> None:
        self.u = self.v = torch.zeros((), dtype=torch.int64)

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        self.u = decayed(self.u, 4096 - (self.du + 1)) + (a.to(torch.int64) << 6)
        self.v = decayed(self.v, 4096 - self.dv) + self.u
        fires = self.v > (self.vth << 6)
        self.v = torch.where(fires, 0, self.v)
        return fires.to(torch.float64)


def decayed(x: torch.Tensor, keep: int) -> torch.Tensor:
    return x.sign() * (x.abs() * keep >> 12)


class Network(nn.Module):
    """Layers in the order in which they are listed; a population's spikes leave once all its layers have run."""

    def __init__(self, description: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.layers = description["layers"]
        self.populations = description["populations"]
        self.maps = nn.ModuleList()
        for index, entry in enumerate(self.layers):
            weight = torch.tensor(arrays[f"weight{index}"], dtype=torch.float64)
            if entry["kind"] == "conv":
                geometry = {key: tuple(entry[key]) for key in ("stride", "padding", "dilation")}
                channels = weight.shape[1] * entry["groups"]
                layer: nn.Module = nn.Conv2d(
                    channels, weight.shape[0], weight.shape[2:], groups=entry["groups"], bias=entry["bias"], **geometry
                )
            else:
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=entry["bias"])
            layer.weight = nn.Parameter(weight, requires_grad=False)
            if entry["bias"]:
                layer.bias = nn.Parameter(torch.tensor(arrays[f"bias{index}"], dtype=torch.float64), False)
            self.maps.append(layer)
        self.pools = nn.ModuleList(
            nn.AvgPool2d(entry["pool"][0], entry["pool"][1], divisor_override=1) if entry["pool"] else nn.Identity()
            for entry in self.layers
        )
        self.neurons = nn.ModuleDict({p["name"]: Spiking(p["du"], p["dv"], p["vth"]) for p in self.populations})
        self.spikes: dict[str, list[torch.Tensor]] = {p["name"]: [] for p in self.populations}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, steps, *shape) -> the last population's spikes, summed over the steps."""
        batch, steps = x.shape[:2]
        for neuron in self.neurons.values():
            neuron.rest()
        before = {p["name"]: torch.zeros((batch, *p["shape"]), dtype=torch.float64) for p in self.populations}
        history: dict[str, list[torch.Tensor]] = {p["name"]: [] for p in self.populations}
        for t in range(steps):
            now = {"in": x[:, t]}
            for p in self.populations:
                a = torch.zeros((batch, *p["shape"]), dtype=torch.float64)
                for entry, layer, pool in zip(self.layers, self.maps, self.pools, strict=True):
                    if entry["target"] == p["name"]:
                        arriving = (before if entry["recurrent"] else now)[entry["source"]]
                        arriving = pool(arriving)
                        if entry["kind"] == "dense":
                            arriving = arriving.flatten(1)
                        a = a + layer(arriving).reshape(a.shape)
                now[p["name"]] = self.neurons[p["name"]](a)
                history[p["name"]].append(now[p["name"]])
            before = now
        for name, steps_ in history.items():
            self.spikes[name].append(torch.stack(steps_, dim=1).flatten(2))
        return torch.stack(history[self.populations[-1]["name"]]).sum(0)


def measure(description: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """NeuroBench's results and the spikes of every population (samples, steps, size)."""
    network = Network(description, arrays)
    x = torch.tensor(arrays["inputs"], dtype=torch.float64)
    data = TensorDataset(x, torch.zeros(len(x)))
    model = TorchModel(network)
    model.add_activation_module(Spiking)
    metrics = [[ConnectionSparsity], [SynapticOperations, ActivationSparsity]]
    benchmark = Benchmark(model, DataLoader(data, batch_size=description["batch"]), [], [], metrics)
    results = dict(benchmark.run(quiet=True))
    spikes = {f"spikes.{name}": torch.cat(parts).numpy().astype(np.uint8) for name, parts in network.spikes.items()}
    model.cleanup_hooks()
    results["layers"] = by_layer(network, x, description["batch"])
    return results, spikes


def by_layer(network: Network, x: torch.Tensor, batch: int) -> list[dict[str, int]]:
    """What NeuroBench's counting function says of each layer, over all samples; the metric adds the layers up."""
    calls: list[list[torch.Tensor]] = [[] for _ in network.maps]
    hooks = [
        layer.register_forward_pre_hook(lambda _, arriving, into=into: into.append(arriving[0].clone()))
        for layer, into in zip(network.maps, calls, strict=True)
    ]
    for start in range(0, len(x), batch):
        network(x[start : start + batch])
    for hook in hooks:
        hook.remove()
    found = []
    for layer, inputs in zip(network.maps, calls, strict=True):
        counts = {"Dense": 0, "Effective_ACs": 0, "Effective_MACs": 0}
        for arriving in inputs:
            operations, accumulates = single_layer_MACs(arriving, layer)
            counts["Effective_ACs" if accumulates else "Effective_MACs"] += operations
            counts["Dense"] += single_layer_MACs(arriving, layer, total=True)[0]
        found.append(counts)
    return found


def main() -> None:
    if sys.argv[1] == "--version":
        print(__version__)
        return
    with np.load(sys.argv[1], allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    results: dict[str, Any] = {}
    spikes: dict[str, np.ndarray] = {}
    for name, description in json.loads(str(arrays["networks"])).items():
        own = {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}
        results[name], fired = measure(description, own)
        spikes |= {f"{name}.{key}": array for key, array in fired.items()}
    np.savez(sys.argv[2], results=np.array(json.dumps(results)), **spikes)


if __name__ == "__main__":
    main()
