"""The report's sections on one optimizer step beside its peers: plain, under DeepSpeed, under Megatron-core."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from perf.bandwidth import overlap
from perf.report.chart import (
    BLUE,
    GREY,
    HALF,
    INK,
    PHASE_COLORS,
    RED,
    SOFT,
    WHOLE,
    chart,
    legend_below,
    name_rows,
    row_figure,
    row_places,
)  # fmt: skip
from perf.report.page import Section, Tile, folded, note, origin, pair, table


def step_section(result: dict[str, Any]) -> Section:
    """Of `perf.step`."""
    rows, base = result["rows"], result["rows"][0]["seconds"]
    cells = [
        [
            row["name"],
            f"{row['seconds']:.3f} s",
            f"{row['seconds'] / base:.2f}x",
            *(f"{row[f'{key}_bytes'] / 2**20:,.0f} MiB" for key in ("state", "sent", "transient")),
            str(row["ns_calls"]),
        ]
        for row in rows
    ]
    header = ("optimizer", "step", "of ours", "state", "sent", "transient", "NS calls")
    body = note(
        f"{result['world']} ranks, from local gradients to whole updated parameters on every rank; medians of "
        "interleaved rounds. Bytes and calls are those of the rank that has most. At the rate of a large matmul, the "
        f"FLOPs of Newton-Schulz alone would take {result['floor_seconds']:.3f} s."
    )
    body += pair(seconds_chart(rows, result["floor_seconds"], HALF), phases_chart(rows[0]))
    body += table(header, cells, lead=0)
    flights = [
        [label, f"{row['calls']}", f"{row['bytes'] / 2**20:,.2f} MiB", f"{row['exposed_seconds'] * 1e3:,.1f} ms",
         f"{row['hidden_seconds'] * 1e3:,.1f} ms", f"{overlap(row):.0%}"]
        for label, row in rows[0].get("communication", {}).items()
    ]  # fmt: skip
    if flights:
        header = ("collective", "calls", "sent", "exposed", "hidden", "overlap")
        body += folded(f"Collectives of {rows[0]['name']}, one step of rank 0", table(header, flights))
    return "A whole optimizer step", body + origin(result)


def step_tile(result: dict[str, Any]) -> Tile | None:
    """Our step against all-reduce and torch.optim.Muon."""
    replicated = next((row for row in result["rows"] if "torch.optim.Muon" in row["name"]), None)
    if replicated is None:
        return None
    times = replicated["seconds"] / result["rows"][0]["seconds"]
    return f"{times:.2f}x", f"faster step than {replicated['name']}, {result['world']} ranks"


def fsdp2_section(result: dict[str, Any]) -> Section:
    """Of `perf.fsdp2_step`."""
    rows, base = result["rows"], result["rows"][0]["seconds"]
    cells = [
        [row["name"], f"{row['seconds']:.3f} s", f"{row['seconds'] / base:.2f}x",
         f"{row['cpu_seconds']:.3f} s", str(row["collectives"]),
         *(f"{row[f'{key}_bytes'] / 2**20:,.1f} MiB" for key in ("sent", "state", "transient")), str(row["ns_calls"])]
        for row in rows
    ]  # fmt: skip
    header = ("optimizer", "step", "of ours", "CPU", "collectives", "sent", "state", "transient", "NS calls")
    body = note(
        f"{result['world']} ranks, from equal sharded gradients; FSDP2 moves parameters in the next forward. CPU "
        f"seconds are of all ranks together, the rest of the rank that has most. {result['note']}"
    )
    body += seconds_chart(rows) + table(header, cells, lead=0)
    moved = [
        [name, f"{counts['fsdp2'] / 2**20:,.2f} MiB", f"{counts['exchange'] / 2**20:,.2f} MiB",
         f"{(counts['fsdp2'] + counts['exchange']) / counts['fsdp2']:.3f}x"]
        for name, counts in result["traffic"].items()
    ]  # fmt: skip
    body += note("Bytes of one training step per rank, by how the matrices are cut.")
    body += table(("what is cut", "FSDP2's own", "our exchange", "together"), moved)
    return "A step under FSDP2", body + origin(result)


def deepspeed_section(result: dict[str, Any]) -> Section:
    """Of `perf.deepspeed_step`."""
    cells, bars = [], []
    for ours, other in result["pairs"].values():
        for row in (ours, other):
            name = row["name"] if row is other else f"ours, beside {other['name']}"
            bars.append({"name": name, "seconds": row["seconds"]})
            cells.append(
                [name, f"{row['seconds']:.3f} s", f"{min(row['seconds_all']):.3f} s",
                 f"{row['state_bytes'] / 2**20:,.0f} MiB",
                 f"{row['newton_schulz_runs']} for {row['matrices']} matrices",
                 f"{row['seconds'] / ours['seconds']:.2f}x"]
            )  # fmt: skip
    setup = f"ZeRO stage {result['stage']}{', state on the host' if result['offload'] else ''}"
    header = ("optimizer", "backward and step", "fastest", "state per rank", "Newton-Schulz runs", "of ours")
    body = note(
        f"{result['world']} ranks, fp32, {setup}; ours and one of DeepSpeed's optimizers take turns, with equal "
        "gradients and clipping."
    )
    body += seconds_chart(bars) + table(header, cells)
    names = sorted({name for found in result["wire"].values() for name in found})
    wire = [
        [config, *(f"{found[name]:g}" if name in found else "-" for name in names)]
        for config, found in result["wire"].items()
    ]
    if wire:
        body += note("Messages of one step, bytes per parameter; an all-reduce sends each of its messages twice.")
        body += table(("configuration", *names), wire)
    return f"A step under DeepSpeed, {setup}", body + origin(result)


def megatron_section(result: dict[str, Any]) -> Section:
    """Of `perf.megatron_step`."""
    rows = result["contenders"]
    ours = next(iter(rows.values()))["seconds"]
    bars = [{"name": name, "seconds": row["seconds"]} for name, row in rows.items()]
    cells = []
    for name, row in rows.items():
        most = [f"{fold(row[key]) / 1e6:.2f} MB" for key in ("state_bytes", "sent_bytes")
                for fold in (max, statistics.mean)]  # fmt: skip
        cells.append(
            [name, f"{row['seconds']:.3f} s", f"{row['fastest']:.3f} s", *most, f"{row['seconds'] / ours:.2f}x"]
        )
    header = ("optimizer", "step", "fastest", "state, most", "mean", "sent, most", "mean", "of ours")
    least = {
        mode: min(value for kind, value in found.items() if kind != "length ratio")
        for mode, found in result["cosine"].items()
    }
    body = note(
        "One step after the same gradients: reduction, norm, clipping, Newton-Schulz, update and gathering "
        f"({result['machine']['command']}). With equal settings the cosine of every matrix's update to Megatron's is "
        f"less than 1 by {', '.join(f'{1 - value:.0e} ({mode})' for mode, value in least.items())} at most."
    )
    return "A step under Megatron-core", body + seconds_chart(bars) + table(header, cells) + origin(result)


def seconds_chart(rows: Sequence[Mapping[str, Any]], floor: float | None = None, width: float = WHOLE) -> str:
    """Seconds of each optimizer's step, ours in blue.

    Args:
        rows: with "name" and "seconds". floor: seconds to mark, that Newton-Schulz would take as one large matmul.
        width: in inches.
    """
    ours = [row["name"].startswith(("DistributedMuon", "distributed_muon", "ours")) for row in rows]
    seconds = [row["seconds"] for row in rows]

    def draw(narrow: bool) -> Figure:
        figure, axes = row_figure("seconds per step", len(rows), narrow, width)
        at = row_places(len(rows), narrow)
        bars = axes.barh(at, seconds, height=0.34 if narrow else 0.62, color=[BLUE if mine else GREY for mine in ours])
        axes.bar_label(bars, [f" {value:.2f}" for value in seconds], color=INK, fontsize=9)
        axes.set_xlim(0, max(seconds) * 1.14)
        name_rows(axes, [row["name"] for row in rows], narrow)
        if floor is not None:
            dashes = (0, (4, 3))
            axes.axvline(floor, color=RED, linewidth=1, linestyle=dashes, label="Newton-Schulz as one large matmul")
            legend_below(figure, narrow, columns=1)
        return figure

    return chart(draw)


def phases_chart(row: Mapping[str, Any]) -> str:
    """Where one optimizer's step goes."""
    shown = [(name, value * 1e3) for name, value in row["phases"].items() if value > 0]
    shown.sort(key=lambda item: -item[1])
    names, values = [name.replace("_", " ") for name, _ in shown], [value for _, value in shown]

    def draw(narrow: bool) -> Figure:
        figure, axes = row_figure(f"where the step goes: {row['name']}", len(shown), narrow, HALF, each=0.3)
        colors = [PHASE_COLORS.get(name, SOFT) for name, _ in shown]
        bars = axes.barh(row_places(len(shown), narrow), values, height=0.34 if narrow else 0.62, color=colors)
        axes.bar_label(
            bars, [f" {value:.0f} ms" if value >= 10 else f" {value:.1f} ms" for value in values], fontsize=9
        )
        axes.set_xlim(0, max(values) * 1.2)
        axes.set_xlabel("milliseconds, rank 0; waits are exposed")
        name_rows(axes, names, narrow)
        return figure

    return chart(draw)
