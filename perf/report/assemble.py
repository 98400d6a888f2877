"""The page: every result of a folder in its section, and the numbers to remember."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from perf.report.benchmark import check_section, check_tile, sweep_section
from perf.report.communication import comm_section, links_section
from perf.report.newton_schulz import newton_schulz_section, newton_schulz_tile
from perf.report.overhead import overhead_section
from perf.report.page import STYLE, Section, Tile, note
from perf.report.sample_efficiency import sample_efficiency_section, sample_efficiency_tile
from perf.report.scale import scale_section, scale_tiles, traffic_section
from perf.report.step import deepspeed_section, fsdp2_section, megatron_section, step_section, step_tile
from perf.report.timeline import timeline_section


class Result(NamedTuple):
    """A JSON file of one of the tools: where it lies, and what it says."""

    path: Path
    content: Any


def _scale_sections(result: dict[str, Any]) -> list[Section]:
    counted = [traffic_section(result["bytes"])] if "bytes" in result else []
    return [*counted, scale_section(result)]


def _megatron_sections(result: Any) -> list[Section]:
    # A file may hold the results of several splits.
    return [megatron_section(one) for one in (result if isinstance(result, list) else [result])]


def _one(section: Callable[[Any], Section]) -> Callable[[Any], list[Section]]:
    return lambda result: [section(result)]


BENCHMARKS = ("benchmark", "two_hosts")
GPU = "gpu-"  # what the names of `make bench-gpu`'s results begin with
SECTIONS: dict[str, Callable[[Any], list[Section]]] = {
    "step": _one(step_section),
    "overhead": _one(overhead_section),
    "newton_schulz": _one(newton_schulz_section),
    "sample_efficiency": _one(sample_efficiency_section),
    "comm": _one(comm_section),
    **dict.fromkeys(BENCHMARKS, lambda result: [sweep_section(result), check_section(result)]),
    "scale": _scale_sections,
    "timeline": _one(timeline_section),
    "fsdp2_step": _one(fsdp2_section),
    "deepspeed_step": _one(deepspeed_section),
    "megatron_step": _megatron_sections,
    "links": _one(links_section),
}


def tiles(results: Mapping[str, Sequence[Any]]) -> list[Tile]:
    """The numbers to remember, of the first result of each kind."""
    first = {kind: some[0] for kind, some in results.items()}
    found: list[Tile | None] = []
    for kind, tile in (("newton_schulz", newton_schulz_tile), ("step", step_tile)):
        found += [tile(first[kind])] if kind in first else []
    found.append(check_tile([result for kind in BENCHMARKS for result in results.get(kind, ())]))
    if "sample_efficiency" in first:
        found.append(sample_efficiency_tile(first["sample_efficiency"]))
    if "scale" in first:
        found += scale_tiles(first["scale"])
    return [tile for tile in found if tile is not None]


def build(results: Mapping[str, Sequence[Result]]) -> str:
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
    if not any(result.path.name.startswith(GPU) for some in results.values() for result in some):
        found.append(("GPU", note("Not run on a GPU. Where there is one, make bench-gpu measures it.")))
    lead = "What Muon costs beside ZeRO-1 AdamW: measured where we could, predicted where we could not."
    numbers = tiles({kind: [result.content for result in some] for kind, some in results.items()})
    return document("distributed_muon: performance", lead, numbers, found)


def document(title: str, lead: str, numbers: Iterable[Tile], sections: Iterable[Section]) -> str:
    """One HTML page that needs no other file."""
    shown = "".join(f'<div class="tile"><b>{b}</b><span>{html.escape(text)}</span></div>' for b, text in numbers)
    body = "".join(f"<section><h2>{html.escape(name)}</h2>{content}</section>" for name, content in sections)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f'<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p><div class="tiles">{shown}</div>{body}'
        "</main></body></html>\n"
    )


def load(folder: Path) -> dict[str, list[Result]]:
    """Results by kind, sorted by file name, those of GPUs last.

    Raises:
        ValueError: no result is there, or one is not JSON.
    """
    results: dict[str, list[Result]] = {}
    for kind in SECTIONS:
        for path in [*sorted(folder.glob(f"{kind}*.json")), *sorted(folder.glob(f"{GPU}{kind}*.json"))]:
            try:
                results.setdefault(kind, []).append(Result(path, json.loads(path.read_text(encoding="utf-8"))))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is not JSON ({error}): measure again with --json {path}") from None
    if not results:
        raise ValueError(f"{folder} holds no result: run perf.step, perf.comm, ... with --json {folder}/step.json")
    return results
