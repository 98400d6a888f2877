"""When an optimizer may be built, which parameters are its own, and what goes with it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch.distributed as dist
from torch import nn

from distributed_muon.engine.collectives import Collectives

# By optimizer, the ids of its parameters, which live as long as it does.
_OWNED: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()


def check_launch() -> None:
    """Raise a RuntimeError where a rank of a job of several processes would train alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        raise RuntimeError(
            f"WORLD_SIZE is {world} but torch.distributed is not initialized, so every rank would train alone: call "
            "torch.distributed.init_process_group() before DistributedMuon"
        )


def take_over(named: Iterable[tuple[str, nn.Parameter]], optimizer: Any) -> None:
    """Make `optimizer` the owner of parameters; whoever owned one of them before is closed.

    Raises:
        ValueError: two parameters lie in the same memory, so that their tie would be cut silently.
    """
    named = list(named)
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, name) for name, p in named)
    for (_, end, first), (begin, _, second) in pairwise(spans):
        if begin < end:
            raise ValueError(
                f"parameters {first!r} and {second!r} share memory: tie them by assigning the same nn.Parameter to "
                "both modules"
            )
    own = {id(param) for _, param in named}
    for before, held in list(_OWNED.items()):
        if not own.isdisjoint(held):
            before.close()
    _OWNED[optimizer] = own


def release_later(optimizer: Any, hooked: Sequence[Any], collectives: Sequence[Collectives]) -> weakref.finalize:
    """Remove the hooks and give the process groups back when the optimizer is gone, or when called.

    Groups with works under way, as after an error on one rank, are left to torch: other ranks may still need them,
    and to wait for them here could take for ever.

    Args:
        hooked: objects with `remove()` and `under_way`, or None; they must not refer to the optimizer.
    """

    def release() -> None:
        parts = [part for part in hooked if part is not None]
        for part in parts:
            part.remove()
        if not any(part.under_way for part in parts):
            for own in collectives:
                own.close()

    later = weakref.finalize(optimizer, release)
    later.atexit = False
    return later
