"""The Lava bundle: one folder with everything that runs an integer `ProcessGraph` as one stream of samples on Lava.

    bundle.json     processes and connections, in the order in which the runner builds them
    network.npz     weights and neuron parameters
    stream.npz      input spikes, samples back to back
    run_lava.py     the runner (`spikeport.converters.lava_runner`)
    README.md       how to run it, and what comes back

All geometry is settled here, so that the runner only builds processes. Ours is (channel, row, column) and Lava's `Conv`
wants (width, height, channel): a node that touches a convolution lives in Lava with its axes reversed, every other one
flat, and dense matrices have rows and columns permuted to match. Lava's Conv convolves, so kernels are flipped.

Pooling. A sum pool of kernel k and stride p before a convolution is one convolution with a composite kernel: tap j of
the weights, repeated over the k cells of its window, at p * dilation * j; stride and padding grow by p. This is exact
as long as the padded border shows no source cell, so with padding it needs k <= p and no remainder. What it cannot
express becomes a dense matrix.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spikeport.converters import lava_runner
from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection
from spikeport.converters.operators import Conv2d, Dense, OneToOne, Operator, Pair, Shape, Sparse, SumPool
from spikeport.models.errors import BackendError, SpikeportError
from spikeport.models.files import atomic_folder
from spikeport.models.loihi_integers import (
    BIAS_MANT_LIMIT,
    MAX_BIAS_EXP,
    MAX_DECAY,
    MAX_THRESHOLD,
    sign_mode,
    weight_range,
)

LAVA_VERSION = "0.10.0"

MAX_DENSE_ENTRIES = 1 << 25
MAX_MESSAGE_BITS = 24  # width of Lava's ports
MAX_INT8 = 127  # Lava's Conv keeps its geometry in 8 bits

SIMULATOR_AND_HARDWARE = (
    "The simulator has no limit on the synaptic accumulator; hardware has 21 bits.",
    "The simulator has no refractory count and no axonal delay; hardware has both.",
    "The simulator's Conv ignores weight_exp and num_weight_bits, and its sums wrap at 24 bits.",
    "The simulator always adds 1 to the current decay (ds_offset). On hardware that is a register: a public recording "
    "of a Loihi 1 chip fits 0.",
)
"""Where Lava's simulator and the chip differ; `spikeport doctor` and the README of every bundle say it."""

_README = """\
# {name}: a spikeport bundle for Lava

{samples} samples of {steps} steps, {populations} populations, {chip_steps} chip steps in one stream. Graph {graph}.

| file | what it is |
|---|---|
| `bundle.json` | processes and connections, in the order in which they are built |
| `network.npz` | weights and neuron parameters |
| `stream.npz` | input spikes, samples back to back |
| `run_lava.py` | the runner: Python 3.10, lava-nc {lava} and numpy, nothing else |

## On Lava's simulator

In a Python 3.10 (Lava does not import on newer ones), with `pip install lava-nc=={lava}`, which brings numpy 1 along:

    python run_lava.py                  # writes trace-lava.npz
    python run_lava.py --record         # also u and v of every neuron after every step; slow

## On Loihi 2

On a host of Intel's Neuromorphic Research Cloud that sees the SLURM controller, in an environment with Intel's
`lava-loihi` extension (INRC members have it):

    sinfo                                                    # which partitions and boards are up
    PARTITION=<partition> python run_lava.py --hardware      # writes trace-loihi2.npz; BOARD=<node> names a board

Host and chip are joined by Intel's spike adapters (`lava.proc.embedded_io`). This path follows Intel's public examples;
the authors of spikeport had no board to run it on.

{board}

## What comes back

A trace: spikes of the inputs and of every population by sample and step, the pipeline's shift taken out, neurons in
(channel, row, column) order, bit-packed (`numpy.packbits`); where the decision is read from a membrane, v after the
last step of each sample. With the run folder that wrote this bundle:

    spikeport verify DIR torch trace-loihi2.npz              # spike for spike; the first difference, and why
    spikeport simulate DIR --from trace-loihi2.npz           # store it in DIR, for `spikeport report`

## Where the simulator and hardware differ

{differences}

What the runner adds to Lava exists in the simulator alone, and is refused by name with `--hardware`:

- `Line` delays spikes, and keeps a recurrent projection from carrying them into the next sample. With `--hardware` a
  delayed dense projection becomes Lava's `DelayDense`; a delayed convolution and a recurrent projection are refused.
- `Neurons` resets by subtraction, or has ds_offset 0.
- `Probe` reads membranes.

On the simulator `Conv` is given weights with their exponent folded in; with `--hardware`, 8-bit weights and the
exponent.
"""


@dataclass(frozen=True, eq=False)
class _Synapse:
    """What Lava's Dense or Conv is made of; `geometry` is empty for a Dense."""

    weight: np.ndarray
    geometry: dict[str, Any]


def write_bundle(graph: ProcessGraph, inputs: dict[str, np.ndarray], folder: Path) -> None:
    """Write a bundle to `folder`, which appears complete or not at all; an older bundle there is replaced.

    Args:
        graph: integers.
        inputs: by name of the event input, spikes (samples, steps, *shape).

    Raises:
        BackendError: the graph has something that Lava has no process for; the message names it.
        SpikeportError: the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    description, network, stream = describe(graph, inputs)
    readme = _readme(description, network)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "bundle.json").exists():
        raise SpikeportError(f"{folder} holds files that are no bundle. Choose another folder for the bundle.")
    with atomic_folder(folder, "bundle") as temporary:
        (temporary / "bundle.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(readme, encoding="utf-8")
        np.savez_compressed(temporary / "network.npz", **network)  # type: ignore[arg-type]
        np.savez_compressed(temporary / "stream.npz", **stream)  # type: ignore[arg-type]
        shutil.copyfile(lava_runner.__file__, temporary / "run_lava.py")


def _readme(description: dict[str, Any], network: dict[str, np.ndarray]) -> str:
    lacking = lava_runner.simulator_only(description, network)
    board = "Nothing in this network is known to exist in the simulator alone."
    if lacking:
        board = "**This network runs on the simulator alone:**\n\n" + "\n".join(f"- {line}." for line in lacking)
    filled = {
        "lava": LAVA_VERSION,
        "populations": len(description["populations"]),
        "board": board,
        "differences": "\n".join(f"- {line}" for line in SIMULATOR_AND_HARDWARE),
    }
    return _README.format_map(description | filled)


def describe(
    graph: ProcessGraph, inputs: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The contents of bundle.json, network.npz and stream.npz."""
    for population in graph.populations:
        _check_population(population)
    layouts = _layouts(graph)
    nodes: list[Input | Population] = [*graph.inputs, *graph.populations]
    shapes = {node.name: _lava_shape(node, layouts) for node in nodes}
    lines: dict[tuple[str, int, bool], dict[str, Any]] = {}
    synapses: list[dict[str, Any]] = []
    network: dict[str, np.ndarray] = {}
    stream: dict[str, np.ndarray] = {}

    # A constant input needs a chip step to arrive, so a population of stage 0 can only begin after it.
    lead = max(0, 1 - min(population.stage for population in graph.populations))
    for index, node in enumerate(graph.inputs):
        if not 1 <= node.message_bits <= MAX_MESSAGE_BITS:
            raise BackendError(f"input {node.name!r} has {node.message_bits} bits; Lava's messages have 1 to 24.")
        if not node.constant:
            spikes = inputs[node.name].reshape(-1, node.size)[:, _order(node.name, layouts, node.size)]
            dtype = np.min_scalar_type((1 << node.message_bits) - 1)
            stream[f"input{index}"] = spikes.astype(dtype).reshape(-1, *shapes[node.name])
    for index, population in enumerate(graph.populations):
        order = _order(population.name, layouts, population.size)
        for key, value in _neuron_arrays(population, order).items():
            shaped = value.reshape(shapes[population.name]) if value.size == population.size else value
            network[f"population{index}.{key}"] = shaped
    for projection in graph.projections:
        source = graph.node(projection.source)
        line = _line(projection, graph, lead)
        if line is not None:
            line["shape"] = list(shapes[source.name])
            line = lines.setdefault((source.name, line["delay"], line["gate"] is not None), line)
        for part, synapse in enumerate(_synapses(projection, layouts)):
            network[f"synapse{len(synapses)}.weight"] = synapse.weight.astype(np.int32)
            synapses.append(
                {
                    "name": projection.name if part == 0 else f"{projection.name}.{part}",
                    "kind": "conv" if synapse.geometry else "dense",
                    "source": projection.source,
                    "target": projection.target,
                    "line": line["name"] if line else None,
                    "gated": bool(line and line["gate"]),
                    "delay": line["delay"] if line else 0,
                    "exponent": projection.exponent,
                    "message_bits": source.message_bits if isinstance(source, Input) else 1,
                    **synapse.geometry,
                }
            )
    samples = len(next(iter(inputs.values())))
    description = {
        "format": lava_runner.FORMAT,
        "version": lava_runner.FORMAT_VERSION,
        "graph": graph.fingerprint(),
        "name": graph.name,
        "samples": samples,
        "steps": graph.steps,
        "lead": lead,
        "chip_steps": lead + samples * graph.steps + max(population.stage for population in graph.populations),
        "sources": [
            {
                "name": node.name,
                "shape": list(shapes[node.name]),
                "stage": node.stage,
                "message_bits": node.message_bits,
                "constant": node.constant,
            }
            for node in graph.inputs
        ],
        "populations": [
            {
                "name": node.name,
                "shape": list(shapes[node.name]),
                "stage": node.stage,
                "reset": node.neuron.reset,
                "ds_offset": _integers(node).ds_offset,
            }
            for node in graph.populations
        ],
        "probed": None if graph.probed is None else graph.populations.index(graph.probed),
        "lines": list(lines.values()),
        "synapses": synapses,
    }
    return description, network, stream


def _integers(population: Population) -> LoihiNeuron:
    if not isinstance(population.neuron, LoihiNeuron):
        raise BackendError(f"population {population.name!r} holds floats; Lava runs integers. Quantize the graph.")
    return population.neuron


def _check_population(population: Population) -> None:
    neuron = _integers(population)
    limits = {
        "du": (0, MAX_DECAY),
        "dv": (0, MAX_DECAY),
        "vth": (0, MAX_THRESHOLD),
        "bias_mant": (-BIAS_MANT_LIMIT, BIAS_MANT_LIMIT - 1),
        "bias_exp": (-MAX_BIAS_EXP, MAX_BIAS_EXP),
    }
    for key, (low, high) in limits.items():
        values = np.asarray(getattr(neuron, key))
        if values.min() < low or values.max() > high:
            raise BackendError(f"population {population.name!r} has a {key} outside {low}..{high}, its range on Loihi.")


def _layouts(graph: ProcessGraph) -> dict[str, Shape]:
    """Per node that touches a convolution, the (channel, row, column) shape that it takes there."""
    layouts: dict[str, Shape] = {}
    for projection in graph.projections:
        if isinstance(projection.operator, Conv2d) and _lava_convolution(projection.operator) is not None:
            layouts.setdefault(projection.source, projection.operator.in_shape)
            layouts.setdefault(projection.target, projection.operator.out_shape)
    return layouts


def _lava_shape(node: Input | Population, layouts: dict[str, Shape]) -> Shape:
    return tuple(reversed(layouts[node.name])) if node.name in layouts else (node.size,)


def _order(name: str, layouts: dict[str, Shape], size: int) -> np.ndarray:
    """For each place in Lava's flat order, the neuron of ours that lives there."""
    flat = np.arange(size)
    return flat.reshape(layouts[name]).T.reshape(-1) if name in layouts else flat


def _neuron_arrays(population: Population, order: np.ndarray) -> dict[str, np.ndarray]:
    """Parameters by name: shape () where all neurons agree, else (n,) in Lava's order."""
    arrays = {}
    for key in ("du", "dv", "vth", "bias_mant", "bias_exp"):
        values = np.broadcast_to(getattr(population.neuron, key), population.shape).reshape(-1)[order].astype(np.int64)
        arrays[key] = values[0] if (values == values[0]).all() else values
    return arrays


def _line(projection: Projection, graph: ProcessGraph, lead: int) -> dict[str, Any] | None:
    """The delay, or the gate of a recurrent projection, between a source and its synapses; None where neither is."""
    source, target = graph.node(projection.source), graph.population(projection.target)
    if isinstance(source, Input) and source.constant:
        return None
    # Spikes of the previous sample step wait until the target works on the next one, whatever stages lie between.
    delay = target.stage - source.stage if projection.recurrent else projection.delay
    if delay < 0:
        raise BackendError(
            f"recurrent projection {projection.name!r} closes a loop over several populations, which a chip cannot run "
            f"in time: every connection takes a step, so its spikes are {-delay} too late from stage {source.stage} "
            f"for stage {target.stage}.\nUse the torch or events backend."
        )
    if delay == 0 and not projection.recurrent:
        return None
    # The source works on the last step of a sample at Lava's time step 1 + lead + stage + (steps - 1).
    gate = {"steps": graph.steps, "phase": (lead + source.stage) % graph.steps} if projection.recurrent else None
    name = f"{source.name}.line{delay}{'.gated' if gate else ''}"
    return {"name": name, "source": source.name, "delay": delay, "gate": gate}


def _synapses(projection: Projection, layouts: dict[str, Shape]) -> list[_Synapse]:
    """Lava's Conv for a convolution that it can express, else one or more Dense whose sum is the operator."""
    operator = projection.operator
    _check_weights(projection)
    if projection.exponent < 0 and (operator.weight % (1 << -projection.exponent)).any():
        raise BackendError(
            f"projection {projection.name!r} has the exponent {projection.exponent}, and weights that are no multiples "
            f"of {1 << -projection.exponent}; Lava's Dense rounds there and its Conv has no exponent."
        )
    # A node that other operators see in another shape has only one layout in Lava: the matrix serves them all.
    fits = layouts.get(projection.source) == operator.in_shape and layouts.get(projection.target) == operator.out_shape
    convolution = _lava_convolution(operator) if isinstance(operator, Conv2d) and fits else None
    if convolution is not None:
        return [convolution]
    if operator.n_in * operator.n_out > MAX_DENSE_ENTRIES:
        raise BackendError(
            f"projection {projection.name!r} would be a dense matrix of {operator.n_out} x {operator.n_in} in Lava, "
            "which is too large. Pool without overlap, remainder or padding, or use the torch or events backend."
        )
    rows = _order(projection.target, layouts, operator.n_out)
    columns = _order(projection.source, layouts, operator.n_in)
    matrix = dense_matrix(operator)[np.ix_(rows, columns)]
    return [_Synapse(part, {}) for part in _eight_bit_parts(matrix)]


def _check_weights(projection: Projection) -> None:
    weight = projection.operator.weight
    if not np.issubdtype(weight.dtype, np.integer):
        raise BackendError(f"projection {projection.name!r} has float weights. Quantize the graph first.")
    sign = sign_mode(weight)
    low, high, step = weight_range(sign)
    # one of both signs, all of whose positive weights rounded to zero, may still hold -256
    if not any(_fits(weight, *each) for each in (weight_range(sign), weight_range("mixed"))):
        raise BackendError(
            f"projection {projection.name!r} has {sign} weights that are not 8-bit: Loihi takes {low}..{high}"
            f"{', even ones' if step == 2 else ''}."
        )


def _fits(weight: np.ndarray, low: int, high: int, step: int) -> bool:
    return not weight.size or bool(weight.min() >= low and weight.max() <= high and not (weight % step).any())


def _lava_convolution(operator: Conv2d) -> _Synapse | None:
    """The operator, pooling included, as one Conv of Lava; None where that cannot express it."""
    composite = composite_convolution(operator)
    if composite is None or operator.groups > MAX_INT8:
        return None
    weight, stride, padding, dilation = composite
    if max(*stride, *padding, *dilation, *weight.shape[2:]) > MAX_INT8:
        return None
    geometry = {
        "input_shape": list(reversed(operator.in_shape)),
        "stride": list(reversed(stride)),
        "padding": list(reversed(padding)),
        "dilation": list(reversed(dilation)),
        "groups": operator.groups,
    }
    return _Synapse(weight.transpose(0, 3, 2, 1)[:, ::-1, ::-1], geometry)


def composite_convolution(operator: Conv2d) -> tuple[np.ndarray, Pair, Pair, Pair] | None:
    """(weight, stride, padding, dilation) of one convolution of the unpooled input that equals pooling and convolving.

    None where zero padding around the pooled cells is not zero padding around the source: overlapping windows, or
    source cells in the remainder that no window covers.
    """
    if operator.pool is None:
        return operator.weight, operator.stride, operator.padding, operator.dilation
    window, pool_stride = operator.pool.kernel, operator.pool.stride
    sources, cells = operator.in_shape[1:], operator.pooled_shape[1:]
    for axis in (0, 1):
        overlaps = window[axis] > pool_stride[axis]
        remainder = sources[axis] > cells[axis] * pool_stride[axis]
        if operator.padding[axis] and (overlaps or remainder):
            return None
    taps = operator.weight.shape[2:]
    spacing = [dilation * step for dilation, step in zip(operator.dilation, pool_stride, strict=True)]
    span = [gap * (count - 1) + 1 for gap, count in zip(spacing, taps, strict=True)]
    shape = (*operator.weight.shape[:2], span[0] + window[0] - 1, span[1] + window[1] - 1)
    weight = np.zeros(shape, dtype=np.int64)
    for row in range(window[0]):
        for column in range(window[1]):
            weight[:, :, row : row + span[0] : spacing[0], column : column + span[1] : spacing[1]] += operator.weight
    stride = (operator.stride[0] * pool_stride[0], operator.stride[1] * pool_stride[1])
    padding = (operator.padding[0] * pool_stride[0], operator.padding[1] * pool_stride[1])
    return weight, stride, padding, (1, 1)


def dense_matrix(operator: Operator) -> np.ndarray:
    """The operator as a matrix, int64 (n_out, n_in), both flat in (channel, row, column) order; pooling is expanded."""
    match operator:
        case Dense(pool=None):
            return operator.weight.astype(np.int64)
        case Dense(pool=SumPool() as pool):
            return _unpooled(operator, pool)
        case Sparse():
            matrix = np.zeros((operator.n_out, operator.n_in), dtype=np.int64)
            matrix[operator.target, operator.source] = operator.weight
            return matrix
        case OneToOne():
            return np.diag(operator.weight.astype(np.int64))
    columns = []
    for start in range(0, operator.n_in, 256):
        units = torch.zeros((min(256, operator.n_in - start), operator.n_in), dtype=torch.float64)
        units[torch.arange(len(units)), torch.arange(start, start + len(units))] = 1
        with torch.no_grad():
            columns.append(operator.apply(units.unflatten(1, operator.in_shape)).flatten(1).round().numpy())
    return np.concatenate(columns).T.astype(np.int64)


def _unpooled(operator: Dense, pool: SumPool) -> np.ndarray:
    """Give every source neuron the weights of the pooled cells that it counts into."""
    matrix = np.zeros((operator.n_out, operator.n_in), dtype=np.int64)
    _, rows, columns = operator.pooled_shape
    neurons = np.arange(math.prod(operator.in_shape)).reshape(operator.in_shape)
    for row in range(pool.kernel[0]):
        for column in range(pool.kernel[1]):
            sources = neurons[:, row :: pool.stride[0], column :: pool.stride[1]][:, :rows, :columns]
            matrix[:, sources.reshape(-1)] += operator.weight
    return matrix


def _eight_bit_parts(matrix: np.ndarray) -> list[np.ndarray]:
    """Matrices of 8-bit weights whose sum is `matrix`: sums over overlapping windows can leave the range of one."""
    low, high, _ = weight_range(sign_mode(matrix))
    parts = [np.clip(matrix, low, high)]
    rest = matrix - parts[0]
    while rest.any():
        parts.append(np.clip(rest, low, high))
        rest = rest - parts[-1]
    return parts
