"""The three trainers are one: from the same seed, on the same data, every step has the same loss."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from launch.metrics import read_metrics
from launch.models import MODELS as registry
from launch.models import build_model
from launch.models.huggingface import save
from launch.models.layers import RopeScaling
from launch.pretrain_deepspeed import CONFIG
from tests.integrations import megatron_cpu
from tests.integrations.test_megatron_checkpoint import checked
from tests.spawn import run_ranks
from tests.torchrun import CORPUS, flags

STEPS = 50
COMMON = {
    "--dtype": "fp32",
    "--num-hidden-layers": 2,
    "--hidden-size": 32,
    "--num-attention-heads": 4,
    "--intermediate-size": 48,
    "--sequence-length": 32,
    "--batch-size": 4,
    "--accumulation": 2,
    "--steps": STEPS,
    "--warmup": 5,
    "--lr": 0.01,
    "--clip": 0.5,
    "--validation-samples": 8,
    "--data": CORPUS,
}
MODELS = {
    "dense": {"--model": "dense", "--num-key-value-heads": 2, "--head-dim": 8, **COMMON},
    "moonlight": {
        "--model": "moonlight",
        "--kv-lora-rank": 16,
        "--qk-nope-head-dim": 8,
        "--qk-rope-head-dim": 4,
        "--v-head-dim": 8,
        "--n-routed-experts": 4,
        "--moe-intermediate-size": 16,
        **COMMON,
    },
}
# What the checkpoints of Llama 3.1 and DeepSeek-V3 have and the trainers' own models have not.
LIKE_PUBLISHED = {
    "dense": {"rope_scaling": RopeScaling("llama3", 8.0, 8192)},
    "moonlight": {"q_lora_rank": 24, "n_group": 2, "topk_group": 1},
}
PARALLEL = {
    "dense TP2": ("--tp", "2"),
    "dense PP2": ("--pp", "2"),
    "moonlight TP2": ("--tp", "2"),
    "moonlight EP2": ("--ep", "2", "--accumulation", "1"),  # on two data-parallel ranks
}
OTHERS = {
    "pretrain_deepspeed": pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed"),
    "pretrain_megatron": pytest.mark.skipif(not megatron_cpu.available(), reason="megatron-core is not installed"),
}


CLASSES = {
    "pretrain": "PlainTrainer",
    "pretrain_deepspeed": "DeepSpeedTrainer",
    "pretrain_megatron": "MegatronTrainer",
}


def train_here(rank: int, world: int, trainer: str, words: list[str]) -> None:
    if trainer == "pretrain_megatron":
        megatron_cpu.install()
    os.environ["DS_ACCELERATOR"] = "cpu"
    from launch.loop import train
    from launch.world import World

    module = import_module(f"launch.{trainer}")
    args = module.parse_arguments(words)
    checked(lambda: train(getattr(module, CLASSES[trainer]), args, World(rank, world, torch.device("cpu"))))


def curve(folder: Path, trainer: str, options: dict[str, object], world: int = 1, *more: str) -> list[float]:
    """Losses of all steps."""
    run = folder / trainer
    if trainer == "pretrain_deepspeed":
        config = json.loads(CONFIG.read_text())
        config["distributed_muon"]["ns_dtype"] = "float32"
        (folder / "deepspeed.json").write_text(json.dumps(config))
        more += ("--deepspeed-config", str(folder / "deepspeed.json"))
    else:
        more += ("--ns-dtype", "fp32")
    words = [*flags(options), "--run-dir", str(run), "--checkpoint-interval", str(STEPS), "--log-to", *more]
    run_ranks(train_here, world, trainer, words, timeout=120)
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return {name: curve(tmp_path_factory.mktemp("plain"), "pretrain", options) for name, options in MODELS.items()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("trainer", [pytest.param(name, marks=mark) for name, mark in OTHERS.items()])
def test_every_step_has_the_loss_of_the_plain_trainer(
    trainer: str, model: str, plain: dict[str, list[float]], tmp_path: Path
) -> None:
    losses = curve(tmp_path, trainer, MODELS[model])
    assert len(losses) == len(plain[model]) == STEPS
    assert losses == pytest.approx(plain[model], abs=1e-4, rel=0)
    assert losses[-1] < losses[0] - 1


@OTHERS["pretrain_megatron"]
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "dense PP2" else pytest.mark.slow) for name in PARALLEL]
)
def test_cut_models_start_from_the_same_weights(name: str, plain: dict[str, list[float]], tmp_path: Path) -> None:
    model = name.split()[0]
    losses = curve(tmp_path, "pretrain_megatron", MODELS[model], 2, *PARALLEL[name])
    # Megatron's own MLA modules lose gradient under TP (the trainer says so): the first loss tells the weights.
    steps = 1 if name == "moonlight TP2" else STEPS
    assert losses[:steps] == pytest.approx(plain[model][:steps], abs=1e-5, rel=0)


@pytest.mark.parametrize("model", [pytest.param("dense", marks=pytest.mark.slow), "moonlight"])
def test_a_checkpoint_starts_all_of_them(model: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    known = {field.name for field in fields(registry[model][0])}
    sizes = {flag[2:].replace("-", "_"): value for flag, value in MODELS[model].items()}
    plain_model = build_model(
        model, vocab_size=384, **{key: size for key, size in sizes.items() if key in known}, **LIKE_PUBLISHED[model]
    )
    save(plain_model, tmp_path / "checkpoint")
    size_flags = {f"--{name.replace('_', '-')}" for name in known}
    options = {flag: value for flag, value in MODELS[model].items() if flag not in size_flags}
    options |= {"--steps": 3, "--init-from": tmp_path / "checkpoint"}
    first = curve(tmp_path, "pretrain", options)
    for trainer, mark in OTHERS.items():
        if not mark.args[0]:
            assert curve(tmp_path, trainer, options) == pytest.approx(first, abs=1e-5, rel=0), trainer
