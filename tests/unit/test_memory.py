"""What stays in memory: state per rank, wires, and no trace of an import in anybody's global settings."""

from __future__ import annotations

import subprocess
import sys
import weakref

import pytest
import torch
from torch import Tensor, nn

from distributed_muon import DistributedMuon, muon_param_groups
from distributed_muon.engine.collectives import Collectives, Pending
from distributed_muon.engine.state import Member, own_parameters
from distributed_muon.engine.workspace import Workspace
from distributed_muon.layout.matrices import TensorSpec, Whole
from distributed_muon.layout.memory import slot_elements
from distributed_muon.layout.plan import make_plan
from tests.unit.test_plan import layout_of, transformer


class OneOf(Collectives):
    """The place of one rank among `size`, without any communication."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def apart(self) -> Collectives:
        return self

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of distinct storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def small_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Embedding, twelve blocks of attention and MLP, norms, head."""
    torch.manual_seed(0)
    block = lambda: nn.ModuleDict(  # noqa: E731
        {
            "norm": nn.LayerNorm(96),
            "q": nn.Linear(96, 96, bias=False),
            "k": nn.Linear(96, 24, bias=False),
            "v": nn.Linear(96, 24, bias=False),
            "o": nn.Linear(96, 96, bias=False),
            "gate": nn.Linear(96, 264, bias=False),
            "up": nn.Linear(96, 264, bias=False),
            "down": nn.Linear(264, 96, bias=False),
        }
    )
    parts = {"embedding": nn.Embedding(2000, 96), "blocks": nn.ModuleList(block() for _ in range(12))}
    return nn.ModuleDict({**parts, "lm_head": nn.Linear(96, 2000, bias=False)}).to(dtype)


@pytest.mark.parametrize("layout", ["aligned", "bucketed", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_state_per_rank(world: int, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 36 and 37: master and moments take at most 1.02 (8 Muon + 12 AdamW) / W bytes, on every rank."""
    held = []
    for rank in range(world):
        for name, nothing in (("warm_up", None), ("gather_objects", [1])):
            monkeypatch.setattr(OneOf, name, lambda self, *_, value=nothing: value)
        monkeypatch.setattr("distributed_muon.optimizer.Collectives", lambda group, rank=rank: OneOf(rank, world))
        model = small_llama(dtype)
        size = None if layout == "flat" else 0.5
        optimizer = DistributedMuon(muon_param_groups(model), layout=layout, bucket_mb=size)
        muon = sum(p.param.numel() for p in optimizer.sharded_parameters if "momentum_buffer" in p.state)
        adamw = sum(p.numel() for p in model.parameters()) - muon
        assert muon > 1_000_000 and adamw > 300_000
        moments = [value for p in optimizer.sharded_parameters for key, value in p.state.items() if key != "step"]
        masters = sum(4 * bucket.part.master.numel() for bucket in optimizer._buckets)
        held.append(bytes_of(moments) + masters)
        assert held[-1] <= 1.02 * (8 * muon + 12 * adamw) / world
        # fp32 masters are the parameters themselves, and the parameters lie in their buckets: no second copy.
        spans = [(bucket.flat.data_ptr(), bucket.flat.data_ptr() + bucket.flat.nbytes) for bucket in optimizer._buckets]
        inside = lambda t, spans=spans: any(a <= t.data_ptr() and t.data_ptr() + t.nbytes <= b for a, b in spans)  # noqa: E731
        assert all(map(inside, model.parameters()))
        aliased = all(inside(bucket.part.master) for bucket in optimizer._buckets)
        assert aliased == (dtype == torch.float32)
        assert sum(bucket.flat.numel() for bucket in optimizer._buckets) <= 1.02 * (muon + adamw)
    assert len(set(held)) == 1, "every rank holds the same"


def test_state_is_a_view_of_one_buffer_per_bucket_and_moment() -> None:
    """No tensor per parameter: a thousand layers cost no thousand allocations."""
    params = [nn.Parameter(torch.zeros(8, 8)) for _ in range(20)]
    optimizer = DistributedMuon(params)
    assert len({p.momentum.untyped_storage().data_ptr() for p in optimizer.sharded_parameters}) == 1


def test_slots_are_as_large_as_what_travels() -> None:
    """Row 37: no element more than the matrices and pieces of a wave, and nothing between steps."""
    plan = make_plan(layout_of(transformer(2), 4, 100_000, False), "home", teams=False, wave_bytes=100_000)
    total = [0] * 4
    for rank in range(4):
        for wave, sizes in zip(plan.schedule(rank), slot_elements(plan)[:, rank].tolist(), strict=True):
            matrices, held, home, stage, _ = sizes
            assert matrices == sum(plan.layout.matrices[m].numel for stack in wave.stacks for m in stack)
            sent, received = (sum(p.numel for p in pieces) for pieces in (wave.gather.send, wave.gather.recv))
            back_sent, back = (sum(p.numel for p in pieces) for pieces in (wave.scatter.send, wave.scatter.recv))
            assert (held, home) == (max(sent, back), max(received, back_sent))
            assert stage == sum(p.numel for p in wave.held)
            total[rank] += 2 * (sent + back_sent)
    assert total == plan.exchange_bytes_by_rank and max(total) > 0
    sizes = [(10, 20, 30, 7, 0), (40, 5, 6, 8, 12), (1, 2, 3, 9, 5), (20, 9, 70, 6, 0)]
    on_meta = Workspace(sizes, torch.bfloat16, torch.device("meta"))
    assert [(buffer.numel(), buffer.dtype) for buffer in on_meta.slot(1)[1:]] == [
        (5, torch.bfloat16),
        (6, torch.bfloat16),
        (10, torch.float32),
    ], "one stage for all slots, rounded up to 8 bytes"
    assert on_meta.scratch.numel() == 20, "in the same memory"
    workspace = Workspace(sizes, torch.bfloat16, torch.device("cpu"))
    slots = [workspace.slot(number) for number in range(3)]
    assert workspace.slot(3) is slots[0]
    held = lambda: [[buffer.untyped_storage().nbytes() for buffer in slot] for slot in slots]  # noqa: E731
    assert held() == [[0, 0, 0, 0]] * 3
    with workspace:
        assert held() == [[40, 40, 140, 0], [80, 10, 12, 0], [2, 4, 6, 0]]
    assert held() == [[0, 0, 0, 0]] * 3


def test_a_collectives_tensors_live_until_it_is_waited_for() -> None:
    """Row 8: dropping every other reference frees nothing before wait()."""

    class Work:
        def wait(self) -> None:
            assert all(ref() is not None for ref in refs), "freed while in flight"

    tensors = [torch.zeros(3), torch.zeros(3)]
    refs = [weakref.ref(tensor) for tensor in tensors]
    pending = Pending([Work()], *tensors)
    del tensors
    assert all(ref() is not None for ref in refs)
    pending.wait()
    assert all(ref() is None for ref in refs), "and nothing is kept after"
    pending.wait()


def test_a_rank_that_owns_nothing_still_has_every_key() -> None:
    """Row 27: empty shards have empty tensors of the right kind."""
    params = [nn.Parameter(torch.ones(1, 3)), nn.Parameter(torch.ones(2, 2))]
    members = [Member(TensorSpec(name, tuple(p.shape), Whole()), p, 0) for name, p in zip("ab", params, strict=True)]
    for p in own_parameters(members, ["muon", "muon"], [], torch.device("cpu")):
        assert (p.start, p.stop) == (0, 0)
        assert p.momentum.shape == p.master.shape == p.grad.shape == (0,)


def test_importing_changes_no_global_setting() -> None:
    """Row 38: torch's compiler, matmul and thread settings are the user's, on import and after a step."""
    code = """
import torch, torch._dynamo, torch._inductor.config
def settings():
    return [
        torch._dynamo.config.get_config_copy(), torch._inductor.config.get_config_copy(),
        torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction, torch.backends.cudnn.benchmark,
        torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(), torch.random.get_rng_state().tolist(), len(torch.serialization.get_safe_globals()),
    ]
before = settings()
import distributed_muon
assert settings() == before, "import"
p = torch.nn.Parameter(torch.ones(4, 6))
optimizer = distributed_muon.DistributedMuon([p])
p.sum().backward()
optimizer.step()
assert settings() == before, "a step"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_learning_rates_do_not_recompile() -> None:
    """Row 38: twenty float learning rates compile nothing anew, and on a CPU nothing at all."""
    from torch._dynamo.utils import counters

    counters.clear()
    p = nn.Parameter(torch.ones(4, 6))
    optimizer = DistributedMuon([p])
    compiled = []
    for number in range(20):
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + number)
        p.sum().backward()
        optimizer.step()
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[-1] == compiled[0] == 0
