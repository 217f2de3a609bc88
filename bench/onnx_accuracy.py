"""Accuracy of an ANN that becomes a spiking network, against the number of steps; exit status 1 where a must is missed.

    .venv/bin/python bench/onnx_accuracy.py --json docs/onnx-accuracy.json --plot docs/onnx-accuracy.png
    .venv/bin/python bench/onnx_accuracy.py --model mine.onnx

Trains a small convolutional ANN on MNIST in torch, writes it as ONNX, reads that file, converts it for each number of
steps and each kind of neuron, and quantises it to 8 bits. The integers run the whole test set on the event simulator;
the first samples also run on the torch integers, spike for spike, and as floats.
"""

import argparse
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from spikeport.converters.ann import Ann, forward
from spikeport.converters.lower import lower
from spikeport.converters.onnx_reader import read_onnx
from spikeport.converters.quantize import quantize
from spikeport.converters.rate_conversion import Conversion, NeuronKind, convert
from spikeport.deploy import event_simulator, torch_backend
from spikeport.deploy.trace import decisions
from spikeport.models.datasets import Dataset, load_dataset
from spikeport.models.datasets.base import Split
from spikeport.models.encoders import Encoder
from spikeport.models.errors import SpikeportError
from spikeport.models.files import write_json

STEPS = (1, 2, 4, 8, 16, 32)
LARGEST_STEPS, LARGEST_LOSS = 32, 0.5
"""The must: at so many steps or fewer, at most so many points below the ANN, as floats and with 8 bits."""

MESSAGE_BITS = Conversion.message_bits
BALANCED_ON, SCALED_ON = 1000, 32
"""Training samples that thresholds are balanced on and scales are searched on."""

AS_FLOATS, ON_TORCH = 1000, 100
"""Test samples that run as floats, and on the torch integers beside the event simulator."""

BATCH = 2500


@dataclass(frozen=True)
class Row:
    """One network. Accuracies in percent; loss: points below the ANN on the same samples.

    differing: neuron-steps in which the event simulator is not the torch integers. spikes, synops: per inference.
    """

    neuron: str
    steps: int
    float_accuracy: float
    float_loss: float
    accuracy: float
    loss: float
    differing: int
    spikes: float
    synops: float

    @property
    def held(self) -> bool:
        return self.loss <= LARGEST_LOSS and self.float_loss <= LARGEST_LOSS


def train(data: Dataset, epochs: int) -> nn.Module:
    """A network of two convolutions, average pooling and two matrices."""
    torch.manual_seed(1)
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 5), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(8, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    images, labels = torch.from_numpy(data.train.images), torch.from_numpy(data.train.labels)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 8e-3, epochs=epochs, steps_per_epoch=-(-len(images) // 100)
    )
    for epoch in range(epochs):
        for batch in torch.randperm(len(images)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}", flush=True)
    return net.eval()


def write(net: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    """The network as ONNX, with a batch of any size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's newer exporter needs a package more
        example, batch = torch.zeros(1, *shape), {"images": {0: "batch"}}
        torch.onnx.export(net, (example,), path, dynamo=False, input_names=["images"], dynamic_axes=batch)


def ann_decisions(ann: Ann, images: np.ndarray) -> np.ndarray:
    parts = [forward(ann, torch.from_numpy(images[i : i + BATCH]))[ann.output] for i in range(0, len(images), BATCH)]
    return torch.cat(parts).argmax(dim=1).numpy()


def encoded(images: np.ndarray, steps: int) -> dict[str, np.ndarray]:
    spikes = Encoder("graded", steps, MESSAGE_BITS)(torch.from_numpy(images))
    return {"input": spikes.transpose(0, 1).to(torch.uint8).contiguous().numpy()}


def measure(ann: Ann, neuron: NeuronKind, steps: int, data: Dataset, test: Split, wanted: np.ndarray) -> Row:
    """Convert, quantise and run. wanted: the ANN's decisions on the test samples."""
    graph = lower(convert(ann, data.train.images[:BALANCED_ON], Conversion(steps, neuron, MESSAGE_BITS)), ann.name)
    integer, _ = quantize(graph, encoded(data.train.images[:SCALED_ON], steps))
    few = test.images[:AS_FLOATS]
    as_float = decisions(graph.readout, torch_backend.run(graph, encoded(few, steps)))
    decided, spikes, synops = [], 0, 0
    for start in range(0, len(test), BATCH):
        trace = event_simulator.run(integer, encoded(test.images[start : start + BATCH], steps))
        decided.append(decisions(integer.readout, trace))
        spikes += sum(int(trace.spike_counts(population.name).sum()) for population in integer.populations)
        synops += sum(int(counts.sum()) for counts in trace.synops.values())
        if start == 0:
            count = min(ON_TORCH, trace.samples)
            exact = torch_backend.run(integer, encoded(test.images[:count], steps))
            pairs = ((exact.spikes(name), trace.head(count).spikes(name)) for name in exact.sizes)
            differing = sum(int((one != other).sum()) for one, other in pairs)

    def share(found: np.ndarray) -> float:
        return 100 * float((found == test.labels[: len(found)]).mean())

    found = np.concatenate(decided)
    return Row(
        neuron,
        steps,
        share(as_float),
        share(wanted[: len(few)]) - share(as_float),
        share(found),
        share(wanted) - share(found),
        differing,
        spikes / len(test),
        synops / len(test),
    )


def show(rows: list[Row], accuracy: float, samples: int) -> None:
    title = f"ANN: {accuracy:.2f} % of {samples:,} test samples"
    table = Table(title=title, title_justify="left")
    headings = (
        "neuron",
        "T",
        f"float, {min(AS_FLOATS, samples):,}",
        "loss",
        "8 bit",
        "loss",
        "differ",
        "spikes",
        "synops",
        "",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "neuron" else "right", no_wrap=True)
    for row in rows:
        figures = (f"{row.float_accuracy:.2f}", f"{row.float_loss:+.2f}", f"{row.accuracy:.2f}", f"{row.loss:+.2f}")
        counts = (f"{row.differing}", f"{row.spikes:,.0f}", f"{row.synops:,.0f}")
        table.add_row(row.neuron, str(row.steps), *figures, *counts, "held" if row.held else "")
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def draw(rows: list[Row], accuracy: float, path: Path) -> None:
    """Accuracy with 8 bits against T, a line for each kind of neuron."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from spikeport.deploy.drawing import GREY, OKABE_ITO

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for neuron, colour in zip(dict.fromkeys(row.neuron for row in rows), OKABE_ITO, strict=False):
        points = [row for row in rows if row.neuron == neuron]
        axes.plot([p.steps for p in points], [p.accuracy for p in points], "o-", color=colour, label=neuron)
    axes.axhline(accuracy, color=GREY, linestyle="--", label="ANN")
    axes.set(xscale="log", xlabel="steps of a sample, T", ylabel="test accuracy, %, 8 bit", ylim=(80, 100))
    axes.set_xticks(STEPS, [str(steps) for steps in STEPS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an ANN for MNIST images in 0..1 to take instead of training one")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--samples", type=int, default=10_000, help="test samples")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--neurons", nargs="+", choices=get_args(NeuronKind), default=get_args(NeuronKind))
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="draw accuracy against T here")
    options = parser.parse_args()
    began = time.perf_counter()
    try:
        data = load_dataset("mnist", 5000, 1)
        test = Split(data.test.images[: options.samples], data.test.labels[: options.samples])
        if options.model:
            ann = read_onnx(options.model)
        else:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "mnist.onnx"
                write(train(data, options.epochs), data.image_shape, path)
                ann = read_onnx(path)
        wanted = ann_decisions(ann, test.images)
        accuracy = 100 * float((wanted == test.labels).mean())
        rows: list[Row] = []
        for neuron in options.neurons:
            for steps in options.steps:
                rows.append(measure(ann, neuron, steps, data, test, wanted))
                print(f"{neuron}, {steps} steps: {rows[-1].accuracy:.2f} %", flush=True)
    except SpikeportError as error:
        print(f"onnx-accuracy: {error}", file=sys.stderr)
        return 2
    show(rows, accuracy, len(test))
    held = [row for row in rows if row.held and row.steps <= LARGEST_STEPS]
    equal = not any(row.differing for row in rows)
    print(f"within {LARGEST_LOSS} points at T <= {LARGEST_STEPS}: {'held' if held else 'MISSED'}")
    print(f"event simulator = torch integers: {'held' if equal else 'MISSED'}  ({time.perf_counter() - began:.0f} s)")
    if options.json:
        write_json(options.json, {"ann": accuracy, "samples": len(test), "rows": [asdict(row) for row in rows]})
    if options.plot:
        draw(rows, accuracy, options.plot)
    return 0 if held and equal else 1


if __name__ == "__main__":
    sys.exit(main())
