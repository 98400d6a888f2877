"""The distributed step against torch.optim.Muon and AdamW in one process, to the bit."""

from __future__ import annotations

import pytest
import torch

from distributed_muon import DistributedMuon
from distributed_muon.native.standin import MovedGradient
from tests.reference import ADAMW_SHAPES, MUON_SHAPES, Reference, backward, make_params, mean_gradient, rank_gradient
from tests.spawn import run_ranks

LAYOUTS = ("aligned", "bucketed", "flat")
STRATEGIES = ("home", "gather", "auto")
STEPS = 4


def build(layout: str, strategy: str, bucket_mb: float | None = 0.004, **options) -> tuple[DistributedMuon, list]:
    """An optimizer over shapes that straddle, do not divide, are tall, wide and tiny, and its parameters."""
    muon, adamw = make_params(MUON_SHAPES), make_params(ADAMW_SHAPES, seed=1)
    groups = [
        {"params": muon, "algorithm": "muon"},
        {"params": adamw, "algorithm": "adamw", "weight_decay": 0.01},
    ]
    defaults = dict(
        lr=0.02, weight_decay=0.1, ns_form="standard", layout=layout, strategy=strategy, bucket_mb=bucket_mb
    )
    return DistributedMuon(groups, **{**defaults, **options}), [*muon, *adamw]


def make_reference(params: list) -> Reference:
    algorithms = ["muon"] * len(MUON_SHAPES) + ["adamw"] * len(ADAMW_SHAPES)
    adamw = dict(lr=0.02, weight_decay=0.01, betas=(0.9, 0.95), eps=1e-8)
    return Reference(list(zip(params, algorithms, strict=True)), dict(lr=0.02, weight_decay=0.1), adamw)


def ranks_equal_reference(rank: int, world: int) -> list[list[bytes]]:
    out = []
    for layout in LAYOUTS:
        for strategy in STRATEGIES:
            optimizer, params = build(layout, strategy, None if layout == "flat" else 0.004)
            if layout == "bucketed" and world > 1:
                holders = [
                    {p.rank for p in optimizer.plan.layout.pieces if p.matrix == m} for m in range(len(MUON_SHAPES))
                ]
                assert sum(len(ranks) > 1 for ranks in holders) >= 2, "the shapes must straddle"
            reference = make_reference(params)
            for step in range(STEPS):
                backward(params, [rank_gradient(tuple(p.shape), step, rank, i) for i, p in enumerate(params)])
                moved = [p.grad for p in params]
                optimizer.step()
                reference.step([mean_gradient(tuple(p.shape), step, world, i) for i, p in enumerate(params)])
                for i, (ours, theirs, grad) in enumerate(zip(params, reference.params, moved, strict=True)):
                    where = f"{layout} {strategy} step {step} parameter {i}"
                    assert torch.isfinite(ours).all(), where
                    assert torch.equal(ours, theirs), f"{where}: {(ours - theirs).abs().max()}"
                    assert ours.grad is grad and isinstance(grad, MovedGradient), f"{where}: p.grad was written"
                optimizer.zero_grad()
            out.append([p.detach().numpy().tobytes() for p in params])
    return out


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_bit_identical_to_torch(world: int) -> None:
    results = run_ranks(ranks_equal_reference, world)
    for rank, result in enumerate(results):
        assert result == results[0], f"rank {rank} differs from rank 0"


def test_without_torch_distributed_equals_one_rank() -> None:
    assert ranks_equal_reference(0, 1) == run_ranks(ranks_equal_reference, 1)[0]


def ranks_lr_control(rank: int, world: int) -> float:
    optimizer, params = build("bucketed", "home", lr=0.02 * 1.01)
    reference = make_reference(params)
    backward(params, [rank_gradient(tuple(p.shape), 0, rank, i) for i, p in enumerate(params)])
    optimizer.step()
    reference.step([mean_gradient(tuple(p.shape), 0, world, i) for i, p in enumerate(params)])
    return min(float((a - b).abs().max()) for a, b in zip(params, reference.params, strict=True))


def test_a_one_percent_error_would_be_seen() -> None:
    assert min(run_ranks(ranks_lr_control, 2)) > 1e-5
