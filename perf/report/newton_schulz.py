"""The report's section on `perf.newton_schulz`: speed of our forms by shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from perf.report.chart import (
    AMBER,
    BLUE,
    GREY,
    INK,
    RED,
    TEAL,
    VIOLET,
    chart,
    legend_below,
    name_rows,
    row_figure,
    row_places,
)  # fmt: skip
from perf.report.page import Section, Tile, note, origin, table


def newton_schulz_section(result: dict[str, Any]) -> Section:
    """Of `perf.newton_schulz`."""
    rows = result["rows"]
    names = list(rows[0]["seconds"])
    cells = [
        [shape_name(row), row["form"]]
        + [f"{row['seconds'][name] * 1e3:.2f} ms" for name in names]
        + [f"{row['speedup']['auto']:.2f}x", f"{row['share_of_matmul']['auto']:.0%}"]
        for row in rows
    ]
    header = ("shape", "form chosen", *names, "auto vs torch", "of matmul rate")
    body = note("Five quintic steps in bf16 against the function torch.optim.Muon calls, in the same run.")
    return "Newton-Schulz", body + speedup_chart(rows) + table(header, cells) + origin(result)


def newton_schulz_tile(result: dict[str, Any]) -> Tile:
    """The largest speedup."""
    best = max(result["rows"], key=lambda row: row["speedup"]["auto"])
    return f"{best['speedup']['auto']:.2f}x", f"faster Newton-Schulz than torch.optim.Muon's at {shape_name(best)}"


def shape_name(row: Mapping[str, Any]) -> str:
    return "x".join(map(str, row["shape"]))


def speedup_chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """Speed of our forms over torch's, a dot per form."""
    names = [name for name in rows[0]["speedup"] if name != "torch"]
    palette = dict(zip(names, (GREY, BLUE, TEAL, AMBER, VIOLET, RED), strict=False))

    def draw(narrow: bool) -> Figure:
        figure, axes = row_figure("speed over torch.optim.Muon's Newton-Schulz", len(rows), narrow, each=0.34)
        at = row_places(len(rows), narrow)
        for name in names:
            axes.scatter(
                [row["speedup"].get(name, 0) for row in rows], at, s=44, color=palette[name], label=name, zorder=3
            )
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_xlim(left=0)
        name_rows(axes, [shape_name(row) for row in rows], narrow)
        legend_below(figure, narrow, columns=len(names))
        return figure

    return chart(draw)
