"""Packets on the mesh: cases worked by hand, and the event-driven simulator against one stepped by a clock."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
from clock_stepped import CONTENTION, FULL_LINK, FULL_QUEUE, STALL, record_step, run_step_by_clock
from hypothesis import given, settings
from mesh_strategies import random_step, steps

from spikeport.deploy.mesh import Fabric, StepEvents, StepLoad, run_step

Run = Callable[[Fabric, StepLoad], StepEvents]
EAST, WEST, SOUTH, NORTH, PORT_0, PORT_1, PORT_2 = range(7)
STEPS_OF_DIRECTION = {EAST: (1, 0), WEST: (-1, 0), SOUTH: (0, 1), NORTH: (0, -1)}

both = pytest.mark.parametrize("run", [run_step, run_step_by_clock], ids=["events", "clock"])


@both
def test_a_packet_goes_east_then_south_then_to_its_core(run: Run) -> None:
    fabric = _fabric(columns=3, rows=2, cores=[(0, 0), (5, 0)], hop_ew=3, hop_ns=5, within_tile=2)
    load = _load(fabric, {0: [(4, 1, 6)]}, tail={0: 7})
    # Put at 4, on tile 1 at 4 + 3, on tile 2 at 7 + 3, on tile 5 at 10 + 5, in the queue at 15 + 2.
    _check(
        run(fabric, load),
        put=[4],
        grants=[(0, 0, EAST, 4), (0, 1, EAST, 7), (0, 2, SOUTH, 10), (0, 5, PORT_0, 15)],
        arrived=[17],
        taken=[17],
        ended=[11, 0, 0],
        synapses_ended=[-1, 23],
        end=23,
    )


@both
def test_a_packet_of_the_host_goes_west_then_north(run: Run) -> None:
    fabric = _fabric(columns=3, rows=2, cores=[(0, 1)], ports=2, host_tile=5, hop_ew=3, hop_ns=5, within_tile=2)
    load = _load(fabric, {1: [(0, 0, 6)]})
    # Tiles 5, 4, 3 are the lower row from right to left; tile 0 is above tile 3.
    _check(
        run(fabric, load),
        put=[0],
        grants=[(0, 0, PORT_1, 11), (0, 3, NORTH, 6), (0, 4, WEST, 3), (0, 5, WEST, 0)],
        arrived=[13],
        taken=[13],
        ended=[0, 0],
        synapses_ended=[19],
        end=19,
    )


@both
def test_inputs_of_a_router_take_turns_and_a_link_is_taken_for_its_ticks(run: Run) -> None:
    fabric = _fabric(columns=2, ports=3, cores=[(0, 0), (0, 2), (1, 0)], hop_ew=2, link=3)
    load = _load(fabric, {0: [(0, 2, 0)] * 3, 1: [(0, 2, 0)] * 2, 3: [(0, 2, 0)]})
    # All packets wait from tick 0 on. The link to the east is free at 0, 3, 6, ...; the search begins at input 0 and
    # goes on behind the last one granted: core 0 (packets 0, 1, 2), core 1 (3, 4), host (5), core 0, core 1, core 0.
    # Two ticks later each is on tile 1, where the output to the core keeps the same pace, and one later in the queue.
    east = {0: 0, 3: 3, 5: 6, 1: 9, 4: 12, 2: 15}
    _check(
        run(fabric, load),
        put=[0] * 6,
        grants=sorted(row for packet, t in east.items() for row in [(packet, 0, EAST, t), (packet, 1, PORT_0, t + 2)]),
        arrived=[3, 12, 18, 6, 15, 9],
        taken=[3, 12, 18, 6, 15, 9],
        ended=[0, 0, 0, 0],
        synapses_ended=[-1, -1, 18],
        end=18,
    )


@both
def test_the_turn_of_an_input_passes_though_it_had_the_output_for_itself(run: Run) -> None:
    fabric = _fabric(ports=2, cores=[(0, 0), (0, 1)], link=2)
    load = _load(fabric, {0: [(0, 0, 0)] * 2, 1: [(2, 0, 0)] * 2})
    # At 0 core 0 (packets 0, 1) is alone. At 2 core 1 (packets 2, 3) wants the output too, and is next in turn.
    # At 4 packet 3 has just come (put 2 + 2), and core 0 is next; at 6 it is alone.
    _check(
        run(fabric, load),
        put=[0, 0, 2, 4],
        grants=[(0, 0, PORT_0, 0), (1, 0, PORT_0, 4), (2, 0, PORT_0, 2), (3, 0, PORT_0, 6)],
        arrived=[1, 5, 3, 7],
        taken=[1, 5, 3, 7],
        ended=[0, 4, 0],
        synapses_ended=[7, -1],
        end=7,
    )


@both
def test_a_full_queue_stalls_the_neuron_unit(run: Run) -> None:
    fabric = _fabric(ports=2, cores=[(0, 0), (0, 1)], send_packets=1, queue_packets=1)
    load = _load(fabric, {0: [(0, 1, 10)] * 4 + [(12, 1, 10)]}, tail={0: 5})
    # Packet 0: put and granted at 0, in the queue and taken at 1; its service lasts until 11.
    # Packet 1: room in the send buffer from 1 (packet 0 left at 0): put 1. Room in the queue from 2: granted 2,
    #           arrived 3, taken 11.
    # Packet 2: put 3 (packet 1 left at 2), granted 12 (packet 1 taken at 11), arrived 13, taken 21.
    # Packet 3: stalled from 3 until packet 2 has left at 12: put 13. Granted 22, arrived 23, taken 31.
    # Packet 4: its work lasts until 13 + 12 = 25, when the send buffer, free since 23, has room. Granted 32, arrived
    #           33, taken 41, done 51. The unit's last work ends at 25 + 5.
    _check(
        run(fabric, load),
        put=[0, 1, 3, 13, 25],
        grants=[(packet, 0, PORT_1, tick) for packet, tick in enumerate([0, 2, 12, 22, 32])],
        arrived=[1, 3, 13, 23, 33],
        taken=[1, 11, 21, 31, 41],
        ended=[30, 0, 0],
        synapses_ended=[-1, 51],
        end=51,
    )


@both
def test_packets_without_service_are_taken_at_one_tick(run: Run) -> None:
    fabric = _fabric(cores=[(0, 0)], send_packets=8)
    load = _load(fabric, {0: [(0, 0, 6), (0, 0, 0), (0, 0, 0), (0, 0, 2), (0, 0, 0)]})
    # All are put at 0 and leave one a tick. Packet 0 is served from 1 to 7; 1 and 2 take no time at 7, and 3 starts at
    # 7 too; 4 is taken when it ends at 9.
    _check(
        run(fabric, load),
        put=[0] * 5,
        grants=[(packet, 0, PORT_0, packet) for packet in range(5)],
        arrived=[1, 2, 3, 4, 5],
        taken=[1, 7, 7, 7, 9],
        ended=[0, 0],
        synapses_ended=[9],
        end=9,
    )


@both
def test_a_link_buffer_of_one_packet_is_free_the_tick_after_it_left(run: Run) -> None:
    fabric = _fabric(columns=3, cores=[(0, 0), (2, 0)], hop_ew=2, link_packets=1)
    load = _load(fabric, {0: [(0, 1, 0)] * 3})
    # Packet 0 comes to tile 1 at 2 and leaves at once, so packet 1 may follow at 3: one packet every hop_ew + 1 ticks.
    _check(
        run(fabric, load),
        put=[0, 0, 0],
        grants=[
            row
            for packet, t in enumerate([0, 3, 6])
            for row in [(packet, 0, EAST, t), (packet, 1, EAST, t + 2), (packet, 2, PORT_0, t + 4)]
        ],
        arrived=[5, 8, 11],
        taken=[5, 8, 11],
        ended=[0, 0, 0],
        synapses_ended=[-1, 11],
        end=11,
    )


@both
def test_a_packet_waits_behind_the_first_of_its_buffer_though_its_output_is_free(run: Run) -> None:
    fabric = _fabric(ports=3, cores=[(0, 0), (0, 1), (0, 2)], link=4)
    load = _load(fabric, {0: [(0, 1, 0), (0, 1, 0), (0, 2, 0)]})
    # The output to core 1 is taken from 0 to 4. Packet 1 leaves at 4; only then is packet 2 the first, and leaves at 5.
    _check(
        run(fabric, load),
        put=[0, 0, 0],
        grants=[(0, 0, PORT_1, 0), (1, 0, PORT_1, 4), (2, 0, PORT_2, 5)],
        arrived=[1, 5, 6],
        taken=[1, 5, 6],
        ended=[0, 0, 0, 0],
        synapses_ended=[-1, 5, 6],
        end=6,
    )


@both
def test_a_step_without_packets_ends_with_its_last_neuron_unit(run: Run) -> None:
    fabric = _fabric(columns=2, cores=[(0, 0), (1, 0)])
    _check(
        run(fabric, _load(fabric, {}, tail={1: 9})),
        put=[],
        grants=[],
        arrived=[],
        taken=[],
        ended=[0, 9, 0],
        synapses_ended=[-1, -1],
        end=9,
    )


@pytest.mark.oracle
@settings(max_examples=200)
@given(steps())
def test_events_are_those_of_a_mesh_stepped_by_a_clock(step: tuple[Fabric, StepLoad]) -> None:
    _assert_same(run_step(*step), run_step_by_clock(*step))


def test_random_steps_stall_units_fill_buffers_and_contend() -> None:
    met: Counter[str] = Counter()
    for seed in range(20):
        met.update(record_step(*random_step(seed)).waits.keys())
    assert all(met[wait] >= 5 for wait in (STALL, FULL_LINK, FULL_QUEUE, CONTENTION)), met


@both
def test_the_same_step_gives_the_same_events_and_is_left_as_it_was(run: Run) -> None:
    fabric, load = random_step(5)
    before = {field.name: getattr(load, field.name).copy() for field in fields(load)}
    events = run(fabric, load)
    run(*random_step(6))
    _assert_same(run(fabric, load), events)
    for name, values in before.items():
        np.testing.assert_array_equal(getattr(load, name), values, name)


@both
@given(step=steps())
def test_no_step_ends_before_its_work_without_contention(run: Run, step: tuple[Fabric, StepLoad]) -> None:
    fabric, load = step
    events = run(fabric, load)
    free = replace(load, tail=np.zeros_like(load.tail), out_tail=np.zeros_like(load.out_tail))
    bounds = [0]
    served: defaultdict[int, int] = defaultdict(int)
    for unit in range(fabric.cores + 1):
        ready = 0
        for packet in range(load.first[unit], load.first[unit + 1]):
            ready += int(load.gap[packet])
            core = int(load.target[packet])
            tile = fabric.host_tile if unit == fabric.cores else int(fabric.tile[unit])
            arrived = ready + _distance(fabric, tile, int(fabric.tile[core]))
            assert events.put[packet] >= ready
            assert events.arrived[packet] >= arrived
            assert events.taken[packet] >= events.arrived[packet]
            bounds.append(arrived + int(load.service[packet]))
            served[core] += int(load.service[packet])
        bounds.append(ready + int(load.tail[unit]))
    assert events.end >= max(bounds + list(served.values()))
    assert events.end >= run(fabric, free).end


@both
@given(step=steps())
def test_buffers_keep_their_size_and_order_and_outputs_their_pace(run: Run, step: tuple[Fabric, StepLoad]) -> None:
    fabric, load = step
    events = run(fabric, load)
    ticks_of_output = defaultdict(list)
    for _, tile, output, tick in events.grants.tolist():
        ticks_of_output[tile, output].append(tick)
    for ticks in ticks_of_output.values():
        assert np.all(np.diff(np.sort(ticks)) >= fabric.link)
    for size, stays in _stays(fabric, load, events):
        came, left = np.array(sorted(stays)).T
        assert np.all(np.diff(left) >= 0)
        assert all(np.sum((came <= tick) & (left >= tick)) <= size for tick in came)


def _stays(fabric: Fabric, load: StepLoad, events: StepEvents) -> list[tuple[int, list[tuple[int, int]]]]:
    """Of each buffer its size, and of each of its packets from when on it took a place and when it left."""
    stays = defaultdict(list)
    for unit in range(fabric.cores + 1):
        for packet in range(load.first[unit], load.first[unit + 1]):
            buffer: tuple[str, int, int] = ("send", unit, 0)
            size, came = fabric.send_packets, int(events.put[packet])
            tile = fabric.host_tile if unit == fabric.cores else int(fabric.tile[unit])
            for _, at, output, tick in sorted(
                events.grants[events.grants[:, 0] == packet].tolist(), key=lambda g: g[3]
            ):
                assert at == tile
                stays[buffer, size].append((came, tick))
                came = tick
                if output in STEPS_OF_DIRECTION:
                    x, y = STEPS_OF_DIRECTION[output]
                    tile += x + y * fabric.columns
                    buffer, size = ("link", tile, output), fabric.link_packets
                else:
                    buffer, size = ("queue", tile, output), fabric.queue_packets
            stays[buffer, size].append((came, int(events.taken[packet])))
    return [(size, packets) for (_, size), packets in stays.items()]


def _distance(fabric: Fabric, start: int, stop: int) -> int:
    """Ticks from a send buffer on one tile to an input queue on another."""
    (y_0, x_0), (y_1, x_1) = divmod(start, fabric.columns), divmod(stop, fabric.columns)
    return abs(x_0 - x_1) * fabric.hop_ew + abs(y_0 - y_1) * fabric.hop_ns + fabric.within_tile


def _fabric(cores: list[tuple[int, int]], columns: int = 1, rows: int = 1, ports: int = 1, **values: int) -> Fabric:
    """A fabric with the cores at the given tiles and ports; every latency is one tick, every buffer holds four."""
    ticks = dict.fromkeys(("hop_ew", "hop_ns", "within_tile", "link"), 1)
    sizes = dict.fromkeys(("link_packets", "send_packets", "queue_packets"), 4)
    tile, port = np.array(cores, dtype=np.int64).T
    return Fabric(columns, rows, ports, tile.copy(), port.copy(), **({"host_tile": 0} | ticks | sizes | values))


def _load(
    fabric: Fabric, packets: dict[int, list[tuple[int, int, int]]], tail: dict[int, int] | None = None
) -> StepLoad:
    """packets: of each unit its packets' gap, target and service."""
    units = range(fabric.cores + 1)
    rows = [row for unit in units for row in packets.get(unit, [])]
    gap, target, service = np.array(rows, dtype=np.int64).reshape(-1, 3).T.copy()
    return StepLoad(
        first=np.cumsum([0] + [len(packets.get(unit, [])) for unit in units]),
        gap=gap,
        out=np.zeros_like(gap),
        target=target,
        lookup=np.zeros_like(service),
        service=service,
        tail=np.array([(tail or {}).get(unit, 0) for unit in units], dtype=np.int64),
        out_tail=np.zeros(len(units), dtype=np.int64),
    )


def _check(events: StepEvents, **expected: object) -> None:
    assert expected.keys() == {field.name for field in fields(events)}
    for name, value in expected.items():
        assert np.asarray(getattr(events, name)).tolist() == np.asarray(value).tolist(), name


def _assert_same(events: StepEvents, expected: StepEvents) -> None:
    for field in fields(StepEvents):
        value, other = np.asarray(getattr(events, field.name)), np.asarray(getattr(expected, field.name))
        assert value.dtype == other.dtype == np.int64
        np.testing.assert_array_equal(value, other, field.name)
