"""The report's section on `perf.overhead`: host time and Python calls per matrix."""

from __future__ import annotations

from typing import Any

from perf.overhead import CASES
from perf.report.page import Section, note, origin, table


def overhead_section(result: dict[str, Any]) -> Section:
    """This checkout, and the one it was measured against."""
    cells = []
    for name, rows in result["rows"].items():
        for label, row in rows.items():
            seconds, calls = row["seconds"], row.get("calls_per_matrix")
            ratio = seconds["host"] / rows["against"]["seconds"]["host"] if "against" in rows else None
            cells.append(
                [f"{CASES[name].text}, {result['commits'][label]}", f"{seconds['host'] * 1e3:,.1f} ms",
                 f"{row['host_us_per_matrix']:.1f} us" if "host_us_per_matrix" in row else "-",
                 f"{calls:.1f}" if calls else "-", f"{ratio:.2f}x" if ratio else "-"]
            )  # fmt: skip
    header = ("what, commit", "host time", "per matrix", "Python calls per matrix", "of the other commit's")
    body = note(
        "What a step costs where the arithmetic costs next to nothing, Newton-Schulz not counted; construction and "
        f"planning. Load of the machine at the end: {result['load'][0]:.1f}."
    )
    return "Host time", body + table(header, cells) + origin(result)
