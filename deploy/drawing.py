"""From a matplotlib figure to one inline <svg>, and what all figures of the report share: style, colours, labels.

Text stays text (selectable, sharp, small files). matplotlib measures it with the DejaVu Sans that it ships, so layout
and bytes do not depend on the fonts of a machine; the page shows it in a narrower system font, so nothing overlaps.
"""

import math
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from io import StringIO
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDE, NARROW = 8.8, 4.4  # inches: two columns and one column of the page
INK, GREY, BAR, PALE, GRID = "#1f2328", "#6b7280", "#8d96a3", "#d5d9df", "#e6e8ec"

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
"""Colours told apart with every common kind of colour blindness (Okabe and Ito 2008)."""

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "text.color": INK,
    "text.usetex": False,
    "text.parse_math": False,  # a `$` in a recipe's name is a dollar sign
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def palette(names: Iterable[str]) -> dict[str, str]:
    """One colour a population, the same in every figure: Okabe-Ito for a few, viridis in order of depth for many."""
    names = list(dict.fromkeys(names))
    if len(names) <= len(OKABE_ITO):
        return dict(zip(names, OKABE_ITO, strict=False))
    shades = mpl.colormaps["viridis"](np.linspace(0.0, 0.9, len(names)))
    return {name: mpl.colors.to_hex(shade) for name, shade in zip(names, shades, strict=True)}


def label(text: str, width: int = 22) -> str:
    """`text` fit for a figure: one line, no control characters (XML forbids them), shortened in its middle."""
    line = "".join(
        " " if char.isspace() else "\ufffd" if unicodedata.category(char) in ("Cc", "Cs", "Cn") else char
        for char in text
    )
    if len(line) <= width:
        return line
    head = (width - 1) * 2 // 3
    return f"{line[:head]}…{line[head + 1 - width :]}"


def significant(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, zeros at its end included, in powers of ten only where it is tiny."""
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{digits - 1}e}" if decimals > digits + 4 else f"{value:,.{max(decimals, 0)}f}"


def inline_svg(make: Callable[[], Figure], key: str) -> str:
    """Draw a figure as one <svg> element for an HTML page: ids prefixed with `key`, no fixed size, no style sheet.

    The same figure and key give the same bytes.
    """
    stream = StringIO()
    style: Any = {**_STYLE, "svg.hashsalt": key}
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the reader's browser has others
        canvas: Any = FigureCanvasSVG(make())
        canvas.print_svg(stream, metadata=nothing)  # Figure.savefig would lay out and draw twice
    root = ElementTree.fromstring(stream.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}style"):  # it would apply to the whole page, which has the same rule
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        element.attrib = {name.split("}")[-1]: _own(name, value, key) for name, value in element.attrib.items()}
    del root.attrib["width"], root.attrib["height"]
    root.attrib["xmlns"] = "http://www.w3.org/2000/svg"
    return ElementTree.tostring(root, encoding="unicode")


def _own(name: str, value: str, key: str) -> str:
    if name == "id":
        return f"{key}-{value}"
    if name.endswith("href") and value.startswith("#"):
        return f"#{key}-{value[1:]}"
    return value.replace("url(#", f"url(#{key}-")
