"""Before a long job: is every node the same, reachable and fast? One table, the odd node named.

    torchrun --nnodes 2 ... -m launch.preflight [--config run.yaml] [--json FILE]

Three stages, each with a deadline, so that a dead link is a named error and not a hang:

1. facts: every rank writes versions, clock, devices and the digest of its configuration to the rendezvous
   store; rank 0 compares them with the majority.
2. links: one process per node connects to the other nodes over plain TCP and measures what gets through.
3. groups: the process groups a job uses run their first collectives, which also connects them, and are timed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distributed_muon.engine.collectives import Collectives
from launch.environment import PACKAGES

SLOW = 0.5  # a node below this share of the median bandwidth is named
LINK_BYTES = 4 << 20
GROUP_NUMEL = 1 << 20


@dataclass
class NodeFacts:
    """What one rank knows of its node; `compared` must be equal on all nodes."""

    rank: int
    node: str
    address: str
    clock: float
    compared: dict[str, str] = field(default_factory=dict)


class PreflightError(Exception):
    """A job started now would fail; the message names the node."""


def collect_facts(rank: int, config: Sequence[Path]) -> NodeFacts:
    """Versions, device and configuration of this rank; local."""
    compared = {"python": platform.python_version(), "torch (imported)": torch.__version__}
    for package in PACKAGES:
        try:
            compared[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            compared[package] = "not installed"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0)))
        compared["gpu"] = f"{device.name}, {device.total_memory >> 30} GiB"
        compared["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    else:
        compared["gpu"] = "none"
    for name in sorted(os.environ):
        if name.startswith(("NCCL_", "TORCH_NCCL_")) and name not in ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA"):
            compared[name] = os.environ[name]
    for path in config:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else "missing"
        compared[f"config {path.name}"] = digest
    return NodeFacts(rank, socket.gethostname(), _own_address(), time.time(), compared)


def _own_address() -> str:
    """This node's address on the way to the rendezvous host; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def find_differences(facts: Sequence[NodeFacts]) -> list[str]:
    """One line per fact that differs from the majority, naming the node."""
    lines = []
    keys = sorted({key for fact in facts for key in fact.compared})
    for key in keys:
        values = Counter(fact.compared.get(key, "unset") for fact in facts)
        usual = values.most_common(1)[0][0]
        odd: dict[tuple[str, str], list[int]] = {}
        for fact in facts:
            value = fact.compared.get(key, "unset")
            if value != usual:
                odd.setdefault((_label(fact), value), []).append(fact.rank)
        for (node, value), ranks in odd.items():
            lines.append(f"node {node} (ranks {_spans(ranks)}) has {key} {value}, the others {usual}")
    return lines


def check_links(facts: Sequence[NodeFacts], rank: int, store: dist.Store, deadline: float) -> dict[str, float]:
    """Bandwidth from this rank's node to every other node, measured by each node's first rank.

    Returns:
        Bytes per second by node label; negative where nothing got through. Empty on other ranks.
    """
    leaders = list({_label(fact): fact for fact in reversed(facts)}.values())[::-1]
    if rank not in [leader.rank for leader in leaders] or len(leaders) == 1:
        return {}
    server = socket.create_server(("", 0))
    stop = threading.Event()
    threading.Thread(target=_sink, args=(server, stop), daemon=True).start()
    store.set(f"preflight/port/{rank}", str(server.getsockname()[1]))
    speeds = {}
    for leader in leaders:
        if leader.rank == rank:
            continue
        store.wait([f"preflight/port/{leader.rank}"], timedelta(seconds=max(1.0, deadline - time.monotonic())))
        port = int(store.get(f"preflight/port/{leader.rank}"))
        speeds[_label(leader)] = _measure_link(leader.address, port)
    store.set(f"preflight/linked/{rank}", "1")
    store.wait([f"preflight/linked/{leader.rank}" for leader in leaders], timedelta(seconds=20))
    stop.set()
    server.close()
    return speeds


def _measure_link(address: str, port: int) -> float:
    try:
        with socket.create_connection((address, port), timeout=4) as link:
            link.settimeout(6)
            begin = time.perf_counter()
            link.sendall(bytes(LINK_BYTES))
            link.shutdown(socket.SHUT_WR)
            link.recv(1)  # the sink answers when it has read everything
            return LINK_BYTES / (time.perf_counter() - begin)
    except OSError:
        return -1.0


def _sink(server: socket.socket, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            link, _ = server.accept()
        except OSError:
            return
        with link:
            link.settimeout(8)
            try:
                while link.recv(1 << 20):
                    pass
                link.sendall(b"k")
            except OSError:
                continue


def check_groups(groups: dict[str, dist.ProcessGroup | None], device: torch.device) -> dict[str, dict[str, float]]:
    """First and timed collectives of every group this rank is in; collective over each.

    Returns:
        Per group, bytes per second this rank sent in each collective.
    """
    speeds: dict[str, dict[str, float]] = {}
    for name, group in groups.items():
        collectives = Collectives(group)
        collectives.warm_up(device)
        if collectives.size == 1:
            continue
        numel = GROUP_NUMEL // collectives.size * collectives.size
        whole = torch.zeros(numel, device=device)
        part = torch.zeros(numel // collectives.size, device=device)
        counts = [numel // collectives.size] * collectives.size
        runs = {
            "all_gather": lambda c=collectives, w=whole: c.all_gather(w),
            "reduce_scatter": lambda c=collectives, w=whole, p=part: c.reduce_scatter(p, w),
            "all_to_all": lambda c=collectives, w=whole, n=counts: c.all_to_all(w.clone(), w, n, n),
        }
        speeds[name] = {}
        for kind, run in runs.items():
            run().wait()
            collectives.sent_bytes.clear()
            begin = time.perf_counter()
            run().wait()
            if device.type == "cuda":
                torch.cuda.synchronize()
            speeds[name][kind] = collectives.sent_bytes[kind] / (time.perf_counter() - begin)
    return speeds


def slow_nodes(speeds: dict[str, float], what: str) -> list[str]:
    """One line per node far below the median."""
    if len(speeds) < 3:
        return []
    median = sorted(speeds.values())[len(speeds) // 2]
    return [
        f"node {node} is slow: {what} {value / 1e6:.1f} MB/s, the median is {median / 1e6:.1f} MB/s"
        for node, value in speeds.items()
        if value < SLOW * median
    ]


def run_preflight(config: Sequence[Path], deadline_seconds: float) -> dict[str, Any]:
    """All three stages; every rank must call it.

    Returns:
        On rank 0 the report: "nodes", "links", "groups", "problems". On other ranks, "problems" only.

    Raises:
        PreflightError: on every rank that still can, naming the node.
    """
    deadline = time.monotonic() + deadline_seconds
    store, rank, world = next(dist.rendezvous("env://"))
    store.set_timeout(timedelta(seconds=deadline_seconds))
    own = collect_facts(rank, config)
    store.set(f"preflight/facts/{rank}", json.dumps(asdict(own)))
    facts = _gather(store, "facts", world, deadline_seconds / 3)
    facts = [NodeFacts(**fact) for fact in facts]
    problems = find_differences(facts)
    skew = max(fact.clock for fact in facts) - min(fact.clock for fact in facts)
    links = check_links(facts, rank, store, deadline)
    store.set(f"preflight/links/{rank}", json.dumps(links))
    all_links = {_label(f): by for f, by in zip(facts, _gather(store, "links", world, 25), strict=True) if by}
    for source, by in all_links.items():
        problems += [f"node {source} cannot reach node {target}" for target, speed in by.items() if speed < 0]
    to_node: dict[str, float] = {}
    for by in all_links.values():
        for target, speed in by.items():
            to_node[target] = max(to_node.get(target, 0.0), speed)
    problems += slow_nodes(to_node, "the best link into it carries")
    groups: dict[str, dict[str, float]] = {}
    if not any("cannot reach" in problem for problem in problems):
        groups = _check_own_groups(store, rank, world)
    report = {
        "nodes": [asdict(fact) for fact in facts],
        "clock_spread_seconds": skew,
        "links": all_links,
        "groups": groups,
        "problems": problems,
    }
    return report


def _check_own_groups(store: dist.Store, rank: int, world: int) -> dict[str, dict[str, float]]:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("preflight/groups", store),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=30),
    )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    groups: dict[str, dist.ProcessGroup | None] = {"world": None}
    if 1 < local < world:
        nodes = [list(range(start, start + local)) for start in range(0, world, local)]
        groups["node"], _ = dist.new_subgroups_by_enumeration(nodes)
    try:
        return check_groups(groups, device)
    finally:
        dist.destroy_process_group()


def _gather(store: dist.Store, what: str, world: int, seconds: float) -> list[Any]:
    """Every rank's JSON under preflight/<what>, or a PreflightError that names the ranks that did not come."""
    until = time.monotonic() + seconds
    values: list[Any] = []
    missing = []
    for rank in range(world):
        key = f"preflight/{what}/{rank}"
        try:
            store.wait([key], timedelta(seconds=max(0.1, until - time.monotonic())))
            values.append(json.loads(store.get(key)))
        except dist.DistStoreError:
            missing.append(rank)
    if missing:
        raise PreflightError(f"ranks {_spans(missing)} did not report their {what} within {seconds:.0f} s")
    return values


def _label(fact: NodeFacts) -> str:
    return f"{fact.node} {fact.address}"


def _spans(ranks: Sequence[int]) -> str:
    return f"{min(ranks)}-{max(ranks)}" if len(ranks) > 1 else str(ranks[0])


def format_report(report: dict[str, Any]) -> str:
    """The table for people: a row per node, then groups, then what is wrong."""
    rows: dict[str, list[NodeFacts]] = {}
    for raw in report["nodes"]:
        fact = NodeFacts(**raw)
        rows.setdefault(_label(fact), []).append(fact)
    lines = [f"{'node':28s} {'ranks':8s} {'torch':14s} {'gpu':28s} {'slowest link in':>16s}"]
    for label, facts in rows.items():
        speeds = [by[label] for by in report["links"].values() if label in by]
        link = f"{min(speeds) / 1e6:.1f} MB/s" if speeds and min(speeds) > 0 else ("dead" if speeds else "-")
        compared = facts[0].compared
        ranks = _spans([fact.rank for fact in facts])
        lines.append(f"{label:28s} {ranks:8s} {compared['torch']:14s} {compared['gpu']:28s} {link:>16s}")
    for group, speeds in report["groups"].items():
        lines.append(f"group {group}: " + ", ".join(f"{k} {v / 1e6:.1f} MB/s" for k, v in speeds.items()))
    lines.append(f"clocks are within {report['clock_spread_seconds']:.2f} s (start-up order included)")
    lines += [f"PROBLEM: {problem}" for problem in report["problems"]] or ["no problem found"]
    return "\n".join(lines)


def main() -> None:
    """Entry point; exit code 1 where a problem was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="*", default=[], help="files that must be equal on all nodes")
    parser.add_argument("--seconds", type=float, default=30.0, help="give up after this long")
    parser.add_argument("--json", type=Path, help="write the report here (rank 0)")
    args = parser.parse_args()
    rank = int(os.environ.get("RANK", 0))
    try:
        report = run_preflight(args.config, args.seconds)
    except (PreflightError, dist.DistError) as error:
        print(f"PROBLEM (rank {rank}): {error}", flush=True)
        sys.exit(1)
    if rank == 0:
        print(format_report(report), flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1))
    sys.exit(1 if report["problems"] else 0)


if __name__ == "__main__":
    main()
