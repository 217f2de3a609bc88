"""The stages of a run. Each reads and writes files of the run folder and can be run again alone; `run_all` is these
stages in a row, nothing more."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from spikeport.converters.bundle import write_bundle
from spikeport.converters.graph import ProcessGraph
from spikeport.converters.lower import lower
from spikeport.converters.nir_reader import read_nir
from spikeport.converters.nir_writer import to_nir, write_nir
from spikeport.converters.quantize import quantize
from spikeport.converters.reference import Reference
from spikeport.deploy import event_simulator, lava_backend, torch_backend
from spikeport.deploy.chip import Chip, load_chip
from spikeport.deploy.gpu_energy import measure_gpu_energy
from spikeport.deploy.mapping import Mapping, map_network, placement_hops
from spikeport.deploy.placement import Hops
from spikeport.deploy.progress import Progress
from spikeport.deploy.report import write_report
from spikeport.deploy.run_folder import RunFolder
from spikeport.deploy.summarize import summarize
from spikeport.deploy.summary import GpuMeasurement, Summary
from spikeport.deploy.timing import Model, Timing, simulate_timing
from spikeport.deploy.trace import Trace, pack
from spikeport.deploy.verify import Comparison, SynopComparison, compare, compare_synops
from spikeport.deploy.workload import count, prepare
from spikeport.models.errors import BackendUnavailableError, SpikeportError
from spikeport.models.files import write_json
from spikeport.models.networks import parse_architecture
from spikeport.models.trainer import Epoch, Trained, run_network, train

BACKENDS = ("torch", "events", "lava", "loihi2")
EXPORT_CHECK_SAMPLES = 100


@contextmanager
def _timed() -> Iterator[Callable[[], float]]:
    started = time.perf_counter()
    yield lambda: round(time.perf_counter() - started, 3)


def train_stage(folder: RunFolder, progress: Progress) -> Trained:
    """Train, keep the best epoch on validation, and run the trained network on the test set."""
    recipe, data = folder.recipe, folder.data
    parse_architecture(recipe.network.architecture, data.image_shape, len(data.class_names))
    load_chip(recipe.chip.name)
    batches = -(-len(data.train) // recipe.training.batch_size) * recipe.training.epochs
    with _timed() as elapsed:
        with progress.task("train", batches) as advance:
            last: list[str] = [""]

            def on_epoch(epoch: Epoch) -> None:
                last[0] = f"epoch {epoch.epoch}, {_epoch_line(epoch)}"
                advance(epoch.epoch * batches // recipe.training.epochs, last[0])

            trained = train(recipe, data, on_epoch, lambda done, total: advance(done, last[0]))
        best = trained.best
        progress.say(f"best epoch {best.epoch} of {recipe.training.epochs}: {_epoch_line(best)}")
        encoder = recipe.build_encoder()
        with progress.task("run the trained network on the test set", len(data.test), "samples") as advance:
            spikes = run_network(trained.network, data.test.images, encoder, on_batch=advance)
    trained.save(folder.checkpoint_file)
    flat = {name: array.reshape(*array.shape[:2], -1) for name, array in spikes.items()}
    Trace(
        backend="float",
        graph="",
        samples=len(data.test),
        steps=recipe.network.steps,
        sizes={name: array.shape[2] for name, array in flat.items()},
        packed={name: pack(array) for name, array in flat.items()},
    ).save(folder.trace_file("float"))
    history = [asdict(epoch) for epoch in trained.history]
    parameters = sum(weight.numel() for weight in trained.network.parameters())
    folder.write_result(
        "train",
        {"best_epoch": best.epoch, "parameters": parameters, "history": history, "seconds": elapsed()},
    )
    return trained


def _epoch_line(epoch: Epoch) -> str:
    firing = float(np.mean(list(epoch.firing_rate.values())))
    dead = float(np.mean(list(epoch.dead_share.values())))
    return f"validation {epoch.validation_accuracy:.2%}, firing {firing:.1%}, dead {dead:.1%}"


def export_stage(folder: RunFolder, progress: Progress) -> Path:
    """Write the trained network as NIR, read it back, and check that it runs to the same spikes."""
    recipe, data = folder.recipe, folder.data
    with _timed() as elapsed:
        network = folder.trained().network
        graph = to_nir(network, recipe.network.dt, recipe.network.steps, recipe.encoder.message_bits)
        write_nir(graph, folder.nir_file)
        images = data.validation.images[:EXPORT_CHECK_SAMPLES].astype(np.float64)
        expected = run_network(network.double(), images, recipe.build_encoder())
        again = Reference(lower(read_nir(folder.nir_file), recipe.name)).run(folder.encode(images))
        differing = sum(int((again.spikes[name].numpy() != spikes).sum()) for name, spikes in expected.items())
        compared = sum(spikes.size for spikes in expected.values())
    folder.write_result("export", {"compared": compared, "mismatches": differing, "seconds": elapsed()})
    if differing:
        raise SpikeportError(f"{folder.nir_file} read back differs in {differing} of {compared} neuron-steps.")
    progress.say(f"wrote {folder.nir_file.name}; read back, 0 of {compared:,} neuron-steps differ")
    return folder.nir_file


def quantize_stage(folder: RunFolder, progress: Progress) -> ProcessGraph:
    """Lower the NIR file and quantise it on samples of the training split."""
    recipe = folder.recipe
    with _timed() as elapsed:
        graph = lower(read_nir(folder.nir_file), recipe.name)
        samples = folder.encode(folder.data.train.images[: recipe.quantization.calibration_samples])
        with progress.task("search the scales", 1) as advance:
            integer, report = quantize(graph, samples, lambda done, total: advance(done / total))
        integer.save(folder.graph_file)
    folder.__dict__.pop("graph", None)
    folder.write_result("quantize", report.to_json() | {"graph": integer.fingerprint(), "seconds": elapsed()})
    worst = max(report.layers, key=lambda layer: layer.spike_error)
    progress.say(f"8-bit weights; most affected: {worst.population}, {worst.spike_error:.2%} of neuron-steps differ")
    return integer


def simulate_stage(folder: RunFolder, backend: str, progress: Progress) -> Trace:
    """Run the test set (a part of it on Lava) on one backend and store its trace."""
    recipe, graph, inputs = folder.recipe, folder.graph, folder.test_inputs
    with _timed() as elapsed:
        if backend in ("lava", "loihi2"):
            samples = min(recipe.check.lava_samples, len(folder.data.test))
            inputs = {name: array[:samples] for name, array in inputs.items()}
        total = len(next(iter(inputs.values())))
        with progress.task(f"simulate on {backend}", total, "samples") as advance:
            trace = _run_backend(backend, graph, inputs, folder, advance)
        if backend == "events":
            folder.forget_timings()
        trace.save(folder.trace_file(backend))
    folder.write_result(f"simulate-{backend}", {"samples": total, "seconds": elapsed()})
    progress.say(f"{backend}: {total:,} samples in {trace.seconds:.1f} s ({total / trace.seconds:,.0f} samples/s)")
    return trace


def _run_backend(
    backend: str, graph: ProcessGraph, inputs: dict[str, np.ndarray], folder: RunFolder, advance: Callable[..., None]
) -> Trace:
    timeout = folder.recipe.check.lava_timeout_s
    match backend:
        case "torch":
            return torch_backend.run(graph, inputs, progress=advance)
        case "events":
            return event_simulator.run(graph, inputs, progress=advance)
        case "lava":
            return lava_backend.run(graph, inputs, folder.bundle_folder, timeout, progress=advance)
        case "loihi2":
            return lava_backend.run_loihi2(graph, inputs, folder.bundle_folder, timeout, progress=advance)
    raise SpikeportError(f"unknown backend {backend!r}. Known: {', '.join(BACKENDS)}.")


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


def verify_stage(folder: RunFolder, progress: Progress) -> tuple[list[Comparison], list[SynopComparison]]:
    """Compare every stored trace with the torch integers, and the simulator's synaptic operations with the trace's."""
    graph, reference = folder.graph, folder.trace("torch")
    with _timed() as elapsed:
        comparisons, synops = [], []
        for backend in ("events", "lava", "loihi2"):
            if folder.trace_file(backend).is_file():
                trace = folder.trace(backend)
                comparisons.append(compare(graph, reference, trace, folder.test_inputs))
                if trace.synops:
                    synops += compare_synops(graph, trace, reference)
        if not comparisons:
            raise SpikeportError("there is only the torch trace. Run `spikeport simulate --backend events` first.")
    folder.write_result(
        "verify",
        {
            "comparisons": [comparison.to_json() for comparison in comparisons],
            "synops": [asdict(check) for check in synops],
            "seconds": elapsed(),
        },
    )
    for comparison in comparisons:
        progress.say(str(comparison))
    if synops:
        total, wrong = sum(check.counted for check in synops), sum(check.steps_that_differ > 0 for check in synops)
        verdict = f"NOT equal in {wrong} of" if wrong else "equal in all"
        progress.say(
            f"synaptic operations: {total:,} counted; {verdict} {len(synops)} projections to the torch trace's"
        )
    return comparisons, synops


def report_stage(folder: RunFolder, progress: Progress) -> Summary:
    """Write summary.json and report.html."""
    with _timed() as elapsed:
        summary = summarize(folder)
        summary.save(folder.summary_file)
        write_report(summary, folder.trace("events"), folder.report_file)
    folder.write_result("report", {"seconds": elapsed()})
    progress.say(f"report: {folder.report_file}")
    return summary


def bundle_stage(folder: RunFolder, samples: int) -> Path:
    """Write the bundle for Lava or a Loihi host, with the first test samples as its stream."""
    inputs = {name: array[:samples] for name, array in folder.test_inputs.items()}
    write_bundle(folder.graph, inputs, folder.bundle_folder)
    return folder.bundle_folder


def run_all(folder: RunFolder, progress: Progress) -> Summary:
    """Every stage in a row. A backend that this machine lacks is skipped, and the summary says why."""
    train_stage(folder, progress)
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
    verify_stage(folder, progress)
    return report_stage(folder, progress)
