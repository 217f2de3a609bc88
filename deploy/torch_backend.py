"""The `torch` backend: exact integers, batched, on the GPU where there is one; the reference for whole test sets."""

import time
from collections.abc import Callable

import numpy as np
import torch

from spikeport.converters.graph import ProcessGraph
from spikeport.converters.reference import Reference
from spikeport.deploy.trace import Trace, check_inputs, pack

STATES_PER_BATCH = 4_000_000


def run(
    graph: ProcessGraph,
    inputs: dict[str, np.ndarray],
    device: str | None = None,
    progress: Callable[[int], None] | None = None,
    record: bool = False,
) -> Trace:
    """Run all samples of `inputs` (samples, steps, *shape); float graphs run in float64.

    Args:
        device: torch device; a GPU where there is one by default.
        progress: called with the number of samples done so far.
        record: keep u and v of every step in `Trace.states`.

    Raises SpikeportError for inputs that do not fit the graph.
    """
    samples = check_inputs(graph, inputs)
    reference = Reference(graph, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    started = time.perf_counter()
    nodes = graph.event_nodes
    batch = max(1, STATES_PER_BATCH // max(node.size for node in nodes))
    packed: dict[str, list[np.ndarray]] = {node.name: [] for node in nodes}
    active: dict[str, list[np.ndarray]] = {population.name: [] for population in graph.populations}
    membrane: list[np.ndarray] = []
    states: dict[str, dict[str, list[np.ndarray]]] = {p.name: {"a": [], "u": [], "v": []} for p in graph.populations}
    for start in range(0, samples, batch):
        part = {name: array[start : start + batch] for name, array in inputs.items()}
        run_ = reference.run(part, record)
        for name, array in part.items():
            packed[name].append(pack(array.reshape(*array.shape[:2], -1)))
        for name, spikes in run_.spikes.items():
            packed[name].append(pack(spikes.flatten(2).cpu().numpy()))
            active[name].append(pack(run_.active[name].flatten(2).cpu().numpy()))
            if record:
                for key, values in (("a", run_.currents), ("u", run_.u), ("v", run_.v)):
                    states[name][key].append(values[name].flatten(2).cpu().numpy())
        if run_.membrane is not None:
            membrane.append(run_.membrane.flatten(1).cpu().numpy())
        if progress:
            progress(min(start + batch, samples))
    return Trace(
        backend="torch",
        graph=graph.fingerprint(),
        samples=samples,
        steps=graph.steps,
        sizes={node.name: node.size for node in nodes},
        packed={name: np.concatenate(parts) for name, parts in packed.items()},
        active={name: np.concatenate(parts) for name, parts in active.items()},
        membrane=np.concatenate(membrane) if membrane else None,
        states={name: {key: np.concatenate(parts) for key, parts in kinds.items()} for name, kinds in states.items()}
        if record
        else {},
        seconds=time.perf_counter() - started,
    )
