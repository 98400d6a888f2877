"""FSDP2 over every mesh against one process, to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from distributed_muon import Conv, Experts, Split, muon_param_groups
from distributed_muon.engine.collectives import all_gather_single, reduce_scatter_single
from distributed_muon.integrations.fsdp2 import FullyShardedMuon
from distributed_muon.integrations.fsdp2_layout import read_shards
from distributed_muon.layout.matrices import TensorSpec, Whole
from distributed_muon.layout.pieces import Layout
from distributed_muon.planning.model_shapes import model_shapes
from distributed_muon.planning.simulate import Job as PlanJob
from distributed_muon.planning.simulate import StageReport, simulate
from launch.models import build_model
from launch.pretrain_fsdp2 import shard
from perf.fsdp2_step import CountedComm
from tests.checks import on_ranks
from tests.integrations.fsdp2_model import (
    EVEN,
    all_ns_calls,
    build,
    compare,
    expert_parallel,
    fsdp,
    mesh_of,
    tensor_parallel,
    train,
)

MATRICES = 2 * (3 + 6) + 1  # of SHAPES, where "d" is a row and goes to AdamW
EVEN_MATRICES = 2 * (3 + 4) + 1


def ranks_equal_one_process(rank: int, world: int) -> None:
    model, optimizer, twin = build(fsdp(mesh_of(world, names=["dp"])))
    train(model, optimizer, twin, range(4), range(world), rank)
    assert all_ns_calls(optimizer) == MATRICES


@on_ranks(1, timeout=170)
def test_one_rank(rank: int, world: int) -> None:
    ranks_equal_one_process(rank, world)


@on_ranks(2, timeout=170)
def test_two_ranks(rank: int, world: int) -> None:
    ranks_equal_one_process(rank, world)


@on_ranks(3, timeout=170)
def test_three_ranks(rank: int, world: int) -> None:
    ranks_equal_one_process(rank, world)


@on_ranks(4, timeout=170)
def test_four_ranks(rank: int, world: int) -> None:
    ranks_equal_one_process(rank, world)


@on_ranks(4, timeout=170)
def test_replicas_share_newton_schulz(rank: int, world: int) -> None:
    """HSDP: every matrix is orthogonalized once, not once in each replica, and replicas stay equal."""
    mesh = mesh_of(2, 2, names=["replicate", "shard"])
    model, optimizer, twin = build(fsdp(mesh))
    train(model, optimizer, twin, range(3), range(4), rank)
    assert all_ns_calls(optimizer) == MATRICES
    for param in model.parameters():
        mine = param.to_local().detach()
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine, group=mesh["replicate"].get_group())
        assert torch.equal(*both)


def check_norm(optimizer, model, grads: list[torch.Tensor]) -> None:
    norm = sum(grad.double().square().sum().item() for grad in grads) ** 0.5
    assert optimizer.clip_grad_norm_(1e9) == pytest.approx(norm, rel=1e-12)


@on_ranks(4, timeout=170)
def test_tensor_parallel(rank: int, world: int) -> None:
    """Rows over tp, columns over tp, rows that do not divide, and copies on every tp rank, counted once in norms."""
    mesh = mesh_of(2, 2, names=["dp", "tp"])
    model, optimizer, twin = build(tensor_parallel(mesh, up=0, down=1, odd=0), EVEN)
    train(model, optimizer, twin, range(3), range(2), mesh.get_local_rank("dp"))
    assert all_ns_calls(optimizer) == EVEN_MATRICES
    model.loss(9, mesh.get_local_rank("dp")).backward()
    check_norm(optimizer, model, list(twin.grads(9, range(2)).values()))


def train_experts(rank: int, dim: int | None) -> None:
    mesh = mesh_of(2, 2, names=["efsdp", "ep"])
    model, optimizer, twin = build(expert_parallel(mesh, mesh_of(4, names=["dp"]), dim), EVEN)

    def grads(step: int) -> dict[str, torch.Tensor]:
        # distribute_tensor gives all ranks of ep the gradient of the first: those of ranks 0 and 2.
        experts = {k: v for k, v in twin.grads(step, [0, 2]).items() if "experts" in k}
        return twin.grads(step, range(4)) | experts

    for step in range(3):
        model.loss(step, rank).backward()
        twin.step(grads(step))
        optimizer.step()
        optimizer.zero_grad()
        compare(model, twin, f"step {step}")
    assert all_ns_calls(optimizer) == EVEN_MATRICES
    assert len(optimizer.plans) == 1, "meshes of the same ranks are one domain"
    model.loss(9, rank).backward()
    check_norm(optimizer, model, list(grads(9).values()))
    if dim is None:  # four whole experts on four ranks cost no exchange
        plan = optimizer.plans[0]
        experts = [m for m, matrix in enumerate(plan.layout.matrices) if "experts" in matrix.name]
        assert all({p.rank for p in plan.layout.pieces if p.matrix == m} == set(plan.homes[m]) for m in experts)


@on_ranks(4, timeout=170)
def test_expert_parallel(rank: int, world: int) -> None:
    train_experts(rank, None)


@on_ranks(4, timeout=170)
def test_expert_parallel_with_rows_of_every_expert(rank: int, world: int) -> None:
    train_experts(rank, 1)


@on_ranks(2, timeout=170)
def test_fsdp_over_columns(rank: int, world: int) -> None:
    mesh = mesh_of(2, names=["dp"])
    model, optimizer, twin = build(fsdp(mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1)), EVEN)
    train(model, optimizer, twin, range(3), range(2), rank)


@on_ranks(2, timeout=170)
def test_mixed_precision_policy(rank: int, world: int) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, optimizer, twin = build(fsdp(mesh_of(2, names=["dp"]), mp_policy=policy))
    train(model, optimizer, twin, range(3), range(2), rank)


@on_ranks(2, timeout=170)
def test_bf16_model_has_fp32_masters(rank: int, world: int) -> None:
    model, optimizer, twin = build(fsdp(mesh_of(2, names=["dp"])), dtype=torch.bfloat16)
    for step in range(4):
        model.loss(step, rank).backward()
        twin.step(twin.grads(step, range(2)))
        optimizer.step()
        optimizer.zero_grad()
        compare(model, twin, f"step {step}", torch.bfloat16)
    for name, param in model.named_parameters():
        assert torch.equal(optimizer.state[param]["master"].full_tensor(), twin.value(name)), name


@on_ranks(4, timeout=170)
def test_several_domains(rank: int, world: int) -> None:
    """Layer 1 belongs to each pair of ranks by itself, everything else to all four."""
    pairs, pair = mesh_of(2, 2, names=["pair", "shard"]), [rank // 2 * 2, rank // 2 * 2 + 1]

    def cut(model) -> None:
        fully_shard(model.layers[1], mesh=pairs["shard"])
        fully_shard(model.layers[0], mesh=dp)
        fully_shard(model, mesh=dp)

    dp = mesh_of(4, names=["dp"])
    model, optimizer, twin = build(cut)

    def grads(step: int, pair: list[int]) -> dict[str, torch.Tensor]:
        own = {k: v for k, v in twin.grads(step, pair).items() if "layers.1" in k}
        return twin.grads(step, range(4)) | own

    for step in range(3):
        model.loss(step, rank).backward()
        twin.step(grads(step, pair))
        optimizer.step()
        optimizer.zero_grad()
        compare(model, twin, f"step {step}")
    assert sorted(len(plan.homes) for plan in optimizer.plans) == [9, 10]
    model.loss(9, rank).backward()
    other = {k: v for k, v in twin.grads(9, [(r + 2) % 4 for r in pair]).items() if "layers.1" in k}
    check_norm(optimizer, model, [*grads(9, pair).values(), *other.values()])
    if rank == 3:  # only its pair and, over the world, all others hear of it
        next(model.layers[1].parameters()).grad.to_local().fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="'layers.1.a'" if rank >= 2 else "another rank"):
        optimizer.step()


@on_ranks(2, timeout=170)
def test_plain_dtensors(rank: int, world: int) -> None:
    """Tensor parallelism without FSDP; nothing reduces, every rank has the gradient of the whole batch."""
    mesh = mesh_of(2, names=["tp"])

    def cut(model) -> None:
        for layer in model.layers:
            for name, place in {"up": Shard(0), "down": Shard(1), "odd": Replicate(), "experts": Shard(0)}.items():
                param = distribute_tensor(getattr(layer, name).detach(), mesh, [place])
                setattr(layer, name, torch.nn.Parameter(param))
            layer.norm = torch.nn.Parameter(distribute_tensor(layer.norm.detach(), mesh, [Replicate()]))
        model.root = torch.nn.Parameter(distribute_tensor(model.root.detach(), mesh, [Replicate()]))

    model, optimizer, twin = build(cut, EVEN)
    train(model, optimizer, twin, range(3), [0], 0)
    assert all_ns_calls(optimizer) == EVEN_MATRICES


def planned_and_counted(world: int, columns: int) -> tuple[StageReport, int, int]:
    """`plan --layout fsdp2` of a model; bytes that FSDP2 and the step send for it, on the rank that sends most."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "head_dim": 4, "vocab_size": 60}
    sizes |= {"num_key_value_heads": 3, "intermediate_size": columns}
    report = simulate(
        model_shapes({"model_type": "llama", **sizes}), PlanJob(dp=world, layout="fsdp2", strategy="home")
    )
    model = build_model("dense", **sizes)
    shard(model, mesh_of(world, names=["dp"]), torch.bfloat16)
    own: list[int] = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(CountedComm(all_gather_single, 0, own))
            module.set_custom_reduce_scatter(CountedComm(reduce_scatter_single, 1, own))
    optimizer = FullyShardedMuon(muon_param_groups(model), lr=0.02, strategy="home")
    model(torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64)).backward()
    optimizer.step()
    most = torch.tensor([sum(own), optimizer.local_report()["bytes"].get("all_to_all", 0)])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return report, *most.tolist()


@on_ranks(2, timeout=170)
def test_the_planned_bytes_are_sent(rank: int, world: int) -> None:
    report, fsdp2, exchange = planned_and_counted(world, columns=40)
    assert (report.adamw_bytes, report.exchange_bytes_max) == (fsdp2, exchange)
    assert exchange > 0


@on_ranks(3, timeout=170)
def test_the_planned_bytes_are_sent_with_uneven_rows(rank: int, world: int) -> None:
    """FSDP2 pads 40 rows to 42, the step sends none of it."""
    report, fsdp2, exchange = planned_and_counted(world, columns=40)
    assert report.exchange_bytes_max == exchange > 0
    padding = 2 * 2 * 2 * 24  # gate and up of two layers
    assert report.adamw_bytes + 8 * padding * 2 / 3 == fsdp2


class Net(torch.nn.Module):
    """A tied, a frozen and an unused matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.frozen, self.unused = (torch.nn.Linear(7, 7, bias=False) for _ in range(4))
        self.two.weight = self.one.weight
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.frozen(self.one(x)))


@on_ranks(2, timeout=170)
def test_tied_frozen_and_unused(rank: int, world: int) -> None:
    whole, model = Net(), Net()
    fully_shard(model, mesh=mesh_of(2, names=["dp"]))
    optimizer = FullyShardedMuon(muon_param_groups(model), lr=0.02, ns_form="standard")
    reference = torch.optim.Muon(
        [whole.one.weight, whole.unused.weight], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    before = model.unused.weight.full_tensor().clone()
    for step in range(3):
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(step))
        for net, opt in ((whole, reference), (model, optimizer)):
            net(x).square().sum().backward()
            opt.step()
            opt.zero_grad()
        for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours.full_tensor(), theirs), name
    assert torch.equal(model.unused.weight.full_tensor(), before)
    assert len(optimizer.plans[0].homes) == 2


@on_ranks(4, timeout=170)
def test_places_of_every_cut(rank: int, world: int) -> None:
    """Every piece of the layout names the elements that the DTensor holds there."""
    flat, square = mesh_of(4, names=["x"]), mesh_of(2, 2, names=["a", "b"])
    strided = [_StridedShard(0, split_factor=2), Shard(0)]
    for shape, rule, mesh, placements in [
        ((7, 5), Whole(), flat, [Shard(0)]),
        ((2, 5), Whole(), flat, [Shard(0)]),
        ((5, 8), Whole(), flat, [Shard(1)]),
        ((5, 7), Whole(), flat, [Shard(1)]),  # columns of several widths
        ((5, 6), Split((2, 3)), square, [Shard(0), Shard(1)]),
        ((5, 6), Split((2, 4), dim=1), square, [Shard(1), Shard(0)]),
        ((9, 6), Whole(), square, [Replicate(), Shard(1)]),
        ((7, 6), Whole(), square, strided),
        ((3, 6), Whole(), square, strided),
        ((4, 6, 5), Experts(), square, [Shard(0), Shard(1)]),
        ((4, 6, 5), Experts(Split((2, 4))), square, [Shard(2), Shard(1)]),
        ((4, 6, 5), Experts(), flat, [Shard(0)]),
        ((6, 4, 3), Conv(), square, [Shard(0), Shard(1)]),
        ((6, 4, 3, 3), Conv(), flat, [Shard(1)]),
    ]:
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        if any(hasattr(p, "split_factor") for p in placements):  # as FSDP does it: inside what tp cut
            part = whole.chunk(2)[square.get_local_rank("b")].chunk(2)
            local = part[square.get_local_rank("a")] if square.get_local_rank("a") < len(part) else whole[:0]
            param = DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=whole.stride())
        else:
            param = distribute_tensor(whole, mesh, placements)
        where = f"{shape} {rule} {placements}"
        spec, shards = read_shards(TensorSpec("w", shape, rule), param, range(4), 0)
        layout = Layout.build([spec], [[shard] if shard else [] for shard in shards])
        matrices = []
        stack, rows, cols = rule.view(shape)
        for element in whole.reshape(stack, rows, cols):
            for region in rule.regions(rows, cols):
                picked = torch.cat([element[a:b] for a, b in region.row_ranges])
                matrices.append(picked[:, slice(*region.cols)].reshape(-1))
        mine = param.to_local().reshape(-1)
        assert sum(p.numel for p in layout.pieces if p.rank == rank) == mine.numel(), where
        for piece in (p for p in layout.pieces if p.rank == rank):
            for i in range(piece.rows):
                held = mine[piece.offset + i * piece.stride :][: piece.cols]
                meant = matrices[piece.matrix][piece.at + i * piece.pitch :][: piece.cols]
                assert torch.equal(held, meant), where
