"""launch.pretrain_megatron on gloo: trains, checkpoints, and resumes to the same loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations import megatron_cpu
from tests.integrations.test_megatron_checkpoint import checked
from tests.spawn import run_ranks

pytestmark = pytest.mark.skipif(not megatron_cpu.available(), reason="megatron-core is not installed")

CONFIG = """
dtype: fp32
hidden_size: 32
num-hidden-layers: 4
intermediate-size: 64
sequence-length: 16
batch-size: 4
accumulation: 2
steps: 4
warmup: 1
validation-interval: 2
checkpoint-interval: 2
validation-samples: 32
"""
RUNS = {
    "dense TP2 overlap": ["--model", "dense", "--tp", "2", "--overlap"],
    "moonlight EP2": ["--model", "moonlight", "--ep", "2", "--moe-intermediate-size", "32", "--kv-lora-rank", "16"],
}


def run_trainer(rank: int, world: int, folder: str) -> dict[str, Any]:
    megatron_cpu.install()
    return checked(lambda: {name: train_and_resume(rank, world, Path(folder), name) for name in RUNS})


def train_and_resume(rank: int, world: int, folder: Path, name: str) -> dict[str, Any]:
    from megatron.core import parallel_state

    from launch.loop import train
    from launch.pretrain_megatron import MegatronTrainer, parse_arguments
    from launch.world import World

    where = World(rank, world, torch.device("cpu"))
    run, flags = folder / name.replace(" ", "-"), ["--config", str(folder / "run.yaml"), *RUNS[name]]
    whole = train(MegatronTrainer, parse_arguments([*flags, "--run-dir", str(run)]), where)
    parallel_state.destroy_model_parallel()
    if rank == 0:
        shutil.rmtree(run / "checkpoints" / "step-00000004")
        shutil.copy(run / "metrics.jsonl", run / "whole.jsonl")
    where.barrier()
    resumed = train(MegatronTrainer, parse_arguments([*flags, "--run-dir", str(run), "--resume"]), where)
    parallel_state.destroy_model_parallel()
    return {"whole": whole, "resumed": resumed, "run": str(run)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("launch")
    (folder / "run.yaml").write_text(CONFIG)
    return run_ranks(run_trainer, 2, str(folder), timeout=150)[0]


@pytest.mark.parametrize("name", RUNS)
def test_trains_and_resumes_to_the_same_loss(name: str, runs: dict[str, Any]) -> None:
    whole, resumed, run = runs[name]["whole"], runs[name]["resumed"], Path(runs[name]["run"])
    assert resumed["final_val_loss"] == whole["final_val_loss"]
    before, after = (
        [json.loads(line) for line in (run / file).read_text().splitlines()]
        for file in ("whole.jsonl", "metrics.jsonl")
    )
    losses = [line["loss"] for line in before if "loss" in line]
    assert losses == [line["loss"] for line in after if "loss" in line]
    assert losses[-1] < losses[0]
    assert "plan: " in (run / "plan.txt").read_text()
    assert json.loads((run / "results.json").read_text())["steps"] == 4
