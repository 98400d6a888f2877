"""A long run with everything that weeks of training do to it: as torch's optimizers to the bit, and nothing grows."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import tempfile
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from distributed_muon import DistributedMuon, checkpoint
from launch.schedule import warmup_cosine
from tests.reference import ADAMW_SHAPES, MUON_SHAPES, Reference, backward, make_params, rank_gradient
from tests.spawn import run_ranks

STEPS, WORLD = 2000, 3
SHAPES = (*MUON_SHAPES, *ADAMW_SHAPES)
# (ranks, layout, bucket_mb, strategy) between two resumes.
SEGMENTS = (
    (3, "aligned", 0.004, "auto"),
    (2, "flat", None, "home"),
    (1, "bucketed", 0.002, "gather"),
    (3, "bucketed", 0.004, "gather"),
    (2, "aligned", 0.001, "home"),
    (3, "aligned", 0.004, "auto"),
)
LR, DECAY = 0.02, (0.1, 0.01)


class Holder(torch.nn.Module):
    """The parameters as a module."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.muon = torch.nn.ParameterList(make_params(MUON_SHAPES, seed=seed))
        self.adamw = torch.nn.ParameterList(make_params(ADAMW_SHAPES, seed=seed + 1))


def build(seed: int, group: dist.ProcessGroup, layout: str, bucket_mb: float | None, strategy: str):
    """A model and its optimizer."""
    model = Holder(seed)
    groups = [
        {"params": list(model.muon.named_parameters(prefix="muon"))},
        {"params": list(model.adamw.named_parameters(prefix="adamw")), "algorithm": "adamw", "weight_decay": DECAY[1]},
    ]
    options = dict(layout=layout, bucket_mb=bucket_mb, strategy=strategy, process_group=group, ns_form="standard")
    return model, DistributedMuon(groups, lr=LR, weight_decay=DECAY[0], nonfinite="skip", **options)


def gradients(step: int, microbatch: int, rank: int) -> list[torch.Tensor]:
    return [rank_gradient(shape, step * 4 + microbatch, rank, i) for i, shape in enumerate(SHAPES)]


def usage() -> tuple[float, int, int]:
    """MiB resident, open files and threads of this process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is not ours
    process = psutil.Process()
    return process.memory_info().rss / 2**20, len(os.listdir("/proc/self/fd")), process.num_threads()


def one_step(model: Holder, optimizer: DistributedMuon, plan: tuple[int, bool], step: int, rank: int) -> None:
    microbatches, bad = plan
    params = [*model.muon, *model.adamw]
    for microbatch in range(microbatches):
        with optimizer.no_sync() if microbatch < microbatches - 1 else nullcontext():
            grads = gradients(step, microbatch, rank)
            if bad and rank == 0:
                grads[step % len(grads)].view(-1)[0] = torch.inf
            backward(params, grads)
    optimizer.step()
    optimizer.zero_grad()


def reference_step(reference: Reference, plan: tuple[int, bool], step: int, ranks: int) -> None:
    microbatches, bad = plan
    if bad:
        return
    parts = [gradients(step, microbatch, rank) for rank in range(ranks) for microbatch in range(microbatches)]
    reference.step([torch.stack(own).sum(0) / ranks for own in zip(*parts, strict=True)])


def long_run(rank: int, world: int) -> tuple[list[tuple[int, int, float, int, int]], float, int]:
    """(step, ranks, MiB, files, threads) of this rank over time, distance from the reference, skipped steps."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in (1, 2, 3)}
    dice = random.Random(0)
    plans = [(dice.randint(1, 4), dice.random() < 0.03) for _ in range(STEPS)]
    params = make_params(MUON_SHAPES) + make_params(ADAMW_SHAPES, seed=1)
    kinds = ["muon"] * len(MUON_SHAPES) + ["adamw"] * len(ADAMW_SHAPES)
    adamw = dict(lr=LR, weight_decay=DECAY[1], betas=(0.9, 0.95), eps=1e-8)
    reference = Reference(list(zip(params, kinds, strict=True)), dict(lr=LR, weight_decay=DECAY[0]), adamw)
    seen, distance = [], 0.0
    cuts = [STEPS * i // len(SEGMENTS) for i in range(len(SEGMENTS) + 1)]
    for number, (ranks, *how) in enumerate(SEGMENTS):
        if rank < ranks:
            model, optimizer = build(number, groups[ranks], *how)
            if number:
                assert checkpoint.load(Path(folder[0], str(number)), model, optimizer) == {"step": cuts[number]}
        for step in range(cuts[number], cuts[number + 1]):
            rate = LR * warmup_cosine(step, STEPS, 50, 0.1)
            if rank < ranks:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                one_step(model, optimizer, plans[step], step, rank)
            if rank == 0:
                for group in reference.groups():
                    group["lr"] = rate
                reference_step(reference, plans[step], step, ranks)
            if (step + 1) % 111 == 0:
                seen.append((step + 1, ranks, *usage()))
        if rank < ranks:
            if rank == 0:
                ours = [*model.muon, *model.adamw]
                pairs = zip(ours, reference.params, strict=True)
                distance = max(distance, *(float((a - b).detach().abs().max()) for a, b in pairs))
            save = checkpoint.save(
                Path(folder[0], str(number + 1)), model, optimizer, {"step": cuts[number + 1]}, wait=False
            )
            save.wait()
            optimizer.close()
            del model, optimizer, save
        dist.barrier()
    return seen, distance, sum(bad for _, bad in plans)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_steps_and_five_resumes_equal_the_reference_and_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "50")  # torch's flight recorder fills for 2,000 steps
    results = run_ranks(long_run, WORLD, timeout=1700)
    for rank, (seen, distance, skipped) in enumerate(results):
        print(f"rank {rank}: distance from the reference {distance}, {skipped} of {STEPS} steps skipped")
        for step, ranks, memory, files, threads in seen:
            print(f"  step {step} on {ranks} ranks: {memory:.1f} MiB, {files} files, {threads} threads")
        assert distance == 0.0
        assert 20 < skipped < 200
        # Between steps of the same number of ranks, the first of which are a warm-up.
        for ranks in (3, 2, 1):
            same = [line for line in seen if line[1] == ranks]
            assert {line[3] for line in same[1:]} == {same[1][3]}, "open files"
            assert {line[4] for line in same[1:]} == {same[1][4]}, "threads"
        # From the first step after all sizes had their turn; every new one fetches some memory that is kept.
        settled = next(line for line in seen if line[0] > STEPS // 2)
        assert seen[-1][2] - settled[2] < 2, f"memory grows from {settled[2]} to {seen[-1][2]} MiB"
