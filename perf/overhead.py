"""Host time of the optimizer: microseconds and Python calls per matrix and step, construction, planning.

    python -m perf.overhead [--against DIR] [--cases NAME ...] [--rounds 3] [--json FILE]

What a step costs where the arithmetic costs next to nothing: 5,000 matrices of 8x8 on one rank and on two (gloo), and
every matrix of Moonlight-16B-A3B, each side divided by 64, on rank 0 of 64 (torch's fake process group). "step" is the
whole of `optimizer.step()`; "host" is that without Newton-Schulz, as the optimizer's own report has it, and without
"copying" inside the fake group's collectives; "backward" is what our hooks and nothing else take. Python calls are
counted in one more step. Then the seconds of a constructor over the 5,000 matrices, and of
`python -m distributed_muon plan --model kimi-k2 --dp 64`, imports counted in neither.

`--against DIR` measures another checkout of this project (such as a clone of an older commit) in the same run: every
measurement is a process of its own, the two checkouts take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.environment import describe_machine
from perf.options import at_least_one, output_file, write_json

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("overhead_worker.py")


class Case(NamedTuple):
    """One measurement: the worker's name of it, ranks, repeats within a process, and what it is."""

    worker: str
    ranks: int
    repeats: int
    text: str


CASES = {
    "one-rank": Case("small", 1, 7, "5,000 matrices of 8x8, one rank"),
    "two-ranks": Case("small", 2, 7, "5,000 matrices of 8x8, two ranks"),
    "moonlight": Case("fake", 1, 5, "Moonlight-16B-A3B, rank 0 of 64"),
    "construction": Case("construction", 1, 1, "construction over 5,000 matrices"),
    "plan": Case("plan", 1, 1, "plan --model kimi-k2 --dp 64"),
}


def run_case(name: str, checkout: Path, timeout: float = 600) -> dict[str, Any]:
    """One measurement in processes of its own; of several ranks the slowest's seconds.

    Args:
        name: of CASES. checkout: a working tree of this project. timeout: seconds.

    Raises:
        RuntimeError: a process failed; the message has the end of what it wrote.
    """
    case, ranks, repeats, _ = CASES[name]
    # With -c the working directory comes first among the modules, with a script the script's folder would.
    code = f"import runpy; runpy.run_path({str(WORKER)!r}, run_name='__main__')"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        words = [(case, str(repeats), str(rank), str(ranks), f"{folder}/rendezvous") for rank in range(ranks)]
        processes = [
            subprocess.Popen([sys.executable, "-c", code, *some], cwd=checkout, env=environment, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for some in words
        ]  # fmt: skip
        try:
            results = []
            for process in processes:
                printed, errors = process.communicate(timeout=timeout)
                if process.returncode:
                    raise RuntimeError(f"{name} in {checkout} failed:\n{errors[-2000:]}")
                results.append(json.loads(printed.splitlines()[-1]))
        finally:
            for process in processes:
                process.kill()
    slowest = {key: max(result["seconds"][key] for result in results) for key in results[0]["seconds"]}
    return {**results[0], "seconds": slowest}


def combine(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, the fastest of them, and calls per matrix."""
    first = runs[0]
    seconds = {key: statistics.median(run["seconds"][key] for run in runs) for key in first["seconds"]}
    row = {"seconds": seconds, "fastest": {key: min(run["seconds"][key] for run in runs) for key in seconds}}
    if "matrices" in first:
        row["matrices"] = first["matrices"]
        row["host_us_per_matrix"] = seconds["host"] / first["matrices"] * 1e6
    if "calls" in first:
        row["calls_per_matrix"] = first["calls"] / first["matrices"]
        row["c_calls_per_matrix"] = first["c_calls"] / first["matrices"]
    return row


def measure(names: Sequence[str], checkouts: dict[str, Path], rounds: int) -> dict[str, dict[str, Any]]:
    """By case and checkout the combined rows of `rounds` rounds, in which the checkouts take turns."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        runs: dict[str, list[dict[str, Any]]] = {label: [] for label in checkouts}
        for _ in range(rounds):
            for label, checkout in checkouts.items():
                runs[label].append(run_case(name, checkout))
        found[name] = {label: combine(some) for label, some in runs.items()}
        print_case(name, found[name])
    return found


def print_case(name: str, rows: dict[str, dict[str, Any]]) -> None:
    """One line per checkout, and the ratios of this one to the other."""
    print(CASES[name].text)
    for label, row in rows.items():
        times = ", ".join(f"{key} {value * 1e3:,.1f} ms" for key, value in row["seconds"].items() if value)
        per_matrix = f"; {row['host_us_per_matrix']:.1f} us per matrix" if "matrices" in row else ""
        if "calls_per_matrix" in row:
            per_matrix += f", {row['calls_per_matrix']:.1f} Python calls and {row['c_calls_per_matrix']:.1f} into C"
        print(f"  {label:8s} {times}{per_matrix}; fastest host {row['fastest']['host'] * 1e3:,.1f} ms", flush=True)
    if len(rows) == 2:
        here, there = rows.values()
        ratios = {key: value / there["seconds"][key] for key, value in here["seconds"].items() if there["seconds"][key]}
        ratios["fastest host"] = here["fastest"]["host"] / there["fastest"]["host"]
        if "calls_per_matrix" in here:
            ratios["Python calls"] = here["calls_per_matrix"] / there["calls_per_matrix"]
        print("  ratio    " + ", ".join(f"{key} {value:.3f}" for key, value in ratios.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, measured in turns with this one")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=at_least_one, default=3, help="of which medians count")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    args = parser.parse_args()
    if args.against and not (args.against / "distributed_muon" / "__init__.py").is_file():
        parser.error(f"--against {args.against} is no checkout of this project: it has no distributed_muon/__init__.py")
    checkouts = {"here": ROOT} | ({"against": args.against.resolve()} if args.against else {})
    machine = describe_machine(f"python -m perf.overhead {' '.join(sys.argv[1:])}")
    commits = {label: _commit(checkout) for label, checkout in checkouts.items()}
    print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['versions']}; load {os.getloadavg()[0]:.1f}; {commits}"
    )
    rows = measure(args.cases, checkouts, args.rounds)
    write_json(args.json, {"machine": machine, "commits": commits, "load": os.getloadavg(), "rows": rows})


def _commit(checkout: Path) -> str:
    words = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "no git"


if __name__ == "__main__":
    main()
