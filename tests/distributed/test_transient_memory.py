"""What a step allocates beyond the state: bounded by two buckets and two waves, whatever the size of the model."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch
from torch import nn

from distributed_muon import DistributedMuon
from distributed_muon.layout import memory
from distributed_muon.layout.plan import make_plan
from perf.memory import transient_bytes
from tests.checks import on_ranks

LAYER = ((128, 128), (128, 128), (512, 128), (128, 512))
WAVE = 256 << 10  # bytes of bf16 matrices a home takes at a time: two layers on two ranks
BUCKET_MB = 0.5
TRANSIENT_WAVES = 7  # on two ranks, where half of each matrix lies at its home, and on a CPU, without a stage


def step_bytes(layers: int, rank: int, reduce_dtype: torch.dtype, strategy: str) -> tuple[int, DistributedMuon]:
    """Transient bytes of the second step of a model of so many layers."""
    params = [nn.Parameter(torch.randn(shape) * 0.02) for shape in LAYER * layers]
    for param in params:
        torch.distributed.broadcast(param.data, 0)
    small_waves = mock.patch("distributed_muon.engine.step.make_plan", partial(make_plan, wave_bytes=WAVE))
    small_batches = mock.patch.dict(memory.BATCH_NUMEL, {"cpu": WAVE // 8})  # as small beside a wave as usual
    with small_waves:
        ours = DistributedMuon(params, bucket_mb=BUCKET_MB, reduce_dtype=reduce_dtype, strategy=strategy)
    for _ in range(2):
        ours.zero_grad()
        for param in params:
            param.grad = torch.randn_like(param)
        with small_batches:
            peak = transient_bytes(ours.step, torch.device("cpu"))
    return peak, ours


@on_ranks(2)
def test_peak_of_a_step_does_not_grow_with_the_model(rank: int, world: int) -> None:
    for reduce_dtype, strategy in ((torch.float32, "home"), (torch.bfloat16, "gather")):
        small, ours = step_bytes(6, rank, reduce_dtype, strategy)
        large, more = step_bytes(18, rank, reduce_dtype, strategy)
        assert len(more.plan.waves) >= 3 * len(ours.plan.waves) - 2 >= 7 and len(more._buckets) > 12
        bucket = max(bucket.spec.numel for bucket in more._buckets) * 4
        # Two buckets being reduced; or two waves with matrices, wire, fp32 updates and workspaces.
        cap = max(2 * bucket, TRANSIENT_WAVES * WAVE)
        where = f"{reduce_dtype} {strategy}: {small / WAVE:.2f} and {large / WAVE:.2f} waves, cap {cap / WAVE:.2f}"
        assert large <= 1.2 * small, where  # of three times the model
        assert large <= cap, where
