"""The report's sections on collectives: those of a training step (`perf.comm`), and the links (`perf.links`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from perf.bandwidth import algorithm_rate, overlap
from perf.report.chart import (
    AMBER,
    RED,
    TEAL,
    VIOLET,
    chart,
    legend_below,
    make_axes,
    name_rows,
    panels,
    row_bars,
    set_title,
)  # fmt: skip
from perf.report.page import Section, note, origin, pair, table


def comm_section(result: dict[str, Any]) -> Section:
    """Of `perf.comm`."""
    contenders = result["contenders"]
    cells, marks = [], []
    for name, contender in contenders.items():
        for label, row in contender["collectives"].items():
            times = [f"{row[f'{key}_seconds'] * 1e3:.2f}" for key in ("alone", "exposed", "hidden")]
            counts = [f"{row['bytes_predicted']:,}", f"{row['bytes_measured']:,}"]
            bus = row["bus_bytes_per_second"]
            whole = algorithm_rate(label, bus, result["world"])
            rates = [f"{whole / 1e9:.2f}" if whole else "-", f"{bus / 1e9:.2f}"]
            cells.append([name, row["name"], str(row["calls"]), *times, f"{overlap(row):.0%}", *rates, *counts])
            marks.append("" if row["bytes_predicted"] == row["bytes_measured"] else "bad")
    header = (
        "optimizer", "collective", "calls", "alone ms", "exposed ms", "hidden ms", "overlap", "algorithm GB/s",
        "bus GB/s", "bytes predicted", "bytes measured",
    )  # fmt: skip
    ratios = ", ".join(f"{name} {contender['traffic_over_adamw']:.4f}" for name, contender in contenders.items())
    settings = result["settings"]
    body = note(
        f"Training steps of a {settings['model']} model on {result['world']} ranks ({result['backend']}), layout "
        f"{settings['layout']}. Alone: the same calls repeated with nothing else to do. Exposed: what the step waited, "
        "late ranks included. Overlap: the share of alone that was hidden. Algorithm and bus GB/s as nccl-tests define "
        f"them. Traffic of all ranks over ZeRO-1 AdamW's: {ratios}."
    )
    body += collectives_chart(contenders) + table(header, cells, marks=marks)
    return "Communication of a training step", body + origin(result)


def links_section(result: dict[str, Any]) -> Section:
    """Of `perf.links`."""
    cells = []
    for kind, link in result["links"].items():
        whole = algorithm_rate(kind, link["bytes_per_second"], result["world"])
        cells.append(
            [kind.replace("_", "-"), f"{link['alpha_seconds'] * 1e6:,.0f} us",
             f"{whole / 1e9:.3g} GB/s" if whole else "-", f"{link['bytes_per_second'] / 1e9:.3g} GB/s",
             f"{link['delay']:.0%}"]
        )  # fmt: skip
    body = note(
        f"{result['world']} ranks, {result['backend']}: seconds = alpha + bytes sent per rank / bus bandwidth, which "
        "is nccl-tests' busbw. Delay: what matmuls take longer while a large message is under way, over its seconds. "
        f"One rank's bf16 matmul runs at {result['matmul_flops'] / 1e9:,.0f} GFLOP/s."
    )
    fitted = table(("collective", "alpha", "algorithm bandwidth", "bus bandwidth", "delay"), cells)
    return "Links at hand", body + pair(links_chart(result["links"]), fitted) + origin(result)


def collectives_chart(contenders: Mapping[str, Any]) -> str:
    """Exposed and hidden milliseconds of every collective, an optimizer a panel."""
    tallest = max(len(contender["collectives"]) for contender in contenders.values())

    def draw(narrow: bool) -> Figure:
        figure, drawn = panels(len(contenders), narrow, height=1.3 + (0.5 if narrow else 0.36) * tallest)
        for axes, (name, contender) in zip(drawn, contenders.items(), strict=True):
            rows = contender["collectives"].values()
            times = {key: [row[f"{key}_seconds"] * 1e3 for row in rows] for key in ("exposed", "hidden")}
            row_bars(axes, narrow, times, {"exposed": RED, "hidden": TEAL})
            set_title(axes, f"{name}: {contender['traffic_over_adamw']:.3f}x bytes", narrow)
            axes.set_xlabel("ms per step")
            axes.tick_params(length=0, labelsize=8.5)
            name_rows(axes, [row["name"] for row in rows], narrow)
        legend_below(figure, narrow, columns=2, axes=drawn[0])
        return figure

    return chart(draw)


def links_chart(fitted: Mapping[str, Any]) -> str:
    """Measured points and the fitted line of every collective."""

    def draw(narrow: bool) -> Figure:
        figure, axes = make_axes("seconds of one collective over bytes sent per rank", narrow)
        for (kind, link), color in zip(fitted.items(), (AMBER, VIOLET, TEAL), strict=False):
            sent, seconds = zip(*link["points"], strict=True)
            line = [link["alpha_seconds"] + count / link["bytes_per_second"] for count in sent]
            axes.scatter(sent, seconds, s=26, color=color)
            axes.plot(sent, line, color=color, linewidth=1.6, label=kind.replace("_", "-"))
        axes.set_xscale("log", base=4 if narrow else 2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda v, _: f"{v / 2**20:g} MiB" if v >= 2**20 else f"{v / 2**10:.0f} KiB")
        axes.yaxis.set_major_formatter(lambda v, _: f"{v * 1e3:g} ms")
        axes.tick_params(axis="x", labelsize=8, rotation=30)
        axes.legend()
        return figure

    return chart(draw)
