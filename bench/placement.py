"""Weighted hops of the placement beside those of other placements; prints a table and writes JSON.

    .venv/bin/python bench/placement.py --out runs/placement.json

Every neuron and every input fires once. random: the mean of 20 placements, the cores shuffled over the tiles nearest to
the input. in order: a snake through the tiles, in the order of populations. Weights are random integers.
"""

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from spikeport.converters.graph import Input, LoihiNeuron, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Conv2d, Dense, SumPool
from spikeport.deploy.chip import load_chip
from spikeport.deploy.mapping import map_network, placement_hops
from spikeport.models.files import write_json
from spikeport.models.networks import parse_architecture

NETWORKS = (
    ("16C5p2-P2-32C3p1-P2-128-10", (1, 8, 8), 10, "loihi"),
    ("16C5p2-P2-32C3p1-P2-128-10", (1, 8, 8), 10, "loihi2"),
    ("15C5-P2-40C5-P2-300-10", (1, 28, 28), 10, "loihi"),
    ("1024-1024-10", (784,), 10, "loihi"),
    ("64C3p1-64C3p1-P2-128C3p1-128C3p1-P4-256-10", (2, 32, 32), 10, "loihi"),
    ("64C3p1-64C3p1-64C3p1-P8-10", (2, 64, 64), 10, "loihi"),
)


def build(architecture: str, shape: tuple[int, ...], classes: int) -> ProcessGraph:
    """An architecture with random 8-bit weights."""
    rng, zero = np.random.default_rng(0), np.int64(0)
    neuron = LoihiNeuron(zero, zero, np.int64(100), zero, zero)
    populations, projections, source = [], [], "input"
    for stage, layer in enumerate(parse_architecture(architecture, shape, classes), 1):
        pool = SumPool((layer.pool, layer.pool), (layer.pool, layer.pool)) if layer.pool > 1 else None
        channels = layer.out_shape[0]
        if layer.kind == "conv":
            weight = 2 * rng.integers(-128, 128, (channels, layer.in_shape[0], layer.kernel, layer.kernel))
            sides = (layer.stride, layer.stride), (layer.padding, layer.padding)
            operator: Conv2d | Dense = Conv2d(layer.in_shape, weight, pool, *sides)
        else:
            weight = 2 * rng.integers(-128, 128, (channels, math.prod(layer.pooled_shape)))
            operator = Dense(layer.in_shape, weight, pool)
        populations.append(Population(layer.name, layer.out_shape, neuron, stage))
        projections.append(Projection(f"{source}->{layer.name}", source, layer.name, operator))
        source = layer.name
    inputs = (Input("input", shape),)
    return ProcessGraph(architecture, 1, 1.0, inputs, tuple(populations), tuple(projections), Readout(source))


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
    if options.out:
        write_json(options.out, rows)


if __name__ == "__main__":
    main()
