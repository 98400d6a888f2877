"""The engine alone: a ShardedStep over any shards, each in memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.options import Options
from distributed_muon.engine.state import Member, Part
from distributed_muon.engine.step import ShardedStep
from distributed_muon.layout.matrices import TensorSpec
from distributed_muon.layout.pieces import Layout, Shard
from distributed_muon.layout.plan import Plan, make_plan


def sharded_step(
    specs: Sequence[TensorSpec],
    shards: Sequence[Sequence[Shard]],
    whole: Sequence[Tensor],
    options: Mapping[str, Any],
    *,
    tp_ranks: Sequence[int] | None = None,
    plan: Callable[..., Plan] = make_plan,
    wave_bytes: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> ShardedStep:
    """The engine of this rank; tensors without a rule are AdamW's, at rate 0.

    Args:
        specs: the tensors. shards: per rank. whole: rank-local values of every tensor. options: of `Options`.
        plan: makes the plan. wave_bytes: of it; None is its default. group: of the domain; None is the default group.
    """
    collectives, everywhere = Collectives(group), Options.of(options)
    groups = everywhere.complete([{"params": []}, {"params": [], "algorithm": "adamw", "lr": 0.0}])
    members = [Member(s, w, int(s.rule is None)) for s, w in zip(specs, whole, strict=True)]
    engine = ShardedStep(members, groups, everywhere, collectives, torch.device("cpu"))
    parts = [Part([s], [0], whole[s.tensor].reshape(-1)[s.start : s.stop].clone()) for s in shards[collectives.rank]]
    small = partial(plan, wave_bytes=wave_bytes) if wave_bytes else plan
    with mock.patch("distributed_muon.engine.step.make_plan", small):
        engine.attach(shards, parts, tp_ranks)
    return engine


def step_on(engine: ShardedStep, whole: Sequence[Tensor]) -> None:
    """One step on rank-local gradients of every tensor."""
    for part in engine.parts:
        (shard,) = part.shards
        part.grad = whole[shard.tensor].reshape(-1)[shard.start : shard.stop].clone()
    engine.step()


def in_teams(sizes: Sequence[int], layout: Layout, *args: Any, **options: Any) -> Plan:
    """A `make_plan` that cuts matrix m into sizes[m] blocks."""
    return make_plan(layout.with_teams(sizes), *args, **{**options, "teams": False})
