"""What a user sees in the terminal: progress bars while a stage works, and the tables at its end."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from spikeport.deploy.chip import Chip
from spikeport.deploy.doctor import Finding
from spikeport.deploy.energy import constants
from spikeport.deploy.mapping import Mapping
from spikeport.deploy.placement import Hops
from spikeport.deploy.progress import TrainingView, epoch_line
from spikeport.deploy.report import core_name, count, energy, microseconds, percent, rule_name, waited_for
from spikeport.deploy.summary import Cost, Summary
from spikeport.models.checkpoint import Epoch, best_epoch

CORES_LISTED = 40
STATE_STYLE = {"ok": "green", "limited": "yellow", "missing": "red", "note": "blue"}


EPOCHS_SHOWN = 8
POPULATIONS_SHOWN = 12
DEAD_SHARE_SHOWN_RED = 0.5
SECONDS_BETWEEN_LINES = 15.0
"""How often a task with a unit tells how far it is where bars cannot be drawn."""


class RateColumn(ProgressColumn):
    """Units a second of a task that names its unit."""

    def render(self, task: Task) -> Text:
        speed, unit = task.finished_speed or task.speed, task.fields["unit"]
        return Text(rate(speed, unit) if speed and unit else "", style="progress.data.speed")


def rate(speed: float, unit: str) -> str:
    """So many units a second; a decimal where there are few."""
    return f"{speed:,.{0 if speed >= 10 else 1}f} {unit}/s"


class ConsoleProgress:
    """Progress bars on a terminal; plain lines where the output is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def task(self, title: str, total: int, unit: str = "") -> Iterator[Callable[..., None]]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        if not self.console.is_terminal:
            yield self._lines(title, total, unit)
            return
        with Progress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(title, total=total, note="", unit=unit)

            def advance(done: float, note: str | None = None) -> None:
                if note is None:
                    bars.update(task, completed=done)
                else:
                    bars.update(task, completed=done, note=note)

            yield advance

    def _lines(self, title: str, total: int, unit: str) -> Callable[..., None]:
        """Where bars cannot be drawn, each new note (an epoch's result) becomes a line; a task with a unit tells now
        and then how far it is."""
        last, started = "", time.monotonic()
        told = started

        def advance(done: float, note: str | None = None) -> None:
            nonlocal last, told
            now = time.monotonic()
            if note and note != last:
                last = note
                self.say(f"{title}: {note}")
            elif unit and 0 < done < total and now - told >= SECONDS_BETWEEN_LINES:
                told = now
                speed = done / (now - started)
                left = f"{(total - done) / speed:,.0f} s left"
                self.say(f"{title}: {done:,.0f} of {total:,} {unit}, {rate(speed, unit)}, {left}")

        return advance

    @contextmanager
    def training(self, batches: int, epochs: int) -> Iterator[TrainingView]:
        if not self.console.is_terminal:
            yield _TrainingLines(self, epochs)
            return
        view = _TrainingTable(self.console, batches, epochs)
        with Live(console=self.console, get_renderable=view.render, refresh_per_second=4, transient=True):
            yield view

    def say(self, text: str) -> None:
        self.console.print(f"  {escape(text)}", highlight=False, soft_wrap=True)


class _TrainingLines:
    """A line for each epoch."""

    def __init__(self, progress: ConsoleProgress, epochs: int) -> None:
        self.progress, self.epochs = progress, epochs

    def advance(self, done: int) -> None:
        return None

    def epoch(self, epoch: Epoch) -> None:
        self.progress.say(f"epoch {epoch.epoch} of {self.epochs}: {epoch_line(epoch)}")


class _TrainingTable:
    """The last epochs, the populations after the last of them, and a bar; drawn anew as training goes on."""

    def __init__(self, console: Console, batches: int, epochs: int) -> None:
        self.console, self.epochs = console, epochs
        self.history: list[Epoch] = []
        columns = (
            SpinnerColumn(),
            TextColumn("train"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            RateColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console)
        self.task = self.bar.add_task("train", total=batches, unit="batches")
        self.resumed = False

    def advance(self, done: int) -> None:
        if not self.resumed:
            # what an earlier part of the training did says nothing about the time that is left
            self.bar.reset(self.task, completed=done)
            self.resumed = True
        self.bar.update(self.task, completed=done)

    def epoch(self, epoch: Epoch) -> None:
        self.history.append(epoch)

    def render(self) -> Group:
        if not self.history:
            return Group(self.bar)
        return Group(epoch_table(self.history, self.epochs), population_table(self.history[-1]), self.bar)


def epoch_table(history: list[Epoch], epochs: int) -> Table:
    """The last epochs, the best so far in bold."""
    table = Table(title=f"epoch {history[-1].epoch} of {epochs}", title_justify="left")
    for heading in ("epoch", "loss", "validation", "firing", "dead", "spikes a sample"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = best_epoch(history)
    for epoch in history[-EPOCHS_SHOWN:]:
        firing, dead = (list(values.values()) or [0.0] for values in (epoch.firing_rate, epoch.dead_share))
        table.add_row(
            f"{epoch.epoch}",
            f"{epoch.loss:.4g}",
            percent(epoch.validation_accuracy),
            percent(sum(firing) / len(firing), 1),
            percent(sum(dead) / len(dead), 1),
            short(epoch.spikes_per_sample),
            style="bold" if epoch is best else None,
        )
    return table


def population_table(epoch: Epoch) -> Table:
    """How much each population fires; of many the first ones, and how many there are beside them."""
    table = Table(title="populations, on validation", title_justify="left")
    table.add_column("population", no_wrap=True)
    for heading in ("firing", "silent in a sample", "dead"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in list(epoch.firing_rate)[:POPULATIONS_SHOWN]:
        dead = epoch.dead_share[name]
        style = "red" if dead > DEAD_SHARE_SHOWN_RED else None
        values = (epoch.firing_rate[name], epoch.silent_share[name], dead)
        table.add_row(escape(name), *(percent(value, 1) for value in values), style=style)
    if (more := len(epoch.firing_rate) - POPULATIONS_SHOWN) > 0:
        table.caption = f"and {more} more"
    return table


def show_quantization(console: Console, found: dict[str, Any]) -> None:
    """What quantisation did to each population (`quantize.json`)."""
    measured = found.get("sensitivity")
    table = Table(title=f"{found['weight_bits']}-bit weights: error of each population in %", title_justify="left")
    table.add_column("population", no_wrap=True)
    for column in ("weights", "currents", "spikes", "decays", "vth", *(("alone", "others") if measured else ())):
        table.add_column(column, justify="right", no_wrap=True)
    accuracies = {each["population"]: each for each in measured["populations"]} if measured else {}
    for layer in found["layers"]:
        decays = max(layer["current_decay_error"], layer["voltage_decay_error"])
        shares = [layer["weight_error"], layer["current_error"], layer["spike_error"], decays, layer["threshold_error"]]
        if measured:
            each = accuracies[layer["population"]]
            shares += [each["alone"], each["without"]]
        table.add_row(escape(layer["population"]), *(f"{100 * share:.2f}" for share in shares))
    console.print(table)
    console.print(
        f"On {found['samples']:,} training samples. weights, currents: root mean square error over root mean square. "
        "spikes: neuron-steps that differ. decays: largest difference in the share of u or v that survives a step.",
        style="dim",
    )
    if measured:
        console.print(
            f"alone, others: accuracy on {measured['samples']:,} validation samples with this population alone in "
            f"integers, and with all others in integers; {percent(measured['float_accuracy'])} with none, "
            f"{percent(measured['integer_accuracy'])} with all.",
            style="dim",
        )


def show_summary(console: Console, summary: Summary) -> None:
    """The table at the end of a run."""
    accuracy = summary.accuracy
    table = Table(
        title=f"{escape(summary.name)}: {escape(rule_name(summary))}", title_justify="left", show_header=False
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("network", f"{escape(summary.training.architecture)}, {summary.training.steps} steps")
    parts = [f"{name} {percent(value.accuracy)}" for name, value in (
        ("float", accuracy.float), ("quantised", accuracy.quantized), ("simulated", accuracy.simulated))]  # fmt: skip
    table.add_row("test accuracy", f"{', '.join(parts)}  ({accuracy.float.samples:,} samples)")
    if accuracy.lava is not None:
        table.add_row("on Lava", f"{percent(accuracy.lava.accuracy)}  (first {accuracy.lava.samples:,} test samples)")
    if accuracy.loihi2 is not None:
        board = accuracy.loihi2
        table.add_row("on Loihi 2", f"{percent(board.accuracy)}  (first {board.samples:,} test samples)")
    for pair in summary.comparisons:
        name = f"{pair.first} = {pair.second}?"
        if pair.mismatches is None:
            table.add_row(name, f"[yellow]skipped[/]: {escape(pair.skipped or '')}")
        else:
            verdict = "[green]yes[/]" if pair.differing == 0 else "[red]NO[/]"
            text = f"{verdict}, {pair.mismatches:,} of {pair.compared:,} neuron-steps differ ({pair.spikes:,} spikes)"
            if pair.membranes:
                text += f", {pair.membrane_mismatches:,} of {pair.membranes:,} last membranes"
            table.add_row(name, text)
    total = sum(check.counted for check in summary.synop_checks)
    agree = all(check.counted == check.derived for check in summary.synop_checks)
    verdict = "[green]equal to[/]" if agree else "[red]NOT equal to[/]"
    table.add_row("synaptic ops", f"{total:,} counted, {verdict} those of the torch trace")
    per_inference = sum(layer.synops_per_inference for layer in summary.layers)
    dense = summary.reference.dense_macs
    table.add_row("per inference", f"{count(per_inference)} synaptic ops beside {count(dense)} dense MACs")
    chip = summary.chip
    chips = "1 chip" if chip.chips == 1 else f"{chip.chips} chips"
    table.add_row("chip", f"{escape(chip.title)}: {chip.cores_used} of {chip.cores_available} cores, {chips}")
    table.add_row("time (model)", _time_line(summary.cost))
    table.add_row("steps wait for", _waits_line(summary))
    table.add_row("energy (model)", _energy_line(summary.cost))
    if summary.other_cost is not None:
        table.add_row("other constants", f"{_energy_line(summary.other_cost)}; {_time_line(summary.other_cost)}")
    console.print(table)
    console.print(_layer_table(summary))


def _time_line(cost: Cost) -> str:
    ticks = f"{cost.cycles_per_inference:,.0f} ticks of {cost.tick_ns:g} ns"
    each = microseconds(cost.time_us_per_inference)
    model = f"{cost.timing_model} model, {cost.timing_samples:,} samples"
    return f"{ticks} = {each} per inference, latency {microseconds(cost.latency_us)} ({model})"


def _waits_line(summary: Summary) -> str:
    """The largest causes of the steps' time, and the core that most steps wait for."""
    causes = summary.cost.step_time_by_cause
    whole = sum(causes.values()) or 1.0
    largest = sorted(causes.items(), key=lambda item: -item[1])[:3]
    parts = [f"{escape(cause)} {percent(value / whole, 1)}" for cause, value in largest if value > 0]
    for core in waited_for(summary, 1):
        name = f"core {core_name(summary, core)} ({escape(core.population)})"
        parts.append(f"{percent(core.critical_share, 1)} of the steps for {name}")
    return ", ".join(parts) or "nothing"


def _energy_line(cost: Cost) -> str:
    band = f"{energy(cost.energy_low_nj)} to {energy(cost.energy_high_nj)}"
    return f"{energy(cost.energy_nj_per_inference)} per inference ({band}), {escape(cost.title)}"


def _layer_table(summary: Summary) -> Table:
    table = Table(title="layers, per inference", title_justify="left")
    table.add_column("population", no_wrap=True)
    for heading in ("neurons", "synapses", "spikes", "silent", "synops", "MACs", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in summary.layers:
        figures = (layer.neurons, layer.synapses, layer.spikes_per_inference)
        operations = (layer.synops_per_inference, layer.dense_macs_per_inference)
        table.add_row(
            escape(layer.name),
            *(short(value) for value in figures),
            percent(layer.silent_share, 1),
            *(short(value) for value in operations),
            percent(layer.spike_error),
        )
    table.caption = "synops: synaptic operations. MACs: dense. error: neuron-steps that quantisation changed."
    table.caption_justify = "left"
    return table


def show_mapping(console: Console, mapping: Mapping, chip: Chip, hops: Hops, every_core: bool = False) -> None:
    """What each core uses of each limit, in the order of populations, and the weighted hops of the placement.

    Of more than CORES_LISTED cores only the fullest one of each population and limit, unless `every_core` asks for all.
    """
    limits = chip.limits.items()
    headings = [name.removeprefix("synaptic_").replace("_", " ") for name in limits]
    listed = every_core or len(mapping.cores) <= CORES_LISTED
    table = Table(title=f"{escape(chip.title)}: use of each core", title_justify="left", box=None, padding=(0, 2, 0, 0))
    if listed:
        for heading in ("chip", "core", "tile"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("population", no_wrap=True)
    else:
        table.title = f"{escape(chip.title)}: fullest core of each population (chip.core)"
        table.add_column("population", no_wrap=True)
        table.add_column("cores", justify="right", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    if listed:
        for core in mapping.cores:
            place = (str(core.chip), str(core.core), f"{core.tile_x},{core.tile_y}", escape(core.population))
            table.add_row(*place, *(_used(core.use[name], limit) for name, limit in limits.items()))
    else:
        for population in mapping.orders:
            cores = [core for core in mapping.cores if core.population == population]
            cells = []
            for name, limit in limits.items():
                fullest = max(cores, key=lambda core: core.use[name])
                cells.append(f"{_used(fullest.use[name], limit)}\n[dim]{fullest.chip}.{fullest.core}[/]")
            table.add_row(escape(population), f"{len(cores):,}", *cells)
    limit_texts = [
        f"{limit:,.0f} {heading}" if math.isfinite(limit) else f"{heading}: no limit published"
        for heading, limit in zip(headings, limits.values(), strict=True)
    ]
    console.print(table)
    more = "" if listed else " `spikeport map --all` lists every core."
    console.print(f"A core has {', '.join(limit_texts)}.{more}", highlight=False)
    sizes = {"core": len(mapping.cores), "tile": mapping.tiles, "chip": mapping.chips}
    on_cores, on_tiles, on_chips = (f"{n:,} {unit}{'' if n == 1 else 's'}" for unit, n in sizes.items())
    console.print(
        f"{on_cores} on {on_tiles} of {on_chips}. Weighted hops if every neuron fires once: {hops.placed:,.0f} "
        f"({hops.greedy:,.0f} filled in order, {hops.random:,.0f} at random).",
        highlight=False,
    )


def _used(used: int, limit: float) -> str:
    """A use with its share of the limit."""
    return f"{used:,} [dim]{used / limit:4.0%}[/]" if math.isfinite(limit) else f"{used:,}"


def short(value: float) -> str:
    """A count in at most five characters and a unit: 950, 12.3 k, 4.57 M."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= scale:
            return f"{value / (1e3 if unit == 'k' else scale):.3g} {unit}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show_findings(console: Console, findings: list[Finding]) -> None:
    """The doctor's table."""
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_column()
    for finding in findings:
        style = STATE_STYLE[finding.state]
        advice = f"\n{escape(finding.advice)}" if finding.advice else ""
        table.add_row(escape(finding.name), f"[{style}]{finding.state}[/]", escape(finding.detail) + advice)
    console.print(table)


def show_chips(console: Console, chips: list[Chip]) -> None:
    """The built-in chips with the limits that matter for mapping."""
    table = Table()
    table.add_column("chip", style="bold", no_wrap=True)
    for heading in ("cores", "neurons", "words", "axons in", "axons out", "bits"):
        table.add_column(heading, justify="right", no_wrap=True)
    for chip in chips:
        limits = chip.limits.items()
        per_core = (limits[key] for key in ("neurons", "synaptic_words", "axons_in", "axons_out"))
        figures = (f"{value:,.0f}" if math.isfinite(value) else "?" for value in per_core)
        table.add_row(escape(chip.name), f"{chip.cores:,}", *figures, str(chip.supports.message_bits))
    table.caption = (
        "Per core: neurons, 64-bit words of synaptic memory, axons (?: not published). Bits a spike carries."
    )
    table.caption_justify = "left"
    console.print(table)
    for chip in chips:
        console.print(f"{escape(chip.name)}: {escape(chip.title)}", highlight=False)


def show_chip(console: Console, chip: Chip) -> None:
    """Every constant of a chip with its band and its source."""
    table = Table(title=escape(chip.title), title_justify="left")
    table.add_column("constant", style="bold")
    for heading in ("value", "low", "high"):
        table.add_column(heading, justify="right")
    table.add_column("kind")
    table.add_column("source")
    for row in constants(chip, chip.mesh.columns * chip.mesh.rows):
        figures = (f"{value:g} {row.unit}" for value in (row.value, row.low, row.high))
        table.add_row(escape(row.quantity), *figures, row.kind, escape(row.source))
    console.print(table)
