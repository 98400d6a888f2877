"""The report's plots, each as an inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from perf.report.chart import (
    AMBER,
    BLUE,
    GREY,
    GRID,
    INK,
    RED,
    SOFT,
    TEAL,
    VIOLET,
    as_svg,
    make_axes,
    names_on_y,
    stacked_bars,
)

SETUP_COLORS = {
    "Muon, home": BLUE,
    "Muon, gather": AMBER,
    "Muon, gather, flat buffer": RED,
    "ZeRO-1 AdamW": GREY,
}
PART_COLORS = {
    "newton_schulz": BLUE,
    "exchange": TEAL,
    "reduce_scatter": AMBER,
    "all_gather": VIOLET,
    "elementwise": GREY,
    "agreement": RED,
}
PHASE_COLORS = {
    "newton_schulz": BLUE,
    "momentum": "#7fb0f5",
    "update": "#bcd5fa",
    "adamw": GREY,
    "scatter_pack": "#9adbd0",
    "gather_wait": TEAL,
    "scatter_wait": "#12705f",
    "reduce_scatter_wait": AMBER,
    "all_gather_wait": VIOLET,
    "agreement": RED,
}


def step_seconds(rows: Sequence[Mapping[str, Any]], floor: float | None = None, width: float = 6.2) -> str:
    """Seconds of each optimizer's step, ours in blue.

    Args:
        floor: seconds to mark, that Newton-Schulz would take as one large matmul. width: in inches.
    """
    figure, axes = make_axes("seconds per step", width, height=0.9 + 0.42 * len(rows))
    ours = [row["name"].startswith(("DistributedMuon", "distributed_muon", "ours")) for row in rows]
    seconds = [row["seconds"] for row in rows]
    bars = axes.barh(range(len(rows)), seconds, height=0.62, color=[BLUE if mine else GREY for mine in ours])
    axes.bar_label(bars, [f" {value:.2f}" for value in seconds], color=INK, fontsize=9)
    axes.set_xlim(0, max(seconds) * 1.12)
    if floor is not None:
        axes.axvline(floor, color=RED, linewidth=1, linestyle=(0, (4, 3)), label="Newton-Schulz as one large matmul")
        figure.legend(loc="outside lower right")
    names_on_y(axes, [row["name"] for row in rows])
    return as_svg(figure)


def step_phases(row: Mapping[str, Any]) -> str:
    """Where one optimizer's step goes."""
    phases = sorted(row["phases"].items(), key=lambda item: -item[1])
    shown = [(name, value) for name, value in phases if value > 0]
    figure, axes = make_axes(f"where the step goes: {row['name']}", height=0.9 + 0.3 * len(shown))
    values = [value * 1e3 for _, value in shown]
    colors = [PHASE_COLORS.get(name, SOFT) for name, _ in shown]
    bars = axes.barh(range(len(shown)), values, height=0.62, color=colors)
    axes.bar_label(bars, [f" {value:.0f} ms" if value >= 10 else f" {value:.1f} ms" for value in values], fontsize=9)
    axes.set_xlim(0, max(values) * 1.16)
    axes.set_xlabel("milliseconds, rank 0; waits are exposed communication")
    names_on_y(axes, [name.replace("_", " ") for name, _ in shown])
    return as_svg(figure)


def newton_schulz(rows: Sequence[Mapping[str, Any]]) -> str:
    """Speed of our forms over torch's, by shape."""
    figure, axes = make_axes("speed over torch.optim.Muon's Newton-Schulz", width=11, height=3.2)
    names = [name for name in rows[0]["speedup"] if name != "torch"]
    palette = dict(zip(names, (GREY, BLUE, TEAL, AMBER, VIOLET, RED), strict=False))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        at = [i + (number - (len(names) - 1) / 2) * width for i in range(len(rows))]
        bars = axes.bar(
            at, [row["speedup"].get(name, 0) for row in rows], width * 0.92, color=palette[name], label=name
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=8, color="white", label_type="center")
    axes.axhline(1, color=INK, linewidth=1)
    axes.set_xticks(range(len(rows)), ["x".join(map(str, row["shape"])) for row in rows])
    axes.grid(False, axis="x")
    axes.legend(ncols=len(names), loc="upper left", bbox_to_anchor=(0.6, 1.14))
    return as_svg(figure)


def collectives(contenders: Mapping[str, Any]) -> str:
    """Exposed and hidden milliseconds of every collective, an optimizer a panel."""
    tallest = max(len(contender["collectives"]) for contender in contenders.values())
    figure, panels = plt.subplots(
        1, len(contenders), figsize=(11.6, 1.3 + 0.36 * tallest), layout="constrained", sharex=True
    )
    for panel, (name, contender) in zip(panels, contenders.items(), strict=True):
        rows = contender["collectives"]
        times = {key: [row[f"{key}_seconds"] * 1e3 for row in rows.values()] for key in ("exposed", "hidden")}
        stacked_bars(panel, range(len(rows)), times, {"exposed": RED, "hidden": TEAL})
        panel.set_title(f"{name}: {contender['traffic_over_adamw']:.3f}x the bytes")
        panel.set_xlabel("ms per step")
        panel.tick_params(length=0, labelsize=8.5)
        names_on_y(panel, [row["name"] for row in rows.values()])
    panels[0].legend(loc="lower right")
    return as_svg(figure)


def traffic(rows: Sequence[Mapping[str, Any]]) -> str:
    """Traffic over AdamW's of every case, with the bounds."""
    figure, axes = make_axes(
        "bytes sent over ZeRO-1 AdamW's, counted, busiest rank", width=11, height=0.9 + 0.27 * len(rows)
    )
    colors = {("home", "bucketed"): BLUE, ("gather", "flat"): AMBER, ("gather", "bucketed"): RED}
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for number, row in enumerate(rows):
        case = row["case"]
        color = colors.get((case["strategy"], case["layout"]), SOFT)
        axes.barh(number, row["over_adamw"] - 1, height=0.62, left=1, color=color)
        text = f"{row['over_adamw']:.4f}"
        axes.text(row["over_adamw"] + 0.004, number, text, va="center", fontsize=8.5, color=INK, bbox=clear)
    for bound, text in ((1.02, "1.02"), (1.25, "1.25: the report's bound"), (4 / 3, "1.33")):
        axes.axvline(bound, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.text(bound, -0.85, text, ha="center", va="center", fontsize=8.5, color=SOFT, bbox=clear)
    axes.set_xlim(1, 1.4)
    axes.set_ylim(len(rows) - 0.5, -1.3)
    names = [
        f"{r['case']['strategy']}, {r['case']['layout']}, {r['case']['model']}, {r['case']['ranks']}" for r in rows
    ]
    axes.set_yticks(range(len(rows)), names, fontsize=8.5)
    axes.grid(False, axis="y")
    return as_svg(figure)


def share_curves(rows: Sequence[Mapping[str, Any]]) -> str:
    """The optimizer's share of forward-backward over the number of ranks."""
    figure, axes = make_axes("exposed optimizer time, share of forward-backward", height=4.1)
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
    axes.legend(loc="lower right")
    return as_svg(figure)


def exposed_parts(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the exposed milliseconds of the home strategy consist of."""
    ours = [row for row in rows if row["setup"] == "Muon, home"]
    figure, axes = make_axes("Muon, home: exposed milliseconds per step", height=4.1)
    bottom = [0.0] * len(ours)
    for part, color in PART_COLORS.items():
        values = [row["exposed_seconds"].get(part, 0.0) * 1e3 for row in ours]
        axes.bar(range(len(ours)), values, 0.68, bottom=bottom, color=color, label=part.replace("_", " "))
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    axes.set_xticks(range(len(ours)), [f"{row['ranks']:,}" for row in ours], fontsize=8, rotation=35)
    axes.set_xlabel("ranks")
    axes.grid(False, axis="x")
    axes.legend(ncols=2, loc="upper center")
    return as_svg(figure)


def memory(rows: Sequence[Mapping[str, Any]]) -> str:
    """Memory of one rank by part at a small and a large scale."""
    present = sorted({row["ranks"] for row in rows})
    worlds = [world for world in (8, 64, 1024) if world in present] or present[:1]
    chosen = [row for world in worlds for row in rows if row["ranks"] == world and "flat" not in row["setup"]]
    parts = list(dict.fromkeys(part for row in chosen for part in row["memory_bytes"]))
    figure, axes = make_axes("memory of one rank, activations left out", height=4.1)
    values = {part: [row["memory_bytes"].get(part, 0.0) / 1e9 for row in chosen] for part in parts}
    colors = dict(zip(parts, (GREY, "#7fb0f5", BLUE, TEAL), strict=False))
    stacked_bars(axes, range(len(chosen)), values, colors)
    for number, row in enumerate(chosen):
        total = sum(row["memory_bytes"].values()) / 1e9
        axes.text(total, number, f" {total:.1f}", va="center", fontsize=8.5, color=INK)
    names_on_y(axes, [f"{row['ranks']:,}  {row['setup']}" for row in chosen])
    axes.set_xlabel("GB")
    axes.margins(x=0.12)
    axes.legend(loc="upper center", bbox_to_anchor=(0.35, -0.14), ncols=2)
    return as_svg(figure)


def sensitivities(rows: Sequence[Mapping[str, Any]]) -> str:
    """The share after each single change, at each number of ranks."""
    worlds = list(rows[0]["share"])
    figure, axes = make_axes("what would change the share", height=4.6)
    for world, color in zip(worlds, (GREY, "#7fb0f5", BLUE), strict=False):
        shares = [row["share"][world] * 100 for row in rows]
        axes.scatter(shares, range(len(rows)), s=42, color=color, label=f"{int(world):,} ranks", zorder=3)
        axes.axvline(shares[0], color=color, linewidth=1, linestyle=(0, (4, 3)))
    for number, row in enumerate(rows):
        values = [share * 100 for share in row["share"].values()]
        axes.plot([min(values), max(values)], [number, number], color=GRID, linewidth=3, zorder=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    names_on_y(axes, [row["change"] for row in rows])
    axes.tick_params(axis="y", labelsize=8.5)
    axes.legend(loc="upper center", bbox_to_anchor=(0.2, -0.08), ncols=3)
    return as_svg(figure)


def links(fitted: Mapping[str, Any]) -> str:
    """Measured points and the fitted line of every collective."""
    figure, axes = make_axes("seconds of one collective over bytes sent per rank")
    for (kind, link), color in zip(fitted.items(), (AMBER, VIOLET, TEAL), strict=False):
        sent, seconds = zip(*link["points"], strict=True)
        line = [link["alpha_seconds"] + count / link["bytes_per_second"] for count in sent]
        axes.scatter(sent, seconds, s=26, color=color)
        axes.plot(sent, line, color=color, linewidth=1.6, label=kind.replace("_", "-"))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda v, _: f"{v / 2**20:g} MiB" if v >= 2**20 else f"{v / 2**10:.0f} KiB")
    axes.yaxis.set_major_formatter(lambda v, _: f"{v * 1e3:g} ms")
    axes.legend()
    return as_svg(figure)


def _ranks_on_x(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    worlds = sorted({row["ranks"] for row in rows})
    axes.set_xticks(worlds, [f"{world:,}" for world in worlds], fontsize=8, rotation=35)
    axes.minorticks_off()
    axes.set_xlabel("ranks")
