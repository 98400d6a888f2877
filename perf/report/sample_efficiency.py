"""The report's section on `perf.sample_efficiency`: its tables, with losses over steps and compute, and entropies."""

from __future__ import annotations

import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from perf.report.chart import (
    AMBER,
    BLUE,
    GREY,
    SOFT,
    TEAL,
    chart,
    legend_below,
    make_axes,
    name_rows,
    panels,
    row_figure,
    row_places,
)  # fmt: skip
from perf.report.page import Section, folded, note, origin, pair, table
from perf.sample_runs import Run, group_means
from perf.sample_studies import (
    SHORT,
    Comparison,
    Known,
    Study,
    Table,
    comparisons,
    compute_points,
    power_law,
    read_results,
    study_if_known,
    tables,
)

COLORS = {"adamw": GREY, "muon": BLUE, "short": TEAL}
NAMES = {"adamw": "AdamW", "muon": "Muon, AdamW's rate", "short": f"Muon in {SHORT:g} of the steps"}
NOTHING = Table("", "No part is complete yet: run perf.sample_efficiency again.", (), [])


def sample_efficiency_section(result: dict[str, Any]) -> Section:
    """Of `perf.sample_efficiency`."""
    known = read_results(result)
    found = comparisons(known)
    first, *others = tables(known) or [NOTHING]
    body = note(first.note) + table(first.header, first.rows)
    if found:
        body += chart(lambda narrow: loss_panels(found, known, narrow))
        decay = study_if_known("decay", known)
        second = chart(lambda narrow: decay_curves(decay, known, narrow)) if decay is not None else ""
        body += pair(chart(lambda narrow: compute(known, narrow)), second)
        body += chart(lambda narrow: entropy(found, known, narrow))
    for one in others:
        body += folded(one.title, note(one.note) + table(one.header, one.rows))
    return "Steps to AdamW's loss at AdamW's rate", body + origin(result)


def sample_efficiency_tile(result: dict[str, Any]) -> tuple[str, str] | None:
    """The number to remember: Muon's mean share of AdamW's steps, of the first model that always got there."""
    for one in comparisons(read_results(result)):
        reached = [share for share in one.shares if share]
        if len(reached) == len(one.shares):
            text = f"of AdamW's steps to its loss at its best rate; {one.model}, {len(reached)} seeds"
            return f"{statistics.mean(reached):.2f}", text
    return None


def _plot(axes: Axes, run: Run, known: Known, color: str, label: str) -> None:
    steps, losses, *_ = zip(*known[run]["curve"], strict=True)
    axes.plot(steps, losses, linewidth=1.6, color=color, label=label)


def loss_panels(found: list[Comparison], known: Known, narrow: bool) -> Figure:
    """Validation loss over steps, one panel per model, of the first seed."""
    figure, drawn = panels(len(found), narrow, 2.7)
    for axes, one in zip(drawn, found, strict=True):
        for name, color in COLORS.items():
            _plot(axes, getattr(one, name)[0], known, color, NAMES[name])
        last = known[one.adamw[0]]["curve"][-1][1]
        axes.axhline(last, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_ylim(min(known[one.muon[0]]["curve"][-1][1], last) - 0.05, last + 0.8)
        axes.tick_params(length=0, labelsize=8.5)
        axes.set_title(f"{one.model}, {one.muon[0].parameters / 1e6:.2f} M", fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel("validation loss", fontsize=9)
    legend_below(figure, narrow, columns=3, axes=drawn[0])
    return figure


def compute(known: Known, narrow: bool) -> Figure:
    """Final loss over the model's FLOPs, one point per dense size, and the power law through them."""
    figure, axes = make_axes("loss over compute, dense models", narrow)
    for name, points in compute_points(known).items():
        flops, losses = zip(*points, strict=True)
        axes.plot(flops, losses, "o", color=COLORS[name], label=NAMES[name])
        if len(points) > 1:
            a, b = power_law(points)
            axes.plot(flops, [a * x**b for x in flops], color=COLORS[name], linewidth=1.4)
    axes.set_xscale("log")
    axes.set_xlabel("FLOPs of the model over the run")
    axes.set_ylabel("final validation loss")
    axes.legend()
    return figure


def decay_curves(decay: Study, known: Known, narrow: bool) -> Figure:
    """Validation loss over the long runs of the decay study."""
    figure, axes = make_axes("five times the tokens, with and without decay", narrow)
    for (label, runs), color in zip(decay.variants.items(), (BLUE, AMBER, GREY), strict=True):
        _plot(axes, runs[0], known, color, label)
    last = min(known[runs[0]]["curve"][-1][1] for runs in decay.variants.values())
    axes.set_ylim(last - 0.03, last + 0.6)
    axes.set_xlabel("step")
    axes.legend()
    return figure


def entropy(found: list[Comparison], known: Known, narrow: bool) -> Figure:
    """Singular-value entropy by weight group, AdamW's beside Muon's, means over seeds."""
    rows = [(one, group) for one in found for group in group_means(known[one.muon[0]]["entropy"])]
    figure, axes = row_figure("singular-value entropy of the weights at the end", len(rows), narrow, each=0.36)
    for offset, name in ((-0.1, "adamw"), (0.1, "muon")):
        values = [
            statistics.mean(group_means(known[run]["entropy"])[group] for run in getattr(one, name))
            for one, group in rows
        ]
        at = [place + offset for place in row_places(len(rows), narrow)]
        axes.scatter(values, at, s=30, color=COLORS[name], label=NAMES[name], zorder=3)
    name_rows(axes, [f"{group}, {one.model}" for one, group in rows], narrow)
    axes.set_xlabel("1: all singular values are equal")
    legend_below(figure, narrow, columns=2)
    return figure
