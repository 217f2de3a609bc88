"""Accuracy and spikes at 8, 6, 4, 3 and 2 bits, quantised after training and trained on: `make bench-quantization`.

    .venv/bin/python bench/quantization.py                       the runs of mnist and fashion-fc, seed 1
    .venv/bin/python bench/quantization.py runs/digits           another run, stored beside them

Each run is a folder that `make accuracy-run` or `spikeport run` has left; nothing is trained from scratch here, and the
folder is read alone. PTQ is the search of scales on training samples, QAT so many epochs of fine-tuning from there; the
validation split selects its epoch, or its start. Figures are of the test set on exact integers. What is finished is
stored in `docs/quantization.json` and not repeated, `docs/quantization.md` is written from it, and a fine-tuning that
was interrupted goes on. Exit status 1 where a must is missed.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from spikeport.converters.graph import ProcessGraph
from spikeport.converters.quantize import quantize
from spikeport.deploy import torch_backend
from spikeport.deploy.console import ConsoleProgress
from spikeport.deploy.run_folder import RunFolder
from spikeport.deploy.stages import train_integers
from spikeport.deploy.trace import decisions
from spikeport.models.errors import SpikeportError
from spikeport.models.files import read_json, write_json, write_text

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "quantization.json"
WORK = ROOT / "runs" / "quantization"
EPOCHS = {"mnist": 3, "fashion-fc": 10}
"""The recipes, and the epochs of fine-tuning; a small dense network is quick to train on."""
OTHER_EPOCHS = 3
BITS = (8, 6, 4, 3, 2)
MUSTS = ((8, "ptq", 0.1), (4, "qat", 0.5))
"""Bits, method, and the points by which it may be worse than the float network."""


@dataclass(frozen=True)
class Figures:
    """Of a network on the test set: share of right decisions, spikes of all populations an image."""

    accuracy: float
    spikes: float


def measure(graph: ProcessGraph, folder: RunFolder) -> Figures:
    """Run the test set."""
    trace = torch_backend.run(graph, folder.test_inputs)
    right = decisions(graph.readout, trace) == folder.data.test.labels
    spikes = sum(int(trace.spike_counts(population.name).sum()) for population in graph.populations)
    return Figures(float(right.mean()), spikes / trace.samples)


def float_figures(folder: RunFolder) -> dict[str, Any]:
    """The entry of a run before any quantisation."""
    recipe = folder.recipe
    graph = folder.float_graph()
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "rule": recipe.rule.name,
        "dataset": folder.data.name,
        "dataset_note": folder.data.note,
        "test_samples": len(folder.data.test),
        "graph": graph.fingerprint(),
        "float": asdict(measure(graph, folder)),
        "bits": {},
    }


def quantized_figures(folder: RunFolder, bits: int, epochs: int, progress: ConsoleProgress) -> dict[str, Any]:
    """PTQ and QAT of a run at so many bits."""
    recipe, graph = folder.recipe, folder.float_graph()
    samples = folder.encode(folder.data.train.images[: recipe.quantization.calibration_samples])
    with progress.task(f"{recipe.name}, {bits} bits: search the scales", 1) as advance:
        integer, report = quantize(graph, samples, lambda done, total: advance(done / total), bits)
    found: dict[str, Any] = {"ptq": asdict(measure(integer, folder)), "epochs": epochs}
    state_file = WORK / f"{recipe.name}-{recipe.seed}-{integer.fingerprint()}-{epochs}.pt"
    state_file.parent.mkdir(parents=True, exist_ok=True)
    tuned = train_integers(folder, integer, report, epochs, progress, state_file)
    state_file.unlink(missing_ok=True)
    found |= {"qat": asdict(measure(tuned.graph, folder)), "best_epoch": tuned.best_epoch, "seconds": tuned.seconds}
    return found | {"validation_ptq": tuned.start_accuracy, "validation_qat": tuned.accuracy}


def missing(results: dict[str, Any]) -> list[str]:
    """One line for each must that is missed."""
    out = []
    for name, run in results.items():
        for bits, method, points in MUSTS:
            found = run["bits"].get(str(bits))
            if found is None:
                out.append(f"{name}: {bits} bits not run")
                continue
            drop = round(100 * (run["float"]["accuracy"] - found[method]["accuracy"]), 6)
            if drop > points:
                out.append(
                    f"{name}: {method.upper()} at {bits} bits is {drop:.2f} points below float, more than {points}"
                )
    return out


HEAD = ("run", "float %", "bits", "PTQ %", "QAT %", "spikes an image: float", "PTQ", "QAT", "kept epoch of QAT")


def lines(results: dict[str, Any]) -> list[list[str]]:
    """The table, a line for each run and bits."""
    out = []
    for name, run in results.items():
        for bits, found in sorted(run["bits"].items(), key=lambda entry: -int(entry[0])):
            cells = [f"{100 * figures['accuracy']:.2f}" for figures in (run["float"], found["ptq"], found["qat"])]
            counts = [f"{figures['spikes']:,.0f}" for figures in (run["float"], found["ptq"], found["qat"])]
            kept = f"{found['best_epoch']} of {found['epochs']}" if found["best_epoch"] else "the start"
            out.append([name, cells[0], bits, *cells[1:], *counts, kept])
    return out


def markdown(results: dict[str, Any]) -> str:
    """`docs/quantization.md`."""
    rows = [list(HEAD), ["---"] * len(HEAD), *lines(results)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    missed = missing(results)
    verdict = "All musts are held." if not missed else "Missed:\n\n" + "\n".join(f"- {line}" for line in missed)
    notes = sorted(
        {f"{run['dataset']}, {run['test_samples']:,} samples: {run['dataset_note']}" for run in results.values()}
    )
    return f"""# Accuracy at few bits

Written by `bench/quantization.py` from `docs/quantization.json`; `make bench-quantization` makes what is missing.

Test accuracy on exact integers, and spikes of all populations. PTQ: post-training quantisation, the scale of each
population searched on training samples. QAT: fine-tuning from there under the run's own rule, the integer arithmetic
in the forward pass; the epoch that is kept is the best on the validation split, or the start if all are worse. Musts:
PTQ at 8 bits within 0.1 points of float, QAT at 4 bits within 0.5.

{table}

{verdict}

{chr(10).join(f"- {note}" for note in notes)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="run folders [default: those of make accuracy-run]")
    parser.add_argument("--bits", nargs="+", type=int, default=BITS, choices=range(2, 9))
    parser.add_argument("--epochs", type=int, help="of fine-tuning")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where results are stored, the table beside it")
    asked = parser.parse_args()
    console = Console()
    progress = ConsoleProgress(console)
    folders = asked.folders or [ROOT / "runs" / "accuracy" / f"{name}-1" for name in EPOCHS]
    lacking = [folder for folder in folders if not (folder / "checkpoint.pt").is_file()]
    for folder in lacking:
        name = folder.name.rpartition("-")[0] or folder.name
        console.print(f"{folder} holds no trained network: `make accuracy-run NAME={name} SEED=1` makes one")
    results: dict[str, Any] = read_json(asked.json, "bench/quantization.py") if asked.json.is_file() else {}
    for path in folders:
        if path in lacking:
            continue
        folder = RunFolder.open(path)
        key = f"{folder.recipe.name}, seed {folder.recipe.seed}"
        graph = folder.float_graph().fingerprint()
        if results.get(key, {}).get("graph") != graph:
            results[key] = float_figures(folder)
        epochs = asked.epochs or EPOCHS.get(folder.recipe.name, OTHER_EPOCHS)
        for bits in asked.bits:
            stored = results[key]["bits"].get(str(bits))
            if stored is None or stored["epochs"] != epochs:
                results[key]["bits"][str(bits)] = quantized_figures(folder, bits, epochs, progress)
                write_json(asked.json, results)
                write_text(asked.json.with_suffix(".md"), markdown(results))
    table = Table(*HEAD, title="Accuracy at few bits")
    for line in lines(results):
        table.add_row(*line)
    console.print(table)
    missed = missing(results)
    for line in missed:
        console.print(f"[bold red]missed[/]: {line}")
    return int(bool(missed or lacking))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SpikeportError as error:
        sys.exit(f"bench/quantization.py: {error}")
