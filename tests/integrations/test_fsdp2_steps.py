"""What a program does to gradients and parameters of FSDP2 between steps: followed, or an error that names it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from distributed_muon import DistributedMuon, GradScaler, muon_param_groups
from distributed_muon.integrations.fsdp2 import FullyShardedMuon
from tests.checks import on_ranks
from tests.integrations.fsdp2_model import Model, build, compare, fsdp, mesh_of, whole_state


def job(world: int, **options):
    return build(fsdp(mesh_of(world, names=["dp"])), **options)


@on_ranks(2, timeout=170)
def test_clipping_is_torchs(rank: int, world: int) -> None:
    for step, (model, optimizer, twin) in enumerate([job(world), job(world, dtype=torch.bfloat16)]):
        model.loss(step, rank).backward()
        mine = twin.grads(step, range(world))
        dtype = next(model.parameters()).dtype
        parts = [nn.Parameter(torch.empty_like(g, dtype=dtype)) for g in mine.values()]
        for part, grad in zip(parts, mine.values(), strict=True):
            part.grad = grad.to(dtype)
        norm = nn.utils.clip_grad_norm_(parts, 1.5)
        assert optimizer.clip_grad_norm_(1.5) == pytest.approx(norm.item(), rel=1e-6 if step == 0 else 5e-3)
        for (name, param), part in zip(model.named_parameters(), parts, strict=True):
            assert torch.allclose(param.grad.full_tensor(), part.grad, rtol=1e-6 if step == 0 else 1e-2), name
        again = nn.utils.clip_grad_norm_(model.parameters(), 1e9).full_tensor()
        assert again.item() == pytest.approx(1.5, rel=1e-5 if step == 0 else 5e-3)
        clipped = {name: param.grad.full_tensor().float() for name, param in model.named_parameters()}
        twin.step(clipped)
        optimizer.step()
        compare(model, twin, "clipped", dtype)
        assert optimizer.local_report()["grad_norm"] == pytest.approx(1.5, rel=1e-5 if step == 0 else 5e-3)
    with pytest.raises(ValueError, match="max_norm=-1"):
        optimizer.clip_grad_norm_(-1)


@on_ranks(2, timeout=170)
def test_accumulation(rank: int, world: int) -> None:
    """Four microbatches, reduced with the last or with each, equal their sum."""
    for syncs in (False, True):
        model, optimizer, twin = job(world)
        for step in range(2):
            total: dict[str, torch.Tensor] = {}
            for micro in range(4):
                model.set_requires_gradient_sync(syncs or micro == 3)
                model.loss(10 * step + micro, rank).backward()
                for name, grad in twin.grads(10 * step + micro, range(world)).items():
                    total[name] = total.get(name, 0) + grad
            twin.step(total)
            optimizer.step()
            optimizer.zero_grad()
            compare(model, twin, f"syncs {syncs} step {step}")
        assert optimizer.local_report()["ns_calls"] == sum(rank in homes for homes in optimizer.plans[0].homes)


@on_ranks(2, timeout=170)
def test_nonfinite_on_one_rank_changes_nothing(rank: int, world: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer, _ = job(world, dtype=dtype)
        model.loss(0, rank).backward()
        optimizer.step()
        before = whole_state(model, optimizer)
        if rank == 1:
            model.layers[1].b.grad.to_local()[3, 2] = float("inf")
        assert not optimizer.clip_grad_norm_(1.0) < float("inf")
        with pytest.raises(FloatingPointError, match=r"'layers\.1\.b' has inf or nan"):
            optimizer.step()
        optimizer._nonfinite = "skip"
        optimizer.step()
        assert optimizer.local_report()["skipped"]
        for key, value in whole_state(model, optimizer).items():
            assert torch.equal(value, before[key]), key
        optimizer.zero_grad()
        model.loss(1, rank).backward()
        optimizer.step()
        assert not optimizer.local_report()["skipped"]


@on_ranks(2, timeout=170)
def test_grad_scaler(rank: int, world: int) -> None:
    """Unscaled gradients are those of an unscaled loss; an inf on one rank makes both skip and halve the scale."""
    model, optimizer, twin = job(world)
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(2):
        scaler.scale(model.loss(step, rank)).backward()
        scaler.unscale_(optimizer)
        twin.step(twin.grads(step, range(world)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        compare(model, twin, f"step {step}")
    scaler.scale(model.loss(2, rank)).backward()
    if rank == 0:
        model.root.grad.to_local()[0] = float("nan")
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    compare(model, twin, "skipped")


@on_ranks(2, timeout=170)
def test_parameters_without_gradient_stay(rank: int, world: int) -> None:
    """What no rank used keeps values and state, and is stepped again when it is used."""
    model, optimizer, twin = job(world)
    for step, leave_out in enumerate([(), ("b", "norm"), ("b", "norm"), ()]):
        model.loss(step, rank, leave_out).backward()
        grads = {k: g for k, g in twin.grads(step, range(world)).items() if k.split(".")[-1] not in leave_out}
        twin.step(grads)
        optimizer.step()
        optimizer.zero_grad()
        compare(model, twin, f"step {step}")


@on_ranks(2, timeout=170)
def test_evaluation_leaves_no_stale_weights(rank: int, world: int) -> None:
    """A forward without backward leaves the root gathered; the next forward must see the step all the same."""
    model, optimizer, twin = job(world)
    model.loss(0, rank).backward()
    with torch.no_grad():
        model.loss(5, rank)
    assert not isinstance(model.root, DTensor), "FSDP2 keeps the root gathered"
    twin.step(twin.grads(0, range(world)))
    optimizer.step()
    compare(model, twin, "after an evaluation")
    fresh = build(fsdp(mesh_of(world, names=["dp"])))[0]
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.loss(7, rank), fresh.loss(7, rank))


@on_ranks(2, timeout=170)
def test_replaced_parameters_are_named(rank: int, world: int) -> None:
    model, optimizer, _ = job(world)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)  # in place: fine
    model.loss(0, rank).backward()
    optimizer.step()
    model.load_state_dict(state, assign=True)
    model.loss(1, rank).backward()
    with pytest.raises(RuntimeError, match=r"'root' is no longer the model's|'layers\.0\.a' is no longer the model's"):
        optimizer.step()


@on_ranks(2, timeout=170)
def test_moved_memory_is_followed(rank: int, world: int) -> None:
    """`model.to`, and a state that was offloaded and brought back, as reinforcement learning does between phases."""
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer, twin = job(world, dtype=dtype)
        for step in range(4):
            if step == 1:
                model.double().to(dtype)
            if step == 2:
                for state in optimizer.state.values():
                    for key, value in state.items():
                        state[key] = value.clone()
            model.loss(step, rank).backward()
            twin.step(twin.grads(step, range(world)))
            optimizer.step()
            optimizer.zero_grad()
            compare(model, twin, f"{dtype} step {step}", dtype)
        for p in (shard for shard in optimizer._domains[0].shards if shard.part is not None):
            for key, value in optimizer.state[p.record.param].items():
                mine = p.part.master if key == "master" else p.record.state[key]
                local = value.to_local() if isinstance(value, DTensor) else value
                assert local.data_ptr() == mine.data_ptr(), f"{p.record.name} {key}"
        model.double()
        with pytest.raises(ValueError, match=r"became torch\.float64"):
            optimizer.step()


@on_ranks(2, timeout=170)
def test_masters_follow_loaded_weights(rank: int, world: int) -> None:
    """A bf16 model loaded after construction is what is trained on, in full."""
    model, optimizer, _ = job(world, dtype=torch.bfloat16)
    other = Model(dtype=torch.bfloat16)
    with torch.no_grad():
        for param in other.parameters():
            param.add_(1)
    fsdp(mesh_of(world, names=["dp"]))(other)
    model.load_state_dict(other.state_dict())
    model.loss(0, rank).backward()
    moved = {name: p.detach().full_tensor().float() for name, p in other.named_parameters()}
    optimizer.step()
    for name, param in model.named_parameters():
        master = optimizer.state[param]["master"].full_tensor()
        assert torch.equal(master.bfloat16(), param.full_tensor()), name
        assert (master - moved[name]).abs().max() < 0.3, name


@on_ranks(2, timeout=170)
def test_gradients_are_let_go(rank: int, world: int) -> None:
    """After zero_grad nothing holds the shards of the gradient, which FSDP2 allocates anew in every backward."""
    model, optimizer, _ = job(world)
    for step in range(2):
        model.loss(step, rank).backward()
        held = [StorageWeakRef(p.grad.to_local().untyped_storage()) for p in model.parameters()]
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert all(storage.expired() for storage in held)


@on_ranks(2, timeout=170)
def test_refusals(rank: int, world: int) -> None:
    model = Model()
    ignored = {model.layers[0].b}
    fully_shard(model, mesh=mesh_of(world, names=["dp"]), ignored_params=ignored)
    with pytest.raises(ValueError, match=r"'layers\.0\.b' is no DTensor: .*ignored_params"):
        FullyShardedMuon(muon_param_groups(model, overrides={"*experts": "adamw"}))
    model, optimizer, _ = job(world)
    with pytest.raises(ValueError, match=r"is a DTensor: use integrations\.fsdp2"):
        DistributedMuon(muon_param_groups(model, overrides={"*experts": "adamw"}))
    with pytest.raises(ValueError, match="did you mean weight_decay"):
        FullyShardedMuon(muon_param_groups(model, overrides={"*experts": "adamw"}), weight_decy=0.1)
    with pytest.raises(RuntimeError, match="add_param_group"):
        optimizer.add_param_group({"params": []})
    with pytest.raises(RuntimeError, match="ranks disagree"):
        FullyShardedMuon(muon_param_groups(model, overrides={"*experts": "adamw"}), lr=0.1 * (1 + rank))
    half = Model(dtype=torch.float16)
    fsdp(mesh_of(world, names=["dp"]))(half)
    with pytest.raises(ValueError, match=r"is float16: .*MixedPrecisionPolicy"):
        FullyShardedMuon(muon_param_groups(half, overrides={"*experts": "adamw"}))


@on_ranks(2, timeout=170)
def test_scheduler_and_closure(rank: int, world: int) -> None:
    model, optimizer, twin = job(world)
    ours = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    theirs = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in twin.reference.optimizers]
    for step in range(3):

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model.loss(step, rank)
            loss.backward()
            return loss

        assert optimizer.step(closure) is not None
        twin.step(twin.grads(step, range(world)))
        for scheduler in (ours, *theirs):
            scheduler.step()
        compare(model, twin, f"step {step}")


@on_ranks(2, timeout=170)
def test_bytes_are_those_of_the_plan(rank: int, world: int) -> None:
    """The exchange moves what the plan says; beside it there is one small all-reduce."""
    model, optimizer, _ = job(world, ns_form="auto")
    optimizer.track()
    for step in range(2):
        model.loss(step, rank).backward()
        optimizer.step()
    (plan,) = optimizer.plans
    sent = optimizer.local_report()["bytes"]
    assert sent["all_to_all"] == plan.exchange_bytes_by_rank[rank]
    assert set(sent) == {"all_to_all", "all_reduce"} and sent["all_reduce"] < 1024
    calls = {label: counts["calls"] for label, counts in optimizer.local_report()["communication"].items()}
    assert calls == {"to_homes": 1, "from_homes": 1, "all_reduce": 1}, calls
