"""From the files of a run folder to its `Summary`."""

from importlib.metadata import version
from typing import Any

import numpy as np

from spikeport.converters.graph import LoihiNeuron, ProcessGraph
from spikeport.deploy.chip import load_chip
from spikeport.deploy.energy import arithmetic_reference, chip_use, price
from spikeport.deploy.operation_counts import count_operations, dense_operations
from spikeport.deploy.run_folder import RunFolder
from spikeport.deploy.summary import (
    Accuracies,
    Accuracy,
    BackendComparison,
    Cost,
    FineTuning,
    GpuMeasurement,
    Layer,
    Readout,
    Sensitivity,
    StepAccuracy,
    Summary,
    SynopCheck,
    Training,
)
from spikeport.deploy.timing import simulate_timing
from spikeport.deploy.trace import Trace, decisions
from spikeport.deploy.workload import count, prepare
from spikeport.models.errors import SpikeportError
from spikeport.models.recipe import ImportedRecipe

STAGES = (
    "import",
    "train",
    "export",
    "quantize",
    "map",
    "simulate-torch",
    "simulate-events",
    "simulate-lava",
    "timing",
    "gpu",
    "verify",
)


def summarize(folder: RunFolder) -> Summary:
    """Gather everything that the stages found. Raises SpikeportError naming the stage that has not been run."""
    recipe, graph, labels = folder.recipe, folder.graph, folder.data.test.labels
    trace, float_trace, reference = folder.trace("events"), folder.trace("float"), folder.trace("torch")
    if trace.graph != graph.fingerprint() or reference.graph != graph.fingerprint():
        raise SpikeportError("the traces were made with another network. Run `spikeport simulate` again.")
    chip = load_chip(recipe.chip.name)
    mapping = folder.mapping()
    workload = prepare(graph, mapping, trace)
    counts = count(workload)
    timing = folder.timing(chip) or simulate_timing(workload, counts, chip, "simple")
    other: Cost | None = None
    if recipe.chip.compare is not None:
        beside = load_chip(recipe.chip.compare)
        timing_beside = folder.timing(beside) or simulate_timing(workload, counts, beside, "simple")
        other = price(workload, beside, counts, timing_beside)
    operations = count_operations(graph, reference, folder.test_inputs)
    gpu = folder.result("gpu") if folder.result_file("gpu").is_file() else {"skipped": "not measured"}
    decided = decisions(graph.readout, trace)
    classes = len(folder.data.class_names)
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, decided), 1)
    verified = folder.result("verify")
    return Summary(
        spikeport_version=version("spikeport"),
        name=recipe.name,
        recipe=folder.recipe_text,
        training=_training(folder),
        readout=Readout(kind=graph.readout.kind, population=graph.readout.population, keep=graph.readout.keep),
        accuracy=_accuracies(folder, graph, float_trace, reference, trace),
        accuracy_by_step=_accuracy_by_step(graph, float_trace, reference, labels),
        confusion=confusion.tolist(),
        class_names=list(folder.data.class_names),
        comparisons=_comparisons(folder, verified["comparisons"]),
        synop_checks=[
            SynopCheck(projection=check["projection"], counted=check["counted"], derived=check["derived"])
            for check in verified["synops"]
        ],
        layers=_layers(folder, graph, trace),
        sensitivity=_sensitivity(folder.result("quantize")),
        fine_tuning=_fine_tuning(folder.result("quantize")),
        chip=chip_use(mapping, chip, counts, timing),
        cost=price(workload, chip, counts, timing),
        other_cost=other,
        reference=arithmetic_reference(counts, operations),
        gpu=_gpu(gpu),
        gpu_skipped=gpu.get("skipped"),
        seconds={stage: folder.result(stage)["seconds"] for stage in STAGES if folder.result_file(stage).is_file()},
    )


def _training(folder: RunFolder) -> Training:
    """How the network was trained, or where it was imported from."""
    recipe, data = folder.recipe, folder.data
    imported = isinstance(recipe, ImportedRecipe)
    found = folder.result("import" if imported else "train")
    shared: dict[str, Any] = {
        "steps": recipe.steps,
        "parameters": found["parameters"],
        "seed": recipe.seed,
        "train_samples": len(data.train),
        "validation_samples": len(data.validation),
        "test_samples": len(data.test),
        "dataset": data.name,
        "dataset_note": data.note,
    }
    if isinstance(recipe, ImportedRecipe):
        section = recipe.imported
        how = f"{section.source}: dt = {section.dt:g}, reset {section.reset}, {section.discretization} steps"
        if section.conversion is not None:
            accuracy = "" if found["ann_accuracy"] is None else f" of {found['ann_accuracy']:.2%}"
            how = f"{section.source}: an ANN{accuracy}, rate-converted, reset by {section.conversion.neuron}"
        return Training(
            rule="imported",
            rule_title="imported",
            reconstruction=False,
            architecture=found["architecture"],
            epochs=0,
            best_epoch=0,
            imported=how,
            **shared,
        )
    rule = recipe.rule.build()
    return Training(
        rule=recipe.rule.name,
        rule_title=rule.title,
        reconstruction="reconstructed" in rule.title,
        architecture=recipe.network.architecture,
        epochs=recipe.training.epochs,
        best_epoch=found["best_epoch"],
        **shared,
    )


def _accuracy_by_step(
    graph: ProcessGraph, float_trace: Trace, reference: Trace, labels: np.ndarray
) -> list[StepAccuracy]:
    """Accuracy after each step; empty for a membrane, which is kept of the last step alone."""
    if graph.probed is not None:
        return []
    return [
        StepAccuracy(
            steps=steps,
            float=_share(decisions(graph.readout, float_trace, steps), labels),
            quantized=_share(decisions(graph.readout, reference, steps), labels),
        )
        for steps in range(1, graph.steps + 1)
    ]


def _gpu(found: dict[str, Any]) -> GpuMeasurement | None:
    if "skipped" in found:
        return None
    return GpuMeasurement.model_validate({key: found[key] for key in GpuMeasurement.model_fields})


def _share(decided: np.ndarray, labels: np.ndarray) -> float:
    return float((decided == labels[: len(decided)]).mean())


def _accuracies(
    folder: RunFolder, graph: ProcessGraph, float_trace: Trace, reference: Trace, trace: Trace
) -> Accuracies:
    labels = folder.data.test.labels

    def accuracy(of: Trace) -> Accuracy:
        return Accuracy(accuracy=_share(decisions(graph.readout, of), labels), samples=of.samples)

    return Accuracies(
        validation_float=None if isinstance(folder.recipe, ImportedRecipe) else _validation(folder),
        float=accuracy(float_trace),
        quantized=accuracy(reference),
        simulated=accuracy(trace),
        lava=accuracy(folder.trace("lava")) if folder.trace_file("lava").is_file() else None,
        lava_skipped=_lava_skipped(folder),
        loihi2=accuracy(folder.trace("loihi2")) if folder.trace_file("loihi2").is_file() else None,
    )


def _validation(folder: RunFolder) -> Accuracy:
    training = folder.result("train")
    best = next(epoch for epoch in training["history"] if epoch["epoch"] == training["best_epoch"])
    return Accuracy(accuracy=best["validation_accuracy"], samples=len(folder.data.validation), split="validation")


def _lava_skipped(folder: RunFolder) -> str | None:
    if folder.trace_file("lava").is_file():
        return None
    if folder.result_file("simulate-lava").is_file():
        return str(folder.result("simulate-lava").get("skipped", "not run"))
    return "not run"


def _comparisons(folder: RunFolder, verified: list[dict[str, object]]) -> list[BackendComparison]:
    fields = set(BackendComparison.model_fields)
    rows = [
        BackendComparison.model_validate({key: entry[key] for key in fields & set(entry)} | {"skipped": None})
        for entry in verified
    ]
    skipped = _lava_skipped(folder)
    if skipped is not None:
        rows.append(
            BackendComparison(
                first="torch",
                second="lava",
                samples=0,
                compared=0,
                spikes=0,
                mismatches=None,
                by_population={},
                skipped=skipped,
            )
        )
    return rows


def _sensitivity(quantized: dict[str, Any]) -> Sensitivity | None:
    if "sensitivity" not in quantized:
        return None
    return Sensitivity.model_validate({key: quantized["sensitivity"][key] for key in Sensitivity.model_fields})


def _fine_tuning(quantized: dict[str, Any]) -> FineTuning | None:
    if "fine_tuning" not in quantized:
        return None
    found = quantized["fine_tuning"]
    kept = {key: found[key] for key in ("best_epoch", "start_accuracy", "accuracy")}
    return FineTuning(epochs=len(found["history"]), **kept)


def _layers(folder: RunFolder, graph: ProcessGraph, trace: Trace) -> list[Layer]:
    quantized = folder.result("quantize")
    errors = {layer["population"]: layer for layer in quantized["layers"]}
    measured = quantized.get("sensitivity", {"populations": []})["populations"]
    accuracies = {each["population"]: each for each in measured}
    macs = dense_operations(graph)
    layers = []
    for population in graph.populations:
        incoming = graph.incoming(population.name)
        spikes = trace.spike_counts(population.name)
        fired = np.bitwise_count(np.bitwise_or.reduce(trace.packed[population.name], axis=1)).sum(axis=1)
        neuron, error = population.neuron, errors[population.name]
        layers.append(
            Layer(
                name=population.name,
                operator=" + ".join(projection.operator.kind for projection in incoming),
                shape=list(population.shape),
                neurons=population.size,
                synapses=sum(projection.operator.n_synapses() for projection in incoming),
                parameters=sum(projection.operator.weight.size for projection in incoming),
                spikes_per_inference=float(spikes.sum() / trace.samples),
                firing_rate=float(spikes.sum() / (trace.samples * trace.steps * population.size)),
                silent_share=1 - float(fired.mean()) / population.size,
                synops_per_inference=sum(float(trace.synops[p.name].sum()) for p in incoming) / trace.samples,
                dense_macs_per_inference=graph.steps * sum(macs[projection.name] for projection in incoming),
                weight_error=error["weight_error"],
                current_error=error["current_error"],
                spike_error=error["spike_error"],
                headroom=error["headroom"],
                membrane_error=error.get("membrane_error"),
                decision_error=error.get("decision_error"),
                weight_bits=error["weight_bits"],
                threshold=int(np.max(neuron.vth)) if isinstance(neuron, LoihiNeuron) else 0,
                current_decay_error=error.get("current_decay_error"),
                voltage_decay_error=error.get("voltage_decay_error"),
                threshold_error=error.get("threshold_error"),
                accuracy_alone=accuracies.get(population.name, {}).get("alone"),
                accuracy_without=accuracies.get(population.name, {}).get("without"),
            )
        )
    return layers
