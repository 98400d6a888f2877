"""One matrix shared by a team of ranks: equal to one home, identical everywhere, bytes as planned."""

from __future__ import annotations

from functools import partial

import torch

from distributed_muon.layout.cutting import cut_buckets, make_buckets
from distributed_muon.layout.matrices import Split, TensorSpec, Whole
from tests.shards import in_teams, sharded_step, step_on
from tests.spawn import run_ranks

SPECS = [
    TensorSpec("wide", (24, 90), Whole()),
    TensorSpec("tall", (70, 20), Whole()),
    TensorSpec("square", (32, 32), Whole()),
    TensorSpec("fused", (30, 40), Split((10, 20))),
    TensorSpec("small", (5, 7), Whole()),
]
SIZES = [4, 2, 2, 1, 2, 1]
OPTIONS = dict(lr=0.1, momentum=0.9, ns_dtype=torch.float32, ns_form="standard", strategy="home")


def run(rank: int, world: int, sizes: list[int]) -> dict:
    numels = [spec.numel for spec in SPECS]
    buckets = make_buckets(numels, world, bucket_numel=2000, aligned=False)
    shards = cut_buckets(buckets, numels, world)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(n, generator=generator) for n in numels]
    grads = [torch.randn(n, generator=generator) for n in numels]
    engine = sharded_step(SPECS, shards, whole, OPTIONS, plan=partial(in_teams, sizes), wave_bytes=4 * 3000)
    for _ in range(2):
        step_on(engine, grads)
    result = [torch.zeros(n) for n in numels]
    for p in engine.parameters:
        result[p.tensor][p.start : p.stop] = p.master
    for tensor in result:
        torch.distributed.all_reduce(tensor)
    plan, sent = engine.plan, engine.collectives.sent_bytes
    team_bytes = sum(sum(team.sent_bytes.values()) for team in engine.teams.values())
    return {
        "result": result,
        "calls": engine.ns_calls,
        "team_bytes": (team_bytes, 2 * plan.team_bytes_by_rank[rank]),
        "exchange": (sent["all_to_all"], 2 * plan.exchange_bytes_by_rank[rank]),
        "rms": engine.measured()["update_rms"],
        "teams": len(plan.teams),
    }


def test_a_team_equals_one_home() -> None:
    alone = run_ranks(run, 4, [1] * len(SIZES))
    teams = run_ranks(run, 4, SIZES)
    assert alone[0]["teams"] == 0 and teams[0]["teams"] == sum(size for size in SIZES if size > 1)
    for rank in range(4):
        for ours, expected, first in zip(teams[rank]["result"], alone[rank]["result"], teams[0]["result"], strict=True):
            assert torch.equal(ours, first)
            torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
        assert teams[rank]["team_bytes"][0] == teams[rank]["team_bytes"][1]
        assert teams[rank]["exchange"][0] == teams[rank]["exchange"][1]
        assert teams[rank]["rms"].keys() == alone[rank]["rms"].keys()
        for name, value in teams[rank]["rms"].items():
            assert abs(value / alone[rank]["rms"][name] - 1) < 1e-4
    assert sum(t["calls"] for t in teams) == sum(t["calls"] for t in alone) == 2 * len(SIZES)
    assert sum(t["team_bytes"][0] for t in teams) > 0
