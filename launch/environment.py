"""What a run or a measurement was done on and with: machine, versions, commit, hosts."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from launch.world import World

PACKAGES = ("torch", "numpy", "deepspeed", "megatron-core", "emerging-optimizers", "triton", "distributed_muon")


def describe_machine(command: str | None = None) -> dict[str, Any]:
    """CPU, GPU, versions, date and command line.

    Args:
        command: what the user typed; taken from sys.argv if None.
    """
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads_per_rank": torch.get_num_threads(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
        "command": command or " ".join(["python -m", _module(), *sys.argv[1:]]),
    }


def describe_run(world: World, hosts: Sequence[str]) -> dict[str, Any]:
    """`describe_machine` of this rank, with the commit on rank 0, and the number of ranks by host name.

    Args:
        world: all ranks. hosts: of every rank.
    """
    return {**describe_machine(), "commit": commit() if world.main else None, "ranks_by_host": dict(Counter(hosts))}


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else sys.argv[0]


def commit() -> str | None:
    """The commit that this code is checked out at, with "-dirty" where files differ from it; None elsewhere."""
    folder = Path(__file__).parent
    answers = []
    # An installed copy may lie inside somebody else's repository: ask first whether this one tracks it.
    for words in (["ls-files", "--error-unmatch", "__init__.py"], ["describe", "--always", "--dirty", "--abbrev=40"]):
        try:
            answer = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        answers.append(answer.stdout.strip())
    return answers[-1]
