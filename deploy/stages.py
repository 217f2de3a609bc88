"""The stages of a run. Each reads and writes files of the run folder and can be run again alone; `run_all` is these
stages in a row, nothing more."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from spikeport.converters.bundle import write_bundle
from spikeport.converters.graph import ProcessGraph
from spikeport.converters.nir_writer import level_names, to_nir, write_nir
from spikeport.converters.quantize import quantize
from spikeport.converters.reference import Reference, Run
from spikeport.converters.slices import quantize_in_slices
from spikeport.deploy import event_simulator, lava_backend, torch_backend
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
from spikeport.deploy.verify import Comparison, SynopComparison, compare, compare_synops
from spikeport.deploy.workload import count, prepare
from spikeport.models.checkpoint import Epoch, Trained
from spikeport.models.errors import BackendUnavailableError, SpikeportError
from spikeport.models.evaluate import is_membrane, run_batches
from spikeport.models.files import write_json
from spikeport.models.networks import SpikingNetwork, build_network
from spikeport.models.processes import is_first_process
from spikeport.models.trainer import SECONDS_BETWEEN_STATES, train

BACKENDS = ("torch", "events", "lava", "loihi2")
EXPORT_CHECK_SAMPLES = 100
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


def quantize_stage(folder: RunFolder, progress: Progress) -> ProcessGraph:
    """Lower the NIR file and quantise it on samples of the training split."""
    recipe = folder.recipe
    with _timed() as elapsed:
        graph = folder.float_graph()
        samples = folder.encode(folder.data.train.images[: recipe.quantization.calibration_samples])
        with progress.task("search the scales", 1) as advance:
            method = quantize_in_slices if recipe.quantization.slices == 2 else quantize
            integer, report = method(graph, samples, lambda done, total: advance(done / total))
        integer.save(folder.graph_file)
    folder.__dict__.pop("graph", None)
    folder.write_result("quantize", report.to_json() | {"graph": integer.fingerprint(), "seconds": elapsed()})
    worst = max(report.layers, key=lambda layer: layer.spike_error)
    weights = "weights in slices" if recipe.quantization.slices == 2 else "8-bit weights"
    progress.say(f"{weights}; most affected: {worst.population}, {worst.spike_error:.2%} of neuron-steps differ")
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
    verify_stage(folder, progress)
    return report_stage(folder, progress)
