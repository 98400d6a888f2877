"""Two runs side by side: of the measurements, or of a trainer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from launch.metrics import read_metrics
from launch.run_dir import METRICS, SETTINGS, VERSIONS
from perf.report.assemble import SECTIONS, Result, document, load
from perf.report.chart import AMBER, BLUE, chart, legend_below, make_axes
from perf.report.measurements import measurements
from perf.report.page import Section, Tile, note, table

LOWER_IS_BETTER = ("s", "B")  # units; of other numbers only the ratio is shown
NEAR = 0.05  # a ratio that far from 1 is marked


class Pair(NamedTuple):
    """One number of both runs; None where a run lacks it."""

    kind: str
    row: str
    quantity: str
    unit: str
    a: float | None
    b: float | None

    @property
    def ratio(self) -> float | None:
        """Of B to A."""
        return self.b / self.a if self.a and self.b is not None else None


def open_run(path: Path) -> dict[str, list[Result]]:
    """The results in a folder or file, by kind; a trainer's run directory is of kind "run".

    Raises:
        ValueError: there is nothing to compare.
    """
    if (path / METRICS).is_file():
        about = {name: json.loads((path / file).read_text()) if (path / file).is_file() else {}
                 for name, file in (("settings", SETTINGS), ("versions", VERSIONS))}  # fmt: skip
        return {"run": [Result(path, {"metrics": read_metrics(path / METRICS), **about})]}
    if path.is_dir():
        return load(path)
    kind = next((kind for kind in sorted(SECTIONS, key=len, reverse=True) if path.name.startswith(kind)), None)
    if kind is None or not path.is_file():
        raise ValueError(f"{path} is no run: give a trainer's --run-dir, or a result or folder of results of perf")
    try:
        return {kind: [Result(path, json.loads(path.read_text(encoding="utf-8")))]}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None


def pairs(a: Mapping[str, Sequence[Result]], b: Mapping[str, Sequence[Result]]) -> list[Pair]:
    """Every number of either run; results of a kind are matched in the order of their file names.

    Raises:
        ValueError: the two have no number in common.
    """
    found: list[Pair] = []
    for kind in dict.fromkeys([*a, *b]):
        for number in range(max(len(a.get(kind, ())), len(b.get(kind, ())))):
            sides = [_numbers(kind, side, number) for side in (a, b)]
            for key in dict.fromkeys([*sides[0], *sides[1]]):
                found.append(Pair(kind, *key, sides[0].get(key), sides[1].get(key)))
    if not any(pair.a is not None and pair.b is not None for pair in found):
        raise ValueError(f"the two have no number in common: one holds {', '.join(a)}, the other {', '.join(b)}")
    return found


def _numbers(kind: str, side: Mapping[str, Sequence[Result]], number: int) -> dict[tuple[str, str, str], float]:
    results = side.get(kind, ())
    if number >= len(results):
        return {}
    try:
        return {one[:3]: one.value for one in measurements(kind, results[number].content)}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{results[number].path} is no result of this perf.{kind} ({type(error).__name__}: {error}): measure again"
        ) from error


def build_comparison(paths: Sequence[Path], sides: Sequence[Mapping[str, Sequence[Result]]]) -> str:
    """The page of two runs; `sides` as `open_run` read them from `paths`."""
    found = pairs(*sides)
    short = [path.resolve().name for path in paths]
    names = tuple(
        f"{letter}: {name}" for letter, name in zip("AB", short if short[0] != short[1] else paths, strict=True)
    )
    sections: list[Section] = []
    if all("run" in side for side in sides):
        sections.append(_training_section(names, [side["run"][0].content for side in sides]))
    sections.append(_differences_section(sides))
    for kind in dict.fromkeys(pair.kind for pair in found):
        sections.append(_numbers_section(kind, [pair for pair in found if pair.kind == kind]))
    lead = f"A is {paths[0]}, B is {paths[1]}. Ratios are B over A."
    return document("distributed_muon: two runs", lead, list(_tiles(found)), sections)


def _tiles(found: Sequence[Pair]) -> Iterator[Tile]:
    """What the two differ in most, of their times."""
    times = [pair for pair in found if pair.unit == "s" and pair.ratio]
    for pair in sorted(times, key=lambda pair: abs((pair.b or 0) - (pair.a or 0)), reverse=True)[:4]:
        yield f"{pair.ratio:.2f}x", f"{pair.row}, {_words(pair.quantity)}: {_cell(pair, 'a')} and {_cell(pair, 'b')}"


def _numbers_section(kind: str, found: Sequence[Pair]) -> Section:
    cells, marks = [], []
    for pair in found:
        ratio = pair.ratio
        cells.append([f"{pair.row}: {_words(pair.quantity)}", _cell(pair, "a"), _cell(pair, "b"),
                      f"{ratio:.3f}" if ratio is not None else "-"])  # fmt: skip
        differs = ratio is not None and pair.unit in LOWER_IS_BETTER and abs(ratio - 1) > NEAR
        marks.append(("good" if ratio < 1 else "bad") if differs and ratio is not None else "")
    body = note(f"Times and bytes that differ by more than {NEAR:.0%} are marked.")
    return f"Numbers of {kind}", body + table(("what", "A", "B", "B / A"), cells, marks=marks)


def _differences_section(sides: Sequence[Mapping[str, Sequence[Result]]]) -> Section:
    """Settings, versions and machines that are not alike."""
    about = [dict(_origins(side)) for side in sides]
    keys = dict.fromkeys([*about[0], *about[1]])
    cells = [[key, *(str(side.get(key, "-")) for side in about)] for key in keys
             if about[0].get(key) != about[1].get(key)]  # fmt: skip
    body = table(("what", "A", "B"), cells, words=True) if cells else note("Settings, versions and machines are alike.")
    return "What differs", body


def _origins(side: Mapping[str, Sequence[Result]]) -> Iterator[tuple[str, Any]]:
    for kind, results in side.items():
        for result in results:
            content = result.content[0] if isinstance(result.content, list) else result.content
            parts = {"settings": content.get("settings", {}), "versions": content.get("versions", {}),
                     "machine": content.get("machine", {})}  # fmt: skip
            for part, values in parts.items():
                for key, value in values.items():
                    if isinstance(value, Mapping):
                        yield from ((f"{kind} {key} {inner}", one) for inner, one in value.items())
                    else:
                        yield f"{kind} {part} {key}", value


def _training_section(names: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> Section:
    """Loss, validation loss and seconds of two training runs over steps."""
    body = "".join(
        _curves(title, names, runs, key)
        for key, title in (("loss", "training loss"), ("val_loss", "validation loss"), ("seconds", "seconds per step"))
        if any(key in line for run in runs for line in run["metrics"])
    )
    return "Training", f'<div class="pair">{body}</div>'


def _curves(title: str, names: Sequence[str], runs: Sequence[Mapping[str, Any]], key: str) -> str:
    def draw(narrow: bool) -> Figure:
        figure, axes = make_axes(title, narrow)
        for name, run, color in zip(names, runs, (AMBER, BLUE), strict=True):
            points = [(line["step"], line[key]) for line in run["metrics"] if key in line]
            if points:
                few = {"marker": "o", "markersize": 4} if len(points) < 30 else {}
                axes.plot(*zip(*points, strict=True), linewidth=1.8, color=color, label=name, **few)
        axes.set_xlabel("step")
        legend_below(figure, narrow, columns=1)
        return figure

    return f"<div>{chart(draw)}</div>"


def _words(quantity: str) -> str:
    return quantity.replace("_", " ").replace("/", " ")


def _cell(pair: Pair, side: str) -> str:
    value = getattr(pair, side)
    if value is None:
        return "-"
    if pair.unit == "s":
        return f"{value:,.3f} s" if value >= 1 else f"{value * 1e3:,.3f} ms"
    if pair.unit.startswith("B"):
        return f"{value / 2**20:,.2f} Mi{pair.unit}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"
