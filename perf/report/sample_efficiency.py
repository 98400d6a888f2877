"""The report's section on `perf.sample_efficiency`: losses over steps, and the weights' singular-value entropy."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from perf.report.chart import AMBER, BLUE, GREY, INK, SOFT, TEAL, as_svg, make_axes
from perf.report.page import Section, note, origin, table

RUN_COLORS = {"adamw": GREY, "muon": BLUE, "tuned": AMBER, "short": TEAL}
RUN_NAMES = {
    "adamw": "AdamW",
    "muon": "Muon, AdamW's rate",
    "tuned": "Muon, own rate",
    "short": "the same, fewer steps",
}


def sample_efficiency_section(result: dict[str, Any]) -> Section:
    """Of `perf.sample_efficiency`."""
    rows, cells = result["rows"], []
    for row in rows:
        mean = {name: statistics.mean(values) for name, values in row["final"].items()}
        same, own = (
            ", ".join(f"{share:.2f}" if share else "never" for share in row[key])
            for key in ("share_of_steps", "tuned_share_of_steps")
        )
        cells.append(
            [f"{row['kind']} {row['size']}", f"{row['parameters'] / 1e6:.2f} M", f"{row['lr']:g}",
             f"{mean['adamw']:.4f}", f"{mean['muon']:.4f}", same, f"{row['tuned_lr']:g}", f"{mean['tuned']:.4f}", own,
             f"{mean['short']:.4f}", ", ".join(f"{value:.2f}" for value in row["update_over_lr"].values())]
        )  # fmt: skip
    curves = rows[0]["curves"]
    share = curves["short"][-1][0] / curves["muon"][-1][0]
    tried = sorted({row["lr"] for row in result["sweep"] if row["optimizer"] == "adamw"})
    header = (
        "model", "parameters", "AdamW's rate", "AdamW", "Muon", "steps to AdamW's", "own rate", "Muon",
        "steps to AdamW's", f"in {share:.2f} of the steps", "change / rate",
    )  # fmt: skip
    body = note(
        f"Toy models, {result['steps']} steps, validation loss, mean of {len(result['seeds'])} seeds. AdamW at its "
        f"best of {len(tried)} learning rates ({tried[0]:g} to {tried[-1]:g}), Muon at the same one and at the best "
        "multiple of it. Steps to AdamW's: at which share of its steps Muon passes AdamW's final loss, by seed. Change "
        "/ rate: RMS of the change of hidden weights in a step over the learning rate, AdamW's and Muon's."
    )
    body += as_svg(loss_panels(rows)) + table(header, cells) + entropy(rows)
    return "Steps to the same loss", body + origin(result)


def sample_efficiency_tile(result: dict[str, Any]) -> tuple[str, str] | None:
    """The number to remember: Muon's share of AdamW's steps, where every run got there."""
    same, own = ([share for row in result["rows"] for share in row[key]]
                 for key in ("share_of_steps", "tuned_share_of_steps"))  # fmt: skip
    if not all(own):
        return None
    text = "of AdamW's steps to its best loss, median of toy runs at Muon's own rate; at AdamW's rate "
    return f"{statistics.median(own):.2f}", f"{text}{sum(map(bool, same))} of {len(same)} get there"


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
