"""Packets on a chip's mesh, event by event in integer ticks: the `cycle` model of `docs/chip-timing.md`.

One chip step at a time: steps share nothing, as the barrier empties every buffer between them. Work follows events (a
packet put, a packet granted, a packet taken), not ticks.
"""

from dataclasses import dataclass

import numpy as np

EAST, WEST, SOUTH, NORTH = range(4)
"""Directions of travel: numbers of a router's first inputs and outputs. Ports of the tile's cores follow, from 4 on."""


@dataclass(frozen=True, eq=False)
class Fabric:
    """What the packets of a mapped network move on.

    columns, rows: tiles of the whole mesh, chips side by side. tile, port: of each used core, its tile (y * columns + x)
    and its place in the tile (0..ports - 1), int64 (cores,). host_tile: where inputs enter. hop_ew, hop_ns,
    within_tile, link: ticks, at least one each. link_packets, send_packets, queue_packets: sizes of buffers, at least one.
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


@dataclass(frozen=True, eq=False)
class StepLoad:
    """What the units have to do in one chip step. int64 arrays.

    Unit s (the cores, then the host) sends packets first[s] .. first[s + 1] - 1 in this order. gap: ticks of work between
    the put of the packet before (or tick 0) and the tick from which this packet may be put. out: the part of the gap
    that is `spike` and `axon_out`. target: core. lookup, service: ticks that the packet takes in the target's synapse
    unit, the part of `axon_in` and all. tail: of each unit, (cores + 1,): ticks of work after its last put; out_tail: the
    part of it that is `spike` (of neurons that fire and reach no core).
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
    grants: (moves, 4): packet, tile, output, tick, sorted by these. ended: of each unit, (cores + 1,), the tick at which
    its neuron unit was done. synapses_ended: (cores,), -1 where no packet came. end: the last of all ticks.
    """

    put: np.ndarray
    arrived: np.ndarray
    taken: np.ndarray
    grants: np.ndarray
    ended: np.ndarray
    synapses_ended: np.ndarray
    end: int
