"""The report's figures: plain functions from a `Summary` and a `Trace` to inline SVG."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch, Polygon, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from spikeport.deploy.drawing import (
    BAR,
    GREY,
    INK,
    NARROW,
    OKABE_ITO,
    PALE,
    WIDE,
    inline_svg,
    label,
    palette,
    significant,
)
from spikeport.deploy.summary import ChipUse, Cost, Summary
from spikeport.deploy.trace import Trace

_MAX_DASHES = 4000
_RASTER_ROWS = 240
_RASTER_INCHES = 9.0
_CHIP_INCHES = 7.7
_CORE_INCHES = 0.65
_TILE_GAP = 0.5  # in cores
_LINKS = LinearSegmentedColormap.from_list("links", ["#c9b3d9", "#8c5ba6", "#4a1666"])
_BUSY = "#7b3f98"
_GAUGES = ((INK, "neurons used"), (BAR, "memory used"), (_BUSY, "time at work"))
"""Colours and meanings of a core's gauges, from left to right."""


def draw(summary: Summary, trace: Trace | None, sample: int = 0) -> dict[str, str]:
    """Every figure that the run has data for: its key, which is also the prefix of all ids in it, and its SVG."""
    colours = palette([layer.name for layer in summary.layers])
    makers: dict[str, Callable[[], Figure]] = {
        "activity": lambda: activity(summary, colours),
        "synops": lambda: synops(summary, colours),
        "mesh": lambda: mesh(summary.chip, colours),
        "confusion": lambda: confusion(np.array(summary.confusion), summary.class_names),
    }
    if trace is not None:
        makers["raster"] = lambda: raster(trace, sample, colours, summary.class_names)
    if summary.accuracy_by_step:
        makers["accuracy"] = lambda: accuracy(summary)
    costs = [summary.cost, *([summary.other_cost] if summary.other_cost else [])]
    for index, letter in enumerate("ab"[: len(costs)]):
        makers[f"energy-{letter}"] = partial(energy, costs, index)
        makers[f"time-{letter}"] = partial(step_time, costs, index)
    return {key: inline_svg(make, key) for key, make in makers.items()}


def raster(trace: Trace, sample: int, colours: dict[str, str], class_names: list[str]) -> Figure:
    """Spikes of one sample: a row of axes a population, a column a step, a dash a spike.

    A population with more neurons than the figure has rows is binned: the shade is the share of a bin that fired.
    """
    names = list(trace.sizes)
    heights = [float(np.clip(0.25 + 0.022 * math.sqrt(trace.sizes[name]), 0.4, 1.6)) for name in names]
    heights = [max(0.35, height * min(1.0, _RASTER_INCHES / sum(heights))) for height in heights]
    named = trace.sizes[names[-1]] == len(class_names) <= 12
    if named:
        heights[-1] = max(heights[-1], 0.11 * len(class_names))
    figure = Figure(figsize=(WIDE, sum(heights) + 0.09 * len(names) + 0.55), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.03, hspace=0.0)  # type: ignore[union-attr,call-arg]
    grid = figure.subplots(len(names), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, name, height in zip(grid, names, heights, strict=True):
        spikes = trace.spikes(name, slice(sample, sample + 1))[0]
        _raster_panel(axes, spikes, colours.get(name, GREY), 72 * height)
        size, total = trace.sizes[name], int(spikes.sum())
        ends = sorted({0, size - 1})
        axes.set_yticks(ends, [f"{end:,}" for end in ends], fontsize=7.5)
        for text, weight, colour, offset in (
            (label(name, 16), "bold", INK, 1),
            (f"{size:,} neurons", "normal", GREY, -10),
        ):
            _beside(axes, text, (-38, offset), "right", weight=weight, color=colour)
        fired = int(spikes.any(axis=0).sum())
        _beside(axes, f"{total:,} spikes", (6, 1), "left")
        _beside(axes, f"{fired:,} neuron{'s' * (fired != 1)} fired", (6, -10), "left", color=GREY)
    last = grid[-1]
    if named:
        last.set_yticks(range(len(class_names)), [label(text, 8) for text in class_names], fontsize=6.5)
        last.tick_params(axis="y", length=0)
    last.set_xlim(0.5, trace.steps + 0.5)
    last.xaxis.set_major_locator(MaxNLocator(min(trace.steps, 12), integer=True))
    last.set_xlabel("time step")
    for axes in grid[:-1]:
        axes.tick_params(axis="x", bottom=False)
    return figure


def _raster_panel(axes: Axes, spikes: np.ndarray, colour: str, points: float) -> None:
    steps, size = spikes.shape
    axes.set_ylim(-0.5, size - 0.5)
    axes.spines["left"].set_color(PALE)
    axes.spines["bottom"].set_color(PALE)
    if size <= _RASTER_ROWS and spikes.sum() <= _MAX_DASHES:
        step, neuron = np.nonzero(spikes)
        width = float(np.clip(0.75 * points / size, 0.6, 4.0))
        axes.hlines(neuron, step + 0.58, step + 1.42, colors=colour, linewidths=width)
        return
    rows = min(size, _RASTER_ROWS)
    edges = np.linspace(0, size, rows + 1).astype(int)
    share = np.add.reduceat(spikes.T, edges[:-1], axis=0, dtype=np.int64) / np.diff(edges)[:, None]
    image = np.empty((rows, steps * 12, 4))
    image[..., :3] = to_rgb(colour)
    gap = np.tile(np.r_[0.0, np.ones(10), 0.0], steps)
    image[..., 3] = np.repeat(np.where(share > 0, 0.3 + 0.7 * share / max(share.max(), 1e-9), 0.0), 12, axis=1) * gap
    axes.imshow(
        (image * 255).round().astype(np.uint8),
        extent=(0.5, steps + 0.5, -0.5, size - 0.5),
        aspect="auto",
        origin="lower",
        interpolation="none",
    )


def _beside(axes: Axes, text: str, offset: tuple[float, float], align: str, **style: Any) -> None:
    side = 0 if align == "right" else 1
    axes.annotate(
        text,
        (side, 0.5),
        xycoords="axes fraction",
        xytext=offset,
        textcoords="offset points",
        ha=align,
        fontsize=7.5,
        annotation_clip=False,
        **style,
    )


def activity(summary: Summary, colours: dict[str, str]) -> Figure:
    """Firing rate and share of silent neurons of every population."""
    names = [layer.name for layer in summary.layers]
    figure = Figure(figsize=(NARROW, _rows_height(len(names), 0.4)), layout="constrained")
    figure.get_layout_engine().set(wspace=0.07)  # type: ignore[union-attr,call-arg]
    left, right = figure.subplots(1, 2, sharey=True)
    shades = [colours[name] for name in names]
    rates = [layer.firing_rate for layer in summary.layers]
    silent = [100 * layer.silent_share for layer in summary.layers]
    _bars(left, names, rates, shades, [significant(rate, 2) for rate in rates])
    left.set_xlabel("spikes per neuron and step")
    left.set_title("(a) firing rate")
    _bars(right, names, silent, shades, [f"{value:.1f}" for value in silent])
    right.set_xlim(0, 125)
    right.set_xticks([0, 50, 100])
    right.set_xlabel("silent neurons / %")
    right.set_title("(b) silent")
    right.tick_params(axis="y", left=False)
    return figure


def _bars(axes: Axes, names: list[str], values: list[float], shades: list[str], texts: list[str]) -> None:
    rows = np.arange(len(names))
    axes.barh(rows, values, color=shades, height=0.62)
    axes.set_yticks(rows, [label(name, 16) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1.42 * max([*values, 1e-9]))
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.grid(axis="x")
    for row, (value, text) in enumerate(zip(values, texts, strict=True)):
        _value(axes, value, row, text)


def synops(summary: Summary, colours: dict[str, str]) -> Figure:
    """Synaptic operations of every population beside the multiply-accumulates of the dense network, log scale."""
    layers = summary.layers
    figure = Figure(figsize=(NARROW, _rows_height(len(layers), 0.4)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(layers), dtype=float)
    done = np.array([layer.synops_per_inference for layer in layers])
    dense = np.array([layer.dense_macs_per_inference for layer in layers], dtype=float)
    positive = np.concatenate([done[done > 0], dense[dense > 0], [1.0]])
    axes.set_xscale("log")
    low = 10.0 ** (math.floor(math.log10(positive[:-1].min() if positive.size > 1 else 1.0)) - 1)
    axes.set_xlim(low, 8 * positive.max())
    axes.barh(rows + 0.19, dense, height=0.34, color="white", edgecolor=GREY, hatch="//////", linewidth=0.7)
    axes.barh(rows - 0.19, done, height=0.34, color=[colours[layer.name] for layer in layers])
    for row, spiking, full in zip(rows.tolist(), done.tolist(), dense.tolist(), strict=True):
        for value, offset, share in ((spiking, -0.19, True), (full, 0.19, False)):
            text = _short(value) + (f"  ({_percent(spiking / full)})" if share and full else "")
            _value(axes, max(value, low), row + offset, text, 7)
    axes.set_yticks(rows, [label(layer.name, 16) for layer in layers])
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x")
    axes.set_xlabel("operations per inference (log scale)")
    handles = [
        Patch(color=GREY, label="synaptic operations"),
        Patch(facecolor="white", edgecolor=GREY, hatch="//////", label="dense MACs"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=7.5)
    return figure


def mesh(chip: ChipUse, colours: dict[str, str]) -> Figure:
    """Where every population lies and what is busy: tiles of cores in the colour of what they hold, with gauges of how
    full and how busy each core is, and between the tiles the links, the wider and darker the more of the time taken."""
    columns, rows = chip.mesh
    side = math.ceil(math.sqrt(chip.cores_per_tile))
    depth = math.ceil(chip.cores_per_tile / side)
    across = 1 if chip.chips == 1 else 2
    down = math.ceil(chip.chips / across)
    wide, tall = columns * (side + _TILE_GAP), rows * (depth + _TILE_GAP)
    core_inches = min((WIDE - 0.5) / across / wide, _CHIP_INCHES / tall, _CORE_INCHES)
    numbers = {name: number for number, name in enumerate(colours, start=1)}
    held = [name for name in colours if any(core.population == name for core in chip.cores)]
    most = max((share for tile in chip.tiles for share in tile.link_share), default=0.0)
    names: list[Patch | Line2D] = [
        Patch(color=colours[name], label=f"{numbers[name]}  {label(name, 16)}") for name in held
    ]
    names.append(Patch(facecolor="white", edgecolor=PALE, label="unused core"))
    keys: list[Patch | Line2D] = [*_gauge_handles(), *_link_handles(most, core_inches)]
    lines = sum(math.ceil(len(handles) / _legend_columns(handles)) for handles in (names, keys))
    height = down * (tall * core_inches + 0.45) + 0.2 * lines + 0.2
    figure = Figure(figsize=(WIDE, height), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for index, axes in enumerate(panels):
        axes.set_axis_off()
        if index < chip.chips:
            axes.set_xlim(-0.5 - 0.4 * (chip.chips > 1), wide)
            axes.set_ylim(tall, -0.5)
            axes.set_aspect("equal")
            if chip.chips > 1:
                axes.set_title(f"chip {index}")
            _chip_panel(axes, chip, index, colours, numbers if core_inches > 0.3 else {}, min(0.5, 1.2 * core_inches))
            _links_panel(axes, chip, index, most)
    style: dict[str, Any] = {"fontsize": 7.5, "columnspacing": 1.4, "borderpad": 0.2}
    figure.legend(handles=names, loc="outside upper center", ncols=_legend_columns(names), **style)
    figure.legend(handles=keys, loc="outside lower center", ncols=_legend_columns(keys), **style)
    return figure


def _gauge_handles() -> list[Patch]:
    return [Patch(facecolor=shade, edgecolor=INK, linewidth=0.5, label=what) for shade, what in _GAUGES]


def _link_handles(most: float, core_inches: float) -> list[Line2D]:
    """Samples of a link that is taken for so much of the time."""
    if most <= 0:
        return []
    return [
        Line2D(
            [],
            [],
            color=_LINKS(part),
            lw=72 * core_inches * _shaft(part),
            solid_capstyle="butt",
            label=f"link taken {100 * part * most:.3g} %",
        )
        for part in (0.1, 0.5, 1.0)
    ]


def _shaft(part: float) -> float:
    """Width of a link's arrow, in cores, at a part of the busiest link's load."""
    return 0.04 + 0.2 * part


def _legend_columns(handles: Sequence[Patch | Line2D]) -> int:
    """Columns of a legend: one row where all of it fits."""
    inches = [0.5 + 0.065 * len(str(handle.get_label())) for handle in handles]
    return len(handles) if sum(inches) < WIDE - 0.2 else max(1, int((WIDE - 0.2) / max(inches)))


def _links_panel(axes: Axes, chip: ChipUse, index: int, most: float) -> None:
    """An arrow for each link of one chip that carried a packet. Traffic keeps right; those at the chip's left and right
    edge lead to its neighbours."""
    columns, _ = chip.mesh
    side = math.ceil(math.sqrt(chip.cores_per_tile))
    depth = math.ceil(chip.cores_per_tile / side)
    arrows, shares = [], []
    for tile in chip.tiles:
        on, column = divmod(tile.tile_x, columns)
        if on != index:
            continue
        left, top = column * (side + _TILE_GAP), tile.tile_y * (depth + _TILE_GAP)
        middle = np.array([left + side / 2, top + depth / 2])
        for share, ahead in zip(tile.link_share, ((1, 0), (-1, 0), (0, 1), (0, -1)), strict=True):
            if share > 0:
                forward = np.array(ahead, dtype=float)
                right = np.array([-forward[1], forward[0]])
                start = middle + forward * (np.abs(forward) @ (side, depth) / 2 + 0.05) + 0.22 * right
                arrows.append(Polygon(_arrow(start, forward, right, _shaft(share / most))))
                shares.append(share / most)
    if arrows:
        axes.add_collection(PatchCollection(arrows, fc=_LINKS(shares), ec="none", zorder=0.9), autolim=False)


def _arrow(start: np.ndarray, forward: np.ndarray, right: np.ndarray, wide: float) -> np.ndarray:
    """Corners of an arrow across the gap between two tiles, whose shaft is so wide."""
    head, length = 0.16, _TILE_GAP - 0.1
    along = [0.0, length - head, length - head, length, length - head, length - head, 0.0]
    aside = [wide / 2, wide / 2, wide / 2 + 0.07, 0.0, -wide / 2 - 0.07, -wide / 2, -wide / 2]
    return start + np.outer(along, forward) + np.outer(aside, right)


def _chip_panel(
    axes: Axes, chip: ChipUse, index: int, colours: dict[str, str], numbers: dict[str, int], line: float
) -> None:
    columns, rows = chip.mesh
    side = math.ceil(math.sqrt(chip.cores_per_tile))
    depth = math.ceil(chip.cores_per_tile / side)
    used = {
        (core.tile_x, core.tile_y, core.core % chip.cores_per_tile): core for core in chip.cores if core.chip == index
    }
    tiles, squares, faces, edges = [], [], [], []
    gauges: dict[str, list[Rectangle]] = {"white": [], **{shade: [] for shade, _ in _GAUGES}}
    small: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6.5, "color": GREY}
    for tile_x, tile_y, slot in np.ndindex(columns, rows, chip.cores_per_tile):
        left, top = tile_x * (side + _TILE_GAP), tile_y * (depth + _TILE_GAP)
        if slot == 0:
            tiles.append(FancyBboxPatch((left + 0.03, top + 0.03), side - 0.06, depth - 0.06, "round,pad=0.06"))
            if tile_y == 0:
                axes.text(left + side / 2, -0.32, str(tile_x), **small)
            if tile_x == 0:
                axes.text(-0.32 - 0.4 * (chip.chips > 1), top + depth / 2, str(tile_y), **small)
        x, y = left + slot % side, top + slot // side
        squares.append(Rectangle((x + 0.06, y + 0.06), 0.88, 0.88))
        core = used.get((tile_x, tile_y, slot))
        colour = colours.get(core.population, GREY) if core else PALE
        faces.append([1 - 0.45 * (1 - part) for part in to_rgb(colour)] if core else (1.0, 1.0, 1.0))
        edges.append(colour)
        if core is None:
            continue
        shares = (_filled(chip, "neuron", core.neurons), _filled(chip, "synap", core.synaptic_words), core.busy_share)
        for offset, (shade, _), share in zip((0.42, 0.59, 0.76), _GAUGES, shares, strict=True):
            if share is not None:
                fill = 0.68 * min(share, 1.0)
                gauges["white"].append(Rectangle((x + offset, y + 0.16), 0.13, 0.68))
                gauges[shade].append(Rectangle((x + offset, y + 0.84 - fill), 0.13, fill))
        if core.population in numbers:
            text = str(numbers[core.population])
            axes.text(x + 0.24, y + 0.5, text, ha="center", va="center", fontsize=8, weight="bold")
    # Collections: one artist a kind, as a full chip has some hundred rectangles, which one by one are slow to draw.
    layers = [
        PatchCollection(tiles, fc="#f4f5f7", ec=PALE, lw=0.7),
        PatchCollection(squares, fc=faces, ec=edges, lw=1.0),
    ]
    layers += [PatchCollection(shapes, fc=shade, ec=INK, lw=line) for shade, shapes in gauges.items() if shapes]
    for order, layer in enumerate(layers, start=1):
        layer.set_zorder(order / 10)
        axes.add_collection(layer, autolim=False)


def _filled(chip: ChipUse, word: str, used: int) -> float | None:
    """Share of a limit that is used; None where the chip has no such limit."""
    available = next((limit.available for limit in chip.limits if word in limit.limit.lower()), None)
    return used / available if available else None


def energy(costs: list[Cost], index: int) -> Figure:
    """Energy by cause with its low-high band under one set of constants, on a scale that fits all sets."""
    top = max(cost.energy_high_nj for cost in costs)
    factor, unit = (1.0, "nJ") if top < 1e3 else (1e-3, "µJ") if top < 1e6 else (1e-6, "mJ")
    cost = costs[index]
    bars = [(part.cause, part.energy_nj, part.low_nj, part.high_nj, part.dynamic) for part in cost.parts]
    bars.append(("total", cost.energy_nj_per_inference, cost.energy_low_nj, cost.energy_high_nj, True))
    figure, axes = _cost_panel(costs, index, max(len(cost.parts) + 1 for cost in costs))
    for row, (cause, *values, dynamic) in enumerate(bars):
        value, low, high = (factor * part for part in values)
        solid = {"color": INK if cause == "total" else BAR}
        hatched = {"color": "white", "edgecolor": GREY, "hatch": "//////", "linewidth": 0.7}
        axes.barh(row, value, height=0.6, **(solid if dynamic else hatched))
        if high > low:
            band = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
            axes.errorbar(value, row, xerr=band, color=OKABE_ITO[3], lw=1.2, capsize=2.5)
        _value(axes, max(value, high), row, significant(value))
    axes.set_yticks(range(len(bars)), [label(bar[0], 34) for bar in bars])
    axes.set_xlim(0, 1.22 * (factor * top or 1.0))
    axes.set_xlabel(f"energy per inference / {unit}")
    return figure


def step_time(costs: list[Cost], index: int) -> Figure:
    """What the time of an inference goes into under one set of constants, on a scale that fits all sets."""
    top = max((value for cost in costs for value in cost.step_time_by_cause.values()), default=0.0)
    factor, unit = (1.0, "µs") if top < 1e3 else (1e-3, "ms")
    causes = costs[index].step_time_by_cause
    total = sum(causes.values()) or 1.0
    figure, axes = _cost_panel(costs, index, max(len(cost.step_time_by_cause) for cost in costs))
    for row, value in enumerate(causes.values()):
        axes.barh(row, factor * value, height=0.6, color=BAR)
        _value(axes, factor * value, row, f"{significant(factor * value)}  ({_percent(value / total)})")
    axes.set_yticks(range(len(causes)), [label(cause, 24) for cause in causes])
    axes.set_xlim(0, 1.4 * (factor * top or 1.0))
    axes.set_xlabel(f"time per inference / {unit}")
    return figure


def _cost_panel(costs: list[Cost], index: int, rows: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(NARROW, _rows_height(rows, 0.35)), layout="constrained")
    axes = figure.subplots()
    axes.set_ylim(rows - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x")
    letter = f"({'ab'[index]}) " if len(costs) > 1 else ""
    axes.set_title(letter + label(costs[index].title, 44), x=0, ha="left")
    return figure, axes


def _value(axes: Axes, x: float, row: float, text: str, size: float = 7.5) -> None:
    """Write the value of a bar behind its end."""
    axes.annotate(text, (x, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=size)


def accuracy(summary: Summary) -> Figure:
    """Test accuracy if the decision were read after each step, with 95 % Wilson intervals."""
    figure = Figure(figsize=(NARROW, 3.9), layout="constrained")
    axes = figure.subplots()
    steps = np.array([point.steps for point in summary.accuracy_by_step])
    series = (
        ("float", [point.float for point in summary.accuracy_by_step], summary.accuracy.float.samples, "s", "--", GREY),
        (
            "quantised",
            [point.quantized for point in summary.accuracy_by_step],
            summary.accuracy.quantized.samples,
            "o",
            "-",
            OKABE_ITO[0],
        ),
    )
    for name, values, samples, marker, dashes, colour in series:
        low, high = _wilson(np.array(values), samples)
        axes.fill_between(steps, 100 * low, 100 * high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            steps, 100 * np.array(values), dashes, marker=marker, ms=4.5, mfc="white", color=colour, lw=1.4, label=name
        )
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_xlabel("time steps before the decision")
    axes.set_ylabel("test accuracy / %")
    axes.grid()
    axes.legend(loc="lower right")
    return figure


def _wilson(share: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % confidence interval of a share (Wilson 1927)."""
    z = 1.96
    centre = (share + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * np.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    return centre - half, centre + half


def confusion(counts: np.ndarray, names: list[str]) -> Figure:
    """Samples by true class (row) and decided class (column)."""
    figure = Figure(figsize=(NARROW, 3.9), layout="constrained")
    axes = figure.subplots()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    colours = LinearSegmentedColormap.from_list("counts", ["#ffffff", "#9ecae1", "#08519c"])
    axes.imshow(share, cmap=colours, norm=PowerNorm(0.4, 0, 1), interpolation="none")
    classes = len(counts)
    if classes <= 12:
        for row, column in zip(*np.nonzero(counts), strict=True):
            ink = "white" if share[row, column] > 0.3 else INK
            size = 7.5 if counts.max() < 1000 else 6.0
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=ink, fontsize=size)
        axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.grid(which="minor")
        axes.tick_params(which="minor", length=0)
    ticks = np.arange(0, classes, math.ceil(classes / 20))
    texts = [label(names[tick], 12) if tick < len(names) else str(tick) for tick in ticks]
    size = 8.5 if classes <= 12 else 6
    axes.set_yticks(ticks, texts, fontsize=size)
    if max(map(len, texts), default=0) <= 3:
        axes.set_xticks(ticks, texts, fontsize=size)
    else:
        axes.set_xticks(ticks, texts, fontsize=size, rotation=45, ha="right", rotation_mode="anchor")
    axes.spines[["top", "right"]].set_visible(True)
    axes.spines[:].set_color(PALE)
    axes.set_xlabel("decided class")
    axes.set_ylabel("true class")
    return figure


def _rows_height(rows: int, each: float) -> float:
    return max(1.9, 0.85 + each * rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 1 else f"{100 * share:,.0f} %"


def _short(value: float) -> str:
    """A count with the suffix k, M or G."""
    for scale, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"
