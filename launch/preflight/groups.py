"""The process groups that a job uses: connected by their first collectives, then timed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from distributed_muon.engine.collectives import Collectives
from launch.preflight.facts import NodeFacts

GROUP_NUMEL = 1 << 20


def time_groups(store: dist.Store, rank: int, facts: Sequence[NodeFacts]) -> dict[str, dict[str, float]]:
    """Connect and time the group of all ranks, and that of this node; collective over all ranks.

    Args:
        store, rank: of the job. facts: of every rank.

    Returns:
        Per group, bytes per second this rank sent in each collective.
    """
    world = len(facts)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("preflight/groups", store),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=30),
    )
    groups: dict[str, dist.ProcessGroup | None] = {"world": None}
    nodes: dict[str, list[int]] = {}
    for fact in facts:
        nodes.setdefault(fact.label, []).append(fact.rank)
    if len(nodes) > 1 and max(map(len, nodes.values())) > 1:
        groups["node"], _ = dist.new_subgroups_by_enumeration(list(nodes.values()))
    try:
        return check_groups(groups, device)
    finally:
        dist.destroy_process_group()


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
