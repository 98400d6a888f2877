"""What a step computes: masters, decay, scales, fused parameters, options of groups, schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from distributed_muon import QKV, Conv, DistributedMuon, Experts, Split
from distributed_muon.layout.matrices import Whole
from tests.checks import on_ranks
from tests.reference import Reference, backward, make_params, mean_gradient, rank_gradient

SHAPES = ((33, 17), (7, 5), (3, 40), (18, 18))


def muon(params: Sequence[nn.Parameter], **options) -> DistributedMuon:
    """Muon over all parameters, cut so that they straddle, bit-identical to torch on CPUs."""
    defaults = dict(lr=0.02, weight_decay=0.1, ns_form="standard", layout="bucketed", bucket_mb=0.002)
    return DistributedMuon(params, **{**defaults, **options})


def step(optimizer: DistributedMuon, params: Sequence[nn.Parameter], grads: Sequence[Tensor]) -> None:
    backward(params, grads)
    optimizer.step()
    optimizer.zero_grad()


def masters(optimizer: DistributedMuon) -> list[Tensor]:
    """The fp32 values of all parameters, from every rank's shards."""
    out = []
    for p in optimizer.sharded_parameters:
        whole = torch.zeros(p.param.numel())
        whole[p.start : p.stop] = p.master
        out.append(optimizer.collectives.all_reduce(whole, counted=False).view(p.param.shape))
    return out


@on_ranks(2)
def test_bf16_parameters_follow_fp32_masters_to_the_bit(rank: int, world: int) -> None:
    """The masters are those of an fp32 run on the same gradients, the parameters their rounding."""
    for dtype in (torch.bfloat16, torch.float32):
        params = make_params(SHAPES, dtype)
        reference = Reference([(p, "muon") for p in params], dict(lr=0.02, weight_decay=0.1))
        optimizer = muon(params)
        for number in range(4):
            step(optimizer, params, [rank_gradient(s, number, rank, i) for i, s in enumerate(SHAPES)])
            reference.step([mean_gradient(s, number, world, i) for i, s in enumerate(SHAPES)])
            for p, master, theirs in zip(params, masters(optimizer), reference.params, strict=True):
                assert torch.equal(master, theirs)
                assert torch.equal(p, theirs.to(dtype))


@on_ranks(2)
def test_bf16_parameters_do_not_lose_small_updates(rank: int, world: int) -> None:
    """Row 21: 1.0 decayed by 1e-4 a step is 0.99 after 100 steps; bf16 alone would stay at 1.0."""
    params = [nn.Parameter(torch.ones(9, 7, dtype=torch.bfloat16)), nn.Parameter(torch.ones(5, dtype=torch.bfloat16))]
    groups = [{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw"}]
    optimizer = DistributedMuon(groups, lr=0.001, weight_decay=0.1)
    for _ in range(100):
        step(optimizer, params, [torch.zeros_like(p) for p in params])
    for p, master in zip(params, masters(optimizer), strict=True):
        torch.testing.assert_close(master, torch.full(p.shape, 0.9999**100), rtol=1e-5, atol=0)
        assert torch.equal(p, master.to(torch.bfloat16))
        assert p.float().sub(0.99).abs().max() < 0.003


@on_ranks(2)
def test_weight_decay_once_with_the_unscaled_learning_rate(rank: int, world: int) -> None:
    """Row 20: zero gradient, decay 10, lr 0.01 gives 0.9 p whatever the shape and algorithm."""
    for adjust in ("match_rms_adamw", "original"):
        params = make_params([(64, 4), (4, 64), (9, 9), (3, 4, 3, 3), (7,)])
        before = [p.detach().clone() for p in params]
        groups = [
            {"params": params[:3]},
            {"params": params[3:4], "matrices": Conv()},
            {"params": params[4:], "algorithm": "adamw"},
        ]
        optimizer = DistributedMuon(groups, lr=0.01, weight_decay=10, adjust_lr_fn=adjust)
        step(optimizer, params, [torch.zeros_like(p) for p in params])
        for p, old in zip(params, before, strict=True):
            torch.testing.assert_close(p.detach(), 0.9 * old, rtol=1e-6, atol=0)
            assert not torch.equal(p, old)


@on_ranks(2)
def test_a_first_step_does_not_depend_on_clipping_or_the_norm(rank: int, world: int) -> None:
    """Row 3: |dW| is the same unclipped, clipped to 1e-3, and clipped to 1 from a norm of 1e20."""
    updates = []
    for scale, limit in ((1.0, None), (1.0, 1e-3), (1e20, 1.0), (1e-12, 1.0)):
        params = make_params(SHAPES)
        before = [p.detach().clone() for p in params]
        optimizer = muon(params, weight_decay=0.0)
        grads = [scale * rank_gradient(s, 0, rank, i) for i, s in enumerate(SHAPES)]
        raw = math.sqrt(
            sum((scale * mean_gradient(s, 0, world, i)).double().square().sum() for i, s in enumerate(SHAPES))
        )
        backward(params, grads)
        if limit is not None:
            assert optimizer.clip_grad_norm_(limit) == pytest.approx(raw, rel=1e-5), "the reported norm is the raw one"
        optimizer.step()
        assert optimizer.step_report()["grad_norm"] == pytest.approx(raw, rel=1e-5)
        updates.append([p.detach() - old for p, old in zip(params, before, strict=True)])
    for case in updates[1:]:
        for ours, theirs in zip(case, updates[0], strict=True):
            assert theirs.norm() > 0.01
            assert (ours - theirs).norm() < 0.05 * theirs.norm(), "beyond bf16 rounding"


@on_ranks(2)
def test_steps_do_not_depend_on_the_scale_of_gradients(rank: int, world: int) -> None:
    """Row 4: gradients times 2^-100 to 2^100 move the weights alike; zeros give finite zeros."""
    results = []
    for scale in (1.0, 2.0**-100, 2.0**-60, 2.0**60, 2.0**100):
        params = make_params(SHAPES)
        optimizer = muon(params)
        for number in range(2):
            step(optimizer, params, [scale * rank_gradient(s, number, rank, i) for i, s in enumerate(SHAPES)])
        results.append([p.detach().clone() for p in params])
    for scaled in results[1:]:
        for ours, theirs in zip(scaled, results[0], strict=True):
            assert torch.equal(ours, theirs), (ours - theirs).abs().max()


@on_ranks(2)
def test_low_rank_gradients_stay_bounded(rank: int, world: int) -> None:
    """Row 39: rank 1 and rank 4, wide, tall and square: finite, singular values of the update below 1.3."""
    shapes = ((48, 48), (8, 256), (256, 8), (33, 65))
    for low in (1, 4):
        params = make_params(shapes)
        before = [p.detach().clone() for p in params]
        optimizer = muon(params, lr=1.0, weight_decay=0.0, ns_form="auto")
        grads = []
        for i, (rows, cols) in enumerate(shapes):
            generator = torch.Generator().manual_seed(i)
            left, right = torch.randn(rows, low, generator=generator), torch.randn(low, cols, generator=generator)
            grads.append(left @ right)
        step(optimizer, params, grads)
        for p, old, (rows, cols) in zip(params, before, shapes, strict=True):
            update = (old - p.detach()) / (0.2 * math.sqrt(max(rows, cols)))
            values = torch.linalg.svdvals(update)
            assert torch.isfinite(update).all()
            assert values[0] < 1.3
            assert values[low - 1] > 0.5, "the directions of the gradient are taken in full"


# ---- parameters that are not one matrix --------------------------------------------------------------

Parts = Callable[[Tensor], list[Tensor]]


def qkv_parts(w: Tensor) -> list[Tensor]:
    """Two groups of [q q k v] with head size 3: query, key and value rows over the groups."""
    groups = w.view(2, 12, -1)
    return [groups[:, :6].reshape(12, -1), groups[:, 6:9].reshape(6, -1), groups[:, 9:].reshape(6, -1)]


def gated_parts(w: Tensor) -> list[Tensor]:
    """Two groups of [q q gate gate k v], head size 3, values of 2."""
    groups = w.view(2, 17, -1)
    cuts = ((0, 6), (6, 12), (12, 15), (15, 17))
    return [groups[:, a:b].reshape(2 * (b - a), -1) for a, b in cuts]


RULES: dict[str, tuple[tuple[int, ...], Whole, Parts]] = {
    "conv": ((64, 3, 3, 3), Conv(), lambda w: [w.reshape(64, 27)]),
    "conv1d": ((6, 5, 7), Conv(), lambda w: [w.reshape(6, 35)]),
    "square experts": ((6, 8, 6), Experts(), lambda w: list(w)),
    "cubic experts": ((8, 8, 8), Experts(), lambda w: list(w)),
    "gate/up": ((26, 9), Split((13, 13)), lambda w: [w[:13], w[13:]]),
    "qkv in rows": ((20, 9), Split((12, 4, 4)), lambda w: [w[:12], w[12:16], w[16:]]),
    "columns": ((9, 14), Split((4, 10), dim=1), lambda w: [w[:, :4], w[:, 4:]]),
    "interleaved qkv": ((24, 10), QKV(heads=4, groups=2, head_dim=3), qkv_parts),
    "gated qkv": ((34, 10), QKV(heads=4, groups=2, head_dim=3, value_dim=2, gate=True), gated_parts),
    "per group": (
        (24, 10),
        QKV(heads=4, groups=2, head_dim=3, per_group=True),
        lambda w: [w[a:b] for a, b in ((0, 6), (6, 9), (9, 12), (12, 18), (18, 21), (21, 24))],
    ),
    "fused experts": (
        (3, 10, 7),
        Experts(inner=Split((5, 5))),
        lambda w: [part for expert in w for part in (expert[:5], expert[5:])],
    ),
}
# Experts of very different gradients: a norm over the whole stack would drown the small ones.
EXPERT_SCALES = [10.0 ** (3 * (i % 4) - 6) for i in range(8)]


@on_ranks(2)
def test_fused_parameters_equal_separate_matrices(rank: int, world: int) -> None:
    """Rows 12 to 16: every part is orthogonalized and scaled as a parameter of its own, for any layout."""
    for adjust in ("match_rms_adamw", "original"):
        for layout in ("aligned", "bucketed", "flat"):
            params = make_params([shape for shape, _, _ in RULES.values()])
            parts_of = [parts for _, _, parts in RULES.values()]
            separate = [
                [nn.Parameter(part.detach().clone()) for part in parts(p)]
                for p, parts in zip(params, parts_of, strict=True)
            ]
            theirs = torch.optim.Muon(
                [q for qs in separate for q in qs], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust
            )
            groups = [{"params": [p], "matrices": rule} for p, (_, rule, _) in zip(params, RULES.values(), strict=True)]
            size = None if layout == "flat" else 0.002
            ours = muon(groups, adjust_lr_fn=adjust, layout=layout, bucket_mb=size)
            for number in range(2):
                local, average = [], []
                for i, p in enumerate(params):
                    scale = torch.ones(())
                    if p.ndim == 3:
                        scale = torch.tensor(EXPERT_SCALES[: p.shape[0]]).view(-1, 1, 1)
                    local.append(scale * rank_gradient(tuple(p.shape), number, rank, i))
                    of_ranks = [scale * rank_gradient(tuple(p.shape), number, r, i) for r in range(world)]
                    average.append(torch.stack(of_ranks).sum(0) / world)
                step(ours, params, local)
                for qs, grad, parts in zip(separate, average, parts_of, strict=True):
                    for q, part in zip(qs, parts(grad), strict=True):
                        q.grad = part.contiguous()
                theirs.step()
                for name, p, qs, parts in zip(RULES, params, separate, parts_of, strict=True):
                    for k, (got, want) in enumerate(zip(parts(p.detach()), qs, strict=True)):
                        where = f"{adjust} {layout} step {number} {name} part {k}"
                        assert torch.equal(got, want), f"{where}: off by {(got - want).abs().max()}"


@on_ranks(2)
def test_the_scale_of_a_convolution_is_that_of_its_flattening(rank: int, world: int) -> None:
    """Row 13: (64, 3, 3, 3) is 64 x 27: factors sqrt(64/27) = 1.540 and 0.2 sqrt(64) = 1.6."""
    for adjust, factor in (("original", 1.5396007), ("match_rms_adamw", 1.6)):
        weight = nn.Parameter(torch.zeros(64, 3, 3, 3))
        optimizer = DistributedMuon([{"params": [weight], "matrices": Conv()}], lr=1.0, adjust_lr_fn=adjust)
        optimizer.track("update_rms")
        # Orthonormal columns: what Newton-Schulz makes of them is a multiple of themselves.
        columns = torch.linalg.qr(torch.randn(64, 27, generator=torch.Generator().manual_seed(0)))[0]
        step(optimizer, [weight], [columns.view(64, 3, 3, 3)])
        value = (-weight.detach().view(64, 27) * columns).sum() / 27 / factor
        assert 0.68 < value < 1.14, f"{adjust}: {value}"
        rms = optimizer.step_report()["update_rms"]
        assert next(iter(rms.values())) == pytest.approx(
            float(weight.detach().norm()) / math.sqrt(weight.numel()), rel=1e-3
        )


@on_ranks(2)
def test_padding_never_matters(rank: int, world: int) -> None:
    """Row 12: everything in the buckets that belongs to no parameter is NaN, and the bits stay the same."""
    results = []
    for poisoned in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            params = make_params([(7, 5), (3, 11), (5, 3), (9,)], dtype)
            groups = [{"params": params[:3]}, {"params": params[3:], "algorithm": "adamw"}]
            optimizer = DistributedMuon(groups, lr=0.02, bucket_mb=0.0001, nonfinite="raise")
            if poisoned:
                poison_padding(optimizer)
            for number in range(3):
                backward(params, [rank_gradient(tuple(p.shape), number, rank, i) for i, p in enumerate(params)])
                norm = optimizer.clip_grad_norm_(10.0)
                optimizer.step()
                optimizer.zero_grad()
            results.append([torch.tensor(norm), *(p.detach().clone() for p in params), *masters(optimizer)])
    half = len(results) // 2
    for clean, dirty in zip(results[:half], results[half:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def poison_padding(optimizer: DistributedMuon) -> None:
    """NaN in every element of flat parameters, gradients, masters and moments that is padding."""
    poisoned = 0
    for bucket in optimizer._buckets:
        padding = torch.ones(bucket.spec.numel, dtype=torch.bool)
        for tensor, offset in zip(bucket.spec.tensors, bucket.spec.offsets, strict=True):
            padding[offset : offset + optimizer._params[tensor].numel()] = False
        own = padding.view(optimizer.collectives.size, -1)[optimizer.collectives.rank]
        bucket.flat[padding] = torch.nan
        bucket.grad[padding] = torch.nan
        bucket.part.master[own] = torch.nan
        bucket.part.grad[own] = torch.nan
        for moment in bucket.part.moments.values():
            moment[own] = torch.nan
        poisoned += int(padding.sum())
    assert poisoned > 0, "the shapes must need padding"


# ---- options and schedules ---------------------------------------------------------------------------


@on_ranks(2)
def test_every_option_of_a_group_counts(rank: int, world: int) -> None:
    """Row 18: three Muon groups and two AdamW groups keep their own options, sharing buckets and waves."""
    muon_options = [
        dict(lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, ns_steps=5, adjust_lr_fn="match_rms_adamw"),
        dict(lr=0.3, weight_decay=0.0, momentum=0.5, nesterov=False, ns_steps=3, adjust_lr_fn="original"),
        dict(lr=0.05, weight_decay=0.3, momentum=0.0, nesterov=True, ns_coefficients=(3.0, -3.2, 1.2), ns_steps=4),
    ]
    muon_options[2]["adjust_lr_fn"] = "match_rms_adamw"
    adamw_options = [
        dict(lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8),
        dict(lr=0.2, weight_decay=0.0, betas=(0.5, 0.7), eps=0.1),
    ]
    sets = [make_params(SHAPES, seed=number) for number in range(3)] + [
        make_params([(9,), (4, 3)], seed=n) for n in (3, 4)
    ]
    twins = [[nn.Parameter(p.detach().clone()) for p in params] for params in sets]
    groups = [{"params": params, **options} for params, options in zip(sets, muon_options, strict=False)]
    groups += [
        {"params": params, "algorithm": "adamw", **options}
        for params, options in zip(sets[3:], adamw_options, strict=True)
    ]
    theirs = [torch.optim.Muon(twin, **options) for twin, options in zip(twins, muon_options, strict=False)]
    for twin, options in zip(twins[3:], adamw_options, strict=True):
        betas, eps = options["betas"], options["eps"]
        theirs.append(
            torch.optim.AdamW(twin, lr=options["lr"], weight_decay=options["weight_decay"], betas=betas, eps=eps)
        )
    ours = DistributedMuon(groups, ns_form="standard", layout="bucketed", bucket_mb=0.004)
    flat, flat_twins = [p for params in sets for p in params], [p for twin in twins for p in twin]
    for number in range(3):
        step(ours, flat, [rank_gradient(tuple(p.shape), number, rank, i) for i, p in enumerate(flat)])
        for i, twin in enumerate(flat_twins):
            twin.grad = mean_gradient(tuple(twin.shape), number, world, i)
        for optimizer in theirs:
            optimizer.step()
        for i, (p, twin) in enumerate(zip(flat, flat_twins, strict=True)):
            assert torch.equal(p, twin), f"step {number} parameter {i}: {(p - twin).abs().max()}"


@on_ranks(2)
def test_plain_schedulers_scale_every_group_from_its_own_rate(rank: int, world: int) -> None:
    """Row 18: the rate a scheduler sets is the one of the very next step, read off the weight decay."""
    schedules = {
        "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=4),
        "warmup": lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=3),
    }
    factors = {
        "lambda": [1, 1 / 2, 1 / 3],
        "cosine": [1, (1 + math.cos(math.pi / 4)) / 2, 1 / 2],
        "warmup": [0.25, 0.5, 0.75],
    }
    for name, make in schedules.items():
        params = [nn.Parameter(torch.ones(9, 5)), nn.Parameter(torch.ones(6, 5)), nn.Parameter(torch.ones(7))]
        groups = [
            {"params": params[:1], "lr": 0.1},
            {"params": params[1:2], "lr": 0.2},
            {"params": params[2:], "lr": 0.4, "algorithm": "adamw"},
        ]
        optimizer = DistributedMuon(groups, lr=9.0, weight_decay=1.0)
        scheduler = make(optimizer)
        for number in range(3):
            before = [float(p.detach().view(-1)[0]) for p in params]
            step(optimizer, params, [torch.zeros_like(p) for p in params])
            scheduler.step()
            for p, old, base in zip(params, before, (0.1, 0.2, 0.4), strict=True):
                expected = torch.full(p.shape, old * (1 - base * factors[name][number]))
                torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


@on_ranks(2)
def test_a_tensor_learning_rate_counts_as_its_value(rank: int, world: int) -> None:
    results = []
    for lr in (0.05, torch.tensor(0.05, dtype=torch.float64)):
        params = make_params([*SHAPES, (9,)])
        groups = [{"params": params[:4]}, {"params": params[4:], "algorithm": "adamw"}]
        optimizer = DistributedMuon(groups, lr=lr)
        step(optimizer, params, [rank_gradient(tuple(p.shape), 0, rank, i) for i, p in enumerate(params)])
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@on_ranks(2)
def test_newton_schulz_in_fp32_and_the_gram_form_are_muon_too(rank: int, world: int) -> None:
    """Other precisions and forms give the same singular vectors, to bf16's accuracy."""
    shape = (24, 96)
    gradient = rank_gradient(shape, 0, 0, 0)
    left, _, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    for options in (
        dict(ns_form="standard"),
        dict(ns_form="gram"),
        dict(ns_form="auto"),
        dict(ns_form="standard", ns_dtype=torch.float32),
        dict(ns_form="gram", ns_dtype=torch.float32),
    ):
        p = nn.Parameter(torch.zeros(shape))
        optimizer = DistributedMuon([p], lr=1.0, weight_decay=0.0, adjust_lr_fn="original", **options)
        step(optimizer, [p], [gradient])
        inner = (left.T @ -p.detach().double() @ right.T).diagonal()
        assert inner.min() > 0.6 and inner.max() < 1.25, f"{options}: {inner}"
        off = (left.T @ -p.detach().double() @ right.T) - inner.diag()
        limit = 1e-4 if options.get("ns_dtype") == torch.float32 else 0.1
        assert off.abs().max() < limit, f"{options}: {off.abs().max()}"
