"""Plots of whole runs for the report, each as an inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from perf.figures import PART_COLORS
from perf.report.chart import BLUE, GREY, INK, SOFT, as_svg, make_axes

CONTENDER_COLORS = {"home": BLUE, "gather": "#eda53a", "adamw": GREY}


def sweep(runs: Sequence[Mapping[str, Any]], checks: Sequence[Mapping[str, Any]]) -> str:
    """Step seconds over bucket sizes, one line per optimizer; predictions as crosses."""
    figure, axes = make_axes("milliseconds per training step", height=3.8)
    sizes = [run["settings"]["bucket_mb"] for run in runs]
    for name in runs[0]["contenders"]:
        measured = [run["contenders"][name]["step_seconds"] * 1e3 for run in runs]
        color = CONTENDER_COLORS[name]
        axes.plot(range(len(runs)), measured, marker="o", linewidth=2, color=color, label=name)
        predicted = [row["predicted_seconds"] * 1e3 for run in checks for row in run["rows"] if row["name"] == name]
        axes.plot(range(len(runs)), predicted, "x", markersize=8, markeredgewidth=2, color=color)
    axes.plot([], [], "x", color=SOFT, markeredgewidth=2, label="predicted")
    axes.set_xticks(range(len(runs)), [f"{size:g} MiB" for size in sizes])
    axes.set_xlabel("fp32 gradient per bucket")
    axes.set_xlim(-0.3, len(runs) - 0.7)
    axes.set_ylim(bottom=0)
    axes.legend(ncols=4, loc="lower center")
    return as_svg(figure)


def predicted_and_measured(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Two bars per step, predicted and measured, by part."""
    figure, axes = make_axes("milliseconds of a step: predicted above, measured below", 11, 0.9 + 0.42 * len(rows))
    colors = {"forward_backward": "#c9d3de", **PART_COLORS, "rest": "#f0d9d8"}
    for number, (_, row) in enumerate(rows):
        for offset, kind in ((-0.19, "predicted"), (0.19, "measured")):
            left = 0.0
            for part, color in colors.items():
                if part == "forward_backward":
                    seconds = row["forward_backward_seconds"]
                elif part == "rest":
                    seconds = max(0.0, row["rest_seconds"]) if kind == "measured" else 0.0
                else:
                    seconds = row["parts"].get(part, {}).get(kind, 0.0)
                label = part.replace("_", " ") if number == 0 and kind == "predicted" else None
                axes.barh(number + offset, seconds * 1e3, 0.34, left=left, color=color, label=label)
                left += seconds * 1e3
            axes.text(left, number + offset, f" {left:,.0f}", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.06)
    figure.legend(loc="outside lower center", ncols=8, fontsize=8.5)
    return as_svg(figure)
