"""NIR both ways between spikeport and its peers: they write and we run, we write and they run; spikes compared.

`bench/interop.py` prints the table and `hw_tests/test_interop.py` asserts it. The peers live in .venv-interop.
"""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nir
import numpy as np

from spikeport.converters.nir_float import FloatNetwork
from spikeport.converters.nir_peers import PEERS, for_peer
from spikeport.converters.nir_reader import read_nir
from spikeport.converters.nir_writer import write_nir

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-interop" / "bin" / "python"
SAMPLES, STEPS, RATE = 8, 40, 0.3

READ_AS: dict[str, dict[str, Any]] = {
    "norse": {"dt": 1e-6, "reset": "zero", "discretization": "euler"},
    "snntorch": {"dt": 1e-4, "reset": "zero", "discretization": "euler"},
    "spikingjelly": {"dt": 1e-4, "reset": "zero", "discretization": "euler"},
    "sinabs": {"dt": 1.0, "reset": "subtract", "discretization": "exponential"},
}
"""What a file of each peer means. Norse's exporter writes tau times its dt of 1e-3, so that dt has to be 1e-6."""

THEY_WRITE = [(peer, kind) for peer in PEERS for kind in ("dense", "conv")] + [("snntorch", "recurrent")]
WE_WRITE = [
    *((peer, kind) for peer in ("norse", "snntorch", "spikingjelly") for kind in ("dense", "conv", "recurrent")),
    ("sinabs", "dense"),
    ("sinabs", "conv"),
]


@dataclass(frozen=True)
class Row:
    """One network and one direction. equal: share of the output's neuron-steps that are equal; rate: of our spikes."""

    peer: str
    direction: str
    network: str
    equal: float
    rate: float
    compared: int


def inputs(kind: str) -> np.ndarray:
    """Random spikes (samples, steps, *shape)."""
    shape = (2, 8, 8) if kind == "conv" else (20,)
    return (np.random.default_rng(7).random((SAMPLES, STEPS, *shape)) < RATE).astype(np.uint8)


def exchange(peer: str, folder: Path) -> list[Row]:
    """Both directions with one peer, in one process of it.

    It writes networks of its own, and what we make of the files stands beside what it computed itself. We write ours in
    its terms, and what it makes of the files stands beside our run of what they were made from.
    """
    theirs = {kind: _places(folder, f"their-{kind}", kind) for named, kind in THEY_WRITE if named == peer}
    ours = {kind: _places(folder, f"our-{kind}", kind) for named, kind in WE_WRITE if named == peer}
    reset = PEERS[peer].resets[-1]
    networks, jobs = {}, {}
    for kind, places in ours.items():
        networks[kind] = FloatNetwork(our_network(kind, current=peer != "sinabs"), kind, dt=1e-3, reset=reset)
        stated = for_peer(networks[kind].graph, networks[kind].timing, peer)  # type: ignore[arg-type]
        write_nir(stated, Path(places["file"]))
        jobs[f"our {kind}"] = {"do": "read", "dt": PEERS[peer].dt, "reset": reset, "single": True, **places}
    for kind, places in theirs.items():
        jobs[f"their {kind}"] = {"do": "write", "network": kind, "dt": READ_AS[peer]["dt"], **places}
    _run(peer, jobs, folder)
    rows = []
    for kind, places in theirs.items():
        network = FloatNetwork(read_nir(Path(places["file"])), places["file"], **READ_AS[peer])
        rows.append(_row(peer, "they write, we run", kind, network, places))
    rows += [_row(peer, "we write, they run", kind, networks[kind], places) for kind, places in ours.items()]
    return rows


def our_network(kind: str, current: bool) -> nir.NIRGraph:
    """A network in NIR with a bias everywhere; `current`: with current-based neurons."""
    rng = np.random.default_rng(3)

    def weight(*shape: int) -> np.ndarray:
        return (rng.normal(0.1, 1, shape) / np.sqrt(np.prod(shape[1:])) * 1.5).astype(np.float32)

    def neuron(*shape: int) -> nir.NIRNode:
        tau_syn, tau, zero = (np.full(shape, value) for value in (2.5e-3, 5e-3, 0.0))
        if current:
            level = np.full(shape, 0.4)
            return nir.CubaLIF(tau_syn, tau, 5 * np.ones(shape), zero, level, w_in=np.ones(shape))
        if len(shape) > 1:
            return nir.IF(r=np.full(shape, 1e3), v_threshold=np.ones(shape))
        return nir.LIF(tau, 5 * np.ones(shape), zero, np.ones(shape))

    nodes: dict[str, nir.NIRNode] = {"input": nir.Input({"input": np.array(inputs(kind).shape[2:])})}
    if kind == "conv":
        bias = rng.normal(0, 0.05, 3).astype(np.float32)
        nodes["conv"] = nir.Conv2d((8, 8), weight(3, 2, 3, 3), (1, 1), (1, 1), (1, 1), 1, bias)
        nodes["a"] = neuron(3, 8, 8)
        nodes["pool"] = nir.SumPool2d(np.array([2, 2]), np.array([2, 2]), np.array([0, 0]))
        nodes["flat"] = nir.Flatten({"input": np.array([3, 4, 4])}, 0, -1)
        nodes["fc"] = nir.Affine(weight(5, 48), rng.normal(0, 0.05, 5).astype(np.float32))
    else:
        nodes["first"] = nir.Affine(weight(16, 20), rng.normal(0, 0.05, 16).astype(np.float32))
        nodes["a"] = neuron(16)
        nodes["fc"] = nir.Affine(weight(5, 16), rng.normal(0, 0.05, 5).astype(np.float32))
    nodes["b"], nodes["output"] = neuron(5), nir.Output({"output": np.array([5])})
    edges = list(zip(nodes, list(nodes)[1:], strict=False))
    if kind == "recurrent":
        nodes["loop"] = nir.Affine(weight(16, 16) - 0.2, rng.normal(0, 0.05, 16).astype(np.float32))
        edges += [("a", "loop"), ("loop", "a")]
    return nir.NIRGraph(nodes, edges, {}, type_check=False)


def _places(folder: Path, name: str, kind: str) -> dict[str, str]:
    np.savez(folder / f"{kind}.in.npz", x=inputs(kind))
    names = {"file": f"{name}.nir", "inputs": f"{kind}.in.npz", "out": f"{name}.out.npz"}
    return {key: str(folder / name) for key, name in names.items()}


def _run(peer: str, jobs: dict[str, Any], folder: Path) -> None:
    """Run jobs in the peer's interpreter. Raises RuntimeError with what it said where one fails."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [str(PYTHON), str(Path(__file__).with_name("interop_peers.py")), peer, str(folder / "jobs.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{peer} failed: {done.stderr[-400:]}")
    if failed := json.loads(done.stdout):
        raise RuntimeError("; ".join(f"{peer}, {name}: {why}" for name, why in failed.items()))


def _row(peer: str, direction: str, kind: str, network: FloatNetwork, job: dict[str, str]) -> Row:
    (source,), (output,) = network.graph.inputs, network.graph.outputs
    ours = network.run({source: inputs(kind)}, [output])[output].flatten(2).numpy()
    with np.load(job["out"]) as stored:
        theirs = stored["out"]
    return Row(peer, direction, kind, float((ours == theirs).mean()), float(ours.mean()), ours.size)


def run_file(peer: str, path: Path, x: np.ndarray, dt: float, reset: str) -> np.ndarray:
    """What a peer makes of a file: the output for inputs (samples, steps, *shape), as (samples, steps, size)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "in.npz", x=x)
        job = {"do": "read", "file": str(path), "dt": dt, "reset": reset}
        job |= {"inputs": str(folder / "in.npz"), "out": str(folder / "out.npz")}
        _run(peer, {"file": job}, folder)
        with np.load(folder / "out.npz") as stored:
            out: np.ndarray = stored["out"]
        return out
