"""The mesh of `docs/chip-timing.md` stepped by a clock: at every tick all units act, then all routers.

Slow and plain: no queue of events, no skipped tick. It shares only the dataclasses with `spikeport.deploy.mesh`.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from spikeport.deploy.mesh import Fabric, StepEvents, StepLoad

EAST, WEST, SOUTH, NORTH = range(4)
PORTS = 4
"""Number of a router's first input from a core and of its first output to one."""
STEP_OF = {EAST: (1, 0), WEST: (-1, 0), SOUTH: (0, 1), NORTH: (0, -1)}
"""How far a packet gets through each of the outputs to neighbours: x, y."""

STALL, FULL_LINK, FULL_QUEUE, CONTENTION = "stalled unit", "full link buffer", "full queue", "contended output"
"""What a packet can wait for, besides an output that is still taken: see `Record.waits`."""


def run_step_by_clock(fabric: Fabric, load: StepLoad) -> StepEvents:
    """One chip step, tick by tick."""
    return record_step(fabric, load).events(fabric, load)


def record_step(fabric: Fabric, load: StepLoad) -> "Record":
    """One chip step, tick by tick, with what its packets had to wait for."""
    record = Record()
    mesh = Mesh(fabric, load, record)
    tick = 0
    while len(record.taken) < len(load.target):
        for unit in mesh.neuron_units:
            unit.act(tick)
        for synapses in mesh.synapse_units:
            synapses.act(tick)
        # All routers choose before any moves a packet: none sees what another does at this tick.
        grants = [grant for router in mesh.routers for grant in router.choose(tick)]
        for grant in grants:
            grant.move(tick, record)
        for buffer in mesh.buffers:
            buffer.end_tick()
        tick += 1
    return record


@dataclass
class Record:
    """What happened at which tick.

    waits: number of ticks at which a neuron unit stalled, a free output had only a full buffer behind it, or several
    inputs wanted one output that could be granted.
    """

    put: dict[int, int] = field(default_factory=dict)
    arrived: dict[int, int] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)
    grants: list[tuple[int, int, int, int]] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)

    def events(self, fabric: Fabric, load: StepLoad) -> StepEvents:
        packets = range(len(load.target))
        ended = []
        for unit in range(fabric.cores + 1):
            start, stop = load.first[unit], load.first[unit + 1]
            last_put = self.put[stop - 1] if stop > start else 0
            ended.append(last_put + load.tail[unit])
        synapses_ended = [-1] * fabric.cores
        for packet in packets:
            core = load.target[packet]
            synapses_ended[core] = max(synapses_ended[core], self.taken[packet] + load.service[packet])
        return StepEvents(
            put=_int64([self.put[packet] for packet in packets]),
            arrived=_int64([self.arrived[packet] for packet in packets]),
            taken=_int64([self.taken[packet] for packet in packets]),
            grants=_int64(sorted(self.grants)).reshape(-1, 4),
            ended=_int64(ended),
            synapses_ended=_int64(synapses_ended),
            end=int(max(ended + synapses_ended)),
        )


@dataclass
class Buffer:
    """First in, first out. `packets` holds each packet with its tick of arrival, those on their way too.

    The place of a packet that left at this tick is not room before the next one.
    """

    size: int
    packets: deque[tuple[int, int]] = field(default_factory=deque)
    left_at_this_tick: int = 0

    def has_room(self) -> bool:
        return len(self.packets) + self.left_at_this_tick < self.size

    def add(self, packet: int, arrives: int) -> None:
        assert self.has_room()
        self.packets.append((packet, arrives))

    def first(self, tick: int) -> int | None:
        """The first packet, if there is one and it has arrived."""
        if not self.packets:
            return None
        packet, arrives = self.packets[0]
        return packet if arrives <= tick else None

    def remove_first(self) -> None:
        self.packets.popleft()
        self.left_at_this_tick += 1

    def end_tick(self) -> None:
        self.left_at_this_tick = 0


class NeuronUnit:
    """Works off the gap before each packet and puts it; the host is one too."""

    def __init__(self, packets: range, load: StepLoad, send: Buffer, record: Record) -> None:
        self.waiting = deque(packets)
        self.gap = load.gap
        self.send = send
        self.record = record
        self.last_put = 0

    def act(self, tick: int) -> None:
        while self.waiting and tick >= self.last_put + self.gap[self.waiting[0]]:
            if not self.send.has_room():
                self.record.waits[STALL] += 1
                return
            packet = self.waiting.popleft()
            self.send.add(packet, arrives=tick)
            self.record.put[packet] = self.last_put = tick


class SynapseUnit:
    """Takes packets from its core's input queue, one after another."""

    def __init__(self, load: StepLoad, queue: Buffer, record: Record) -> None:
        self.service = load.service
        self.queue = queue
        self.record = record
        self.free_at = 0

    def act(self, tick: int) -> None:
        while tick >= self.free_at and (packet := self.queue.first(tick)) is not None:
            self.queue.remove_first()
            self.record.taken[packet] = tick
            self.free_at = tick + int(self.service[packet])


@dataclass
class Output:
    """A router's output, with the buffer behind it."""

    number: int
    behind: Buffer
    latency: int
    free_at: int = 0
    search_from: int = 0


@dataclass
class Grant:
    """A router's decision to let the first packet of an input out through an output."""

    router: "Router"
    packet: int
    input: int
    output: Output

    def move(self, tick: int, record: Record) -> None:
        arrives = tick + self.output.latency
        self.router.inputs[self.input].remove_first()
        self.output.behind.add(self.packet, arrives)
        self.output.free_at = tick + self.router.fabric.link
        self.output.search_from = (self.input + 1) % len(self.router.inputs)
        record.grants.append((self.packet, self.router.tile, self.output.number, tick))
        if self.output.number >= PORTS:
            record.arrived[self.packet] = arrives


class Router:
    """A tile's router. inputs: by number. outputs: by number, None where there is no neighbour or no used core."""

    def __init__(self, tile: int, fabric: Fabric, load: StepLoad, inputs: list[Buffer], record: Record) -> None:
        self.tile = tile
        self.y, self.x = divmod(tile, fabric.columns)
        self.inputs = inputs
        self.outputs: list[Output | None] = [None] * (PORTS + fabric.ports)
        self.record = record
        self.fabric = fabric
        self.target = load.target

    def wanted_output(self, packet: int) -> Output:
        """x first, then y, then the core."""
        core = self.target[packet]
        y, x = divmod(int(self.fabric.tile[core]), self.fabric.columns)
        if x != self.x:
            number = EAST if x > self.x else WEST
        elif y != self.y:
            number = SOUTH if y > self.y else NORTH
        else:
            number = PORTS + int(self.fabric.port[core])
        output = self.outputs[number]
        assert output is not None
        return output

    def choose(self, tick: int) -> list[Grant]:
        """The grants of this tick, from the state after the units acted; nothing moves yet."""
        wanting: dict[int, dict[int, int]] = {}
        for number, buffer in enumerate(self.inputs):
            packet = buffer.first(tick)
            if packet is not None:
                wanting.setdefault(self.wanted_output(packet).number, {})[number] = packet
        grants = []
        for output_number, packets in wanting.items():
            output = self.outputs[output_number]
            assert output is not None
            if tick < output.free_at:
                continue
            if not output.behind.has_room():
                self.record.waits[FULL_QUEUE if output_number >= PORTS else FULL_LINK] += 1
                continue
            if len(packets) > 1:
                self.record.waits[CONTENTION] += 1
            in_turn = [*range(output.search_from, len(self.inputs)), *range(output.search_from)]
            chosen = next(number for number in in_turn if number in packets)
            grants.append(Grant(self, packets[chosen], chosen, output))
        return grants


class Mesh:
    """All units, routers and buffers of a fabric, wired."""

    def __init__(self, fabric: Fabric, load: StepLoad, record: Record) -> None:
        tiles = range(fabric.columns * fabric.rows)
        links = [[Buffer(fabric.link_packets) for _ in STEP_OF] for _ in tiles]
        sends = [[Buffer(fabric.send_packets) for _ in range(fabric.ports)] for _ in tiles]
        host_send = Buffer(fabric.send_packets)
        queues = [Buffer(fabric.queue_packets) for _ in range(fabric.cores)]

        self.routers = []
        for tile in tiles:
            inputs = links[tile] + sends[tile] + ([host_send] if tile == fabric.host_tile else [])
            router = Router(tile, fabric, load, inputs, record)
            for number, (dx, dy) in STEP_OF.items():
                x, y = router.x + dx, router.y + dy
                if 0 <= x < fabric.columns and 0 <= y < fabric.rows:
                    hop = fabric.hop_ew if number in (EAST, WEST) else fabric.hop_ns
                    router.outputs[number] = Output(number, links[y * fabric.columns + x][number], hop)
            self.routers.append(router)
        for core, queue in enumerate(queues):
            number = PORTS + int(fabric.port[core])
            self.routers[fabric.tile[core]].outputs[number] = Output(number, queue, fabric.within_tile)

        core_sends = [sends[tile][port] for tile, port in zip(fabric.tile, fabric.port, strict=True)]
        self.neuron_units = [
            NeuronUnit(range(load.first[unit], load.first[unit + 1]), load, send, record)
            for unit, send in enumerate([*core_sends, host_send])
        ]
        self.synapse_units = [SynapseUnit(load, queue, record) for queue in queues]
        self.buffers = [buffer for row in links + sends for buffer in row] + [host_send, *queues]


def _int64(values: Sequence[object]) -> np.ndarray:
    return np.array(values, dtype=np.int64)
