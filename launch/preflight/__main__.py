"""Before a long job: is every node the same, reachable and fast? One table, the odd node named.

    torchrun --nnodes 2 ... -m launch.preflight [--config run.yaml] [--writes RUN_DIR] [--json FILE]

Three stages, each with a deadline, so that a dead link is a named error and not a hang:

1. facts: every rank writes versions, commit, devices, variables, limits and the digest of its configuration to the
   rendezvous store, where all ranks compare them with the majority.
2. links: one process per node connects to other nodes over plain TCP and measures what gets through, and their clocks.
3. groups: the process groups a job uses run their first collectives, which also connects them, and are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launch.failure import tell_torchrun
from launch.preflight.facts import NodeFacts, collect_facts, find_problems
from launch.preflight.groups import time_groups
from launch.preflight.links import check_links, link_problems
from launch.sameness import spans


class PreflightError(Exception):
    """A job started now would fail; the message names the node."""


def run_preflight(args: argparse.Namespace) -> dict[str, Any]:
    """All three stages; every rank must call it.

    Args:
        args: of `main`.

    Returns:
        The report: "nodes", "links", "groups" and "problems", the same on every rank, and "seconds" that it took.

    Raises:
        PreflightError: on every rank that still can, naming the node.
    """
    begin = time.monotonic()
    deadline = begin + args.seconds
    store, rank, world = next(dist.rendezvous("env://"))
    store.set_timeout(timedelta(seconds=args.seconds))
    own = collect_facts(rank, world, args.config, args.writes)
    facts = [NodeFacts(**fact) for fact in _exchange(store, "facts", asdict(own), rank, world, args.seconds)]
    problems = find_problems(facts) + _shared_problems(store, args.writes, facts, rank)
    measured = _exchange(store, "links", check_links(facts, rank, store, deadline), rank, world, 25)
    links = {fact.label: by for fact, by in zip(facts, measured, strict=True) if by}
    problems += link_problems(links, args.least_mbit / 8 * 1e6)
    groups: dict[str, dict[str, float]] = {}
    if not any("cannot reach" in problem for problem in problems):
        groups = time_groups(store, rank, facts)
    return {
        "nodes": [asdict(fact) for fact in facts],
        "links": links,
        "groups": groups,
        "problems": problems,
        "seconds": time.monotonic() - begin,
    }


def _exchange(store: dist.Store, what: str, own: Any, rank: int, world: int, seconds: float) -> list[Any]:
    """Every rank's JSON, or a PreflightError that names the ranks that did not come."""
    store.set(f"preflight/{what}/{rank}", json.dumps(own))
    until = time.monotonic() + seconds
    values: list[Any] = []
    missing = []
    for other in range(world):
        key = f"preflight/{what}/{other}"
        try:
            store.wait([key], timedelta(seconds=max(0.1, until - time.monotonic())))
            values.append(json.loads(store.get(key)))
        except dist.DistStoreError:
            missing.append(other)
    if missing:
        raise PreflightError(f"{spans(missing)} did not report their {what} within {seconds:.0f} s")
    return values


def _shared_problems(store: dist.Store, writes: Sequence[Path], facts: Sequence[NodeFacts], rank: int) -> list[str]:
    """One line per node that does not see what rank 0 writes."""
    lines = []
    for number, folder in enumerate(writes):
        name = f"preflight/mark/{number}"
        mark = folder / f".preflight-{uuid.uuid4().hex}"
        if rank == 0:
            try:
                mark.touch()
            except OSError:
                mark = folder  # find_problems says that it cannot be written
            store.set(name, mark.name)
        seen = (folder / store.get(name).decode()).exists() or mark == folder
        answers = _exchange(store, f"seen/{number}", seen, rank, len(facts), 20)
        blind = dict.fromkeys(fact.label for fact, seen in zip(facts, answers, strict=True) if not seen)
        lines += [f"node {node} does not see what rank 0 writes to {folder}: it must be shared" for node in blind]
        if rank == 0 and mark != folder:
            mark.unlink(missing_ok=True)
    return lines


def format_report(report: dict[str, Any]) -> str:
    """The table for people: a row per node, then groups, then what is wrong."""
    rows: dict[str, list[NodeFacts]] = {}
    for raw in report["nodes"]:
        fact = NodeFacts(**raw)
        rows.setdefault(fact.label, []).append(fact)
    lines = [f"{'node':28s} {'ranks':10s} {'torch':14s} {'gpu':28s} {'slowest link in':>16s}"]
    for label, facts in rows.items():
        speeds = [by[label][0] for by in report["links"].values() if label in by]
        link = f"{min(speeds) / 1e6:.1f} MB/s" if speeds and min(speeds) > 0 else ("dead" if speeds else "-")
        compared = facts[0].compared
        ranks = spans([fact.rank for fact in facts]).partition(" ")[2]
        lines.append(f"{label:28s} {ranks:10s} {compared['torch (imported)']:14s} {compared['gpu']:28s} {link:>16s}")
    for group, speeds in report["groups"].items():
        lines.append(f"group {group}: " + ", ".join(f"{k} {v / 1e6:.1f} MB/s" for k, v in speeds.items()))
    skews = [abs(ahead) for by in report["links"].values() for _, ahead in by.values()]
    if skews:
        lines.append(f"clocks are within {max(skews):.3f} s")
    lines.append(f"checked in {report['seconds']:.1f} s")
    return "\n".join(lines)


def main() -> None:
    """Entry point; exit code 1 where a problem was found, which one rank per node prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="*", default=[], help="files that must be equal on all nodes")
    parser.add_argument("--writes", type=Path, nargs="*", default=[], help="folders of the job that all nodes share")
    parser.add_argument("--least-mbit", type=float, default=500.0, help="that every link must carry, Mbit/s")
    parser.add_argument("--seconds", type=float, default=30.0, help="give up after this long")
    parser.add_argument("--json", type=Path, help="write the report here (rank 0)")
    args = parser.parse_args()
    rank = int(os.environ.get("RANK", 0))
    report = None
    try:
        report = run_preflight(args)
        problems = report["problems"]
    except (PreflightError, dist.DistError, OSError) as error:
        problems = [f"{error} (seen by rank {rank})"]
    if rank == 0 and report is not None:
        print(format_report(report), flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("\n".join([f"PROBLEM: {problem}" for problem in problems] or ["no problem found"]), flush=True)
    if problems:
        tell_torchrun(f"PROBLEM: {problems[0]}" + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
