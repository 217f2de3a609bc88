"""Mapping a network onto a chip: which core holds which neurons, under every limit of the chip file.

Each core holds a contiguous slice of one population. A population of shape (channels, height, width) is cut in the
order HWC (all channels of a pixel together: row bands, which few sources reach) or CHW (channel blocks); others in flat
order. Populations are cut last to first, because the output axons of one depend on how its targets are cut.

What is counted. Sources that a projection treats alike share an axon: with pooling folded in, the neurons of one
pooled cell (of overlapping windows, every neuron is an axon of its own). Projections have axons of their own. An input
list is the pattern (target offset, weight) of one axon inside one core; axons whose patterns agree up to a base offset
share it, which is how convolution weights stay shared. Inputs come from outside, so only the cores that receive them
count them.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

import numpy as np
import torch

from spikeport.converters.graph import Population, ProcessGraph, Projection
from spikeport.converters.operators import Operator
from spikeport.deploy.chip import Chip, SynapticList
from spikeport.deploy.synapses import list_synapses, list_words, survey
from spikeport.models.errors import DoesNotFitError, SpikeportError

FORMAT = "spikeport-mapping"
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Core:
    """One used core: its place and what it holds. neurons: flat indices into the population, int64, in core order."""

    chip: int
    core: int
    tile_x: int
    tile_y: int
    population: str
    neurons: np.ndarray
    synaptic_words: int
    axons_in: int
    axons_out: int


@dataclass(frozen=True, eq=False)
class Mapping:
    """A network on a chip. `cores` are in graph order of their populations; `orders` says how each one was cut.

    columns: tile columns of one chip; chips stand side by side, so tile_x of chip k on the whole mesh is
    k * columns + tile_x. input_tile: (x, y) at which inputs enter.
    """

    chip: str
    graph: str
    columns: int
    input_tile: tuple[int, int]
    orders: dict[str, str]
    cores: tuple[Core, ...]

    @property
    def chips(self) -> int:
        """How many chips are used."""
        return max(core.chip for core in self.cores) + 1

    @property
    def tiles(self) -> int:
        """Tiles with at least one used core, on all chips."""
        return len({(core.chip, core.tile_x, core.tile_y) for core in self.cores})

    def tile_positions(self) -> np.ndarray:
        """(x, y) of each core's tile on the whole mesh, int64 (cores, 2)."""
        return np.array([(core.chip * self.columns + core.tile_x, core.tile_y) for core in self.cores], dtype=np.int64)

    def cores_of(self, population: str) -> list[int]:
        """Indices into `cores` that hold the population."""
        return [index for index, core in enumerate(self.cores) if core.population == population]

    def core_of_neurons(self, population: Population) -> np.ndarray:
        """Index into `cores` of each neuron, int64 (size,); SpikeportError where a neuron is on no core or on two."""
        indices = self.cores_of(population.name)
        held = np.concatenate([np.zeros(0, dtype=np.int64), *(self.cores[index].neurons for index in indices)])
        if not np.array_equal(np.sort(held), np.arange(population.size)):
            raise SpikeportError(f"the mapping does not hold each neuron of {population.name!r} exactly once.")
        result = np.empty(population.size, dtype=np.int64)
        result[held] = np.repeat(indices, [len(self.cores[index].neurons) for index in indices])
        return result

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        cores = [asdict(core) | {"neurons": core.neurons.tolist()} for core in self.cores]
        rest = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "cores"}
        rest |= {"input_tile": list(self.input_tile), "cores": cores}
        return {"format": FORMAT, "version": FORMAT_VERSION, **rest}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Mapping":
        """The mapping that `to_json` wrote; SpikeportError where it is none."""
        try:
            rest = {key: entry for key, entry in value.items() if key not in ("format", "version", "cores")}
            if (value["format"], value["version"]) != (FORMAT, FORMAT_VERSION):
                raise ValueError(f"format {value['format']} {value['version']}")
            cores = [Core(**(c | {"neurons": np.array(c["neurons"], dtype=np.int64)})) for c in value["cores"]]
            return Mapping(**(rest | {"input_tile": tuple(rest["input_tile"]), "cores": tuple(cores)}))
        except (KeyError, TypeError, ValueError) as error:
            raise SpikeportError(f"this is not a mapping of version {FORMAT_VERSION} ({error}).") from None


@dataclass(frozen=True, eq=False)
class _Cut:
    """One way to cut a population: its order, the first place of each core, and what each core uses of each limit."""

    order: str
    neurons: np.ndarray
    bounds: np.ndarray
    use: dict[str, np.ndarray]
    reach: dict[str, np.ndarray]


class _Cutter:
    """Cuts the populations of one graph; holds what is known of them so far."""

    def __init__(self, graph: ProcessGraph, chip: Chip) -> None:
        self.graph, self.chip = graph, chip
        self.limits = chip.limits.items()
        self.synapses = {entry.name: list_synapses(entry.operator) for entry in graph.projections}
        # target cores that each source neuron reaches, by projection; unknown ones count nothing yet
        self.reach: dict[str, np.ndarray] = {}

    def cut(self, population: Population, at_least: int) -> _Cut:
        """A cut of a population into few cores, and not fewer than `at_least`.

        Raises DoesNotFitError where neither one neuron a core nor all cores of the chips are enough.
        """
        self._check_one_neuron(population)
        most = min(population.size, self.chip.cores * self.chip.max_chips)
        n, found = max(at_least, math.ceil(population.size / self.limits["neurons"])), None
        failed = min(n, most) - 1
        while found is None:
            n = min(n, most)
            found = self._fitting(population, n)
            if found is None:
                if n == most:
                    self._refuse_fullest(population, n)
                failed, n = n, n + max(1, n // 4)
        # the search above took steps of a quarter: close in on the fewest cores between the last two of them
        low, high = failed, len(found.bounds)
        while high - low > 1:
            middle = (low + high) // 2
            closer = self._fitting(population, middle)
            found, low, high = (closer, low, middle) if closer else (found, middle, high)
        return found

    def _fitting(self, population: Population, n: int) -> _Cut | None:
        """The best cut into n cores that keeps every limit."""
        for order, neurons, bounds in _cuts(population, n):
            if np.diff(np.append(bounds, population.size)).max() > self.limits["neurons"]:
                continue  # known without a look at the synapses
            use, reach = self._use(population, neurons, bounds)
            if all(use[name].max() <= limit for name, limit in self.limits.items()):
                return _Cut(order, neurons, bounds, use, reach)
        return None

    def _check_one_neuron(self, population: Population) -> None:
        """Refuse a population whose neuron with the largest fan-in exceeds a core by itself."""
        fan_in = np.zeros(population.size, dtype=np.int64)
        for projection in self.graph.incoming(population.name):
            fan_in += _fan_in(projection.operator)
        worst = int(fan_in.argmax())
        use, _ = self._use(population, np.array([worst]), np.array([0]))
        for name, limit in self.limits.items():
            if use[name][0] > limit:
                self._refuse(population.name, name, int(use[name][0]), int(limit), f"neuron {worst} alone")

    def _refuse_fullest(self, population: Population, n: int) -> NoReturn:
        """Refuse with the core and the limit that the cut into n cores exceeds most."""
        _, neurons, bounds = next(_cuts(population, n))
        use, _ = self._use(population, neurons, bounds)
        name = max(self.limits, key=lambda limit: use[limit].max() / self.limits[limit])
        who = f"even on {n} cores, the fullest one"
        self._refuse(population.name, name, int(use[name].max()), int(self.limits[name]), who)

    def _refuse(self, population: str, limit: str, needed: int, available: int, who: str) -> NoReturn:
        raise DoesNotFitError(
            f"population {population!r} does not fit on {self.chip.name!r}: {who} needs {needed} "
            f"{limit.replace('_', ' ')}, a core has {available} ({needed - available} too many)."
        )

    def _use(
        self, population: Population, neurons: np.ndarray, bounds: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What each core of a cut uses, int64 (cores,) by limit, and the reach of the projections into it."""
        n_cores = len(bounds)
        position, core_of = np.zeros(population.size, np.int64), np.full(population.size, -1, np.int64)
        position[neurons] = np.arange(len(neurons))
        core_of[neurons] = np.searchsorted(bounds, np.arange(len(neurons)), side="right") - 1
        words, axons_in = np.zeros(n_cores, np.int64), np.zeros(n_cores, np.int64)
        reach: dict[str, np.ndarray] = {}
        for projection in self.graph.incoming(population.name):
            synapses = self.synapses[projection.name]
            records, hashes = survey(synapses, position, core_of, n_cores)
            words += _core_words(self.chip.synaptic_list, records, hashes, projection, n_cores)
            axons_in += np.bincount(records[:, 1], minlength=n_cores)
            cores = np.append(np.bincount(records[:, 0], minlength=synapses.n_axons), 0)  # axon -1 reaches none
            reach[projection.name] = cores[synapses.axon_of]
        known = self.reach | reach
        outgoing = [known[entry.name] for entry in self.graph.outgoing(population.name) if entry.name in known]
        per_neuron = sum(outgoing, start=np.zeros(population.size, dtype=np.int64))[neurons]
        sizes = np.diff(np.append(bounds, len(neurons)))
        axons_out = np.add.reduceat(per_neuron, bounds)
        return {"neurons": sizes, "synaptic_words": words, "axons_in": axons_in, "axons_out": axons_out}, reach


def _fan_in(operator: Operator) -> np.ndarray:
    """Synapses into each target neuron, int64 (n_out,)."""
    structure = operator.with_weight(np.ones_like(operator.weight, dtype=np.float64))
    fan_in = structure.apply(torch.ones((1, *operator.in_shape), dtype=torch.float64))[0]
    return fan_in.flatten().round().to(torch.int64).numpy()


def _core_words(
    layout: SynapticList, records: np.ndarray, hashes: np.ndarray, projection: Projection, n_cores: int
) -> np.ndarray:
    """Words of synaptic memory that a projection's distinct input lists take in each core."""
    core, synapses, span, consecutive = records[:, 1], records[:, 2], records[:, 3], records[:, 4]
    widest = np.zeros(n_cores, dtype=np.int64)
    np.maximum.at(widest, core, np.where(consecutive == 1, 0, span))
    widths = np.array(sorted(layout.index_bits), dtype=np.int64)
    # a core that is too full for the widest index breaks its neuron limit, which is told elsewhere
    index_bits = widths[np.minimum(np.searchsorted(1 << widths, widest), len(widths) - 1)]
    order = np.lexsort((synapses, hashes, core))
    keys = [column[order] for column in (core, hashes, synapses)]
    first = np.ones(len(order), dtype=bool)
    first[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    lists = order[first]
    bits = np.where(consecutive[lists] == 1, 0, index_bits[core[lists]])
    result = np.zeros(n_cores, dtype=np.int64)
    np.add.at(result, core[lists], list_words(layout, synapses[lists], bits, projection.delay > 0))
    return result


def _cuts(population: Population, n: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Ways to cut a population into n near-equal slices, best first: (order, neurons in that order, first places).

    Whole rows (HWC) come first, as the sources of a row band reach few other cores; then whole channels (CHW).
    """
    flat = np.arange(population.size)
    if len(population.shape) != 3:
        yield "flat", flat, flat[:n] * population.size // n
        return
    channels, height, _ = population.shape
    orders = {
        "HWC": (flat.reshape(population.shape).transpose(1, 2, 0).ravel(), height),
        "CHW": (flat, channels),
    }
    for order, (neurons, units) in orders.items():
        if n <= units:
            yield order, neurons, np.arange(n) * units // n * (population.size // units)
    for order, (neurons, _) in orders.items():
        yield order, neurons, np.arange(n) * population.size // n


def place(n_cores: int, chip: Chip) -> list[tuple[int, int, int, int]]:
    """Places of so many cores, one after another along a snake through the tiles: (chip, core, tile x, tile y)."""
    places = []
    for index in range(n_cores):
        on_chip, slot = divmod(index, chip.cores)
        tile, within = divmod(slot, chip.cores_per_tile)
        y, x = divmod(tile, chip.mesh.columns)
        if y % 2:
            x = chip.mesh.columns - 1 - x
        places.append((on_chip, (y * chip.mesh.columns + x) * chip.cores_per_tile + within, x, y))
    return places


def check_supported(graph: ProcessGraph, chip: Chip) -> None:
    """Refuse what the chip's spikes and synapses cannot carry: DoesNotFitError with the need and the limit."""
    supports = chip.supports
    for node in graph.inputs:
        if node.message_bits > supports.message_bits:
            raise DoesNotFitError(
                f"input {node.name!r} carries graded spikes of {node.message_bits} bits; those of {chip.name!r} carry "
                f"{supports.message_bits} ({node.message_bits - supports.message_bits} too many)."
            )
    for projection in graph.projections:
        if projection.delay > supports.max_delay:
            raise DoesNotFitError(
                f"projection {projection.name!r} into {projection.target!r} delays by {projection.delay} steps; "
                f"{chip.name!r} allows {supports.max_delay} ({projection.delay - supports.max_delay} too many)."
            )
        weight, bound = projection.operator.weight, 1 << supports.weight_bits
        if graph.is_integer and weight.size and (weight.min() < -bound or weight.max() >= bound):
            raise DoesNotFitError(
                f"projection {projection.name!r} into {projection.target!r} has weights from {weight.min()} to "
                f"{weight.max()}; {chip.name!r} holds {-bound}..{bound - 1}."
            )


def map_network(graph: ProcessGraph, chip: Chip) -> Mapping:
    """Spread a graph over the cores of a chip, or of several, under every limit.

    Raises DoesNotFitError naming the population, the limit, what is needed and what there is.
    """
    check_supported(graph, chip)
    cutter = _Cutter(graph, chip)
    cuts: dict[str, _Cut] = {}
    while True:
        before = {name: len(cut.bounds) for name, cut in cuts.items()}
        for population in reversed(graph.populations):
            cut = cutter.cut(population, before.get(population.name, 1))
            cuts[population.name] = cut
            cutter.reach |= cut.reach
        # one pass is enough without recurrence; with it, the output axons seen by the first pass may have been too few
        recurrent = any(projection.recurrent for projection in graph.projections)
        if not recurrent or before == {name: len(cut.bounds) for name, cut in cuts.items()}:
            break
    needed, available = sum(len(cut.bounds) for cut in cuts.values()), chip.cores * chip.max_chips
    if needed > available:
        shares = ", ".join(f"{entry.name} {len(cuts[entry.name].bounds)}" for entry in graph.populations)
        raise DoesNotFitError(
            f"the network needs {needed} cores, {chip.name!r} has {available} on {chip.max_chips} chips "
            f"({needed - available} too many): {shares}."
        )
    places = iter(place(needed, chip))
    cores = []
    for population in graph.populations:
        cut = cuts[population.name]
        for index, neurons in enumerate(np.split(cut.neurons, cut.bounds[1:])):
            use = {name: int(cut.use[name][index]) for name in ("synaptic_words", "axons_in", "axons_out")}
            cores.append(Core(*next(places), population.name, neurons, **use))
    orders = {entry.name: cuts[entry.name].order for entry in graph.populations}
    tile = (chip.input.column, chip.input.row)
    return Mapping(chip.name, graph.fingerprint(), chip.mesh.columns, tile, orders, tuple(cores))
