"""Energy against a network worked through by hand, and its laws."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Conv2d, Dense, SumPool
from spikeport.deploy.chip import Chip, load_chip
from spikeport.deploy.energy import arithmetic_reference, chip_use, constants, price, price_beside
from spikeport.deploy.mapping import Mapping, map_network
from spikeport.deploy.summary import Cost
from spikeport.deploy.timing import CoreCounts, Timing, core_counts, simulate_timing
from spikeport.deploy.trace import Trace, pack
from spikeport.models.errors import ChipError

ZERO = np.int64(0)
NEURON = LoihiNeuron(ZERO, ZERO, np.int64(100), ZERO, ZERO)


def by_hand() -> tuple[ProcessGraph, Trace]:
    """Two inputs -> two neurons a -> one neuron b, two steps, one sample."""
    graph = ProcessGraph(
        "by hand",
        2,
        1.0,
        (Input("in", (2,)),),
        (Population("a", (2,), NEURON, 1), Population("b", (1,), NEURON, 2)),
        (
            Projection("in-a", "in", "a", Dense((2,), np.array([[2, 4], [6, 8]]))),
            Projection("a-b", "a", "b", Dense((2,), np.array([[2, 4]]))),
        ),
        Readout("b"),
    )
    spikes = {"in": [[[1, 1], [1, 0]]], "a": [[[1, 0], [0, 0]]], "b": [[[1], [0]]]}
    packed = {name: pack(np.array(values)) for name, values in spikes.items()}
    active = {"a": np.array([[2, 2]]), "b": np.array([[1, 0]])}
    return graph, Trace("hand", graph.fingerprint(), 1, 2, {"in": 2, "a": 2, "b": 1}, packed, active=active)


def run(chip: Chip) -> tuple[ProcessGraph, Mapping, CoreCounts, Timing]:
    graph, trace = by_hand()
    mapping = map_network(graph, chip)
    counts = core_counts(graph, mapping, trace)
    return graph, mapping, counts, simulate_timing(graph, mapping, chip, counts)


def priced(name: str) -> Cost:
    chip = load_chip(name)
    graph, mapping, counts, timing = run(chip)
    return price(graph, mapping, chip, counts, timing)


def test_energy_worked_through_by_hand_with_the_constants_of_davies() -> None:
    cost = priced("loihi")
    nj = {part.cause: part.energy_nj for part in cost.parts}
    time_us = 0.1e-3 * (1130 + 1438 + 1368 + 1183)
    assert nj == pytest.approx(
        {
            "synaptic operations, dense": 7 * 23.6e-3,
            "neuron steps, inactive": 1 * 52e-3,
            "neuron steps, active": 5 * 81e-3,
            "packets within a tile": 4 * 1.7e-3,  # three from the corner where inputs enter, one from a to b
            "static power": 104 * time_us,
        }
    )
    assert cost.time_us_per_inference == cost.latency_us == pytest.approx(time_us)
    assert cost.energy_nj_per_inference == pytest.approx(sum(nj.values()))
    assert sum(cost.step_time_by_cause.values()) == pytest.approx(time_us)
    assert [part.cause for part in cost.parts if not part.dynamic] == ["static power"]


def test_energy_worked_through_by_hand_with_the_regression_set() -> None:
    nj = {part.cause: part.energy_nj for part in priced("loihi-sanafe").parts}
    assert nj == pytest.approx(
        {
            "synaptic operations, dense": 7 * 35.5e-3,
            "neuron accesses": 6 * 51.2e-3,
            "neuron updates": 5 * 21.6e-3,
            "spikes generated": 2 * 69.3e-3,
            "messages sent": 1 * 111e-3,
            "static power": 0,
        }
    )


@pytest.mark.parametrize("name", ["loihi", "loihi-sanafe", "loihi2"])
def test_the_band_encloses_the_energy(name: str) -> None:
    cost = priced(name)
    assert cost.energy_low_nj <= cost.energy_nj_per_inference <= cost.energy_high_nj
    assert all(part.low_nj <= part.energy_nj <= part.high_nj for part in cost.parts)
    assert cost.energy_low_nj < cost.energy_high_nj


def test_packets_take_xy_routes_from_the_input_tile() -> None:
    base = load_chip("loihi")
    chip = base.model_copy(
        update={
            "cores_per_tile": 1,
            "mesh": base.mesh.model_copy(update={"columns": 2, "rows": 2}),
            "limits": base.limits.model_copy(update={"neurons": 1}),
        }
    )
    _, mapping, counts, _ = run(chip)
    assert [(core.tile_x, core.tile_y) for core in mapping.cores] == [(0, 0), (1, 0), (1, 1)]
    # input: three spikes to the cores at (0, 0) and (1, 0); a's neuron 0 at (0, 0) once to b at (1, 1)
    assert (counts.within_tile, counts.hops_ew, counts.hops_ns) == (3, 3 + 1, 1)


@given(st.integers(2, 50), st.sampled_from(["loihi", "loihi-sanafe", "loihi2"]))
def test_dynamic_energy_is_linear_in_the_counts(factor: int, name: str) -> None:
    chip = load_chip(name)
    graph, mapping, counts, timing = run(chip)
    more = replace(
        counts,
        neurons=counts.neurons * factor,
        messages_in=counts.messages_in * factor,
        synops={event: array * factor for event, array in counts.synops.items()},
        active=counts.active * factor,
        spikes=counts.spikes * factor,
        packets_out=counts.packets_out * factor,
        within_tile=counts.within_tile * factor,
        hops_ew=counts.hops_ew * factor,
        hops_ns=counts.hops_ns * factor,
    )

    def dynamic(of: CoreCounts) -> dict[str, float]:
        return {p.cause: p.energy_nj for p in price(graph, mapping, chip, of, timing).parts if p.dynamic}

    assert dynamic(more) == pytest.approx({cause: factor * energy for cause, energy in dynamic(counts).items()})


def test_the_second_set_prices_the_same_counts() -> None:
    graph, mapping, counts, _ = run(load_chip("loihi"))
    other = load_chip("loihi-sanafe")
    beside = price_beside(graph, mapping, other, counts)
    assert beside.model_dump() == priced("loihi-sanafe").model_dump()
    first = price(
        graph, mapping, load_chip("loihi"), counts, simulate_timing(graph, mapping, load_chip("loihi"), counts)
    )
    assert beside.parts[0].count_per_inference == first.parts[0].count_per_inference


def test_timing_of_another_tick_is_refused() -> None:
    chip = load_chip("loihi")
    graph, mapping, counts, timing = run(chip)
    with pytest.raises(ChipError, match=r"ticks of 0\.2 ns"):
        price(graph, mapping, chip, counts, replace(timing, tick_ns=0.2))


def test_constants_list_every_cost_with_its_unit() -> None:
    rows = constants(load_chip("loihi"), 7)
    assert {row.unit for row in rows} == {"pJ", "ns", "mW"}
    assert len({row.quantity for row in rows}) == len(rows) == 2 * 13 + 2


def test_the_arithmetic_floor_counts_dense_macs_after_pooling_and_effective_additions() -> None:
    graph, _, counts, _ = run(load_chip("loihi"))
    reference = arithmetic_reference(graph, counts)
    assert (reference.dense_macs, reference.effective_acs) == (2 * (4 + 2), 7)
    assert reference.dense_mac_energy_nj == pytest.approx(12 * 4.6e-3)
    assert reference.effective_ac_energy_nj == pytest.approx(7 * 0.9e-3)
    assert "floor" in reference.source
    pooled = replace(
        graph,
        inputs=(Input("in", (1, 4, 4)),),
        populations=(Population("a", (3, 2, 2), NEURON, 1),),
        projections=(
            Projection(
                "p", "in", "a", Conv2d((1, 4, 4), np.ones((3, 1, 1, 1), dtype=np.int64), SumPool((2, 2), (2, 2)))
            ),
        ),
        readout=Readout("a"),
    )
    assert arithmetic_reference(pooled, counts).dense_macs == 2 * 12


def test_chip_use_shows_each_core_and_the_fullest_one_for_each_limit() -> None:
    chip = load_chip("loihi")
    graph, mapping, counts, timing = run(chip)
    use = chip_use(graph, mapping, chip, counts, timing)
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
    assert use.cores[0].busy_share == pytest.approx((308 + 238) / 5119)


def test_limits_that_nobody_published_are_not_listed() -> None:
    chip = load_chip("loihi2")
    graph, mapping, counts, timing = run(chip)
    assert [limit.limit for limit in chip_use(graph, mapping, chip, counts, timing).limits] == [
        "neurons",
        "synaptic_words",
    ]
