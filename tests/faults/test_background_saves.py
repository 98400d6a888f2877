"""--background-saves: training goes on beside a save, which a resume finds as it finds any other."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from distributed_muon.checkpoint import saving
from tests.faults.jobs import TINY, losses, trained
from tests.spawn import run_ranks

WORDS = [*TINY, "--steps", 6, "--checkpoint-interval", 3, "--validation-interval", 3]


def slow_saves(rank: int, world: int, trainer: str, folder: str) -> tuple[list[bool], Any, Any, list[float]]:
    """Whether the checkpoint of step 3 was there after each step; results of a straight run, and of its second half."""
    whole, again, there = Path(folder, "whole"), Path(folder, "again"), []
    original = saving.write_file

    def slow(*args: Any) -> dict[str, Any]:
        time.sleep(1)
        return original(*args)

    def watching(build: type) -> type:
        class Watching(build):
            def update(self) -> dict[str, float]:
                there.append((whole / "checkpoints" / "step-00000003").exists())
                return super().update()

        return Watching

    saving.write_file = slow
    first = trained(rank, world, trainer, [*WORDS, "--background-saves", "--run-dir", whole], watching)
    saving.write_file = original
    if rank == 0:
        shutil.copytree(whole, again)
        shutil.rmtree(again / "checkpoints" / "step-00000006")
    second = trained(rank, world, trainer, [*WORDS, "--resume", "--run-dir", again])
    return there, first, second, [losses(whole)[n] - losses(again)[n] for n in range(1, 7)]


@pytest.mark.parametrize("trainer", ["pretrain", pytest.param("pretrain_fsdp2", marks=pytest.mark.slow)])
def test_training_goes_on_under_a_save_and_a_resume_from_it_is_bit_equal(trainer: str, tmp_path: Path) -> None:
    for there, first, second, differences in run_ranks(slow_saves, 2, trainer, str(tmp_path), timeout=120):
        assert there[3:5] == [False, False], "steps 4 and 5 waited for the save of step 3"
        assert first["final_val_loss"] == second["final_val_loss"]
        assert differences == [0.0] * 6
    assert sorted(path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000006",
    ]


def refused(rank: int, world: int, trainer: str, folder: str) -> Any:
    return trained(rank, world, trainer, [*WORDS, "--background-saves", "--run-dir", folder])


def test_deepspeed_refuses_it_by_name(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    (line,) = run_ranks(refused, 1, "pretrain_deepspeed", str(tmp_path))
    assert line == "error: --background-saves: DeepSpeed writes its own files; the plain and FSDP2 trainers can"
