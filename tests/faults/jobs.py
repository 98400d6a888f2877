"""Small runs of the trainers inside ranks of `tests.spawn`."""

from __future__ import annotations

import io
import multiprocessing
import os
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.metrics import read_metrics
from tests.integrations import megatron_cpu
from tests.torchrun import CORPUS, TINY_DENSE, flags

TINY = [*flags({**TINY_DENSE, "--lr": 0.01, "--data": CORPUS}), "--log-to"]
TRAINERS = {
    "pretrain": "PlainTrainer",
    "pretrain_fsdp2": "FullyShardedTrainer",
    "pretrain_deepspeed": "DeepSpeedTrainer",
    "pretrain_megatron": "MegatronTrainer",
}
_NEEDS = {"pretrain_deepspeed": find_spec("deepspeed"), "pretrain_megatron": megatron_cpu.available()}
_MARKS = {"pretrain_megatron": [pytest.mark.slow]}
EVERY_TRAINER = [
    pytest.param(
        name, marks=[pytest.mark.skipif(not _NEEDS.get(name, True), reason="not installed"), *_MARKS.get(name, [])]
    )
    for name in TRAINERS
]


def trained(
    rank: int, world: int, trainer: str, words: list[Any], change: Callable[[type], type] | None = None
) -> dict[str, Any] | str | None:
    """One run on this rank of an open world: its results, None after a stop, or the error line it ends with.

    Args:
        trainer: module of `launch`. words: its command line. change: makes another class of the trainer's.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    if trainer == "pretrain_megatron":
        _install_megatron()
    from launch.loop import train
    from launch.world import World

    module = import_module(f"launch.{trainer}")
    build = getattr(module, TRAINERS[trainer])
    try:
        args = module.parse_arguments([*map(str, words)])
        return train(change(build) if change else build, args, World(rank, world, torch.device("cpu")))
    except SystemExit as error:
        return str(error.code)
    finally:
        if trainer == "pretrain_megatron":
            from megatron.core import parallel_state

            with suppress(Exception):
                parallel_state.destroy_model_parallel()


def printed(rank: int, world: int, trainer: str, words: list[Any]) -> list[str]:
    """What one run prints on this rank, as lines; it has to come to its end."""
    with redirect_stdout(io.StringIO()) as out:
        ended = trained(rank, world, trainer, words)
    assert isinstance(ended, dict), ended
    return out.getvalue().splitlines()


@cache
def _install_megatron() -> None:
    megatron_cpu.install()
    multiprocessing.current_process()._config["daemon"] = False  # dist_checkpointing has helper processes


def losses(run: Path) -> dict[int, float]:
    """By step."""
    return {line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line}
