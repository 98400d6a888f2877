"""What the report's charts share: colors, one style, and a figure as an inline SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, SOFT, GRID = "#1b2430", "#5d6b7a", "#e3e8ee"
BLUE, TEAL, AMBER, RED, VIOLET, GREY = "#2f6fde", "#1ba38c", "#eda53a", "#d9534f", "#8b6fd6", "#a9b4c0"

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
    }
)


def make_axes(title: str, width: float = 6.2, height: float = 3.6) -> tuple[Figure, Axes]:
    """A figure of one panel, sizes in inches."""
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.set_title(title)
    axes.tick_params(length=0)
    return figure, axes


def as_svg(figure: Figure) -> str:
    """The figure as an SVG element; it is closed."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def stacked_bars(
    axes: Axes, at: Sequence[float], parts: Mapping[str, Sequence[float]], colors: Mapping[str, str]
) -> None:
    """Horizontal bars at `at`, one stretch per part."""
    left = [0.0] * len(at)
    for part, values in parts.items():
        label = part.replace("_", " ")
        axes.barh(at, values, left=left, height=0.62, color=colors.get(part, SOFT), label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]


def names_on_y(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
