"""Networks and peers for `bench/chip.py`: SANA-FE and Lava on the same network and the same spikes as our simulator.

Each peer runs in an environment of its own (`make setup-peers`, `make setup-lava`) as a process of its own. A time is
only returned where its spikes are ours: SANA-FE's are compared as counts of each step, Lava's neuron by neuron.
"""

import itertools
import json
import math
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Conv2d, Dense, Operator, SumPool
from spikeport.deploy import event_simulator, lava_backend
from spikeport.deploy.chip import Chip, load_chip
from spikeport.deploy.mapping import Mapping, map_network
from spikeport.deploy.sanafe_export import write_sanafe
from spikeport.deploy.trace import Trace
from spikeport.models.errors import BackendError, BackendUnavailableError

PEERS = Path(__file__).resolve().parents[1] / ".venv-peers" / "bin" / "python"
CHIP = "loihi-sanafe"
LARGEST_WEIGHT = 127
INPUT_RATE = 0.1


@dataclass(frozen=True, eq=False)
class Network:
    """A benchmark network on its chip with one sample, and what our simulator makes of it."""

    graph: ProcessGraph
    inputs: dict[str, np.ndarray]
    chip: Chip
    mapping: Mapping
    trace: Trace

    def describe(self) -> dict[str, float]:
        """Sizes, and spikes and synaptic operations a step."""
        steps = self.graph.steps
        spikes = {node.name: self.trace.spike_counts(node.name).sum() for node in self.graph.event_nodes}
        found: dict[str, float] = {
            "neurons": sum(population.size for population in self.graph.populations),
            "synapses": sum(projection.operator.n_synapses() for projection in self.graph.projections),
            "cores": len(self.mapping.cores),
            "steps": steps,
            "input_spikes_per_step": float(spikes[self.graph.inputs[0].name]) / steps,
            "spikes_per_step": sum(float(spikes[p.name]) for p in self.graph.populations) / steps,
            "synops_per_step": sum(float(counts.sum()) for counts in self.trace.synops.values()) / steps,
        }
        rates = {f"rate_{p.name}": float(spikes[p.name]) / p.size / steps for p in self.graph.populations}
        return found | rates


def dense(steps: int = 200, sizes: tuple[int, ...] = (784, 400, 400, 10), seed: int = 0) -> Network:
    """A multilayer perceptron of integrate-and-fire neurons."""
    rng = np.random.default_rng(seed)
    layers: list[Operator] = [Dense((n_in,), _weights(rng, n_out, n_in)) for n_in, n_out in itertools.pairwise(sizes)]
    return _network("dense", (sizes[0],), layers, steps, rng)


def conv(steps: int = 100, channels: tuple[int, int] = (15, 40), hidden: int = 300, seed: int = 0) -> Network:
    """15C5-P2-40C5-P2-300-10 on 28 x 28, about the size of what is common on MNIST."""
    rng = np.random.default_rng(seed)
    first, second = channels
    pool = SumPool((2, 2), (2, 2))
    layers: list[Operator] = [
        Conv2d((1, 28, 28), _weights(rng, first, 1, 5, 5)),
        Conv2d((first, 24, 24), _weights(rng, second, first, 5, 5), pool),
        Dense((second, 8, 8), _weights(rng, hidden, second * 16), pool),
        Dense((hidden,), _weights(rng, 10, hidden)),
    ]
    return _network("conv", (1, 28, 28), layers, steps, rng)


def large(millions: float = 10, steps: int = 20, seed: int = 0) -> Network:
    """Dense layers of 2,000 neurons with that many million synapses and more, for memory and loading."""
    return dense(steps, (2000,) * (1 + math.ceil(millions / 4)), seed)


def _weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Even weights, somewhat more excitatory than inhibitory."""
    drawn = rng.normal(8, 40, shape).round().clip(-LARGEST_WEIGHT, LARGEST_WEIGHT)
    return 2 * drawn.astype(np.int64)


def _network(
    name: str, shape: tuple[int, ...], layers: list[Operator], steps: int, rng: np.random.Generator
) -> Network:
    """A chain of layers, each with the threshold that lets it fire at about INPUT_RATE."""
    spikes = (rng.random((1, steps, *shape)) < INPUT_RATE).astype(np.uint8)
    populations, projections, source, sent = [], [], "input", spikes[0]
    for index, operator in enumerate(layers, 1):
        layer = f"layer{index}"
        current = operator.apply(torch.as_tensor(sent, dtype=torch.float64).reshape(-1, *operator.in_shape)).numpy()
        vth, sent = _calibrate(current)
        populations.append(Population(layer, operator.out_shape, integrate_and_fire(vth), index))
        projections.append(Projection(f"{source} to {layer}", source, layer, operator))
        source = layer
    parts = (Input("input", shape),), tuple(populations), tuple(projections), Readout(source)
    graph, chip, inputs = ProcessGraph(name, steps, 1e-3, *parts), load_chip(CHIP), {"input": spikes}
    return Network(graph, inputs, chip, map_network(graph, chip), event_simulator.run(graph, inputs, threads=1))


def integrate_and_fire(vth: int) -> LoihiNeuron:
    """A neuron without filter and leak, hard reset."""
    values = {"du": 4095, "dv": 0, "vth": vth, "bias_mant": 0, "bias_exp": 0}
    return LoihiNeuron(**{key: np.array(value) for key, value in values.items()})


def _calibrate(current: np.ndarray) -> tuple[int, np.ndarray]:
    """The threshold at which neurons with these inputs (steps, *shape) fire at about INPUT_RATE, and their spikes."""
    low, high = 1, (1 << 17) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fire(current, middle).mean() > INPUT_RATE else (low, middle)
    return high, _fire(current, high)


def _fire(current: np.ndarray, vth: int) -> np.ndarray:
    v, spikes = np.zeros(current.shape[1:]), np.zeros(current.shape, np.uint8)
    for t, row in enumerate(current):
        v += row
        spikes[t] = v > vth
        v[spikes[t] > 0] = 0
    return spikes


@dataclass(frozen=True)
class Sanafe:
    """One run of SANA-FE: seconds of its run alone, processor seconds in it, loading, memory at its peak, its file."""

    timing: str
    threads: tuple[int, int]
    run_s: float
    cpu_s: float
    load_s: float
    peak_rss_mib: float
    file_mib: float
    steps_per_s: float
    mean_step_ns: float


def run_sanafe(
    network: Network, timing: str = "simple", threads: tuple[int, int] = (1, 0), timeout_s: float = 600
) -> Sanafe:
    """Run a network on SANA-FE; threads: (of processing, of scheduling).

    Raises BackendUnavailableError without .venv-peers, BackendError where it fails or fires otherwise than we do.
    """
    if not PEERS.exists():
        raise BackendUnavailableError("there is no .venv-peers with SANA-FE; run `make setup-peers`.")
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "export", Path(place) / "result.json"
        write_sanafe(network.graph, network.mapping, network.chip, network.inputs, folder, regular=timing == "cycle")
        size = (folder / "network.net").stat().st_size / 2**20
        command = [str(PEERS), "run_sanafe.py", ".", "--out", str(out), "--timing", timing, "--fast", "--threads"]
        done = subprocess.run(
            [*command, *map(str, threads)],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": str(threads[0])},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise BackendError(f"SANA-FE ended with exit status {done.returncode}: {done.stderr[-2000:]}")
        result = json.loads(out.read_text(encoding="utf-8"))
    _check_counts(network, np.array(result["fired"]))
    steps = len(result["fired"])
    times = (result["run_s"], result["cpu_s"], result["load_s"], result["peak_rss_mib"], size, steps / result["run_s"])
    return Sanafe(timing, threads, *times, float(np.mean(result["sim_time"])) * 1e9)


def _check_counts(network: Network, fired: np.ndarray) -> None:
    """Neurons that fired in each chip step, inputs included, against our trace, streamed."""
    expected = np.zeros_like(fired)
    for node in network.graph.event_nodes:
        counts = network.trace.spike_counts(node.name)[0]
        expected[node.stage : node.stage + len(counts)] += counts
    if not np.array_equal(expected, fired):
        step = int((expected != fired).argmax())
        raise BackendError(f"SANA-FE fires {fired[step]} neurons in step {step}, our simulator {expected[step]}.")


def run_lava(network: Network, timeout_s: float = 600) -> float:
    """Steps a second of Lava's simulator, of its run alone, after a comparison of every spike.

    Raises BackendUnavailableError without .venv-lava, BackendError where it fails or fires otherwise than we do.
    """
    trace = lava_backend.run(network.graph, network.inputs, timeout_s=timeout_s)
    for population in network.graph.populations:
        if not np.array_equal(trace.packed[population.name], network.trace.packed[population.name]):
            raise BackendError(f"the spikes of {population.name!r} on Lava are not ours.")
    return network.graph.steps / trace.seconds
