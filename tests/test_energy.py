"""Energy against a network worked through by hand, and its laws."""

from dataclasses import replace

import numpy as np
import pytest
from graph_strategies import graphs, one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_chip import SEEDS, by_hand, placed, random_mapping, random_trace, small_chip, with_ticks

from spikeport.converters.graph import ProcessGraph
from spikeport.deploy.chip import EVENT_TITLES, Chip, load_chip
from spikeport.deploy.energy import arithmetic_reference, chip_use, constants, event_total, price
from spikeport.deploy.mapping import Mapping, map_network
from spikeport.deploy.operation_counts import OperationCounts, Operations, count_operations
from spikeport.deploy.summary import ChipUse, Cost, EnergyShare
from spikeport.deploy.timing import Model, Timing, simulate_timing
from spikeport.deploy.trace import Trace
from spikeport.deploy.workload import Counts, Workload, count, prepare
from spikeport.models.errors import ChipError

__all__ = ["one_thread"]

ALL_CHIPS = pytest.mark.parametrize("name", ["loihi", "loihi-sanafe", "loihi2"])
BOUNDS = ("energy_nj", "low_nj", "high_nj")


def in_one_tile(graph: ProcessGraph, chip: Chip) -> Mapping:
    mapping = map_network(graph, chip)
    return placed(mapping, *[(chip.input.column, chip.input.row)] * len(mapping.cores))


def run(
    chip: Chip,
    mapping: Mapping | None = None,
    model: Model = "simple",
    network: tuple[ProcessGraph, Trace] | None = None,
) -> tuple[Workload, Counts, Timing]:
    """A network, by default that of `by_hand`, counted and timed; on the tile at which inputs enter by default."""
    graph, trace = network or by_hand()
    workload = prepare(graph, mapping or in_one_tile(graph, chip), trace)
    counts = count(workload, 1)
    return workload, counts, simulate_timing(workload, counts, chip, model, 1)


def priced(chip: Chip, mapping: Mapping | None = None, model: Model = "simple") -> Cost:
    workload, counts, timing = run(chip, mapping, model)
    return price(workload, chip, counts, timing)


def by_name(shares: list[EnergyShare]) -> dict[str, float]:
    return {share.name: share.energy_nj for share in shares}


def spread_out(base: Chip) -> tuple[Chip, Mapping]:
    """The network of `by_hand` with one neuron a tile: a at (0, 0) and (1, 0), b at (1, 1) of two by two tiles."""
    limits = base.limits.model_copy(update={"neurons": 1})
    mesh = base.mesh.model_copy(update={"columns": 2, "rows": 2})
    chip = base.model_copy(update={"cores_per_tile": 1, "mesh": mesh, "limits": limits})
    return chip, placed(map_network(by_hand()[0], chip), (0, 0), (1, 0), (1, 1))


def test_energy_worked_through_by_hand_with_the_constants_of_davies() -> None:
    cost = priced(load_chip("loihi"))
    nj = {part.cause: part.energy_nj for part in cost.parts}
    time_us = 0.1e-3 * (1270 + 1298 + 1298 + 1236)
    assert nj == pytest.approx(
        {
            "synaptic operations, dense": 7 * 23.6e-3,
            "neuron steps, inactive": 7 * 52e-3,  # three neurons in four chip steps, filling and draining included
            "neuron steps, active": 5 * 81e-3,
            "packets within a tile": 4 * 1.7e-3,  # three from the corner where inputs enter, one from a to b
            "static power": 104 * time_us,
        }
    )
    assert cost.time_us_per_inference == cost.latency_us == pytest.approx(time_us)
    assert cost.cycles_per_inference == 5102
    assert cost.energy_nj_per_inference == pytest.approx(sum(nj.values()))
    assert sum(cost.step_time_by_cause.values()) == pytest.approx(time_us)
    assert [part.cause for part in cost.parts if not part.dynamic] == ["static power"]
    assert (cost.chip, cost.tick_ns, cost.timing_model, cost.timing_samples) == ("loihi", 0.1, "simple", 1)


def test_energy_worked_through_by_hand_with_the_regression_set() -> None:
    cost = priced(load_chip("loihi-sanafe"))
    assert {part.cause: part.energy_nj for part in cost.parts} == pytest.approx(
        {
            "synaptic operations, dense": 7 * 35.5e-3,
            "neuron accesses": 12 * 51.2e-3,
            "neuron updates": 5 * 21.6e-3,
            "spikes generated": 2 * 69.3e-3,
            "messages sent": 1 * 111e-3,
            "static power": 0,
        }
    )
    assert by_name(cost.by_population) == pytest.approx(
        {"a": (8 * 51.2 + 4 * 21.6 + 69.3) / 1000, "b": (4 * 51.2 + 21.6 + 69.3) / 1000}
    )
    assert by_name(cost.by_projection) == pytest.approx({"in-a": 6 * 35.5e-3, "a-b": 35.5e-3 + 111e-3})
    assert by_name(cost.by_core) == pytest.approx(
        {
            "0:0": (8 * 51.2 + 4 * 21.6 + 69.3 + 111 + 6 * 35.5) / 1000,
            "0:1": (4 * 51.2 + 21.6 + 69.3 + 35.5) / 1000,
        }
    )


def test_hops_along_xy_routes_are_priced_by_direction() -> None:
    chip, mapping = spread_out(load_chip("loihi-sanafe"))
    nj = {part.cause: (part.count_per_inference, part.energy_nj) for part in priced(chip, mapping).parts}
    # inputs enter at (0, 0): three spikes to each neuron of a, at (0, 0) and (1, 0); one from (0, 0) to b at (1, 1)
    assert nj["hops east-west"] == (4, pytest.approx(4 * 3.0e-3))
    assert nj["hops north-south"] == (1, pytest.approx(4.2e-3))
    workload, counts, _ = run(chip, mapping)
    assert [event_total(counts, event) for event in ("within_tile", "hop_ew", "hop_ns")] == [3, 4, 1]
    assert event_total(counts, "axon_in") == sum(row["packets"] for row in counts.by_projection.values()) == 7
    cost = price(workload, chip, counts, run(chip, mapping)[2])
    mesh = sum(part.energy_nj for part in cost.parts if part.cause.startswith("hops"))
    everything = sum(part.energy_nj for part in cost.parts)
    assert sum(by_name(cost.by_core).values()) + mesh == pytest.approx(everything)


@settings(max_examples=25)
@given(graphs(), SEEDS, st.sampled_from(["loihi", "loihi-sanafe", "loihi2"]), st.integers(1, 3))
def test_parts_are_counts_times_costs_and_shares_add_up_to_them(
    graph: ProcessGraph, seed: int, name: str, samples: int
) -> None:
    chip = load_chip(name)
    mapping = random_mapping(graph, small_chip(), seed)
    workload, counts, timing = run(chip, mapping, "simple", (graph, random_trace(graph, samples, seed)))
    cost = price(workload, chip, counts, timing)
    parts = {part.cause: part for part in cost.parts}
    in_mesh = dict.fromkeys(BOUNDS, 0.0)
    for event, title in EVENT_TITLES.items():
        price_pj, n = chip.event(event).energy_pj, event_total(counts, event) / samples
        expected = [n * pj / 1000 for pj in (price_pj.value, price_pj.low, price_pj.high)]
        if not any(expected):
            assert title not in parts
            continue
        part = parts.pop(title)
        assert part.dynamic
        assert part.count_per_inference == n
        assert [getattr(part, bound) for bound in BOUNDS] == pytest.approx(expected)
        if event in ("within_tile", "hop_ew", "hop_ns"):
            in_mesh = {bound: in_mesh[bound] + getattr(part, bound) for bound in BOUNDS}
    assert list(parts) == ["static power"]
    for bound in BOUNDS:
        dynamic = sum(getattr(part, bound) for part in cost.parts if part.dynamic)
        of = {
            field: sum(getattr(share, bound) for share in getattr(cost, field))
            for field in ("by_population", "by_projection", "by_core")
        }
        assert of["by_population"] + of["by_projection"] == pytest.approx(dynamic)
        assert of["by_core"] + in_mesh[bound] == pytest.approx(dynamic)
    assert [share.name for share in cost.by_population] == [population.name for population in graph.populations]
    assert [share.name for share in cost.by_projection] == [projection.name for projection in graph.projections]
    assert [share.name for share in cost.by_core] == [f"{core.chip}:{core.core}" for core in mapping.cores]
    whole = [cost.energy_nj_per_inference, cost.energy_low_nj, cost.energy_high_nj]
    assert whole == pytest.approx([sum(getattr(part, bound) for part in cost.parts) for bound in BOUNDS])
    assert cost.time_us_per_inference == pytest.approx(timing.total_ticks / samples * chip.tick_ns / 1000)
    assert sum(cost.step_time_by_cause.values()) == pytest.approx(cost.time_us_per_inference)


@ALL_CHIPS
def test_the_band_encloses_the_energy(name: str) -> None:
    cost = priced(load_chip(name))
    assert cost.energy_low_nj <= cost.energy_nj_per_inference <= cost.energy_high_nj
    for items in (cost.parts, cost.by_population, cost.by_projection, cost.by_core):
        assert all(item.low_nj <= item.energy_nj <= item.high_nj for item in items)
    assert cost.energy_low_nj < cost.energy_high_nj


def test_static_power_is_paid_by_every_chip_for_the_whole_stream_and_by_no_share() -> None:
    base = load_chip("loihi")
    quantity = base.static_mw.model_copy(update={"value": 100.0, "low": 50.0, "high": 300.0})
    one, mapping = spread_out(base.model_copy(update={"static_mw": quantity}))
    for place, chips in ((mapping, 1), (placed(mapping, (0, 0), (1, 0), (5, 1)), 3)):
        cost = priced(one, place)
        static = cost.parts[-1]
        time_us = cost.time_us_per_inference
        assert (static.cause, static.dynamic, static.count_per_inference) == ("static power", False, chips)
        expected = [chips * milliwatt * time_us for milliwatt in (100, 50, 300)]
        assert [static.energy_nj, static.low_nj, static.high_nj] == pytest.approx(expected)
        shared = sum(share.energy_nj for share in [*cost.by_population, *cost.by_projection])
        assert shared == pytest.approx(cost.energy_nj_per_inference - static.energy_nj)


def test_a_slower_model_costs_only_static_energy() -> None:
    chip = load_chip("loihi")
    simple, cycle = priced(chip), priced(chip, model="cycle")
    assert cycle.timing_model == "cycle"
    assert cycle.parts[:-1] == simple.parts[:-1]
    more_us = cycle.time_us_per_inference - simple.time_us_per_inference
    assert more_us > 0
    assert cycle.energy_nj_per_inference - simple.energy_nj_per_inference == pytest.approx(104 * more_us)


@given(st.integers(2, 50), st.sampled_from(["loihi", "loihi-sanafe", "loihi2"]))
def test_dynamic_energy_is_linear_in_the_counts(factor: int, name: str) -> None:
    chip = load_chip(name)
    workload, counts, timing = run(chip)
    more = replace(
        counts,
        neurons=counts.neurons * factor,
        messages_in=counts.messages_in * factor,
        synops={event: array * factor for event, array in counts.synops.items()},
        active=counts.active * factor,
        spikes=counts.spikes * factor,
        packets_out=counts.packets_out * factor,
        by_projection={name: {key: n * factor for key, n in row.items()} for name, row in counts.by_projection.items()},
    )

    def dynamic(of: Counts) -> dict[str, float]:
        cost = price(workload, chip, of, timing)
        shares = [*cost.by_population, *cost.by_projection, *cost.by_core]
        return {part.cause: part.energy_nj for part in cost.parts if part.dynamic} | by_name(shares)

    assert dynamic(more) == pytest.approx({cause: factor * energy for cause, energy in dynamic(counts).items()})


def test_timing_of_a_few_samples_prices_the_counts_of_all() -> None:
    graph, trace = by_hand()
    many = replace(
        trace,
        samples=6,
        packed={name: np.tile(bits, (6, 1, 1)) for name, bits in trace.packed.items()},
        active={name: np.tile(bits, (6, 1, 1)) for name, bits in trace.active.items()},
    )
    chip = load_chip("loihi")
    workload, counts, whole = run(chip, network=(graph, many))
    _, _, head = run(chip, network=(graph, many.head(2)))
    cost, of_head = price(workload, chip, counts, whole), price(workload, chip, counts, head)
    assert (of_head.timing_samples, cost.timing_samples) == (2, 6)
    assert of_head.parts[:-1] == cost.parts[:-1]
    assert of_head.time_us_per_inference == pytest.approx(head.total_ticks / 2 * 0.1e-3)
    assert of_head.parts[-1].energy_nj == pytest.approx(104 * of_head.time_us_per_inference)


def test_the_second_set_prices_the_same_counts() -> None:
    workload, counts, timing = run(load_chip("loihi"))
    other = load_chip("loihi-sanafe")
    beside = price(workload, other, counts, simulate_timing(workload, counts, other, "simple"))
    assert beside.model_dump() == priced(other).model_dump()
    first = price(workload, load_chip("loihi"), counts, timing)
    assert beside.parts[0].cause == first.parts[0].cause == "synaptic operations, dense"
    assert beside.parts[0].count_per_inference == first.parts[0].count_per_inference == 7


def test_timing_of_a_chip_with_other_costs_is_refused() -> None:
    chip = load_chip("loihi")
    workload, counts, timing = run(chip)
    namesake = chip.model_copy(update={"tick_ns": 0.2})
    for other in (namesake, load_chip("loihi-sanafe")):
        with pytest.raises(
            ChipError, match=f"the timing is of chip 'loihi' with other costs than those of '{other.name}'"
        ):
            price(workload, other, counts, timing)


def test_constants_list_every_cost_with_its_unit() -> None:
    rows = constants(load_chip("loihi"), 7)
    assert {row.unit for row in rows} == {"pJ", "ns", "mW"}
    assert len({row.quantity for row in rows}) == len(rows) == 2 * 13 + 3
    assert [row.value for row in rows if "link" in row.quantity] == [0.3]
    assert priced(load_chip("loihi")).constants == constants(load_chip("loihi"), 1)


def test_the_arithmetic_floor_prices_dense_macs_and_effective_additions() -> None:
    _, counts, _ = run(load_chip("loihi"))
    projections = {"p": Operations(24, 10, 4), "q": Operations(0, 2, 0)}
    reference = arithmetic_reference(counts, OperationCounts(2, projections, 0.75, 0.5))
    assert (reference.dense_macs, reference.effective_acs) == (12, 7)
    assert reference.dense_mac_energy_nj == pytest.approx(12 * 4.6e-3)
    assert reference.effective_ac_energy_nj == pytest.approx(7 * 0.9e-3)
    assert (reference.neurobench_acs, reference.neurobench_macs) == (6, 2)
    assert reference.neurobench_energy_nj == pytest.approx(6 * 0.9e-3 + 2 * 4.6e-3)
    assert (reference.activation_sparsity, reference.connection_sparsity) == (0.75, 0.5)
    assert "floor" in reference.source


def test_the_arithmetic_floor_of_a_run_counts_every_synapse_of_every_step() -> None:
    workload, counts, _ = run(load_chip("loihi"))
    reference = arithmetic_reference(counts, count_operations(workload.graph, workload.trace))
    assert (reference.dense_macs, reference.effective_acs) == (2 * (4 + 2), 7)
    assert (reference.neurobench_acs, reference.neurobench_macs) == (7, 0)


def use_of(chip: Chip, mapping: Mapping | None = None, model: Model = "simple") -> tuple[ChipUse, Timing, Mapping]:
    workload, counts, timing = run(chip, mapping, model)
    return chip_use(workload.mapping, chip, counts, timing), timing, workload.mapping


def test_chip_use_shows_each_core_and_the_fullest_one_for_each_limit() -> None:
    use, _, mapping = use_of(load_chip("loihi"))
    assert (use.mesh, use.cores_used, use.cores_available, use.chips) == ([8, 4], 2, 128, 1)
    assert [(core.population, core.neurons, core.synops_per_inference) for core in use.cores] == [
        ("a", 2, 6),
        ("b", 1, 1),
    ]
    assert [(limit.limit, limit.used, limit.available, limit.core) for limit in use.limits] == [
        ("neurons", 2, 1024, 0),
        ("synaptic_words", mapping.cores[0].synaptic_words, 16384, 0),
        ("axons_in", 2, 4096, 0),
        ("axons_out", 2, 4096, 0),
    ]
    a, b = use.cores
    # a's units: four neuron steps active, four inactive; six synaptic operations. b's: one and three; one
    assert a.neuron_share == a.busy_share == pytest.approx((4 * 84 + 4 * 53) / 5102)
    assert a.synapse_share == pytest.approx(6 * 35 / 5102)
    assert b.neuron_share == b.busy_share == pytest.approx((84 + 3 * 53) / 5102)
    assert b.synapse_share == pytest.approx(35 / 5102)
    assert (a.stalled_share, b.stalled_share) == (0, 0)
    assert (a.critical_share, b.critical_share) == (1, 0)


def test_shares_of_stalled_and_of_critical_cores() -> None:
    chip, mapping = spread_out(load_chip("loihi-sanafe"))
    slow = with_ticks(
        chip, {"neuron_access": 1, "axon_in": 50}, link=9, send_packets=1, link_packets=1, queue_packets=1
    )
    graph, trace = by_hand()
    everywhere = replace(trace, packed=trace.packed | {"a": np.full_like(trace.packed["a"], 0b11000000)})
    _, counts, timing = run(slow, mapping, "cycle", (graph, everywhere))
    use = chip_use(mapping, slow, counts, timing)
    for index, core in enumerate(use.cores):
        assert core.stalled_share == pytest.approx(timing.stalled[:, index].sum() / timing.total_ticks)
        assert core.critical_share == (timing.critical_core == index).sum() / 4
    assert sum(core.critical_share for core in use.cores) == 1
    assert use.cores[2].synapse_share == pytest.approx(4 * 50 / timing.total_ticks)


def test_a_packet_takes_each_link_of_its_route_for_the_time_of_a_link() -> None:
    chip, mapping = spread_out(load_chip("loihi"))
    use, timing, _ = use_of(chip, mapping, "cycle")
    share = 3 / timing.total_ticks
    # inputs to a at (1, 0): east, three times; a's packet from (0, 0) to (1, 1): east, then south
    links = {(tile.tile_x, tile.tile_y): tile.link_share for tile in use.tiles}
    assert list(links) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert links[0, 0] == pytest.approx([4 * share, 0, 0, 0])
    assert links[1, 0] == pytest.approx([0, 0, share, 0])
    assert links[0, 1] == links[1, 1] == [0, 0, 0, 0]
    simple, _, _ = use_of(chip, mapping, "simple")
    assert not any(any(tile.link_share) for tile in simple.tiles)


def test_tiles_of_several_chips_stand_side_by_side() -> None:
    chip, mapping = spread_out(load_chip("loihi"))
    use, timing, _ = use_of(chip, placed(mapping, (0, 0), (1, 0), (3, 1)), "cycle")
    assert (use.chips, use.cores_available) == (2, 8)
    assert [(tile.tile_x, tile.tile_y) for tile in use.tiles] == [(x, y) for y in range(2) for x in range(4)]
    links = {(tile.tile_x, tile.tile_y): tile.link_share for tile in use.tiles}
    share = 3 / timing.total_ticks
    # a's packet goes from (0, 0) over the border of the first chip, between columns 1 and 2, to (2 + 1, 1)
    assert links[1, 0] == pytest.approx([share, 0, 0, 0])
    assert links[2, 0] == pytest.approx([share, 0, 0, 0])
    assert links[3, 0] == pytest.approx([0, 0, share, 0])


def test_limits_that_nobody_published_are_not_listed() -> None:
    use, _, _ = use_of(load_chip("loihi2"))
    assert [limit.limit for limit in use.limits] == ["neurons", "synaptic_words"]
