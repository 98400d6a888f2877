"""Plots of whole runs for the report, each as an inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from perf.figures import AMBER, BLUE, GREY, INK, PART_COLORS, SOFT, TEAL, as_svg, make_axes

CONTENDER_COLORS = {"home": BLUE, "gather": "#eda53a", "adamw": GREY}
RUN_COLORS = {"adamw": GREY, "muon": BLUE, "tuned": AMBER, "short": TEAL}
RUN_NAMES = {
    "adamw": "AdamW",
    "muon": "Muon, AdamW's rate",
    "tuned": "Muon, own rate",
    "short": "the same, fewer steps",
}


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


def loss_panels(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation loss over steps, one panel per model, of the first seed."""
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(11, 2.7 * lines), layout="constrained", squeeze=False)
    for axes, row in zip(panels.flat, rows, strict=False):
        for name, color in RUN_COLORS.items():
            axes.plot(*zip(*row["curves"][name], strict=True), linewidth=1.8, color=color, label=RUN_NAMES[name])
        final = row["curves"]["adamw"][-1][1]
        axes.axhline(final, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_ylim(min(loss for curve in row["curves"].values() for _, loss in curve) - 0.05, final + 1.0)
        axes.tick_params(length=0, labelsize=8.5)
        axes.set_title(f"{row['kind']} {row['size']}, {row['parameters'] / 1e6:.2f} M", fontsize=10)
    for axes in panels.flat[len(rows) :]:
        axes.set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("step", fontsize=9)
    for axes in panels[:, 0]:
        axes.set_ylabel("validation loss", fontsize=9)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    return figure


def entropy(rows: Sequence[Mapping[str, Any]]) -> str:
    """Singular-value entropy by weight group, AdamW's beside Muon's."""
    figure, axes = make_axes("singular-value entropy of the weights at the end", width=11, height=3.1)
    bars = [(f"{group}\n{row['kind']}\n{row['size']}", row["entropy"], group) for row in rows
            for group in row["entropy"]["muon"]]  # fmt: skip
    for offset, name in ((-0.2, "adamw"), (0.2, "muon")):
        values = [entropies[name][group] for _, entropies, group in bars]
        drawn = axes.bar([at + offset for at in range(len(bars))], values, 0.38, color=RUN_COLORS[name],
                         label=RUN_NAMES[name])  # fmt: skip
        axes.bar_label(drawn, fmt="%.3f", fontsize=7, color=INK, rotation=90, padding=2)
    lowest = min(entropies[name][group] for _, entropies, group in bars for name in ("adamw", "muon"))
    axes.set_ylim(max(0.0, lowest - 0.1), 1.06)
    axes.set_xticks(range(len(bars)), [name for name, _, _ in bars], fontsize=7.5)
    axes.grid(False, axis="x")
    figure.legend(loc="outside upper right", ncols=2)
    return as_svg(figure)
