"""Placement: which core of which chip holds each part of a network, so that its packets travel few hops.

A place is a global core number: core i of chip k is k * (cores of a chip) + i; the cores of a tile follow each other.
Weighted hops are packets times the Manhattan distance between tiles, chips side by side along x, input packets from the
input tile. The search keeps to as few chips and as few tiles as can hold the network, because the barrier grows with
the mapped tiles.

The search is simulated annealing with fixed seeds (Kirkpatrick et al., Science 220:671-680, 1983): it swaps two cores,
moves one to a free core of a used tile, or swaps the contents of two tiles, one of which may be empty. One run starts
hot from the snake fill and keeps the best placement seen, so the result is never worse than that fill; one starts
nearly cold with like parts of all populations side by side, which suits row bands.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from spikeport.converters.graph import ProcessGraph
from spikeport.deploy.chip import Chip
from spikeport.deploy.synapses import list_synapses, survey

LEVELS = 100
"""Temperatures of one annealing run."""
COOLING = 0.93
MOVES_PER_CORE = 2_000
VISITS = 100_000_000
"""Neighbours looked at in one run, about; what a search takes of time."""
HOT, COLD = 0.5, 0.03
"""First temperature of a run, in mean changes by a random move."""
RANDOM_SEEDS = 20

_LOGS = np.array([-math.log((k + 0.5) / 1024) for k in range(1024)])
"""Thresholds that accept a worse placement with Metropolis's probability, from ten random bits."""


@dataclass(frozen=True, eq=False)
class Traffic:
    """Packets between the cores of a partition, sparse.

    host: from the input tile to each core, float64 (cores,). source, target, packets: one entry for each pair of cores
    (of one core with itself too), in rising order of (source, target).
    """

    host: np.ndarray
    source: np.ndarray
    target: np.ndarray
    packets: np.ndarray

    @property
    def cores(self) -> int:
        """How many cores the partition has."""
        return len(self.host)


@dataclass(frozen=True)
class Hops:
    """Weighted hops of three placements of one partition: the mean of random ones (cores shuffled over the tiles
    nearest to the input), the snake fill in the order of populations, and the one found."""

    random: float
    greedy: float
    placed: float


def traffic(
    graph: ProcessGraph, core_of: Mapping[str, np.ndarray], n_cores: int, rates: Mapping[str, float] | None = None
) -> Traffic:
    """Packets when every neuron and every input fires once: one for each (neuron, projection, target core).

    Args:
        core_of: core of each neuron, int64 (size,), by population.
        rates: spikes a step, by population or input; those without an entry count 1.
    """
    rates = rates or {}
    host = np.zeros(n_cores)
    total: dict[str, np.ndarray] = {"key": np.zeros(0, np.int64), "packets": np.zeros(0)}
    for projection in graph.projections:
        synapses = list_synapses(projection.operator)
        records, _ = survey(synapses, np.arange(synapses.n_out), core_of[projection.target], n_cores)
        start = np.concatenate([[0], np.cumsum(np.bincount(records[:, 0], minlength=synapses.n_axons))])
        target = np.ascontiguousarray(records[:, 1])
        rate = rates.get(projection.source, 1.0)
        if projection.source not in core_of:
            fed = np.bincount(synapses.axon_of[synapses.axon_of >= 0], minlength=synapses.n_axons)
            host += rate * np.bincount(target, weights=np.repeat(fed, np.diff(start)), minlength=n_cores)
            continue
        order = np.argsort(core_of[projection.source], kind="stable")
        keys, counts = _packets(core_of[projection.source], order, synapses.axon_of, start, target, n_cores)
        total = _added(np.append(total["key"], keys), np.append(total["packets"], rate * counts))
    source, target = np.divmod(total["key"], n_cores)
    return Traffic(host, source, target, total["packets"])


def _added(key: np.ndarray, packets: np.ndarray) -> dict[str, np.ndarray]:
    """Entries of one key added up, keys rising."""
    keys, at = np.unique(key, return_inverse=True)
    return {"key": keys, "packets": np.bincount(at, weights=packets, minlength=len(keys))}


@numba.njit(cache=True, nogil=True)
def _packets(
    core_of: np.ndarray, order: np.ndarray, axon_of: np.ndarray, start: np.ndarray, target: np.ndarray, n_cores: int
) -> tuple[np.ndarray, np.ndarray]:
    """(source core * n_cores + target core, packets) of one projection; `order` sorts the neurons by their core."""
    keys, counts = [np.int64(0) for _ in range(0)], [np.int64(0) for _ in range(0)]
    count, touched, n_touched = np.zeros(n_cores, np.int64), np.empty(n_cores, np.int64), 0
    for k in range(len(order)):
        neuron = order[k]
        axon = axon_of[neuron]
        if axon >= 0:
            for at in range(start[axon], start[axon + 1]):
                if count[target[at]] == 0:
                    touched[n_touched] = target[at]
                    n_touched += 1
                count[target[at]] += 1
        if k + 1 == len(order) or core_of[order[k + 1]] != core_of[neuron]:
            for t in range(n_touched):
                keys.append(core_of[neuron] * n_cores + touched[t])
                counts.append(count[touched[t]])
                count[touched[t]] = 0
            n_touched = 0
    return np.array(keys, np.int64), np.array(counts, np.int64)


@dataclass(frozen=True, eq=False)
class _Mesh:
    """The tiles of the chips that a network may use. tile t of all: x, y on the whole mesh; the input's (x, y)."""

    x: np.ndarray
    y: np.ndarray
    columns: int
    rows: int
    cores_per_tile: int
    input: tuple[int, int]
    snake: np.ndarray

    @staticmethod
    def of(chip: Chip, chips: int) -> "_Mesh":
        columns, rows = chip.mesh.columns, chip.mesh.rows
        on_chip, tile = np.divmod(np.arange(chips * columns * rows), columns * rows)
        y, x = np.divmod(tile, columns)
        along = np.where(y % 2, columns - 1 - x, x)
        snake = np.argsort(on_chip * columns * rows + y * columns + along)
        place = (chip.input.column, chip.input.row)
        return _Mesh(on_chip * columns + x, y, columns, rows, chip.cores_per_tile, place, snake)

    def far(self) -> np.ndarray:
        """Distance of each tile from the input tile."""
        distance: np.ndarray = abs(self.x - self.input[0]) + abs(self.y - self.input[1])
        return distance


def chips_needed(n_cores: int, chip: Chip, pinned: Iterable[int] = ()) -> int:
    """Chips that so many cores take; every chip up to the last pinned one counts."""
    return max([-(-n_cores // chip.cores), *(place // chip.cores + 1 for place in pinned)])


def _filled(n_cores: int, mesh: _Mesh, order: np.ndarray, pinned: np.ndarray) -> np.ndarray:
    """Places of the cores in their order: pinned ones (>= 0) at theirs, the others on the tiles that hold pins and on
    as few others as are needed, tiles in the given order."""
    per_tile = mesh.cores_per_tile
    taken = pinned[pinned >= 0]
    free_there = len(np.unique(taken // per_tile)) * per_tile - len(taken)
    more = max(0, -(-(n_cores - len(taken) - free_there) // per_tile))
    is_used = np.zeros(len(mesh.x), dtype=bool)
    is_used[taken // per_tile] = True
    is_used[order[~is_used[order]][:more]] = True
    tiles = order[is_used[order]]
    slots = (tiles[:, None] * per_tile + np.arange(per_tile)).ravel()
    places = pinned.copy()
    places[pinned < 0] = slots[~np.isin(slots, taken)][: n_cores - len(taken)]
    return places


def snake_fill(n_cores: int, chip: Chip, pinned: np.ndarray | None = None) -> np.ndarray:
    """Greedy fill: places of so many cores, one after another along a snake through the tiles.

    pinned: place of each core that has one, -1 for the others, int64 (cores,).
    """
    pinned = np.full(n_cores, -1, dtype=np.int64) if pinned is None else pinned
    mesh = _Mesh.of(chip, chips_needed(n_cores, chip, pinned[pinned >= 0].tolist()))
    return _filled(n_cores, mesh, mesh.snake, pinned)


def weighted_hops(packets: Traffic, places: np.ndarray, chip: Chip) -> float:
    """Packets times Manhattan distance, summed over all pairs of cores and from the input tile."""
    mesh = _Mesh.of(chip, int(places.max()) // chip.cores + 1)
    x, y = mesh.x[places // chip.cores_per_tile], mesh.y[places // chip.cores_per_tile]
    source, target = packets.source, packets.target
    between = packets.packets @ (abs(x[source] - x[target]) + abs(y[source] - y[target]))
    return float(between + packets.host @ mesh.far()[places // chip.cores_per_tile])


def compare(packets: Traffic, places: np.ndarray, chip: Chip, pinned: np.ndarray | None = None) -> Hops:
    """Weighted hops of a placement beside the snake fill's and the mean of random ones."""
    n = packets.cores
    pinned = np.full(n, -1, dtype=np.int64) if pinned is None else pinned
    mesh = _Mesh.of(chip, chips_needed(n, chip, pinned[pinned >= 0].tolist()))
    near, loose = _filled(n, mesh, _nearest(mesh), pinned), np.flatnonzero(pinned < 0)
    random = []
    for seed in range(RANDOM_SEEDS):
        shuffled = near.copy()
        shuffled[loose] = np.random.default_rng(seed).permutation(near[loose])
        random.append(weighted_hops(packets, shuffled, chip))
    greedy = weighted_hops(packets, snake_fill(n, chip, pinned), chip)
    return Hops(float(np.mean(random)), greedy, weighted_hops(packets, places, chip))


def _nearest(mesh: _Mesh) -> np.ndarray:
    """Tiles by their distance from the input tile, of equally far ones along the snake."""
    rank = np.empty(len(mesh.snake), dtype=np.int64)
    rank[mesh.snake] = np.arange(len(rank))
    return np.lexsort((rank, mesh.far()))


def place_cores(packets: Traffic, chip: Chip, along: np.ndarray, pinned: np.ndarray | None = None) -> np.ndarray:
    """Places of a partition's cores with few weighted hops, int64 (cores,); the same ones at every call.

    along: where in its population each core lies, 0 to 1; it only decides where a run starts. pinned: place of each
    core that has one, -1 for the others. The caller has checked that the chips hold them all.
    """
    n = packets.cores
    pinned = np.full(n, -1, dtype=np.int64) if pinned is None else pinned
    mesh = _Mesh.of(chip, chips_needed(n, chip, pinned[pinned >= 0].tolist()))
    snake, loose = _filled(n, mesh, mesh.snake, pinned), np.flatnonzero(pinned < 0)
    if not len(loose):
        return snake
    side_by_side = _filled(n, mesh, _nearest(mesh), pinned)
    side_by_side[loose[np.argsort(along[loose], kind="stable")]] = side_by_side[loose]
    net = (*_neighbours(packets), packets.host)
    moves = min(MOVES_PER_CORE * len(loose), VISITS * n // (8 * n + len(net[1])))
    tiles = (mesh.x, mesh.y, mesh.columns, mesh.rows, mesh.cores_per_tile, *mesh.input)
    found = [
        _anneal(net, tiles, places, pinned >= 0, loose, moves // LEVELS + 1, heat, seed, _LOGS)
        for seed, (places, heat) in enumerate([(snake, HOT), (side_by_side, COLD)])
    ]
    return min(found, key=lambda entry: entry[1])[0]


def _neighbours(packets: Traffic) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Traffic in both directions as rows: neighbours of core i and their packets at [start[i], start[i + 1])."""
    n, apart = packets.cores, packets.source != packets.target
    source, target, both = packets.source[apart], packets.target[apart], packets.packets[apart]
    entries = _added(np.append(source * n + target, target * n + source), np.append(both, both))
    one, other = np.divmod(entries["key"], n)
    start = np.concatenate([[0], np.cumsum(np.bincount(one, minlength=n))]).astype(np.int64)
    return start, other, entries["packets"]


@numba.njit(cache=True, nogil=True)
def _draw(state: np.ndarray, n: int) -> int:
    """A random number of 0 .. n - 1 (splitmix64)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.int64(((z >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32))  # type: ignore[return-value]


@numba.njit(cache=True, nogil=True)
def _cost(net: Any, x: np.ndarray, y: np.ndarray, input_x: int, input_y: int) -> float:
    """Weighted hops of cores at (x, y)."""
    start, other, weight, host = net
    total: float = 0.0
    for i in range(len(host)):
        total += host[i] * (abs(x[i] - input_x) + abs(y[i] - input_y))
        for k in range(start[i], start[i + 1]):
            if other[k] > i:
                total += weight[k] * (abs(x[i] - x[other[k]]) + abs(y[i] - y[other[k]]))
    return total


@numba.njit(cache=True, nogil=True)
def _change(
    net: Any,
    x: np.ndarray,
    y: np.ndarray,
    i: int,
    but: int,
    to_x: int,
    to_y: int,
    input_x: int,
    input_y: int,
) -> float:
    """How much the weighted hops grow if core i goes to (to_x, to_y) and its neighbours stay; all `but` one count."""
    start, other, weight, host = net
    at_x, at_y = x[i], y[i]
    change: float = host[i] * (abs(to_x - input_x) + abs(to_y - input_y) - abs(at_x - input_x) - abs(at_y - input_y))
    for k in range(start[i], start[i + 1]):
        if other[k] == but:
            continue
        there_x, there_y = x[other[k]], y[other[k]]
        change += weight[k] * (abs(to_x - there_x) + abs(to_y - there_y) - abs(at_x - there_x) - abs(at_y - there_y))
    return change


@numba.njit(cache=True, nogil=True)
def _move(
    x: np.ndarray, y: np.ndarray, at: np.ndarray, held: np.ndarray, i: int, slot: int, tile_x: int, tile_y: int
) -> None:
    at[i], held[slot] = slot, i
    x[i], y[i] = tile_x, tile_y


@numba.njit(cache=True, nogil=True)
def _anneal(
    net: Any,
    mesh: Any,
    places: np.ndarray,
    is_pinned: np.ndarray,
    loose: np.ndarray,
    moves: int,
    heat: float,
    seed: int,
    logs: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Anneal from `places`; the best placement found, and its weighted hops. moves: at each temperature."""
    start, other, _, _ = net
    tile_x, tile_y, columns, rows, per_tile, input_x, input_y = mesh
    n, tiles = len(places), len(tile_x)
    at, held = places.copy(), np.full(tiles * per_tile, -1, np.int64)
    x, y = np.empty(n, np.int64), np.empty(n, np.int64)
    # a tile with a pinned core stays where it is; its other cores still move
    used, stays = np.zeros(tiles, np.int64), np.zeros(tiles, np.bool_)
    for i in range(n):
        _move(x, y, at, held, i, at[i], tile_x[at[i] // per_tile], tile_y[at[i] // per_tile])
        used[at[i] // per_tile] += 1
        stays[at[i] // per_tile] |= is_pinned[i]
    state = np.array([seed], np.uint64)
    cost = _cost(net, x, y, input_x, input_y)
    best, best_cost = at.copy(), cost
    temperature, worse, n_worse = 0.0, 0.0, 0
    for level in range(-1, LEVELS + 1):  # level -1 only measures what a move costs; the last one goes downhill only
        if level == 0:
            temperature = heat * worse / max(n_worse, 1)
        elif level == LEVELS:
            temperature = 0.0
        elif level > 0:
            temperature *= COOLING
        for _ in range(moves if level >= 0 else 200):
            i = loose[_draw(state, len(loose))]
            # towards: near a neighbour, or anywhere
            a = at[i] // per_tile
            near = start[i + 1] - start[i]
            if near > 0 and _draw(state, 2) == 0:
                beside = at[other[start[i] + _draw(state, near)]] // per_tile
                to_x, to_y = tile_x[beside] + _draw(state, 3) - 1, tile_y[beside] + _draw(state, 3) - 1
                if to_x < 0 or to_y < 0 or to_y >= rows or to_x >= tiles // rows:
                    continue
                b = to_x // columns * columns * rows + to_y * columns + to_x % columns
            else:
                b = _draw(state, tiles)
            if a == b:
                continue
            whole = used[b] == 0 or _draw(state, 4) == 0
            if whole:
                if stays[a] or stays[b]:
                    continue
                change = 0.0
                for slot in range(a * per_tile, (a + 1) * per_tile):
                    if held[slot] >= 0:
                        change += _change_apart(
                            net, x, y, at, held[slot], a, b, per_tile, tile_x, tile_y, input_x, input_y
                        )
                for slot in range(b * per_tile, (b + 1) * per_tile):
                    if held[slot] >= 0:
                        change += _change_apart(
                            net, x, y, at, held[slot], b, a, per_tile, tile_x, tile_y, input_x, input_y
                        )
            else:
                slot = b * per_tile + _draw(state, per_tile)
                j = held[slot]
                if j >= 0 and is_pinned[j]:
                    continue
                # two cores that change places stay equally far from each other
                change = _change(net, x, y, i, j, tile_x[b], tile_y[b], input_x, input_y)
                if j >= 0:
                    change += _change(net, x, y, j, i, tile_x[a], tile_y[a], input_x, input_y)
            if level < 0:
                worse += abs(change)
                n_worse += 1
                continue
            if change > 0 and change >= temperature * logs[_draw(state, 1024)]:
                continue
            cost += change
            if whole:
                for within in range(per_tile):
                    one, two = held[a * per_tile + within], held[b * per_tile + within]
                    held[a * per_tile + within] = held[b * per_tile + within] = -1
                    if one >= 0:
                        _move(x, y, at, held, one, b * per_tile + within, tile_x[b], tile_y[b])
                    if two >= 0:
                        _move(x, y, at, held, two, a * per_tile + within, tile_x[a], tile_y[a])
                used[a], used[b] = used[b], used[a]
            else:
                left = at[i]
                held[left] = -1
                if j >= 0:
                    _move(x, y, at, held, j, left, tile_x[a], tile_y[a])
                else:
                    used[a] -= 1
                    used[b] += 1
                _move(x, y, at, held, i, slot, tile_x[b], tile_y[b])
        if cost < best_cost:
            cost = _cost(net, x, y, input_x, input_y)
            if cost < best_cost:
                best, best_cost = at.copy(), cost
    return best, best_cost


@numba.njit(cache=True, nogil=True)
def _change_apart(
    net: Any,
    x: np.ndarray,
    y: np.ndarray,
    at: np.ndarray,
    i: int,
    a: int,
    b: int,
    per_tile: int,
    tile_x: np.ndarray,
    tile_y: np.ndarray,
    input_x: int,
    input_y: int,
) -> float:
    """What core i adds when tiles a and b swap their contents: its traffic with all but the cores of the two."""
    start, other, weight, host = net
    change: float = host[i] * (
        abs(tile_x[b] - input_x) + abs(tile_y[b] - input_y) - abs(tile_x[a] - input_x) - abs(tile_y[a] - input_y)
    )
    for k in range(start[i], start[i + 1]):
        tile = at[other[k]] // per_tile
        if tile != a and tile != b:
            there_x, there_y = x[other[k]], y[other[k]]
            change += weight[k] * (
                abs(tile_x[b] - there_x)
                + abs(tile_y[b] - there_y)
                - abs(tile_x[a] - there_x)
                - abs(tile_y[a] - there_y)
            )
    return change
