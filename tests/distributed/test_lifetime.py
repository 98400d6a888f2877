"""Around an optimizer's life: when it may be built, what it shares with others, and what it leaves behind."""

from __future__ import annotations

import ctypes
import gc
from contextlib import nullcontext
from statistics import median

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distributed_muon import DistributedMuon, muon_param_groups
from perf.fake_world import fake_rank
from tests.checks import on_ranks
from tests.late_network import late_network
from tests.reference import Reference, backward, make_params, rank_gradient
from tests.spawn import run_ranks

SHAPES = ((24, 16), (9, 7), (16, 16), (5,))


def build(params: list[nn.Parameter], **options) -> DistributedMuon:
    groups = [{"params": params[:-1]}, {"params": params[-1:], "algorithm": "adamw"}]
    return DistributedMuon(groups, lr=0.02, ns_form="standard", layout="bucketed", bucket_mb=0.001, **options)


def grads_of(rank: int, step: int = 0) -> list[Tensor]:
    return [rank_gradient(shape, step, rank, i) for i, shape in enumerate(SHAPES)]


def reference_after(params: list[nn.Parameter], ranks: int, step: int = 0) -> list[nn.Parameter]:
    algorithms = ["muon"] * (len(SHAPES) - 1) + ["adamw"]
    adamw = dict(lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))
    twin = Reference(list(zip(params, algorithms, strict=True)), dict(lr=0.02, weight_decay=0.1), adamw)
    twin.step([torch.stack(g).sum(0) / ranks for g in zip(*(grads_of(r, step) for r in range(ranks)), strict=True)])
    return twin.params


def hooks_on(params: list[nn.Parameter]) -> int:
    return sum(len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in params)


@on_ranks(2)
def test_ten_optimizers_leave_nothing_behind(rank: int, world: int) -> None:
    """Row 47: no hook, no process group, no memory; and those replaced are gone even while somebody holds them."""
    for held in (False, True):
        params = [nn.Parameter(torch.randn(512, 1024)) for _ in range(4)]  # 8 MiB
        groups, kept, sizes = len(dist.distributed_c10d._world.pg_names), [], []
        for _ in range(10):
            optimizer = DistributedMuon(params)
            backward(params, [torch.ones_like(p) for p in params])
            optimizer.step()
            assert hooks_on(params) == 2 * len(params)
            assert len(dist.distributed_c10d._world.pg_names) == groups + 1
            if held:
                kept.append(optimizer)
            del optimizer
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later isn't ours
            sizes.append(psutil.Process().memory_info().rss)
        if not held:  # each lost optimizer would be 12 MiB: gradients and momentum
            assert median(sizes[-3:]) - median(sizes[2:5]) < 30 << 20, [size >> 20 for size in sizes]
        del kept[:]
        gc.collect()
        assert hooks_on(params) == 0 and all(p.grad is None for p in params)
        assert len(dist.distributed_c10d._world.pg_names) == groups


@on_ranks(2)
def test_two_optimizers_whose_backwards_come_in_any_order(rank: int, world: int) -> None:
    """Row 52: rank 1 runs the two models the other way round."""
    models = [make_params(SHAPES, seed=seed) for seed in (0, 1)]
    expected = [reference_after(params, world) for params in models]
    optimizers = [build(params) for params in models]
    for number in (0, 1) if rank == 0 else (1, 0):
        backward(models[number], grads_of(rank))
    for optimizer, params, theirs in zip(optimizers, models, expected, strict=True):
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(params, theirs, strict=True))


@on_ranks(4)
def test_the_users_groups_do_not_matter(rank: int, world: int) -> None:
    """Row 52: ranks in different numbers of groups, some gone again; teams and optimizers on half of the ranks."""
    if rank in (0, 2):
        dist.new_group([0, 2], use_local_synchronization=True)
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for _ in range(2):
        params = make_params(SHAPES)
        half = build(params, process_group=halves[rank // 2])
        teams = half.collectives.subgroups([(0,), (1, 0)], "team")
        total = teams[1, 0].all_reduce(torch.tensor([float(rank)]))
        assert total.item() == (1.0 if rank < 2 else 5.0) and teams[1, 0].rank == 1 - rank % 2
        expected = reference_after(params, 2)
        backward(params, grads_of(rank % 2))
        half.step()
        assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))
        half.close()
        for team in teams.values():
            team.close()


def test_built_without_a_process_group_in_a_job_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 44: every rank would train alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 2 but torch\.distributed is not initialized"):
        DistributedMuon([nn.Parameter(torch.ones(2, 2))])


def test_built_before_the_process_group() -> None:
    """Row 44, without the variable."""
    params = make_params(SHAPES)
    optimizer = build(params)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        backward(params, grads_of(0))
        with pytest.raises(RuntimeError, match="built before init_process_group"):
            optimizer.step()
    finally:
        dist.destroy_process_group()


def test_closed_after_its_process_group_was_replaced() -> None:
    """Its own group went with the world it belonged to."""
    with fake_rank(0, 2):
        optimizer = build(make_params(SHAPES))
    with fake_rank(0, 2):
        optimizer.close()


@on_ranks(3)
def test_options_that_differ_after_construction_are_named_on_every_rank(rank: int, world: int) -> None:
    """A scheduler on one rank only: no collective is added for the check."""
    params = make_params(SHAPES)
    optimizer = build(params)
    backward(params, grads_of(rank))
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["lr"] = 0.02 + 0.01 * (rank == 2)
    with pytest.raises(RuntimeError, match=r"ranks disagree: rank 0 has group 0 .*'lr': 0\.02,.* rank 2 has group 0"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


@on_ranks(3)
def test_a_replica_that_drifted_is_named_with_its_rank(rank: int, world: int) -> None:
    """Row 43: a flipped bit, found by the check every N steps, before the step paints over it."""
    params = make_params(SHAPES)
    optimizer = build(params, replica_check_every=2)
    backward(params, grads_of(rank))
    optimizer.step()
    optimizer.check_replicas()
    if rank == 1:
        params[2].data.view(torch.int32)[3, 4] ^= 1
    backward(params, grads_of(rank))
    with pytest.raises(RuntimeError, match=r"parameter '0\.2' differs between ranks 0 and 1"):
        optimizer.step()


class WithBuffers(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)
        self.norm.running_mean.fill_(seed)


@on_ranks(2)
def test_all_ranks_start_from_rank_0(rank: int, world: int) -> None:
    """Rows 43 and 45: weights and buffers, whatever seed a rank used."""
    for dtype in (torch.float32, torch.bfloat16):
        model = WithBuffers(rank).to(dtype)
        optimizer = DistributedMuon(muon_param_groups(model))
        for ours, first in zip(
            model.state_dict().values(), WithBuffers(0).to(dtype).state_dict().values(), strict=True
        ):
            assert torch.equal(ours, first)
        for p in optimizer.sharded_parameters:
            assert torch.equal(p.master, p.param.detach().float().view(-1)[p.start : p.stop])


@on_ranks(2)
def test_reentrant_checkpointing_reduces_once(rank: int, world: int) -> None:
    """Row 53: the inner backward is no end of the outer one."""
    sent = []
    for inside in (False, True):
        params = make_params(((12, 12),) * 4)
        optimizer = DistributedMuon(params, layout="bucketed", bucket_mb=0.0001)

        def layers(x: Tensor, params: list[nn.Parameter] = params) -> Tensor:
            return (x @ params[1] @ params[2]).tanh()

        x = torch.ones(2, 12) @ params[0]
        x = checkpoint(layers, x, use_reentrant=True) if inside else layers(x)
        (x @ params[3]).sum().backward()
        optimizer.step()
        sent.append(optimizer.step_report()["bytes"]["reduce_scatter"])
    assert sent[0] == sent[1] > 0


class Encoder(nn.Module):
    """Reads weights outside their module's forward: nn.MultiheadAttention's out_proj, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).layers

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.linear(x, self.embedding.weight)


def run_encoder(rank: int, world: int, overlap: bool) -> list[list[float]]:
    model = Encoder()
    with late_network() if overlap else nullcontext():  # nothing arrives before it is waited for
        optimizer = DistributedMuon(muon_param_groups(model), lr=0.05, layout="bucketed", bucket_mb=0.0005)
        if overlap:
            optimizer.overlap_param_gather(model)
        tokens = torch.arange(22).view(2, 11) % 11
        losses = []
        for step in range(3):
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), (tokens + rank + step).flatten() % 11)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model.eval()
                losses.append([loss.item(), model(tokens).sum().item()])  # TransformerEncoderLayer's fast path
                model.train()
        weights = model.state_dict()
        return [*losses, [float(value.double().sum()) for value in weights.values()]]


def test_overlapped_gathers_are_waited_for_wherever_weights_are_read() -> None:
    """Row 51: with gathers that arrive as late as they may."""
    expected = run_ranks(run_encoder, 2, False)
    assert run_ranks(run_encoder, 2, True) == expected


def test_a_compiled_module_is_refused_before_it_can_ignore_the_hooks() -> None:
    model = Encoder()
    optimizer = DistributedMuon(muon_param_groups(model))
    model.layers[1].compile(backend="eager")
    with pytest.raises(ValueError, match=r"module 'layers\.1' was compiled before overlap_param_gather\(\)"):
        optimizer.overlap_param_gather(model)


def test_a_compiled_model_breaks_once_per_block() -> None:
    """Row 51: as many graph breaks as the waits need, none inside a block."""
    model = Encoder()
    optimizer = DistributedMuon(muon_param_groups(model))
    optimizer.overlap_param_gather(model)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(torch.arange(11).view(1, 11))
    assert explained.graph_break_count <= 1 + len(model.layers)
    torch._dynamo.reset()
