"""The report's section on `perf.sample_efficiency`: losses over steps, and the weights' singular-value entropy."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from perf.report.chart import (
    AMBER,
    BLUE,
    GREY,
    SOFT,
    TEAL,
    chart,
    legend_below,
    name_rows,
    panels,
    row_figure,
    row_places,
)  # fmt: skip
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
    body += chart(lambda narrow: loss_panels(rows, narrow)) + table(header, cells) + entropy(rows)
    return "Steps to the same loss", body + origin(result)


def sample_efficiency_tile(result: dict[str, Any]) -> tuple[str, str] | None:
    """The number to remember: Muon's share of AdamW's steps, where every run got there."""
    same, own = ([share for row in result["rows"] for share in row[key]]
                 for key in ("share_of_steps", "tuned_share_of_steps"))  # fmt: skip
    if not all(own):
        return None
    text = "of AdamW's steps to its best loss, median of toy runs at Muon's own rate; at AdamW's rate "
    return f"{statistics.median(own):.2f}", f"{text}{sum(map(bool, same))} of {len(same)} get there"


def loss_panels(rows: Sequence[Mapping[str, Any]], narrow: bool = False) -> Figure:
    """Validation loss over steps, one panel per model, of the first seed."""
    figure, drawn = panels(len(rows), narrow, height=2.7)
    for axes, row in zip(drawn, rows, strict=True):
        for name, color in RUN_COLORS.items():
            axes.plot(*zip(*row["curves"][name], strict=True), linewidth=1.8, color=color, label=RUN_NAMES[name])
        final = row["curves"]["adamw"][-1][1]
        axes.axhline(final, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_ylim(min(loss for curve in row["curves"].values() for _, loss in curve) - 0.05, final + 1.0)
        axes.tick_params(length=0, labelsize=8.5)
        axes.set_title(f"{row['kind']} {row['size']}, {row['parameters'] / 1e6:.2f} M", fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel("validation loss", fontsize=9)
    legend_below(figure, narrow, columns=4, axes=drawn[0])
    return figure


def entropy(rows: Sequence[Mapping[str, Any]]) -> str:
    """Singular-value entropy by weight group, AdamW's beside Muon's."""
    names = [f"{group}, {row['kind']} {row['size']}" for row in rows for group in row["entropy"]["muon"]]
    values = {
        name: [row["entropy"][name][group] for row in rows for group in row["entropy"]["muon"]]
        for name in ("adamw", "muon")
    }

    def draw(narrow: bool) -> Figure:
        title = "singular-value entropy of the weights at the end"
        figure, axes = row_figure(title, len(names), narrow, each=0.36)
        for offset, name in ((-0.1, "adamw"), (0.1, "muon")):
            at = [place + offset for place in row_places(len(names), narrow)]
            axes.scatter(values[name], at, s=30, color=RUN_COLORS[name], label=RUN_NAMES[name], zorder=3)
        name_rows(axes, names, narrow)
        axes.set_xlabel("1: all singular values are equal")
        legend_below(figure, narrow, columns=2)
        return figure

    return chart(draw)
