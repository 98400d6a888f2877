"""State of FSDP2's parameters: DTensors over the engine's own memory, saved and loaded by torch on other meshes."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from distributed_muon import checkpoint, muon_param_groups
from distributed_muon.integrations.fsdp2 import FullyShardedMuon
from tests.checks import on_ranks
from tests.distributed.sharded_model import copies_held_back
from tests.integrations.fsdp2_model import (
    EVEN,
    Model,
    Twin,
    build,
    compare,
    fsdp,
    mesh_of,
    tensor_parallel,
    train,
    whole_state,
)
from tests.spawn import run_ranks


def shared_folder(rank: int) -> str:
    """A new folder that all ranks know."""
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    return folder[0]


def save(path: str, model, optimizer, **options) -> None:
    options = StateDictOptions(**options)
    state = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.save(state, checkpoint_id=path)


def load(path: str, model, optimizer, **options) -> None:
    options = StateDictOptions(**options)
    state = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


@on_ranks(2, timeout=170)
def test_state_is_there_at_once_and_is_the_engines(rank: int, world: int) -> None:
    model, optimizer, _ = build(fsdp(mesh_of(world, names=["dp"])))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    keys = set(get_optimizer_state_dict(model, optimizer)["state"])
    assert keys == {name for name, _ in model.named_parameters()}
    assert not calls, "torch's get_optimizer_state_dict must not step"
    model.loss(0, rank).backward()
    optimizer.step()
    for param in model.parameters():
        for key, value in optimizer.state[param].items():
            if key != "step":
                assert isinstance(value, DTensor) and value.shape == param.shape
                assert value.placements == param.placements
                assert not param.to_local().numel() or value.to_local().abs().max() > 0
    held = {
        value.to_local().untyped_storage().data_ptr(): value.to_local().untyped_storage().nbytes()
        for state in optimizer.state.values()
        for key, value in state.items()
        if key != "step" and value.to_local().numel()
    }
    muon = sum(p.to_local().numel() for p in model.parameters() if "momentum_buffer" in optimizer.state[p])
    adamw = sum(p.to_local().numel() for p in model.parameters() if "exp_avg" in optimizer.state[p])
    assert sum(held.values()) == 4 * muon + 8 * adamw


@on_ranks(4, timeout=170)
def test_resume_on_another_mesh(rank: int, world: int) -> None:
    """Three steps at FSDP 4, then one at HSDP 2 x 2 and at TP 2 x FSDP 2: the bits of four steps in one process."""
    folder = shared_folder(rank)
    square = mesh_of(2, 2, names=["dp", "tp"])
    model, optimizer, _ = build(fsdp(mesh_of(4, names=["dp"])), EVEN, lr=0.03)
    twin = Twin(Model(EVEN), lr=0.03)
    train(model, optimizer, twin, range(3), range(4), rank)
    before = whole_state(model, optimizer)
    twin.step(twin.grads(3, [0, 1]))
    for flatten, cut, data_rank in [
        (False, fsdp(mesh_of(2, 2, names=["replicate", "shard"])), rank % 2),
        (True, tensor_parallel(square, up=0, down=1, odd=0), square.get_local_rank("dp")),
    ]:
        save(f"{folder}/{flatten}", model, optimizer, flatten_optimizer_state_dict=flatten)
        other, resumed, _ = build(cut, EVEN, lr=9.0)
        load(f"{folder}/{flatten}", other, resumed, flatten_optimizer_state_dict=flatten)
        assert {group["lr"] for group in resumed.param_groups} == {0.03}
        for key, value in whole_state(other, resumed).items():
            assert torch.equal(value, before[key]), key
        other.loss(3, data_rank).backward()
        resumed.step()
        compare(other, twin, f"resumed, flatten {flatten}")


def ranks_save(rank: int, world: int, path: str) -> None:
    model, optimizer, _ = build(fsdp(mesh_of(world, names=["dp"])), dtype=torch.bfloat16)
    for step in range(3):
        model.loss(step, rank % 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    save(path, model, optimizer)
    state = whole_state(model, optimizer)
    if rank == 0:
        torch.save(state, f"{path}.whole")


def ranks_load(rank: int, world: int, path: str) -> None:
    model, optimizer, _ = build(fsdp(mesh_of(world, names=["dp"])), dtype=torch.bfloat16)
    load(path, model, optimizer)
    saved = torch.load(f"{path}.whole")
    for key, value in whole_state(model, optimizer).items():
        assert torch.equal(value, saved[key]), key
    masters = {p: optimizer.state[p]["master"].full_tensor() for p in model.parameters()}
    model.loss(9, 0).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.grad.zero_()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()  # with rate 0 the masters keep their full precision
    for p, master in masters.items():
        assert torch.equal(optimizer.state[p]["master"].full_tensor(), master)


@pytest.mark.timeout(300)  # two worlds, one after the other
def test_bf16_state_saved_at_2_ranks_loads_at_3(tmp_path: Path) -> None:
    run_ranks(ranks_save, 2, str(tmp_path / "c"), timeout=120)
    run_ranks(ranks_load, 3, str(tmp_path / "c"), timeout=120)


@on_ranks(2, timeout=170)
def test_who_changes_moments_waits_until_a_save_has_copied_them(rank: int, world: int) -> None:
    folder = Path(shared_folder(rank))
    model, optimizer, _ = build(fsdp(mesh_of(world, names=["dp"])))
    model.loss(0, rank).backward()
    optimizer.step()
    target = whole_state(model, optimizer)
    with copies_held_back() as gate:
        saving = checkpoint.save(folder / "one", model, optimizer, wait=False)
        threading.Timer(0.2, gate.set).start()
        for state in optimizer.state.values():  # as dcp.load writes into it
            for value in state.values():
                value.zero_()
        saving.wait()
    checkpoint.load(folder / "one", model, optimizer)
    for key, value in whole_state(model, optimizer).items():
        assert torch.equal(value, target[key]), key


@on_ranks(2, timeout=170)
def test_own_state_dict_and_refusals(rank: int, world: int) -> None:
    mesh = mesh_of(world, names=["dp"])
    model, optimizer, twin = build(fsdp(mesh))
    train(model, optimizer, twin, range(2), range(world), rank)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    saved = optimizer.state_dict()
    saved["state"] = {k: {n: v.clone() for n, v in s.items()} for k, s in saved["state"].items()}
    train(model, optimizer, twin, [2], range(world), rank)
    after = whole_state(model, optimizer)
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    model.loss(2, rank).backward()
    optimizer.step()
    for key, value in whole_state(model, optimizer).items():
        assert torch.equal(value, after[key]), key
    lost = {**saved, "state": {k: v for k, v in saved["state"].items() if k}}
    with pytest.raises(ValueError, match=r"saved state of parameter .* has \[\]"):
        optimizer.load_state_dict(lost)
    plain = {k: {n: v.full_tensor() if n != "step" else v for n, v in s.items()} for k, s in saved["state"].items()}
    with pytest.raises(ValueError, match="is not placed like it: load with"):
        optimizer.load_state_dict({**saved, "state": plain})
    with pytest.raises(ValueError, match="other parameter groups"):
        optimizer.load_state_dict({**saved, "param_groups": saved["param_groups"][:1]})


@on_ranks(2, timeout=170)
def test_accelerate_shards_after_construction(rank: int, world: int) -> None:
    """Accelerate with fsdp_version 2: the optimizer is built on the plain model, `prepare` puts the shards into it."""
    accelerate = pytest.importorskip("accelerate")
    net = lambda: nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))  # noqa: E731
    torch.manual_seed(0)
    model, whole = net(), net()
    whole.load_state_dict(model.state_dict())
    accelerator = accelerate.Accelerator(cpu=True)
    # Accelerate offers FSDP on accelerators only; what `prepare` does is the same.
    accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10, cpu_ram_efficient_loading=False
    )
    accelerator.state.distributed_type = accelerate.DistributedType.FSDP
    optimizer = FullyShardedMuon(muon_param_groups(model), lr=0.02, ns_form="standard")
    model, wrapped = accelerator.prepare(model, optimizer)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert len(get_optimizer_state_dict(model, optimizer)["state"]) == 4, "state is there before the first step"
    options = {"lr": 0.02, "weight_decay": 0.1}
    reference = [
        torch.optim.Muon([whole[0].weight, whole[2].weight], adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW([whole[0].bias, whole[2].bias], betas=(0.9, 0.95), **options),
    ]
    for step in range(3):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        accelerator.backward(model(x).square().sum())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        wrapped.step()
        wrapped.zero_grad()
        whole(x).square().sum().backward()
        nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        for other in reference:
            other.step()
            other.zero_grad()
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs, atol=1e-4, rtol=0)
    assert optimizer.local_report()["ns_calls"] == 1
