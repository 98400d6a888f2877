"""The pieces around a trainer: learning-rate schedule, flags, checkpoints of a run directory."""

import pytest
import torch

from launch import failure
from launch.pretrain import parse_arguments
from launch.run_dir import RunDirectory
from launch.schedule import cosine_schedule, warmup_cosine
from launch.world import World


def test_warmup_cosine_values():
    factors = [warmup_cosine(step, steps=12, warmup=4, final=0.1) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.55)  # half way down
    assert factors[12] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert warmup_cosine(99, steps=12, warmup=4, final=0.1) == pytest.approx(0.1)
    assert warmup_cosine(0, steps=12, warmup=0, final=0.1) == 1.0


def schedule(done):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.5)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    return optimizer, cosine_schedule(optimizer, 2.0, 12, 4, 0.1, done)


def test_a_resumed_schedule_continues_to_the_bit():
    optimizer, scheduler = schedule(0)
    for _ in range(7):
        optimizer.step()
        scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [2.0 * warmup_cosine(7, 12, 4, 0.1)] * 2
    resumed, continued = schedule(7)
    for _ in range(3):
        assert [g["lr"] for g in resumed.param_groups] == [g["lr"] for g in optimizer.param_groups]
        for one, other in ((optimizer, scheduler), (resumed, continued)):
            one.step()
            other.step()


def test_run_directory_shows_complete_checkpoints_only_and_keeps_the_newest(tmp_path):
    run = RunDirectory(tmp_path, World(0, 1, torch.device("cpu")), keep=2)
    with pytest.raises(ValueError, match=r"no checkpoint in .*: start without --resume"):
        run.latest()

    def write(path):
        written.append(path.name)
        path.mkdir(parents=True)

    written = []
    for step in (5, 10, 100, 100):
        run.save(step, write)
    assert written == ["step-00000005", "step-00000010", "step-00000100"]
    (tmp_path / "checkpoints" / "step-00000200.unfinished").mkdir()  # of a killed job
    assert run.checkpoints() == [(10, tmp_path / "checkpoints/step-00000010"), (100, run.latest())]
    assert run.latest().name == "step-00000100"


def test_a_config_file_gives_flags_that_set_and_the_command_line_override(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("model: dense\nsteps: 7\nlr: 0.5\ntie_word_embeddings: false\noverlap_param_gather: true\n")
    words = ["--config", str(config), "--set", "lr=0.25", "--set", "warmup=3", "--steps", "9"]
    args = parse_arguments(words)
    assert (args.model, args.steps, args.lr, args.warmup) == ("dense", 9, 0.25, 3)
    assert args.overlap_param_gather is True and args.tie_word_embeddings is False
    config.write_text("learning_rate: 1\n")
    with pytest.raises(SystemExit):
        parse_arguments(words)
    assert "'learning_rate' is no flag of this trainer" in capsys.readouterr().err


def test_resume_auto_starts_anew_where_there_is_no_checkpoint(tmp_path):
    run = RunDirectory(tmp_path, World(0, 1, torch.device("cpu")), 2)
    assert run.start("auto") is None and run.start(None) is None
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert run.start("auto") == run.start("always") == tmp_path / "checkpoints" / "step-00000003"
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        run.start(None)


def test_one_rank_of_a_node_speaks_and_the_others_let_it(monkeypatch):
    """torchrun kills all ranks as soon as one has ended: rank 1 must not take the words out of rank 0's mouth."""
    slept = []
    monkeypatch.setattr(failure.time, "sleep", slept.append)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert failure.speaks_for_node() and not slept
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not failure.speaks_for_node() and slept == [20]
