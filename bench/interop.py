"""Networks that others trained, others that run ours, and what integers cost. `make interop` calls it.

    .venv/bin/python bench/interop.py [CASE ...]      all cases by default; exit status 1 where a must is missed

A case is a function that gives rows: what was measured, what it must be, and whether it is. It needs .venv-interop
(`make setup-interop`) and the files of the NIR paper in the folder `nir` of SPIKEPORT_DATA, or it says what is missing.
The cases onnx and quantization show what `make bench-onnx` and `make bench-quantization` have stored; those train.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent))

import interop_two_way as two_way
import onnx_accuracy
import quantization as few_bits

from spikeport.converters.graph import ProcessGraph
from spikeport.converters.lower import lower
from spikeport.converters.nir_float import FloatNetwork
from spikeport.converters.nir_peers import PEERS
from spikeport.converters.nir_reader import read_nir
from spikeport.converters.quantize import quantize
from spikeport.converters.reference import Reference
from spikeport.deploy import event_simulator, lava_backend
from spikeport.deploy.trace import Trace, decisions
from spikeport.deploy.verify import compare
from spikeport.models.datasets import DATA_VARIABLE, load_dataset
from spikeport.models.errors import BackendUnavailableError, SpikeportError
from spikeport.models.files import read_json


@dataclass(frozen=True)
class Row:
    """One line: ok is None where nothing is demanded."""

    what: str
    found: str
    must: str = ""
    ok: bool | None = None


def data_file(*parts: str) -> Path:
    """A file in SPIKEPORT_DATA. Raises SpikeportError where it is not there."""
    folder = os.environ.get(DATA_VARIABLE)
    path = Path(folder or "", *parts)
    if folder is None or not path.is_file():
        raise SpikeportError(
            f"{'/'.join(parts)} is not in the folder that {DATA_VARIABLE} names; the NIR paper's files are in "
            "github.com/neuromorphs/NIR, folder paper."
        )
    return path


# ---- both ways ---------------------------------------------------------------------------------------------------


def nir_both_ways() -> Iterator[Row]:
    """Float against float with Norse, snnTorch, Sinabs and SpikingJelly; share of equal output spikes."""
    if not two_way.PYTHON.exists():
        raise SpikeportError("there is no .venv-interop; run `make setup-interop`.")
    for peer in PEERS:
        with tempfile.TemporaryDirectory() as folder:
            for row in two_way.exchange(peer, Path(folder)):
                found = f"{row.equal:.2%} of {row.compared:,}, {row.rate:.0%} firing"
                yield Row(f"{PEERS[peer].title}, {row.network}: {row.direction}", found, "≥ 99.9 %", row.equal >= 0.999)


# ---- (a) Braille -------------------------------------------------------------------------------------------------

LETTERS = ("Space", "A", "E", "I", "O", "U", "Y")
"""The classes of the network, in the order of its outputs."""

BRAILLE_STEPS, BIN_MS, FRAME_MS = 256, 5.0, 25.0
THRESHOLD, REFRACTORY_MS, RESOLUTION_MS = 1.0, 2.5, 1.0


def tactile_spikes(frames: np.ndarray) -> np.ndarray:
    """Delta coding of one recording: (frames, 12) taxel values at 40 Hz to uint8 (256, 12).

    Values are interpolated to 1 ms. A taxel sends an event where it has moved from its reference by more than the
    threshold of 1; the reference, at first 0, moves there, and 2.5 ms pass before the next event. ON and OFF events are
    one, as the network has 12 inputs, and each bin of 5 ms holds one spike or none.
    """
    time = np.arange(len(frames)) * FRAME_MS
    fine = np.linspace(0, time[-1], round(time[-1] / RESOLUTION_MS))
    skip = max(1, int(REFRACTORY_MS / RESOLUTION_MS))
    spikes = np.zeros((BRAILLE_STEPS, frames.shape[1]), np.uint8)
    for taxel in range(frames.shape[1]):
        values = np.interp(fine, time, frames[:, taxel])
        reference, index = 0.0, 0
        while index < len(fine):
            if abs(values[index] - reference) <= THRESHOLD:
                index += 1
                continue
            if (step := int(fine[index] // BIN_MS)) < BRAILLE_STEPS:
                spikes[step, taxel] = 1
            reference = values[index]
            index += skip
    return spikes


def paper_samples() -> tuple[np.ndarray, np.ndarray]:
    """The test samples of the NIR paper, uint8 (n, 256, 12), and their classes, from its `ds_test.pt`."""
    path = data_file("braille", "ds_test.pt")
    with torch.serialization.safe_globals([TensorDataset]):
        samples, classes = torch.load(path, weights_only=True).tensors
    return samples.to(torch.uint8).numpy(), classes.long().numpy()


def braille() -> Iterator[Row]:
    """The recurrent current-based network with bias that snnTorch trained, on the tactile samples of its letters.

    Calibrated on the first half of the repetitions; the decision is the class that fires most.
    """
    with np.load(data_file("braille", "raw_taxels.npz")) as stored:
        every = [list(stored["letters"]).index(letter) for letter in LETTERS]
        kept = np.isin(stored["labels"], every)
        frames, lengths, repetition = (stored[key][kept] for key in ("frames", "lengths", "repetition"))
        labels = np.array([every.index(label) for label in stored["labels"][kept]])
    x = np.stack([tactile_spikes(sample[:length]) for sample, length in zip(frames, lengths, strict=True)])
    still = int((np.ptp(frames[:, : int(lengths.min())], axis=(0, 1)) == 0).sum())
    path = data_file("nir", "braille_noDelay_bias_zero.nir")
    network = FloatNetwork(read_nir(path), path.name, dt=1e-4, reset="zero")
    counts = network.run({"input": x}, ["output"])["output"].sum(1).numpy()
    decided, first_two = counts.argmax(1), np.sort(counts, axis=1)[:, -2:]
    yield Row("samples, and taxels that never change in these frames", f"{len(x)}, {still} of 12")
    yield Row(
        "accuracy of the float network (published: 95.0 % on its own samples)", f"{(decided == labels).mean():.1%}"
    )
    yield Row("classes that it decides for", f"{len(np.unique(decided))} of {len(LETTERS)}")
    near = int((first_two[:, 1] - first_two[:, 0] <= 1).sum())
    yield Row("samples that the float network decides by one spike or none", f"{near} of {len(x)}")
    graph = lower(network.graph, "braille", dt=1e-4, reset="zero", steps=BRAILLE_STEPS)
    calibration = {"input": x[repetition < 25]}
    for title, slices, must in (("8 bits", 1, None), ("8 bits in slices", 2, 0.99)):
        integer, _ = quantize(graph, calibration, slices=slices)
        events = event_simulator.run(integer, {"input": x})
        share = float((decisions(integer.readout, events) == decided).mean())
        ok = None if must is None else share >= must
        yield Row(f"{title}, events: decides as the float network", f"{share:.1%}", "≥ 99 %" if must else "", ok)
    yield from on_lava(integer, x, events, decided)
    try:
        theirs, classes = paper_samples()
    except SpikeportError as error:
        yield Row("the paper's own test samples", f"skipped: {error}")
        return
    decided = network.run({"input": theirs}, ["output"])["output"].sum(1).numpy().argmax(1)
    found = decisions(integer.readout, event_simulator.run(integer, {"input": theirs}))
    yield Row("the paper's own samples: accuracy of the float network", f"{(decided == classes).mean():.1%}")
    yield Row("the same: accuracy of 8 bits in slices, events", f"{(found == classes).mean():.1%}")


def on_lava(graph: ProcessGraph, x: np.ndarray, events: Trace, decided: np.ndarray | None = None) -> Iterator[Row]:
    """The samples on Lava: spike for spike as the event simulator, and decided as the float network."""
    (source,) = (node.name for node in graph.event_inputs)
    try:
        trace = lava_backend.run(graph, {source: x}, timeout_s=3600)
    except BackendUnavailableError as error:
        yield Row("on Lava", f"skipped: {error}")
        return
    found = compare(graph, events, trace)
    yield Row(
        f"Lava, {len(x)} samples: spikes that differ", f"{found.mismatches:,} of {found.compared:,}", "0", found.equal
    )
    if decided is not None:
        share = float((decisions(graph.readout, trace) == decided).mean())
        yield Row(f"Lava, {len(x)} samples: decides as the float network", f"{share:.1%}", "≥ 99 %", share >= 0.99)


# ---- (b) N-MNIST -------------------------------------------------------------------------------------------------

NMNIST_STEPS = 300
PUBLISHED = "Lava 98.15, Nengo 98.11, Norse 98.11, SpiNNaker2 98.2, Sinabs 98.47, snnTorch 97.9, Speck 95.4 %"


def nmnist() -> Iterator[Row]:
    """The convolutional network that Sinabs wrote, on the recordings of the subset: 300 steps of 1 ms, one spike for
    any number of events, reset to zero (as Norse has it). It was published on all 10,000 test recordings."""
    path = data_file("nir", "cnn_sinabs.nir")
    data = load_dataset("nmnist", 1, 1, steps=NMNIST_STEPS, bin_ms=1.0, subset=True)
    x, labels = data.test.images, data.test.labels
    graph = lower(read_nir(path), "cnn", dt=1.0, reset="zero", steps=NMNIST_STEPS)
    reference = Reference(graph)
    counts = [
        reference.run({"input": x[start : start + 20]}).spikes[graph.readout.population].sum(1).numpy()
        for start in range(0, len(x), 20)
    ]
    exact = float((np.concatenate(counts).argmax(1) == labels).mean())
    integer, _ = quantize(graph, {"input": data.train.images[:16]})
    events = event_simulator.run(integer, {"input": x})
    eight = float((decisions(integer.readout, events) == labels).mean())
    yield Row(f"accuracy in floats, {len(x)} recordings ({data.note})", f"{exact:.2%}")
    points = abs(exact - eight) * 100
    yield Row("accuracy at 8 bits, events", f"{eight:.2%}", "within 1 point", points <= 1 + 1e-9)
    yield Row("published, per platform", PUBLISHED)


# ---- (c) the Norse LIF -------------------------------------------------------------------------------------------


def lif() -> Iterator[Row]:
    """The single neuron that Norse wrote, at dt = 1e-4: 1,000 steps of random spikes, in floats, on events, on Lava."""
    path = data_file("nir", "lif_norse.nir")
    x = (np.random.default_rng(0).random((8, 1000, 1)) < 0.3).astype(np.uint8)
    network = FloatNetwork(read_nir(path), path.name, dt=1e-4, reset="zero")
    expected = network.run({"input": x}, ["output"])["output"].numpy()
    yield Row("spikes in floats", f"{int(expected.sum()):,} in {expected.size:,} steps", "some", bool(expected.any()))
    if two_way.PYTHON.exists():
        theirs = two_way.run_file("norse", path, x, dt=1e-4, reset="zero")
        equal = float((theirs.reshape(expected.shape) == expected).mean())
        yield Row("Norse runs the file: steps that are equal", f"{equal:.2%}", "≥ 99.9 %", equal >= 0.999)
    graph = lower(network.graph, "lif", dt=1e-4, reset="zero", steps=1000)
    integer, _ = quantize(graph, {"input": x[:4]})
    events = event_simulator.run(integer, {"input": x})
    same = float((events.spikes("1") == expected.astype(np.uint8)).mean())
    yield Row("8 bits, events: steps equal to the float network", f"{same:.2%}", "≥ 99 %", same >= 0.99)
    yield from on_lava(integer, x, events)


# ---- stored ------------------------------------------------------------------------------------------------------


def onnx() -> Iterator[Row]:
    """An ANN for MNIST by rate conversion, 8 bits, stored by `make bench-onnx`."""
    stored = read_json(few_bits.ROOT / "docs" / "onnx-accuracy.json", "make bench-onnx")
    yield Row(f"accuracy of the ANN, {stored['samples']:,} images", f"{stored['ann']:.2f} %")
    for values in stored["rows"]:
        row = onnx_accuracy.Row(**values)
        yield Row(f"{row.neuron}, T = {row.steps}", f"{row.accuracy:.2f} %, {row.synops:,.0f} synaptic operations")
    best = min(row["loss"] for row in stored["rows"] if row["steps"] <= onnx_accuracy.LARGEST_STEPS)
    must = f"≤ {onnx_accuracy.LARGEST_LOSS}"
    yield Row("points below the ANN, T ≤ 32", f"{best:.2f}", must, best <= onnx_accuracy.LARGEST_LOSS)
    differing = sum(row["differing"] for row in stored["rows"])
    yield Row("neuron-steps that differ between events and torch", f"{differing:,}", "0", not differing)


def quantization() -> Iterator[Row]:
    """Test accuracy at few bits, after training (PTQ) and trained on (QAT), stored by `make bench-quantization`."""
    results = read_json(few_bits.RESULTS, "make bench-quantization")
    for name, exact, bits, ptq, qat, *_ in few_bits.lines(results):
        yield Row(f"{name}, {bits} bits", f"float {exact}, PTQ {ptq}, QAT {qat} %")
    missed = few_bits.missing(results)
    for line in missed:
        yield Row("missed", line, ok=False)
    if not missed:
        yield Row("musts", "PTQ at 8 bits within 0.1 points of float, QAT at 4 bits within 0.5", "all", True)


CASES: dict[str, Callable[[], Iterator[Row]]] = {
    "nir-both-ways": nir_both_ways,
    "braille": braille,
    "nmnist": nmnist,
    "lif": lif,
    "onnx": onnx,
    "quantization": quantization,
}


def main(names: list[str]) -> int:
    console = Console(width=None if sys.stdout.isatty() else 110)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        console.print(f"unknown case {unknown[0]}. Known: {', '.join(CASES)}.")
        return 2
    missed = False
    for name in names or list(CASES):
        case = CASES[name]
        table = Table(title=f"{name}: {(case.__doc__ or '').strip()}", title_justify="left")
        for heading in ("what", "found", "must", ""):
            table.add_column(heading)
        try:
            for row in case():
                verdict = "" if row.ok is None else "[green]yes[/]" if row.ok else "[red]MISSED[/]"
                missed |= row.ok is False
                table.add_row(row.what, row.found, row.must, verdict)
        except (SpikeportError, RuntimeError) as error:
            missed = True
            table.add_row("not run", str(error), "", "[red]MISSED[/]")
        console.print(table)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
