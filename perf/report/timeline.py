"""The report's section on `perf.timeline`: what each phase and collective exposes on a simulated clock."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from perf.report.chart import INK, PHASE_COLORS, chart, legend_below, name_rows, row_bars, row_figure, row_places
from perf.report.page import Section, note, origin, table

# Phases that have a bar of their own, in the order of a step.
PHASES = (
    "reduce_scatter_wait", "agreement", "momentum", "gather_wait", "newton_schulz", "scatter_wait", "all_gather_wait",
)  # fmt: skip
OTHERS = "the rest"


def timeline_section(result: dict[str, Any]) -> Section:
    """Every number of ranks, Muon and AdamW."""
    rows = result["rows"]
    cells = []
    for row in rows:
        sent = row["communication"].values()
        exposed, network = (sum(one[key] for one in sent) * 1e3 for key in ("exposed_seconds", "network_seconds"))
        cells.append(
            [f"{row['ranks']:,}", row["setup"], f"{row['forward_backward_seconds']:.2f} s",
             f"{row['added_seconds'] * 1e3:.1f} ms", f"{row['share']:.2%}", f"{network:.0f} ms", f"{exposed:.1f} ms",
             f"{row['counts']['launches']:,}", f"{row['counts']['allocations']:,}"]
        )  # fmt: skip
    header = (
        "ranks", "optimizer", "forward-backward", "added", "share", "communication", "of it exposed",
        "kernel launches", "allocations",
    )  # fmt: skip
    body = note(
        "The real optimizer at full size, tensors without memory, as the busiest rank: its collectives take what the "
        "link model says, in NCCL's order. Added: beside forward and backward, which it delays as well; the bars are "
        "its own phases. Not run on a GPU."
    )
    return "A step on a simulated clock", body + phases_chart(rows) + table(header, cells) + origin(result)


def phases_chart(rows: list[dict[str, Any]]) -> str:
    """What the optimizer's own milliseconds consist of."""
    phases = [row["phases"] for row in rows]
    parts = {name: [some.get(name, 0.0) * 1e3 for some in phases] for name in PHASES}
    parts[OTHERS] = [sum(value for name, value in some.items() if name not in PHASES) * 1e3 for some in phases]

    def draw(narrow: bool) -> Figure:
        figure, axes = row_figure("milliseconds of a step, by phase", len(rows), narrow)
        row_bars(axes, narrow, parts, {**PHASE_COLORS, OTHERS: INK})
        totals = [sum(some.values()) * 1e3 for some in phases]
        for place, total in zip(row_places(len(rows), narrow), totals, strict=True):
            axes.text(total, place, f" {total:.1f}", va="center", fontsize=8.5, color=INK)
        name_rows(axes, [f"{row['ranks']:,}  {row['setup']}" for row in rows], narrow)
        axes.margins(x=0.12)
        legend_below(figure, narrow, columns=4)
        return figure

    return chart(draw)
