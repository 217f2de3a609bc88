"""Speed, memory and growth of the chip simulator beside its peers: `make bench-chip`.

Every ratio is of one run of this script: same network, same spikes (compared before a time is used), one thread each
unless told otherwise. Prints a table (ours, peer, ratio, must), writes it as JSON and draws the curves. Exit status 1
where a must is missed, 2 where a peer is not there.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from chip_peers import Network, conv, dense, integrate_and_fire, large, run_lava, run_sanafe

from spikeport.converters.graph import Input, Population, ProcessGraph, Projection, Readout
from spikeport.converters.operators import Conv2d, Dense
from spikeport.deploy import event_simulator
from spikeport.deploy.energy import price
from spikeport.deploy.mapping import Mapping
from spikeport.deploy.timing import Model, simulate_timing
from spikeport.deploy.workload import count, route, with_trace
from spikeport.models.errors import BackendUnavailableError
from spikeport.models.files import write_json

FIRING = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
AT_MOST_LINEAR = 1.1
"""Largest exponent of the power law through the times that still counts as linear."""

MANY_NEURONS_GIB = 8.0


@dataclass(frozen=True)
class Row:
    """One line of the table. ratio: how many times better than the peer or the limit; must: at least this."""

    what: str
    network: str
    ours: float
    peer: float
    unit: str
    ratio: float
    must: float

    @property
    def held(self) -> bool:
        return self.ratio >= self.must


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of a call, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def function_seconds(network: Network, repeats: int = 5) -> float:
    """Median time of a run of the event simulator alone; like Lava's, it leaves out what prepares the network."""
    runs = [event_simulator.run(network.graph, network.inputs, threads=1) for _ in range(repeats + 1)]
    return statistics.median(run.seconds for run in runs[1:])


def with_timing(network: Network, model: Model, threads: int = 1) -> Callable[[], object]:
    """Function, counts per core, timing and energy: what SANA-FE's run gives. Routes belong to loading."""
    routes = route(network.graph, network.mapping)

    def work() -> object:
        trace = event_simulator.run(network.graph, network.inputs, threads=threads)
        workload = with_trace(routes, trace)
        counts = count(workload, threads)
        return price(workload, network.chip, counts, simulate_timing(workload, counts, network.chip, model, threads))

    return work


@dataclass(frozen=True)
class StepTime:
    """Mean modelled time of a chip step, nanoseconds: ours under one model beside a peer's under the nearest one."""

    network: str
    model: Model
    ours_ns: float
    peer: str
    peer_ns: float


def mean_step_ns(network: Network, model: Model) -> float:
    workload = with_trace(route(network.graph, network.mapping), network.trace)
    timing = simulate_timing(workload, count(workload), network.chip, model)
    return float(timing.step_ticks.mean()) * timing.tick_ns


def speed_rows(quick: bool, times: list[StepTime]) -> Iterator[Row]:
    """Steps a second against Lava and the three timings of SANA-FE; what the models say of a step goes to `times`."""
    steps = (200, 20) if quick else (3000, 150)
    for network, cycle_steps in ((dense(steps[0]), 6), (conv(steps[1]), 3)):
        n, name = network.graph.steps, network.graph.name
        lava = run_lava(network)
        ours = n / function_seconds(network)
        yield Row("function only, against Lava 0.10.0", name, ours, lava, "steps/s", ours / lava, 300)
        few = dense(cycle_steps) if name == "dense" else conv(cycle_steps)
        against: tuple[tuple[str, Model, str, Network, float], ...] = (
            ("function, simple timing and energy, against SANA-FE simple", "simple", "simple", network, 50),
            ("cycle, against SANA-FE detailed", "cycle", "detailed", network, 3),
            ("cycle, against SANA-FE cycle (Booksim)", "cycle", "cycle", few, 100),
        )
        for what, model, theirs, tried, must in against:
            ours = tried.graph.steps / seconds(with_timing(tried, model), 3)
            peer = run_sanafe(tried, theirs)
            times.append(StepTime(name, model, mean_step_ns(tried, model), f"SANA-FE {theirs}", peer.mean_step_ns))
            yield Row(what, name, ours, peer.steps_per_s, "steps/s", ours / peer.steps_per_s, must)


def footprint(graph: ProcessGraph, inputs: dict[str, np.ndarray], mapping: Mapping | None) -> dict[str, float]:
    """Load and run in a process of its own (`footprint.py`): seconds to load and to run, peak memory in MiB."""
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / name for name in ("graph.npz", "inputs.npz", "mapping.json")]
        graph.save(files[0])
        np.savez(files[1], **inputs)  # type: ignore[arg-type]
        if mapping is not None:
            write_json(files[2], mapping.to_json())
        script = Path(__file__).with_name("footprint.py")
        command = [sys.executable, str(script), *map(str, files[: 2 if mapping is None else 3])]
        found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        return found


def memory_rows(quick: bool) -> Iterator[Row]:
    """Peak memory and loading, against SANA-FE."""
    network = large(4 if quick else 12, steps=5)
    name = f"dense, {sum(p.operator.n_synapses() for p in network.graph.projections) / 1e6:.0f} M synapses"
    peer, ours = run_sanafe(network, "simple"), footprint(network.graph, network.inputs, network.mapping)
    yield Row("peak memory, against SANA-FE", name, ours["rss_mib"], peer.peak_rss_mib, "MiB",
              peer.peak_rss_mib / ours["rss_mib"], 20)  # fmt: skip
    yield Row("time to load, against SANA-FE", name, ours["load_s"], peer.load_s, "s", peer.load_s / ours["load_s"], 20)


def synop_rows() -> Iterator[Row]:
    """Synaptic operations a second on one core, against a hand-tuned loop over the same rows."""
    from event_kernels import measure

    for row in measure():
        yield Row("synaptic operations on one core, against a C loop int8 to int32", row.layer, row.ours / 1e9,
                  row.c / 1e9, "G/s", row.ours / row.c, 0.5)  # fmt: skip


def firing_curve() -> list[dict[str, float]]:
    """Time a step of one network, a convolution and a dense layer, at rising firing rates of what drives them."""
    steps, rng = 100, np.random.default_rng(1)
    graph = _driven(rng, steps)
    points = []
    for rate in FIRING:
        spikes = {node.name: (rng.random((1, steps, *node.shape)) < rate).astype(np.uint8) for node in graph.inputs}
        runs = [event_simulator.run(graph, spikes, threads=1) for _ in range(9)]
        sent = sum(int(array.sum()) for array in spikes.values())
        synops = sum(int(counts.sum()) for counts in runs[0].synops.values())
        took = min(run.seconds for run in runs)
        points.append({"rate": rate, "spikes": sent / steps, "synops": synops / steps, "seconds": took / steps})
    return points


def _driven(rng: np.random.Generator, steps: int) -> ProcessGraph:
    """64C3p1 on 64 x 16 x 16 and 2,048-1,024, each behind an input of its own."""
    weights = [2 * rng.integers(-60, 61, shape) for shape in ((64, 64, 3, 3), (1024, 2048))]
    operators = [Conv2d((64, 16, 16), weights[0], padding=(1, 1)), Dense((2048,), weights[1])]
    inputs = (Input("image", (64, 16, 16)), Input("vector", (2048,)))
    populations = (
        Population("conv", (64, 16, 16), integrate_and_fire(60_000), 1),
        Population("dense", (1024,), integrate_and_fire(60_000), 1),
    )
    projections = tuple(
        Projection(f"{node.name} to {population.name}", node.name, population.name, operator)
        for node, population, operator in zip(inputs, populations, operators, strict=True)
    )
    return ProcessGraph("driven", steps, 1e-3, inputs, populations, projections, Readout("dense"))


def growth_rows(points: list[dict[str, float]]) -> Iterator[Row]:
    """How time grows with spikes, and a network of a million neurons."""
    spikes, took = (np.log([point[key] for point in points]) for key in ("spikes", "seconds"))
    exponent = float(np.polyfit(spikes, took, 1)[0])
    yield Row("growth of time with spikes, 1 % to 50 % firing: exponent (1: linear)", "conv and dense", exponent, 1.0,
              "", 1 / exponent, 1 / AT_MOST_LINEAR)  # fmt: skip
    graph, inputs = million()
    found = footprint(graph, inputs, None)
    neurons = sum(population.size for population in graph.populations)
    synapses = sum(projection.operator.n_synapses() for projection in graph.projections)
    name = f"{neurons / 1e6:.2f} M neurons, {synapses / 1e9:.2f} G synapses"
    gib = found["rss_mib"] / 1024
    print(
        f"{name}: {graph.steps / found['run_s']:.2f} steps/s, {found['synops'] / found['run_s'] / 1e9:.1f} G synops/s"
    )
    yield Row("peak memory of a large convolutional network, against 8 GiB", name, gib, MANY_NEURONS_GIB, "GiB",
              MANY_NEURONS_GIB / gib, 1)  # fmt: skip


def million(steps: int = 20) -> tuple[ProcessGraph, dict[str, np.ndarray]]:
    """36C7p3-36C7p3 on 2 x 128 x 128: 1.18 million neurons, 1.09 thousand million synapses, shared weights."""
    rng = np.random.default_rng(2)
    shape, previous, source = (36, 128, 128), (2, 128, 128), "input"
    populations, projections = [], []
    for layer in (1, 2):
        weight = 2 * rng.integers(-40, 41, (36, previous[0], 7, 7))
        name = f"conv{layer}"
        populations.append(Population(name, shape, integrate_and_fire(200 if layer == 1 else 1000), layer))
        projections.append(Projection(f"{source} to {name}", source, name, Conv2d(previous, weight, padding=(3, 3))))
        previous, source = shape, name
    graph = ProcessGraph("million", steps, 1e-3, (Input("input", (2, 128, 128)),), tuple(populations),
                         tuple(projections), Readout("conv2"))  # fmt: skip
    spikes = (rng.random((1, steps, 2, 128, 128)) < 0.1).astype(np.uint8)
    return graph, {"input": spikes}


def size_curve(quick: bool) -> list[dict[str, float]]:
    """Steps a second and memory of multilayer perceptrons and of wider convolutional networks."""
    widths, factors = ((200, 400, 800, 1600), (1, 2, 4)) if quick else ((200, 400, 800, 1600, 3200), (1, 2, 3, 4))
    points = [_point("dense", dense(100, (784, width, width, 10))) for width in widths]
    return points + [_point("conv", conv(20, (15 * factor, 40 * factor), 300)) for factor in factors]


def _point(kind: str, network: Network) -> dict[str, float]:
    described = network.describe()
    function = network.graph.steps / function_seconds(network, 3)
    cycle = network.graph.steps / seconds(with_timing(network, "cycle"), 3)
    memory = footprint(network.graph, network.inputs, network.mapping)["rss_mib"]
    figures = ("neurons", "synapses", "spikes_per_step", "synops_per_step")
    point = {key: described[key] for key in figures} | {"function": function, "cycle": cycle, "rss_mib": memory}
    return point | {"kind": kind}  # type: ignore[dict-item]


def draw(sizes: list[dict[str, float]], firing: list[dict[str, float]], path: Path) -> None:
    """Steps a second and memory against neurons, synapses and spikes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    names = {"neurons": "neurons", "synapses": "synapses", "spikes_per_step": "spikes a step"}
    for column, (key, title) in enumerate(names.items()):
        for kind, marker in (("dense", "o"), ("conv", "s")):
            points = sorted((p for p in sizes if p["kind"] == kind), key=lambda p: p[key])  # type: ignore[comparison-overlap]
            x = [point[key] for point in points]
            for row, keys in ((0, ("function", "cycle")), (1, ("rss_mib",))):
                for figure_of, style in zip(keys, ("-", "--"), strict=False):
                    label = f"{kind}, {figure_of}" if row == 0 else kind
                    axes[row, column].plot(x, [p[figure_of] for p in points], style, marker=marker, label=label)
        for row in (0, 1):
            axes[row, column].set(xscale="log", xlabel=title)
            axes[row, column].grid(alpha=0.3)
        axes[0, column].set_yscale("log")
    axes[1, 2].clear()
    axes[1, 2].plot([p["spikes"] for p in firing], [p["seconds"] * 1e6 for p in firing], "o-")
    axes[1, 2].set(xlabel="spikes a step, 1 % to 50 % firing of one network", ylabel="microseconds a step")
    axes[1, 2].grid(alpha=0.3)
    axes[0, 0].set_ylabel("steps a second, one thread")
    axes[1, 0].set_ylabel("peak memory, MiB")
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def show(rows: list[Row]) -> None:
    """The table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="chip simulator", title_justify="left")
    for heading in ("what", "network"):
        table.add_column(heading, overflow="fold")
    for heading in ("ours", "peer", "unit", "ratio", "must", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        verdict = "[green]held[/]" if row.held else "[red]MISSED[/]"
        figures = (
            (f"{row.ours:,.3g}", f"{row.peer:,.3g}") if row.ours < 1000 else (f"{row.ours:,.0f}", f"{row.peer:,.3g}")
        )
        table.add_row(row.what, row.network, *figures, row.unit, f"{row.ratio:,.3g}", f"{row.must:.3g}", verdict)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps and smaller networks; figures are rough")
    parser.add_argument("--json", type=Path, help="write the rows and the curves here")
    parser.add_argument("--plot", type=Path, help="draw the curves here")
    options = parser.parse_args()
    times: list[StepTime] = []
    try:
        rows = [*speed_rows(options.quick, times), *memory_rows(options.quick), *synop_rows()]
    except BackendUnavailableError as error:
        print(f"bench-chip: {error}", file=sys.stderr)
        return 2
    firing = firing_curve()
    rows += growth_rows(firing)
    show(rows)
    print("mean time of a chip step, as the models say:")
    for row in times:
        print(f"  {row.network:6} {row.model:7} {row.ours_ns:12,.1f} ns    {row.peer:17} {row.peer_ns:12,.1f} ns")
    if options.json or options.plot:
        sizes = size_curve(options.quick)
        if options.json:
            lines = [asdict(row) | {"held": row.held} for row in rows]
            write_json(
                options.json,
                {"rows": lines, "step_times": [asdict(row) for row in times], "firing": firing, "sizes": sizes},
            )
        if options.plot:
            draw(sizes, firing, options.plot)
    return 0 if all(row.held for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
