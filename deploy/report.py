"""`report.html`: one self-contained page with every figure and table of a run. It opens offline and runs no script.

Text from recipes, class names and files is escaped by Jinja (autoescape) and by the SVG writer; a content security
policy in the page forbids scripts and every load from outside, should anything get past that.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from spikeport.deploy.drawing import significant
from spikeport.deploy.figures import draw
from spikeport.deploy.summary import CoreUse, Cost, Summary
from spikeport.deploy.trace import Trace
from spikeport.models.errors import SpikeportError
from spikeport.models.files import write_text


@dataclass(frozen=True)
class Published:
    """A measurement from the literature, shown for the order of magnitude and never as a validation."""

    network: str
    platform: str
    energy: str
    time: str
    accuracy: str
    source: str


_RENNER = "Renner et al. 2024, Nat. Commun., s41467-024-53827-9, Table 1"
_BLOUW = "Blouw et al. 2018, arXiv:1812.01739"

PUBLISHED = (
    Published("MNIST MLP 400-400-10", "Loihi", "2.5 µJ", "0.17 ms", "96.3 %", _RENNER),
    Published("MNIST 1920-10", "Loihi", "12.8 µJ", "", "96.4 %", f"Lin et al. 2018, in {_RENNER}"),
    Published("MNIST CNN-CNN-100-10", "Loihi", "2.47 mJ", "10 ms", "94.7 %", f"Shrestha et al. 2021, in {_RENNER}"),
    Published("keyword spotter 2×256", "Loihi", "0.27 mJ", "", "", _BLOUW),
    Published("keyword spotter 2×256", "Movidius", "1.5 mJ", "", "", _BLOUW),
    Published("keyword spotter 2×256", "Jetson TX1", "5.6 mJ", "", "", _BLOUW),
    Published("keyword spotter 2×256", "CPU", "6.3 mJ", "", "", _BLOUW),
    Published("keyword spotter 2×256", "GPU", "29.8 mJ", "", "", _BLOUW),
    Published(
        "PilotNet LIF",
        "Loihi 2",
        "1.661 mJ (1.094 mJ dynamic)",
        "408.9 frames/s",
        "",
        "lava-dl, pilotnet_snn/benchmark.ipynb",
    ),
)


MODELS = {
    "simple": "sums of each core's work: a step lasts as long as its slowest unit, the network is free",
    "cycle": "every packet through queues, routers and links",
}
"""The timing models of `docs/chip-timing.md` in a line."""

CAUSES = {
    "input": "the host sends the input spikes that the step waits for",
    "messages in": "synapse units look up what arriving packets lead to",
    "synapses": "synapse units work on synaptic operations",
    "neurons": "neuron units visit and update their neurons",
    "spikes out": "neuron units emit spikes and look up where they go",
    "network": "packets travel, or wait for a router, a link or a synapse unit; neuron units wait for room to send",
    "barrier": "all cores wait for each other at the end of every step",
}
"""What the time of a step goes to, in a line each."""

CORES_LISTED = 256


def write_report(summary: Summary, trace: Trace | None, path: Path, sample: int = 0) -> None:
    """Write the report of a run to `path`.

    Args:
        summary: every figure of the run.
        trace: spikes for the raster; without it the page says that there is no raster.
        path: the HTML file.
        sample: which sample of `trace` the raster shows.

    Raises:
        SpikeportError: the trace has no such sample, or `path` cannot be written.
    """
    if trace is not None and not 0 <= sample < trace.samples:
        raise SpikeportError(
            f"sample {sample} is not in the {trace.backend} trace, which has the samples 0 to {trace.samples - 1}."
        )
    write_text(path, render(summary, trace, sample))


def render(summary: Summary, trace: Trace | None, sample: int = 0) -> str:
    """The page as text. The same input gives the same bytes."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "count": count,
        "number": number,
        "significant": significant,
        "percent": percent,
        "energy": energy,
        "microseconds": microseconds,
    }
    text = files("spikeport.deploy").joinpath("templates", "report.html.j2").read_text(encoding="utf-8")
    drawings = {key: Markup(svg) for key, svg in draw(summary, trace, sample).items()}
    return environment.from_string(text).render(
        s=summary,
        trace=trace,
        sample=sample,
        figures=drawings,
        verdict=verdict(summary),
        rule=rule_name(summary),
        decision=decision(summary),
        pairs_run=[pair for pair in summary.comparisons if pair.mismatches is not None],
        pairs_skipped=[pair for pair in summary.comparisons if pair.mismatches is None],
        costs=[summary.cost, *([summary.other_cost] if summary.other_cost else [])],
        constants_of=constants_of,
        published=PUBLISHED,
        models=MODELS,
        causes=CAUSES,
        core_name=core_name,
        waited_for=waited_for(summary),
        busiest_link=busiest_link(summary),
        core_energy={share.name: share for share in summary.cost.by_core},
        cores_listed=summary.chip.cores[:CORES_LISTED],
    )


@dataclass(frozen=True)
class Verdict:
    """What the checks said: `kind` is passed, failed or unchecked; then one line, and one more for each failure."""

    kind: str
    line: str
    failures: tuple[str, ...]


def verdict(summary: Summary) -> Verdict:
    """The verdict over the backend comparisons and the synaptic operation checks."""
    failed = tuple(summary.checks_failed)
    run = sum(pair.mismatches is not None for pair in summary.comparisons) + len(summary.synop_checks)
    skipped = sum(pair.mismatches is None for pair in summary.comparisons)
    left_out = f"; {skipped} not run" if skipped else ""
    if failed:
        return Verdict("failed", f"{len(failed)} of {run} checks failed{left_out}", failed)
    if not run:
        return Verdict("unchecked", f"No check was run{left_out}", ())
    return Verdict("passed", f"All {run} checks passed{left_out}", ())


def decision(summary: Summary) -> str:
    """How decisions are read, as the page says it; empty for a run that did not record it."""
    it = summary.readout
    if it is None:
        return ""
    match it.kind:
        case "count":
            read = f"the class whose neuron in {it.population} fires most spikes wins"
        case "psc":
            read = (
                f"the class with the largest sum over time of the spikes of {it.population}, filtered with the factor "
                f"{significant(it.keep)} a step, wins"
            )
        case "first_spike":
            read = f"the class whose neuron in {it.population} fires first wins"
        case "membrane":
            read = (
                f"{it.population} integrates and never fires; the class with the highest membrane potential after the "
                "last step of a sample wins, so that there is no decision after fewer steps"
            )
    return f"{read}. Ties go to the lower class."


def rule_name(summary: Summary) -> str:
    """The learning rule as the page names it; a rule known from an abstract only is called a reconstruction."""
    training = summary.training
    return training.rule_title or f"{training.rule.upper()}{' (reconstructed)' if training.reconstruction else ''}"


def constants_of(cost: Cost) -> str:
    """How the page names a set of constants."""
    return f"{cost.title} ({cost.chip})"


def core_name(summary: Summary, core: CoreUse) -> str:
    """A core's number, with its chip's in front where there are several."""
    return f"{core.chip}:{core.core}" if summary.chip.chips > 1 else str(core.core)


def waited_for(summary: Summary, most: int = 6) -> list[CoreUse]:
    """The cores that most chip steps waited for, each at least once."""
    cores = sorted(summary.chip.cores, key=lambda core: -core.critical_share)
    return [core for core in cores[:most] if core.critical_share > 0]


def busiest_link(summary: Summary) -> str:
    """Which link of the mesh is taken for the largest share of the time; empty where no packet moved on one."""
    shares = [
        (share, -tile.tile_y, -tile.tile_x, way)
        for tile in summary.chip.tiles
        for share, way in zip(tile.link_share, ("east", "west", "south", "north"), strict=True)
    ]
    share, y, x, way = max(shares, default=(0.0, 0, 0, ""))
    if share <= 0:
        return ""
    chip, column = divmod(-x, summary.chip.mesh[0])
    on = f" of chip {chip}" if summary.chip.chips > 1 else ""
    return f"the one from tile {column}, {-y}{on} to the {way}, {percent(share, 1)} of the time"


def count(value: float) -> str:
    """A count or a mean count with thousands separators."""
    if value == int(value) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if value >= 10 else significant(value)


def number(value: float) -> str:
    """A constant as its source gives it: no digits lost, none added."""
    return f"{value:.10g}"


def percent(share: float, digits: int = 2) -> str:
    """A share (0..1) in per cent."""
    return f"{100 * share:.{digits}f} %"


def energy(nanojoule: float) -> str:
    """An energy with the fitting unit."""
    for scale, unit in ((1e6, "mJ"), (1e3, "µJ"), (1.0, "nJ")):
        if abs(nanojoule) >= scale:
            return f"{significant(nanojoule / scale)} {unit}"
    return "0 nJ" if nanojoule == 0 else f"{significant(nanojoule * 1e3)} pJ"


def microseconds(value: float) -> str:
    """A time with the fitting unit."""
    return f"{significant(value / 1e3)} ms" if value >= 1e3 else f"{significant(value)} µs"
