"""The stage `verify`: the stored traces of a run folder, or any two traces of one network or of two.

A and B of `spikeport verify A B` are names of backends in a run folder, or files of traces: stored ones, or results of
a bundle that ran elsewhere. One network is compared on two backends, unless a network is named for each side.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from spikeport.converters.graph import ProcessGraph
from spikeport.deploy import lava_backend
from spikeport.deploy.backends import BACKENDS, run_backend
from spikeport.deploy.explain import Recorder
from spikeport.deploy.progress import Progress
from spikeport.deploy.run_folder import RunFolder
from spikeport.deploy.trace import Trace
from spikeport.deploy.verify import Comparison, SynopComparison, compare, compare_synops
from spikeport.models.errors import BackendError, SpikeportError


def verify_stage(folder: RunFolder, progress: Progress) -> tuple[list[Comparison], list[SynopComparison]]:
    """Compare every stored trace with the torch integers, and the simulator's synaptic operations with the trace's."""
    started = time.perf_counter()
    graph, reference = folder.graph, folder.trace("torch")
    comparisons, synops = [], []
    for backend in ("events", "lava", "loihi2"):
        if folder.trace_file(backend).is_file():
            trace = folder.trace(backend)
            again = None, recorder(trace, graph, progress)
            comparisons.append(compare(graph, reference, trace, graded_inputs(folder, graph), recorders=again))
            if trace.synops:
                synops += compare_synops(graph, trace, reference)
    if not comparisons:
        raise SpikeportError("there is only the torch trace. Run `spikeport simulate --backend events` first.")
    folder.write_result(
        "verify",
        {
            "comparisons": [comparison.to_json() for comparison in comparisons],
            "synops": [asdict(check) for check in synops],
            "seconds": round(time.perf_counter() - started, 3),
        },
    )
    return comparisons, synops


def verify_pair(
    folder: RunFolder | None, names: tuple[str, str], graph_files: Sequence[Path], progress: Progress
) -> tuple[Comparison, ProcessGraph]:
    """Compare two traces; the result, and the network of the first.

    A backend's trace is the one stored in the folder; with a network that is not the folder's it runs on the spot, on
    the test set.

    Args:
        folder: the run folder, for names of backends and for graded inputs; one beside the files is found by itself.
        graph_files: none (the network of the run folder), one for both sides, or one for each.

    Raises SpikeportError where a trace or network is missing, or a trace is of another network.
    """
    beside = folder or _folder_beside(names, graph_files)
    graphs = _graphs(beside, graph_files)
    first, second = (_trace(name, graph, folder, progress) for name, graph in zip(names, graphs, strict=True))
    inputs = None if beside is None else graded_inputs(beside, graphs[0])
    recorders = recorder(first, graphs[0], progress), recorder(second, graphs[1], progress)
    if first.backend == second.backend:
        labels = [path.stem for path in graph_files] if len(graph_files) == 2 else ["A", "B"]
        first, second = (
            replace(trace, backend=f"{trace.backend} {label}")
            for trace, label in zip((first, second), labels, strict=True)
        )
    return compare(graphs[0], first, second, inputs, graphs[1], recorders), graphs[0]


def _folder_beside(names: Sequence[str], graph_files: Sequence[Path]) -> RunFolder | None:
    """The run folder that one of the files lies in."""
    for path in (*map(Path, names), *graph_files):
        if path.is_file() and (path.parent / "recipe.toml").is_file():
            return RunFolder.open(path.parent)
    return None


def _graphs(folder: RunFolder | None, files: Sequence[Path]) -> tuple[ProcessGraph, ProcessGraph]:
    if len(files) > 2:
        raise SpikeportError(f"{len(files)} networks are given with --graph; one is for both traces, two for each one.")
    graphs = [ProcessGraph.load(path) for path in files]
    if not graphs:
        if folder is None:
            raise SpikeportError("which network made these traces? Name it: --graph DIR/graph.npz.")
        graphs = [folder.graph]
    return graphs[0], graphs[-1]


def _trace(name: str, graph: ProcessGraph, folder: RunFolder | None, progress: Progress) -> Trace:
    if name not in BACKENDS:
        if not Path(name).is_file():
            known = f"a backend ({', '.join(BACKENDS)}) nor the file of a trace"
            raise SpikeportError(f"{name!r} is neither {known}.")
        return Trace.load(Path(name), graph)
    if folder is None:
        raise SpikeportError(f"{name!r} needs a run folder: spikeport verify DIR {name} OTHER.")
    if graph.fingerprint() == folder.graph.fingerprint():
        return Trace.load(folder.trace_file(name), graph)
    with progress.task(f"simulate on {name}", len(folder.data.test), "samples") as advance:
        return run_backend(name, graph, folder, advance)


def graded_inputs(folder: RunFolder, graph: ProcessGraph) -> dict[str, np.ndarray] | None:
    """The test set, where traces do not tell it: of a graded input they keep the events, not their payloads."""
    return folder.test_inputs if any(node.message_bits > 1 for node in graph.event_inputs) else None


def recorder(trace: Trace, graph: ProcessGraph, progress: Progress) -> Recorder | None:
    """Runs a sample of a Lava trace again, with u and v of every neuron; None for the other backends."""
    if trace.backend != "lava":
        return None

    def record(inputs: dict[str, np.ndarray]) -> Trace | None:
        try:
            with progress.task("run the sample on Lava again, for its states", 1):
                return lava_backend.run(graph, inputs, record=True)
        except BackendError as error:
            progress.say(f"the states on Lava are not known: {error}")
            return None

    return record
