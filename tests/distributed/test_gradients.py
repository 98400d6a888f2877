"""From p.grad to the mean gradient of a step: accumulation, missing gradients, clipping, reductions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distributed_muon import DistributedMuon
from tests.checks import on_ranks
from tests.reference import Reference, backward, make_params, rank_gradient

MUON = ((33, 17), (7, 5), (3, 40), (8, 8))
ADAMW = ((3,), (17, 5), (64,))
SHAPES = MUON + ADAMW
NUMEL = sum(torch.Size(shape).numel() for shape in SHAPES)
DTYPES = (torch.float32, torch.bfloat16)


def build(dtype: torch.dtype = torch.float32, **options) -> tuple[DistributedMuon, list[nn.Parameter], Reference]:
    """An optimizer, its parameters, and the one-process twin of both."""
    params = make_params(SHAPES, dtype)
    algorithms = ["muon"] * len(MUON) + ["adamw"] * len(ADAMW)
    reference = Reference(
        list(zip(params, algorithms, strict=True)),
        dict(lr=0.02, weight_decay=0.1),
        dict(lr=0.02, weight_decay=0.1, betas=(0.9, 0.95)),
    )
    groups = [
        {"params": params[: len(MUON)], "algorithm": "muon"},
        {"params": params[len(MUON) :], "algorithm": "adamw"},
    ]
    defaults = dict(lr=0.02, weight_decay=0.1, ns_form="standard", layout="bucketed", bucket_mb=0.002)
    return DistributedMuon(groups, **{**defaults, **options}), params, reference


def local_grads(step: int, rank: int) -> list[Tensor]:
    return [rank_gradient(shape, step, rank, index) for index, shape in enumerate(SHAPES)]


def mean(of_ranks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(grads).sum(0) / len(of_ranks) for grads in zip(*of_ranks, strict=True)]


def masters(optimizer: DistributedMuon) -> list[Tensor]:
    """The fp32 values of all parameters, from every rank's shards."""
    out = []
    for p in optimizer.sharded_parameters:
        whole = torch.zeros(p.param.numel())
        whole[p.start : p.stop] = p.master
        out.append(optimizer.collectives.all_reduce(whole, counted=False).view(p.param.shape))
    return out


def assert_follows(optimizer: DistributedMuon, params: Sequence[Tensor], reference: Reference, where: str = "") -> None:
    """Masters equal to the reference, parameters their rounding, on every rank, to the bit."""
    for i, (p, ours, theirs) in enumerate(zip(params, masters(optimizer), reference.params, strict=True)):
        assert torch.equal(ours, theirs), f"{where} parameter {i}: master off by {(ours - theirs).abs().max()}"
        assert torch.equal(p, theirs.to(p.dtype)), f"{where} parameter {i}: not the rounded master"


def assert_mean(optimizer: DistributedMuon, grads: Sequence[Tensor | None], where: str = "") -> None:
    """The shards of the mean gradient, to the bit: a first step alone would not show a wrong factor."""
    for i, (p, grad) in enumerate(zip(optimizer.sharded_parameters, grads, strict=True)):
        expected = torch.zeros(p.grad.numel()) if grad is None else grad.reshape(-1)[p.start : p.stop]
        assert torch.equal(p.grad, expected), f"{where} gradient of parameter {i}: {p.grad} is not {expected}"


def step_both(
    optimizer: DistributedMuon, params: Sequence[Tensor], reference: Reference, grads: list, where: str = ""
) -> None:
    """Step, and compare mean gradients, masters and parameters with the reference stepped on `grads`."""
    optimizer.step()
    reference.step(grads)
    assert_mean(optimizer, grads, where)
    assert_follows(optimizer, params, reference, where)


@on_ranks(2)
def test_four_microbatches_then_a_partial_step_of_three(rank: int, world: int) -> None:
    """Row 30: no_sync accumulates, and only the last microbatch is reduced."""
    for dtype in DTYPES:
        optimizer, params, reference = build(dtype)
        sent = []
        for step, count in enumerate((1, 4, 3)):
            for k in range(1, count):
                with optimizer.no_sync():
                    backward(params, [k * g for g in local_grads(step, rank)])
            backward(params, [count * g for g in local_grads(step, rank)])
            factor = count * (count + 1) / 2
            grads = [factor * g for g in mean([local_grads(step, r) for r in range(world)])]
            step_both(optimizer, params, reference, grads, f"{dtype} {count} microbatches")
            optimizer.zero_grad()
            sent.append(optimizer.step_report()["bytes"]["reduce_scatter"])
        assert sent[0] > 0
        assert sent == [sent[0]] * 3, "gradients travel once per step"


@on_ranks(2)
def test_gradients_one_to_four_give_ten(rank: int, world: int) -> None:
    """Row 30: microbatch k with every gradient k has the norm of ten ones."""
    optimizer, params, _ = build()
    for k in (1, 2, 3, 4):
        ones = [torch.full(shape, float(k)) for shape in SHAPES]
        if k < 4:
            with optimizer.no_sync():
                backward(params, ones)
        else:
            backward(params, ones)
    assert optimizer.clip_grad_norm_(1e9) == pytest.approx(10 * NUMEL**0.5, rel=1e-12)


@on_ranks(2)
def test_one_batch_of_eight_equals_four_of_two(rank: int, world: int) -> None:
    """Row 6: momentum and Newton-Schulz run once per step, whatever the microbatches."""
    results, calls = [], []
    for sizes in ((8,), (2, 2, 2, 2)):
        optimizer, params, _ = build()
        for step in range(2):
            sample = 0
            for number, size in enumerate(sizes):
                samples = [local_grads(100 * step + sample + i, rank) for i in range(size)]
                sample += size
                total = [torch.stack(grads).sum(0) for grads in zip(*samples, strict=True)]
                if number + 1 < len(sizes):
                    with optimizer.no_sync():
                        backward(params, total)
                else:
                    backward(params, total)
            optimizer.step()
            optimizer.zero_grad()
        calls.append(optimizer.step_report()["ns_calls"])
        results.append([p.detach().clone() for p in params] + [p.momentum for p in optimizer.sharded_parameters])
    assert calls[0] == calls[1]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@on_ranks(2)
def test_a_gradient_missing_on_one_rank_is_zero_there_and_missing_on_all_leaves_the_parameter(
    rank: int, world: int
) -> None:
    """Row 9: no hang, the mean counts the missing rank, and None everywhere is not a zero gradient."""
    somewhere, nowhere = (1, 5), (2, 3, 6)  # Muon and AdamW parameters
    for dtype in DTYPES:
        optimizer, params, reference = build(dtype)
        for step in range(3):
            of_ranks = [local_grads(step, r) for r in range(world)]
            for i in somewhere:
                of_ranks[1][i] = torch.zeros(SHAPES[i])
            grads = mean(of_ranks)
            local = list(of_ranks[rank])
            for i in somewhere:
                local[i] = None if rank == 1 else local[i]
            if step == 1:  # present before and after, so that momentum and step count are not zero
                for i in nowhere:
                    grads[i] = local[i] = None
            before = [p.detach().clone() for p in params]
            momenta = [p.momentum.clone() for p in optimizer.sharded_parameters]
            backward(params, local)
            step_both(optimizer, params, reference, grads, f"{dtype} step {step}")
            optimizer.zero_grad()
            if step == 1:
                for i in nowhere:
                    assert torch.equal(params[i], before[i])
                    assert torch.equal(optimizer.sharded_parameters[i].momentum, momenta[i])
        steps = [float(p.state["step"]) for p in optimizer.sharded_parameters if "step" in p.state]
        assert steps == [3, 3, 2], "the bias correction counts the steps with a gradient, on every rank"


@on_ranks(2)
def test_a_rank_without_any_gradient_steps_along(rank: int, world: int) -> None:
    """Row 9: one rank had nothing to do in this step."""
    optimizer, params, reference = build()
    grads = local_grads(0, 0)
    if rank == 0:
        backward(params, grads)
    step_both(optimizer, params, reference, [g / 2 for g in grads])


@on_ranks(2)
def test_no_gradient_on_any_rank_changes_nothing(rank: int, world: int) -> None:
    """Row 9: a step without a backward; weight decay is not applied either."""
    optimizer, params, _ = build()
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert optimizer.step_report()["ns_calls"] == 0


@on_ranks(2)
def test_zero_grad_drops_the_flat_gradients_too(rank: int, world: int) -> None:
    """Row 19: whatever was accumulated or already reduced is gone, for Muon and AdamW parameters."""
    for dtype in DTYPES:
        for set_to_none in (True, False):
            optimizer, params, reference = build(dtype)
            with optimizer.no_sync():
                backward(params, local_grads(7, rank))
            optimizer.zero_grad(set_to_none=set_to_none)
            backward(params, local_grads(8, rank))  # reduced
            optimizer.zero_grad(set_to_none=set_to_none)
            assert all(p.grad is None for p in params)
            backward(params, local_grads(9, rank))
            step_both(optimizer, params, reference, mean([local_grads(9, r) for r in range(world)]), f"{dtype}")


@on_ranks(2)
def test_the_zero_grad_of_the_model_serves_too(rank: int, world: int) -> None:
    """Row 19: nn.Module.zero_grad between steps, both of its forms."""
    for dtype in DTYPES:
        for set_to_none in (True, False):
            optimizer, params, reference = build(dtype)
            model = nn.Module()
            model.weights = nn.ParameterList(params)
            for step in range(3):
                backward(params, local_grads(step, rank))
                grads = mean([local_grads(step, r) for r in range(world)])
                step_both(optimizer, params, reference, grads, f"{dtype} set_to_none={set_to_none}")
                model.zero_grad(set_to_none=set_to_none)


@on_ranks(2)
def test_without_zero_grad_gradients_add_up_as_in_torch(rank: int, world: int) -> None:
    """fp32 p.grad outlives the step, unwritten, and the next backward adds to it."""
    optimizer, params, reference = build()
    total = [torch.zeros(shape) for shape in SHAPES]
    for step in range(3):
        backward(params, local_grads(step, rank))
        total = [t + g for t, g in zip(total, mean([local_grads(step, r) for r in range(world)]), strict=True)]
        step_both(optimizer, params, reference, total, f"step {step}")


@on_ranks(2)
def test_a_second_backward_outside_no_sync_is_not_lost(rank: int, world: int) -> None:
    """A forgotten no_sync() costs a second reduction but no gradient; also if only one rank does it."""
    for dtype in DTYPES:
        for second_on in ((0, 1), (1,)):
            optimizer, params, reference = build(dtype)
            of_ranks = []
            for r in range(world):
                first, second = local_grads(0, r), local_grads(1, r)
                second[1] = torch.zeros(SHAPES[1])
                of_ranks.append([a + b if r in second_on else a for a, b in zip(first, second, strict=True)])
            backward(params, local_grads(0, rank))
            if rank in second_on:
                backward(params, [None if i == 1 else g for i, g in enumerate(local_grads(1, rank))])
            step_both(optimizer, params, reference, mean(of_ranks), f"{dtype} second backward on {second_on}")


def two_layers(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    return second(first(x).relu())


@on_ranks(2)
def test_activation_checkpointing_gives_the_same_gradients(rank: int, world: int) -> None:
    """Reentrant checkpointing runs a backward inside the backward; both kinds must reduce everything."""
    results = []
    for kind in (None, True, False):
        torch.manual_seed(0)
        first, second = nn.Linear(12, 20), nn.Linear(20, 12)
        optimizer = DistributedMuon(
            [
                {"params": [first.weight, second.weight]},
                {"params": [first.bias, second.bias], "algorithm": "adamw"},
            ],
            lr=0.1,
            bucket_mb=0.0005,
        )
        for step in range(2):
            generator = torch.Generator().manual_seed(10 * step + rank)
            x = torch.randn(4, 12, generator=generator, requires_grad=True)
            for _ in range(2):  # the same layers twice: their gradients arrive in two pieces
                block = partial(two_layers, first, second)
                x = block(x) if kind is None else checkpoint(block, x, use_reentrant=kind)
            x.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([first.weight, second.weight, first.bias, second.bias])
    for kind, result in zip(("reentrant", "not reentrant"), results[1:], strict=True):
        for ours, theirs in zip(result, results[0], strict=True):
            assert torch.equal(ours, theirs), kind


@on_ranks(2)
def test_p_grad_cannot_be_read_or_written_once_it_moved(rank: int, world: int) -> None:
    """Row 48: clipping by habit, edits and reads raise in fp32 and bf16 alike, and cost nothing else."""
    for dtype in DTYPES:
        optimizer, params, reference = build(dtype)
        backward(params, local_grads(0, rank))
        for edit in (lambda g: g.mul_(0.5), lambda g: g.data.mul_(0.5), torch.isnan, torch.norm, lambda g: g + 1):
            with pytest.raises(RuntimeError, match=r"parameter '0\.0' was moved .* optimizer\.clip_grad_norm_"):
                edit(params[0].grad)
        with pytest.raises(RuntimeError, match=r"parameter '0\.0' was moved"):
            nn.utils.clip_grad_norm_(params, 1.0)
        assert params[0].grad.shape == SHAPES[0] and params[0].grad.dtype == dtype and "0.0" in repr(params[0].grad)
        step_both(optimizer, params, reference, mean([local_grads(0, r) for r in range(world)]), str(dtype))


@on_ranks(2)
def test_replacing_or_dropping_p_grad_after_its_reduction_counts(rank: int, world: int) -> None:
    """Row 48: p.grad = another tensor, None or zeroed, on one rank, is what this rank brings to the mean."""
    for dtype in DTYPES:
        optimizer, params, reference = build(dtype)
        backward(params, local_grads(0, rank))
        if rank == 1:
            for p, grad in zip(params[:2], local_grads(1, rank), strict=False):
                p.grad = grad.to(dtype)
            params[2].grad = None
            params[5].grad.zero_()
        of_ranks = [local_grads(0, 0), local_grads(1, 1)[:2] + local_grads(0, 1)[2:]]
        of_ranks[1][2] = torch.zeros(SHAPES[2])
        of_ranks[1][5] = torch.zeros(SHAPES[5])
        params[6].grad = None  # on both: not stepped
        grads = [*mean(of_ranks)[:6], None]
        step_both(optimizer, params, reference, grads, str(dtype))


@on_ranks(2)
def test_hand_made_strided_gradients(rank: int, world: int) -> None:
    """Row 31: p.grad set without a backward, transposed, sliced and expanded."""
    for reduction in ("reduce_scatter", "none"):
        optimizer, params, reference = build(gradient_reduction=reduction)
        of_ranks = []
        for r in range(world) if reduction == "reduce_scatter" else [5] * world:
            dense = local_grads(0, r)
            dense[3] = dense[3][:, :1].expand(8, 8)
            of_ranks.append(dense)
        own = of_ranks[rank]
        strided = [grad.contiguous() for grad in own]
        strided[0] = own[0].t().contiguous().t()
        strided[1] = torch.cat([own[1], own[1]], dim=1)[:, :5]
        strided[3] = own[3]
        strided[5] = torch.stack([own[5], own[5]], dim=-1)[..., 0]
        assert [g.is_contiguous() for g in strided] == [False, False, True, False, True, False, True]
        for p, grad in zip(params, strided, strict=True):
            p.grad = grad
        step_both(optimizer, params, reference, [grad.contiguous() for grad in mean(of_ranks)], reduction)


@on_ranks(2)
def test_strided_gradients_of_autograd(rank: int, world: int) -> None:
    """Row 31: sums through t(), a column slice and expand()."""
    optimizer, params, reference = build()
    local = [torch.zeros(shape) for shape in SHAPES]
    coefficient = float(rank + 1)
    local[0] += coefficient
    local[1][:, 1:3] += coefficient
    local[2] += rank_gradient((40, 3), 0, rank, 0).t()
    loss = params[0].expand(2, 33, 17)[0].sum() * coefficient
    loss = loss + params[1][:, 1:3].sum() * coefficient
    loss = loss + (params[2].t() * rank_gradient((40, 3), 0, rank, 0)).sum()
    loss.backward()
    total: list[Tensor | None] = []
    for i, grad in enumerate(local):
        dist.all_reduce(grad)
        total.append(grad / world if i < 3 else None)
    step_both(optimizer, params, reference, total)
