"""The DeepSpeed trainer as users start it: under torchrun, then resumed under the deepspeed launcher."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from launch.metrics import read_metrics
from launch.pretrain_deepspeed import CONFIG, parse_arguments
from tests.torchrun import CORPUS, flags, run_to_end

pytestmark = [
    pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed: see the README"),
    pytest.mark.timeout(300),
]

LIMIT = 200  # seconds for one job
SIZES = {
    "--model": "moonlight",
    "--num-hidden-layers": 2,
    "--kv-lora-rank": 16,
    "--qk-nope-head-dim": 8,
    "--qk-rope-head-dim": 8,
    "--v-head-dim": 16,
    "--n-routed-experts": 4,
    "--moe-intermediate-size": 16,
    "--hidden-size": 32,
    "--num-attention-heads": 2,
    "--intermediate-size": 48,
    "--sequence-length": 32,
    "--batch-size": 4,
    "--accumulation": 2,
    "--validation-samples": 8,
    "--warmup": 2,
    "--lr": 0.01,
    "--steps": 6,
    "--checkpoint-interval": 3,
    "--log-interval": 2,
    "--data": CORPUS,
}
JOB = ["launch.pretrain_deepspeed", *flags(SIZES)]


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line}


@pytest.mark.slow
def test_torchrun_and_the_deepspeed_launcher_continue_each_other(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    results, _ = run_to_end([*JOB, "--run-dir", first], limit=LIMIT)
    assert (results["steps"], results["skipped_steps"], results["zero_stage"]) == (6, 0, 1)
    assert losses(first)[6] < losses(first)[1] - 0.2
    assert "matrices over 2 ranks" in (first / "plan.txt").read_text()
    assert (first / "loss.png").exists()

    shutil.copytree(first, second)
    shutil.rmtree(second / "checkpoints" / "step-00000006")
    launcher = ["deepspeed", "--num_accelerators", "2", "--module"]
    resumed, _ = run_to_end([*JOB, "--run-dir", second, "--resume"], launcher, LIMIT)
    assert losses(second) == losses(first)
    assert resumed["final_val_loss"] == results["final_val_loss"]
    assert sorted(p.name for p in (second / "checkpoints").glob("step-*")) == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"bf16": {"enabled": True}}, "bf16 is decided"), ({"train_batch_size": 8}, "train_batch_size is decided")],
)
def test_what_flags_decide_is_refused_in_the_file(tmp_path: Path, capsys, change: dict, named: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(CONFIG.read_text()), **change}))
    with pytest.raises(SystemExit):
        parse_arguments(["--deepspeed-config", str(file)])
    assert named in capsys.readouterr().err


def test_ready_configs_are_accepted() -> None:
    from distributed_muon.integrations.deepspeed import check_config

    for file in sorted(CONFIG.parent.glob("deepspeed_zero*.json")):
        args = parse_arguments(["--deepspeed-config", str(file), "--clip", "0.5", "--dtype", "fp32"])
        check_config(args.deepspeed)
        assert args.deepspeed["gradient_clipping"] == 0.5
        assert args.deepspeed["bf16"] == {"enabled": False}
    check_config(json.loads((CONFIG.parent / "deepspeed_hf.json").read_text()))


@pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("accelerate")), reason="transformers and accelerate are not installed"
)
def test_hugging_face_trainer(tmp_path: Path) -> None:
    job = ["launch.hf_trainer_deepspeed", "--output-dir", tmp_path, "--steps", 12, "--hidden-size", 32]
    data = ["--data", CORPUS]
    (first, *_, last), _ = run_to_end([*job, *data], limit=LIMIT)
    assert last < first - 0.5
