"""offload_optimizer: masters and moments on the host, results as without."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from tests.checks import on_ranks
from tests.integrations.deepspeed_case import Run, zero_config
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


@on_ranks(2, timeout=SECONDS)
def test_between_steps_all_state_is_on_the_host(rank: int, world: int) -> None:
    run = Run(zero_config(2, zero=HOST, **NOT_THEIRS))
    for step in range(2):
        run.train_step(step, rank)
    for partition in run.optimizer._partitions.values():
        held = [partition.flat, partition.part.master, *partition.part.moments.values()]
        held += run.optimizer.state[partition.flat].values()
        assert {tensor.device for tensor in held} == {torch.device("cpu")}
        # What the accelerator holds is the waves' memory, and that only while a step runs.
        slots = [buffer for slot in partition.engine._workspace._slots for buffer in slot]
        assert sum(buffer.untyped_storage().nbytes() for buffer in slots) == 0
        assert partition.part.grad is None
