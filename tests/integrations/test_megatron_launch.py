"""launch.pretrain_megatron on gloo: trains, resumes to the same loss, stops at a nan, names wrong flags in a line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations import megatron_cpu
from tests.integrations.test_megatron_checkpoint import checked
from tests.spawn import run_ranks
from tests.torchrun import TORCHRUN, job

pytestmark = [
    pytest.mark.skipif(not megatron_cpu.available(), reason="megatron-core is not installed"),
    *([pytest.mark.slow] if megatron_cpu.older() else []),
]

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


def test_a_nan_stops_the_job_in_one_line_with_parameter_and_step(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    words = ["tests.integrations.megatron_cpu", "launch.pretrain_megatron", "--config", tmp_path / "run.yaml"]
    words += ["--model", "dense", "--pp", "2", "--lr", "1e30", "--warmup", "0", "--run-dir", tmp_path / "run"]
    with job([*words, "--log-to"], TORCHRUN) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    lines = [line for line in (out + err).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, out + err
    named = (
        r"step 2: gradient of parameter 'embedding\.word_embeddings\.weight' has inf or nan \(\d+ parameters in all\)"
    )
    assert re.search(named, lines[0]), lines


WRONG = {
    "--vpp 2": "--vpp 2: chunks of a stage need stages",
    "--vpp 0": "--vpp 0: must be at least 1",
    "--pp 2 --vpp 3": "4 layers are not a multiple of --pp 2 x --vpp 3",
    "--pp 2 --vpp 2 --accumulation 3": "--accumulation 3: with --vpp it must be a multiple of --pp 2",
    "--tp 2 --pp 2": "2 ranks are not a multiple of --tp 2 x --pp 2",
    "--model dense --ep 2": "--ep and --etp cut experts",
    "--background-saves": "--background-saves: Megatron writes its own files",
    "--bucket-mb 1": "--bucket-mb counts with --overlap",
    "--aligned": "--aligned: megatron-core 0.16",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags_are_named_before_anything_is_built(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core

    from launch.pretrain_megatron import _check_arguments, parse_arguments
    from launch.world import World

    if flags == "--aligned" and not megatron.core.__version__.startswith("0.16"):
        pytest.skip("this megatron-core has layouts")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    with pytest.raises(ValueError, match=re.escape(WRONG[flags])) as error:
        _check_arguments(
            parse_arguments(["--num-hidden-layers", "4", *flags.split()]), World(0, 2, torch.device("cpu"))
        )
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_shim_is_named() -> None:
    from launch.pretrain_megatron import _check_arguments, parse_arguments
    from launch.world import World

    with pytest.raises(ValueError, match=r"wants a GPU .*: without one, start -m tests\.integrations\.megatron_cpu"):
        _check_arguments(parse_arguments([]), World(0, 1, torch.device("cpu")))
