"""What `launch/benchmark.sh` measured, in one file: checks, a table of the sweep, and the report.

    python -m perf.benchmark --out DIR

Reads DIR/points, where the script's jobs left their results, and writes DIR/benchmark.json and DIR/report.html. Under
torchrun rank 0 does it and the others wait, so that all end alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from launch.environment import describe_machine
from launch.metrics import read_metrics
from launch.run_dir import METRICS, SETTINGS
from launch.world import open_world
from perf.check import check, print_checks
from perf.report.assemble import build, load

WARM_UP = 2  # steps of a Megatron run that are not counted


def merge(points: Path) -> dict[str, Any]:
    """The results of all jobs, and the predictions of what perf.comm measured.

    Returns:
        "links" and "step" as their tools wrote them, "comm": a list of perf.comm's, by bucket size, "megatron": a row
        per split, "checks": as `perf.scale --check --json` writes them; "world", "node_ranks" and "machine".

    Raises:
        ValueError: a result is missing or cannot be checked, by name.
    """
    links, step = _read(points / "links.json"), _read(points / "step.json")
    comm = sorted((_read(path) for path in points.glob("comm-*.json")), key=lambda run: run["settings"]["bucket_mb"])
    if not comm:
        raise ValueError(f"{points} holds no comm-*.json: did every job of launch/benchmark.sh run?")
    return {
        "machine": describe_machine(f"launch/benchmark.sh; python -m perf.benchmark {' '.join(sys.argv[1:])}"),
        "world": links["world"],
        "node_ranks": links["node_ranks"],
        "links": links,
        "step": step,
        "comm": comm,
        "megatron": [megatron_row(path.parent) for path in sorted(points.glob(f"megatron-*/{METRICS}"))],
        "checks": [{"settings": run["settings"], "rows": check(links, run)} for run in comm],
    }


def megatron_row(run: Path) -> dict[str, Any]:
    """Split, model and median seconds of one Megatron run's steps after the first WARM_UP."""
    settings = _read(run / SETTINGS)
    steps = [line for line in read_metrics(run / METRICS) if "seconds" in line][WARM_UP:]
    if not steps:
        raise ValueError(f"{run} has no more than {WARM_UP} steps: give MEGATRON_FLAGS more --steps")
    return {
        **{key: settings[key] for key in ("model", "tp", "pp", "ep", "world_size", "strategy")},
        "steps": len(steps),
        "seconds": statistics.median(line["seconds"] for line in steps),
        "optimizer_seconds": statistics.median(line["optimizer_seconds"] for line in steps),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in steps),
    }


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is missing: did every job of launch/benchmark.sh run?")
    return json.loads(path.read_text())


def print_result(result: dict[str, Any]) -> None:
    """The sweep, the splits and the checks."""
    nodes = result["world"] // result["node_ranks"]
    print(f"{result['world']} ranks on {nodes} node(s), {result['links']['backend']}")
    print(f"{'MiB per bucket':>14s}  {'':8s} {'step':>9s} {'over AdamW':>10s} {'traffic':>8s}")
    for run in result["comm"]:
        base = run["contenders"]["adamw"]["step_seconds"]
        for name, row in run["contenders"].items():
            print(f"{run['settings']['bucket_mb']:14g}  {name:8s} {row['step_seconds']:7.3f} s "
                  f"{row['step_seconds'] / base:10.2f} {row['traffic_over_adamw']:8.4f}")  # fmt: skip
    for row in result["megatron"]:
        print(f"Megatron TP {row['tp']} x PP {row['pp']}, {row['model']}: {row['seconds']:.3f} s a step, of which the "
              f"optimizer {row['optimizer_seconds']:.3f} s; {row['tokens_per_second']:,.0f} tokens/s")  # fmt: skip
    print("predicted from the links, the plan, and the measured forward-backward and Newton-Schulz:")
    for run in result["checks"]:
        print(f"{run['settings']['bucket_mb']:g} MiB per bucket")
        print_checks(run["rows"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the OUT of launch/benchmark.sh")
    args = parser.parse_args()
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            result = merge(args.out / "points")
            (args.out / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")
            print_result(result)
            (args.out / "report.html").write_text(build(load(args.out)), encoding="utf-8")
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
        print(f"wrote {args.out / 'benchmark.json'} and {args.out / 'report.html'}")
    with open_world("cpu") as world:
        world.barrier()


if __name__ == "__main__":
    main()
