"""transformers' Trainer and Accelerate under plain torchrun: equal to torch's optimizers under DDP, saved whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from tests.torchrun import TORCHRUN, run_to_end

ONE = tuple("1" if word == "2" else word for word in TORCHRUN)


def run(folder: Path, *words: object, launcher: tuple[str, ...] = TORCHRUN) -> dict[str, Any]:
    """Results by case."""
    return run_to_end(["tests.integrations.huggingface_job", "--folder", folder, *words], launcher)[0]


def same_losses(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours["losses"] == pytest.approx(theirs["losses"], abs=1e-6)


@pytest.mark.timeout(400)
def test_equal_to_torch_under_ddp_and_after_a_resume(tmp_path: Path) -> None:
    """Rows 40, 41 and 56: 20 steps with accumulation 4 and clipping; then anew from step 10, on 2 ranks and on 1."""
    steps = ("--steps", 20, "--save", 10)
    first = run(tmp_path, *steps, "trainer", "trainer-reference", "accelerate", "accelerate-reference")
    for kind in ("trainer", "accelerate"):
        ours, theirs = first[kind], first[f"{kind}-reference"]
        assert same_losses(ours, theirs) and len(ours["losses"]) == 20
        assert ours["same"], "replicas"
    shutil.rmtree(tmp_path / "trainer" / "checkpoint-20")
    again = run(tmp_path, *steps, "--resume", "trainer", "accelerate")
    for kind in ("trainer", "accelerate"):
        assert again[kind]["digest"] == first[kind]["digest"]
        assert again[kind]["losses"] == first[kind]["losses"][-10:]
    shutil.rmtree(tmp_path / "trainer" / "checkpoint-20")
    alone = run(tmp_path, *steps, "--resume", "trainer", launcher=ONE)["trainer"]
    assert alone["losses"] == pytest.approx(again["trainer"]["losses"], abs=2e-2), "as many samples, other sums"


@pytest.mark.timeout(200)
def test_autocast_tied_heads_recomputation_and_lora(tmp_path: Path) -> None:
    """Against torch's optimizers, three steps each; LoRA leaves the base frozen and trains its thin factors."""
    variants = ("bf16+tied+checkpointing", "lora")
    found = run(tmp_path, "--steps", 3, *(f"trainer{kind}+{v}" for v in variants for kind in ("", "-reference")))
    for variant in variants:
        assert same_losses(found[f"trainer+{variant}"], found[f"trainer-reference+{variant}"])
