"""The FSDP2 trainer beside the plain one, and the guide's example."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from launch.loop import train
from launch.metrics import read_metrics
from launch.pretrain import PlainTrainer
from launch.pretrain import parse_arguments as plain_arguments
from launch.pretrain_fsdp2 import FullyShardedTrainer, parse_arguments
from launch.world import World
from tests.spawn import run_ranks
from tests.torchrun import CORPUS, flags

STEPS = 12
MOONLIGHT = {
    "--model": "moonlight",
    "--dtype": "fp32",
    "--ns-dtype": "fp32",
    "--num-hidden-layers": 2,
    "--hidden-size": 32,
    "--num-attention-heads": 4,
    "--intermediate-size": 48,
    "--kv-lora-rank": 16,
    "--qk-nope-head-dim": 8,
    "--qk-rope-head-dim": 4,
    "--v-head-dim": 8,
    "--n-routed-experts": 4,
    "--moe-intermediate-size": 16,
    "--sequence-length": 32,
    "--batch-size": 4,
    "--warmup": 5,
    "--lr": 0.01,
    "--clip": 0.5,
    "--validation-samples": 9,
    "--data": CORPUS,
    "--steps": STEPS,
}


def train_plain(rank: int, world: int, words: list[str]) -> None:
    train(PlainTrainer, plain_arguments(words), World(rank, world, torch.device("cpu")))


def train_sharded(rank: int, world: int, jobs: list[list[str]]) -> None:
    for words in jobs:
        train(FullyShardedTrainer, parse_arguments(words), World(rank, world, torch.device("cpu")))


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.timeout(600)  # two worlds, one after the other
def test_every_step_has_the_loss_of_the_plain_trainer(tmp_path: Path) -> None:
    """One rank with four microbatches, and two ranks with two under FSDP2; then HSDP takes the checkpoint over."""
    plain, sharded, resumed = tmp_path / "plain", tmp_path / "sharded", tmp_path / "resumed"
    words = [*flags(MOONLIGHT), "--log-to"]
    run_ranks(train_plain, 1, [*words, "--accumulation", "4", "--run-dir", str(plain)], timeout=180)
    words += ["--accumulation", "2", "--checkpoint-interval", "6", "--keep-checkpoints", "9"]
    begin = [*words, "--run-dir", str(sharded), "--save-hf", str(tmp_path / "hf")]
    run_ranks(train_sharded, 2, [begin], timeout=180)
    assert losses(sharded) == pytest.approx(losses(plain), abs=1e-4, rel=0)
    assert losses(sharded)[-1] < losses(sharded)[0] - 0.3
    assert (tmp_path / "hf" / "config.json").exists()
    (resumed / "checkpoints").mkdir(parents=True)
    (sharded / "checkpoints" / "step-00000006").rename(resumed / "checkpoints" / "step-00000006")
    run_ranks(train_sharded, 2, [[*words, "--replicate", "2", "--run-dir", str(resumed), "--resume"]], timeout=180)
    assert losses(resumed) == pytest.approx(losses(plain)[6:], abs=1e-4, rel=0)


def run_example(rank: int, world: int) -> tuple[float, float]:
    page = (Path(__file__).parents[2] / "docs" / "fsdp2.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[:1]
    torch.manual_seed(0)
    names: dict[str, object] = {}
    start = "torch.distributed.init_process_group()  # under torchrun\n"
    assert start in code
    exec(code.replace(start, ""), names)  # run_ranks has started it
    x = torch.randn(512, 64)
    with torch.no_grad():
        after = (names["model"](x) - x).square().mean().item()
    torch.manual_seed(0)
    nn = torch.nn
    before = (nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))(x) - x).square().mean().item()
    return before, after


def test_the_guides_example_trains() -> None:
    for before, after in run_ranks(run_example, 2, timeout=180):
        assert after < 0.9 * before
