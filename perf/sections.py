"""The report's sections on the optimizer by itself: its step, Newton-Schulz, communication, links and scale."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from perf import figures
from perf.report.page import Section, folded, note, origin, pair, table


def step_section(result: dict[str, Any]) -> Section:
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
    body += pair(figures.step_seconds(rows, result["floor_seconds"]), figures.step_phases(rows[0]))
    return "A whole optimizer step", body + table(header, cells, lead=0) + origin(result)


def newton_schulz_section(result: dict[str, Any]) -> Section:
    rows = result["rows"]
    names = list(rows[0]["seconds"])
    cells = [
        ["x".join(map(str, row["shape"])), row["form"]]
        + [f"{row['seconds'][name] * 1e3:.2f} ms" for name in names]
        + [f"{row['speedup']['auto']:.2f}x", f"{row['share_of_matmul']['auto']:.0%}"]
        for row in rows
    ]
    header = ("shape", "form chosen", *names, "auto vs torch", "of matmul rate")
    body = note("Five quintic steps in bf16 against the function torch.optim.Muon calls, in the same run.")
    return "Newton-Schulz", body + figures.newton_schulz(rows) + table(header, cells) + origin(result)


def comm_section(result: dict[str, Any]) -> Section:
    contenders = result["contenders"]
    cells, marks = [], []
    for name, contender in contenders.items():
        for row in contender["collectives"].values():
            times = [f"{row[f'{key}_seconds'] * 1e3:.2f}" for key in ("alone", "exposed", "hidden")]
            counts = [f"{row['bytes_predicted']:,}", f"{row['bytes_measured']:,}"]
            rate = f"{row['bus_bytes_per_second'] / 1e9:.2f}"
            cells.append([name, row["name"], str(row["calls"]), *counts, *times, rate])
            marks.append("" if row["bytes_predicted"] == row["bytes_measured"] else "bad")
    header = (
        "optimizer", "collective", "calls", "bytes predicted", "bytes measured",
        "alone ms", "exposed ms", "hidden ms", "bus GB/s",
    )  # fmt: skip
    ratios = ", ".join(f"{name} {contender['traffic_over_adamw']:.4f}" for name, contender in contenders.items())
    settings = result["settings"]
    body = note(
        f"Training steps of a {settings['model']} model on {result['world']} ranks ({result['backend']}), layout "
        f"{settings['layout']}. Alone: the same calls repeated with nothing else to do. Exposed: what the step waited, "
        f"late ranks included. Traffic of all ranks over ZeRO-1 AdamW's: {ratios}."
    )
    body += figures.collectives(contenders) + table(header, cells, marks=marks)
    return "Communication of a training step", body + origin(result)


def scale_section(result: dict[str, Any]) -> Section:
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
    body += pair(figures.share_curves(rows), figures.exposed_parts(rows))
    body += pair(figures.memory(rows), figures.sensitivities(result["sensitivities"]))
    listed = "\n".join(f"{key:34s} {value:,}" if isinstance(value, (int, float)) else f"{key:34s} {value}"
                       for key, value in inputs.items())  # fmt: skip
    body += folded("All inputs", f"<pre>{html.escape(listed)}</pre>") + folded("All numbers", table(header, cells))
    return "What it will cost at scale", body + origin(result)


def bytes_section(rows: Sequence[dict[str, Any]]) -> Section:
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
    return "Traffic over ZeRO-1 AdamW's", body + figures.traffic(rows) + table(header, cells, marks=marks)


def links_section(result: dict[str, Any]) -> Section:
    cells = [
        [
            kind.replace("_", "-"),
            f"{link['alpha_seconds'] * 1e6:,.0f} us",
            f"{link['bytes_per_second'] / 1e9:.3g} GB/s",
            f"{link['delay']:.0%}",
        ]
        for kind, link in result["links"].items()
    ]
    body = note(
        f"{result['world']} ranks, {result['backend']}: seconds = alpha + bytes sent per rank / bus bandwidth. Delay: "
        "what matmuls take longer while a large message is under way, over its seconds. One rank's bf16 matmul runs at "
        f"{result['matmul_flops'] / 1e9:,.0f} GFLOP/s."
    )
    fitted = table(("collective", "alpha", "bus bandwidth", "delay"), cells)
    return "Links at hand", body + pair(figures.links(result["links"]), fitted) + origin(result)
