"""The page: every result of a folder in its section, and the numbers to remember."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from perf import sections, sections_runs
from perf.report.page import STYLE, Section
from perf.report.sample_efficiency import sample_efficiency_section, sample_efficiency_tile


class Result(NamedTuple):
    """A JSON file of one of the tools: where it lies, and what it says."""

    path: Path
    content: Any


def _scale_sections(result: dict[str, Any]) -> list[Section]:
    counted = [sections.bytes_section(result["bytes"])] if "bytes" in result else []
    return [*counted, sections.scale_section(result)]


def _benchmark_sections(result: dict[str, Any]) -> list[Section]:
    return [sections_runs.sweep_section(result), sections_runs.check_section(result)]


def _megatron_sections(result: Any) -> list[Section]:
    # A file may hold the results of several splits.
    return [sections_runs.megatron_section(one) for one in (result if isinstance(result, list) else [result])]


def _one(section: Callable[[Any], Section]) -> Callable[[Any], list[Section]]:
    return lambda result: [section(result)]


BENCHMARKS = ("benchmark", "two_hosts")
SECTIONS: dict[str, Callable[[Any], list[Section]]] = {
    "step": _one(sections.step_section),
    "newton_schulz": _one(sections.newton_schulz_section),
    "sample_efficiency": _one(sample_efficiency_section),
    "comm": _one(sections.comm_section),
    **dict.fromkeys(BENCHMARKS, _benchmark_sections),
    "scale": _scale_sections,
    "deepspeed_step": _one(sections_runs.deepspeed_section),
    "megatron_step": _megatron_sections,
    "links": _one(sections.links_section),
}


def tiles(results: dict[str, list[Any]]) -> str:
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
    ratios = [row["ratio"] for kind in BENCHMARKS for result in results.get(kind, ()) for run in result["checks"]
              for row in run["rows"]]  # fmt: skip
    if ratios:
        found.append((f"{min(ratios):.2f}-{max(ratios):.2f}x", "predicted over measured training step, two hosts"))
    for result in results.get("sample_efficiency", ())[:1]:
        tile = sample_efficiency_tile(result)
        if tile is not None:
            found.append(tile)
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


def build(results: dict[str, list[Result]]) -> str:
    """The page.

    Raises:
        ValueError: a result is not of the format that its tool writes now; the message names the file.
    """
    found: list[Section] = []
    for kind, build_sections in SECTIONS.items():
        for result in results.get(kind, ()):
            try:
                found += build_sections(result.content)
            except (AttributeError, IndexError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{result.path} is no result of this perf.{kind} ({type(error).__name__}: {error}): measure again"
                ) from error
    body = "".join(f"<section><h2>{html.escape(title)}</h2>{content}</section>" for title, content in found)
    numbers = tiles({kind: [result.content for result in some] for kind, some in results.items()})
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>distributed_muon: performance</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>'
        "<h1>distributed_muon: performance</h1><p>What Muon costs beside ZeRO-1 AdamW: measured where we could, "
        f'predicted where we could not.</p><div class="tiles">{numbers}</div>{body}</main></body></html>\n'
    )


def load(folder: Path) -> dict[str, list[Result]]:
    """Results by kind, sorted by file name.

    Raises:
        ValueError: no result is there, or one is not JSON.
    """
    results: dict[str, list[Result]] = {}
    for kind in SECTIONS:
        for path in sorted(folder.glob(f"{kind}*.json")):
            try:
                results.setdefault(kind, []).append(Result(path, json.loads(path.read_text(encoding="utf-8"))))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is not JSON ({error}): measure again with --json {path}") from None
    if not results:
        raise ValueError(f"--results {folder} holds no result: run perf.step, perf.comm, ... with --json first")
    return results
