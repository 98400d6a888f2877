"""What the report's sections are made of: tables, notes, columns, and where a result comes from."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

Section = tuple[str, str]  # title, HTML
Tile = tuple[str, str]  # a number to remember, and what it is

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
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(145px, 1fr)); gap: 14px; margin-top: 22px; }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 16px 14px; }
.tile b { display: block; font-size: 25px; letter-spacing: -0.02em; color: var(--accent); }
.tile span { color: var(--soft); font-size: 13px; line-height: 1.35; display: block; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 26px; align-items: start; }
@media (max-width: 860px) { .pair { grid-template-columns: 1fr; } }
.scroll { overflow-x: auto; }
.narrow { display: none; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; margin: 10px 0 4px;
  font-variant-numeric: tabular-nums; }
th { text-align: right; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); padding: 5px 9px; }
td { text-align: right; border-bottom: 1px solid var(--line); padding: 5px 9px; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.good { color: var(--good); font-weight: 600; } td.bad { color: var(--bad); font-weight: 600; }
tr.lead td { background: #eef4ff; font-weight: 600; }
.words th, .words td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--accent); }
code, pre { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f6f9; padding: 10px 12px; border-radius: 8px; }
/* A phone: charts drawn narrow, and a table's row as a list of its cells, each behind its heading. */
@media (max-width: 640px) {
  main { padding: 20px 10px 40px; } section { padding: 16px 12px; } h1 { font-size: 24px; }
  .wide { display: none; } .narrow { display: block; }
  table, tbody { display: block; } tr:first-child { display: none; }
  tr { display: grid; grid-template-columns: 1fr 1fr; gap: 0 14px; padding: 7px 0;
    border-bottom: 1px solid var(--line); }
  td { display: flex; justify-content: space-between; gap: 8px; border: 0; padding: 1px 0; white-space: normal;
    overflow-wrap: anywhere; }
  td::before { content: attr(data-label); color: var(--soft); font-weight: 400; text-align: left; }
  td:first-child { grid-column: 1 / -1; font-weight: 600; } td:first-child::before { content: none; }
  tr.lead td { background: none; color: var(--accent); }
}
"""


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    lead: int | None = None,
    marks: Sequence[str] = (),
    words: bool = False,
) -> str:
    """An HTML table.

    Args:
        header, rows: text; every row as long as the header. lead: row to stress.
        marks: per row, a class ("good" or "bad") for its last cell. words: cells are texts, in lines that fit.
    """
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = []
    for number, row in enumerate(rows):
        classes = [""] * len(row)
        if number < len(marks) and marks[number]:
            classes[-1] = f' class="{marks[number]}"'
        cells = [
            f'<td data-label="{html.escape(label)}"{mark}>{html.escape(cell)}</td>'
            for label, cell, mark in zip(header, row, classes, strict=True)
        ]
        body.append(f"<tr{' class=lead' if number == lead else ''}>{''.join(cells)}</tr>")
    kind = ' class="words"' if words else ""
    return f'<div class="scroll"><table{kind}><tr>{head}</tr>{"".join(body)}</table></div>'


def pair(*parts: str) -> str:
    """Parts side by side."""
    return f'<div class="pair">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def note(text: str) -> str:
    """A paragraph."""
    return f"<p>{html.escape(text)}</p>"


def folded(summary: str, content: str) -> str:
    """HTML that opens on a click."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def origin(result: dict[str, Any]) -> str:
    """Machine, versions, date and command line, folded."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads_per_rank']} thread a rank"
    return f"<details><summary>Where and how</summary><pre>{html.escape(where)}\n{html.escape(versions)}\n" + (
        f"{machine['date']}   {html.escape(machine['command'])}</pre></details>"
    )
