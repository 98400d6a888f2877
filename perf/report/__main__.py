"""One self-contained HTML page from the JSON results of the other measurements, or of two runs side by side.

    python -m perf.report [--results perf/results] [--output perf/results/report.html] [--csv FILE]
    python -m perf.report A B [--output report.html] [--csv FILE]

Reads KIND*.json for every kind of result, as many of each as there are. A and B are two of the same kind: a trainer's
run directory, a folder of results, or one result; the page has their curves, what differs in settings, versions and
machine, and every number with its ratio. --csv writes the numbers: file, tool, row, quantity, unit and value, or of two
runs tool, row, quantity, unit, A, B and B over A.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from perf.options import output_file
from perf.report.assemble import build, load
from perf.report.compare import build_comparison, open_run, pairs
from perf.report.measurements import COLUMNS, csv_rows


def write_csv(path: Path | None, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows where --csv asked for them."""
    if path is not None:
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m perf.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="two runs to compare, A and B")
    parser.add_argument("--results", type=Path, default=Path("perf/results"), metavar="DIR")
    parser.add_argument("--output", type=output_file, metavar="FILE",
                        help="default: report.html in --results; of two runs, in the working directory")  # fmt: skip
    parser.add_argument("--csv", type=output_file, metavar="FILE", help="the numbers, one a line")
    args = parser.parse_args()
    if len(args.runs) not in (0, 2):
        parser.error(f"{len(args.runs)} RUN given: give two to compare, or none for a page of --results")
    try:
        if args.runs:
            sides = [open_run(path) for path in args.runs]
            page = build_comparison(args.runs, sides)
            rows = [(*pair, pair.ratio) for pair in pairs(*sides)]
            write_csv(args.csv, ("tool", "row", "quantity", "unit", "a", "b", "b_over_a"), rows)
        else:
            results = load(args.results)
            page = build(results)
            write_csv(args.csv, COLUMNS, csv_rows(results))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    output = args.output or (Path("report.html") if args.runs else args.results / "report.html")
    output.write_text(page, encoding="utf-8")
    print(f"wrote {output} ({len(page) / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
