"""One matrix shared by a team of ranks: equal to one home, identical everywhere, bytes as planned."""

from __future__ import annotations

import torch
from distributed_muon.engine.diagnostics import merge_measured
from distributed_muon.engine.sharded_muon import ShardedMuon

from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.timing import StepTimer
from distributed_muon.layout.cost_model import NewtonSchulzCost
from distributed_muon.layout.cutting import cut_buckets, make_buckets
from distributed_muon.layout.matrices import Split, TensorSpec, Whole
from distributed_muon.layout.pieces import Layout
from distributed_muon.layout.plan import make_plan
from tests.spawn import run_ranks

SPECS = [
    TensorSpec("wide", (24, 90), Whole()),
    TensorSpec("tall", (70, 20), Whole()),
    TensorSpec("square", (32, 32), Whole()),
    TensorSpec("fused", (30, 40), Split((10, 20))),
    TensorSpec("small", (5, 7), Whole()),
]
SIZES = [4, 2, 2, 1, 2, 1]
GROUP = dict(
    lr=0.1, weight_decay=0.1, momentum=0.9, nesterov=True, ns_coefficients="quintic", ns_steps=5, eps=1e-7,
    adjust_lr_fn="match_rms_adamw",
)  # fmt: skip


def run(rank: int, world: int, sizes: list[int]) -> dict:
    numels = [spec.numel for spec in SPECS]
    buckets = make_buckets(numels, world, bucket_numel=2000, aligned=False)
    shards = cut_buckets(buckets, numels, world)
    layout = Layout.build(SPECS, shards).with_teams(sizes)
    plan = make_plan(layout, "home", NewtonSchulzCost(element_bytes=4), teams=False, wave_bytes=4 * 3000)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(n, generator=generator) for n in numels]
    grads = [torch.randn(n, generator=generator) for n in numels]
    own = shards[rank]
    masters = [whole[s.tensor][s.start : s.stop].clone() for s in own]
    momenta = [torch.zeros_like(m) for m in masters]
    collectives = Collectives()
    cpu = torch.device("cpu")
    options = dict(device=cpu, ns_dtype=torch.float32, ns_form="standard", timer=StepTimer(cpu))
    muon = ShardedMuon(plan, collectives, masters, momenta, **options)
    for _ in range(2):
        held = [grads[s.tensor][s.start : s.stop] for s in own]
        muon.step(held, [GROUP] * len(SPECS), [True] * len(SPECS))
    result = [torch.zeros(n) for n in numels]
    for s, master in zip(own, masters, strict=True):
        result[s.tensor][s.start : s.stop] = master
    for tensor in result:
        torch.distributed.all_reduce(tensor)
    team_bytes = sum(sum(team.sent_bytes.values()) for team in muon.teams.values())
    return {
        "result": result,
        "calls": muon.ns_calls,
        "team_bytes": (team_bytes, 2 * plan.team_bytes_by_rank[rank]),
        "exchange": (collectives.sent_bytes["all_to_all"], 2 * plan.exchange_bytes_by_rank[rank]),
        "rms": merge_measured(collectives, plan, muon.measured, cpu)["update_rms"],
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
