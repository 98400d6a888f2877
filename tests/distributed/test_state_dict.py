"""State dicts on the same ranks: exact, without collectives, and never silently stale."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from distributed_muon import DistributedMuon
from tests.checks import on_ranks
from tests.distributed.sharded_model import DTYPES, SHAPES, Model, assert_same, build, everything, train


@on_ranks(2)
def test_state_dict_round_trip_is_exact(rank: int, world: int) -> None:
    """Row 22: every dtype and bit kept, through torch.save, and the next steps bit-equal."""
    for dtype in DTYPES:
        model, optimizer = build(dtype)
        train(model, optimizer, range(3), rank)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=False)
        again, restored = build(dtype, seed=5)
        again.load_state_dict(saved["model"])
        restored.load_state_dict(saved["optimizer"])
        for p in restored.sharded_parameters:
            assert all(value.dtype == torch.float32 for value in p.state.values())
        assert_same(everything(again, restored), everything(model, optimizer), f"{dtype}")
        for m, o in ((model, optimizer), (again, restored)):
            train(m, o, range(3, 6), rank)
        assert_same(everything(again, restored), everything(model, optimizer), f"{dtype} three steps later")


@on_ranks(2)
def test_saved_state_loads_with_weights_only(rank: int, world: int) -> None:
    """torch.load's default refuses unknown classes: the state must hold tensors and plain values alone."""
    model, optimizer = build()
    train(model, optimizer, range(1), rank)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    _, restored = build()
    restored.load_state_dict(torch.load(file, weights_only=True))
    for ours, theirs in zip(restored.sharded_parameters, optimizer.sharded_parameters, strict=True):
        assert torch.equal(ours.momentum, theirs.momentum)


@on_ranks(2)
def test_state_exists_from_construction_with_equal_keys(rank: int, world: int) -> None:
    """Row 24: no lazy state, the same keys on every rank, also for parameters a rank owns nothing of."""
    model, optimizer = build(torch.bfloat16)
    keys = {name: sorted(state) for name, state in optimizer.state_dict()["state"].items()}
    expected = {name: ["master", "momentum_buffer", "shard"] for name in SHAPES if not name.startswith("a")}
    expected |= {name: ["exp_avg", "exp_avg_sq", "master", "shard", "step"] for name in SHAPES if name.startswith("a")}
    assert keys == expected
    assert any(p.start == p.stop for p in optimizer.sharded_parameters), "some rank must own nothing of some parameter"
    train(model, optimizer, range(2), rank)
    assert {name: sorted(state) for name, state in optimizer.state_dict()["state"].items()} == expected
    assert set(optimizer.state) == set(model.parameters())


@on_ranks(2)
def test_reading_the_state_runs_no_step_and_no_collective(rank: int, world: int) -> None:
    """Row 24: one rank alone may call state_dict and load_state_dict."""
    model, optimizer = build()
    train(model, optimizer, range(2), rank)
    before = everything(model, optimizer)
    if rank == 1:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(everything(model, optimizer), before)


@on_ranks(2)
def test_state_of_another_rank_or_model_is_refused(rank: int, world: int) -> None:
    """Nothing is changed by a state that does not fit."""
    model, optimizer = build()
    train(model, optimizer, range(1), rank)
    before = everything(model, optimizer)
    good = copy.deepcopy(optimizer.state_dict())
    for change, message in (
        ({"world_size": 4}, "world_size 4, this optimizer 2: use checkpoint"),
        ({"rank": 1 - rank}, f"rank {1 - rank}, this optimizer {rank}"),
        ({"format": 0}, "format 0"),
        ({"param_groups": good["param_groups"][:2]}, "other parameter names or groups"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict({**good, **change})
    _, other = build(layout="aligned", bucket_mb=None)
    with pytest.raises(ValueError, match="use the same layout"):
        other.load_state_dict(good)
    assert_same(everything(model, optimizer), before)


@on_ranks(2)
def test_learning_rates_come_back_and_matrix_rules_stay(rank: int, world: int) -> None:
    """Row 25: options and counters of groups are restored, what the code built is kept."""
    model, optimizer = build()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    train(model, optimizer, range(3), rank, scheduler)
    saved, saved_scheduler = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(scheduler.state_dict())
    again, restored = build()
    new_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(restored, T_max=10)
    again.load_state_dict(model.state_dict())
    restored.load_state_dict(saved)
    new_scheduler.load_state_dict(saved_scheduler)
    for ours, theirs in zip(restored.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
        assert ours["lr"] < ours["initial_lr"]
    assert [p.state["step"].item() for p in restored.sharded_parameters if "step" in p.state] == [3, 3, 3]
    for m, o, s in ((model, optimizer, scheduler), (again, restored, new_scheduler)):
        train(m, o, range(3, 6), rank, s)
    assert_same(everything(again, restored), everything(model, optimizer))


# ---- stale parameters and masters -----------------------------------------------------------------------


@on_ranks(2)
def test_parameters_behind_restored_masters_are_noticed(rank: int, world: int) -> None:
    """Row 7: a step on the old weights is refused on every rank; gather_params rebuilds them all."""
    model, optimizer = build(torch.bfloat16)
    train(model, optimizer, range(2), rank)
    target, saved = everything(model, optimizer), copy.deepcopy(optimizer.state_dict())
    again, restored = build(torch.bfloat16, seed=5)
    again.steps.copy_(model.steps)
    restored.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"gather_params\(\)"):
        train(again, restored, range(2, 3), rank)
    restored.zero_grad()
    restored.gather_params()
    assert_same(everything(again, restored), target)
    for m, o in ((model, optimizer), (again, restored)):
        train(m, o, range(2, 4), rank)
    assert_same(everything(again, restored), everything(model, optimizer))


@on_ranks(2)
def test_the_model_may_be_loaded_after_the_optimizer(rank: int, world: int) -> None:
    """Row 7: either order of two load_state_dict calls resumes to the bit."""
    model, optimizer = build(torch.bfloat16)
    train(model, optimizer, range(2), rank)
    again, restored = build(torch.bfloat16, seed=5)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(model.state_dict())
    for m, o in ((model, optimizer), (again, restored)):
        train(m, o, range(2, 4), rank)
    assert_same(everything(again, restored), everything(model, optimizer))


@on_ranks(2)
def test_a_model_loaded_alone_is_not_overwritten_by_old_masters(rank: int, world: int) -> None:
    """Row 26: the next step starts from the loaded weights, masters included."""
    for dtype in DTYPES:
        model, optimizer = build(dtype)
        train(model, optimizer, range(2), rank)
        loaded = Model(dtype, seed=9)
        model.load_state_dict(loaded.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # what is left of the step is the weights it started from
        train(model, optimizer, range(2, 3), rank)
        for name, p in model.named_parameters():
            assert torch.equal(p, loaded.get_parameter(name)), f"{dtype} {name}"
        for p in optimizer.sharded_parameters:
            expected = loaded.get_parameter(p.name).detach().float().view(-1)[p.start : p.stop]
            assert torch.equal(p.master, expected), f"{dtype} {p.name}"


@on_ranks(2)
def test_whatever_reads_masters_takes_over_outside_writes(rank: int, world: int) -> None:
    """Rows 26 and 42: p.data hides the write; no step has to come before a save."""
    for dtype in DTYPES:
        for read in (DistributedMuon.state_dict, DistributedMuon.gather_params):
            model, optimizer = build(dtype)
            train(model, optimizer, range(2), rank)
            for p in model.parameters():
                p.data.fill_(0.25)
            read(optimizer)
            for p in optimizer.sharded_parameters:
                assert torch.equal(p.master, torch.full_like(p.master, 0.25))
            assert all(torch.equal(p, torch.full_like(p, 0.25)) for p in model.parameters())


@on_ranks(2)
def test_untouched_masters_keep_their_precision_when_the_model_is_reloaded(rank: int, world: int) -> None:
    """Loading the very weights that are there must not round the masters."""
    model, optimizer = build(torch.bfloat16)
    train(model, optimizer, range(3), rank)
    before = everything(model, optimizer)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    optimizer.gather_params()
    assert_same(everything(model, optimizer), before)
    finer = [p for p in optimizer.sharded_parameters if not torch.equal(p.master, p.master.bfloat16().float())]
    assert finer, "masters must hold more than bf16"
