"""One process that loads a network and runs it, for `bench/chip.py`: prints seconds to load, to run, and peak memory.

    python bench/footprint.py graph.npz inputs.npz [mapping.json]

Imports no more than the simulator needs, as a user's script would. With a mapping, cores are counted and timed too.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from spikeport.converters.graph import ProcessGraph
from spikeport.deploy import event_simulator
from spikeport.deploy.chip import load_chip
from spikeport.deploy.event_program import Program
from spikeport.deploy.mapping import Mapping
from spikeport.deploy.sanafe_runner import peak_rss_mib
from spikeport.deploy.timing import simulate_timing
from spikeport.deploy.workload import count, route, with_trace
from spikeport.models.files import read_json


def main(graph_file: Path, input_file: Path, mapping_file: Path | None) -> dict[str, float]:
    started = time.perf_counter()
    graph = ProcessGraph.load(graph_file)
    Program(graph, 1)  # what `run` makes of the graph before its first step
    mapping = Mapping.from_json(read_json(mapping_file, "spikeport map")) if mapping_file else None
    routes = route(graph, mapping) if mapping else None
    load_s = time.perf_counter() - started
    with np.load(input_file, allow_pickle=False) as stored:
        inputs = {name: stored[name] for name in stored.files}
    started = time.perf_counter()
    trace = event_simulator.run(graph, inputs, threads=1)
    if mapping and routes:
        workload = with_trace(routes, trace)
        simulate_timing(workload, count(workload, 1), load_chip(mapping.chip), "simple")
    return {
        "load_s": load_s,
        "run_s": time.perf_counter() - started,
        "synops": sum(int(counts.sum()) for counts in trace.synops.values()),
        "rss_mib": peak_rss_mib(),
    }


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    print(json.dumps(main(paths[0], paths[1], paths[2] if len(paths) > 2 else None)))
