"""The report's sections on `launch/benchmark.sh`: strategies and bucket sizes over hosts, predicted and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from perf.check import PARTS, within
from perf.report.chart import (
    BLUE,
    GREY,
    INK,
    PART_COLORS,
    SOFT,
    chart,
    legend_below,
    make_axes,
    name_rows,
    row_figure,
)  # fmt: skip
from perf.report.communication import comm_section, links_section
from perf.report.page import Section, Tile, folded, note, origin, pair, table
from perf.report.step import step_section

CONTENDER_COLORS = {"home": BLUE, "gather": "#eda53a", "adamw": GREY}


def sweep_section(result: dict[str, Any]) -> Section:
    """Every strategy with every bucket size, and Megatron's splits."""
    cells = []
    for run in result["comm"]:
        base = run["contenders"]["adamw"]["step_seconds"]
        for name, row in run["contenders"].items():
            waited = sum(collective["exposed_seconds_least"] for collective in row["collectives"].values())
            cells.append(
                [f"{run['settings']['bucket_mb']:g} MiB, {name}", f"{row['step_seconds'] * 1e3:,.0f} ms",
                 f"{row['step_seconds'] / base:.2f}x", f"{waited * 1e3:,.1f} ms",
                 f"{max(row['sent_bytes_by_rank']) / 2**20:,.1f} MiB", f"{row['traffic_over_adamw']:.4f}"]
            )  # fmt: skip
    header = ("bucket, optimizer", "step", "of AdamW's", "waited", "sent", "traffic over AdamW's")
    settings = result["comm"][0]["settings"]
    body = note(
        f"Whole training steps of a {settings['model']} model (hidden {settings['hidden_size']}, {settings['layers']} "
        f"layers) with {settings['batch_size']} sequences a rank, {_where(result)}. Waited for collectives by the rank "
        "that came last, so that late ranks do not count."
    )
    body += pair(sweep_chart(result["comm"], result["checks"]), table(header, cells))
    if result["megatron"]:
        body += _splits(result["megatron"])
    body += folded(*links_section(result["links"])) + folded(*step_section(result["step"]))
    for run in result["comm"]:
        title, content = comm_section(run)
        body += folded(f"{title}, {run['settings']['bucket_mb']:g} MiB per bucket", content)
    return f"Strategies and bucket sizes, {_where(result)}", body + origin(result)


def check_section(result: dict[str, Any]) -> Section:
    """Predicted and measured steps."""
    rows, steps, parts, marks = [], [], [], []
    for run in result["checks"]:
        for row in run["rows"]:
            name = f"{run['settings']['bucket_mb']:g} MiB, {row['name']}"
            rows.append((name, row))
            seconds = [row[f"{kind}_seconds"] for kind in ("forward_backward", "predicted", "measured")]
            steps.append(
                [name, *(f"{value * 1e3:,.0f}" for value in seconds), f"{row['ratio']:.2f}",
                 row["worst"].replace("_", " "), f"{row['off']:.0%}"]
            )  # fmt: skip
            marks.append("good" if within(row) else "bad")
            exposed = [row["parts"].get(part) for part in PARTS]
            parts.append(
                [name, *(f"{p['predicted'] * 1e3:,.1f} / {p['measured'] * 1e3:,.1f}" if p else "-" for p in exposed)]
            )
    header = (
        "bucket, optimizer", "forward-backward", "predicted", "measured", "ratio", "furthest off", "all parts off",
    )  # fmt: skip
    body = note(
        "Milliseconds of a step. Taken as measured: forward and backward without a collective, Newton-Schulz by "
        "shape, memory bandwidth and the links. Predicted: who does and sends what, what hides under what, and the "
        "step. Delayed is what collectives slow the computation beside them; measured, it is what no other part "
        "accounts for, with late ranks and the host's work. A ratio near 1 may be errors that cancel: all parts off is "
        "the sum of the parts' distances over the measured step. Marked: both within 25 % or not."
    )
    body += check_chart(rows) + table(header, steps, marks=marks)
    by_part = table(("bucket, optimizer", *(part.replace("_", " ") for part in PARTS)), parts)
    body += folded("Exposed milliseconds by part, predicted / measured", by_part)
    return f"Predicted against measured, {_where(result)}", body + origin(result)


def check_tile(results: Sequence[Mapping[str, Any]]) -> Tile | None:
    """The range of predicted over measured."""
    ratios = [row["ratio"] for result in results for run in result["checks"] for row in run["rows"]]
    if not ratios:
        return None
    return f"{min(ratios):.2f}-{max(ratios):.2f}x", "predicted over measured training step, two hosts"


def _where(result: Mapping[str, Any]) -> str:
    nodes = result["world"] // result["node_ranks"]
    sent, seconds = result["links"]["links"]["all_gather"]["points"][-1]
    rate = sent / seconds * 8 / 1e9
    return f"{result['world']} ranks on {nodes} {'host' if nodes == 1 else 'hosts'} at {rate:.2g} Gbit/s"


def _splits(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ("Megatron split", "model", "strategy", "optimizer", "tokens/s", "step")
    cells = [
        [f"TP {row['tp']} x PP {row['pp']} x DP {row['world_size'] // row['tp'] // row['pp']}", row["model"],
         row["strategy"], f"{row['optimizer_seconds'] * 1e3:,.0f} ms", f"{row['tokens_per_second']:,.0f}",
         f"{row['seconds'] * 1e3:,.0f} ms"]
        for row in rows
    ]  # fmt: skip
    return table(header, cells)


def sweep_chart(runs: Sequence[Mapping[str, Any]], checks: Sequence[Mapping[str, Any]]) -> str:
    """Step seconds over bucket sizes, one line per optimizer; predictions as crosses."""
    sizes = [run["settings"]["bucket_mb"] for run in runs]

    def draw(narrow: bool) -> Figure:
        figure, axes = make_axes("milliseconds per training step", narrow, height=3.8)
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
        legend_below(figure, narrow, columns=4)
        return figure

    return chart(draw)


def check_chart(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Two bars per step, predicted and measured, by part."""
    colors = {"forward_backward": "#c9d3de", **PART_COLORS}

    def seconds(row: Mapping[str, Any], part: str, kind: str) -> float:
        if part == "forward_backward":
            return row["forward_backward_seconds"]
        return max(0.0, row["parts"].get(part, {}).get(kind, 0.0))

    def draw(narrow: bool) -> Figure:
        title = "milliseconds of a step: predicted above, measured below"
        figure, axes = row_figure(title, len(rows), narrow)
        for number, (_, row) in enumerate(rows):
            for offset, kind in ((-0.19, "predicted"), (0.19, "measured")):
                place = number + (0.22 + offset / 2 if narrow else offset)
                left = 0.0
                for part, color in colors.items():
                    label = part.replace("_", " ") if number == 0 and kind == "predicted" else None
                    width = seconds(row, part, kind) * 1e3
                    axes.barh(place, width, 0.17 if narrow else 0.34, left=left, color=color, label=label)
                    left += width
                axes.text(left, place, f" {left:,.0f}", va="center", fontsize=7 if narrow else 8, color=INK)
        name_rows(axes, [name for name, _ in rows], narrow)
        axes.margins(x=0.08)
        legend_below(figure, narrow, columns=4)
        return figure

    return chart(draw)
