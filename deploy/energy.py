"""Energy as counts times the costs of a chip file, itemised by cause, with the band that the costs' bands give.

Dynamic parts are counts times picojoules. The static part is the power of every chip used times the time of the stream.
Packets are priced along XY routes between tiles, one packet for each (spike, projection, target core); inputs enter at
the tile that the chip file assumes. Nothing is charged for training, for configuring the chip, or for the host.
"""

from dataclasses import replace

from spikeport.converters.graph import ProcessGraph
from spikeport.converters.operators import Conv2d, Dense
from spikeport.deploy.chip import EVENT_TITLES, Chip, Quantity
from spikeport.deploy.mapping import Mapping
from spikeport.deploy.summary import ChipUse, Constant, CoreUse, Cost, EnergyPart, LimitUse, Reference
from spikeport.deploy.timing import CoreCounts, Timing, simulate_timing
from spikeport.models.errors import ChipError

MAC_PJ = 4.6
ADD_PJ = 0.9
HOROWITZ = (
    "Horowitz, ISSCC 2014, 45 nm, 32-bit floating point: 4.6 pJ a multiply-accumulate, 0.9 pJ an addition; "
    "an arithmetic-only floor, without memory, control or leakage"
)
"""The conventional processor of `arithmetic_reference`; it is no chip, so it has no chip file."""


def price(graph: ProcessGraph, mapping: Mapping, chip: Chip, counts: CoreCounts, timing: Timing) -> Cost:
    """Time and energy of one inference, as means over the run; `timing` must be of the same chip file."""
    if timing.tick_ns != chip.tick_ns:
        raise ChipError(f"the timing has ticks of {timing.tick_ns} ns, chip {chip.name!r} has {chip.tick_ns} ns.")
    time_us = timing.ticks_per_inference * timing.tick_ns / 1000
    parts = [*_dynamic(chip, counts), _static(chip, mapping.chips, time_us)]
    per_inference = timing.tick_ns / 1000 / counts.samples
    return Cost(
        chip=chip.name,
        title=chip.title,
        tick_ns=chip.tick_ns,
        cycles_per_inference=timing.ticks_per_inference,
        time_us_per_inference=time_us,
        latency_us=float(timing.latency_ticks.mean()) * timing.tick_ns / 1000,
        energy_nj_per_inference=sum(part.energy_nj for part in parts),
        energy_low_nj=sum(part.low_nj for part in parts),
        energy_high_nj=sum(part.high_nj for part in parts),
        parts=parts,
        step_time_by_cause={cause: ticks * per_inference for cause, ticks in timing.critical_path.items()},
        constants=constants(chip, mapping.tiles),
    )


def price_beside(graph: ProcessGraph, mapping: Mapping, chip: Chip, counts: CoreCounts) -> Cost:
    """The same mapping and counts under another chip file's costs and times."""
    return price(graph, mapping, chip, counts, simulate_timing(graph, mapping, chip, counts))


def constants(chip: Chip, tiles: int) -> list[Constant]:
    """Every cost of a chip file with its provenance; the barrier is the one of so many mapped tiles."""
    rows = []
    for event, title in EVENT_TITLES.items():
        rows += [_constant(f"{title}, energy", chip.event(event).energy_pj, "pJ")]
        rows += [_constant(f"{title}, time", chip.event(event).time_ns, "ns")]
    rows += [_constant(f"barrier over {tiles} tile{'s' * (tiles > 1)}, time", chip.barrier.at(tiles), "ns")]
    return [*rows, _constant("static power a chip", chip.static_mw, "mW")]


def arithmetic_reference(graph: ProcessGraph, counts: CoreCounts) -> Reference:
    """The arithmetic alone of the same network on a conventional processor.

    Dense: every synapse of every step as one multiply-accumulate, zeros included, pooling done before the weights.
    Effective: one addition for each synaptic operation that happened.
    """
    dense = graph.steps * sum(dense_macs(graph).values())
    effective = sum(int(array.sum()) for array in counts.projections.values()) / counts.samples
    return Reference(
        dense_macs=dense,
        dense_mac_energy_nj=dense * MAC_PJ / 1000,
        effective_acs=effective,
        effective_ac_energy_nj=effective * ADD_PJ / 1000,
        source=HOROWITZ,
    )


def dense_macs(graph: ProcessGraph) -> dict[str, int]:
    """Multiply-accumulates of each projection in one step on a processor that skips no zeros."""
    result = {}
    for projection in graph.projections:
        operator = projection.operator
        if isinstance(operator, Conv2d | Dense):
            operator = replace(operator, in_shape=operator.pooled_shape, pool=None)
        result[projection.name] = operator.n_synapses()
    return result


def chip_use(graph: ProcessGraph, mapping: Mapping, chip: Chip, counts: CoreCounts, timing: Timing) -> ChipUse:
    """How the network lies on the chip: each core, and for each published limit the core that uses it most."""
    synops = sum(array.sum(axis=(0, 1)) for array in counts.synops.values()) / counts.samples
    cores = [
        CoreUse(
            chip=core.chip,
            core=core.core,
            tile_x=core.tile_x,
            tile_y=core.tile_y,
            population=core.population,
            neurons=len(core.neurons),
            synaptic_words=core.synaptic_words,
            axons_in=core.axons_in,
            axons_out=core.axons_out,
            synops_per_inference=float(synops[index]),
            busy_share=float(timing.busy_share[index]),
        )
        for index, core in enumerate(mapping.cores)
    ]
    limits = []
    for limit, available in chip.limits.items().items():
        fullest = max(cores, key=lambda core: int(getattr(core, limit)))
        if available < float("inf"):
            used = int(getattr(fullest, limit))
            limits.append(
                LimitUse(limit=limit, used=used, available=int(available), chip=fullest.chip, core=fullest.core)
            )
    return ChipUse(
        name=chip.name,
        title=chip.title,
        mesh=[chip.mesh.columns, chip.mesh.rows],
        cores_per_tile=chip.cores_per_tile,
        chips=mapping.chips,
        cores_used=len(cores),
        cores_available=chip.cores * mapping.chips,
        cores=cores,
        limits=limits,
    )


def _dynamic(chip: Chip, counts: CoreCounts) -> list[EnergyPart]:
    """One part for each event that the chip file prices and that the network did."""
    parts = []
    for event, title in EVENT_TITLES.items():
        cost, count = chip.event(event).energy_pj, counts.total(event)
        if count == 0 or cost.high == 0:
            continue
        each = count / counts.samples
        parts.append(
            EnergyPart(
                cause=title,
                count_per_inference=each,
                energy_nj=each * cost.value / 1000,
                low_nj=each * cost.low / 1000,
                high_nj=each * cost.high / 1000,
                dynamic=True,
            )
        )
    return parts


def _static(chip: Chip, chips: int, time_us: float) -> EnergyPart:
    """mW times microseconds are nanojoules."""
    power = chip.static_mw
    return EnergyPart(
        cause="static power",
        count_per_inference=chips,
        energy_nj=chips * power.value * time_us,
        low_nj=chips * power.low * time_us,
        high_nj=chips * power.high * time_us,
        dynamic=False,
    )


def _constant(quantity: str, cost: Quantity, unit: str) -> Constant:
    return Constant(
        quantity=quantity,
        value=cost.value,
        unit=unit,
        low=cost.low,
        high=cost.high,
        kind=cost.kind,
        source=cost.source,
    )
