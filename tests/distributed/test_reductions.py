"""Clipping, norms, and other ways to reduce: by a wrapper, in bf16."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_muon import DistributedMuon
from tests.checks import on_ranks
from tests.distributed.test_gradients import (
    DTYPES,
    SHAPES,
    assert_follows,
    build,
    local_grads,
    masters,
    mean,
    step_both,
)
from tests.reference import backward


class Loss(nn.Module):
    """Its gradients are what is given."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(params)

    def forward(self, grads: list[Tensor]) -> Tensor:
        return torch.stack([(p * g).sum() for p, g in zip(self.weights, grads, strict=True)]).sum()


@on_ranks(2)
def test_clipping(rank: int, world: int) -> None:
    """Row 3: the raw mean gradient is clipped, as torch.nn.utils would in one process; p.grad is unwritten."""
    for dtype in DTYPES:
        optimizer, params, reference = build(dtype)
        for step, max_norm in enumerate((1e-3, 1e9, 5.0)):
            grads = mean([local_grads(step, r) for r in range(world)])
            backward(params, local_grads(step, rank))
            norm = optimizer.clip_grad_norm_(max_norm)
            local = [p.grad for p in params]
            holders = [nn.Parameter(torch.zeros_like(g)) for g in grads]
            for holder, grad in zip(holders, grads, strict=True):
                holder.grad = grad.clone()
            theirs = float(torch.nn.utils.clip_grad_norm_(holders, max_norm))
            assert norm == pytest.approx(theirs, rel=1e-6)
            for p, holder in zip(optimizer.sharded_parameters, holders, strict=True):
                expected = holder.grad.view(-1)[p.start : p.stop]
                if max_norm == 1e9:
                    assert torch.equal(p.grad, expected), "below the limit nothing is written"
                torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=0)
            # A second call sees the clipped gradient and reports the raw norm again.
            assert optimizer.clip_grad_norm_(max_norm) == norm
            optimizer.step()
            assert optimizer.step_report()["grad_norm"] == norm
            for p, grad in zip(params, local, strict=True):
                assert p.grad is grad, "p.grad was written"
            optimizer.zero_grad()
            reference.step([holder.grad for holder in holders])
        for ours, theirs in zip(masters(optimizer), reference.params, strict=True):
            # bf16 Newton-Schulz turns the last bit of the clip factor into its own rounding
            assert (ours - theirs).norm() < 2e-3 * theirs.norm()


@on_ranks(2)
def test_clipping_twice_takes_the_lower_limit(rank: int, world: int) -> None:
    optimizer, params, _ = build()
    backward(params, local_grads(0, rank))
    raw = optimizer.clip_grad_norm_(1.0)
    assert optimizer.clip_grad_norm_(0.25) == raw
    assert optimizer.clip_grad_norm_(0.5) == raw
    squares = torch.stack([p.grad.square().sum() for p in optimizer.sharded_parameters]).sum()
    dist.all_reduce(squares)
    assert squares.sqrt().item() == pytest.approx(0.25, rel=1e-4)


@on_ranks(2)
def test_backward_after_clipping_is_refused(rank: int, world: int) -> None:
    optimizer, params, _ = build()
    backward(params, local_grads(0, rank))
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match=r"backward between clip_grad_norm_"):
        backward(params, local_grads(1, rank))


@on_ranks(2)
def test_the_global_norm_counts_every_element_once(rank: int, world: int) -> None:
    """Row 29: every gradient 1 gives the root of the number of unique elements, tied weights included."""
    for layout in ("aligned", "bucketed", "flat"):
        embedding, head, hidden = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False), nn.Linear(6, 6)
        head.weight = embedding.weight
        model = nn.Sequential(embedding, hidden, head)
        groups = [
            {"params": [hidden.weight]},
            {"params": [embedding.weight, hidden.bias], "algorithm": "adamw"},
        ]
        optimizer = DistributedMuon(groups, layout=layout)
        backward(list(model.parameters()), [torch.ones_like(p) for p in model.parameters()])
        assert optimizer.clip_grad_norm_(1e9) == pytest.approx((66 + 36 + 6) ** 0.5, rel=1e-12)


@on_ranks(2)
def test_gradients_averaged_by_ddp(rank: int, world: int) -> None:
    """gradient_reduction="none" reads p.grad, moves no gradient and equals the reference."""
    optimizer, params, reference = build(gradient_reduction="none")
    model = nn.parallel.DistributedDataParallel(Loss(params))
    for step in range(3):
        with model.no_sync():
            model(local_grads(step, rank)).backward()
        model(local_grads(step, rank)).backward()
        grads = [p.grad.clone() for p in params]
        expected = [2 * g for g in mean([local_grads(step, r) for r in range(world)])]
        step_both(optimizer, params, reference, expected, f"step {step}")
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True)), "p.grad was written"
        optimizer.zero_grad()
        assert all(p.grad is None for p in params)
        assert "reduce_scatter" not in optimizer.step_report()["bytes"]
    with pytest.raises(RuntimeError, match=r"no_sync.*wrapper"), optimizer.no_sync():
        pass


@on_ranks(2)
def test_torchs_scaler_where_ddp_averages(rank: int, world: int) -> None:
    """As in a Trainer with fp16: gradients are unscaled, and a step with an inf on one rank is skipped on all."""
    optimizer, params, reference = build(gradient_reduction="none")
    model = nn.parallel.DistributedDataParallel(Loss(params))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(4):
        grads = local_grads(step, rank)
        if step == 1 and rank == 1:
            grads[2] = grads[2] * float("inf")
        scaler.scale(model(grads)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step != 1:
            reference.step(mean([local_grads(step, r) for r in range(world)]))
        assert_follows(optimizer, params, reference, f"step {step}")
    assert scaler.get_scale() == 512.0


@on_ranks(2)
def test_averaged_gradients_may_be_missing_or_edited(rank: int, world: int) -> None:
    """Row 9 with gradient_reduction="none": None on all ranks is untouched, an edited p.grad is what counts."""
    optimizer, params, reference = build(gradient_reduction="none")
    grads = mean([local_grads(0, r) for r in range(world)])
    for i, p in enumerate(params):
        p.grad = None if i in (1, 5) else grads[i].clone()
    for p in params:
        if p.grad is not None:
            p.grad.mul_(0.5)
    step_both(optimizer, params, reference, [None if i in (1, 5) else g * 0.5 for i, g in enumerate(grads)])


@on_ranks(2)
def test_bf16_reduction_sums_in_bf16_but_accumulates_in_fp32(rank: int, world: int) -> None:
    """256 + 1 + 1 is 258 in fp32 and 256 in bf16; the sum over ranks is rounded to bf16."""
    sent = {}
    for reduce_dtype in (torch.float32, torch.bfloat16):
        for dtype in DTYPES:
            optimizer, params, _ = build(dtype, reduce_dtype=reduce_dtype)
            for value in (256.0, 1.0):
                with optimizer.no_sync():
                    backward(params, [torch.full(shape, value) for shape in SHAPES])
            backward(params, [torch.full(shape, 1.0 + 3 * rank) for shape in SHAPES])
            optimizer.clip_grad_norm_(1e9)
            local = [258.0, 261.0]
            if reduce_dtype == torch.bfloat16:
                local = [258.0, 260.0]  # bf16 has no 261
            expected = torch.tensor(sum(local)).to(reduce_dtype).float() / 2
            for p in optimizer.sharded_parameters:
                assert torch.equal(p.grad, expected.expand_as(p.grad)), f"{reduce_dtype} {dtype} {p.grad}"
            optimizer.step()
            sent[reduce_dtype, dtype] = optimizer.step_report()["bytes"]["reduce_scatter"]
    for dtype in DTYPES:
        assert sent[torch.float32, dtype] == 2 * sent[torch.bfloat16, dtype]


@on_ranks(2)
def test_a_closure_recomputes_the_loss(rank: int, world: int) -> None:
    optimizer, params, reference = build()

    def closure() -> float:
        optimizer.zero_grad()
        backward(params, local_grads(4, rank))
        return 3.5

    assert optimizer.step(closure) == 3.5
    reference.step(mean([local_grads(4, r) for r in range(world)]))
    assert_follows(optimizer, params, reference)
