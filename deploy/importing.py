"""`spikeport import FILE.nir`: a run folder from a network that was trained elsewhere.

The file is read, run in floats on the test samples exactly as it says, and put into the folder together with a recipe
whose section [import] holds every choice that the file did not record. `quantize` and all stages after it then work as
on a network of ours. A network that the chip cannot do still runs in floats; import.json has what `quantize` will say.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nir
import numpy as np
import torch

from spikeport.converters.lower import FIRING, readout_kind
from spikeport.converters.nir_float import FloatNetwork
from spikeport.converters.nir_graph import INTEGRATORS, NEURONS, POPULATIONS, SPIKING, out_shape
from spikeport.converters.nir_peers import Peer, for_peer
from spikeport.converters.nir_reader import read_nir
from spikeport.converters.nir_timing import Discretization
from spikeport.converters.nir_writer import write_nir
from spikeport.deploy.chip import load_chip
from spikeport.deploy.progress import Progress
from spikeport.deploy.run_folder import RunFolder, load_data, lower_imported
from spikeport.deploy.trace import Trace, pack
from spikeport.models.datasets.arrays import Arrays, write_arrays_file
from spikeport.models.errors import GraphError
from spikeport.models.files import write_text
from spikeport.models.readouts import ReadoutKind, decide
from spikeport.models.recipe import ChipSection, ConversionSection, ImportedRecipe, Recipe, parse_any_recipe, to_toml

BATCH_VALUES = 1 << 25
"""Values that a batch of samples may leave behind in floats."""


GRADED_CHIP = "loihi2"
"""The chip where the input is graded and that of the recipe, or the default, only takes binary spikes."""


@dataclass(frozen=True)
class Choices:
    """What a file may leave open; None takes what it records."""

    dt: float | None = None
    reset: str | None = None
    discretization: Discretization | None = None
    steps: int | None = None
    readout: ReadoutKind | None = None


def import_nir(
    source: Path, folder: Path, choices: Choices, data: Arrays | Recipe, origin: str, progress: Progress
) -> RunFolder:
    """Make a run folder of a NIR file and run it in floats; arguments as of `import_network`.

    Raises GraphError where the file is wrong or leaves a choice open that is not made.
    """
    network = FloatNetwork(
        read_nir(source), str(source), dt=choices.dt, reset=choices.reset, discretization=choices.discretization
    )
    return import_network(network, source, folder, choices, data, origin, progress)


def import_network(
    network: FloatNetwork,
    source: Path,
    folder: Path,
    choices: Choices,
    data: Arrays | Recipe,
    origin: str,
    progress: Progress,
    conversion: ConversionSection | None = None,
    found: dict[str, Any] | None = None,
) -> RunFolder:
    """Make a run folder of a network and run it in floats.

    Args:
        source: the file that it comes from.
        data: spikes that the user gave, or the recipe whose data, encoder, quantisation, chip and checks are used.
        origin: what the data is called.
        conversion: how it was converted from an ANN, if it was; found: what import.json is to say besides.
    """
    started = time.perf_counter()
    sections = _sections(source, network, choices, data)
    if conversion is not None:
        sections["import"]["conversion"] = conversion.model_dump()
    text = to_toml(sections)
    recipe = parse_any_recipe(text, str(source))
    assert isinstance(recipe, ImportedRecipe)
    _check_readout(network.graph, recipe.imported.readout)
    place = RunFolder(folder)
    write_text(place.recipe_file, text)
    write_nir(recorded(network), place.nir_file)
    if isinstance(data, Arrays):
        inputs, labels = {recipe.imported.input: data.x}, data.labels
    else:
        place.__dict__["data"] = load_data(recipe)
        inputs, labels = place.test_inputs, place.data.test.labels
    samples = len(next(iter(inputs.values())))
    with progress.task("run the network in floats", samples, "samples") as advance:
        trace, decided = run_float(network, inputs, recipe.imported.readout, _keep(network), advance)
    trace.save(place.trace_file("float"))
    note = ""
    if isinstance(data, Arrays):
        note = _note(data, origin)
        write_arrays_file(place.arrays_file, replace(data, labels=decided if labels is None else labels))
    refused = _refusal(network.graph, recipe)
    accuracy = None if labels is None else float((decided == labels).mean())
    place.write_result(
        "import",
        {
            "source": source.name,
            "dt": network.timing.dt,
            "reset": network.timing.reset,
            "discretization": network.timing.discretization,
            "parameters": _parameters(network.graph),
            "architecture": architecture(network),
            "float_accuracy": accuracy,
            "samples": samples,
            "data_note": note,
            "not_on_chip": refused,
            **(found or {}),
            "seconds": round(time.perf_counter() - started, 3),
        },
    )
    timing = network.timing
    progress.say(
        f"{source.name}: {architecture(network)}, {recipe.steps} steps of dt = {timing.dt:g}, "
        f"reset {timing.reset!r}, {timing.discretization}"
    )
    if accuracy is not None:
        progress.say(f"in floats {accuracy:.2%} of {samples:,} test samples are decided as labelled")
    if refused:
        progress.say(f"runs in floats only; the chip cannot do it: {refused}")
    return place


def _sections(source: Path, network: FloatNetwork, choices: Choices, data: Arrays | Recipe) -> dict[str, Any]:
    """The recipe of an imported network."""
    graph, timing = network.graph, network.timing
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    if len(inputs) != 1 or len(outputs) != 1:
        raise GraphError(
            f"{source} has {len(inputs)} Input and {len(outputs)} Output nodes; a run folder takes one each."
        )
    steps = choices.steps or (data.x.shape[1] if isinstance(data, Arrays) else data.steps)
    shape = out_shape(graph.nodes[inputs[0]])
    if isinstance(data, Arrays) and data.x.shape[1:] != (steps, *shape):
        raise GraphError(
            f"x is of shape {data.x.shape}, but {source.name} takes (samples, steps, {', '.join(map(str, shape))})"
            f"{f' with {steps} steps' if choices.steps else ''}."
        )
    sections: dict[str, Any] = {
        "name": _name(source),
        "import": {
            "source": source.name,
            "steps": int(steps),
            "dt": timing.dt,
            "reset": timing.reset,
            "discretization": timing.discretization,
            "readout": choices.readout or readout_kind(graph),
            "input": inputs[0],
            "input_shape": list(shape),
            "output_size": math.prod(out_shape(graph.nodes[outputs[0]])),
        },
    }
    if isinstance(data, Arrays):
        largest = max(int(part.max()) for part in (data.x, data.calibration) if part is not None)
        encoder = {"name": "events", "message_bits": max(1, largest.bit_length())}
        sections |= {"data": {"set": "arrays"}, "encoder": encoder}
    else:
        shared = ("seed", "data", "encoder", "quantization", "chip", "check")
        sections |= {key: value for key, value in data.model_dump(exclude_none=True).items() if key in shared}
    chip = sections.setdefault("chip", ChipSection().model_dump(exclude_none=True))
    if load_chip(chip["name"]).supports.message_bits < sections["encoder"]["message_bits"]:
        chip |= {"name": GRADED_CHIP, "compare": ChipSection().name}
    return sections


def _name(source: Path) -> str:
    """The file's name, as a recipe may be called."""
    kept = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in source.stem
    )
    return kept.lstrip("._-") or "network"


def run_float(
    network: FloatNetwork,
    inputs: dict[str, np.ndarray],
    readout: ReadoutKind,
    keep: float,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[Trace, np.ndarray]:
    """Run samples in floats: the spikes of every population, and the class of each sample.

    The decision is read from what the Output receives: its spikes, or as it stands after the last step.

    Raises GraphError where the readout does not fit what the Output receives.
    """
    graph = network.graph
    (output,) = graph.outputs
    populations = {key: node for key, node in graph.nodes.items() if isinstance(node, POPULATIONS)}
    sizes = {key: math.prod(out_shape(node)) for key, node in populations.items()}
    fires = _check_readout(graph, readout)
    samples, steps = next(iter(inputs.values())).shape[:2]
    values = steps * sum(math.prod(out_shape(graph.nodes[key])) for key in (*populations, output))
    rows = max(1, BATCH_VALUES // max(values, 1))
    packed: dict[str, list[np.ndarray]] = {key: [] for key in populations}
    membranes, decided = [], []
    started = time.perf_counter()
    for start in range(0, samples, rows):
        batch = {key: array[start : start + rows] for key, array in inputs.items()}
        sent = network.run(batch, [*populations, output])
        for key, node in populations.items():
            spikes = sent[key].flatten(2)
            packed[key].append(pack((spikes * 0 if isinstance(node, INTEGRATORS) else spikes).numpy()))
        out = sent[output].flatten(2)
        if not fires:
            membranes.append(out[:, -1].numpy())
        read = out[:, -1].numpy() if not fires else out.to(torch.uint8).numpy()
        decided.append(decide(readout, keep, read))
        advance(start + len(out))
    trace = Trace(
        backend="float",
        graph="",
        samples=samples,
        steps=steps,
        sizes=sizes,
        packed={key: np.concatenate(parts) for key, parts in packed.items()},
        membrane=np.concatenate(membranes) if membranes else None,
        seconds=time.perf_counter() - started,
    )
    return trace, np.concatenate(decided)


def export_for(place: RunFolder, peer: Peer) -> Path:
    """Write the network of a run folder's NIR file such that a peer loads it and fires as it does.

    Raises GraphError naming what the peer cannot do.
    """
    network = FloatNetwork(read_nir(place.nir_file), str(place.nir_file))
    path = place.nir_file.with_name(f"{place.nir_file.stem}-{peer}.nir")
    write_nir(for_peer(network.graph, network.timing, peer), path)
    return path


def _check_readout(graph: nir.NIRGraph, readout: ReadoutKind) -> bool:
    """Whether the Output receives spikes. Raises GraphError where the readout wants the other."""
    (output,) = graph.outputs
    feeding = [source for source, target in graph.edges if target == output]
    fires = len(feeding) == 1 and isinstance(graph.nodes[feeding[0]], FIRING)
    if (readout == "membrane") == fires:
        wanted = "spikes: count, psc or first_spike" if fires else "no spikes: membrane"
        raise GraphError(f"the readout {readout!r} does not fit {output!r}, which receives {wanted}.")
    return fires


def _keep(network: FloatNetwork) -> float:
    return float(network.graph.metadata.get("readout_keep", 0.0))


def recorded(network: FloatNetwork) -> nir.NIRGraph:
    """The graph with dt, reset and discretization in the metadata of every neuron."""
    graph, timing = network.graph, network.timing
    nodes = {key: copy.copy(node) for key, node in graph.nodes.items()}
    for node in nodes.values():
        if isinstance(node, NEURONS):
            chosen: dict[str, Any] = {"dt": timing.dt, "discretization": timing.discretization}
            chosen |= {"reset": timing.reset} if isinstance(node, SPIKING) else {}
            node.metadata = (node.metadata or {}) | chosen
    return nir.NIRGraph(nodes, graph.edges, graph.metadata, type_check=False)


def _refusal(graph: nir.NIRGraph, recipe: ImportedRecipe) -> str | None:
    """Why the chip cannot do a network; None where it can."""
    try:
        lower_imported(graph, recipe)
    except GraphError as error:
        return str(error)
    return None


def _parameters(graph: nir.NIRGraph) -> int:
    """Weights and biases."""
    found = (getattr(node, key, None) for node in graph.nodes.values() for key in ("weight", "bias", "scale"))
    return sum(np.size(value) for value in found if value is not None)


def architecture(network: FloatNetwork) -> str:
    """The sizes of input and populations in the order in which they are run, as in `12-38-7`; images as `2x34x34`."""
    nodes = (network.graph.nodes[key] for key in network.order)
    shown = [node for node in nodes if isinstance(node, (nir.Input, *POPULATIONS))]
    return "-".join("x".join(map(str, out_shape(node))) for node in shown)


def _note(data: Arrays, origin: str) -> str:
    parts = [f"spikes of {origin}"]
    if data.labels is None:
        parts.append("no labels: the decisions of the float network stand for them")
    if data.calibration is None:
        parts.append("calibrated on the test samples themselves")
    return "; ".join(parts)
