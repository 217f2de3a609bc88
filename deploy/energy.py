"""Energy as counts times the costs of a chip file, with the band that the costs' bands give.

Itemised by cause, by population and projection, and by core. Dynamic parts are counts times picojoules. The static
part is the power of every chip used times the time of the stream. Packets are priced along XY routes between tiles, one
packet for each (spike, projection, target core); inputs enter at the tile that the chip file assumes. Nothing is
charged for training, for configuring the chip, or for the host.
"""

import numpy as np

from spikeport.converters.graph import Projection
from spikeport.deploy.chip import EVENT_TITLES, SYNOP_EVENT, Chip, Quantity
from spikeport.deploy.mapping import Mapping
from spikeport.deploy.operation_counts import NEUROBENCH_VERSION, OperationCounts
from spikeport.deploy.summary import (
    ChipUse,
    Constant,
    CoreUse,
    Cost,
    EnergyPart,
    EnergyShare,
    LimitUse,
    Reference,
    TileUse,
)
from spikeport.deploy.timing import Timing
from spikeport.deploy.workload import SYNOP_EVENTS, Counts, Workload
from spikeport.models.errors import ChipError

MAC_PJ = 4.6
ADD_PJ = 0.9
HOROWITZ = (
    "Horowitz, ISSCC 2014, 45 nm, 32-bit floating point: 4.6 pJ a multiply-accumulate, 0.9 pJ an addition; "
    "an arithmetic-only floor, without memory, control or leakage"
)
"""The conventional processor of `arithmetic_reference`; it is no chip, so it has no chip file."""


def price(workload: Workload, chip: Chip, counts: Counts, timing: Timing) -> Cost:
    """Time and energy of one inference, as means over the run; `timing` must be of the same chip file."""
    if timing.chip_digest != chip.digest:
        raise ChipError(f"the timing is of chip {timing.chip!r} with other costs than those of {chip.name!r}.")
    graph, mapping = workload.graph, workload.mapping
    time_us = timing.ticks_per_inference * timing.tick_ns / 1000
    totals = {event: event_total(counts, event) for event in EVENT_TITLES}
    parts = [*_dynamic(chip, totals, counts.samples), _static(chip, mapping.chips, time_us)]
    per_inference = timing.tick_ns / 1000 / timing.samples
    by_core = {event: counts.by_core(event) for event in CORE_EVENTS}
    return Cost(
        chip=chip.name,
        title=chip.title,
        timing_model=timing.model,
        timing_samples=timing.samples,
        tick_ns=chip.tick_ns,
        cycles_per_inference=timing.ticks_per_inference,
        time_us_per_inference=time_us,
        latency_us=float(timing.latency_ticks.mean()) * timing.tick_ns / 1000,
        energy_nj_per_inference=sum(part.energy_nj for part in parts),
        energy_low_nj=sum(part.low_nj for part in parts),
        energy_high_nj=sum(part.high_nj for part in parts),
        parts=parts,
        by_population=[
            _share(chip, p.name, {event: _in_population(mapping, counts, p.name, event) for event in OF_POPULATION},
                   counts.samples)
            for p in graph.populations
        ],
        by_projection=[
            _share(chip, p.name, _of_projection(p, counts), counts.samples) for p in graph.projections
        ],
        by_core=[
            _share(
                chip,
                f"{core.chip}:{core.core}",
                {event: int(times[index]) for event, times in by_core.items()},
                counts.samples,
            )
            for index, core in enumerate(mapping.cores)
        ],
        step_time_by_cause={cause: int(ticks.sum()) * per_inference for cause, ticks in timing.causes.items()},
        constants=constants(chip, mapping.tiles),
    )  # fmt: skip


OF_POPULATION = ("neuron_inactive", "neuron_active", "neuron_access", "neuron_update", "spike")
"""Events that belong to a population; the others belong to the projection whose packet they are."""

CORE_EVENTS = (*OF_POPULATION, "axon_out", "axon_in", *SYNOP_EVENTS)
"""Events that a core does; the others belong to the mesh."""

MESH_EVENTS = {"within_tile": "within_tile", "hop_ew": "hops_ew", "hop_ns": "hops_ns"}


def event_total(counts: Counts, event: str) -> int:
    """How often an event of the chip file happened in the whole run."""
    if event in MESH_EVENTS:
        return sum(row[MESH_EVENTS[event]] for row in counts.by_projection.values())
    return int(counts.by_core(event).sum())


def _in_population(mapping: Mapping, counts: Counts, population: str, event: str) -> int:
    return int(counts.by_core(event)[mapping.cores_of(population)].sum())


def _of_projection(projection: Projection, counts: Counts) -> dict[str, int]:
    """Events of a projection's packets. What a host sends costs no core `axon_out`."""
    row = counts.by_projection[projection.name]
    found = {event: row[key] for event, key in MESH_EVENTS.items()}
    found |= {"axon_in": row["packets"], "axon_out": row["sent_by_cores"]}
    return found | {SYNOP_EVENT[projection.operator.kind]: row["synops"]}


def _share(chip: Chip, name: str, events: dict[str, int], samples: int) -> EnergyShare:
    """Dynamic energy of some events, nanojoule per inference."""

    def of(bound: str) -> float:
        picojoules = [n * float(getattr(chip.event(event).energy_pj, bound)) for event, n in events.items()]
        return sum(picojoules) / samples / 1000

    return EnergyShare(name=name, energy_nj=of("value"), low_nj=of("low"), high_nj=of("high"))


def constants(chip: Chip, tiles: int) -> list[Constant]:
    """Every cost of a chip file with its provenance; the barrier is the one of so many mapped tiles."""
    rows = []
    for event, title in EVENT_TITLES.items():
        rows += [_constant(f"{title}, energy", chip.event(event).energy_pj, "pJ")]
        rows += [_constant(f"{title}, time", chip.event(event).time_ns, "ns")]
    rows += [_constant("packets over a link, time until the next", chip.network.link_ns, "ns")]
    rows += [_constant(f"barrier over {tiles} tile{'s' * (tiles > 1)}, time", chip.barrier.at(tiles), "ns")]
    return [*rows, _constant("static power a chip", chip.static_mw, "mW")]


def arithmetic_reference(counts: Counts, operations: OperationCounts) -> Reference:
    """The arithmetic alone of the same network on a conventional processor.

    Dense: every synapse of every step as one multiply-accumulate, zeros included, pooling done before the weights.
    Effective: one addition for each synaptic operation that happened on the chip. NeuroBench counts these otherwise
    (`operation_counts.py`): zero weights do not count, and what lies behind pooling multiplies.
    """
    dense, acs, macs = operations.dense, operations.effective_acs, operations.effective_macs
    effective = sum(row["synops"] for row in counts.by_projection.values()) / counts.samples
    return Reference(
        dense_macs=round(dense),
        dense_mac_energy_nj=dense * MAC_PJ / 1000,
        effective_acs=effective,
        effective_ac_energy_nj=effective * ADD_PJ / 1000,
        neurobench_acs=acs,
        neurobench_macs=macs,
        neurobench_energy_nj=(acs * ADD_PJ + macs * MAC_PJ) / 1000,
        neurobench_version=NEUROBENCH_VERSION,
        activation_sparsity=operations.activation_sparsity,
        connection_sparsity=operations.connection_sparsity,
        source=HOROWITZ,
    )


def chip_use(mapping: Mapping, chip: Chip, counts: Counts, timing: Timing) -> ChipUse:
    """How the network lies on the chip: each core, and for each published limit the core that uses it most."""
    synops = sum(array.sum(axis=0) for array in counts.synops.values()) / counts.samples
    whole = max(timing.total_ticks, 1)
    waited = np.bincount(timing.critical_core[timing.critical_core >= 0], minlength=len(mapping.cores))
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
            neuron_share=float(timing.neuron_ticks[:, index].sum() / whole),
            synapse_share=float(timing.synapse_ticks[:, index].sum() / whole),
            stalled_share=float(timing.stalled[:, index].sum() / whole),
            critical_share=float(waited[index] / len(timing.step_ticks)),
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
        tiles=[
            TileUse(tile_x=tile % columns, tile_y=tile // columns, link_share=shares.tolist())
            for columns in [mapping.chips * mapping.columns]
            for tile, shares in enumerate(timing.link_share[:, :4])
        ],
    )


def _dynamic(chip: Chip, totals: dict[str, int], samples: int) -> list[EnergyPart]:
    """One part for each event that the chip file prices and that the network did."""
    parts = []
    for event, title in EVENT_TITLES.items():
        cost, count = chip.event(event).energy_pj, totals[event]
        if count == 0 or cost.high == 0:
            continue
        each = count / samples
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
