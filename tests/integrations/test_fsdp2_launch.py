"""The FSDP2 trainer beside the plain one, and the guide's example."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from launch.loop import train
from launch.metrics import read_metrics
from launch.models import build_model
from launch.pretrain import PlainTrainer
from launch.pretrain import parse_arguments as plain_arguments
from launch.pretrain_fsdp2 import FullyShardedTrainer, parse_arguments
from launch.tensor_parallel import parallelize
from launch.world import World
from tests.checks import on_ranks
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


def validation_losses(run: Path) -> list[float]:
    return [line["val_loss"] for line in read_metrics(run / "metrics.jsonl") if "val_loss" in line]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.timeout(600)  # two worlds, one after the other
def test_every_step_has_the_loss_of_the_plain_trainer(tmp_path: Path) -> None:
    """One rank with four microbatches, and two ranks with two under FSDP2; then others take the checkpoint over.

    They are four ranks, HSDP and FSDP, both times with tensor parallelism.
    """
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    words = [*flags(MOONLIGHT), "--log-to"]
    run_ranks(train_plain, 1, [*words, "--accumulation", "4", "--run-dir", str(plain)], timeout=180)
    words += ["--accumulation", "2", "--checkpoint-interval", "6", "--keep-checkpoints", "9"]
    begin = [*words, "--run-dir", str(sharded), "--save-hf", str(tmp_path / "hf")]
    run_ranks(train_sharded, 2, [begin], timeout=180)
    assert losses(sharded) == pytest.approx(losses(plain), abs=1e-4, rel=0)
    assert losses(sharded)[-1] < losses(sharded)[0] - 0.3
    assert (tmp_path / "hf" / "config.json").exists()
    jobs = []
    for way in (["--replicate", "2"], []):
        run = tmp_path / f"resumed{len(jobs)}"
        shutil.copytree(sharded / "checkpoints" / "step-00000006", run / "checkpoints" / "step-00000006")
        jobs.append([*words, "--tp", "2", *way, "--run-dir", str(run), "--resume"])
    run_ranks(train_sharded, 4, jobs, timeout=180)
    for number in range(len(jobs)):
        run = tmp_path / f"resumed{number}"
        assert losses(run) == pytest.approx(losses(plain)[6:], abs=1e-4, rel=0)
        assert validation_losses(run) == pytest.approx(validation_losses(sharded), abs=1e-4, rel=0)


@on_ranks(2)
def test_tensor_parallel_models_are_the_whole_ones(rank: int, world: int) -> None:
    """Loss and every gradient, of a tied dense model with a vocabulary that does not divide, and of experts."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    latent = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "q_lora_rank": 12}
    dense = {"num_key_value_heads": 2, "head_dim": 4, "tie_word_embeddings": True}
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    for name, sizes in {
        "dense": dense,
        "moonlight": {**latent, "n_routed_experts": 4, "moe_intermediate_size": 8},
    }.items():
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(build_model(name, vocab_size=37, **small, **sizes))
        whole, cut = models
        parallelize(cut, mesh)
        tokens = torch.randint(37, (3, 11), generator=torch.Generator().manual_seed(1))
        for model in models:
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            assert loss.item() == pytest.approx(whole(tokens[:, :-1], tokens[:, 1:]).item(), rel=1e-6)
        ours = dict(cut.named_parameters())
        assert ours.keys() == dict(whole.named_parameters()).keys()
        assert all(isinstance(param, DTensor) for param in ours.values())
        for path, param in whole.named_parameters():
            # A copy's gradient must be the same on both ranks: full_tensor takes this rank's.
            assert torch.allclose(ours[path].grad.full_tensor(), param.grad, rtol=1e-4, atol=1e-6), path
        with pytest.raises(ValueError, match="--tp 3 does not divide num_attention_heads=4"):
            parallelize(whole, SimpleNamespace(size=lambda: 3))


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


@pytest.mark.parametrize("words", [["--tp", "3"], ["--tp", "2", "--replicate", "2"], ["--tp", "0"]])
def test_sizes_that_do_not_divide_the_ranks_are_named(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"--replicate \d x --tp \d does not divide the 2 ranks"):
        FullyShardedTrainer(parse_arguments(words), World(0, 2, torch.device("cpu")))
