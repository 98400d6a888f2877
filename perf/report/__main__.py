"""One self-contained HTML page from the JSON results of the other measurements.

    python -m perf.report [--results perf/results] [--output perf/results/report.html]

Reads KIND*.json for every kind of result in SECTIONS, as many of each as there are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from perf.report.assemble import build, load


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
