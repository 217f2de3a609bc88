"""The stages of a run. Each reads and writes files of the run folder and can be run again alone; `run_all` is these
stages in a row, nothing more."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spikeport.converters.bundle import write_bundle
from spikeport.converters.graph import ProcessGraph
from spikeport.converters.nir_writer import level_names, to_nir, write_nir
from spikeport.converters.qat import FineTuned, IntegerNetwork, fine_tune
from spikeport.converters.quantize import QuantizationReport, layer_errors, quantize
from spikeport.converters.reference import Reference, Run
from spikeport.converters.sensitivity import Sensitivity, sensitivity
from spikeport.deploy.backends import run_backend, samples_on
from spikeport.deploy.chip import Chip, load_chip
from spikeport.deploy.gpu_energy import measure_gpu_energy
from spikeport.deploy.mapping import Mapping, map_network, placement_hops
from spikeport.deploy.placement import Hops
from spikeport.deploy.progress import Progress, epoch_line
from spikeport.deploy.report import write_report
from spikeport.deploy.run_folder import RunFolder
from spikeport.deploy.summarize import summarize
from spikeport.deploy.summary import GpuMeasurement, Summary
from spikeport.deploy.tensorboard import open_events
from spikeport.deploy.timing import Model, Timing, simulate_timing
from spikeport.deploy.trace import Trace, pack
from spikeport.deploy.verifying import verify_stage
from spikeport.deploy.workload import count, prepare
from spikeport.models.checkpoint import Epoch, Trained
from spikeport.models.errors import BackendUnavailableError, SpikeportError
from spikeport.models.evaluate import is_membrane, run_batches
from spikeport.models.files import write_json
from spikeport.models.networks import SpikingNetwork, build_network
from spikeport.models.processes import is_first_process
from spikeport.models.recipe import ImportedRecipe
from spikeport.models.trainer import SECONDS_BETWEEN_STATES, train

EXPORT_CHECK_SAMPLES = 100
SENSITIVITY_SAMPLES = 1000
"""Validation samples on which each population is quantised alone, at most."""
MEMBRANE_TOLERANCE = 1e-9
"""Share of the largest membrane by which the same sum in another order may differ in float64."""


@contextmanager
def _timed() -> Iterator[Callable[[], float]]:
    started = time.perf_counter()
    yield lambda: round(time.perf_counter() - started, 3)


def train_stage(
    folder: RunFolder,
    progress: Progress,
    *,
    restart: bool = False,
    tensorboard: bool = False,
    save_every_s: float = SECONDS_BETWEEN_STATES,
) -> Trained | None:
    """Train, keep the best epoch on validation, and run the trained network on the test set.

    An interrupted training goes on where its last state was written, and gives up that state if `restart` says so.
    Under torchrun only the first process writes and returns anything.
    """
    recipe, data = folder.training_recipe, folder.data
    build_network(recipe, data.image_shape, len(data.class_names))  # refuses before any time is spent
    load_chip(recipe.chip.name)
    first = is_first_process()
    if first:
        folder.forget_state(everything=restart)
    events = open_events(folder.tensorboard_folder, recipe) if tensorboard and first else None
    batches = -(-len(data.train) // recipe.training.batch_size) * recipe.training.epochs
    with progress.training(batches, recipe.training.epochs) as view:

        def on_epoch(epoch: Epoch) -> None:
            view.epoch(epoch)
            if events is not None:
                events.add(epoch)

        trained = train(
            recipe,
            data,
            on_epoch,
            lambda done, total: view.advance(done),
            state_file=folder.state_file,
            save_every_s=save_every_s,
        )
    if not first:
        return None
    best, last = trained.best, trained.history[-1].epoch
    early = f", stopped after {last}" if last < recipe.training.epochs else ""
    progress.say(f"best epoch {best.epoch} of {recipe.training.epochs}{early}: {epoch_line(best)}")
    with _timed() as elapsed, progress.task("run the network on the test set", len(data.test), "samples") as advance:
        trace = _float_trace(trained.network, folder, advance)
    trained.save(folder.checkpoint_file)
    trace.save(folder.trace_file("float"))
    history = [asdict(epoch) for epoch in trained.history]
    parameters = sum(weight.numel() for weight in trained.network.parameters())
    seconds = round(trained.seconds + elapsed(), 3)
    folder.write_result(
        "train", {"best_epoch": best.epoch, "parameters": parameters, "history": history, "seconds": seconds}
    )
    folder.forget_state(everything=True)
    return trained


def _float_trace(network: SpikingNetwork, folder: RunFolder, advance: Callable[..., None]) -> Trace:
    """The trained network's spikes on the test set, or the membranes that decide, packed batch by batch.

    Multi-level populations are left out: their sums of spikes do not tell which of their levels fired, and nothing
    reads the float spikes of a population but the output, which has one level.
    """
    images, encoder = folder.data.test.images, folder.recipe.build_encoder()
    packed: dict[str, list[np.ndarray]] = {}
    sizes: dict[str, int] = {}
    membranes: list[np.ndarray] = []
    for done, outputs in run_batches(network, images, encoder):
        for name, values in outputs.items():
            if network.populations[name].neuron.levels:
                continue
            spikes = values.transpose(0, 1).flatten(2)
            if is_membrane(network, name):
                membranes.append(spikes[:, -1].double().cpu().numpy())
                spikes = torch.zeros_like(spikes)  # it never fires
            sizes[name] = spikes.shape[2]
            packed.setdefault(name, []).append(pack(spikes.to(torch.uint8).cpu().numpy()))
        advance(done.stop)
    return Trace(
        backend="float",
        graph="",
        samples=len(images),
        steps=folder.recipe.steps,
        sizes=sizes,
        packed={name: np.concatenate(parts) for name, parts in packed.items()},
        membrane=np.concatenate(membranes) if membranes else None,
    )


def export_stage(folder: RunFolder, progress: Progress) -> Path:
    """Write the trained network as NIR, read it back, and check that it runs to the same spikes."""
    recipe, data = folder.training_recipe, folder.data
    with _timed() as elapsed:
        network = folder.trained().network
        graph = to_nir(
            network, recipe.network.dt, recipe.network.steps, recipe.encoder.message_bits, recipe.readout_kind
        )
        write_nir(graph, folder.nir_file)
        images = data.validation.images[:EXPORT_CHECK_SAMPLES].astype(np.float64)
        inputs = folder.encode(images)
        reference = Reference(folder.float_graph())
        compared = differing = 0
        for part, expected in run_batches(network.double(), images, recipe.build_encoder()):
            again = reference.run({name: array[part] for name, array in inputs.items()})
            for name, values in expected.items():
                differs = _differs(network, name, values, again)
                compared, differing = compared + differs.numel(), differing + int(differs.sum())
    folder.write_result("export", {"compared": compared, "mismatches": differing, "seconds": elapsed()})
    if differing:
        raise SpikeportError(f"{folder.nir_file} read back differs in {differing} of {compared} neuron-steps.")
    progress.say(f"wrote {folder.nir_file.name}; read back, 0 of {compared:,} neuron-steps differ")
    return folder.nir_file


def _differs(network: SpikingNetwork, name: str, values: torch.Tensor, again: Run) -> torch.Tensor:
    """Where a lowered population, or the sum of its levels, is not what the network's was; membranes are rounded."""
    if is_membrane(network, name):
        assert again.membrane is not None
        return (again.membrane - values[-1]).abs() > MEMBRANE_TOLERANCE * values[-1].abs().max()
    levels = [again.spikes[level] for level in level_names(network.populations[name])]
    total = torch.stack(levels).sum(dim=0) if len(levels) > 1 else levels[0]
    return total.ne(values.transpose(0, 1))


def quantize_stage(
    folder: RunFolder,
    progress: Progress,
    *,
    bits: int | None = None,
    fine_tuning_epochs: int | None = None,
    with_sensitivity: bool = False,
) -> ProcessGraph:
    """Lower the NIR file, quantise it on samples of the training split, and train the integers on where asked.

    bits of a weight and fine_tuning_epochs: the recipe's by default. with_sensitivity: also measure, on the validation
    split, what each population costs.
    """
    recipe = folder.recipe
    bits = bits or recipe.quantization.weight_bits
    slices = recipe.quantization.slices
    epochs = recipe.quantization.fine_tuning.epochs if fine_tuning_epochs is None else fine_tuning_epochs
    with _timed() as elapsed:
        graph = folder.float_graph()
        samples = folder.encode(folder.data.train.images[: recipe.quantization.calibration_samples])
        with progress.task("search the scales", 1) as advance:
            integer, report = quantize(graph, samples, lambda done, total: advance(done / total), bits, slices)
        worst = max(report.layers, key=lambda layer: layer.spike_error)
        weights = "weights in slices" if slices == 2 else f"{bits}-bit weights"
        progress.say(f"{weights}; most affected: {worst.population}, {worst.spike_error:.2%} of neuron-steps differ")
        for layer in report.layers:
            if layer.spike_distance == 1:
                progress.say(
                    f"none of the spikes of {layer.population} is one of the float network's: its largest current "
                    "leaves the weights too few levels. Graded input of fewer bits (message_bits) leaves more."
                )
        found: dict[str, Any] = {}
        if epochs:
            graph = report.graph
            tuned = train_integers(folder, integer, report, epochs, progress, folder.fine_tuning_file(integer))
            kept = "every epoch was worse, the start is kept"
            if tuned.best_epoch:
                kept = f"best epoch {tuned.best_epoch} of {epochs}"
            before = f"validation accuracy {tuned.start_accuracy:.2%} before"
            progress.say(f"fine-tuned: {before}, {tuned.accuracy:.2%}; {kept}")
            integer, report = tuned.graph, layer_errors(graph, tuned.graph, report.scales, samples)
            found["fine_tuning"] = tuned.to_json()
        if with_sensitivity:
            found["sensitivity"] = _measure_sensitivity(folder, graph, integer, progress).to_json()
        integer.save(folder.graph_file)
    folder.__dict__.pop("graph", None)
    found = report.to_json() | found | {"graph": integer.fingerprint(), "seconds": elapsed()}
    folder.write_result("quantize", found)
    folder.forget_fine_tuning()
    return integer


def train_integers(
    folder: RunFolder,
    integer: ProcessGraph,
    report: QuantizationReport,
    epochs: int,
    progress: Progress,
    state_file: Path,
) -> FineTuned:
    """Train the integers of `quantize` on; a training whose state is in `state_file` goes on."""
    if isinstance(folder.recipe, ImportedRecipe):
        raise SpikeportError(
            f"{folder.path} holds an imported network, whose recipe has no [rule] to train it by. "
            "Quantize it without fine-tuning, or fine-tune it in Python (spikeport.converters.qat)."
        )
    recipe = folder.recipe.with_fine_tuning(epochs)
    network = IntegerNetwork(report.graph, integer, report.scales, recipe.rule.build())
    batches = -(-len(folder.data.train) // recipe.training.batch_size) * epochs
    with progress.training(batches, epochs) as view:
        return fine_tune(
            network,
            recipe,
            folder.data,
            view.epoch,
            lambda done, total: view.advance(done),
            state_file=state_file,
        )


def _measure_sensitivity(
    folder: RunFolder, graph: ProcessGraph, integer: ProcessGraph, progress: Progress
) -> Sensitivity:
    split = folder.data.validation
    inputs = folder.encode(split.images[:SENSITIVITY_SAMPLES])
    with progress.task("quantise population by population", 1) as advance:
        labels = split.labels[:SENSITIVITY_SAMPLES]
        found = sensitivity(graph, integer, inputs, labels, lambda done, total: advance(done / total))
    most = found.most_sensitive
    progress.say(
        f"most sensitive: {most.population}; validation accuracy {found.float_accuracy:.2%} in floats, "
        f"{most.alone:.2%} with it alone in integers, {most.without:.2%} with all but it, "
        f"{found.integer_accuracy:.2%} with all"
    )
    return found


def simulate_stage(folder: RunFolder, backend: str, progress: Progress) -> Trace:
    """Run the test set (a part of it on Lava) on one backend and store its trace."""
    with _timed() as elapsed:
        samples = samples_on(folder, backend)
        with progress.task(f"simulate on {backend}", samples, "samples") as advance:
            trace = run_backend(backend, folder.graph, folder, advance)
        if backend == "events":
            folder.forget_timings()
        trace.save(folder.trace_file(backend))
    folder.write_result(f"simulate-{backend}", {"samples": samples, "seconds": elapsed()})
    progress.say(f"{backend}: {samples:,} samples in {trace.seconds:.1f} s ({samples / trace.seconds:,.0f} samples/s)")
    return trace


def fetch_stage(folder: RunFolder, file: Path, progress: Progress) -> Trace:
    """Take in the trace that a bundle of this folder left elsewhere, on Lava or on a board.

    Raises SpikeportError where it is of another network or of other samples than the first ones of the test set.
    """
    trace = Trace.load(file, folder.graph)
    if trace.backend not in ("lava", "loihi2"):
        raise SpikeportError(f"{file} was made by {trace.backend!r}; --from takes what the runner of a bundle left.")
    for name, array in folder.test_inputs.items():
        part = array[: trace.samples]
        events = pack(part.reshape(*part.shape[:2], -1) != 0)
        if name not in trace.packed or not np.array_equal(trace.packed[name], events):
            raise SpikeportError(
                f"{file} was not made from the first {trace.samples:,} test samples of {folder.path}.\n"
                "Run `spikeport bundle` again, and the new bundle."
            )
    trace.save(folder.trace_file(trace.backend))
    folder.write_result(f"simulate-{trace.backend}", {"samples": trace.samples, "seconds": trace.seconds})
    progress.say(f"took in {trace.samples:,} samples that {trace.backend} ran in {trace.seconds:.1f} s")
    return trace


def map_stage(folder: RunFolder, progress: Progress) -> tuple[Mapping, Hops]:
    """Put the network onto the recipe's chip; the mapping, and its weighted hops beside those of other placements."""
    pins = folder.recipe.chip.pins
    with _timed() as elapsed:
        chip = load_chip(folder.recipe.chip.name)
        mapping = map_network(folder.graph, chip, pins)
        hops = placement_hops(folder.graph, mapping, chip, pins)
        folder.forget_timings()
        write_json(folder.result_file("mapping"), mapping.to_json())
    found = {"chip": chip.name, "cores": len(mapping.cores), "weighted_hops": asdict(hops), "seconds": elapsed()}
    folder.write_result("map", found)
    progress.say(f"mapped onto {len(mapping.cores)} cores of {chip.title}; fullest core: {_fullest(mapping, chip)}")
    return mapping, hops


def _fullest(mapping: Mapping, chip: Chip) -> str:
    used = {name: max(core.use[name] for core in mapping.cores) for name in chip.limits.items()}
    limits = {name: limit for name, limit in chip.limits.items().items() if math.isfinite(limit)}
    return ", ".join(f"{used[name]:,} of {limit:,.0f} {name.replace('_', ' ')}" for name, limit in limits.items())


def timing_stage(folder: RunFolder, progress: Progress, model: Model | None = None) -> Timing:
    """Time the first samples of the event simulator's run on the recipe's chip, and with its second set of costs."""
    section = folder.recipe.chip
    chips = [load_chip(name) for name in (section.name, section.compare) if name is not None]
    model = model or section.timing
    with _timed() as elapsed:
        trace = folder.trace("events")
        workload = prepare(folder.graph, folder.mapping(), trace.head(min(section.timing_samples, trace.samples)))
        counts = count(workload)
        timings = []
        for chip in chips:
            with progress.task(f"{model} timing on {chip.name}", workload.chip_steps, "chip steps") as advance:
                timings.append(simulate_timing(workload, counts, chip, model, progress=advance))
            timings[-1].save(folder.timing_file(chip), folder.graph)
    folder.write_result("timing", {"model": model, "samples": workload.trace.samples, "seconds": elapsed()})
    timing, chip = timings[0], chips[0]
    progress.say(
        f"{model} timing of {timing.samples:,} samples on {chip.title}: "
        f"{timing.ticks_per_inference * timing.tick_ns / 1000:,.1f} µs per inference, {_waits(timing)}"
    )
    return timing


def gpu_stage(folder: RunFolder, progress: Progress) -> None:
    """Measure the energy of inference on this machine's GPU; where there is none, store why."""
    with _timed() as elapsed:
        found, reason = measure_gpu_energy(folder.graph, folder.test_inputs)
    if found is None:
        folder.write_result("gpu", {"skipped": reason, "seconds": elapsed()})
        progress.say(f"GPU energy not measured: {reason}")
        return
    figures = {key: getattr(found, key) for key in GpuMeasurement.model_fields}
    folder.write_result("gpu", figures | {"elapsed": elapsed()})
    progress.say(f"{found.device}: {found.energy_nj_per_inference / 1000:,.1f} µJ per inference (whole board)")


def _waits(timing: Timing) -> str:
    """What the steps wait for, the largest parts first."""
    whole = max(timing.total_ticks, 1)
    shares = sorted(((int(ticks.sum()) / whole, cause) for cause, ticks in timing.causes.items()), reverse=True)
    return "of which " + ", ".join(f"{share:.0%} {cause}" for share, cause in shares[:3] if share >= 0.005)


def report_stage(folder: RunFolder, progress: Progress) -> Summary:
    """Write summary.json and report.html."""
    with _timed() as elapsed:
        summary = summarize(folder)
        summary.save(folder.summary_file)
        write_report(summary, folder.trace("events"), folder.report_file)
    folder.write_result("report", {"seconds": elapsed()})
    progress.say(f"report: {folder.report_file}")
    return summary


def bundle_stage(folder: RunFolder, samples: int | None = None, out: Path | None = None) -> Path:
    """Write the bundle for Lava or a Loihi host, with the first test samples as its stream.

    Args:
        samples: the recipe's `lava_samples` by default.
        out: where to; DIR/bundle by default.
    """
    samples = samples_on(folder, "lava") if samples is None else samples
    if samples > len(folder.data.test):
        raise SpikeportError(f"the test set has {len(folder.data.test):,} samples; {samples:,} were asked for.")
    inputs = {name: array[:samples] for name, array in folder.test_inputs.items()}
    write_bundle(folder.graph, inputs, out or folder.bundle_folder)
    return out or folder.bundle_folder


def onnx_stage(folder: RunFolder) -> list[Path]:
    """Write the integer network as ONNX: a model of one step, and one of a whole sample."""
    from spikeport.converters.onnx_writer import step_model, window_model, write_onnx  # takes a while to import

    models = {"step": step_model(folder.graph), "window": window_model(folder.graph)}
    for kind, model in models.items():
        write_onnx(model, folder.onnx_file(kind))
    return [folder.onnx_file(kind) for kind in models]


def run_all(
    folder: RunFolder,
    progress: Progress,
    *,
    restart: bool = False,
    tensorboard: bool = False,
    save_every_s: float = SECONDS_BETWEEN_STATES,
) -> Summary | None:
    """Every stage in a row. A backend that this machine lacks is skipped, and the summary says why.

    Under torchrun all processes train, and the first one alone goes on from there; the others return None.
    """
    trained = train_stage(folder, progress, restart=restart, tensorboard=tensorboard, save_every_s=save_every_s)
    return None if trained is None else run_trained(folder, progress)


def run_trained(folder: RunFolder, progress: Progress) -> Summary:
    """Every stage after training."""
    export_stage(folder, progress)
    quantize_stage(folder, progress)
    map_stage(folder, progress)
    simulate_stage(folder, "torch", progress)
    gpu_stage(folder, progress)
    simulate_stage(folder, "events", progress)
    timing_stage(folder, progress)
    skip_file = folder.result_file("simulate-lava")
    folder.trace_file("lava").unlink(missing_ok=True)
    skip_file.unlink(missing_ok=True)
    try:
        simulate_stage(folder, "lava", progress)
    except BackendUnavailableError as error:
        folder.write_result("simulate-lava", {"skipped": str(error), "seconds": 0.0})
        progress.say(f"Lava skipped: {error}")
    for comparison in verify_stage(folder, progress)[0]:
        progress.say(str(comparison))
    return report_stage(folder, progress)
