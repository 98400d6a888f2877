"""What a measurement was taken on and with: written into every result."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib import metadata
from typing import Any

import torch

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


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else sys.argv[0]
