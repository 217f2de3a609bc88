"""Export for SANA-FE 2.2.9, another simulator of such chips: one sample of a mapped integer network, with our costs.

    arch.yaml        the chip: mesh, cores, energies and times of the chip file
    network.net      neurons on their cores and every synapse, in SANA-FE's line format
    inputs.bin       input spikes: one byte for each step and input neuron
    plan.json        what the runner needs to know: populations, their first steps and biases
    run_sanafe.py    the runner (`spikeport.deploy.sanafe_runner`), which needs `sanafe` alone

What is exact. SANA-FE's integrate-and-fire neuron keeps v / 64 in doubles and cuts it to 1/64 towards zero after the
leak, which is our v bit for bit, leak, both resets and bias included, as long as u forgets at once (du + ds_offset =
4096) and neither u wraps nor v saturates. Other neurons are refused.

Input neurons live on a core of their own at the input tile, an extra one whose spikes and messages cost nothing there.
A barrier takes the time that the chip file gives for the mapping's tiles. `regular` puts them on the first free core
of the mesh instead: SANA-FE's `cycle` timing knows only its own mesh of 8 x 4 tiles of 4 cores.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection
from spikeport.deploy import event_simulator, sanafe_runner
from spikeport.deploy.chip import SYNOP_EVENT, Chip, load_chip
from spikeport.deploy.mapping import Mapping
from spikeport.deploy.run_folder import RunFolder
from spikeport.deploy.synapses import axon_synapses, list_synapses
from spikeport.deploy.trace import check_inputs
from spikeport.models.errors import BackendError, ChipError, DoesNotFitError, QuantizationError, SpikeportError
from spikeport.models.files import atomic_folder
from spikeport.models.loihi_integers import DECAY_UNITY, INPUT_SHIFT, STATE_LIMIT

SANAFE_VERSION = "2.2.9"
MAX_CORE_NEURONS = 1024
"""Neurons that one core of SANA-FE's models holds."""
MAX_DELAY = 5
CYCLE_MESH = (8, 4, 4)
"""Columns, rows and cores a tile of the only mesh that SANA-FE's `cycle` timing knows."""

_SYNAPSE_UNIT = {"synop_dense": "dense", "synop_sparse": "sparse", "synop_conv": "conv"}


class _Source(NamedTuple):
    """A slice of the input neurons: one of the graph's inputs; a constant one once for each stage that it feeds."""

    node: Input
    stage: int
    first: int


def write_sanafe(
    graph: ProcessGraph,
    mapping: Mapping,
    chip: Chip,
    inputs: dict[str, np.ndarray],
    folder: Path,
    regular: bool = False,
) -> None:
    """Write an export to `folder`, which appears complete or not at all; an older export there is replaced.

    Args:
        chip: gives only costs and may be another than the one mapped onto.
        inputs: by name of the event input, spikes (1, steps, *shape).
        regular: keep all tiles alike, which SANA-FE's `cycle` timing needs.

    Raises:
        ChipError: the chip has a cost that SANA-FE has no counterpart for.
        DoesNotFitError: a core holds more neurons than one of SANA-FE's.
        QuantizationError: a population whose neurons SANA-FE does not compute exactly.
        BackendError: another part of the graph that it does not compute exactly, or several samples.
        SpikeportError: the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    _check_mapping(graph, mapping)
    _check_costs(chip)
    _check_graph(graph)
    _check_inputs(graph, inputs)
    _check_range(graph, inputs)
    sources, first = [], 0
    for node in graph.inputs:
        stages = sorted({graph.population(p.target).stage for p in graph.outgoing(node.name)}) if node.constant else [1]
        for stage in stages:
            sources.append(_Source(node, stage, first))
            first += node.size
    size = max(first, 1)  # without inputs, one that is silent
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "plan.json").exists():
        raise SpikeportError(f"{folder} holds files that are no export for SANA-FE. Choose another folder for it.")
    with atomic_folder(folder, "export") as temporary:
        host = _host_core(mapping, regular)
        delayed = any(_delay(graph, projection) for projection in graph.projections)
        with (temporary / "arch.yaml").open("w", encoding="utf-8") as file:
            file.writelines(_architecture(mapping, chip, host, size, delayed))
        with (temporary / "network.net").open("w", encoding="utf-8") as file:
            _write_network(file, graph, mapping, sources, host, size)
        (temporary / "inputs.bin").write_bytes(_stream(graph, inputs, sources, size).tobytes())
        plan = json.dumps(_plan(graph, mapping, chip, size))
        (temporary / "plan.json").write_text(plan + "\n", encoding="utf-8")
        shutil.copyfile(sanafe_runner.__file__, temporary / "run_sanafe.py")


def sanafe_stage(folder: RunFolder, sample: int) -> tuple[Path, str]:
    """Write one test sample of a run folder for SANA-FE; returns where, and the name of the chip that gave the costs.

    That is the recipe's chip or, where SANA-FE cannot express its costs, the one that the recipe compares it with.
    """
    name, beside = folder.recipe.chip.name, folder.recipe.chip.compare
    chip = load_chip(name)
    if beside is not None and _without_counterpart(chip) and not _without_counterpart(load_chip(beside)):
        chip = load_chip(beside)
    total = len(next(iter(folder.test_inputs.values())))
    if sample >= total:
        raise SpikeportError(f"there is no test sample {sample}; the test set has the samples 0..{total - 1}.")
    inputs = {key: array[sample : sample + 1] for key, array in folder.test_inputs.items()}
    place = folder.path / "sanafe"
    write_sanafe(folder.graph, folder.mapping(), chip, inputs, place)
    return place, chip.name


# ---- what cannot be expressed ---------------------------------------------------------------------------------------


def _check_mapping(graph: ProcessGraph, mapping: Mapping) -> None:
    if mapping.graph != graph.fingerprint():
        raise SpikeportError(f"the mapping is of graph {mapping.graph}, not of {graph.name!r} ({graph.fingerprint()}).")
    fullest = max(mapping.cores, key=lambda core: len(core.neurons))
    if len(fullest.neurons) > MAX_CORE_NEURONS:
        raise DoesNotFitError(
            f"a core of {fullest.population!r} holds {len(fullest.neurons)} neurons; "
            f"one of SANA-FE's holds {MAX_CORE_NEURONS}."
        )


def _check_costs(chip: Chip) -> None:
    found = _without_counterpart(chip)
    if found:
        raise ChipError(
            f"chip {chip.name!r} has costs that SANA-FE has no counterpart for: {'; '.join(found)}.\n"
            "Use a chip without them, such as 'loihi-sanafe'."
        )


def _without_counterpart(chip: Chip) -> list[str]:
    """Costs that SANA-FE cannot express: packets within a tile, static power, an active neuron below one at rest."""
    within = chip.event("within_tile")
    found = []
    if chip.static_mw.value:
        found.append(f"static power ({chip.static_mw.value} mW)")
    if within.energy_pj.value or within.time_ns.value:
        found.append(f"packets within a tile ({within.energy_pj.value} pJ, {within.time_ns.value} ns)")
    if min(_visit(chip, "energy_pj")[1], _visit(chip, "time_ns")[1]) < 0:
        found.append("neurons that cost more at rest than active")
    return found


def _visit(chip: Chip, what: str) -> tuple[float, float]:
    """What every neuron costs in every step, and what an active one costs in addition: pJ or ns."""
    names = ("neuron_access", "neuron_inactive", "neuron_active", "neuron_update")
    access, inactive, active, update = (getattr(chip.event(name), what).value for name in names)
    return access + inactive, active + update - inactive


def _check_graph(graph: ProcessGraph) -> None:
    if not graph.is_integer:
        raise QuantizationError("SANA-FE is given integer graphs; quantise the network first.")
    for node in graph.inputs:
        if node.message_bits > 1:
            raise BackendError(
                f"input {node.name!r} carries graded spikes of {node.message_bits} bits; those of SANA-FE are binary."
            )
    for population in graph.populations:
        if population.stage < 1:
            raise BackendError(f"population {population.name!r} works at stage 0, before any input can reach it.")
        neuron = population.neuron
        assert isinstance(neuron, LoihiNeuron)
        decay = np.unique(np.asarray(neuron.du) + neuron.ds_offset)
        if (decay != DECAY_UNITY).any():
            span = f"{decay[0]}" if len(decay) == 1 else f"{decay[0]}..{decay[-1]}"
            raise QuantizationError(
                f"population {population.name!r} filters its input (du + ds_offset = {span}); SANA-FE computes exactly "
                f"only neurons without that filter ({DECAY_UNITY})."
            )
    for projection in graph.projections:
        if projection.exponent < 0:
            raise BackendError(
                f"projection {projection.name!r} shifts its sum right (exponent {projection.exponent}); "
                "SANA-FE has no such step."
            )
        if not 0 <= _delay(graph, projection) <= MAX_DELAY:
            raise BackendError(
                f"projection {projection.name!r} arrives {_delay(graph, projection)} steps late; "
                f"SANA-FE delays by 0..{MAX_DELAY}."
            )
    for population in graph.populations:
        incoming = graph.incoming(population.name)
        if len({_delay(graph, p) for p in incoming}) > 1 and len({SYNOP_EVENT[p.operator.kind] for p in incoming}) > 1:
            raise BackendError(
                f"population {population.name!r} receives different delays and different kinds of synapse; SANA-FE "
                "numbers its delays by kind and would mix them up."
            )


def _delay(graph: ProcessGraph, projection: Projection) -> int:
    """Steps for which a spike waits beyond the one that every spike takes."""
    if projection.recurrent:
        return graph.population(projection.target).stage - graph.node(projection.source).stage
    node = graph.node(projection.source)
    return 0 if isinstance(node, Input) and node.constant else projection.delay


def _check_inputs(graph: ProcessGraph, inputs: dict[str, np.ndarray]) -> None:
    samples = check_inputs(graph, inputs) if graph.event_inputs else 1
    if samples != 1:
        raise BackendError(f"SANA-FE has no reset between samples: give it one sample, not {samples}.")


def _check_range(graph: ProcessGraph, inputs: dict[str, np.ndarray]) -> None:
    """Refuse a sample in which u wraps or v saturates, which SANA-FE's doubles do not.

    Where the weights alone do not rule it out, the sample is simulated and every sum looked at.
    """
    spikes: dict[str, np.ndarray] | None = None
    for population in graph.populations:
        neuron, incoming = population.neuron, graph.incoming(population.name)
        assert isinstance(neuron, LoihiNeuron)
        bias = _bias(neuron)
        step = sum(p.operator.magnitude_bound() * 2.0**p.exponent for p in incoming) * 2**INPUT_SHIFT
        if (graph.steps + 1) * (step + float(np.abs(bias).max())) < STATE_LIMIT - 1:
            continue
        if spikes is None:
            trace = event_simulator.run(graph, inputs, threads=1)
            spikes = {node.name: trace.spikes(node.name)[0] for node in graph.event_nodes}
            spikes |= {n.name: np.ones((graph.steps, n.size), np.uint8) for n in graph.inputs if n.constant}
        u = np.zeros((graph.steps, population.size))
        for projection in incoming:
            sent = torch.as_tensor(spikes[projection.source].astype(np.float64))
            if projection.recurrent:
                sent = torch.cat([torch.zeros_like(sent[:1]), sent[:-1]])
            summed = projection.operator.apply(sent.reshape(-1, *projection.operator.in_shape))
            u += summed.reshape(graph.steps, -1).numpy() * 2.0**projection.exponent
        _check_states(population, u * 2**INPUT_SHIFT, bias.ravel())


def _check_states(population: Population, u: np.ndarray, bias: np.ndarray) -> None:
    neuron = population.neuron
    assert isinstance(neuron, LoihiNeuron)
    wraps, v = np.abs(u).max() >= STATE_LIMIT, np.zeros(population.size)
    keep, level = DECAY_UNITY - np.ravel(neuron.dv), np.ravel(neuron.vth) * 2**INPUT_SHIFT
    largest = 0.0
    for row in u:
        v = np.trunc(v * keep / DECAY_UNITY) + row + bias
        largest = max(largest, float(np.abs(v).max()))
        v = np.where(v > level, v - level if neuron.reset == "subtract" else 0.0, v)
    if wraps or largest >= STATE_LIMIT - 1:
        what = "current wraps around" if wraps else "membrane saturates"
        raise QuantizationError(
            f"population {population.name!r}: a {what} at {STATE_LIMIT} in this sample; SANA-FE computes in doubles, "
            "where it does not. Choose another sample."
        )


def _bias(neuron: LoihiNeuron) -> np.ndarray:
    mant, exponent = np.broadcast_arrays(neuron.bias_mant, neuron.bias_exp)
    shifted: np.ndarray = np.where(exponent >= 0, mant << np.maximum(exponent, 0), mant >> np.maximum(-exponent, 0))
    return shifted


# ---- files ----------------------------------------------------------------------------------------------------------


def _tile(x: int, y: int, mapping: Mapping) -> int:
    """SANA-FE numbers tiles column by column."""
    return x * mapping.rows + y


def _places(mapping: Mapping) -> list[tuple[int, int]]:
    """(tile, core of the tile) of each mapped core."""
    positions = mapping.tile_positions()
    return [
        (_tile(int(x), int(y), mapping), core.core % mapping.cores_per_tile)
        for core, (x, y) in zip(mapping.cores, positions, strict=True)
    ]


def _host_core(mapping: Mapping, regular: bool) -> tuple[int, int]:
    """(tile, core of the tile) of the input neurons."""
    tile = _tile(*mapping.input_tile, mapping)
    if not regular:
        return tile, mapping.cores_per_tile
    if (mapping.columns, mapping.rows, mapping.cores_per_tile) != CYCLE_MESH or mapping.chips > 1:
        raise DoesNotFitError(
            f"the `cycle` timing of SANA-FE knows one mesh, of {CYCLE_MESH[0]} x {CYCLE_MESH[1]} tiles of "
            f"{CYCLE_MESH[2]} cores; the mapping is on {mapping.chips} of {mapping.columns} x {mapping.rows} tiles of "
            f"{mapping.cores_per_tile}."
        )
    used = set(_places(mapping))
    tiles = sorted(range(mapping.columns * mapping.rows), key=lambda other: other != tile)
    free = ((tile, core) for tile in tiles for core in range(mapping.cores_per_tile) if (tile, core) not in used)
    place = next(free, None)
    if place is None:
        raise DoesNotFitError(f"all cores of {mapping.chip!r} are used; the input neurons need one of their own.")
    return place


def _architecture(mapping: Mapping, chip: Chip, host: tuple[int, int], inputs: int, delayed: bool) -> Iterator[str]:
    """The lines of arch.yaml."""
    barrier = chip.barrier_ticks(mapping.tiles) * chip.tick_ns
    columns, rows, cores = mapping.columns * mapping.chips, mapping.rows, mapping.cores_per_tile
    yield f"# {chip.title}, for the mapping of graph {mapping.graph} onto {mapping.tiles} tiles.\n"
    yield f"architecture:\n  name: {chip.name}\n  attributes:\n    topology: mesh\n"
    yield f"    width: {columns}\n    height: {rows}\n    link_buffer_size: {chip.network.link_packets}\n"
    yield f"    sync_model: fixed\n    latency_sync: {_seconds(barrier)}\n  tile:\n"
    for first, last, special in _runs(columns * rows, host[0]):
        yield f"    - name: tile[{first}..{last}]\n      attributes:\n"
        for directions, event in ((("north", "south"), "hop_ns"), (("east", "west"), "hop_ew")):
            cost = chip.event(event)
            for direction in directions:
                yield f"        energy_{direction}_hop: {_joules(cost.energy_pj.value)}\n"
                yield f"        latency_{direction}_hop: {_seconds(cost.time_ns.value)}\n"
        yield "      core:\n"
        yield from _cores(chip, 0, min(host[1], cores) if special else cores, delayed)
        if special:
            yield from _input_core(inputs)
            yield from _cores(chip, host[1] + 1, cores, delayed)


def _runs(tiles: int, special: int) -> Iterator[tuple[int, int, bool]]:
    """First and last tile of each run of equal ones."""
    for first, last, alone in ((0, special - 1, False), (special, special, True), (special + 1, tiles - 1, False)):
        if first <= last:
            yield first, last, alone


def _cores(chip: Chip, first: int, end: int, delayed: bool) -> Iterator[str]:
    """Cores `first` .. `end` - 1 of a tile."""
    if first >= end:
        return
    (access_pj, update_pj), (access_ns, update_ns) = _visit(chip, "energy_pj"), _visit(chip, "time_ns")
    spike = chip.event("spike")
    yield f"        - name: core[{first}..{end - 1}]\n          attributes:\n"
    yield f"            buffer_position: {'dendrite' if delayed else 'soma'}\n"
    yield f"            buffer_inside_unit: {str(delayed).lower()}\n"
    yield f"            max_neurons_supported: {MAX_CORE_NEURONS}\n"
    yield from _axon("axon_in", "in", *_cost(chip, "axon_in"))
    costs = {
        "access_neuron": (access_pj, access_ns),
        "update_neuron": (update_pj, update_ns),
        "spike_out": (spike.energy_pj.value, spike.time_ns.value),
    }
    yield from _unit("soma", [("neurons", "leaky_integrate_fire", costs)])
    kind = "accumulator_with_delay" if delayed else "accumulator"
    yield from _unit("dendrite", [("sums", kind, {"update": (0.0, 0.0)})])
    kinds = [(unit, "current_based", {"process_spike": _cost(chip, name)}) for name, unit in _SYNAPSE_UNIT.items()]
    yield from _unit("synapse", kinds)
    yield from _axon("axon_out", "out", *_cost(chip, "axon_out"))


def _input_core(inputs: int) -> Iterator[str]:
    """The core of the input neurons: nothing on it costs anything."""
    free = (0.0, 0.0)
    yield "        - name: host\n          attributes:\n            buffer_position: soma\n"
    yield f"            buffer_inside_unit: false\n            max_neurons_supported: {max(inputs, 1)}\n"
    yield from _axon("axon_in", "in", *free)
    yield from _unit("soma", [("spikes", "input", {"access_neuron": free, "update_neuron": free, "spike_out": free})])
    yield from _unit("dendrite", [("sums", "accumulator", {"update": free})])
    yield from _unit("synapse", [("dense", "current_based", {"process_spike": free})])
    yield from _axon("axon_out", "out", *free)


def _axon(section: str, way: str, energy_pj: float, time_ns: float) -> Iterator[str]:
    yield f"          {section}:\n            - name: axons_{way}\n              attributes:\n"
    yield f"                energy_message_{way}: {_joules(energy_pj)}\n"
    yield f"                latency_message_{way}: {_seconds(time_ns)}\n"


def _unit(section: str, units: Iterable[tuple[str, str, dict[str, tuple[float, float]]]]) -> Iterator[str]:
    yield f"          {section}:\n"
    for name, model, costs in units:
        yield f"            - name: {name}\n              attributes:\n                model: {model}\n"
        for event, (energy_pj, time_ns) in costs.items():
            yield f"                energy_{event}: {_joules(energy_pj)}\n"
            yield f"                latency_{event}: {_seconds(time_ns)}\n"


def _cost(chip: Chip, event: str) -> tuple[float, float]:
    cost = chip.event(event)
    return cost.energy_pj.value, cost.time_ns.value


def _joules(picojoule: float) -> str:
    return f"{picojoule:.10g}e-12"


def _seconds(nanosecond: float) -> str:
    return f"{nanosecond:.10g}e-9"


def _write_network(
    file: TextIO,
    graph: ProcessGraph,
    mapping: Mapping,
    sources: list[_Source],
    host: tuple[int, int],
    inputs: int,
) -> None:
    """Group 0 holds the input neurons, group i + 1 population i."""
    file.write(f"# {graph.name}: graph {mapping.graph} on {mapping.chip}; group 0 are the inputs\n")
    file.write(f"g {inputs} soma_hw_name=spikes dendrite_hw_name=sums synapse_hw_name=dense log_spikes=1\n")
    units = {p.name: _unit_of(p) for p in graph.projections}
    current = {}
    for population in graph.populations:
        incoming = graph.incoming(population.name)
        current[population.name] = units[incoming[0].name] if incoming else "dense"
        _write_group(file, population, len(current), current[population.name])
    number = {population.name: index for index, population in enumerate(graph.populations, 1)}
    for projection in graph.projections:
        target, unit = number[projection.target], units[projection.name]
        if current[projection.target] != unit:
            # a synapse goes to the unit that its target names when the synapse is read
            size = graph.population(projection.target).size
            file.writelines(f"n {target}.{place} synapse_hw_name={unit}\n" for place in range(size))
            current[projection.target] = unit
        if projection.source in number:
            _write_synapses(file, graph, projection, number[projection.source], 0, target)
            continue
        for source in sources:
            stage = graph.population(projection.target).stage
            if source.node.name == projection.source and (not source.node.constant or source.stage == stage):
                _write_synapses(file, graph, projection, 0, source.first, target)
    file.writelines(f"& 0.{place}@{host[0]}.{host[1]}\n" for place in range(inputs))
    for core, (tile, place) in zip(mapping.cores, _places(mapping), strict=True):
        group = number[core.population]
        file.writelines(f"& {group}.{neuron}@{tile}.{place}\n" for neuron in core.neurons.tolist())


def _unit_of(projection: Projection) -> str:
    return _SYNAPSE_UNIT[SYNOP_EVENT[projection.operator.kind]]


def _write_group(file: TextIO, population: Population, group: int, unit: str) -> None:
    """Group number `group` with what its neurons share, then each neuron's own values."""
    neuron = population.neuron
    assert isinstance(neuron, LoihiNeuron)
    values = {
        "threshold": np.ravel(neuron.vth),
        "leak_decay": (DECAY_UNITY - np.ravel(neuron.dv)) / DECAY_UNITY,
        "bias": np.ravel(_bias(neuron)) / 2**INPUT_SHIFT,
    }
    shared = " ".join(f"{key}={value[0]:.20g}" for key, value in values.items() if value.size == 1)
    mode = "soft" if neuron.reset == "subtract" else "hard"
    file.write(
        f"g {population.size} soma_hw_name=neurons dendrite_hw_name=sums synapse_hw_name={unit} log_spikes=1 "
        f"reset_mode={mode} reset=0 {shared}\n"
    )
    own = {key: value for key, value in values.items() if value.size > 1}
    if own:
        for index, row in enumerate(zip(*own.values(), strict=True)):
            text = " ".join(f"{key}={value:.20g}" for key, value in zip(own, row, strict=True))
            file.write(f"n {group}.{index} {text}\n")


def _write_synapses(
    file: TextIO, graph: ProcessGraph, projection: Projection, group: int, first: int, target: int
) -> None:
    """Every synapse of a projection, source by source; zero weights too, as they are operations like others."""
    synapses = list_synapses(projection.operator)
    delay = _delay(graph, projection)
    late = f" d={delay}" if delay else ""
    order = np.argsort(synapses.axon_of, kind="stable")
    last, ends = -1, []
    for place in order.tolist():
        axon = int(synapses.axon_of[place])
        if axon < 0:
            continue
        if axon != last:
            targets, weights = axon_synapses(projection.operator, synapses, axon)
            values = (weights.astype(np.int64) << projection.exponent).tolist()
            ends = [f"{to} w={value}{late}\n" for to, value in zip(targets.tolist(), values, strict=True)]
            last = axon
        begin = f"e {group}.{first + place}->{target}."
        file.write(begin.join(["", *ends]))


def _stream(graph: ProcessGraph, inputs: dict[str, np.ndarray], sources: list[_Source], size: int) -> np.ndarray:
    """Input spikes by chip step, uint8 (chip steps, input neurons)."""
    stream = np.zeros((_chip_steps(graph), size), dtype=np.uint8)
    for source in sources:
        rows = slice(source.stage - 1, source.stage - 1 + graph.steps)
        place = slice(source.first, source.first + source.node.size)
        stream[rows, place] = 1 if source.node.constant else inputs[source.node.name][0].reshape(graph.steps, -1)
    return stream


def _chip_steps(graph: ProcessGraph) -> int:
    return graph.steps + max(population.stage for population in graph.populations)


def _plan(graph: ProcessGraph, mapping: Mapping, chip: Chip, inputs: int) -> dict[str, Any]:
    populations = []
    for population in graph.populations:
        assert isinstance(population.neuron, LoihiNeuron)
        bias = (np.ravel(_bias(population.neuron)) / 2**INPUT_SHIFT).tolist()
        entry = {"name": population.name, "size": population.size, "first": population.stage}
        populations.append(entry | {"bias": bias if any(bias) else []})
    return {
        "format": sanafe_runner.FORMAT,
        "version": sanafe_runner.VERSION,
        "sanafe": SANAFE_VERSION,
        "graph": mapping.graph,
        "chip": chip.name,
        "steps": graph.steps,
        "chip_steps": _chip_steps(graph),
        "inputs": inputs,
        "populations": populations,
    }
