"""What a step allocates is what the plan predicts: the engine runs on the meta device, as on an accelerator."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from distributed_muon.engine.collectives import Collectives, Pending
from distributed_muon.engine.options import Options
from distributed_muon.engine.state import Member, Part
from distributed_muon.engine.step import ShardedStep
from distributed_muon.layout.cutting import cut_buckets, make_buckets
from distributed_muon.layout.matrices import Experts, TensorSpec, Whole
from distributed_muon.layout.memory import transient_bytes_by_rank
from distributed_muon.layout.plan import make_plan
from tests.shards import in_teams

META = torch.device("meta")


class Alone(Collectives):
    """The place of one rank among `size`: everything arrives at once and nothing is moved."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def warm_up(self, device: torch.device) -> None: ...

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_reduce(self, tensor: Tensor, **_: Any) -> Tensor:
        return tensor

    def all_gather(self, output: Tensor) -> Pending:
        return Pending(())

    def all_to_all(self, output: Tensor, input: Tensor, *_: Any) -> Pending:
        return Pending(())

    def subgroups(self, teams: Any, *_: Any) -> dict[Any, Collectives]:
        return {ranks: Alone(ranks.index(self.rank), len(ranks)) for ranks in teams if self.rank in ranks}


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that came to be inside it, and of `workspace` while it exists.

    Attributes:
        highest: after any operation.
    """

    def __init__(self, workspace: list[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in workspace}
        self._workspace, self._new, self.highest = workspace, [], 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and not any(tensor.untyped_storage()._cdata == r.cdata for r, _ in self._new):
                self._known.add(tensor.untyped_storage()._cdata)
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._new.append((StorageWeakRef(storage), storage.nbytes()))
        for ref, _ in [entry for entry in self._new if entry[0].expired()]:
            self._known.discard(ref.cdata)
        self._new = [entry for entry in self._new if not entry[0].expired()]
        held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self._workspace}
        self.highest = max(self.highest, sum(held.values()) + sum(nbytes for _, nbytes in self._new))
        return out


def engine_of(specs: list[TensorSpec], rank: int, world: int, plan: Any, **options: Any) -> ShardedStep:
    """The engine of one rank on the meta device: Muon's tensors in buckets of their own, and AdamW's."""
    numels = [spec.numel for spec in specs]
    buckets = []
    for adamw in (False, True):
        chosen = [i for i, spec in enumerate(specs) if (spec.rule is None) == adamw]
        buckets += (
            make_buckets(numels, world, bucket_numel=40_000_000, aligned=False, order=chosen[::-1]) if chosen else []
        )
    shards = cut_buckets(buckets, numels, world)
    everywhere = Options.of(options)
    groups = everywhere.complete([{"params": []}, {"params": [], "algorithm": "adamw"}])
    members = [Member(s, torch.empty(s.shape, device=META), int(s.rule is None)) for s in specs]
    engine = ShardedStep(members, groups, everywhere, Alone(rank, world), META)
    parts = [Part([s], [0], torch.empty(s.stop - s.start, device=META)) for s in shards[rank]]
    for part in parts:
        part.grad = torch.empty_like(part.master)
    with mock.patch("distributed_muon.engine.step.make_plan", plan):
        engine.attach(shards, parts)
    return engine


def layers(count: int) -> list[TensorSpec]:
    """Attention, a dense and an expert MLP of Moonlight's sizes, with norms, and an embedding."""
    out = [TensorSpec("embedding", (163_840, 2048))]
    for i in range(count):
        shapes = {"q": (3072, 2048), "kv": (576, 2048), "o": (2048, 2048), "up": (11264, 2048), "down": (2048, 11264)}
        out += [TensorSpec(f"{i}.{name}", shape, Whole()) for name, shape in shapes.items()]
        out += [TensorSpec(f"{i}.experts", (8, 1408, 2048), Experts()), TensorSpec(f"{i}.norm", (2048,))]
    return out


CASES = {
    "home": ({"strategy": "home"}, 4, make_plan),
    "gather": ({"strategy": "gather"}, 4, make_plan),
    "one rank": ({}, 1, make_plan),
    "standard": ({"ns_form": "standard"}, 2, make_plan),
    "fp32": ({"ns_dtype": torch.float32, "nesterov": False}, 3, make_plan),
    "teams": ({"strategy": "home"}, 4, lambda layout, *a, **k: in_teams([4] * len(layout.matrices), layout, *a, **k)),
    "fp32 teams": (
        {"strategy": "home", "ns_dtype": torch.float32},
        4,
        lambda layout, *a, **k: in_teams([3] * len(layout.matrices), layout, *a, **k),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_transient_bytes_are_predicted(name: str) -> None:
    """AdamW parameters, 3-D experts, teams, forms and dtypes: the peak, but for a few numbers per matrix."""
    options, world, plan = CASES[name]
    for rank in {0, world - 1}:
        engine = engine_of(layers(2), rank, world, plan, **options)
        for record in engine.parameters:  # counters are read on the host, and meta tensors have no values
            record.state.update({"step": torch.zeros(())} if "step" in record.state else {})
        slots = [buffer for slot in engine._workspace._slots for buffer in slot]
        with Peak(slots) as peak:
            engine.step()
        predicted = transient_bytes_by_rank(engine.plan)[rank]
        assert 0 <= peak.highest - predicted < 64 * len(engine.plan.layout.matrices), (rank, peak.highest, predicted)
        assert all(not buffer.untyped_storage().nbytes() for buffer in slots)
