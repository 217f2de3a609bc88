"""What `spikeport verify` shows: agreement layer by layer, and of the first difference the place, states and cause."""

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from spikeport.converters.graph import ProcessGraph
from spikeport.deploy.explain import Explanation, Side
from spikeport.deploy.replay import Place
from spikeport.deploy.verify import Comparison, Divergence, SynopComparison

STATE_ROWS = (
    ("incoming current", "current"),
    ("u before", "u_before"),
    ("u", "u"),
    ("v before", "v_before"),
    ("bias", "bias"),
    ("v at the threshold", "membrane"),
    ("threshold", "threshold"),
    ("spike", "spike"),
    ("v after", "v"),
)
"""In the order in which a step computes them."""


def show_comparison(console: Console, comparison: Comparison, graph: ProcessGraph) -> None:
    """A verdict and the table of layers; where the two differ, the first difference and why."""
    console.print(_layers(comparison))
    if comparison.divergence is not None:
        console.print(_place(comparison, comparison.divergence, graph))
        if comparison.divergence.explanation is not None:
            _show_explanation(console, comparison, comparison.divergence.explanation)
    console.print(_verdict(comparison), highlight=False)


def _verdict(comparison: Comparison) -> str:
    pair = f"{escape(comparison.first)} = {escape(comparison.second)}?"
    text = f"{comparison.mismatches:,} of {comparison.compared:,} neuron-steps differ"
    if comparison.membranes:
        text += f", {comparison.membrane_mismatches:,} of {comparison.membranes:,} last membranes"
    verdict = "[bold green]yes[/]" if comparison.equal else "[bold red]NO[/]"
    return f"[bold]{pair}[/] {verdict}, {text} ({comparison.samples:,} samples, {comparison.spikes:,} spikes)"


def _layers(comparison: Comparison) -> Table:
    first, second = escape(comparison.first), escape(comparison.second)
    table = Table(title=f"agreement of {first} and {second}", title_justify="left")
    table.add_column("population", no_wrap=True)
    for heading in ("neurons", f"spikes {first}", f"spikes {second}", "differ", "agreement", "first at"):
        table.add_column(heading, justify="right")
    for layer in comparison.layers:
        share = 1 - layer.mismatches / max(layer.compared, 1)
        where = "-" if layer.first_sample is None else f"{layer.first_sample:,}, {layer.first_step}"
        row = (f"{layer.neurons:,}", *(f"{spikes:,}" for spikes in layer.spikes), f"{layer.mismatches:,}")
        style = "red" if layer.mismatches else None
        table.add_row(escape(layer.population), *row, _percent(share), where, style=style)
    if not comparison.equal:
        table.caption, table.caption_justify = "first at: sample, step of the first spike that differs", "left"
    return table


def _percent(share: float) -> str:
    """A share of agreement, never rounded up to all."""
    return "100 %" if share == 1 else f"{min(share, 0.9999):.2%}".replace("%", " %")


def _place(comparison: Comparison, found: Divergence, graph: ProcessGraph) -> Panel:
    at = found.place
    text = f"[bold]{escape(at.population)}[/], sample {at.sample:,}, step {at.step}, neuron {at.neuron:,}"
    text += _coordinates(at, graph)
    first, second = escape(comparison.first), escape(comparison.second)
    if at.membrane:
        text += f"\nno spike differs; v after the last step is {found.first} in {first}, {found.second} in {second}"
    else:
        fires, silent = (first, second) if found.first else (second, first)
        text += f"\n{fires} fires, {silent} does not"
    for cause in found.explanation.causes if found.explanation else ():
        text += f"\n[bold red]cause[/] {escape(str(cause))}"
    return Panel(text, title="first difference", title_align="left", border_style="red", expand=False)


def _coordinates(at: Place, graph: ProcessGraph) -> str:
    shape = graph.population(at.population).shape
    if len(shape) != 3:
        return ""
    channel, row, column = (int(i) for i in np.unravel_index(at.neuron, shape))
    return f" (channel {channel}, row {row}, column {column})"


def _show_explanation(console: Console, comparison: Comparison, why: Explanation) -> None:
    console.print(_states(why))
    for side in why.sides:
        console.print(_origin(side), highlight=False)
    if why.incoming:
        console.print(_incoming(comparison, why))
    state = why.state
    if state is not None:
        console.print(
            f"The states part first in step {state.step}, neuron {state.neuron:,}: {state.quantity} is {state.first:,} "
            f"in {escape(comparison.first)}, {state.second:,} in {escape(comparison.second)}. That is to say: "
            f"{escape(state.hint)}.",
            highlight=False,
        )
    for cause in why.elsewhere:
        console.print(f"The networks also differ elsewhere: {escape(str(cause))}.", highlight=False)


def _states(why: Explanation) -> Table:
    table = Table(title="the neuron in this step", title_justify="left")
    table.add_column("")
    for side in why.sides:
        table.add_column(escape(side.backend), justify="right")
    for title, key in STATE_ROWS:
        values = [getattr(side, key) for side in why.sides]
        if all(value is None for value in values):
            continue
        unequal = None not in values and values[0] != values[1]
        table.add_row(title, *("?" if value is None else f"{value:,}" for value in values), style="red" * unequal)
    return table


def _origin(side: Side) -> str:
    name = escape(side.backend)
    if side.follows is None:
        return f"{name}: its graded input is not known here, so its states are not."
    if side.follows:
        return f"{name}: as its network says; states computed from the spikes it sent."
    kept = {
        "recorded": "states as it recorded them",
        "as if": "states as the first of these causes makes them",
    }.get(side.origin, "its states are not known")
    return f"{name}: not what its network says; {kept}."


def _incoming(comparison: Comparison, why: Explanation) -> Table:
    first, second = escape(comparison.first), escape(comparison.second)
    table = Table(title="spikes that arrive in this step, the largest first", title_justify="left")
    table.add_column("projection", no_wrap=True)
    alike = all(each.weights[0] == each.weights[1] and each.currents[0] == each.currents[1] for each in why.incoming)
    sides = ("",) if alike else (f" {first}", f" {second}")
    for heading in ("source neuron", "fired in step", "delay", *(f"weight{side}" for side in sides), "current"):
        table.add_column(heading, justify="right")
    for each in why.incoming:
        weights = ["-" if weight is None else f"{weight:,}" for weight in each.weights]
        currents = list(dict.fromkeys("-" if current is None else f"{current:,.10g}" for current in each.currents))
        place = (f"{escape(each.source)} {each.neuron:,}", str(each.step), str(each.delay))
        style = "red" if each.weights[0] != each.weights[1] or each.currents[0] != each.currents[1] else None
        row = (*place, *weights[: len(sides)], " / ".join(currents))
        table.add_row(escape(each.projection), *row, style=style)
    if why.left_out:
        sums = dict.fromkeys(f"{current:,.10g}" for current in why.left_out_currents)
        table.caption = f"and {why.left_out:,} more, together {' / '.join(sums)}"
        table.caption_justify = "left"
    return table


def show_synops(console: Console, synops: list[SynopComparison]) -> None:
    """One line: whether the simulator counted what follows from the spikes."""
    total, wrong = sum(check.counted for check in synops), sum(check.steps_that_differ > 0 for check in synops)
    verdict = f"[bold red]NOT equal in {wrong} of[/]" if wrong else "[bold green]equal in all[/]"
    line = f"[bold]synaptic operations[/] {total:,} counted; {verdict} {len(synops)} projections to the torch trace's"
    console.print(line, highlight=False)
