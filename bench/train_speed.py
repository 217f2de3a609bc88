"""Speed, memory and growth of the trainer beside snnTorch and SpikingJelly: `make bench-train`.

Every network trains from the same weights on the same spikes, encoded as its recipe has it, with the same neuron,
batch, precision, optimizer and number of threads; the firing rates of all populations are compared before a time is
used. Each timing is a process of its own. Processes take turns, and a ratio is the median of the ratios of neighbouring
ones. Prints a table, and stores it with the curves and everything measured. Exit status 1 where a must is missed, 2
where a peer is not there or cannot be compared.

Both sides train in bfloat16 (torch.autocast) and in float32. The musts are of bfloat16, which all recipes train in; the
ratios in float32, and against a peer in whichever precision is faster for it, stand beside them. So do the ratios of
one network on binary spikes instead of graded ones, and those against snnTorch with the first layer taken out of its
loop: graded frames are the same at every step, and ours (and SpikingJelly here) takes them through that layer once.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from train_step import ARCHITECTURES, ENCODERS, PEAK_RESET, Job

from spikeport.models.files import write_json, write_text

K = TypeVar("K", bound=Hashable)

HERE = Path(__file__).resolve().parent
PEERS_PYTHON = HERE.parent / ".venv-interop" / "bin" / "python"

OURS = ("csbp", "stbp", "tssl")
HELD = ("csbp", "stbp")
"""The slower of these two stands for ours where a must is held."""
PEERS = {"snntorch": 3.0, "snntorch once": None, "spikingjelly rectangle": 1.2, "spikingjelly triangle": 1.2}
"""Must for each peer: how many times as fast ours is; None for a report."""
NAMES = {
    "snntorch": "snnTorch 1.0.0 Leaky",
    "snntorch once": "snnTorch 1.0.0 Leaky, first layer once",
    "spikingjelly rectangle": "SpikingJelly 2.0.0 LIFNode, rectangle",
    "spikingjelly triangle": "SpikingJelly 2.0.0 LIFNode, triangle",
}
PRECISIONS = ("bfloat16", "float32")
"""The musts are of the first."""
REPORTED = ("fashion-fc-rate",)
"""Networks without a must: no recipe has their encoder."""

GROWTH_STEPS = (5, 10, 20, 50, 100)
RATE_STEPS = (5, 20, 50)
MEMORY_STEPS = 20
AT_MOST_LINEAR = 1.1
"""Largest exponent of the power law through the times that still counts as linear."""
RATES_DIFFER = {"float32": 0.02, "bfloat16": 0.1}
"""Largest relative difference of two firing rates: sums in another order move a few spikes, and those move others; in
bfloat16 the peers' membranes are rounded as well."""


class ComparisonError(Exception):
    """A peer that is not there, or that runs another network than ours."""


@dataclass(frozen=True)
class Row:
    """One line of the table. ratio: how many times better than the other; must: at least this, None for a report."""

    what: str
    network: str
    ours: float
    other: float
    unit: str
    ratio: float
    must: float | None = None

    @property
    def held(self) -> bool:
        return self.must is None or self.ratio >= self.must


@dataclass
class Bench:
    """The processes of a run, and everything that they measured."""

    threads: int
    rounds: int
    warm_up: int
    counted: int
    measured: list[dict[str, Any]] = field(default_factory=list)

    def job(self, network: str, variant: str, **changes: Any) -> Job:
        job = Job(network, variant, threads=self.threads, warm_up=self.warm_up, counted=self.counted)
        return replace(job, **changes)

    def run(self, job: Job, *more: str) -> dict[str, Any]:
        """What the process of a job prints. Raises ComparisonError where there is no such peer, or it fails."""
        peer = job.variant in PEERS
        if peer and not PEERS_PYTHON.exists():
            raise ComparisonError("there is no .venv-interop; run `make setup-interop`, which says why.")
        python, script = (PEERS_PYTHON, "train_peers.py") if peer else (sys.executable, "train_ours.py")
        done = subprocess.run(
            [str(python), str(HERE / script), json.dumps(asdict(job)), *more],
            env=os.environ | {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ComparisonError(f"{job.network}, {job.variant}: exit status {done.returncode}: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout)
        self.measured.append(asdict(job) | found)
        print(f"  {_what(job)}: {_short(found)}", flush=True)
        return found

    def in_turn(self, jobs: dict[K, Job]) -> dict[K, list[dict[str, Any]]]:
        """Run all jobs once a round, every second round in the opposite order; the rounds of each."""
        found: dict[K, list[dict[str, Any]]] = {name: [] for name in jobs}
        for number in range(self.rounds):
            for name in list(jobs)[:: 1 if number % 2 == 0 else -1]:
                found[name].append(self.run(jobs[name]))
        return found


def _what(job: Job) -> str:
    if job.network == "window":
        return f"window alone, {job.variant}"
    more = (f"T = {job.steps}", job.precision if job.precision != "float32" else "", "eager" if job.eager else "")
    return ", ".join(part for part in (job.network, job.variant, *more) if part)


def _short(found: dict[str, Any]) -> str:
    if "seconds" not in found:
        return ", ".join(f"T = {steps}: {seconds * 1e3:.4g} ms" for steps, seconds in found.items())
    return f"{found['seconds'] * 1e3:.4g} ms, {found['peak_mib']:.0f} MiB"


def step_rows(bench: Bench, networks: list[str]) -> Iterator[Row]:
    """A training step of each network at T = 5 under our rules, beside the peers, in both precisions."""
    for network in networks:
        peers = [peer for peer in PEERS if peer != "snntorch once" or ENCODERS[network] == "graded"]
        # ours between the peers: whatever else the machine does meets all
        order = [name for pair in itertools.zip_longest(peers, OURS) for name in pair if name]
        jobs = {(name, precision): bench.job(network, name, precision=precision)
                for precision in PRECISIONS for name in order}  # fmt: skip
        found = bench.in_turn(jobs)
        times = {job: _seconds(rounds) for job, rounds in found.items()}
        for precision in PRECISIONS:
            _same_network(network, precision, found)
            slowest = _each_round(max, [times[name, precision] for name in HELD])
            for peer in peers:
                what = f"training step in {precision}, against {NAMES[peer]}"
                held = precision == PRECISIONS[0] and network not in REPORTED
                yield _time_row(what, network, slowest, times[peer, precision], PEERS[peer] if held else None)
            for rule in OURS:
                fastest = _each_round(min, [times[peer, precision] for peer in peers])
                what = f"training step in {precision} under {rule}, against the fastest peer"
                yield _time_row(what, network, times[rule, precision], fastest)
            for peer in peers:
                what = f"peak memory in {precision}, against {NAMES[peer]}"
                yield _memory_row(what, network, found["csbp", precision], found[peer, precision])
        slowest = _each_round(max, [times[name, PRECISIONS[0]] for name in HELD])
        for peer in peers:
            fastest = _each_round(min, [times[peer, precision] for precision in PRECISIONS])
            what = f"training step in {PRECISIONS[0]}, against {NAMES[peer]} in its faster precision"
            yield _time_row(what, network, slowest, fastest)
        print(f"  {network}: firing rates, the input first: {_rates(found['csbp', 'float32'][0])}", flush=True)
        torches = {name: rounds[0]["torch"] for (name, _), rounds in found.items()}
        if len(set(torches.values())) > 1:
            raise ComparisonError(f"not the same torch everywhere: {torches}.")


def _same_network(network: str, precision: str, found: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """Raise ComparisonError where a population of a peer fires otherwise than ours."""
    ours = found["csbp", precision][0]["rates"]
    for peer in PEERS:
        if (peer, precision) not in found:
            continue
        theirs = found[peer, precision][0]["rates"]
        if not np.allclose(theirs, ours, rtol=RATES_DIFFER[precision], atol=0):
            raise ComparisonError(
                f"{network} in {precision}: populations of {NAMES[peer]} fire at {theirs}, ours at {ours}."
            )


def _each_round(choose: Callable[[Iterable[float]], float], times: list[list[float]]) -> list[float]:
    """The smallest or largest of several times in each round."""
    return [choose(of_round) for of_round in zip(*times, strict=True)]


def _rates(found: dict[str, Any]) -> str:
    return ", ".join(f"{rate:.3f}" for rate in found["rates"])


def _seconds(rounds: list[dict[str, Any]]) -> list[float]:
    return [each["seconds"] for each in rounds]


def _time_row(what: str, network: str, ours: list[float], other: list[float], must: float | None = None) -> Row:
    """Medians in milliseconds; the ratio is the median of the rounds' ratios."""
    ratio = statistics.median(b / a for a, b in zip(ours, other, strict=True))
    return Row(what, network, statistics.median(ours) * 1e3, statistics.median(other) * 1e3, "ms", ratio, must)


def _memory_row(what: str, network: str, ours: list[dict[str, Any]], other: list[dict[str, Any]]) -> Row:
    """Peaks of whole processes. What a step alone takes cannot be told: ours keeps what earlier passes have freed."""
    a, b = (statistics.median(each["peak_mib"] for each in rounds) for rounds in (ours, other))
    return Row(what, network, a, b, "MiB", b / a)


def memory_rows(bench: Bench, networks: list[str]) -> Iterator[Row]:
    """Peaks of compiled and eager windows, at a T where the tensors outweigh what differs from process to process."""
    for network in networks:
        for rule in HELD:
            job = bench.job(network, rule, steps=MEMORY_STEPS, warm_up=1, counted=2)
            ours, eager = (bench.run(replace(job, eager=each))["peak_mib"] for each in (False, True))
            name = f"{network}, T = {MEMORY_STEPS}"
            yield Row(f"peak memory under {rule}, against the eager version", name, ours, eager, "MiB",
                      eager / ours, 1)  # fmt: skip


def growth_rows(bench: Bench, all_steps: tuple[int, ...], points: list[dict[str, float | str]]) -> Iterator[Row]:
    """How the time of a step, and of a window alone, grows with T; and rates beside BPTT. What it draws: `points`."""
    network = "mnist"
    rates = [steps for steps in RATE_STEPS if steps in all_steps]
    for steps in all_steps:
        rules = [*HELD, *(["rate_bp"] if steps in rates else [])]
        found = bench.in_turn({rule: bench.job(network, rule, steps=steps) for rule in rules})
        for rule, rounds in found.items():
            memory = statistics.median(each["peak_mib"] for each in rounds)
            points.append({"rule": rule, "steps": steps, "seconds": statistics.median(_seconds(rounds)),
                           "peak_mib": memory})  # fmt: skip
        if "rate_bp" in found:
            name = f"{network}, T = {steps}"
            ours, other = found["rate_bp"], found["stbp"]
            yield _time_row("rate_bp, against BPTT (claimed: about two)", name, _seconds(ours), _seconds(other))
            yield _memory_row("peak memory under rate_bp, against BPTT", name, ours, other)
    for rule in HELD:
        times = [float(point["seconds"]) for point in points if point["rule"] == rule]
        yield _exponent_row(f"growth of a step with T under {rule}: exponent", network, all_steps, times)
    texts = [str(steps) for steps in all_steps]
    for rule in HELD:
        alone = [bench.run(bench.job("window", rule), *texts) for _ in range(bench.rounds)]
        times = [statistics.median(each[steps] for each in alone) for steps in texts]
        for steps, seconds in zip(all_steps, times, strict=True):
            points.append({"rule": f"{rule}, window alone", "steps": steps, "seconds": seconds})
        yield _exponent_row(f"growth of a window with T under {rule}: exponent", "100 x 15 x 24 x 24", all_steps, times)


def _exponent_row(what: str, network: str, all_steps: tuple[int, ...], times: list[float]) -> Row:
    exponent = float(np.polyfit(np.log(all_steps), np.log(times), 1)[0])
    return Row(what, network, exponent, 1.0, "", 1 / exponent, 1 / AT_MOST_LINEAR)


def draw(rows: list[Row], points: list[dict[str, float | str]], path: Path) -> None:
    """Ratios of time with their musts, and time of a step and peak memory against T."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (ratios, time, memory) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    beside = [row for row in rows if row.must is not None and row.unit == "ms"]
    labels = [f"{row.network}\n{row.what.rpartition('against ')[2]}" for row in beside]
    ratios.barh(labels, [row.ratio for row in beside], color="tab:blue")
    ratios.scatter([row.must for row in beside], labels, marker="|", s=200, color="tab:red", label="must", zorder=2)
    ratios.invert_yaxis()
    ratios.tick_params(axis="y", labelsize=7)
    ratios.set(xlabel=f"times as fast in {PRECISIONS[0]}, slower of csbp and stbp")
    ratios.legend(fontsize=8, loc="lower right")
    for rule in dict.fromkeys(str(point["rule"]) for point in points):
        own = [point for point in points if point["rule"] == rule]
        x = [point["steps"] for point in own]
        time.plot(x, [point["seconds"] for point in own], "o--" if "window" in rule else "o-", label=rule)
        if "peak_mib" in own[0]:
            memory.plot(x, [point["peak_mib"] for point in own], "o-", label=rule)
    time.set(xscale="log", yscale="log", xlabel="T", ylabel="seconds, MNIST network, batch 100")
    memory.set(xlabel="T", ylabel="peak memory of the process, MiB")
    ticks = sorted({int(point["steps"]) for point in points})
    time.set_xticks(ticks, [str(steps) for steps in ticks])
    time.minorticks_off()
    memory.set_ylim(bottom=0)
    for axes in (ratios, time, memory):
        axes.grid(alpha=0.3)
    time.legend(fontsize=8)
    memory.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def show(rows: list[Row]) -> None:
    """The table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="trainer", title_justify="left")
    for heading in ("what", "network"):
        table.add_column(heading, overflow="fold")
    for heading in ("ours", "other", "unit", "ratio", "must", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        verdict = "" if row.must is None else "[green]held[/]" if row.held else "[red]MISSED[/]"
        must = "" if row.must is None else f"{row.must:.3g}"
        table.add_row(row.what, row.network, f"{row.ours:,.4g}", f"{row.other:,.4g}", row.unit, f"{row.ratio:,.3g}",
                      must, verdict)  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def peers_ran(measured: list[dict[str, Any]]) -> list[str]:
    """What each peer's neurons ran, as sentences."""
    found = []
    for peer, name in NAMES.items():
        ran = sorted({function for each in measured if each["variant"] == peer for function in each["ran"]})
        if ran:
            found.append(f"{name} ran {', '.join(ran)}.")
    return found


def markdown(rows: list[Row], described: dict[str, Any], notes: list[str]) -> str:
    """The document of a run: what is compared, the table, and what ran."""
    lines = []
    for row in rows:
        verdict = "" if row.must is None else "yes" if row.held else "**no**"
        must = "" if row.must is None else f"{row.must:.3g}"
        cells = (row.what, row.network, f"{row.ours:,.4g}", f"{row.other:,.4g}", row.unit, f"{row.ratio:,.3g}", must)
        lines.append(f"| {' | '.join((*cells, verdict))} |")
    table = "\n".join(lines)
    machine_text = ", ".join(f"{key} {value}" for key, value in described.items())
    return f"""# Speed of the trainer

Written by `make bench-train`, which runs it again and exits with 1 where a must is missed. Machine: {machine_text}.

A step is encoding, forward and backward pass, the gradient's norm and the optimizer, on {Job.batch} images. Both
sides train the same network from the same weights on the same spikes, T = {Job.steps}, with the same number of
threads, each process alone on the machine and in turn with the others. Ours is the slower of csbp and stbp where no
rule is named; the peers train with BPTT and a rectangular or triangular surrogate. A ratio is the median of the
rounds' ratios, and larger is better. MNIST has binary spikes, Fashion-MNIST graded ones, as the recipes have it:
frames that are the same at every step. Our trainer takes them through the first layer once; so does SpikingJelly
here, and snnTorch in the rows that say "first layer once", while its loop over the whole network, as in its examples,
does so at every step. fashion-fc-rate is the network on binary spikes.

![ratios with their musts, time of a step and peak memory against T](train-speed.png)

| what | network | ours | other | unit | ratio | must | held |
| --- | --- | --- | --- | --- | --- | --- | --- |
{table}

{chr(10).join(f"- {note}" for note in notes)}
"""


def machine(bench: Bench) -> dict[str, Any]:
    """What the figures belong to; the load is of before the run."""
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    found = {"cpu": cpu, "cores": cores, "threads": bench.threads, "torch": torch.__version__, "load": round(load, 2)}
    print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    if load > 0.5:
        print(f"bench-train: the machine is loaded ({load:.1f} of {cores} cores); figures are rough.", file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of few steps, T to 20; figures are rough")
    parser.add_argument("--threads", type=int, default=2, help="threads of every process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each timing")
    parser.add_argument("--networks", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--store", type=Path, help="write PATH.json, PATH.md and PATH.png", metavar="PATH")
    options = parser.parse_args()
    if not PEAK_RESET.exists():
        parser.error("peaks of memory can be measured on Linux alone")
    bench = Bench(options.threads, options.rounds, 5, 15)
    all_steps = GROWTH_STEPS
    if options.quick:
        bench, all_steps = Bench(options.threads, 1, 2, 4), GROWTH_STEPS[:3]
    described = machine(bench)
    points: list[dict[str, float | str]] = []
    try:
        bench.run(bench.job("mnist", "csbp", warm_up=0, counted=1))  # compiles the windows where that is to be done
        bench.measured.clear()
        nets = [network for network in options.networks if network not in REPORTED]
        rows = [*step_rows(bench, options.networks), *memory_rows(bench, nets)]
        rows += growth_rows(bench, all_steps, points)
    except ComparisonError as error:
        print(f"bench-train: {error}", file=sys.stderr)
        return 2
    show(rows)
    code = statistics.median(each["code_mib"] for each in bench.measured if "code_mib" in each)
    notes = [
        *peers_ran(bench.measured),
        f"The machine code of the compiled windows takes {code:.0f} MiB once, in every peak of ours, eager ones too.",
        "Peak memory is the most that a process held during its steps, libraries included; ours loads a compiler.",
    ]
    print("\n".join(notes))
    if options.store:
        lines = [asdict(row) | {"held": row.held} for row in rows]
        found = {"machine": described, "rows": lines, "growth": points, "measured": bench.measured}
        write_json(options.store.with_suffix(".json"), found)
        write_text(options.store.with_suffix(".md"), markdown(rows, described, notes))
        draw(rows, points, options.store.with_suffix(".png"))
    # says by itself where there is no GPU
    gpu = subprocess.run([sys.executable, str(HERE / "gpu_windows.py")], check=False)
    return 0 if all(row.held for row in rows) and gpu.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
