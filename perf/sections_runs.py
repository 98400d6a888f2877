"""The report's sections on whole runs: sweeps over hosts, sample efficiency, and steps under DeepSpeed and Megatron."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from perf import figures, figures_runs
from perf.report.page import Section, folded, note, origin, pair, table
from perf.sections import comm_section, links_section, step_section

PARTS = ("newton_schulz", "elementwise", "reduce_scatter", "agreement", "exchange", "all_gather")


def sweep_section(result: dict[str, Any]) -> Section:
    """Of `perf.benchmark`: every strategy with every bucket size, and Megatron's splits."""
    cells = []
    for run in result["comm"]:
        base = run["contenders"]["adamw"]["step_seconds"]
        for name, row in run["contenders"].items():
            waited = sum(collective["exposed_seconds_least"] for collective in row["collectives"].values())
            cells.append(
                [f"{run['settings']['bucket_mb']:g} MiB", name, f"{row['step_seconds'] * 1e3:,.0f} ms",
                 f"{row['step_seconds'] / base:.2f}x", f"{waited * 1e3:,.1f} ms",
                 f"{max(row['sent_bytes_by_rank']) / 2**20:,.1f} MiB", f"{row['traffic_over_adamw']:.4f}"]
            )  # fmt: skip
    header = ("bucket", "optimizer", "step", "of AdamW's", "waited for collectives", "sent", "traffic over AdamW's")
    settings = result["comm"][0]["settings"]
    body = note(
        f"Whole training steps of a {settings['model']} model (hidden {settings['hidden_size']}, {settings['layers']} "
        f"layers) with {settings['batch_size']} sequences a rank, {_where(result)}. Waited: by the rank that came "
        "last, so that late ranks do not count."
    )
    body += pair(figures_runs.sweep(result["comm"], result["checks"]), table(header, cells))
    if result["megatron"]:
        body += _splits(result["megatron"])
    body += folded(*links_section(result["links"])) + folded(*step_section(result["step"]))
    for run in result["comm"]:
        title, content = comm_section(run)
        body += folded(f"{title}, {run['settings']['bucket_mb']:g} MiB per bucket", content)
    return f"Strategies and bucket sizes, {_where(result)}", body + origin(result)


def check_section(result: dict[str, Any]) -> Section:
    """Of `perf.benchmark`: predicted and measured steps."""
    rows, steps, parts = [], [], []
    for run in result["checks"]:
        for row in run["rows"]:
            names = [f"{run['settings']['bucket_mb']:g} MiB", row["name"]]
            rows.append((", ".join(names), row))
            seconds = [row[f"{kind}_seconds"] for kind in ("forward_backward", "rest", "predicted", "measured")]
            steps.append([*names, *(f"{value * 1e3:,.0f}" for value in seconds), f"{row['ratio']:.2f}"])
            exposed = [row["parts"].get(part) for part in PARTS]
            parts.append(
                [*names, *(f"{p['predicted'] * 1e3:,.1f} / {p['measured'] * 1e3:,.1f}" if p else "-" for p in exposed)]
            )
    header = ("bucket", "optimizer", "forward-backward", "rest", "predicted", "measured", "ratio")
    marks = ["good" if 0.75 <= row["ratio"] <= 1.25 else "bad" for _, row in rows]
    body = note(
        "Milliseconds of a step. Taken as measured: forward and backward without a collective, "
        "Newton-Schulz by shape, memory bandwidth and the links. Predicted: who does and sends what, what hides under "
        "what, and the step. What a collective delays the computation beside it is predicted as its own and measured "
        "in the rest, with late ranks and the host's work. Marked: within 25 % or not."
    )
    body += figures_runs.predicted_and_measured(rows) + table(header, steps, marks=marks)
    by_part = table(("bucket", "optimizer", *(part.replace("_", " ") for part in PARTS)), parts)
    body += folded("Exposed milliseconds by part, predicted / measured", by_part)
    return f"Predicted against measured, {_where(result)}", body + origin(result)


def _where(result: dict[str, Any]) -> str:
    nodes = result["world"] // result["node_ranks"]
    sent, seconds = result["links"]["links"]["all_gather"]["points"][-1]
    rate = sent / seconds * 8 / 1e9
    return f"{result['world']} ranks on {nodes} {'host' if nodes == 1 else 'hosts'} at {rate:.2g} Gbit/s"


def _splits(rows: Sequence[dict[str, Any]]) -> str:
    header = ("Megatron split", "model", "strategy", "optimizer", "tokens/s", "step")
    cells = [
        [f"TP {row['tp']} x PP {row['pp']} x DP {row['world_size'] // row['tp'] // row['pp']}", row["model"],
         row["strategy"], f"{row['optimizer_seconds'] * 1e3:,.0f} ms", f"{row['tokens_per_second']:,.0f}",
         f"{row['seconds'] * 1e3:,.0f} ms"]
        for row in rows
    ]  # fmt: skip
    return table(header, cells)


def deepspeed_section(result: dict[str, Any]) -> Section:
    """Of `perf.deepspeed_step`."""
    cells, bars = [], []
    for ours, other in result["pairs"].values():
        for row in (ours, other):
            bars.append({"name": row["name"] if row is other else f"ours, beside {other['name']}", **_seconds(row)})
            cells.append(
                [bars[-1]["name"], f"{row['seconds']:.3f} s", f"{min(row['seconds_all']):.3f} s",
                 f"{row['state_bytes'] / 2**20:,.0f} MiB",
                 f"{row['newton_schulz_runs']} for {row['matrices']} matrices",
                 f"{row['seconds'] / ours['seconds']:.2f}x"]
            )  # fmt: skip
    header = ("optimizer", "backward and step", "fastest", "state per rank", "Newton-Schulz runs", "of ours")
    body = note(
        f"{result['world']} ranks, fp32, ZeRO stage 1; ours and one of DeepSpeed's optimizers take turns, with equal "
        "gradients and clipping."
    )
    body += figures.step_seconds(bars, width=11) + table(header, cells)
    names = sorted({name for found in result["wire"].values() for name in found})
    wire = [
        [config, *(f"{found[name]:g}" if name in found else "-" for name in names)]
        for config, found in result["wire"].items()
    ]
    body += note("Messages of one step, bytes per parameter; an all-reduce sends each of its messages twice.")
    return "A step under DeepSpeed", body + table(("configuration", *names), wire) + origin(result)


def megatron_section(result: dict[str, Any]) -> Section:
    """Of `perf.megatron_step`."""
    rows = result["contenders"]
    ours = next(iter(rows.values()))["seconds"]
    bars = [{"name": name, **_seconds(row)} for name, row in rows.items()]
    cells = []
    for name, row in rows.items():
        most = [f"{fold(row[key]) / 1e6:.2f} MB" for key in ("state_bytes", "sent_bytes")
                for fold in (max, statistics.mean)]  # fmt: skip
        cells.append(
            [name, f"{row['seconds']:.3f} s", f"{row['fastest']:.3f} s", *most, f"{row['seconds'] / ours:.2f}x"]
        )
    header = ("optimizer", "step", "fastest", "state, most", "mean", "sent, most", "mean", "of ours")
    cosines = [value for kind, value in result["cosine"].items() if kind != "length ratio"]
    body = note(
        "One step after the same gradients: reduction, norm, clipping, Newton-Schulz, update and gathering "
        f"({result['machine']['command']}). With equal settings the cosine of every matrix's update to Megatron's is "
        f"less than 1 by {1 - min(cosines):.0e} at most."
    )
    return "A step under Megatron-core", body + figures.step_seconds(bars, width=11) + table(header, cells) + origin(
        result
    )


def _seconds(row: dict[str, Any]) -> dict[str, float]:
    return {"seconds": row["seconds"]}
