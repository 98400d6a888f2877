"""The Moonlight report's claims on training (arXiv 2502.16982) at toy size: does Muon need half of AdamW's steps?

    python -m perf.sample_efficiency --compile                       # trains whatever the kept runs lack, then prints
    python -m perf.sample_efficiency --redraw                        # prints the kept runs' tables, trains nothing
    python -m perf.sample_efficiency --json new.json --parts small   # from scratch, a part of it

AdamW's learning rate is swept until the best has a worse one on either side; Muon is then run at that rate, for as many
steps, and with a schedule of its own over 0.52 of them. The other parts change one thing about Muon's run at a time.
Every finished run is kept in --json at once; what is kept is not repeated. perf.report shows the same tables and plots.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from launch.environment import describe_machine
from perf.options import at_least_one, output_file
from perf.sample_runs import Run, train
from perf.sample_studies import PARTS, Table, read_results, tables, wanted

DEFAULT_FILE, DEFAULT_WEIGHTS = Path("perf/results/sample_efficiency.json"), Path("runs/sample_efficiency")


class KeptRuns:
    """Results of finished runs, and the JSON file that has them.

    Args:
        path: is read where it exists, and written anew with every result that is added.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.machine = path, describe_machine()
        self.known: dict[Run, dict[str, Any]] = {}
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.machine, self.known = kept["machine"], read_results(kept)

    def add(self, result: dict[str, Any]) -> None:
        """Keep one more result; the file is whole at every moment."""
        self.known[Run.read(result["run"])] = result
        lines = ",\n".join(json.dumps(result) for result in self.known.values())
        new = self.path.with_suffix(".new")
        new.write_text(f'{{"machine": {json.dumps(self.machine)},\n"runs": [\n{lines}\n]}}\n', encoding="utf-8")
        os.replace(new, self.path)


def train_missing(parts: tuple[str, ...], kept: KeptRuns, workers: int, weights: Path, compiled: bool) -> None:
    """Train what `parts` need until nothing is missing; `workers` runs at a time, one thread each."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(elapsed_when_finished=True))  # fmt: skip
    running: dict[Future[dict[str, Any]], Run] = {}
    with (
        ProcessPoolExecutor(workers, get_context("spawn")) as pool,
        Progress(*columns, console=Console(stderr=True), speed_estimate_period=3600) as progress,
    ):
        bar = progress.add_task("")
        finished = 0.0
        while True:
            todo = [run for run in wanted(parts, kept.known) if run not in running.values()]
            for run in todo[: workers - len(running)]:
                running[pool.submit(train, run, weights, compiled)] = run
            if not running:
                return
            ahead = sum(run.flops for run in {*todo, *running.values()})
            text = f"{len(kept.known)} runs kept; now {', '.join(run.name for run in running.values())}"
            progress.update(bar, description=text, completed=finished, total=finished + ahead)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                kept.add(future.result())
                finished += run.flops
                progress.console.print(f"{run.name}: validation loss {kept.known[run]['curve'][-1][1]:.4f}")


def print_table(table: Table) -> None:
    """A table as aligned text."""
    print(f"\n{table.title}\n{table.note}")
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
    for row in (table.header, *table.rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())


def print_result(kept: KeptRuns) -> None:
    """Where the runs were made, and all tables."""
    machine = kept.machine
    print(f"{machine['cpu']}, {machine['cores']} cores, one thread a run, {machine['versions']}, {machine['date']}")
    print(machine["command"])
    for table in tables(kept.known):
        print_table(table)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=output_file, default=DEFAULT_FILE, metavar="FILE", help="the kept runs")
    parser.add_argument("--redraw", action="store_true", help="train nothing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[part for part in PARTS if part != "large"])
    parser.add_argument("--workers", type=at_least_one, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster, and needs a C++ compiler")
    parser.add_argument("--weights", type=Path, default=DEFAULT_WEIGHTS, metavar="DIR", help="checkpoints of the runs")
    args = parser.parse_args()
    kept = KeptRuns(args.json)
    if not args.redraw:
        train_missing(tuple(args.parts), kept, args.workers, args.weights, args.compile)
    print_result(kept)


if __name__ == "__main__":
    main()
