"""A gradient with a nan on one rank: the job ends with the parameter's name, or skips the step and counts it."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launch.metrics import read_metrics
from tests.faults.jobs import EVERY_TRAINER, TINY, trained
from tests.spawn import run_ranks

BAD = 3  # the step
WORDS = [*TINY, "--checkpoint-interval", "99", "--validation-interval", "99"]
# FSDP2 computes with other tensors than the parameters that it shards: there the loss is bad, and with it everything.
NAMED = {"pretrain_fsdp2": r"embed\w*\.weight"}


def with_a_bad_gradient(build: type, rank: int, seen: list[bool]) -> type:
    """The trainer whose third parameter gets a nan on rank 1 in the step `BAD`; `seen`: whether values stayed then."""

    class Bad(build):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.whole: nn.Module = getattr(self, "model", None) or self.chunks[0]
            if rank == 1 and self.kind == "fsdp2":
                self.whole.register_forward_hook(lambda _module, _input, loss: loss * self.factor())
            elif rank == 1:
                third = list(self.whole.parameters())[2]
                third.register_hook(lambda grad: grad * self.factor())

        def factor(self) -> float:
            return float("nan") if self.done == BAD - 1 and self.whole.training else 1.0

        def update(self) -> dict[str, float]:
            before = [p.detach().clone() for p in self.whole.parameters()]
            metrics = super().update()
            same = all(torch.equal(a, b.detach()) for a, b in zip(before, self.whole.parameters(), strict=True))
            assert bool(metrics.get("skipped")) == (self.done == BAD - 1)
            seen.append(same)
            return metrics

    return Bad


def both(rank: int, world: int, trainer: str, folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    seen: list[bool] = []
    change, out = partial(with_a_bad_gradient, rank=rank, seen=seen), io.StringIO()
    ended = trained(rank, world, trainer, [*WORDS, "--steps", 4, "--run-dir", f"{folder}/raise"], change)
    seen.clear()
    skip = [*WORDS, "--nonfinite", "skip", "--run-dir", f"{folder}/skip"]
    with redirect_stdout(out):
        skipped = trained(rank, world, trainer, [*skip, "--steps", 4], change)
        resumed = trained(rank, world, trainer, [*skip, "--steps", 5, "--resume"], change)
    return {"raise": ended, "skip": skipped, "resumed": resumed, "same": seen, "out": out.getvalue()}


@pytest.mark.parametrize("trainer", EVERY_TRAINER)
def test_a_nan_ends_the_job_or_is_skipped_and_counted(trainer: str, tmp_path: Path) -> None:
    one, two = run_ranks(both, 2, trainer, str(tmp_path), timeout=120)
    named = NAMED.get(trainer, r"[\w.]+\.weight")
    number = r"\d+" if trainer == "pretrain_fsdp2" else "1"
    found = rf"gradient of parameter '{named}' has inf or nan \({number} [\w ]+\)"
    way_out = "resume from the last checkpoint with another --lr or --data, or skip such steps with --nonfinite skip"
    for ended in (one["raise"], two["raise"]):
        assert re.fullmatch(f"error: step {BAD}: {found}: the step was not taken; {way_out}", ended), ended
    for report in (one, two):
        assert report["same"] == [False, False, True, False, False]
        assert (report["skip"]["skipped_steps"], report["resumed"]["skipped_steps"]) == (1, 1)
    counts = [m["skipped_steps"] for m in read_metrics(tmp_path / "skip" / "metrics.jsonl") if "skipped_steps" in m]
    assert counts == [0, 0, 1, 1, 1]
    assert f"step {BAD} was skipped: a gradient has inf or nan; 1 skipped so far" in one["out"].splitlines()
