"""The exchange: bytes as planned, one Newton-Schulz per matrix, tensor parallelism, and nothing read too early."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_muon import QKV, Conv, DistributedMuon, Experts, Split
from distributed_muon.layout.cutting import cut_buckets, make_buckets
from distributed_muon.layout.matrices import MatrixRule, Whole
from tests.checks import on_ranks
from tests.dense import matrices_of, spec_of, tp_slice
from tests.reference import ADAMW_SHAPES, MUON_SHAPES, Reference, backward, make_params, mean_gradient, rank_gradient
from tests.shards import sharded_step, step_on

LAYOUTS = {
    "aligned": dict(layout="aligned", bucket_mb=0.004),
    "bucketed": dict(layout="bucketed", bucket_mb=0.004),
    "flat": dict(layout="flat"),
}
STRATEGIES = ("home", "gather", "auto")


def build(muon: list[nn.Parameter], adamw: list[nn.Parameter], **options) -> DistributedMuon:
    groups = [{"params": muon}] + ([{"params": adamw, "algorithm": "adamw"}] if adamw else [])
    return DistributedMuon(groups, lr=0.02, weight_decay=0.1, **options)


def reference(params: list[nn.Parameter], muon: int) -> Reference:
    algorithms = ["muon"] * muon + ["adamw"] * (len(params) - muon)
    adamw = dict(lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))
    return Reference(list(zip(params, algorithms, strict=True)), dict(lr=0.02, weight_decay=0.1), adamw)


def subgroups(rank: int, *sizes: int) -> dict[int, dist.ProcessGroup]:
    """The groups of the first n ranks that this rank is in."""
    groups = {size: dist.new_group(list(range(size))) for size in sizes}
    return {size: group for size, group in groups.items() if rank < size}


@on_ranks(4)
def test_bytes_and_newton_schulz_calls_are_what_the_plan_says(rank: int, world: int) -> None:
    """Row 2, and every byte: any layout, strategy, precision of the wire and number of ranks."""
    for dp, group in subgroups(rank, 2, 3, 4).items():
        wires = ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32))
        cases = [(*c, *w) for c, w in itertools.product(itertools.product(LAYOUTS, STRATEGIES), wires)]
        for layout, strategy, dtype, ns_dtype in cases:
            muon, adamw = make_params(MUON_SHAPES, dtype), make_params(ADAMW_SHAPES, dtype)
            options = dict(strategy=strategy, ns_dtype=ns_dtype, process_group=group, **LAYOUTS[layout])
            # In the other half of the cases: reductions in bf16, the standard form.
            if dtype == torch.bfloat16:
                options |= dict(reduce_dtype=torch.bfloat16, ns_form="standard")
            optimizer = build(muon, adamw, **options)
            plan, params = optimizer.plan, [*muon, *adamw]
            backward(params, [rank_gradient(tuple(p.shape), 0, rank, i) for i, p in enumerate(params)])
            optimizer.step()
            report = optimizer.step_report()
            where = f"{dp} ranks {layout} {strategy} {dtype} {ns_dtype}"
            padded = sum(bucket.spec.numel for bucket in optimizer._buckets)
            others = (dp - 1) / dp
            expected = {
                "all_to_all": plan.exchange_bytes_by_rank[rank],
                "reduce_scatter": padded * options.get("reduce_dtype", torch.float32).itemsize * others,
                "all_gather": padded * dtype.itemsize * others,
            }
            sent = {kind: report["bytes"].get(kind, 0) for kind in expected}
            assert sent == expected, where
            calls = torch.tensor([report["ns_calls"]])
            dist.all_reduce(calls, group=group)
            if not plan.teams:
                assert calls.item() == sum(map(len, plan.homes)), where
            if plan.strategy == "home" and not plan.teams:
                assert calls.item() == len(MUON_SHAPES), f"{where}: once per matrix over all ranks"


@on_ranks(4)
def test_one_flat_buffer_hardly_exchanges_and_gather_never_scatters(rank: int, world: int) -> None:
    """Shards that hold whole matrices need no all-to-all at all; the report's gather sends nothing back."""
    muon = make_params([(16, 16)] * 4)
    optimizer = build(muon, [], layout="aligned", strategy="home")
    backward(muon, [rank_gradient((16, 16), 0, rank, i) for i in range(4)])
    optimizer.step()
    report = optimizer.step_report()
    assert "all_to_all" not in report["bytes"] and report["ns_calls"] == 1
    gathered = build(make_params(MUON_SHAPES), [], layout="bucketed", strategy="gather")
    assert all(not wave.scatter.send and not wave.scatter.recv for wave in gathered.plan.schedule(rank))


# ---- more ranks than rows, parameters, or elements --------------------------------------------------------


@on_ranks(4)
def test_more_ranks_than_rows_or_parameters(rank: int, world: int) -> None:
    """Row 27: rows 1, 3, 18 and 72, single tiny parameters, shards that hold nothing."""
    cases = ([(1, 3)], [(3, 1)], [(1, 7), (3, 2), (18, 5), (72, 3)], [(2, 2)], [(1, 1)])
    for shapes, layout in itertools.product(cases, LAYOUTS):
        params = make_params(shapes)
        theirs = reference(params, len(params))
        ours = build(params, [], ns_form="standard", **LAYOUTS[layout])
        if shapes == [(1, 3)]:
            assert sum(p.start == p.stop for p in ours.sharded_parameters) == (rank > 0), "three ranks hold nothing"
        for step in range(2):
            backward(params, [rank_gradient(tuple(p.shape), step, rank, i) for i, p in enumerate(params)])
            ours.step()
            ours.zero_grad()
            theirs.step([mean_gradient(tuple(p.shape), step, world, i) for i, p in enumerate(params)])
            for p, q in zip(params, theirs.params, strict=True):
                assert torch.equal(p, q), f"{shapes} {layout} step {step}: {(p - q).abs().max()}"


# ---- tensor parallelism -----------------------------------------------------------------------------------

# name: global shape, rule, how TP cuts it (dimension, interleaved parts per rank)
TENSORS = {
    "column": ((24, 14), Whole(), 0, 1),
    "row": ((14, 24), Whole(), 1, 1),
    "gate/up": ((24, 9), Split((12, 12)), 0, 2),
    "gate/up apart": ((24, 9), Split((12, 12)), 0, 1),
    "qkv": ((4 * 7, 10), QKV(heads=8, groups=4, head_dim=1, value_dim=4), 0, 1),
    "replicated": ((5, 11), Whole(), None, 1),
    "experts": ((3, 6, 8), Experts(), 1, 1),
    "expert rows": ((3, 8, 6), Experts(), 0, 1),
    "expert gate/up": ((2, 16, 5), Experts(inner=Split((8, 8))), 0, 2),
    "conv": ((8, 3, 3), Conv(), 0, 1),
    "replicated qkv": ((12, 7), QKV(heads=4, groups=2, head_dim=1, value_dim=3), None, 1),
    "adamw": ((13,), None, None, 1),
}
OPTIONS = dict(lr=0.1, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")


def values(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, (shape, *_) in TENSORS.items()}


def unsharded(steps: int) -> dict[str, list[Tensor]]:
    """Matrices of every tensor after torch.optim.Muon stepped them in one process."""
    params = {
        name: [nn.Parameter(part.clone()) for part in matrices_of(whole, TENSORS[name][1])]
        for name, whole in values(0).items()
        if TENSORS[name][1]
    }
    muon = torch.optim.Muon([p for parts in params.values() for p in parts], **OPTIONS)
    for step in range(1, steps + 1):
        grads = values(step)
        for name, parts in params.items():
            for p, part in zip(parts, matrices_of(grads[name], TENSORS[name][1]), strict=True):
                p.grad = part.contiguous()
        muon.step()
    return {name: [p.detach() for p in parts] for name, parts in params.items()}


@on_ranks(4)
def test_tensor_parallel_layouts_equal_the_unsharded_reference(rank: int, world: int) -> None:
    """Rows 11, 12 and 14: TP 1, 2 and 4 over DP 4, 2 and 1, any strategy, to the bit, bytes as planned."""
    expected = unsharded(steps=2)
    for tp, strategy, aligned in itertools.product((1, 2, 4), ("home", "gather"), (False, True)):
        dp, tp_rank = world // tp, rank % tp
        # "gate/up apart" is cut without interleaving, so that a TP rank may hold gate rows only.
        locals_ = [
            {name: tp_slice(whole, *TENSORS[name][1:], tp, tp_rank) for name, whole in values(step).items()}
            for step in range(3)
        ]
        specs = [spec_of(name, *TENSORS[name], tp) for name in TENSORS]
        numels = [spec.numel for spec in specs]
        buckets = make_buckets(numels, dp, bucket_numel=300, aligned=aligned)
        by_dp = cut_buckets(buckets, numels, dp)
        shards = [by_dp[r // tp] for r in range(world)]
        options = {**OPTIONS, "strategy": strategy, "ns_form": "standard"}
        ranks = [r % tp for r in range(world)]
        engine = sharded_step(specs, shards, list(locals_[0].values()), options, tp_ranks=ranks, wave_bytes=256)
        plan = engine.plan
        assert len(plan.waves) > 2
        for grads in locals_[1:]:
            step_on(engine, list(grads.values()))
        where = f"TP {tp} x DP {dp} {strategy}"
        assert engine.collectives.sent_bytes["all_to_all"] == 2 * plan.exchange_bytes_by_rank[rank], where
        calls = torch.tensor([engine.ns_calls])
        dist.all_reduce(calls)
        assert calls.item() == 2 * sum(map(len, plan.homes)), where
        # Put the shards together again: over DP by place, over TP by the inverse of the cut.
        pieces: list = [None] * world
        dist.all_gather_object(
            pieces, [(specs[s.tensor].name, s, part.master) for part in engine.parts for s in part.shards]
        )
        for name, (shape, rule, dim, stride) in TENSORS.items():
            parts = []
            for part in range(tp):
                local = torch.full_like(locals_[0][name], torch.nan).reshape(-1)
                for r in range(part, world, tp):
                    for other, shard, master in pieces[r]:
                        if other == name:
                            local[shard.start : shard.stop] = master
                parts.append(local.view(locals_[0][name].shape))
            if rule is None:
                assert torch.equal(parts[0], values(0)[name]), "AdamW's tensors are not Muon's to step"
            elif dim is None:
                for part in parts:
                    for got, want in zip(matrices_of(part, rule), expected[name], strict=True):
                        assert torch.equal(got, want), f"{where} {name}: replicas"
            else:
                for part, got in enumerate(parts):
                    whole = rebuild(expected[name], rule, shape)
                    want = tp_slice(whole, rule, dim, stride, tp, part)
                    assert torch.equal(got, want), f"{where} {name} on TP rank {part}: {(got - want).abs().max()}"


def rebuild(parts: list[Tensor], rule: MatrixRule, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `matrices_of`: number every element, and scatter by number."""
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    whole = torch.empty(torch.Size(shape).numel())
    for part, place in zip(parts, matrices_of(numbers, rule), strict=True):
        whole[place.reshape(-1)] = part.reshape(-1)
    return whole.view(shape)
