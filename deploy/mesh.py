"""Packets on a chip's mesh, event by event in integer ticks: the `cycle` model of `docs/chip-timing.md`.

One chip step at a time: steps share nothing, as the barrier empties every buffer between them. Work follows events (a
packet put, granted or taken), not ticks: a heap holds the next tick at which each unit and each router may act.
"""

from dataclasses import dataclass, fields
from typing import Any

import numba
import numpy as np

EAST, WEST, SOUTH, NORTH = range(4)
"""Directions of travel: numbers of a router's first inputs and outputs. Ports of the tile's cores follow, from 4 on."""

NEVER = np.iinfo(np.int64).max

jit = numba.njit(nogil=True, cache=True)


@dataclass(frozen=True, eq=False)
class Fabric:
    """What the packets of a mapped network move on.

    columns, rows: tiles of the whole mesh, chips side by side. tile, port: of each used core, its tile (y * columns +
    x) and its place in the tile (0..ports - 1), int64 (cores,). host_tile: where inputs enter. hop_ew, hop_ns,
    within_tile, link: ticks, at least one each. link_packets, send_packets, queue_packets: room of the buffers, at
    least one packet.
    """

    columns: int
    rows: int
    ports: int
    tile: np.ndarray
    port: np.ndarray
    host_tile: int
    hop_ew: int
    hop_ns: int
    within_tile: int
    link: int
    link_packets: int
    send_packets: int
    queue_packets: int

    @property
    def cores(self) -> int:
        """Used cores; the host counts as the unit behind them."""
        return len(self.tile)

    @property
    def outputs(self) -> int:
        """Inputs of a router, and its outputs (the last one, the host's, leads nowhere)."""
        return 5 + self.ports

    def numbers(self) -> np.ndarray:
        """The whole numbers in the order of the fields, int64, as the kernels read them."""
        values = [getattr(self, entry.name) for entry in fields(self)]
        return np.array([value for value in values if not isinstance(value, np.ndarray)], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class StepLoad:
    """What the units have to do in one chip step. int64 arrays.

    Unit s (the cores, then the host) sends packets first[s] .. first[s + 1] - 1 in this order. gap: ticks of work
    between the put of the packet before (or tick 0) and the tick from which this packet may be put. out: the part of
    the gap that is `spike` and `axon_out`. target: core. lookup, service: ticks that the packet takes in the target's
    synapse unit, the part of `axon_in` and all. tail: of each unit, (cores + 1,): ticks of work after its last put;
    out_tail: the part of it that is `spike` (of neurons that fire and reach no core).
    """

    first: np.ndarray
    gap: np.ndarray
    out: np.ndarray
    target: np.ndarray
    lookup: np.ndarray
    service: np.ndarray
    tail: np.ndarray
    out_tail: np.ndarray


@dataclass(frozen=True, eq=False)
class StepEvents:
    """Tick of every event of one chip step. int64 arrays.

    put, arrived, taken: of each packet, into the send buffer, into the target's input queue, by its synapse unit.
    grants: (moves, 4): packet, tile, output, tick, sorted by these. ended: of each unit, (cores + 1,), the tick at
    which its neuron unit was done. synapses_ended: (cores,), -1 where no packet came. end: the last of all ticks.
    """

    put: np.ndarray
    arrived: np.ndarray
    taken: np.ndarray
    grants: np.ndarray
    ended: np.ndarray
    synapses_ended: np.ndarray
    end: int


CAUSES = ("input", "messages in", "synapses", "neurons", "spikes out", "network")
"""What the time of a step's work goes to; its order is that of the kernel's figures."""


def run_step(fabric: Fabric, load: StepLoad) -> StepEvents:
    """Every event of one chip step."""
    cores, packets = fabric.cores, len(load.gap)
    put, arrived, taken = (np.full(packets, -1, dtype=np.int64) for _ in range(3))
    hops = fabric.columns + fabric.rows
    grants = np.zeros((packets * hops, 4), dtype=np.int64)
    moved = np.zeros(fabric.columns * fabric.rows * fabric.outputs, dtype=np.int64)
    ended, times = np.zeros(cores + 1, dtype=np.int64), np.zeros((3, cores), dtype=np.int64)
    figures = np.zeros(2 + len(CAUSES), dtype=np.int64)
    work = tuple(getattr(load, entry.name) for entry in fields(load))
    n = simulate(fabric.numbers(), fabric.tile, fabric.port, work, (put, arrived, taken), grants, moved, ended, times,
                 figures)  # fmt: skip
    rows = grants[:n]
    rows = rows[np.lexsort(rows.T[::-1])]
    return StepEvents(put, arrived, taken, rows, ended, times[SYNAPSES_ENDED], int(figures[0]))


STALLED, SYNAPSES_BEGAN, SYNAPSES_ENDED = range(3)
"""Rows of `times`: ticks a neuron unit stalled; first take and last end (-1: no packet) of a synapse unit."""

# The state of one chip step is one int64 array `m`, so that the functions below pass one thing and stay cheap. It
# begins with a header: the numbers of the fabric, then where each table begins; the tables follow.
COLUMNS, ROWS, PORTS, HOST_TILE, HOP_EW, HOP_NS, WITHIN_TILE, LINK, LINK_PACKETS, SEND_PACKETS, QUEUE_PACKETS = range(
    11
)
CORES, WAYS, OUTPUTS, HEAP_SIZE, MOVES, MOST_MOVES = range(11, 17)
BUFFER, OUTPUT, PACKET, UNIT, WAITING, WAKE, PLACE, HEAP, TILE, PORT, GRANT = range(17, 28)
HEADER = 28

# Buffers are the inputs of each router, then the input queue of each core. Packets in one are chained by BEHIND.
HEAD, LAST, HELD, LEFT, LEFT_AT, WANTED, HEAD_AT, HEAD_WAY = range(8)
"""Of a buffer: first and last packet; packets in it or on their way; how many left at tick LEFT_AT; whether an output
waits for room; the tick from which the first packet may leave, and the output it wants (routers only)."""

FREE_AT, GRANTED, MOVED, BEST, BEST_TURN = range(5)
"""Of an output: the tick from which it is free; the input granted last; packets so far; the choice of the moment."""

BEHIND, HERE_AT, TARGET, SENDER, PUT_AT, OUT_BEFORE, STALL_BEFORE, ARRIVED, TAKEN, GAP, OUT, LOOKUP, SERVICE = range(13)
"""Of a packet: the one behind it; when it came or comes to its buffer; cores; events; what its sender had spent by its
put; its load."""

FOLLOWING, BEYOND, READY, BLOCKED, PUT_LAST, SENT_OUT, SENT_STALL, BUSY_UNTIL, OPENER, LOOKED_UP = range(10)
"""Of a unit: the next packet, the end of its packets, and the tick from which the next may be put; whether it waits for
room; its last put; ticks of `spike` and `axon_out`, and of stalls. Of the core's synapse unit: end of the packet in
work (-1: none yet), first packet of the busy stretch, ticks of `axon_in` in it."""

BUFFER_ROW, OUTPUT_ROW, PACKET_ROW, UNIT_ROW = 8, 5, 16, 10


@jit
def _memory(numbers: np.ndarray, tile: np.ndarray, port: np.ndarray, work: Any, most_moves: int) -> np.ndarray:
    """The state at tick 0. Actors are the neuron units, the synapse units and the routers, in the order in which they
    act within a tick."""
    first, gap, out, target, lookup, service, _, _ = work
    cores, tiles, ways, packets = len(tile), numbers[COLUMNS] * numbers[ROWS], 5 + numbers[PORTS], len(gap)
    outputs, actors = tiles * ways, 2 * cores + 1 + tiles
    sizes = np.array(
        [
            (outputs + cores) * BUFFER_ROW,
            outputs * OUTPUT_ROW,
            packets * PACKET_ROW,
            (cores + 1) * UNIT_ROW,
            tiles,
            actors,
            actors,
            actors,
            cores,
            cores,
            4 * most_moves,
        ]
    )
    m = np.empty(HEADER + sizes.sum(), np.int64)
    m[: len(numbers)] = numbers
    m[CORES], m[WAYS], m[OUTPUTS], m[HEAP_SIZE], m[MOVES], m[MOST_MOVES] = cores, ways, outputs, 0, 0, most_moves
    begin = HEADER
    for table in range(len(sizes)):
        m[BUFFER + table] = begin
        begin += sizes[table]
    m[m[TILE] : m[TILE] + cores] = tile
    m[m[PORT] : m[PORT] + cores] = port
    m[m[BUFFER] : m[PACKET]] = 0
    m[m[UNIT] : m[WAKE]] = 0
    m[m[WAKE] : m[PLACE]] = NEVER
    m[m[PLACE] : m[HEAP]] = -1
    for place in range(outputs + cores):
        m[m[BUFFER] + place * BUFFER_ROW + HEAD] = m[m[BUFFER] + place * BUFFER_ROW + LEFT_AT] = -1
    for output in range(outputs):
        m[m[OUTPUT] + output * OUTPUT_ROW + GRANTED] = ways - 1
    for packet in range(packets):
        row = m[PACKET] + packet * PACKET_ROW
        m[row + TARGET], m[row + GAP], m[row + OUT] = target[packet], gap[packet], out[packet]
        m[row + LOOKUP], m[row + SERVICE] = lookup[packet], service[packet]
    for unit in range(cores + 1):
        row = m[UNIT] + unit * UNIT_ROW
        m[row + FOLLOWING], m[row + BEYOND], m[row + BUSY_UNTIL] = first[unit], first[unit + 1], -1
        if first[unit] < first[unit + 1]:
            m[row + READY] = gap[first[unit]]
            _wake(m, unit, m[row + READY])
    return m


@jit
def _wake(m: np.ndarray, actor: int, tick: int) -> None:
    """Let an actor act at a tick at the latest. The heap holds each waking actor once, by tick and then by number."""
    if tick >= m[m[WAKE] + actor]:
        return
    m[m[WAKE] + actor] = tick
    heap, place = m[HEAP], m[PLACE]
    at = m[place + actor]
    if at < 0:
        at = m[HEAP_SIZE]
        m[HEAP_SIZE] += 1
    while at > 0:
        parent = (at - 1) >> 1
        other = m[heap + parent]
        before = m[m[WAKE] + other]
        if before < tick or (before == tick and other < actor):
            break
        m[heap + at] = other
        m[place + other] = at
        at = parent
    m[heap + at] = actor
    m[place + actor] = at


@jit
def _next_actor(m: np.ndarray) -> int:
    """Take the actor that acts next off the heap."""
    heap, place, wake = m[HEAP], m[PLACE], m[WAKE]
    top = m[heap]
    m[place + top] = -1
    m[HEAP_SIZE] -= 1
    size = m[HEAP_SIZE]
    if size == 0:
        return top  # type: ignore[no-any-return]
    actor = m[heap + size]
    tick, at = m[wake + actor], 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        one = m[heap + child]
        if child + 1 < size:
            two = m[heap + child + 1]
            if m[wake + two] < m[wake + one] or (m[wake + two] == m[wake + one] and two < one):
                child, one = child + 1, two
        if m[wake + one] > tick or (m[wake + one] == tick and one > actor):
            break
        m[heap + at] = one
        m[place + one] = at
        at = child
    m[heap + at] = actor
    m[place + actor] = at
    return top  # type: ignore[no-any-return]


@jit
def _has_room(m: np.ndarray, box: int, room: int, tick: int) -> bool:
    """Whether a buffer takes one more packet; places freed at this very tick do not count."""
    return m[box + HELD] + (m[box + LEFT] if m[box + LEFT_AT] == tick else 0) < room  # type: ignore[no-any-return]


@jit
def _arrive(m: np.ndarray, box: int, packet: int, tick: int) -> bool:
    """Append a packet that comes to a buffer at a tick; True where it is the first one."""
    row = m[PACKET] + packet * PACKET_ROW
    m[row + BEHIND], m[row + HERE_AT] = -1, tick
    m[box + HELD] += 1
    alone = m[box + HEAD] < 0
    if alone:
        m[box + HEAD] = packet
    else:
        m[m[PACKET] + m[box + LAST] * PACKET_ROW + BEHIND] = packet
    m[box + LAST] = packet
    return alone  # type: ignore[no-any-return]


@jit
def _leave(m: np.ndarray, box: int, tick: int) -> None:
    """Take the first packet out of a buffer."""
    m[box + HEAD] = m[m[PACKET] + m[box + HEAD] * PACKET_ROW + BEHIND]
    m[box + HELD] -= 1
    m[box + LEFT] = m[box + LEFT] + 1 if m[box + LEFT_AT] == tick else 1
    m[box + LEFT_AT] = tick


@jit
def _step_up(m: np.ndarray, home: int, way: int, tick: int) -> None:
    """Make a packet the first one of a router's input: from when it may leave and by which output."""
    box = m[BUFFER] + (home * m[WAYS] + way) * BUFFER_ROW
    row = m[PACKET] + m[box + HEAD] * PACKET_ROW
    m[box + HEAD_AT] = max(tick, m[row + HERE_AT])
    m[box + HEAD_WAY] = _way_out(m, home, m[row + TARGET])
    m[m[WAITING] + home] |= 1 << way


@jit
def _way_out(m: np.ndarray, home: int, core: int) -> int:
    """Output towards a core: along x first, then along y."""
    there, columns = m[m[TILE] + core], m[COLUMNS]
    if there == home:
        return 4 + m[m[PORT] + core]  # type: ignore[no-any-return]
    x, to_x = home % columns, there % columns
    if to_x != x:
        return EAST if to_x > x else WEST
    return SOUTH if there > home else NORTH


@jit
def _towards(direction: int, columns: int) -> int:
    """Step in tile numbers of a direction of travel."""
    if direction == EAST:
        return 1
    if direction == WEST:
        return -1
    return columns if direction == SOUTH else -columns


@jit
def _put_packets(m: np.ndarray, unit: int, tick: int) -> None:
    """A neuron unit, or the host, puts what it can."""
    home, way = m[HOST_TILE], 4 + m[PORTS]
    if unit < m[CORES]:
        home, way = m[m[TILE] + unit], 4 + m[m[PORT] + unit]
    own, box = m[UNIT] + unit * UNIT_ROW, m[BUFFER] + (home * m[WAYS] + way) * BUFFER_ROW
    m[own + BLOCKED] = 0
    while m[own + FOLLOWING] < m[own + BEYOND]:
        if m[own + READY] > tick:
            _wake(m, unit, m[own + READY])
            return
        if not _has_room(m, box, m[SEND_PACKETS], tick):
            if m[box + HELD] < m[SEND_PACKETS]:  # the place was freed at this tick and is there at the next
                _wake(m, unit, tick + 1)
            else:
                m[own + BLOCKED] = 1  # until the router's next grant
            return
        packet = m[own + FOLLOWING]
        row = m[PACKET] + packet * PACKET_ROW
        m[own + SENT_OUT] += m[row + OUT]
        m[own + SENT_STALL] += tick - m[own + READY]
        m[own + PUT_LAST] = tick
        m[row + SENDER], m[row + PUT_AT] = unit, tick
        m[row + OUT_BEFORE], m[row + STALL_BEFORE] = m[own + SENT_OUT], m[own + SENT_STALL]
        if _arrive(m, box, packet, tick):
            _step_up(m, home, way, tick)
            _wake(m, 2 * m[CORES] + 1 + home, tick)
        m[own + FOLLOWING] += 1
        if m[own + FOLLOWING] < m[own + BEYOND]:
            m[own + READY] = tick + m[row + PACKET_ROW + GAP]


@jit
def _take_packets(m: np.ndarray, core: int, tick: int, times: np.ndarray) -> None:
    """A synapse unit takes the next packet of its queue, or several that need no time."""
    own, box = m[UNIT] + core * UNIT_ROW, m[BUFFER] + (m[OUTPUTS] + core) * BUFFER_ROW
    while m[box + HEAD] >= 0:
        packet = m[box + HEAD]
        row = m[PACKET] + packet * PACKET_ROW
        soonest = max(m[own + BUSY_UNTIL], m[row + HERE_AT])
        if soonest > tick:
            _wake(m, m[CORES] + 1 + core, soonest)
            return
        m[row + TAKEN] = tick
        if m[own + BUSY_UNTIL] != tick:
            m[own + OPENER], m[own + LOOKED_UP] = packet, 0
        if times[SYNAPSES_ENDED, core] < 0:
            times[SYNAPSES_BEGAN, core] = tick
        m[own + LOOKED_UP] += m[row + LOOKUP]
        m[own + BUSY_UNTIL] = tick + m[row + SERVICE]
        times[SYNAPSES_ENDED, core] = m[own + BUSY_UNTIL]
        _leave(m, box, tick)
        if m[box + WANTED]:
            m[box + WANTED] = 0
            _wake(m, 2 * m[CORES] + 1 + m[m[TILE] + core], tick + 1)


@jit
def _route(m: np.ndarray, home: int, tick: int) -> None:
    """A router grants what it can: first every free output chooses an input in turn, then those with room behind them
    let its packet through."""
    ways, routers = m[WAYS], 2 * m[CORES] + 1
    buffers, outputs = m[BUFFER] + home * ways * BUFFER_ROW, m[OUTPUT] + home * ways * OUTPUT_ROW
    inputs, way = m[m[WAITING] + home], 0
    chosen, contested, again = 0, 0, NEVER
    while inputs:
        if inputs & 1:
            box = buffers + way * BUFFER_ROW
            leads = m[box + HEAD_WAY]
            output = outputs + leads * OUTPUT_ROW
            if m[box + HEAD_AT] > tick:
                again = min(again, m[box + HEAD_AT])
            elif m[output + FREE_AT] > tick:
                again = min(again, m[output + FREE_AT])
            else:
                turn = way - m[output + GRANTED] - 1
                turn += ways if turn < 0 else 0
                if chosen >> leads & 1:
                    contested |= 1 << leads
                if not chosen >> leads & 1 or turn < m[output + BEST_TURN]:
                    chosen |= 1 << leads
                    m[output + BEST], m[output + BEST_TURN] = way, turn
        inputs >>= 1
        way += 1
    leads = -1
    while chosen:
        leads += 1
        mine = chosen & 1
        chosen >>= 1
        if not mine:
            continue
        output = outputs + leads * OUTPUT_ROW
        way = m[output + BEST]
        source = buffers + way * BUFFER_ROW
        packet = m[source + HEAD]
        row = m[PACKET] + packet * PACKET_ROW
        if leads >= 4:
            neighbour, latency, room = -1, m[WITHIN_TILE], m[QUEUE_PACKETS]
            beyond = m[BUFFER] + (m[OUTPUTS] + m[row + TARGET]) * BUFFER_ROW
        else:
            neighbour, latency = home + _towards(leads, m[COLUMNS]), m[HOP_EW] if leads <= WEST else m[HOP_NS]
            room, beyond = m[LINK_PACKETS], m[BUFFER] + (neighbour * ways + leads) * BUFFER_ROW
        if not _has_room(m, beyond, room, tick):
            if m[beyond + HELD] < room:
                again = min(again, tick + 1)
            else:
                m[beyond + WANTED] = 1
            continue
        m[output + GRANTED], m[output + FREE_AT] = way, tick + m[LINK]
        m[output + MOVED] += 1
        if contested >> leads & 1:
            again = min(again, m[output + FREE_AT])
        if m[MOVES] < m[MOST_MOVES]:
            grant = m[GRANT] + 4 * m[MOVES]
            m[grant], m[grant + 1], m[grant + 2], m[grant + 3] = packet, home, leads, tick
            m[MOVES] += 1
        _leave(m, source, tick)
        if m[source + HEAD] < 0:
            m[m[WAITING] + home] &= ~(1 << way)
        else:
            _step_up(m, home, way, tick + 1)
            again = min(again, m[source + HEAD_AT])
        if way >= 4:
            if m[m[UNIT] + m[row + SENDER] * UNIT_ROW + BLOCKED]:
                _wake(m, m[row + SENDER], tick + 1)
        elif m[source + WANTED]:
            m[source + WANTED] = 0
            _wake(m, routers + home - _towards(way, m[COLUMNS]), tick + 1)
        alone = _arrive(m, beyond, packet, tick + latency)
        if leads >= 4:
            core = m[row + TARGET]
            m[row + ARRIVED] = tick + latency
            if alone:
                _wake(m, m[CORES] + 1 + core, max(tick + latency, m[m[UNIT] + core * UNIT_ROW + BUSY_UNTIL]))
        elif alone:
            _step_up(m, neighbour, leads, tick)
            _wake(m, routers + neighbour, tick + latency)
    if again != NEVER:
        _wake(m, routers + home, again)


@jit
def simulate(
    numbers: np.ndarray,
    tile: np.ndarray,
    port: np.ndarray,
    work: Any,
    ticks: Any,
    grants: np.ndarray,
    moved: np.ndarray,
    ended: np.ndarray,
    times: np.ndarray,
    figures: np.ndarray,
) -> int:
    """One chip step. Returns the moves written to `grants`, as many as it has room for.

    numbers: `Fabric.numbers`. work: the arrays of `StepLoad`. ticks: put, arrived, taken of `StepEvents`, each empty
    where it is not asked for. moved: adds up the packets that each (tile, output) let through. times: (3, cores).
    figures: end, critical core (-1: nothing to do), then the ticks of each of CAUSES, which add up to the end.
    """
    m = _memory(numbers, tile, port, work, len(grants))
    times[:] = 0
    times[SYNAPSES_ENDED] = -1
    units = m[CORES] + 1
    while m[HEAP_SIZE]:
        actor = _next_actor(m)
        tick = m[m[WAKE] + actor]
        m[m[WAKE] + actor] = NEVER
        if actor < units:
            _put_packets(m, actor, tick)
        elif actor < units + m[CORES]:
            _take_packets(m, actor - units, tick, times)
        else:
            _route(m, actor - units - m[CORES], tick)

    for kind, column in enumerate((PUT_AT, ARRIVED, TAKEN)):
        for packet in range(len(ticks[kind])):
            ticks[kind][packet] = m[m[PACKET] + packet * PACKET_ROW + column]
    for output in range(m[OUTPUTS]):
        moved[output] += m[m[OUTPUT] + output * OUTPUT_ROW + MOVED]
    for move in range(m[MOVES]):
        for column in range(4):
            grants[move, column] = m[m[GRANT] + 4 * move + column]
    _explain(m, work, ended, times, figures)
    return m[MOVES]  # type: ignore[no-any-return]


@jit
def _explain(m: np.ndarray, work: Any, ended: np.ndarray, times: np.ndarray, figures: np.ndarray) -> None:
    """Find the unit that ended last and walk back from it: give its time to CAUSES."""
    _, _, _, _, _, _, tail, out_tail = work
    cores = m[CORES]
    end, critical, at_synapses = 0, -1, False
    for unit in range(cores + 1):
        own = m[UNIT] + unit * UNIT_ROW
        ended[unit] = m[own + PUT_LAST] + tail[unit]
        m[own + SENT_OUT] += out_tail[unit]
        if unit < cores:
            times[STALLED, unit] = m[own + SENT_STALL]
            if times[SYNAPSES_ENDED, unit] > end:
                end, critical, at_synapses = times[SYNAPSES_ENDED, unit], unit, True
        if ended[unit] > end:
            end, critical, at_synapses = ended[unit], unit, False
    figures[:] = 0
    figures[0], figures[1] = end, critical
    if critical < 0:
        return
    own = m[UNIT] + critical * UNIT_ROW
    unit, spent, spikes_out, stall = critical, end, m[own + SENT_OUT], m[own + SENT_STALL]
    if at_synapses:
        row = m[PACKET] + m[own + OPENER] * PACKET_ROW
        figures[3], figures[4] = m[own + LOOKED_UP], end - m[row + TAKEN] - m[own + LOOKED_UP]
        figures[7] = m[row + TAKEN] - m[row + PUT_AT]
        unit, spent = m[row + SENDER], m[row + PUT_AT]
        spikes_out, stall = m[row + OUT_BEFORE], m[row + STALL_BEFORE]
    if unit == cores:
        figures[2] = spent
    else:
        figures[5], figures[6] = spent - spikes_out - stall, spikes_out
        figures[7] += stall
