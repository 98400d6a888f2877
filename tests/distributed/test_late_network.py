"""Every integration on a network where nothing arrives, and nothing has left, before it was waited for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from distributed_muon import DistributedMuon
from distributed_muon.engine import workspace
from distributed_muon.engine.collectives import Collectives, Pending
from distributed_muon.engine.exchange import Shipment
from distributed_muon.layout.plan import make_plan
from tests.checks import on_ranks
from tests.distributed.test_teams import run as run_in_teams
from tests.integrations import fsdp2_model
from tests.late_network import LateNetwork, late_network
from tests.reference import ADAMW_SHAPES, MUON_SHAPES, Reference, backward, make_params, rank_gradient

LAYOUTS = {
    "aligned": dict(layout="aligned", bucket_mb=0.004),
    "bucketed": dict(layout="bucketed", bucket_mb=0.004),
    "flat": dict(layout="flat"),
}
BF16 = torch.bfloat16
small_waves = partial(mock.patch, "distributed_muon.engine.step.make_plan", partial(make_plan, wave_bytes=256))


def build(dtype: torch.dtype = torch.float32, **options) -> tuple[DistributedMuon, list[nn.Parameter], Reference]:
    """An optimizer of many waves, its parameters and its one-process twin."""
    params, muon = make_params(MUON_SHAPES + ADAMW_SHAPES, dtype), len(MUON_SHAPES)
    algorithms = ["muon"] * muon + ["adamw"] * (len(params) - muon)
    rates = dict(lr=0.02, weight_decay=0.1)
    twin = Reference(list(zip(params, algorithms, strict=True)), rates, rates | dict(betas=(0.9, 0.95)))
    groups = [{"params": params[:muon]}, {"params": params[muon:], "algorithm": "adamw"}]
    with small_waves():
        ours = DistributedMuon(groups, **rates, ns_form="standard", **options)
    assert len(ours.plan.waves) > 2
    return ours, params, twin


def differences(rank: int, world: int, dtype: torch.dtype = torch.float32, **options) -> list[str]:
    """What is not the twin's to the bit after steps of two microbatches."""
    ours, params, twin = build(dtype, **options)
    wrong = []
    for step in range(2):
        halves = [[rank_gradient(tuple(p.shape), s, rank, i) for i, p in enumerate(params)] for s in (step, 50 + step)]
        with ours.no_sync():
            backward(params, halves[0])
        backward(params, halves[1])
        ours.step()
        ours.zero_grad()
        twin.step([mean(tuple(p.shape), (step, 50 + step), world, i) for i, p in enumerate(params)])
        pairs = enumerate(zip(params, twin.params, strict=True))
        wrong += [f"{options} step {step} parameter {i}" for i, (p, q) in pairs if not torch.equal(p, q.to(dtype))]
    ours.close()
    return wrong


def mean(shape: tuple[int, ...], microbatches: tuple[int, int], world: int, index: int) -> Tensor:
    """Of both microbatches of every rank, divided once."""
    return sum(rank_gradient(shape, s, rank, index) for s in microbatches for rank in range(world)) / world


# ---- the double itself: what it must catch -------------------------------------------------------------------


def without(method: Callable, of: Callable[[LateNetwork], bool]) -> Callable:
    """`method` of a Pending or Shipment, left out where `of` says so."""
    return lambda self: None if of(self) else method(self)


def caught(rank: int, world: int, *patches) -> tuple[list[str], list[str]]:
    """What differs and which rules were broken in steps under some deliberate mistake."""
    with mock.patch.object(LateNetwork, "close", lambda network: []), late_network() as network:
        try:
            for patch in patches:
                patch.start()
            wrong = differences(rank, world, dtype=BF16, strategy="home", **LAYOUTS["bucketed"])
        except FloatingPointError as error:
            wrong = [str(error)]
        finally:
            for patch in patches:
                patch.stop()
    left = sum(map(len, network._queues.values()))
    return wrong, [*network.faults, *["never waited for"] * left]


@on_ranks(2)
def test_a_dropped_wait_is_caught(rank: int, world: int) -> None:
    for label in ("to_homes", "from_homes"):
        dropped = without(Shipment.wait, lambda shipment, label=label: shipment._label == label)
        wrong, faults = caught(rank, world, mock.patch.object(Shipment, "wait", dropped))
        assert wrong, f"what was not waited for {label} must be NaN"
        assert "never waited for" in faults
    for kind in ("reduce_scatter", "all_gather"):
        start = getattr(Collectives, kind)

        def forgotten(self: Collectives, *tensors: Tensor, start: Callable = start) -> Pending:
            start(self, *tensors)
            return Pending(())

        wrong, faults = caught(rank, world, mock.patch.object(Collectives, kind, forgotten))
        assert wrong, f"what was not waited for in {kind} must be NaN"
        assert "never waited for" in faults


@on_ranks(2)
def test_a_buffer_used_again_too_early_is_caught(rank: int, world: int) -> None:
    """Two slots for three waves in flight: the third is packed where the results of the first are still awaited."""
    _, faults = caught(rank, world, mock.patch.object(workspace, "IN_FLIGHT", 2))
    assert any("receive buffer was written" in fault or "send buffer was written" in fault for fault in faults), faults


@on_ranks(2)
def test_the_double_notices_every_kind_of_early_use(rank: int, world: int) -> None:
    def run(misuse: Callable[[Pending, Tensor, Tensor], None], kind: str) -> str:
        with pytest.raises(AssertionError) as error, late_network():
            source, target = torch.ones(world * 3) + rank, torch.zeros(3 if kind == "reduce_scatter" else world * 3)
            if kind == "all_to_all":
                pending = Collectives().all_to_all(target, source, [3] * world, [3] * world)
            elif kind == "reduce_scatter":
                pending = Collectives().reduce_scatter(target, source)
            else:
                target.view(world, -1)[rank].fill_(rank)
                pending = Collectives().all_gather(target)
                source = target.view(world, -1)[rank]
            misuse(pending, source, target)
            pending.wait()
        return str(error.value)

    for kind in ("reduce_scatter", "all_gather", "all_to_all"):
        assert "send buffer was written" in run(lambda pending, source, target: source.add_(1), kind)
        assert "receive buffer was written" in run(lambda pending, source, target: target.fill_(0), kind)
        assert "never waited for" in run(lambda pending, source, target: setattr(pending, "_works", ()), kind)
        freed = run(lambda pending, source, target: target.untyped_storage().resize_(0), kind)
        assert "receive buffer was written or freed" in freed


# ---- the optimizer on it --------------------------------------------------------------------------------------


def check_plain(rank: int, world: int) -> None:
    """All layouts and both strategies; bf16 weights are copied from their masters when a gather starts."""
    ways = (("home", torch.float32), ("home", BF16), ("gather", torch.float32))
    for layout, (strategy, dtype) in itertools.product(LAYOUTS, ways):
        with late_network() as network:
            wrong = differences(rank, world, dtype, strategy=strategy, **LAYOUTS[layout])
        assert not wrong, f"{layout} {wrong}"
        kinds = {name.split()[0] for name in network.started}
        assert kinds >= {"reduce_scatter", "all_gather", "all_to_all"}
    with late_network(direct=True) as network:
        assert not differences(rank, world, BF16, **LAYOUTS["bucketed"])
    assert {name.split()[0] for name in network.started} == {"message"}


def check_reduction_in_bf16(rank: int, world: int) -> None:
    """As on gloo's own messages: nothing of the narrow copies is read or freed too early."""
    results = []
    for direct in (True, False):
        with late_network(direct):
            ours, params, _ = build(BF16, strategy="home", reduce_dtype=BF16, **LAYOUTS["bucketed"])
            for step in range(3):
                backward(params, [rank_gradient(tuple(p.shape), step, rank, i) for i, p in enumerate(params)])
                ours.clip_grad_norm_(3.0)
                ours.step()
                ours.zero_grad()
            ours.close()
        results.append([p.detach().clone() for p in params])
    assert all(map(torch.equal, *results))


class Net(nn.Module):
    """Containers, a tied head, and a parameter of the container itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in range(2))
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(6)) for _ in range(2)])
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = x + scale * block(x)
        return self.head(x)


def train_net(rank: int, overlap: bool) -> tuple[list[float], list[Tensor]]:
    """Losses and parameters of three steps."""
    model = Net()
    matrices = [m.weight for block in model.blocks for m in block if isinstance(m, nn.Linear)]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    groups = [{"params": matrices}, {"params": rest, "algorithm": "adamw"}]
    with small_waves():
        optimizer = DistributedMuon(groups, lr=0.02, weight_decay=0.1, bucket_mb=0.0003)
    if overlap:
        optimizer.overlap_param_gather(model)
    tokens = torch.arange(7) * (rank + 1) % 7
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(tokens), tokens)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    optimizer.wait_params()
    optimizer.close()
    return losses, [p.detach().clone() for p in model.parameters()]


def check_overlap(rank: int, world: int) -> None:
    """Gathers left under way: every forward waits for what it needs, every loss is that of a waiting step."""
    with late_network():  # both, for gloo's branch adds up in another order
        losses, params = train_net(rank, overlap=False)
        late_losses, late_params = train_net(rank, overlap=True)
    assert losses == late_losses and losses[0] > losses[2]
    assert all(torch.equal(a, b) for a, b in zip(params, late_params, strict=True))


def check_teams(rank: int, world: int) -> None:
    """Matrices that ranks share: collectives of a team between those of the domain."""
    sizes = [world, world, 1, 1, world, 1]
    expected = run_in_teams(rank, world, sizes)
    with late_network():
        found = run_in_teams(rank, world, sizes)
    assert all(torch.equal(a, b) for a, b in zip(found["result"], expected["result"], strict=True))


def check_fsdp2(rank: int, world: int) -> None:
    with late_network() as network:
        with small_waves():
            model, optimizer, twin = fsdp2_model.build(fsdp2_model.fsdp(fsdp2_model.mesh_of(world, names=["dp"])))
        fsdp2_model.train(model, optimizer, twin, range(2), range(world), rank)
    assert "all_to_all" in network.started[-1]


def check_deepspeed(rank: int, world: int) -> None:
    from tests.integrations.test_deepspeed import check, zero_config

    with late_network() as network, small_waves():
        check(zero_config(2), rank, world)
    assert any("all_to_all" in name for name in network.started)


@on_ranks(2)
def test_plain(rank: int, world: int) -> None:
    check_plain(rank, world)
    check_reduction_in_bf16(rank, world)
    check_overlap(rank, world)


@on_ranks(3)
def test_plain_on_three(rank: int, world: int) -> None:
    check_plain(rank, world)
    check_overlap(rank, world)


@on_ranks(3)
def test_teams(rank: int, world: int) -> None:
    check_teams(rank, world)


@on_ranks(2)
def test_fsdp2(rank: int, world: int) -> None:
    check_fsdp2(rank, world)


@on_ranks(3)
def test_fsdp2_on_three(rank: int, world: int) -> None:
    check_fsdp2(rank, world)


@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed: see the README")
@on_ranks(2)
def test_deepspeed(rank: int, world: int) -> None:
    check_deepspeed(rank, world)


@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed: see the README")
@on_ranks(3)
def test_deepspeed_on_three(rank: int, world: int) -> None:
    check_deepspeed(rank, world)
