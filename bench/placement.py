"""Weighted hops of the placement beside those of other placements; prints a table and writes JSON.

    .venv/bin/python bench/placement.py --out runs/placement.json

Every neuron and every input fires once. random: the mean of 20 placements, the cores shuffled over the tiles nearest to
the input. in order: a snake through the tiles, in the order of populations. Weights are random integers.
"""

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from spikeport.converters.graph import LoihiNeuron, ProcessGraph
from spikeport.converters.lower import lower
from spikeport.converters.nir_writer import to_nir
from spikeport.deploy.chip import load_chip
from spikeport.deploy.mapping import map_network, placement_hops
from spikeport.deploy.placement import Traffic, place_cores, snake_fill, weighted_hops
from spikeport.models.architectures import parse_architecture
from spikeport.models.files import write_json
from spikeport.models.networks import SpikingNetwork
from spikeport.models.recipe import NetworkSection
from spikeport.models.rules import STBP

NETWORKS = (
    ("16C5p2-P2-32C3p1-P2-128-10", (1, 8, 8), 10, "loihi"),
    ("16C5p2-P2-32C3p1-P2-128-10", (1, 8, 8), 10, "loihi2"),
    ("15C5-P2-40C5-P2-300-10", (1, 28, 28), 10, "loihi"),
    ("1024-1024-10", (784,), 10, "loihi"),
    ("64C3p1-64C3p1-P2-128C3p1-128C3p1-P4-256-10", (2, 32, 32), 10, "loihi"),
    ("64C3p1-64C3p1-64C3p1-P8-10", (2, 64, 64), 10, "loihi"),
)


def placing_times() -> list[dict[str, float]]:
    """Seconds to place cores with random traffic, 30 targets each, and the weighted hops beside those of a snake."""
    chip, rows = load_chip("loihi"), []
    for n in (128, 1000):
        rng = np.random.default_rng(n)
        source, target = np.divmod(np.unique(rng.integers(0, n * n, 30 * n)), n)
        packets = Traffic(rng.random(n), source, target, rng.random(len(source)))
        began = time.perf_counter()
        places = place_cores(packets, chip, np.arange(n) / n)
        seconds = time.perf_counter() - began
        hops, snake = (weighted_hops(packets, at, chip) for at in (places, snake_fill(n, chip)))
        rows.append({"cores": n, "seconds": seconds, "hops": hops, "in order": snake})
    return rows


def build(architecture: str, shape: tuple[int, ...], classes: int) -> ProcessGraph:
    """An architecture with random 8-bit weights."""
    rng, zero = np.random.default_rng(0), np.int64(0)
    section = NetworkSection(architecture=architecture, steps=1, tau_mem=2.0, tau_syn=1.0)
    network = SpikingNetwork(parse_architecture(section, shape, classes), section.neuron(), STBP())
    graph = lower(to_nir(network, dt=1.0, steps=1), architecture)
    neuron = LoihiNeuron(zero, zero, np.int64(100), zero, zero)
    projections = []
    for projection in graph.projections:
        weight = 2 * rng.integers(-128, 128, projection.operator.weight.shape)
        projections.append(replace(projection, operator=projection.operator.with_weight(weight)))
    populations = tuple(replace(population, neuron=neuron) for population in graph.populations)
    return replace(graph, populations=populations, projections=tuple(projections))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    table = Table(title="weighted hops, every neuron firing once")
    for heading in ("network", "chip", "cores", "tiles", "chips", "random", "in order", "placed", "seconds to map"):
        table.add_column(heading, justify="left" if heading in ("network", "chip") else "right")
    map_network(build("1-2", (1,), 2), load_chip("loihi"))  # compiles the kernels
    for architecture, shape, classes, chip_name in NETWORKS:
        graph, chip = build(architecture, shape, classes), load_chip(chip_name)
        began = time.perf_counter()
        mapping = map_network(graph, chip)
        seconds = time.perf_counter() - began
        hops = placement_hops(graph, mapping, chip)
        cores, image = len(mapping.cores), "x".join(map(str, shape))
        place = {"cores": cores, "tiles": mapping.tiles, "chips": mapping.chips}
        rows.append(
            {"network": f"{image}-{architecture}", "chip": chip_name, **place, **asdict(hops), "seconds": seconds}
        )
        figures = (f"{value:,.0f}" for value in (*place.values(), hops.random, hops.greedy, hops.placed))
        table.add_row(f"{image}-{architecture}", chip_name, *figures, f"{seconds:.1f}")
    Console().print(table)
    placing = placing_times()
    for row in placing:
        Console().print(
            f"random traffic of {row['cores']:,} cores placed in {row['seconds']:.1f} s: "
            f"{row['hops']:,.0f} hops, {row['in order']:,.0f} in order"
        )
    if options.out:
        write_json(options.out, {"networks": rows, "random_traffic": placing})


if __name__ == "__main__":
    main()
