"""The report's sections on `perf.scale`: steps predicted at scales nobody has at hand, and bytes counted there."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from perf.report.chart import (
    AMBER,
    BLUE,
    GREY,
    GRID,
    HALF,
    INK,
    PALE_BLUE,
    PART_COLORS,
    RED,
    SOFT,
    TEAL,
    chart,
    legend_below,
    make_axes,
    name_rows,
    row_bars,
    row_figure,
    row_places,
)  # fmt: skip
from perf.report.page import Section, Tile, folded, note, origin, pair, table

SETUP_COLORS = {
    "Muon, home": BLUE,
    "Muon, gather": AMBER,
    "Muon, gather, flat buffer": RED,
    "ZeRO-1 AdamW": GREY,
    "FSDP2, Muon, home": TEAL,
    "FSDP2, AdamW": PALE_BLUE,
}
HOME = "Muon, home"
Rows = Sequence[Mapping[str, Any]]


def scale_section(result: dict[str, Any]) -> Section:
    """The predictions."""
    inputs, rows = result["assumptions"], result["curves"]
    cells = [
        [
            f"{row['ranks']:,}",
            row["setup"],
            f"{row['forward_backward_seconds']:.2f} s",
            f"{row['optimizer_seconds'] * 1e3:.1f} ms",
            f"{sum(row['communication_seconds'].values()) * 1e3:.0f} ms",
            f"{sum(row['memory_bytes'].values()) / 1e9:.1f} GB",
            f"{row['ns_max_over_ideal']:.2f}x" if row["ns_max_over_ideal"] else "-",
            f"{row['share_of_forward_backward']:.2%}",
        ]
        for row in rows
    ]
    header = (
        "ranks", "optimizer", "forward-backward", "exposed", "communication alone", "memory", "NS work", "share",
    )  # fmt: skip
    body = note(
        f"{inputs['model']} on {inputs['hardware.name']}: {inputs['global_tokens']:,} tokens a step, MFU "
        f"{inputs['mfu']:.0%} assumed, tp {inputs['tp']}, pp {inputs['pp']}, ep {inputs['ep']}. Predicted from the "
        "plan; share is the optimizer's exposed seconds over forward-backward."
    )
    body += pair(share_chart(rows), exposed_chart(rows))
    body += pair(memory_chart(rows), sensitivity_chart(result["sensitivities"]))
    listed = "\n".join(f"{key:34s} {value:,}" if isinstance(value, (int, float)) else f"{key:34s} {value}"
                       for key, value in inputs.items())  # fmt: skip
    body += folded("All inputs", f"<pre>{html.escape(listed)}</pre>") + folded("All numbers", table(header, cells))
    return "What it will cost at scale", body + origin(result)


def traffic_section(rows: Rows) -> Section:
    """The bytes that `--check-bytes` counted."""
    cells, marks = [], []
    for row in rows:
        case, (low, high) = row["case"], row["bounds"]
        equal = row["predicted"] == row["measured"]
        marks.append("good" if row["within_bounds"] and equal else "bad")
        counts = [f"{sum(row[key].values()):,}" for key in ("predicted", "measured")]
        ratios = [f"{row['over_adamw_full_size']:.4f}", f"{row['over_adamw']:.4f}"]
        cells.append(
            [case["model"], f"{case['ranks']:,}", case["strategy"], case["layout"], *counts,
             f"{row['ns_max_over_ideal']:.1f}x", f"({low:g}, {high:.2f}]", *ratios]
        )  # fmt: skip
    header = (
        "model", "ranks", "strategy", "layout", "bytes predicted", "bytes counted", "NS work",
        "bound", "full size", "over AdamW",
    )  # fmt: skip
    body = note(
        "The real optimizer as the busiest rank of many, on torch's fake process group and a model of the same "
        "matrices with shorter sides. The Moonlight report's (1, 1.25] for its gather holds on one flat buffer; with "
        "every bucket cut over all ranks it grows to 1.33 of AdamW's bytes, and every rank does all Newton-Schulz."
    )
    return "Traffic over ZeRO-1 AdamW's", body + traffic_chart(rows) + table(header, cells, marks=marks)


def scale_tiles(result: dict[str, Any]) -> list[Tile]:
    """The worst traffic of the home strategy, and its share of forward-backward at two scales."""
    found: list[Tile] = []
    homes = [row for row in result.get("bytes", ()) if row["case"]["strategy"] == "home"]
    if homes:
        worst = max(homes, key=lambda row: row["over_adamw"])
        text = f"traffic over ZeRO-1 AdamW's at {worst['case']['ranks']} ranks and less above"
        found.append((f"{worst['over_adamw'] - 1:+.1%}", text))
    model = result["assumptions"]["model"]
    for row in result["curves"]:
        if row["setup"] == HOME and row["ranks"] in (64, 1024):
            text = f"of forward-backward, {model} on {row['ranks']:,} ranks, predicted"
            found.append((f"{row['share_of_forward_backward']:.2%}", text))
    return found


def share_chart(rows: Rows) -> str:
    """The optimizer's share of forward-backward over the number of ranks."""

    def draw(narrow: bool) -> Figure:
        figure, axes = make_axes("exposed optimizer time, share of forward-backward", narrow, height=4.1)
        for setup, color in SETUP_COLORS.items():
            points = [(row["ranks"], row["share_of_forward_backward"]) for row in rows if row["setup"] == setup]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=2, color=color, label=setup)
        axes.axhspan(0.01, 0.03, color=TEAL, alpha=0.10, linewidth=0)
        first = min(row["ranks"] for row in rows)
        axes.text(first, 0.037, "1-3 %: the Moonlight report", color=TEAL, fontsize=8.5, va="center")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value * 100:g} %")
        _ranks_on_x(axes, rows)
        legend_below(figure, narrow, columns=2)
        return figure

    return chart(draw)


def exposed_chart(rows: Rows) -> str:
    """What the exposed milliseconds of the home strategy consist of."""
    ours = [row for row in rows if row["setup"] == HOME]

    def draw(narrow: bool) -> Figure:
        figure, axes = make_axes("Muon, home: exposed milliseconds per step", narrow, height=4.1)
        bottom = [0.0] * len(ours)
        for part, color in PART_COLORS.items():
            values = [row["exposed_seconds"].get(part, 0.0) * 1e3 for row in ours]
            if any(values):
                axes.bar(range(len(ours)), values, 0.68, bottom=bottom, color=color, label=part.replace("_", " "))
                bottom = [a + b for a, b in zip(bottom, values, strict=True)]
        axes.set_xticks(range(len(ours)), [f"{row['ranks']:,}" for row in ours], fontsize=8, rotation=45)
        axes.set_xlabel("ranks")
        axes.grid(False, axis="x")
        legend_below(figure, narrow, columns=3)
        return figure

    return chart(draw)


def memory_chart(rows: Rows) -> str:
    """Memory of one rank by part at a small and a large scale."""
    present = sorted({row["ranks"] for row in rows})
    worlds = [world for world in (8, 64, 1024) if world in present] or present[:1]
    chosen = [row for world in worlds for row in rows if row["ranks"] == world and "flat" not in row["setup"]]
    parts = list(dict.fromkeys(part for row in chosen for part in row["memory_bytes"]))
    values = {part: [row["memory_bytes"].get(part, 0.0) / 1e9 for row in chosen] for part in parts}
    colors = dict(zip(parts, (GREY, PALE_BLUE, BLUE, TEAL), strict=False))

    def draw(narrow: bool) -> Figure:
        figure, axes = row_figure("memory of one rank, activations left out", len(chosen), narrow, HALF, each=0.36)
        row_bars(axes, narrow, values, colors)
        for place, row in zip(row_places(len(chosen), narrow), chosen, strict=True):
            total = sum(row["memory_bytes"].values()) / 1e9
            axes.text(total, place, f" {total:.1f}", va="center", fontsize=8.5, color=INK)
        name_rows(axes, [f"{row['ranks']:,}  {row['setup']}" for row in chosen], narrow)
        axes.set_xlabel("GB")
        axes.margins(x=0.12)
        legend_below(figure, narrow, columns=2)
        return figure

    return chart(draw)


def sensitivity_chart(rows: Rows) -> str:
    """The share after each single change, at each number of ranks."""
    worlds = list(rows[0]["share"])

    def draw(narrow: bool) -> Figure:
        figure, axes = row_figure("what would change the share", len(rows), narrow, HALF, each=0.28)
        at = row_places(len(rows), narrow)
        for world, color in zip(worlds, (GREY, PALE_BLUE, BLUE), strict=False):
            shares = [row["share"][world] * 100 for row in rows]
            axes.scatter(shares, at, s=42, color=color, label=f"{int(world):,} ranks", zorder=3)
            axes.axvline(shares[0], color=color, linewidth=1, linestyle=(0, (4, 3)))
        for place, row in zip(at, rows, strict=True):
            values = [share * 100 for share in row["share"].values()]
            axes.plot([min(values), max(values)], [place, place], color=GRID, linewidth=3, zorder=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        name_rows(axes, [row["change"] for row in rows], narrow)
        axes.tick_params(axis="y", labelsize=8.5)
        legend_below(figure, narrow, columns=3)
        return figure

    return chart(draw)


def traffic_chart(rows: Rows) -> str:
    """Traffic over AdamW's of every case, with the bounds."""
    colors = {("home", "bucketed"): BLUE, ("gather", "flat"): AMBER, ("gather", "bucketed"): RED}
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    cases = [row["case"] for row in rows]
    names = [f"{c['strategy']}, {c['layout']}, {c['model']}, {c['ranks']}" for c in cases]

    def draw(narrow: bool) -> Figure:
        title = "bytes sent over ZeRO-1 AdamW's, counted, busiest rank"
        figure, axes = row_figure(title, len(rows), narrow, each=0.27)
        at = row_places(len(rows), narrow)
        bars = [row["over_adamw"] - 1 for row in rows]
        axes.barh(at, bars, height=0.34 if narrow else 0.62, left=1,
                  color=[colors.get((case["strategy"], case["layout"]), SOFT) for case in cases])  # fmt: skip
        for place, row in zip(at, rows, strict=True):
            axes.text(row["over_adamw"] + 0.004, place, f"{row['over_adamw']:.4f}", va="center", fontsize=8.5,
                      color=INK, bbox=clear)  # fmt: skip
        name_rows(axes, names, narrow)
        for bound, text in ((1.25, "1.25: the report's bound"), (4 / 3, "1.33: every bucket cut over all ranks")):
            axes.axvline(
                bound, color=SOFT, linewidth=1, linestyle=(0, (4, 3)) if bound < 1.3 else ":", label=text, zorder=1
            )
        axes.set_xlim(1, 1.4 if not narrow else 1.48)
        axes.tick_params(axis="y", labelsize=8.5)
        legend_below(figure, narrow, columns=1 if narrow else 2)
        return figure

    return chart(draw)


def _ranks_on_x(axes: Axes, rows: Rows) -> None:
    worlds = sorted({row["ranks"] for row in rows})
    axes.set_xticks(worlds, [f"{world:,}" for world in worlds], fontsize=8, rotation=45)
    axes.minorticks_off()
    axes.set_xlabel("ranks")
