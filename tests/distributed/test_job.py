"""What a job of several ranks says when it is misconfigured, fails, hangs, stops or is profiled."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.data import TokenData
from launch.metrics import read_metrics
from launch.sameness import check_same
from launch.world import World
from tests.spawn import run_ranks
from tests.torchrun import CORPUS, ROOT, TINY_DENSE, alive, flags, job, ranks_of, run_to_end

LIMIT = 240  # seconds for one job
pytestmark = pytest.mark.timeout(300)
JOB = ["launch.pretrain", *flags({**TINY_DENSE, "--data": CORPUS}), "--log-to"]


def failed(*words: object) -> tuple[list[str], str]:
    """The error lines that the ranks of a job print before torchrun reports, and torchrun's report."""
    begin = time.monotonic()
    with job([*JOB, *words]) as process:
        _, err = process.communicate(timeout=LIMIT)
        assert process.returncode != 0
    print(f"ended after {time.monotonic() - begin:.0f} s")
    ranks, _, report = err.partition("Traceback (most recent call last)")
    return [line for line in ranks.splitlines() if line.startswith(("error", "Traceback"))], report


def test_a_wrong_option_is_one_line_for_all_ranks_and_the_last_of_torchrun_s_report(tmp_path: Path) -> None:
    lines, report = failed("--run-dir", tmp_path, "--resume")
    message = f"error: --resume: no checkpoint in {tmp_path}/checkpoints: start without --resume"
    assert lines == [message]
    assert report.strip().splitlines()[-2].endswith(f"traceback : {message}")


def test_a_wrong_flag_is_one_line(tmp_path: Path) -> None:
    lines, report = failed("--steps", 0)
    assert lines == ["error: --steps 0: must be at least 1"]
    assert "traceback : error: --steps 0: must be at least 1" in report


def test_an_unforeseen_error_is_one_line_and_its_traceback_a_file(tmp_path: Path) -> None:
    (tmp_path / "loss.png").mkdir()
    words = ["--run-dir", tmp_path, "--steps", 2, "--validation-interval", 100]
    lines, report = failed(*words)  # rank 0 cannot draw its plot there
    (line,) = lines
    assert line.startswith("error: rank 0 on ") and "IsADirectoryError: " in line
    file = tmp_path / "errors" / "rank-0.txt"
    assert line.endswith(f"(traceback: {file})") and "plot_losses" in file.read_text()
    assert line in report


def differ(rank: int, world: int) -> list[str]:
    """Messages where rank 1 has another batch size, another text, other words for the same."""
    where = World(rank, world, torch.device("cpu"))
    tokens = np.arange(1000) % 7
    other = np.where(np.arange(1000) == 500, 6, tokens) if rank == 2 else tokens
    same, changed = TokenData([tokens], [tokens], 7, 8), TokenData([other], [tokens], 7, 8)
    messages = []
    for args, data in (
        ({"batch_size": 4 + (rank == 1)}, same),
        ({"batch_size": 4}, changed),
        ({"batch_size": 4, "data": f"/disk{rank}", "local_rank": rank}, same),
    ):
        try:
            check_same(where, Namespace(**args), data)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_other_settings_or_data_on_one_rank_are_refused_on_all() -> None:
    reports = run_ranks(differ, 3)
    assert reports[0] == reports[1] == reports[2]
    settings, data, paths = reports[0]
    end = "on the others: start every node with the same flags and data"
    assert settings == f"the ranks differ: --batch-size is 5 on rank 1, 4 {end}"
    assert data.startswith("the ranks differ: data is 2000 tokens of digest ") and " on rank 2, 2000 tokens " in data
    assert paths == ""


@pytest.mark.parametrize(
    ("rank", "store_in_rank_0", "found"),
    [
        (1, "0", "for rank 1 on .*, which does not answer: its process is stopped, or its node is gone"),
        pytest.param(
            *(0, "1", "the job's store does not answer: rank 0 on .* is stopped, or is gone"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_stopped_rank_is_named_and_ends_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, store_in_rank_0: str, found: str
) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", store_in_rank_0)
    words = [*JOB, "--run-dir", tmp_path, "--steps", 100_000, "--validation-interval", 100_000, "--timeout", 3]
    with job([*words, "--checkpoint-interval", 100_000]) as process:
        deadline = time.monotonic() + LIMIT
        while len(read_metrics(tmp_path / "metrics.jsonl")) < 3:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        ranks = ranks_of(process)
        begin = time.monotonic()
        os.kill(ranks[rank], signal.SIGSTOP)
        while alive(ranks[1 - rank]):
            assert time.monotonic() < begin + 60
            time.sleep(0.1)
        print(f"ended {time.monotonic() - begin:.0f} s after the fault")
        os.kill(ranks[rank], signal.SIGKILL)  # torchrun would wait 30 s for it
        _, err = process.communicate(timeout=LIMIT)
        assert process.returncode != 0
    (line,) = (line for line in err.splitlines() if line.startswith("error"))
    assert line.startswith("error: no progress for 3 s in step ")
    assert re.search(found, line)
    assert line.partition(" (flight records")[0] in err.partition("Root Cause")[2]
    if rank == 1:
        assert re.search(r"rank 0 waits .*at (launch|distributed_muon)/\w+", line)
        assert (tmp_path / "flight" / "rank_0").stat().st_size > 0


def test_exit_after_saves_and_says_so_to_the_scheduler(tmp_path: Path) -> None:
    stop = tmp_path / "stopped"
    words = ["--run-dir", tmp_path / "run", "--steps", "100000", "--exit-after", "0.02", "--stop-file", stop]
    command = [sys.executable, "-m", *JOB, *words, "--stop-code", "75"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 75, done.stderr
    step = int(max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()).removeprefix("step-"))
    assert stop.read_text() == f"stopped after step {step} of 100000\n"


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("profiled")
    words = ["--run-dir", run, "--steps", 4, "--profile-steps", "2:3", "--profile-ranks", 0, 1, "--accumulation", 2]
    _, out = run_to_end([*JOB, *words, "--log-interval", 2, "--peak-tflops", 0.5], limit=LIMIT)
    return run, out


def test_the_trace_has_the_named_ranges_of_both_ranks(profiled: tuple[Path, str]) -> None:
    run, out = profiled
    file = run / "profile" / "trace.json.gz"
    assert f"the profile is in {file}" in out
    with gzip.open(file) as text:
        trace = json.load(text)
    named = {event["pid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    for rank in (0, 1):
        pids = [pid for pid, name in named.items() if name.startswith(f"rank {rank} on ")]
        ranges = Counter(
            event["name"]
            for event in trace["traceEvents"]
            if event.get("pid") in pids and event.get("cat") == "user_annotation"
        )
        assert {name: ranges[name] for name in ("step 2", "step 3", "forward_backward", "wait", "optimizer")} == {
            **{"step 2": 1, "step 3": 1},
            **dict.fromkeys(("forward_backward", "wait", "optimizer"), 2),
        }
        assert ranges["data"] == 4  # two microbatches in each of two steps
        # The optimizer's own: what all shards have in common, and what waves and buckets do, by their parameters.
        assert ranges["momentum"] == 2
        (wave,) = [name for name in ranges if name.startswith("update: wave 0, ")]
        matrix = r"layers\.0\.[\w.]+"
        assert re.fullmatch(rf"update: wave 0, ({matrix}( to {matrix} \(\d+\))?|nothing), \d+ bytes sent", wave), wave
        assert ranges[wave] == 2
        assert ranges["reduce_scatter_wait"] == 2
        assert any(re.match(rf"bucket of {matrix} to {matrix} \(\d+\), \d+ bytes", name) for name in ranges)
    begins = {event["name"] for event in trace["traceEvents"] if event["name"].startswith("step ")}
    assert begins == {"step 2", "step 3"}


def test_clocks_of_ranks_meet_in_the_trace(profiled: tuple[Path, str]) -> None:
    with gzip.open(profiled[0] / "profile" / "trace.json.gz") as text:
        events = json.load(text)["traceEvents"]
    # No rank leaves the agreement on the loss before the other has come to it.
    spans = [event for event in events if event["name"] == "wait" and event.get("cat") == "user_annotation"]
    spans.sort(key=lambda event: event["ts"])
    for one, other in zip(spans[::2], spans[1::2], strict=True):
        assert one["pid"] != other["pid"]
        assert other["ts"] < one["ts"] + one["dur"] + 50_000  # microseconds: a busy machine may hold a rank back


def test_metrics_compare_the_ranks_and_tell_mfu(profiled: tuple[Path, str]) -> None:
    lines = read_metrics(profiled[0] / "metrics.jsonl")
    compared = [line for line in lines if "peak_memory_gib" in line]
    assert [line["step"] for line in compared] == [2, 4]
    for line in compared:
        for phase in ("data", "forward_backward", "wait", "optimizer", "optimizer/newton_schulz"):
            assert 0 <= line[f"seconds_min/{phase}"] <= line[f"seconds_max/{phase}"]
        assert 0.01 < line["peak_memory_gib"] < 10
    steps = [line for line in lines if "loss" in line]
    assert all(line["mfu"] == pytest.approx(line["tflops"] / 0.5) for line in steps)
    assert all(
        line["tflops"] * line["seconds"] == pytest.approx(steps[0]["tflops"] * steps[0]["seconds"]) for line in steps
    )


def test_a_rank_that_does_not_exist_cannot_be_profiled(tmp_path: Path) -> None:
    lines, _ = failed("--run-dir", tmp_path, "--profile-steps", "1:1", "--profile-ranks", 2)
    assert lines == ["error: --profile-ranks 2: this job has ranks 0 to 1"]
