"""One process that reads, runs and writes NIR with a peer, in .venv-interop, and prints what went wrong as JSON.

    .venv-interop/bin/python bench/interop_peers.py norse JOBS.json

A job either loads a NIR file and runs it ("read"), or builds a small network of the peer's own, runs it and writes it
as NIR ("write"). Inputs and spikes pass in .npz files: `x` (samples, steps, *shape) in, `out` (samples, steps, classes)
back. Nothing of spikeport is imported. The peers run as their users run them: one sample after the other, from rest.
"""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import nir
import numpy as np
import torch
from torch import nn

Job = dict[str, str | float]
Run = Callable[[torch.Tensor], torch.Tensor]
"""From the spikes of one sample (steps, *shape) to what leaves the network, (steps, classes)."""


# ---- reading: what their users do with a file --------------------------------------------------------------------


def read_norse(job: Job) -> Run:
    """Without a batch axis: Norse takes NIR's Flatten as counting every axis."""
    import norse.torch
    from norse.torch.functional import reset

    method = reset.reset_subtract if job["reset"] == "subtract" else reset.reset_value
    made = norse.torch.from_nir(nir.read(job["file"]), ignore_warnings=True, reset_method=method, dt=float(job["dt"]))
    return by_step(made)


def read_snntorch(job: Job) -> Run:
    """Without a batch axis, as for Norse. Its neurons hold their state, so each sample has a network of its own."""
    from snntorch.import_nir import import_from_nir

    return lambda x: by_step(import_from_nir(nir.read(job["file"])))(x)


def read_spikingjelly(job: Job) -> Run:
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    return by_step(import_from_nir(nir.read(job["file"]), dt=float(job["dt"])), batched=True)


def read_sinabs(job: Job) -> Run:
    """As loaded, neurons send several spikes a step and IF membranes end at -threshold; "single" switches both off."""
    import sinabs
    from sinabs.activation import SingleSpike
    from sinabs.layers import StatefulLayer
    from sinabs.nir import from_nir

    made = from_nir(nir.read(job["file"]), batch_size=1)
    if job.get("single"):
        for module in made.modules():
            if isinstance(module, StatefulLayer):
                module.spike_fn, module.min_v_mem = SingleSpike, None

    def run(x: torch.Tensor) -> torch.Tensor:
        sinabs.reset_states(made)
        return first(made(x))

    return run


def by_step(network: nn.Module, batched: bool = False) -> Run:
    def run(x: torch.Tensor) -> torch.Tensor:
        state, out = None, []
        for step in x:
            result = network(step[None] if batched else step, state)
            sent, state = result
            out.append(first(sent).reshape(-1))
        return torch.stack(out)

    return run


def first(value: torch.Tensor | tuple) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


# ---- writing: networks as their users build them -----------------------------------------------------------------


def write(job: Job, graph: nir.NIRGraph) -> None:
    """As the NIR package needs it: arrays of NumPy, and shapes that follow from other nodes filled in."""
    for node in graph.nodes.values():
        for key, value in vars(node).items():
            if isinstance(value, torch.Tensor):
                setattr(node, key, value.detach().numpy())
    graph.infer_types()
    nir.write(job["file"], graph)


def weighted(module: nn.Linear | nn.Conv2d, scale: float) -> nn.Module:
    """Weights large enough to fire."""
    with torch.no_grad():
        spread = scale / module.weight[0].numel() ** 0.5
        module.weight.copy_(torch.randn(module.weight.shape) * 2 * spread + 0.1 * spread)
        if module.bias is not None:
            module.bias.copy_(torch.randn(module.bias.shape) * 0.1)
    return module


def write_norse(job: Job) -> Run:
    """Its exporter writes tau dt in place of tau, so that dt = 1e-3 has to be read as 1e-6; it has no Flatten."""
    import norse.torch as norse
    from norse.torch.functional.lif_box import LIFBoxParameters

    def leaky(*shape: int) -> nn.Module:
        full = [torch.full(shape, value) for value in (250.0, 0.0, 0.3)]  # one number for all cannot be written
        return norse.LIFBoxCell(LIFBoxParameters(tau_mem_inv=full[0], v_leak=full[1], v_th=full[2]))

    if job["network"] == "dense":
        parts = [weighted(nn.Linear(20, 16), 2.0), leaky(16), weighted(nn.Linear(16, 5), 1.0), leaky(5)]
        sample = torch.zeros(20)
    else:
        parts = [weighted(nn.Conv2d(2, 3, 3, padding=1), 1.0), leaky(3, 8, 8)]
        parts += [weighted(nn.Conv2d(3, 5, 8), 1.0), leaky(5, 1, 1)]
        sample = torch.zeros(2, 8, 8)
    network = norse.SequentialState(*parts)
    write(job, norse.to_nir(network, sample))
    return by_step(network)


def write_snntorch(job: Job) -> Run:
    """Resets to zero at once, as its importer has it; its default resets a step late, which NIR cannot say."""
    import snntorch as snn
    from snntorch.export_nir import export_to_nir

    def full(value: float, *shape: int) -> torch.Tensor:
        return torch.full(shape, value)  # one number for all has no shape, and NIR takes shapes from parameters

    now = {"reset_mechanism": "zero", "reset_delay": False, "init_hidden": True}
    sample = torch.zeros(1, 20)
    if job["network"] == "dense":
        middle: nn.Module = snn.Synaptic(alpha=full(0.6, 16), beta=full(0.75, 16), threshold=full(1.2, 16), **now)
        parts = [weighted(nn.Linear(20, 16), 0.5), middle, weighted(nn.Linear(16, 5), 0.3)]
    elif job["network"] == "recurrent":
        middle = snn.RLeaky(beta=full(0.75, 16), linear_features=16, threshold=full(1.0, 16), **now)
        weighted(middle.recurrent, -0.5)
        middle.recurrent.bias.data.zero_()
        parts = [weighted(nn.Linear(20, 16), 0.7), middle, weighted(nn.Linear(16, 5), 0.7)]
    else:
        middle = snn.Leaky(beta=full(0.75, 3, 8, 8), threshold=full(1.0, 3, 8, 8), **now)
        parts = [weighted(nn.Conv2d(2, 3, 3, padding=1), 0.6), middle, nn.AvgPool2d(2), nn.Flatten()]
        parts += [weighted(nn.Linear(48, 5), 0.7)]
        sample = torch.zeros(1, 2, 8, 8)
    network = nn.Sequential(*parts, snn.Leaky(beta=full(0.8, 5), threshold=full(1.0, 5), **now))
    write(job, export_to_nir(network, sample, ignore_dims=[0]))

    def run(x: torch.Tensor) -> torch.Tensor:
        for module in network.modules():
            if isinstance(module, snn.SpikingNeuron):
                module.reset_mem()
        return torch.stack([first(network(step[None]))[0] for step in x])

    return run


def write_spikingjelly(job: Job) -> Run:
    from spikingjelly.activation_based import functional, layer, neuron
    from spikingjelly.activation_based.nir_exchange import export_to_nir

    if job["network"] == "dense":
        parts = [weighted(layer.Linear(20, 16), 0.6), neuron.CUBALIFNode(0.6, 0.75, 1.0)]
        parts += [weighted(layer.Linear(16, 5, bias=False), 2.0), neuron.LIFNode(4.0, v_threshold=0.4)]
        sample = torch.zeros(1, 20)
    else:
        parts = [weighted(layer.Conv2d(2, 3, 3, padding=1), 1.0), neuron.IFNode(2.0), layer.AvgPool2d(2)]
        parts += [layer.Flatten(), weighted(layer.Linear(48, 5), 0.7), neuron.LIFNode(4.0, decay_input=False)]
        sample = torch.zeros(1, 2, 8, 8)
    network = nn.Sequential(*parts)
    write(job, export_to_nir(network, sample, dt=float(job["dt"])))

    def run(x: torch.Tensor) -> torch.Tensor:
        functional.reset_net(network)
        return torch.stack([network(step[None])[0] for step in x])

    return run


def write_sinabs(job: Job) -> Run:
    """One spike a step and no lower limit of the membrane; its default sends several, which no other reader knows."""
    import sinabs
    import sinabs.layers as layers
    from sinabs.activation import SingleSpike
    from sinabs.nir import to_nir

    once = {"spike_fn": SingleSpike, "batch_size": 1}
    level = {"spike_threshold": torch.full((16,), 0.4)}
    if job["network"] == "dense":
        parts = [weighted(nn.Linear(20, 16), 1.5), layers.LIFSqueeze(tau_mem=torch.full((16,), 4.0), **level, **once)]
        parts += [weighted(nn.Linear(16, 5), 0.3), layers.IAFSqueeze(**once)]
        sample = torch.zeros(3, 20)
    else:
        parts = [weighted(nn.Conv2d(2, 3, 3, padding=1), 0.7), layers.IAFSqueeze(**once)]
        parts += [layers.SumPool2d((2, 2)), nn.Flatten(), weighted(nn.Linear(48, 5), 0.1), layers.IAFSqueeze(**once)]
        sample = torch.zeros(3, 2, 8, 8)
    network = nn.Sequential(*parts)
    network(sample)
    write(job, to_nir(network, sample))

    def run(x: torch.Tensor) -> torch.Tensor:
        sinabs.reset_states(network)
        return network(x)

    return run


# ---- jobs --------------------------------------------------------------------------------------------------------


def done(peer: str, job: Job) -> None:
    torch.manual_seed(int(job.get("seed", 0)))
    make = globals()[f"{job['do']}_{peer}"]
    with np.load(str(job["inputs"])) as stored:
        x = torch.tensor(stored["x"]).float()
    with torch.no_grad():
        run = make(job)
        out = np.stack([run(sample).numpy() for sample in x])
    np.savez(str(job["out"]), out=out.reshape(*out.shape[:2], -1))


def main() -> None:
    peer, jobs = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    warnings.simplefilter("ignore")
    said = sys.stdout
    sys.stdout = sys.stderr  # some of them print while they load
    failed = {}
    for name, job in jobs.items():
        try:
            done(peer, job)
        except Exception as error:  # one network that a peer cannot do leaves the others
            failed[name] = f"{type(error).__name__}: {error}"
    json.dump(failed, said)


if __name__ == "__main__":
    main()
