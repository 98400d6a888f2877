"""Jobs of several ranks as users start them: torchrun (or another launcher) as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from json import loads
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Frozen: with another text two experts may tie, and the trainers then part by what they round differently.
CORPUS = ROOT / "tests" / "corpus.txt"
# Of a model and its run, small enough for seconds; the first is of every model.
TINY_SIZES: dict[str, object] = {
    "--hidden-size": 32,
    "--num-attention-heads": 2,
    "--intermediate-size": 48,
    "--sequence-length": 32,
    "--batch-size": 4,
    "--validation-samples": 8,
    "--warmup": 2,
}
TINY_DENSE = {"--model": "dense", "--num-hidden-layers": 1, "--head-dim": 16, **TINY_SIZES}
TORCHRUN = ("torchrun", "--standalone", "--nproc_per_node", "2", "-m")


def flags(options: dict[str, object]) -> list[str]:
    """{"--steps": 6} as words of a command line."""
    return [str(word) for item in options.items() for word in item]


@contextmanager
def job(words: Sequence[object], launcher: Sequence[str] = TORCHRUN) -> Iterator[subprocess.Popen[str]]:
    """A job in a process group of its own, of which nothing is left afterwards.

    Args:
        words: module and flags. launcher: a program of this environment, and its flags.
    """
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name(launcher[0])), *launcher[1:], *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for number in [*ranks_of(process), *([process.pid] if process.poll() is None else [])]:
            os.kill(number, signal.SIGKILL)
        process.communicate()


def run_to_end(words: Sequence[object], launcher: Sequence[str] = TORCHRUN, limit: float = 150) -> tuple[Any, str]:
    """Run a job that has to succeed within `limit` seconds; the JSON it prints last, and all it prints."""
    with job(words, launcher) as process:
        out, err = process.communicate(timeout=limit)
        assert process.returncode == 0, out + err
    # Launchers prefix lines, and print after the ranks.
    found = (re.fullmatch(r"\{.*\}|\[[\d., ]+\]", line) for line in reversed(out.splitlines()))
    return loads(next(match for match in found if match)[0]), out


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process numbers of the ranks that the launcher started and that have not ended."""
    file = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        return [number for number in map(int, file.read_text().split()) if alive(number)]
    except (FileNotFoundError, ProcessLookupError):
        return []


def alive(number: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
