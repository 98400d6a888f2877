"""A run that is resumed with other options says what changes and what the checkpoint keeps; sizes are refused."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from launch.resumption import differences, kept_options, read_settings
from tests.faults.jobs import EVERY_TRAINER, TINY, trained
from tests.spawn import run_ranks

OTHERS = ["--lr", "0.02", "--seed", "3", "--weight-decay", "0.3"]


def resumed(rank: int, world: int, trainer: str, folder: str) -> tuple[list[str], Any, list[str]]:
    """Lines of a resume with other options; how one with other sizes ends; lines of one with the same options."""
    words = [*TINY, "--run-dir", folder, "--validation-interval", 99]
    trained(rank, world, trainer, [*words, "--steps", 1])
    lines = []
    for more in (OTHERS, OTHERS):
        with redirect_stdout(io.StringIO()) as out:
            trained(rank, world, trainer, [*words, "--steps", 2, "--resume", *more])
        lines.append([line for line in out.getvalue().splitlines() if "other options" in line])
    sizes = trained(rank, world, trainer, [*words, "--steps", 3, "--resume", "--hidden-size", 64, "--head-dim", 32])
    return lines[0], sizes, lines[1]


@pytest.mark.parametrize("trainer", EVERY_TRAINER)
def test_options_that_a_resume_changes_keeps_or_refuses_are_told(trainer: str, tmp_path: Path) -> None:
    ((line,), refused, again) = run_ranks(resumed, 1, trainer, str(tmp_path), timeout=120)[0]
    assert line.startswith("note: resumed with other options: changed ")
    changed, _, kept = line.partition("; kept from the checkpoint ")
    assert "--lr 0.01 -> 0.02" in changed and "--seed 0 -> 3" in changed and "--steps 1 -> 2" in changed
    if trainer == "pretrain_megatron":  # whose groups are others under another lr
        assert "--weight-decay 0.1 -> 0.3" in changed and not kept
    else:
        assert kept == "--weight-decay 0.1 (0.3 was given)"
    assert refused == ("error: --hidden-size is 64, in the run that is resumed 32: give the same, or another --run-dir")
    # The settings that are written down are those of the resumed job; what the checkpoint keeps is told every time.
    assert again == (
        [] if trainer == "pretrain_megatron" else [line.partition("changed")[0] + "kept" + line.partition("kept")[2]]
    )


def test_the_line_of_what_differs() -> None:
    before = {"lr": 1, "seed": 2, "run_dir": "a", "world_size": 2, "momentum": 0.9}
    assert differences(before, before, {}) is None
    assert differences({}, before, {}) is None
    now = {"lr": 1, "seed": 3, "run_dir": "b", "world_size": 3, "momentum": 0.8, "new": 1}
    kept = kept_options([{"momentum": 0.8}, {"momentum": 0.8}], [{"momentum": 0.9}, {"momentum": 0.9}])
    assert differences(before, now, kept) == (
        "note: resumed with other options: changed --seed 2 -> 3, ranks 2 -> 3; "
        "kept from the checkpoint --momentum 0.9 (0.8 was given)"
    )


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_settings_that_cannot_be_read_are_no_obstacle(content: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    assert read_settings(file) == {}
    file.write_text(content)
    assert read_settings(file) == {}
    file.write_text(json.dumps({"lr": 1}))
    assert read_settings(file) == {"lr": 1}
