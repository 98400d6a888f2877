"""transformers' Trainer and Accelerate under plain torchrun: equal to torch's optimizers under DDP, saved whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.torchrun import TORCHRUN, run_to_end

ONE = tuple("1" if word == "2" else word for word in TORCHRUN)


def run(kind: str, folder: Path, *flags: object, launcher: tuple[str, ...] = TORCHRUN) -> dict:
    words = ["tests.integrations.huggingface_job", "--kind", kind, "--folder", folder, *flags]
    return run_to_end(words, launcher, limit=150)[0]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["trainer", "accelerate"])
def test_equal_to_torch_under_ddp_and_after_a_resume(kind: str, tmp_path: Path) -> None:
    """Rows 40, 41 and 56: 20 steps with accumulation 4 and clipping; then anew from step 10, on 2 ranks and on 1."""
    reference = {"trainer": "reference", "accelerate": "accelerate-reference"}[kind]
    steps = ("--steps", 20 if kind == "trainer" else 8, "--save", 10 if kind == "trainer" else 4)
    ours, theirs = run(kind, tmp_path / "ours", *steps), run(reference, tmp_path / "theirs", "--steps", steps[1])
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-6) and len(ours["losses"]) == steps[1]
    assert ours["same"], "replicas"
    if kind == "trainer":
        shutil.rmtree(tmp_path / "ours" / "checkpoint-20")
    again = run(kind, tmp_path / "ours", *steps, "--resume")
    assert again["digest"] == ours["digest"] and again["losses"] == ours["losses"][-len(again["losses"]) :]
    if kind == "trainer":
        shutil.rmtree(tmp_path / "ours" / "checkpoint-20")
        alone = run(kind, tmp_path / "ours", *steps, "--resume", launcher=ONE)
        assert alone["losses"] == pytest.approx(again["losses"], abs=2e-2), "as many samples in another order of sums"


def test_bf16_tied_and_checkpointed(tmp_path: Path) -> None:
    """Autocast, a tied head and recomputed activations, against torch's optimizers."""
    flags = ("--steps", 3, "--bf16", "--tied", "--checkpointing")
    ours, theirs = run("trainer", tmp_path / "ours", *flags), run("reference", tmp_path / "theirs", *flags)
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-6)
