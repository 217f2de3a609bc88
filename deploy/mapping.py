"""Mapping a network onto a chip: which core holds which neurons, under every limit of the chip file.

Each core holds a contiguous slice of one population. A population of shape (channels, height, width) is cut in the
order HWC (all channels of a pixel together: row bands, which few sources reach) or CHW (channel blocks); others in flat
order. Populations are cut last to first, because the output axons of one depend on how its targets are cut. A pinned
population is cut into as many cores as it is pinned to; `placement` finds the places of the others.

What is counted. Sources that a projection treats alike share an axon: with pooling folded in, the neurons of one
pooled cell (of overlapping windows, every neuron is an axon of its own). Projections have axons of their own. An input
list is the pattern (target offset, weight) of one axon inside one core; axons whose patterns agree up to a base offset
share it, which is how convolution weights stay shared. Inputs come from outside, so only the cores that receive them
count them.
"""

import difflib
import math
from collections.abc import Iterator
from collections.abc import Mapping as ReadOnly
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numba
import numpy as np

from spikeport.converters.graph import Population, ProcessGraph, Projection
from spikeport.deploy.chip import Chip, SynapticList
from spikeport.deploy.placement import Hops, compare, place_cores, traffic
from spikeport.deploy.synapses import distinct_lists, list_synapses, list_words, survey
from spikeport.models.errors import ChipError, DoesNotFitError, SpikeportError

FORMAT = "spikeport-mapping"
FORMAT_VERSION = 2


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

    @property
    def use(self) -> dict[str, int]:
        """How much of each limit it uses, by the name of the limit."""
        return {
            "neurons": len(self.neurons),
            "synaptic_words": self.synaptic_words,
            "axons_in": self.axons_in,
            "axons_out": self.axons_out,
        }


@dataclass(frozen=True, eq=False)
class Mapping:
    """A network on a chip. `cores` are in graph order of their populations; `orders` says how each one was cut.

    columns, rows: tiles of one chip; chips stand side by side, so tile_x of chip k on the whole mesh is
    k * columns + tile_x. cores_per_tile: a core's number modulo it is its place in the tile. input_tile: (x, y) at
    which inputs enter.
    """

    chip: str
    graph: str
    columns: int
    rows: int
    cores_per_tile: int
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
        """Plain JSON values; a core's neurons as runs (first, step, count), one after another in one list."""
        cores = [asdict(core) | {"neurons": _to_runs(core.neurons).tolist()} for core in self.cores]
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
            cores = [Core(**(core | {"neurons": _from_runs(core["neurons"])})) for core in value["cores"]]
            return Mapping(**(rest | {"input_tile": tuple(rest["input_tile"]), "cores": tuple(cores)}))
        except (KeyError, TypeError, ValueError) as error:
            raise SpikeportError(
                f"this is not a mapping of version {FORMAT_VERSION} ({error}). Run `spikeport map` again."
            ) from None


@numba.njit(cache=True, nogil=True)
def _to_runs(neurons: np.ndarray) -> np.ndarray:
    """Indices as runs of equal steps: first, step, count of each."""
    runs, n, at = np.empty(3 * len(neurons), np.int64), 0, 0
    while at < len(neurons):
        step, end = 1, at + 1
        if end < len(neurons):
            step = neurons[end] - neurons[at]
            while end < len(neurons) and neurons[end] - neurons[end - 1] == step:
                end += 1
        runs[n], runs[n + 1], runs[n + 2] = neurons[at], step, end - at
        n, at = n + 3, end
    return runs[:n]


def _from_runs(runs: list[int]) -> np.ndarray:
    parts = [first + step * np.arange(count) for first, step, count in np.array(runs, dtype=np.int64).reshape(-1, 3)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


@dataclass(frozen=True, eq=False)
class _Cut:
    """One way to cut a population: its order, the first place of each core, and what each core uses of each limit."""

    order: str
    neurons: np.ndarray
    bounds: np.ndarray
    use: dict[str, np.ndarray]
    reach: dict[str, np.ndarray]


class Excess(NamedTuple):
    """One thing that does not fit: what, which part of it, the limit and by how much; and all that in a sentence."""

    what: str
    where: str
    limit: str
    needed: int
    available: int
    sentence: str


class _Cutter:
    """Cuts the populations of one graph; holds what is known of them so far, and what does not fit."""

    def __init__(self, graph: ProcessGraph, chip: Chip) -> None:
        self.graph, self.chip = graph, chip
        self.limits: dict[str, float] = chip.limits.items()
        self.synapses = {entry.name: list_synapses(entry.operator) for entry in graph.projections}
        # target cores that each source neuron reaches, by projection; unknown ones count nothing yet
        self.reach: dict[str, np.ndarray] = {}
        self.problems: list[Excess] = []

    def cut(self, population: Population, at_least: int) -> _Cut:
        """A cut of a population into few cores, and not fewer than `at_least`.

        Where neither one neuron a core nor all cores of the chips are enough, that is added to the problems; the cut is
        then one by the number of neurons alone.
        """
        if self._refuses_one_neuron(population):
            return self._stand_in(population)
        most = min(population.size, self.chip.cores * self.chip.max_chips)
        n, found = max(at_least, math.ceil(population.size / self.limits["neurons"])), None
        failed = min(n, most) - 1
        while found is None:
            n = min(n, most)
            found = self._fitting(population, n)
            if found is None:
                if n == most:
                    self._refuse_fullest(population, n, f"even on {n} cores, the fullest one")
                    return self._stand_in(population)
                failed, n = n, n + max(1, n // 4)
        # the search above took steps of a quarter: close in on the fewest cores between the last two of them
        low, high = failed, len(found.bounds)
        while high - low > 1:
            middle = (low + high) // 2
            closer = self._fitting(population, middle)
            found, low, high = (closer, low, middle) if closer else (found, middle, high)
        return found

    def cut_pinned(self, population: Population, n: int) -> _Cut:
        """A cut of a population into exactly n cores; where it does not fit, that is added to the problems."""
        found = self._fitting(population, n)
        if found is not None:
            return found
        known = len(self.problems)
        enough = self.cut(population, n + 1)
        if len(self.problems) == known:
            who = f"on the {n} {'core' if n == 1 else 'cores'} that it is pinned to, the fullest one"
            self._refuse_fullest(population, n, who, f"; {len(enough.bounds)} cores would do")
        return self._stand_in(population)

    def _stand_in(self, population: Population) -> _Cut:
        """A cut that no limit but that of neurons was asked for: the sources' output axons are not overstated by it."""
        most = min(population.size, self.chip.cores * self.chip.max_chips)
        n = min(most, math.ceil(population.size / self.limits["neurons"]))
        order, neurons, bounds = next(_cuts(population, n))
        return _Cut(order, neurons, bounds, *self._use(population, neurons, bounds))

    def _fitting(self, population: Population, n: int) -> _Cut | None:
        """The best cut into n cores that keeps every limit."""
        for order, neurons, bounds in _cuts(population, n):
            if np.diff(np.append(bounds, population.size)).max() > self.limits["neurons"]:
                continue  # known without a look at the synapses
            # one core tells most cuts that do not fit, at a small part of the work
            if n > 2 and not self._keeps(self._use(population, neurons, bounds, n // 2)[0]):
                continue
            use, reach = self._use(population, neurons, bounds)
            if self._keeps(use):
                return _Cut(order, neurons, bounds, use, reach)
        return None

    def _keeps(self, use: dict[str, np.ndarray]) -> bool:
        """Whether every core keeps every limit."""
        return all(use[name].max() <= limit for name, limit in self.limits.items())

    def _refuses_one_neuron(self, population: Population) -> bool:
        """Whether the neuron with the largest fan-in exceeds a core by itself; what it exceeds becomes a problem."""
        fan_in = np.zeros(population.size, dtype=np.int64)
        for projection in self.graph.incoming(population.name):
            fan_in += projection.operator.fan_in()
        worst = int(fan_in.argmax())
        use, _ = self._use(population, np.array([worst]), np.array([0]))
        broken = [name for name, limit in self.limits.items() if use[name][0] > limit]
        for name in broken:
            self._refuse(population.name, name, int(use[name][0]), f"neuron {worst} alone")
        return bool(broken)

    def _refuse_fullest(self, population: Population, n: int, who: str, advice: str = "") -> None:
        """Add the limits that the cut into n cores exceeds to the problems, the one it exceeds most first."""
        _, neurons, bounds = next(_cuts(population, n))
        use, _ = self._use(population, neurons, bounds)
        for name in sorted(self.limits, key=lambda limit: -use[limit].max() / self.limits[limit]):
            if use[name].max() > self.limits[name]:
                self._refuse(population.name, name, int(use[name].max()), who, advice)

    def _refuse(self, population: str, limit: str, needed: int, who: str, advice: str = "") -> None:
        available, what = int(self.limits[limit]), limit.replace("_", " ")
        self.problems.append(
            Excess(
                f"population {population!r}",
                who.removeprefix("even "),
                what,
                needed,
                available,
                f"population {population!r} does not fit on {self.chip.name!r}: {who} needs {needed} "
                f"{what}, a core has {available} ({needed - available} too many){advice}.",
            )
        )

    def _use(
        self, population: Population, neurons: np.ndarray, bounds: np.ndarray, only: int | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What each core of a cut, or `only` one of them, uses, int64 (cores,) by limit; reach of what comes in."""
        position, core_of = np.zeros(population.size, np.int64), np.full(population.size, -1, np.int64)
        position[neurons] = np.arange(len(neurons))
        if only is not None:
            neurons = neurons[bounds[only] : np.append(bounds, len(neurons))[only + 1]]
            bounds = np.zeros(1, np.int64)
        n_cores = len(bounds)
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
    lists = np.flatnonzero(distinct_lists(records, hashes))
    bits = np.where(consecutive[lists] == 1, 0, index_bits[core[lists]])
    result = np.zeros(n_cores, dtype=np.int64)
    words = list_words(layout, synapses[lists], bits, projection.delay > 0, projection.weight_bits)
    np.add.at(result, core[lists], words)
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


def _unsupported(graph: ProcessGraph, chip: Chip) -> list[Excess]:
    """What the chip's spikes and synapses cannot carry."""
    supports, found = chip.supports, []
    for node in graph.inputs:
        needed, available = node.message_bits, supports.message_bits
        if needed > available:
            sentence = (
                f"input {node.name!r} carries graded spikes of {needed} bits; those of {chip.name!r} carry {available} "
                f"({needed - available} too many)."
            )
            found.append(Excess(f"input {node.name!r}", "spikes", "bits", needed, available, sentence))
    for projection in graph.projections:
        what = f"projection {projection.name!r} into {projection.target!r}"
        needed, available = projection.delay, supports.max_delay
        if needed > available:
            sentence = (
                f"{what} delays by {needed} steps; {chip.name!r} allows {available} ({needed - available} too many)."
            )
            found.append(Excess(f"projection {projection.name!r}", "delay", "steps", needed, available, sentence))
        weight, bound = projection.operator.weight, 1 << supports.weight_bits
        if graph.is_integer and weight.size and (weight.min() < -bound or weight.max() >= bound):
            low, high = int(weight.min()), int(weight.max())
            sentence = f"{what} has weights from {low} to {high}; {chip.name!r} holds {-bound}..{bound - 1}."
            needed, available = (high, bound - 1) if high - bound + 1 >= -bound - low else (-low, bound)
            found.append(Excess(f"projection {projection.name!r}", "weights", "magnitude", needed, available, sentence))
    return found


def _refuse(problems: list[Excess]) -> None:
    """DoesNotFitError with the first problem in a sentence, and a table where there are several."""
    if not problems:
        return
    lines = [problems[0].sentence]
    if len(problems) > 1:
        lines.append("In all, this does not fit:")
        head = ("what", "where", "limit", "needed", "available", "too many")
        rows = [head] + [
            (*row[:3], f"{row.needed:,}", f"{row.available:,}", f"{row.needed - row.available:,}") for row in problems
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
            cells += [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
            lines.append("  " + "  ".join(cells))
    raise DoesNotFitError("\n".join(lines))


def check_pins(graph: ProcessGraph, chip: Chip, pins: ReadOnly[str, list[int]]) -> None:
    """Refuse pins that name no population, no core, a core twice, or more cores than there are neurons: ChipError.

    A pin is a global core number: core i of chip k is k * (cores of a chip) + i.
    """
    names = [population.name for population in graph.populations]
    cores = chip.cores * chip.max_chips
    holder: dict[int, str] = {}
    for name, pinned in pins.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise ChipError(
                f"pins: there is no population {name!r} (did you mean {near!r}?).\nPopulations: {', '.join(names)}."
            )
        if not pinned:
            raise ChipError(f"pins: population {name!r} is pinned to no core; name at least one or leave it out.")
        size = graph.population(name).size
        if len(pinned) > size:
            raise ChipError(
                f"pins: population {name!r} has {size} neurons and is pinned to {len(pinned)} cores; "
                f"pin it to at most {size}."
            )
        for core in pinned:
            if not 0 <= core < cores:
                raise ChipError(
                    f"pins: population {name!r} is pinned to core {core}; {chip.name!r} has the cores 0..{cores - 1} "
                    f"({_chips(chip.max_chips)} of {chip.cores}; core i of chip k is {chip.cores} k + i)."
                )
            if core in holder:
                raise ChipError(
                    f"pins: core {core} is pinned twice, to {holder[core]!r} and to {name!r}; a core holds one part "
                    "of one population."
                )
            holder[core] = name


def _chips(n: int) -> str:
    return f"{n} chip" if n == 1 else f"{n} chips"


def map_network(
    graph: ProcessGraph,
    chip: Chip,
    pins: ReadOnly[str, list[int]] | None = None,
    rates: ReadOnly[str, float] | None = None,
) -> Mapping:
    """Spread a graph over the cores of a chip, or of several, under every limit.

    Args:
        pins: cores of a population, in order of its parts, as global core numbers (`check_pins`).
        rates: spikes a step of a population's or input's neurons, for the placement; all count 1 by default.

    Raises DoesNotFitError naming what does not fit, the limit, what is needed and what there is; ChipError for pins
    that are wrong.
    """
    pins = pins or {}
    check_pins(graph, chip, pins)
    unsupported = _unsupported(graph, chip)
    cuts, problems = _cut_all(graph, chip, {name: len(pinned) for name, pinned in pins.items()})
    _refuse(unsupported + problems)
    pinned: list[int] = []
    along: list[float] = []
    core_of: dict[str, np.ndarray] = {}
    for population in graph.populations:
        cut = cuts[population.name]
        n = len(cut.bounds)
        core_of[population.name] = np.empty(population.size, dtype=np.int64)
        sizes = np.diff(np.append(cut.bounds, population.size))
        core_of[population.name][cut.neurons] = np.repeat(len(pinned) + np.arange(n), sizes)
        pinned += pins.get(population.name, [-1] * n)
        along += [(index + 0.5) / n for index in range(n)]
    packets = traffic(graph, core_of, len(pinned), rates)
    places = iter(place_cores(packets, chip, np.array(along), np.array(pinned, dtype=np.int64)).tolist())
    cores = []
    for population in graph.populations:
        cut = cuts[population.name]
        for index, neurons in enumerate(np.split(cut.neurons, cut.bounds[1:])):
            on_chip, core = divmod(next(places), chip.cores)
            y, x = divmod(core // chip.cores_per_tile, chip.mesh.columns)
            use = {name: int(cut.use[name][index]) for name in ("synaptic_words", "axons_in", "axons_out")}
            cores.append(Core(on_chip, core, x, y, population.name, neurons, **use))
    orders = {entry.name: cuts[entry.name].order for entry in graph.populations}
    tile = (chip.input.column, chip.input.row)
    size = (chip.mesh.columns, chip.mesh.rows, chip.cores_per_tile)
    return Mapping(chip.name, graph.fingerprint(), *size, tile, orders, tuple(cores))


def _cut_all(graph: ProcessGraph, chip: Chip, pinned: dict[str, int]) -> tuple[dict[str, _Cut], list[Excess]]:
    """A cut of every population, and what does not fit. pinned: cores of the populations that have theirs."""
    cutter = _Cutter(graph, chip)
    cuts: dict[str, _Cut] = {}
    while True:
        before = {name: len(cut.bounds) for name, cut in cuts.items()}
        for population in reversed(graph.populations):
            name = population.name
            if name in pinned:
                cuts[name] = cutter.cut_pinned(population, pinned[name])
            else:
                cuts[name] = cutter.cut(population, before.get(name, 1))
            cutter.reach |= cuts[name].reach
        # one pass is enough without recurrence; with it, the output axons seen by the first pass may have been too few
        recurrent = any(projection.recurrent for projection in graph.projections)
        if cutter.problems or not recurrent or before == {name: len(cut.bounds) for name, cut in cuts.items()}:
            break
    order = [f"population {population.name!r}" for population in graph.populations]
    problems = sorted(cutter.problems, key=lambda problem: order.index(problem.what))
    needed, available = sum(len(cut.bounds) for cut in cuts.values()), chip.cores * chip.max_chips
    if needed > available and not problems:
        shares = ", ".join(f"{entry.name} {len(cuts[entry.name].bounds)}" for entry in graph.populations)
        sentence = (
            f"the network needs {needed} cores, {chip.name!r} has {available} on {_chips(chip.max_chips)} "
            f"({needed - available} too many): {shares}. It would take {_chips(-(-needed // chip.cores))}."
        )
        problems.append(Excess("the network", _chips(chip.max_chips), "cores", needed, available, sentence))
    return cuts, problems


def placement_hops(
    graph: ProcessGraph, mapping: Mapping, chip: Chip, pins: ReadOnly[str, list[int]] | None = None
) -> Hops:
    """Weighted hops of a mapping, every neuron firing once, beside those of other placements of its cores."""
    core_of = {population.name: mapping.core_of_neurons(population) for population in graph.populations}
    places = np.array([core.chip * chip.cores + core.core for core in mapping.cores], dtype=np.int64)
    is_pinned = np.array([core.population in (pins or {}) for core in mapping.cores])
    packets = traffic(graph, core_of, len(places))
    return compare(packets, places, chip, np.where(is_pinned, places, -1))
