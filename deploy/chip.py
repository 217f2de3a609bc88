"""Chips as TOML files: mesh, limits, and what every event costs, each cost with where it comes from.

Built-in chips lie in `chips/`; a user's own file has the same schema. Energies are in picojoule, times in nanosecond
and whole multiples of `tick_ns`, because timing counts in integer ticks. Nothing outside these files knows a cost.
"""

import difflib
import hashlib
import math
import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spikeport.deploy.toml_lines import Place, key_lines, line_of
from spikeport.models.errors import ChipError

CHIP_FOLDER = Path(__file__).parent / "chips"

Kind = Literal["published simulation", "measurement", "regression", "borrowed", "assumed"]
Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Limit = Count | Literal["unpublished"]

SYNOP_EVENT = {"dense": "synop_dense", "conv": "synop_conv", "sparse": "synop_sparse", "one_to_one": "synop_sparse"}
"""The event that prices one synaptic operation, by kind of operator."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _WrongAt(ValueError):
    """A value that contradicts others; `place` is that of its key, from the model down that finds it."""

    def __init__(self, reason: str, *place: str) -> None:
        super().__init__(reason)
        self.place = place


class Quantity(_Model):
    """One figure with its band and its provenance."""

    value: Cost
    low: Cost
    high: Cost
    kind: Kind
    source: str

    @model_validator(mode="after")
    def _band_holds_value(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise _WrongAt(f"{self.value} lies outside its band {self.low}..{self.high}", "value")
        return self


class EventCost(_Model):
    """What one event costs the core or link that does it."""

    energy_pj: Quantity
    time_ns: Quantity


class Events(_Model):
    """Every event that any set of constants prices; a set that leaves one out says so with a zero and its source.

    axon_in: a message that a core receives. synop_*: one synaptic operation. neuron_inactive, neuron_active: one neuron
    in one step, by whether it has state or input. neuron_access: every mapped neuron in every step; neuron_update: in
    addition, where it is active. spike: a neuron that fires. axon_out: a message that a core sends. within_tile: a
    packet whose target core lies on its source's tile. hop_ew, hop_ns: one hop of a packet between tiles.
    """

    axon_in: EventCost
    synop_dense: EventCost
    synop_sparse: EventCost
    synop_conv: EventCost
    neuron_inactive: EventCost
    neuron_active: EventCost
    neuron_access: EventCost
    neuron_update: EventCost
    spike: EventCost
    axon_out: EventCost
    within_tile: EventCost
    hop_ew: EventCost
    hop_ns: EventCost


EVENT_TITLES = {
    "axon_in": "messages received",
    "synop_dense": "synaptic operations, dense",
    "synop_sparse": "synaptic operations, sparse",
    "synop_conv": "synaptic operations, convolution",
    "neuron_inactive": "neuron steps, inactive",
    "neuron_active": "neuron steps, active",
    "neuron_access": "neuron accesses",
    "neuron_update": "neuron updates",
    "spike": "spikes generated",
    "axon_out": "messages sent",
    "within_tile": "packets within a tile",
    "hop_ew": "hops east-west",
    "hop_ns": "hops north-south",
}


class Mesh(_Model):
    """Tiles of one chip."""

    columns: Count
    rows: Count


class Limits(_Model):
    """What one core holds. axons_in: input lists; axons_out: (neuron, target core) pairs. Words are of 64 bit."""

    neurons: Count
    synaptic_words: Count
    axons_in: Limit
    axons_out: Limit
    source: str

    def items(self) -> dict[str, float]:
        """Each limit by name; infinity where none is published."""
        names = ("neurons", "synaptic_words", "axons_in", "axons_out")
        values = {name: getattr(self, name) for name in names}
        return {name: math.inf if value == "unpublished" else value for name, value in values.items()}


class Supports(_Model):
    """What a synapse and a spike can carry. weight_bits n: -2^n .. 2^n - 1; message_bits 1: binary spikes."""

    weight_bits: Count
    message_bits: Count
    max_delay: Annotated[int, Field(ge=0)]


class SynapticList(_Model):
    """Memory layout of one input list, in bits.

    A list is cut into blocks of at most `block_synapses`; a block takes `header_bits` and, for each synapse, weight,
    delay (of a delayed projection), tag and index, rounded up to whole words of `word_bits`. A weight has the smallest
    of the widths `weight_bits` that holds the projection's. The index has the smallest of the widths `index_bits` that
    tells the list's targets apart; a list of consecutive targets has none.
    """

    word_bits: Count
    weight_bits: Annotated[list[Count], Field(min_length=1)]
    delay_bits: Annotated[int, Field(ge=0)]
    tag_bits: Annotated[int, Field(ge=0)]
    header_bits: Annotated[int, Field(ge=0)]
    block_synapses: Count
    index_bits: Annotated[list[Count], Field(min_length=1)]
    source: str


class BarrierPoint(_Model):
    """Time of the barrier with that many mapped tiles."""

    tiles: Count
    time_ns: Quantity


class Barrier(_Model):
    """Synchronisation that closes a step. `between` the points: linear, or the last point reached (step); beyond them
    the nearest point holds."""

    between: Literal["linear", "step"]
    points: Annotated[list[BarrierPoint], Field(min_length=1)]

    @model_validator(mode="after")
    def _tiles_rise(self) -> Self:
        tiles = [point.tiles for point in self.points]
        for index, (before, after) in enumerate(pairwise(tiles), 1):
            if after <= before:
                reason = f"the points must rise in tiles; {after} follows {before}"
                raise _WrongAt(reason, "points", str(index), "tiles")
        return self

    def at(self, tiles: int) -> Quantity:
        """The barrier's time with `tiles` mapped tiles."""
        after = next((i for i, point in enumerate(self.points) if point.tiles > tiles), len(self.points))
        before = self.points[max(after - 1, 0)]
        if self.between == "step" or after in (0, len(self.points)):
            return before.time_ns
        last = self.points[after]
        share = (tiles - before.tiles) / (last.tiles - before.tiles)

        def mix(key: str) -> float:
            start, end = getattr(before.time_ns, key), getattr(last.time_ns, key)
            return float(start + share * (end - start))

        return before.time_ns.model_copy(update={key: mix(key) for key in ("value", "low", "high")})


class InputPort(_Model):
    """The tile of the first chip at which input spikes enter the mesh."""

    column: Annotated[int, Field(ge=0)]
    row: Annotated[int, Field(ge=0)]
    kind: Kind
    source: str


class Network(_Model):
    """Links and buffers between the cores (`docs/chip-timing.md`). Buffers are counted in packets.

    link_ns: how long one packet takes a link before the next may follow; what a packet needs to cross it is in
    `events`. link_packets: input buffer of a router, one a neighbour. send_packets: buffer in which a core's packets
    wait for its router. queue_packets: queue of packets in front of a core's synapses.
    """

    link_ns: Quantity
    link_packets: Count
    send_packets: Count
    queue_packets: Count
    kind: Kind
    source: str


class Chip(_Model):
    """A neuromorphic chip: what it holds, what it can do, what it costs."""

    name: str
    title: str
    mesh: Mesh
    cores_per_tile: Count
    max_chips: Count
    tick_ns: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    limits: Limits
    supports: Supports
    synaptic_list: SynapticList
    static_mw: Quantity
    barrier: Barrier
    input: InputPort
    network: Network
    events: Events

    @property
    def cores(self) -> int:
        """Neurocores of one chip."""
        return self.mesh.columns * self.mesh.rows * self.cores_per_tile

    @property
    def digest(self) -> str:
        """Hex digest over everything in the file: chips of one name may differ."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def event(self, name: str) -> EventCost:
        """Cost of one event by its name in `Events`."""
        cost: EventCost = getattr(self.events, name)
        return cost

    def ticks(self, event: str) -> int:
        """Ticks that one event takes."""
        return round(self.event(event).time_ns.value / self.tick_ns)

    @property
    def link_ticks(self) -> int:
        """Ticks for which one packet takes a link."""
        return round(self.network.link_ns.value / self.tick_ns)

    def barrier_ticks(self, tiles: int) -> int:
        """Ticks of the barrier with that many mapped tiles, to the nearest tick where it lies between two points."""
        return round(self.barrier.at(tiles).value / self.tick_ns)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        times = {f"events.{name}.time_ns": self.event(name).time_ns.value for name in Events.model_fields}
        times["network.link_ns"] = self.network.link_ns.value
        times |= {f"barrier.points.{i}.time_ns": point.time_ns.value for i, point in enumerate(self.barrier.points)}
        for key, value in times.items():
            if not math.isclose(value / self.tick_ns, round(value / self.tick_ns), rel_tol=0, abs_tol=1e-6):
                reason = f"{value} ns is not a whole number of ticks of {self.tick_ns} ns"
                raise _WrongAt(reason, *key.split("."), "value")
        tile, mesh = f"({self.input.column}, {self.input.row})", f"{self.mesh.columns} by {self.mesh.rows} tiles"
        for key, outside in (
            ("column", self.input.column >= self.mesh.columns),
            ("row", self.input.row >= self.mesh.rows),
        ):
            if outside:
                raise _WrongAt(f"the input tile {tile} lies outside the mesh of {mesh}", "input", key)
        if max(self.synaptic_list.weight_bits) < self.supports.weight_bits:
            reason = f"no width can hold supports.weight_bits = {self.supports.weight_bits}"
            raise _WrongAt(reason, "synaptic_list", "weight_bits")
        if 1 << max(self.synaptic_list.index_bits) < self.limits.neurons:
            reason = f"no width can number limits.neurons = {self.limits.neurons}"
            raise _WrongAt(reason, "synaptic_list", "index_bits")
        return self


def chip_names() -> list[str]:
    """Names of the built-in chips."""
    return sorted(path.stem for path in CHIP_FOLDER.glob("*.toml"))


def load_chip(name_or_path: str | Path) -> Chip:
    """Load a built-in chip by its name, or a chip file by its path.

    Raises ChipError: an unknown name, a file that cannot be read, or a key of it that is wrong or missing.
    """
    return _read(chip_file(name_or_path))


def chip_text(name_or_path: str | Path) -> str:
    """The text of a chip file that `load_chip` accepts."""
    return chip_file(name_or_path).read_text(encoding="utf-8")


def chip_file(name_or_path: str | Path) -> Path:
    """Where the chip file of a built-in name or a path is. Raises ChipError for an unknown name."""
    if str(name_or_path) in chip_names():
        return CHIP_FOLDER / f"{name_or_path}.toml"
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        return path
    near = difflib.get_close_matches(str(name_or_path), chip_names(), 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ChipError(
        f"there is no chip named {str(name_or_path)!r}.{hint}\nKnown chips: {', '.join(chip_names())}; "
        "or give the path of a .toml file."
    )


def _read(path: Path) -> Chip:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ChipError(f"chip file {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ChipError(f"chip file {path} is not UTF-8 text: {error}.") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.fullmatch(r"(.*) \(at line (\d+), (column \d+)\)", str(error), re.DOTALL)
        if at:
            raise _error(path, int(at[2]), f"not valid TOML: {at[1]} ({at[3]}).") from None
        raise _error(path, None, f"not valid TOML: {error}.") from None
    lines = key_lines(text)
    sources = values.pop("sources", {})
    if not isinstance(sources, dict):
        raise _error(path, lines["sources",], "sources: must be a table of short names and texts.")
    try:
        _cite(values, sources, ())
        return Chip.model_validate(values)
    except ValidationError as error:
        place, reason = _reason(error, values)
    except _WrongAt as error:
        place, reason = error.place, f"{error}."
    raise _error(path, line_of(lines, place), f"{'.'.join(place)}: {reason}" if place else reason)


def _error(path: Path, line: int | None, reason: str) -> ChipError:
    return ChipError(f"chip file {path}{'' if line is None else f', line {line}'}: {reason}")


def _cite(values: Any, sources: dict[str, Any], where: Place) -> None:
    """Replace the short name of each `source` by its text in the file's table [sources]."""
    entries: list[tuple[Any, Any]] = []
    if isinstance(values, dict | list):
        entries = list(values.items() if isinstance(values, dict) else enumerate(values))
    for key, value in entries:
        place = (*where, str(key))
        if key == "source" and isinstance(value, str):
            if value not in sources:
                near = difflib.get_close_matches(value, sources, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise _WrongAt(f"{value!r} is not in the table [sources]{hint}", *place)
            values[key] = sources[value]
        _cite(value, sources, place)


def _reason(error: ValidationError, values: dict[str, Any]) -> tuple[Place, str]:
    """Place and reason of the first problem; a wrong key before the missing one that it was meant to be."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    places = [_place(problem["loc"], values) for problem in problems]
    first, place = problems[0], places[0]
    match first["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(place[-1], _keys(place[:-1]), 1)
            reason = "unknown key" + (f"; did you mean {near[0]!r}?" if near else ".")
        case "missing":
            reason = "is missing."
        case "value_error":
            wrong = first["ctx"]["error"]
            place, reason = (*place, *getattr(wrong, "place", ())), f"{wrong}."
        case _:
            given = f" (got {first['input']!r})" if isinstance(first["input"], str | int | float) else ""
            reason = first["msg"].removeprefix("Input ") + given + "."
    more = len(set(places)) - 1
    return place, reason + (f" ({more} more problem{'s' * (more > 1)}.)" if more else "")


def _place(location: tuple[int | str, ...], values: Any) -> Place:
    """The part of a Pydantic location that lies in the file; names of a union's types follow it."""
    place: Place = ()
    for part in location:
        if not isinstance(values, dict | list):
            break
        place = (*place, str(part))
        entries = values if isinstance(values, dict) else dict(enumerate(values))
        values = entries.get(part)
    return place


def _keys(place: Place) -> list[str]:
    """The keys that the schema knows at a place of the file."""
    model: type[BaseModel] = Chip
    for part in place:
        if part.isdigit():
            continue
        annotation = model.model_fields[part].annotation
        inner = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        model = next(kind for kind in inner if issubclass(kind, BaseModel))
    return list(model.model_fields)
