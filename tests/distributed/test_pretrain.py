"""The trainer as users start it: two ranks under torchrun, resumed, interrupted, and with a rank killed."""

import json
import os
import shutil
import signal
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from launch.data import TokenData
from launch.loop import train
from launch.metrics import read_metrics
from launch.models import (
    MODELS,
    MoonlightConfig,
    build_model,
    cast_parameters,
    huggingface,
    update_expert_bias,
)
from launch.models.moonlight import MixtureOfExperts
from launch.pretrain import PlainTrainer, parse_arguments
from launch.run_dir import RunDirectory
from launch.validation import validation_loss
from launch.world import World
from tests import torchrun
from tests.spawn import run_ranks
from tests.torchrun import CORPUS, alive, flags, ranks_of

LIMIT = 120  # seconds for one job; each takes about six on a quiet machine
DENSE_SIZES = {**torchrun.TINY_DENSE, "--lr": 0.01}
MOONLIGHT_SIZES = {
    "--model": "moonlight",
    "--num-hidden-layers": 2,
    "--kv-lora-rank": 16,
    "--qk-nope-head-dim": 8,
    "--qk-rope-head-dim": 8,
    "--v-head-dim": 16,
    "--n-routed-experts": 4,
    "--moe-intermediate-size": 16,
    **torchrun.TINY_SIZES,
    "--lr": 0.01,
}
TINY_DENSE, TINY = flags(DENSE_SIZES), flags(MOONLIGHT_SIZES)
ONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small corpus, so that no run reads the whole standard library."""
    file = tmp_path_factory.mktemp("data") / "corpus.py"
    file.write_text((CORPUS).read_text())
    return ["--data", str(file)]


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """Runs inside this process take over SIGINT and SIGTERM."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def job(*words):
    """A two-rank job of the tiny model."""
    return torchrun.job(["launch.pretrain", *TINY, *words])


def run_to_end(*words):
    """Run a job that has to succeed; its results and its whole output."""
    return torchrun.run_to_end(["launch.pretrain", *TINY, *words], limit=LIMIT)


def training_ranks(process, run_dir, steps=3):
    """Wait until the job has done a few steps; process numbers of its ranks, in their order."""
    deadline = time.monotonic() + LIMIT
    while len(read_metrics(run_dir / "metrics.jsonl")) < steps:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    return ranks


def losses(run_dir):
    return {line["step"]: line["loss"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line}


def last_validation(run_dir):
    return [line["val_loss"] for line in read_metrics(run_dir / "metrics.jsonl") if "val_loss" in line][-1]


SIX_STEPS = ["--steps", 6, "--checkpoint-interval", 3, "--validation-interval", 4, "--log-interval", 2]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data):
    """Six steps in one go, with a checkpoint after three."""
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    results, out = run_to_end(*data, *SIX_STEPS, "--run-dir", run_dir)
    return run_dir, results, out


def three_steps_of(straight_dir, target):
    """The run directory as it was when the job died after step 4."""
    shutil.copytree(straight_dir, target)
    shutil.rmtree(target / "checkpoints" / "step-00000006")
    lines = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines[:4]))
    return target


def test_a_run_reports_and_leaves_its_files(straight):
    run_dir, results, out = straight
    assert {"final_val_loss", "unigram_val_loss", "tokens_per_second", "optimizer_seconds_share"} < set(results)
    assert (results["steps"], results["world_size"]) == (6, 2)
    assert results["final_val_loss"] == last_validation(run_dir)
    assert 0 < results["optimizer_seconds_share"] < 1
    assert results["tokens_per_second"] > 0
    assert list(losses(run_dir)) == [1, 2, 3, 4, 5, 6]
    assert losses(run_dir)[6] < losses(run_dir)[1] - 0.2
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [step for step, _ in RunDirectory(run_dir, ONE, 2).checkpoints()] == [3, 6]
    lines = out.splitlines()
    told = [line.split()[1] for line in lines if line.startswith("step") and "loss" in line]
    assert told == ["2/6", "4/6", "4", "6/6", "6"]
    assert sum(line.startswith("{") for line in lines) == 1  # one rank speaks


def test_resume_is_bit_exact_on_the_same_ranks(straight, data, tmp_path):
    resumed = three_steps_of(straight[0], tmp_path / "resumed")
    results, _ = run_to_end(*data, *SIX_STEPS, "--run-dir", resumed, "--resume")
    assert losses(resumed) == losses(straight[0])
    assert last_validation(resumed) == last_validation(straight[0])
    assert results["steps"] == 6


def test_resume_on_one_rank_goes_on_with_the_same_samples(straight, data, tmp_path, capsys):
    resumed = three_steps_of(straight[0], tmp_path / "resumed")
    words = [*data, *TINY, *SIX_STEPS, "--run-dir", resumed, "--resume", "--accumulation", 2]
    train(PlainTrainer, parse_arguments([*map(str, words)]), ONE)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["world_size"] == 1
    (note,) = (line for line in lines if line.startswith("note"))  # nothing of samples per step
    assert note == "note: resumed with other options: changed --accumulation 1 -> 2, ranks 2 -> 1"
    for step in (4, 5, 6):  # bf16 rounds differently in microbatches of one rank
        assert losses(resumed)[step] == pytest.approx(losses(straight[0])[step], rel=2e-3)


def test_a_signal_to_one_rank_stops_both_at_a_step_with_a_checkpoint(data, tmp_path):
    words = [*data, "--steps", 100_000, "--run-dir", tmp_path, "--checkpoint-interval", 100_000]
    with job(*words) as process:
        os.kill(training_ranks(process, tmp_path)[1], signal.SIGTERM)
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    (step, _), *more = RunDirectory(tmp_path, ONE, 2).checkpoints()
    assert not more
    assert max(losses(tmp_path)) == step
    assert out.splitlines()[-1] == f"stopped after step {step}; continue with --resume --run-dir {tmp_path}"


def test_ctrl_c_stops_the_job_with_a_checkpoint(data, tmp_path):
    words = [*data, "--steps", 100_000, "--run-dir", tmp_path, "--checkpoint-interval", 100_000]
    with job(*words) as process:
        ranks = training_ranks(process, tmp_path)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does: launcher and ranks together
        out, _ = process.communicate(timeout=LIMIT)
        assert not any(alive(rank) for rank in ranks)
    assert "stopped after step" in out
    assert max(losses(tmp_path)) == RunDirectory(tmp_path, ONE, 2).checkpoints()[-1][0]


def test_a_killed_rank_ends_the_job(data, tmp_path):
    words = [*data, "--steps", 100_000, "--run-dir", tmp_path, "--checkpoint-interval", 2]
    with job(*words) as process:
        ranks = training_ranks(process, tmp_path)
        os.kill(ranks[1], signal.SIGKILL)
        process.communicate(timeout=LIMIT)
        assert process.returncode != 0
        assert not any(alive(rank) for rank in ranks)
    assert RunDirectory(tmp_path, ONE, 2).checkpoints()  # what a resume starts from


def reduce_on_a_rank(rank, world):
    """Unequal loads, and 3 validation samples for 2 ranks."""
    layer = MixtureOfExperts(MoonlightConfig(hidden_size=8, n_routed_experts=3, moe_intermediate_size=4))
    layer.gate.load.copy_(torch.tensor([[5, 1, 0], [0, 2, 1]][rank]))  # together 5, 3, 1
    worst = update_expert_bias(layer, 0.5)
    data = TokenData([np.arange(100) % 7], [np.arange(100) % 7], 7, 5)

    def first_target_is_the_loss(tokens, targets):
        return targets[:, 0].double().mean()

    model = nn.Module()
    model.forward = first_target_is_the_loss
    loss = validation_loss(model, data, World(rank, world, torch.device("cpu")), samples=3, size=2)
    return worst, layer.gate.e_score_correction_bias.tolist(), loss


def test_expert_load_and_validation_loss_are_over_all_ranks():
    results = run_ranks(reduce_on_a_rank, 2)
    windows = [0, 9, 18]  # of 19, five tokens each
    expected = sum((5 * window + 1) % 7 for window in windows) / 3
    assert results == [(5 / 3, [-0.5, 0.0, 0.5], expected)] * 2


def run_here(capsys, *words):
    """Train in this process, one rank without torch.distributed; the last line's results."""
    train(PlainTrainer, parse_arguments([*map(str, words)]), ONE)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("extra", [(), ("--optimizer", "adamw"), ("--overlap-param-gather", "--dtype", "fp32")])
def test_one_process_trains_the_dense_model(data, tmp_path, capsys, extra):
    results = run_here(capsys, *data, *TINY_DENSE, "--run-dir", tmp_path, "--steps", 80, *extra)
    assert results["world_size"] == 1
    assert results["final_val_loss"] < results["unigram_val_loss"] - 0.1


def test_accumulated_microbatches_are_one_batch(data, tmp_path, capsys):
    words = [*data, *TINY_DENSE, "--dtype", "fp32", "--steps", 3]
    run_here(capsys, *words, "--run-dir", tmp_path / "whole")
    run_here(capsys, *words, "--run-dir", tmp_path / "parts", "--batch-size", 1, "--accumulation", 4)
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert [parts[step] for step in whole] == pytest.approx(list(whole.values()), rel=1e-4)


def test_a_run_directory_is_never_overwritten_and_resume_needs_a_checkpoint(data, tmp_path, capsys):
    words = [*data, *TINY_DENSE, "--run-dir", tmp_path, "--steps", 1]
    with pytest.raises(SystemExit, match="error: --resume: no checkpoint"):
        run_here(capsys, *words, "--resume")
    first = run_here(capsys, *words)
    with pytest.raises(SystemExit, match="holds checkpoints of an earlier run: add --resume, or name another"):
        run_here(capsys, *words)
    again = run_here(capsys, *words, "--resume")  # nothing left to do
    assert again["final_val_loss"] == first["final_val_loss"]


def test_another_number_of_samples_per_step_is_noted(data, tmp_path, capsys):
    words = [*data, *TINY_DENSE, "--run-dir", tmp_path]
    run_here(capsys, *words, "--steps", 1)
    train(PlainTrainer, parse_arguments([*map(str, words), "--steps", "2", "--resume", "--batch-size", "2"]), ONE)
    assert "note: 2 samples per step, before 4" in capsys.readouterr().out


def test_wrong_counts_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--accumulation", "0"])
    assert "--accumulation 0: must be at least 1" in capsys.readouterr().err


# ---- Hugging Face checkpoints ----------------------------------------------------------------------------


@pytest.fixture(params=[pytest.param("dense", marks=pytest.mark.slow), "moonlight"])
def checkpoint_folder(request, tmp_path):
    """A checkpoint whose vocabulary is larger than that of the data, in bf16."""
    torch.manual_seed(3)
    options = DENSE_SIZES if request.param == "dense" else MOONLIGHT_SIZES
    known = {field.name for field in fields(MODELS[request.param][0])}
    sizes = {key[2:].replace("-", "_"): value for key, value in options.items()}
    model = build_model(request.param, vocab_size=320, **{key: value for key, value in sizes.items() if key in known})
    cast_parameters(model, torch.bfloat16)
    folder = tmp_path / "checkpoint"
    huggingface.save(model, folder)
    return folder


def test_a_checkpoint_trained_with_lr_0_is_written_as_it_was(data, tmp_path, checkpoint_folder):
    words = ["--steps", 1, "--lr", 0, "--init-from", checkpoint_folder, "--save-hf", tmp_path / "out", *data]
    words += ["--sequence-length", 32, "--batch-size", 2, "--validation-samples", 4, "--run-dir", tmp_path / "run"]
    result, _ = torchrun.run_to_end(["launch.pretrain", *words], limit=LIMIT)
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint_folder, tmp_path / "out"))
    assert before.keys() == after.keys() and result["parameters"] > 320 * 32
    biases = [name for name in before if "e_score_correction_bias" in name]  # moved by the load, not by lr
    assert len(biases) == (result["model"] == "moonlight")
    for name in before.keys() - biases:
        assert after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]), name
    assert (tmp_path / "out" / "config.json").read_text() == (checkpoint_folder / "config.json").read_text()


def test_a_checkpoint_decides_the_sizes(data, tmp_path, checkpoint_folder, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--init-from", str(checkpoint_folder), "--hidden-size", "32"])
    assert "--hidden-size with --init-from" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_arguments(["--init-from", str(tmp_path / "nowhere")])
    assert "nowhere/config.json cannot be read" in capsys.readouterr().err
    words = ["--init-from", str(checkpoint_folder), "--save-hf", str(checkpoint_folder), *data]
    with pytest.raises(SystemExit, match="exists already: name another folder"):
        train(PlainTrainer, parse_arguments([*words, "--run-dir", str(tmp_path / "run")]), ONE)
