"""Jobs that are killed, interrupted or run out of disk: they end soon, say why, and a resume is bit-equal."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from launch.run_dir import RunDirectory
from launch.world import World
from tests.faults.jobs import TINY, losses, printed, trained
from tests.integrations import megatron_cpu
from tests.spawn import run_ranks
from tests.torchrun import ROOT, alive, job, ranks_of

LIMIT = 120  # seconds for one job
pytestmark = pytest.mark.timeout(300)
ONE = World(0, 1, torch.device("cpu"))
SIX = [*TINY, "--steps", 6, "--checkpoint-interval", 2, "--keep-checkpoints", 9, "--validation-interval", 99]


def steps_of(run: Path) -> list[int]:
    return [step for step, _ in RunDirectory(run, ONE, 9).checkpoints()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a fault."""
    run = tmp_path_factory.mktemp("straight")
    run_ranks(trained, 2, "pretrain", [*SIX, "--run-dir", run], timeout=LIMIT)
    return run


def without_its_last_checkpoint(run: Path, target: Path) -> Path:
    shutil.copytree(run, target)
    shutil.rmtree(target / "checkpoints" / "step-00000006")
    return target


@pytest.mark.parametrize(
    ("place", "step", "whole"),
    [
        pytest.param("backward", 4, [2], marks=pytest.mark.slow),
        pytest.param("exchange", 5, [2, 4], marks=pytest.mark.slow),
        ("save", 4, [2]),
    ],
)
def test_a_rank_killed_anywhere_ends_the_job_and_a_resume_is_bit_equal(
    place: str, step: int, whole: list[int], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", f"kill {place} {step}")
    begin = time.monotonic()
    with job(["tests.faults.faulty", *SIX, "--run-dir", tmp_path]) as process:
        _, err = process.communicate(timeout=LIMIT)
        assert process.returncode != 0
    print(f"ended {time.monotonic() - begin:.0f} s after the start")
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert len(lines) <= 1, lines  # one of the rank that lost its peer; torchrun may be the first to notice
    assert re.search(r"exitcode *: -9|Signal 9 \(SIGKILL\)|peer", err)
    assert steps_of(tmp_path) == whole
    run_ranks(trained, 2, "pretrain", [*SIX, "--resume", "--run-dir", tmp_path], timeout=LIMIT)
    assert losses(tmp_path) == losses(straight)
    assert steps_of(tmp_path)[-1] == 6
    assert not list((tmp_path / "checkpoints").glob("*.unfinished"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_long_save_loses_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save comes to its end, and so does the job, with a checkpoint of its last step."""
    monkeypatch.setenv("FAULT", "slow 3")
    words = [*TINY, "--steps", 100_000, "--checkpoint-interval", 2, "--validation-interval", 99, "--run-dir", tmp_path]
    with job(["tests.faults.faulty", *words]) as process:
        deadline = time.monotonic() + LIMIT
        while not (tmp_path / "checkpoints" / "step-00000002.unfinished").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        ranks = ranks_of(process)
        time.sleep(0.5)
        assert not steps_of(tmp_path)
        begin = time.monotonic()
        os.killpg(process.pid, number)
        out, _ = process.communicate(timeout=LIMIT)
        print(f"ended {time.monotonic() - begin:.0f} s after the signal")
    assert not any(alive(rank) for rank in ranks)
    assert steps_of(tmp_path)[-1] == max(losses(tmp_path)) <= 3
    assert f"stopped after step {steps_of(tmp_path)[-1]}; continue with --resume" in out


@pytest.mark.slow
def test_a_full_disk_ends_the_job_with_one_line_and_the_last_checkpoint_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "full 3")
    command = [sys.executable, "-m", "tests.faults.faulty", *map(str, [*SIX, "--run-dir", tmp_path])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: rank 0 on .*: OSError: checkpoint .*/step-00000004 was not saved, an older one ", line)
    assert "File too large" in line and line.endswith(f"(traceback: {tmp_path}/errors/rank-0.txt)")
    assert steps_of(tmp_path) == [2] and not list((tmp_path / "checkpoints").glob("*.unfinished"))
    whole = tmp_path / "whole"
    run_ranks(trained, 1, "pretrain", [*SIX, "--run-dir", whole], timeout=LIMIT)
    run_ranks(trained, 1, "pretrain", [*SIX, "--resume", "--run-dir", tmp_path], timeout=LIMIT)
    assert losses(tmp_path) == losses(whole)


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(straight: Path, tmp_path: Path) -> None:
    run = without_its_last_checkpoint(straight, tmp_path / "run")
    file = run / "checkpoints" / "step-00000004" / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    lines = run_ranks(printed, 2, "pretrain", [*SIX, "--run-dir", run, "--resume"], timeout=LIMIT)[0]
    (line,) = (line for line in lines if line.startswith("warning"))
    assert "step-00000004 is damaged: rank-00001.safetensors has another checksum" in line
    assert "it is step-00000004.damaged now, an older one is tried" in line
    assert losses(run) == losses(straight)


def test_garbage_in_metrics_is_dropped_with_a_note(straight: Path, tmp_path: Path) -> None:
    run = without_its_last_checkpoint(straight, tmp_path / "run")
    file = run / "metrics.jsonl"
    first, *others = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(
        b"".join([first, b"\xff\x00\xfe\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "x"}\n', *others, b'{"st'])
    )
    lines = run_ranks(printed, 2, "pretrain", [*SIX, "--run-dir", run, "--resume"], timeout=LIMIT)[0]
    assert f"note: 5 lines of {file} are no metrics and were dropped" in lines
    assert losses(run) == losses(straight)


@pytest.mark.parametrize(
    ("trainer", "damaged"),
    [
        pytest.param(
            *("pretrain_deepspeed", "*optim_states.pt"),
            marks=pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed"),
        ),
        pytest.param(
            *("pretrain_megatron", "*.distcp"),
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not megatron_cpu.available(), reason="megatron-core is not installed"),
            ],
        ),
    ],
)
def test_a_damaged_checkpoint_of_another_framework_is_named_and_the_one_before_goes_on(
    trainer: str, damaged: str, tmp_path: Path
) -> None:
    words = [*SIX, "--run-dir", tmp_path]
    run_ranks(trained, 2, trainer, words, timeout=LIMIT)
    whole = losses(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000006")
    file = sorted((tmp_path / "checkpoints" / "step-00000004").glob(damaged))[-1]
    os.truncate(file, 100)
    lines = run_ranks(printed, 2, trainer, [*words, "--resume"], timeout=LIMIT)[0]
    (line,) = (line for line in lines if line.startswith("warning"))
    assert f"step-00000004 is damaged: {file.name} has 100 of " in line
    assert losses(tmp_path) == whole
