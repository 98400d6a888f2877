"""What is wrong with a run directory when a job starts in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launch import run_lock
from launch.run_dir import RunDirectory
from launch.run_lock import RunLock
from launch.world import World
from tests.spawn import run_ranks
from tests.torchrun import ROOT

ONE = World(0, 1, torch.device("cpu"))
HOLD = """
import sys, time
from pathlib import Path
from launch.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that works in this directory."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def started(rank: int, world: int, folder: str) -> str:
    try:
        RunDirectory(Path(folder), World(rank, world, torch.device("cpu")), 2).start("auto")
    except ValueError as error:
        return str(error)
    return ""


def test_a_second_job_in_a_run_directory_is_refused_until_the_first_is_gone(
    other: subprocess.Popen[str], tmp_path: Path
) -> None:
    """On all ranks, although one of them looks; a lock does not outlive a kill -9."""
    one, two = run_ranks(started, 2, str(tmp_path))
    assert one == two
    assert one.startswith(
        f"--run-dir {tmp_path} is in use by another job (process {other.pid} on {os.uname().nodename}, "
    )
    assert one.endswith("): wait for its end, or name another")
    other.kill()
    other.wait()
    assert run_ranks(started, 2, str(tmp_path)) == ["", ""]


def test_a_file_system_without_locks_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)
    RunLock(tmp_path).release()
    assert f"note: {tmp_path} cannot be locked (Function not implemented)" in capsys.readouterr().out


def test_a_directory_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    tmp_path.parent.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write everywhere
    try:
        with pytest.raises(ValueError, match=r"^--run-dir .*mine cannot be written to \(Permission denied\): name "):
            RunDirectory(tmp_path / "mine", ONE, 2).start(None)
    finally:
        os.seteuid(user)
