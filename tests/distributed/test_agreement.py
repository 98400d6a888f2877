"""All ranks take the same decision: construction, skipped steps, loss scaling; wrong use is refused by name."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_muon import QKV, Conv, DistributedMuon, Experts, GradScaler, Split
from distributed_muon.engine.collectives import Collectives
from tests.checks import on_ranks
from tests.reference import Reference, backward, make_params, mean_gradient, rank_gradient

MUON = ((33, 17), (7, 5), (3, 40))
ADAMW = ((3,), (17, 5))
SHAPES = MUON + ADAMW
SECONDS = 10  # a decision takes milliseconds; a hang ends in gloo's half-hour timeout


def build(dtype: torch.dtype = torch.float32, **options) -> tuple[DistributedMuon, list[nn.Parameter], Reference]:
    params = make_params(SHAPES, dtype)
    algorithms = ["muon"] * len(MUON) + ["adamw"] * len(ADAMW)
    adamw = dict(lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))
    reference = Reference(list(zip(params, algorithms, strict=True)), dict(lr=0.02, weight_decay=0.1), adamw)
    groups = [
        {"params": [(f"m{i}", p) for i, p in enumerate(params[:3])]},
        {"params": [(f"a{i}", p) for i, p in enumerate(params[3:])], "algorithm": "adamw"},
    ]
    defaults = dict(lr=0.02, weight_decay=0.1, ns_form="standard", layout="bucketed", bucket_mb=0.002)
    return DistributedMuon(groups, **{**defaults, **options}), params, reference


def local_grads(step: int, rank: int) -> list[Tensor]:
    return [rank_gradient(shape, step, rank, index) for index, shape in enumerate(SHAPES)]


def mean_grads(step: int, world: int) -> list[Tensor]:
    return [mean_gradient(shape, step, world, index) for index, shape in enumerate(SHAPES)]


def snapshot(optimizer: DistributedMuon) -> list[Tensor]:
    """Copies of everything a step may change on this rank."""
    out = []
    for p in optimizer.sharded_parameters:
        out += [p.param.detach().clone(), p.master.clone(), *(value.clone() for value in p.state.values())]
    return out


def assert_masters(optimizer: DistributedMuon, reference: Reference) -> None:
    for p, theirs in zip(optimizer.sharded_parameters, reference.params, strict=True):
        assert torch.equal(p.master, theirs.detach().view(-1)[p.start : p.stop]), p.name
        assert torch.equal(p.param, theirs.to(p.param.dtype)), p.name


def weights() -> dict[str, nn.Parameter]:
    return {"first": nn.Parameter(torch.zeros(6, 4)), "second": nn.Parameter(torch.zeros(6, 4))}


@on_ranks(3)
def test_ranks_that_disagree_hear_of_it_at_construction(rank: int, world: int) -> None:
    """Row 10: order, names, shapes, dtypes, groups and options, each differing on the last rank only."""
    odd = rank == world - 1

    def groups(*names: str, **options) -> list[dict]:
        found = weights()
        return [{"params": [(name, found[name]) for name in names], **options}]

    other_shape, other_dtype = groups("first", "second"), groups("first", "second")
    other_shape[0]["params"][1] = ("second", nn.Parameter(torch.zeros(4, 6)))
    other_dtype[0]["params"][1] = ("second", nn.Parameter(torch.zeros(6, 4, dtype=torch.bfloat16)))
    both = groups("first", "second")
    cases = {
        "order": (groups("second", "first"), {}, "second"),
        "missing parameter": (groups("first"), {}, "second"),
        "shape": (other_shape, {}, r"\(4, 6\)"),
        "dtype": (other_dtype, {}, "bfloat16"),
        "group split": (groups("first") + groups("second"), {}, "group 1"),
        "algorithm": (groups("first", "second", algorithm="adamw"), {}, "adamw"),
        "matrix rule": (groups("first", "second", matrices=Split((3, 3))), {}, "Split"),
        "learning rate": (groups("first", "second"), {"lr": 0.5}, "0.5"),
        "strategy": (groups("first", "second"), {"strategy": "gather"}, "gather"),
        "reduction dtype": (groups("first", "second"), {"reduce_dtype": torch.bfloat16}, "bfloat16"),
    }
    for what, (theirs, options, named) in cases.items():
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match=rf"ranks disagree: rank 0 has .* rank 2 has .*{named}|{named}.*rank 2"):
            DistributedMuon(theirs if odd else both, **(options if odd else {}))
        assert time.monotonic() - begin < SECONDS, what
    DistributedMuon(both)  # the group is still usable


@on_ranks(3)
def test_one_rank_with_a_bad_gradient_stops_all_and_changes_nothing(rank: int, world: int) -> None:
    """Rows 5 and 28: inf, -inf or nan on one rank raises everywhere, all state bit-equal, the next step right."""
    for bad in (torch.inf, -torch.inf, torch.nan):
        for where, name in ((0, "m0"), (4, "a1")):
            optimizer, params, reference = build()
            backward(params, local_grads(0, rank))
            optimizer.step()
            optimizer.zero_grad()
            reference.step(mean_grads(0, world))
            before = snapshot(optimizer)
            grads = local_grads(1, rank)
            if rank == 1:
                grads[where].view(-1)[-1] = bad
            backward(params, grads)
            begin = time.monotonic()
            with pytest.raises(FloatingPointError, match=rf"'{name}'.*\(1 parameters"):
                optimizer.step()
            assert time.monotonic() - begin < SECONDS
            assert all(torch.equal(a, b) for a, b in zip(snapshot(optimizer), before, strict=True))
            optimizer.zero_grad()
            backward(params, local_grads(2, rank))
            optimizer.step()
            reference.step(mean_grads(2, world))
            assert_masters(optimizer, reference)


@on_ranks(3)
def test_skipping_bad_steps(rank: int, world: int) -> None:
    """Rows 5 and 28: nonfinite="skip" leaves all state and all counters, on every rank."""
    for dtype in (torch.float32, torch.bfloat16):
        optimizer, params, reference = build(dtype, nonfinite="skip")
        for number in range(4):
            before = snapshot(optimizer)
            grads = local_grads(number, rank)
            if number in (0, 2) and rank == 2:  # the very first step too: lazily made state would be poisoned
                grads[2][0, 0] = torch.inf
            backward(params, grads)
            if number == 2:
                assert not optimizer.clip_grad_norm_(1.0) < torch.inf
            optimizer.step()
            optimizer.zero_grad()
            skipped = number in (0, 2)
            report = optimizer.step_report()
            assert report["skipped"] is skipped
            if skipped:
                assert all(torch.equal(a, b) for a, b in zip(snapshot(optimizer), before, strict=True))
                assert report["ns_calls"] == 0 and "all_gather" not in report["bytes"]
            else:
                reference.step(mean_grads(number, world))
                assert_masters(optimizer, reference)
        assert [float(p.state["step"]) for p in optimizer.sharded_parameters[3:]] == [2, 2]


@on_ranks(3)
def test_clipping_a_bad_gradient_scales_nothing(rank: int, world: int) -> None:
    """clip_grad_norm_ returns inf or nan and leaves the shards as they are."""
    for bad in (torch.inf, torch.nan):
        optimizer, params, _ = build(nonfinite="skip")
        grads = local_grads(0, rank)
        if rank == 0:
            grads[0][0, 0] = bad
        backward(params, grads)
        assert not optimizer.clip_grad_norm_(1.0) < torch.inf
        for p, grad in zip(optimizer.sharded_parameters[1:], mean_grads(0, world)[1:], strict=True):
            assert torch.equal(p.grad, grad.view(-1)[p.start : p.stop]), p.name


@on_ranks(3)
def test_large_finite_gradients_are_no_overflow(rank: int, world: int) -> None:
    """The squares of 1e38 overflow fp32; the norm and the step must not."""
    optimizer, params, _ = build()
    grads = [torch.zeros(shape) for shape in SHAPES]
    grads[0][:] = 1e38 * (rank == 1)
    backward(params, grads)
    expected = 1e38 / 3 * (33 * 17) ** 0.5
    assert optimizer.clip_grad_norm_(1.0) == pytest.approx(expected, rel=1e-5)
    optimizer.step()
    assert all(torch.isfinite(value).all() for value in snapshot(optimizer))


@on_ranks(3)
def test_loss_scaling_of_fp16_parameters(rank: int, world: int) -> None:
    """Row 5: an overflow on one rank is skipped by all, halves every scale, and leaves no trace."""
    overflow = 1
    for clip in (None, 1e9):
        optimizer, params, reference = build(torch.float16)
        scaler = GradScaler("cpu", init_scale=256.0, growth_interval=1000)
        for number in range(4):
            before = snapshot(optimizer)
            grads = local_grads(number, rank)
            if number == overflow and rank == 2:
                grads[1][0, 0] = torch.inf
            loss = torch.stack([(p * g.half()).sum().float() for p, g in zip(params, grads, strict=True)]).sum()
            # fp16 backward scales each gradient: 8 * 256 fits
            scaler.scale(loss).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
                norm = optimizer.clip_grad_norm_(clip)
                raw = sum(g.double().square().sum() for g in mean_grads(number, world)) ** 0.5
                assert not norm < torch.inf if number == overflow else norm == pytest.approx(float(raw), rel=1e-6)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if number == overflow:
                assert all(torch.equal(a, b) for a, b in zip(snapshot(optimizer), before, strict=True))
            else:
                reference.step(mean_grads(number, world))
                assert_masters(optimizer, reference)
            assert scaler.get_scale() == (256.0 if number < overflow else 128.0), "the same scale on every rank"


@on_ranks(3)
def test_loss_scaling_of_fp32_parameters_unscales_too(rank: int, world: int) -> None:
    optimizer, params, reference = build()
    scaler = GradScaler("cpu", init_scale=1024.0)
    terms = [(p * g).sum() for p, g in zip(params, local_grads(0, rank), strict=True)]
    scaler.scale(torch.stack(terms).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    for p, grad in zip(optimizer.sharded_parameters, mean_grads(0, world), strict=True):
        assert torch.equal(p.grad, grad.view(-1)[p.start : p.stop])
    reference.step(mean_grads(0, world))
    assert_masters(optimizer, reference)


@on_ranks(3)
def test_fp16_without_a_scaler_is_refused(rank: int, world: int) -> None:
    optimizer, params, _ = build(torch.float16)
    before = snapshot(optimizer)
    backward(params, local_grads(0, rank))
    with pytest.raises(ValueError, match=r"'m0' is float16: .*GradScaler"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(snapshot(optimizer), before, strict=True))


@on_ranks(3)
def test_only_the_ranks_of_the_process_group_take_part(rank: int, world: int) -> None:
    """Data-parallel groups of part of the ranks: {0, 2} reduce and exchange among themselves."""
    group = dist.new_group([0, 2])
    if rank == 1:
        with pytest.raises(ValueError, match="process_group does not contain this rank"):
            build(process_group=group)
        return
    optimizer, params, reference = build(process_group=group)
    for number in range(2):
        backward(params, local_grads(number, rank))
        optimizer.step()
        optimizer.zero_grad()
        pairs = zip(local_grads(number, 0), local_grads(number, 2), strict=True)
        reference.step([torch.stack(pair).sum(0) / 2 for pair in pairs])
        assert_masters(optimizer, reference)


@on_ranks(3)
def test_pairs_of_ranks_are_connected_at_construction(rank: int, world: int) -> None:
    """Row 32: the first all-to-all of a group happens at construction, and is not counted."""
    seen = []
    original = Collectives.all_to_all

    def spy(self: Collectives, output: Tensor, input: Tensor, recv: Sequence[int], send: Sequence[int]):
        seen.append((tuple(recv), tuple(send)))
        return original(self, output, input, recv, send)

    Collectives.all_to_all = spy
    try:
        optimizer, _, _ = build()
    finally:
        Collectives.all_to_all = original
    assert seen == [((1, 1, 1), (1, 1, 1))]
    assert not optimizer.collectives.sent_bytes


# ---- wrong use, refused by name on one rank --------------------------------------------------------------


def matrix(*shape: int, **options) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape or (6, 4), **options))


def with_placements() -> nn.Parameter:
    found = matrix()
    found.placements = ()  # what tells a DTensor
    return found


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        ({}, {"strategy": "fastest"}, "strategy='fastest' is unknown: choose one of"),
        ({}, {"layout": "diagonal"}, "layout='diagonal' is unknown"),
        ({}, {"ns_form": "cubic"}, "ns_form='cubic' is unknown"),
        ({}, {"ns_dtype": torch.float16}, "ns_dtype=torch.float16 is unknown"),
        ({}, {"gradient_reduction": "sum"}, "gradient_reduction='sum' is unknown"),
        ({}, {"reduce_dtype": torch.float16}, "reduce_dtype=torch.float16 is unknown"),
        ({}, {"nonfinite": "ignore"}, "nonfinite='ignore' is unknown"),
        ({}, {"adjust_lr_fn": "moonlight"}, "adjust_lr_fn='moonlight' is unknown"),
        ({}, {"lr": -1.0}, "lr=-1.0 of parameter group 0 must be >= 0"),
        ({}, {"lr": float("nan")}, "lr=nan of parameter group 0"),
        ({}, {"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({}, {"momentum": 1.0}, "momentum"),
        ({}, {"bucket_mb": 0}, "bucket_mb"),
        ({}, {"bucket_mb": -1.0}, "bucket_mb"),
        ({"algorithm": "sgd"}, {}, "algorithm='sgd' is unknown"),
        ({"algorithm": "adamw", "matrices": Conv()}, {}, "adamw groups take no matrices"),
        ({"algorithm": "adamw", "betas": (0.9, 1.0)}, {}, "betas"),
        # Row 35: of two options that contradict each other none may win silently.
        ({}, {"layout": "flat", "bucket_mb": 1.0}, "bucket_mb"),
        ({}, {"gradient_reduction": "none", "reduce_dtype": torch.bfloat16}, "reduce_dtype"),
        # Rows 13 to 15 and 33: parameters that are not what the group says.
        ({"params": [("w", matrix(24))]}, {}, r"'w' of shape \(24,\) is no matrix.*before a wrapper flattens"),
        ({"params": [("w", matrix(0, 4))]}, {}, "'w'"),  # what FSDP1 leaves of a parameter on other ranks
        ({"params": [("w", matrix(0))], "algorithm": "adamw"}, {}, "'w'"),
        ({"params": [("w", matrix(2, 3, 4))]}, {}, r"'w'.*\(2, 3, 4\) is not 2-D.*Experts"),
        ({"params": [("w", matrix(6, 4))], "matrices": Conv()}, {}, r"'w'.*is not a convolution kernel"),
        ({"params": [("w", matrix(6, 4))], "matrices": Experts()}, {}, r"'w'.*is not an expert stack"),
        ({"params": [("w", matrix(6, 4))], "matrices": Split((3, 4))}, {}, r"'w'.*do not add up to the 6"),
        ({"params": [("w", matrix(6, 4))], "matrices": QKV(2, 1, 2)}, {}, r"'w'.*does not add up to 6 rows"),
        ({"params": [("w", matrix(6, 4))], "matrices": QKV(3, 2, 1)}, {}, r"'w'.*not a multiple of groups"),
        ({"params": [("w", with_placements())]}, {}, "'w' is a DTensor"),
        ({"params": [("w", matrix(6, 4, dtype=torch.float64))]}, {}, "'w' is torch.float64"),
        ({"params": [("w", matrix().requires_grad_(False))]}, {}, "'w' is frozen"),
        ({"params": [("w", matrix()), ("w", matrix())]}, {}, "names are not unique"),
    ],
)
def test_wrong_use_is_one_error_that_names_it(group: dict, options: dict, message: str) -> None:
    """Row 35, and every option that cannot be right: nothing falls back."""
    with pytest.raises(ValueError, match=message) as caught:
        DistributedMuon([{"params": [("weight", matrix())], **group}], **options)
    assert "\n" not in str(caught.value)


def test_no_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        DistributedMuon([])


def test_groups_are_fixed_after_construction() -> None:
    optimizer = DistributedMuon([matrix()])
    with pytest.raises(RuntimeError, match=r"add_param_group.*build a new DistributedMuon"):
        optimizer.add_param_group({"params": [matrix()]})


def test_track_knows_its_names() -> None:
    with pytest.raises(ValueError, match="track='norm' is unknown"):
        DistributedMuon([matrix()]).track("norm")
