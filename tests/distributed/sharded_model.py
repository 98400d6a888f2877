"""A model whose state lies on several ranks, and its whole state for comparison."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_muon import DistributedMuon, Experts
from distributed_muon.checkpoint import background
from tests.reference import backward, make_params, rank_gradient

SHAPES = {
    "m0": (33, 17),
    "m1": (7, 5),
    "m2": (3, 40),
    "m3": (1, 9),
    "experts": (3, 6, 5),
    "a0": (3,),
    "a1": (17, 5),
    "a2": (1,),
}
DTYPES = (torch.float32, torch.bfloat16)


class Model(nn.Module):
    """Matrices, an expert stack, vectors, and a buffer."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        for (name, _), param in zip(SHAPES.items(), make_params(list(SHAPES.values()), dtype, seed), strict=True):
            self.register_parameter(name, param)
        self.register_buffer("steps", torch.tensor(seed))


def build(
    dtype: torch.dtype = torch.float32, seed: int = 0, group: dist.ProcessGroup | None = None, **options
) -> tuple[Model, DistributedMuon]:
    model = Model(dtype, seed)
    named = list(model.named_parameters())
    groups = [
        {"params": named[:4], "lr": 0.03},
        {"params": named[4:5], "matrices": Experts()},
        {"params": named[5:], "algorithm": "adamw", "lr": 0.01, "betas": (0.8, 0.9)},
    ]
    defaults = dict(lr=0.02, weight_decay=0.1, layout="bucketed", bucket_mb=0.002, process_group=group)
    return model, DistributedMuon(groups, **{**defaults, **options})


def train(model: Model, optimizer: DistributedMuon, steps: Sequence[int], rank: int, scheduler=None) -> None:
    """Steps whose gradients depend on the step and, unless `rank` is fixed, on the rank."""
    params = list(model.parameters())
    for step in steps:
        backward(params, [rank_gradient(tuple(p.shape), step, rank, i) for i, p in enumerate(params)])
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def everything(model: Model, optimizer: DistributedMuon) -> dict[str, Tensor]:
    """The whole (unsharded) state of model and optimizer, gathered from the ranks' shards."""
    out = dict(model.state_dict())
    for p in optimizer.sharded_parameters:
        for key, value in {**p.state, "master": p.master}.items():
            whole = value.clone()
            if value.ndim:
                whole = torch.zeros(p.param.numel(), dtype=value.dtype)
                whole[p.start : p.stop] = value
                optimizer.collectives.all_reduce(whole, counted=False)
            out[f"{p.name}.{key}"] = whole
    return {key: value.detach().clone() for key, value in out.items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], where: str = "") -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype, f"{where} {key}"
        assert torch.equal(value, theirs[key]), f"{where} {key} differs"


@contextmanager
def copies_held_back() -> Iterator[threading.Event]:
    """Inside it, the thread of a save in the background copies only once the event that it yields is set."""
    gate, original = threading.Event(), background._copy

    def copy(*tensors: Tensor) -> None:
        if threading.current_thread().name == "checkpoint":
            assert gate.wait(30)
        original(*tensors)

    with mock.patch.object(background, "_copy", copy):
        yield gate
