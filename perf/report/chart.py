"""What the report's charts share: colors, one style, a wide and a narrow drawing of each, as inline SVG."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, SOFT, GRID = "#1b2430", "#5d6b7a", "#e3e8ee"
BLUE, TEAL, AMBER, RED, VIOLET, GREY = "#2f6fde", "#1ba38c", "#eda53a", "#d9534f", "#8b6fd6", "#a9b4c0"
PALE_BLUE = "#7fb0f5"
# Inches. A phone shows NARROW at about 1.2 times its size, so that 10 points are 12 pixels.
WHOLE, HALF, NARROW = 11.0, 6.2, 3.9
# Parts of a step, predicted (`Prediction.exposed`) and measured.
PART_COLORS = {
    "newton_schulz": BLUE,
    "exchange": TEAL,
    "reduce_scatter": AMBER,
    "all_gather": VIOLET,
    "elementwise": GREY,
    "agreement": RED,
    "delayed": "#f0d9d8",
}

# Phases that the optimizer times.
PHASE_COLORS = {
    "newton_schulz": BLUE,
    "momentum": PALE_BLUE,
    "update": "#bcd5fa",
    "adamw": GREY,
    "scatter_pack": "#9adbd0",
    "gather_wait": TEAL,
    "scatter_wait": "#12705f",
    "reduce_scatter_wait": AMBER,
    "all_gather_wait": VIOLET,
    "agreement": RED,
}

plt.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.edgecolor": GRID,
        "axes.labelcolor": SOFT,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlecolor": INK,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": GRID,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "svg.hashsalt": "distributed_muon",  # the same results give the same page
        "svg.fonttype": "none",  # text stays text: a quarter of the size, and it can be searched
    }
)

Draw = Callable[[bool], Figure]


def chart(draw: Draw) -> str:
    """HTML of a chart, drawn wide and narrow, of which the page's style shows one.

    Args:
        draw: draws the figure; called with whether it is the narrow one.
    """
    return "".join(
        f'<div class="{name}">{as_svg(draw(narrow))}</div>' for name, narrow in (("wide", False), ("narrow", True))
    )


def make_axes(title: str, narrow: bool = False, width: float = HALF, height: float = 3.6) -> tuple[Figure, Axes]:
    """A figure of one panel, sizes in inches; a narrow one has the width of a phone."""
    figure, axes = plt.subplots(figsize=(NARROW if narrow else width, height), layout="constrained")
    set_title(axes, title, narrow)
    axes.tick_params(length=0)
    return figure, axes


def set_title(axes: Axes, title: str, narrow: bool) -> None:
    """The title, in lines that fit."""
    axes.set_title(_wrapped(title, 36) if narrow else title)


def as_svg(figure: Figure) -> str:
    """The figure as an SVG element; it is closed."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Verdana, where DejaVu Sans is missing, has its metrics.
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    # Equal axes get equal ids; one in a figure that is not shown must not serve another's clipping.
    own = hashlib.sha1(text.encode()).hexdigest()[:8]
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{own}-", text)


def row_figure(title: str, rows: int, narrow: bool, width: float = WHOLE, each: float = 0.42) -> tuple[Figure, Axes]:
    """A figure of horizontal bars, as high as its rows need: `each` inches, narrow ones with their names above."""
    return make_axes(title, narrow, width, 1.3 + 0.5 * rows if narrow else 0.9 + each * rows)


def row_bars(
    axes: Axes, narrow: bool, parts: Mapping[str, Sequence[float]], colors: Mapping[str, str], left: float = 0.0
) -> None:
    """Horizontal bars, one per row, a stretch per part; names of parts go to the legend."""
    rows = len(next(iter(parts.values())))
    begin = [left] * rows
    for part, values in parts.items():
        axes.barh(row_places(rows, narrow), values, left=begin, height=0.34 if narrow else 0.62,
                  color=colors.get(part, SOFT), label=part.replace("_", " "))  # fmt: skip
        begin = [a + b for a, b in zip(begin, values, strict=True)]


def row_places(rows: int, narrow: bool) -> list[float]:
    """Where the bars lie: narrow ones leave room for their names above."""
    return [row + 0.2 if narrow else float(row) for row in range(rows)]


def name_rows(axes: Axes, names: Sequence[str], narrow: bool) -> None:
    """Names of horizontal bars: beside them, or above them where there is no room."""
    if narrow:
        axes.set_yticks([])
        for row, name in enumerate(names):
            axes.text(0, row - 0.02, name, transform=axes.get_yaxis_transform(), va="bottom", fontsize=8.5, color=SOFT)
        axes.set_ylim(-0.6, len(names) - 0.4)
    else:
        axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")


def panels(count: int, narrow: bool, height: float, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of several panels: side by side, or one below the other; `height` inches each."""
    columns = 1 if narrow else min(columns, count)
    lines = -(-count // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(NARROW if narrow else WHOLE, height * lines),
                                layout="constrained", squeeze=False)  # fmt: skip
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])


def legend_below(figure: Figure, narrow: bool, columns: int = 4, axes: Axes | None = None) -> None:
    """The legend under the figure, in fewer columns where it is narrow; of `axes`, or of all."""
    handles = axes.get_legend_handles_labels() if axes is not None else ()
    figure.legend(*handles, loc="outside lower center", ncols=min(2, columns) if narrow else columns)


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
