"""offload_optimizer: masters and moments on the host, results as without."""

from __future__ import annotations

import gc
from importlib.util import find_spec
from types import FunctionType, ModuleType

import pytest
import torch
from torch import Tensor

from tests.checks import on_ranks
from tests.integrations.deepspeed_case import MATRICES, Run, zero_config
from tests.integrations.test_deepspeed import ACCUMULATE, BF16, check

pytestmark = [
    pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed: see the README"),
    pytest.mark.timeout(300),
]
SECONDS = 240
HOST = {"offload_optimizer": {"device": "cpu"}}
NOT_THEIRS = {"zero_force_ds_cpu_optimizer": False}


@on_ranks(2, timeout=SECONDS)
def test_stages(rank: int, world: int) -> None:
    check(zero_config(1, zero=HOST, **NOT_THEIRS), rank, world)
    check(zero_config(2, zero=HOST, **NOT_THEIRS, **BF16, **ACCUMULATE), rank, world)
    check(zero_config(3, zero={**HOST, "sub_group_size": 100}, **NOT_THEIRS), rank, world)


def reached(root: object) -> dict[int, Tensor]:
    """The tensors that can be reached from an object, one for each storage."""
    found, seen, todo = {}, set(), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, (type, ModuleType, FunctionType)):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.setdefault(item.untyped_storage()._cdata, item)
        else:  # from tensors, hooks lead to all of DeepSpeed
            todo += gc.get_referents(item)
    return found


@on_ranks(2, timeout=SECONDS)
def test_between_steps_all_state_is_on_the_host(rank: int, world: int) -> None:
    """What an accelerator would hold, counted on a machine without one.

    Every tensor that the optimizer can reach must be memory that DeepSpeed has put on the host (the flat masters, and
    the moments, made like them), or a parameter of the model, or empty, or numbers that a step counts and measures.
    """
    run = Run(zero_config(2, zero=HOST, **NOT_THEIRS))
    for step in range(2):
        run.train_step(step, rank)
    host = [t for flat in run.flats for t in (flat, *run.optimizer.state[flat].values())]
    assert {t.device for t in host} == {torch.device("cpu")}
    known = {t.untyped_storage()._cdata for t in (*host, *run.model.parameters())}
    run.optimizer.grads.clear()  # the test's own
    held = {key: t for key, t in reached(run.optimizer._partitions).items() if key not in known}
    empty = [t for t in held.values() if t.untyped_storage().nbytes() == 0]
    assert len(empty) >= 3 * len(run.optimizer.plans), "the waves' memory was looked at"
    left = sorted(t.untyped_storage().nbytes() for t in held.values())
    assert left[-1] <= 4 * MATRICES, f"more than a number per matrix: {left}"
    assert all(partition.part.grad is None for partition in run.optimizer._partitions.values())
