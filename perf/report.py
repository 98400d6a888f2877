"""One self-contained HTML page from the JSON results of the other measurements.

    python -m perf.report [--results perf/results] [--output perf/results/report.html]

Reads step*.json, newton_schulz*.json, comm*.json, scale*.json and links*.json, as many of each as there are.
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from perf import figures

Section = tuple[str, str]  # title, HTML

STYLE = """
:root { --ink: #1b2430; --soft: #5d6b7a; --line: #e3e8ee; --accent: #2f6fde; --good: #1b8a5a; --bad: #c2413b; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f9; color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 28px 60px; }
h1 { font-size: 30px; margin: 0 0 4px; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 0 0 4px; letter-spacing: -0.01em; }
p { margin: 4px 0 12px; color: var(--soft); max-width: 90ch; }
section { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 24px 28px; margin-top: 22px; }
svg { width: 100%; height: auto; display: block; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin-top: 22px; }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px; }
.tile b { display: block; font-size: 27px; letter-spacing: -0.02em; color: var(--accent); }
.tile span { color: var(--soft); font-size: 13px; line-height: 1.35; display: block; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 26px; align-items: start; }
@media (max-width: 860px) { .pair { grid-template-columns: 1fr; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; margin: 10px 0 4px;
  font-variant-numeric: tabular-nums; }
th { text-align: right; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); padding: 5px 9px; }
td { text-align: right; border-bottom: 1px solid var(--line); padding: 5px 9px; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.good { color: var(--good); font-weight: 600; } td.bad { color: var(--bad); font-weight: 600; }
tr.lead td { background: #eef4ff; font-weight: 600; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--accent); }
code, pre { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; background: #f4f6f9; padding: 10px 12px; border-radius: 8px; }
"""


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, lead: int | None = None, marks: Sequence[str] = ()
) -> str:
    """An HTML table.

    Args:
        lead: row to stress. marks: per row, a class ("good" or "bad") for its last cell.
    """
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = []
    for number, row in enumerate(rows):
        cells = [f"<td>{html.escape(cell)}</td>" for cell in row]
        if number < len(marks) and marks[number]:
            cells[-1] = f'<td class="{marks[number]}">{html.escape(row[-1])}</td>'
        body.append(f"<tr{' class=lead' if number == lead else ''}>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def pair(*parts: str) -> str:
    """Parts side by side."""
    return f'<div class="pair">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def note(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _origin(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads_per_rank']} thread a rank"
    return f"<details><summary>Where and how</summary><pre>{html.escape(where)}\n{html.escape(versions)}\n" + (
        f"{machine['date']}   {html.escape(machine['command'])}</pre></details>"
    )


def step_section(result: dict[str, Any]) -> Section:
    rows, base = result["rows"], result["rows"][0]["seconds"]
    cells = [
        [
            row["name"],
            f"{row['seconds']:.3f} s",
            f"{row['seconds'] / base:.2f}x",
            f"{row['state_bytes'] / 2**20:,.0f} MiB",
            f"{sum(row['sent_bytes'].values()) / 2**20:,.1f} MiB" if row.get("sent_bytes") else "not counted",
            str(row["ns_calls"]) if row.get("ns_calls") is not None else "-",
        ]
        for row in rows
    ]
    header = ("optimizer", "step", "of ours", "state per rank", "sent per rank", "NS calls")
    body = note(
        f"{result['world']} ranks, from local gradients to whole updated parameters on every rank; medians of "
        "interleaved rounds."
    )
    body += pair(figures.step_seconds(rows), figures.step_phases(rows[0]))
    return "A whole optimizer step", body + table(header, cells, lead=0) + _origin(result)


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
    return "Newton-Schulz", body + figures.newton_schulz(rows) + table(header, cells) + _origin(result)


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
    return "Communication of a training step", body + _origin(result)


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
    body += f"<details><summary>All inputs</summary><pre>{html.escape(listed)}</pre></details>"
    body += f"<details><summary>All numbers</summary>{table(header, cells)}</details>"
    return "What it will cost at scale", body + _origin(result)


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
        [kind.replace("_", "-"), f"{link['alpha_seconds'] * 1e6:.0f} us", f"{link['bytes_per_second'] / 1e9:.2f} GB/s"]
        for kind, link in result["links"].items()
    ]
    body = note(
        f"{result['world']} ranks, {result['backend']}: seconds = alpha + bytes sent per rank / bus bandwidth. One "
        f"rank's bf16 matmul runs at {result['matmul_flops'] / 1e9:,.0f} GFLOP/s."
    )
    fitted = table(("collective", "alpha", "bus bandwidth"), cells)
    return "Links at hand", body + pair(figures.links(result["links"]), fitted) + _origin(result)


SECTIONS: dict[str, Callable[[dict[str, Any]], Section]] = {
    "newton_schulz": newton_schulz_section,
    "step": step_section,
    "comm": comm_section,
    "scale": scale_section,
    "links": links_section,
}


def tiles(results: dict[str, list[dict[str, Any]]]) -> str:
    """The numbers to remember."""
    found: list[tuple[str, str]] = []
    for result in results.get("newton_schulz", ())[:1]:
        best = max(result["rows"], key=lambda row: row["speedup"]["auto"])
        shape = "x".join(map(str, best["shape"]))
        found.append((f"{best['speedup']['auto']:.2f}x", f"faster Newton-Schulz than torch.optim.Muon's at {shape}"))
    for result in results.get("step", ())[:1]:
        by_name = {row["name"]: row for row in result["rows"]}
        replicated = next((row for name, row in by_name.items() if "torch.optim.Muon" in name), None)
        if replicated:
            ours = result["rows"][0]
            found.append(
                (f"{replicated['seconds'] / ours['seconds']:.2f}x", f"faster step than {replicated['name']}, "
                 f"{result['world']} ranks")
            )  # fmt: skip
    for result in results.get("scale", ())[:1]:
        homes = [row for row in result.get("bytes", ()) if row["case"]["strategy"] == "home"]
        if homes:
            worst = max(homes, key=lambda row: row["over_adamw"])
            found.append(
                (f"{worst['over_adamw'] - 1:+.1%}", f"traffic over ZeRO-1 AdamW's at {worst['case']['ranks']} ranks "
                 "and less above")
            )  # fmt: skip
        model = result["assumptions"]["model"]
        for row in result["curves"]:
            if row["setup"] == "Muon, home" and row["ranks"] in (64, 1024):
                share = row["share_of_forward_backward"]
                found.append((f"{share:.2%}", f"of forward-backward, {model} on {row['ranks']:,} ranks, predicted"))
    return "".join(f'<div class="tile"><b>{b}</b><span>{html.escape(text)}</span></div>' for b, text in found)


def build(results: dict[str, list[dict[str, Any]]]) -> str:
    """The page."""
    sections: list[Section] = []
    for kind, build_section in SECTIONS.items():
        for result in results.get(kind, ()):
            if kind == "scale" and "bytes" in result:
                sections.append(bytes_section(result["bytes"]))
            sections.append(build_section(result))
    body = "".join(f"<section><h2>{html.escape(title)}</h2>{content}</section>" for title, content in sections)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>distributed_muon: performance</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>'
        "<h1>distributed_muon: performance</h1><p>What Muon costs beside ZeRO-1 AdamW: measured where we could, "
        f'predicted where we could not.</p><div class="tiles">{tiles(results)}</div>{body}</main></body></html>\n'
    )


def load(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results by kind, sorted by file name.

    Raises:
        ValueError: no result is there, or one is not JSON.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    for kind in SECTIONS:
        for path in sorted(folder.glob(f"{kind}*.json")):
            try:
                results.setdefault(kind, []).append(json.loads(path.read_text(encoding="utf-8")))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is not JSON ({error}): measure again with --json {path}") from None
    if not results:
        raise ValueError(f"--results {folder} holds no result: run perf.step, perf.comm, ... with --json first")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("perf/results"), metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in --results")
    args = parser.parse_args()
    try:
        page = build(load(args.results))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    output = args.output or args.results / "report.html"
    output.write_text(page, encoding="utf-8")
    print(f"wrote {output} ({len(page) / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
