"""Training over two hosts with the launch script: it runs, survives the loss of a host, and goes on alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.multihost.hosts import Host, make_hosts, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no hosts: {why_not()}")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "launch" / "torchrun_multinode.sh")
FLAGS = (
    "--model dense --num-hidden-layers 2 --hidden-size 64 --intermediate-size 128 --num-attention-heads 2 "
    "--batch-size 4 --sequence-length 32 --validation-samples 4 --warmup 2 --checkpoint-interval 5 "
    "--validation-interval 1000"
)
SMALL = FLAGS.split()


def start(
    host: Host, log: Path, nodes: str, head: Host, port: int, words: list[str], restarts: int = 0
) -> subprocess.Popen[bytes]:
    """The launch script on one host, as a user would start it."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"NNODES": nodes, "NPROC": "1", "HEAD": head.address, "PORT": str(port), "RESTARTS": str(restarts)}
    return host.start(
        [SCRIPT, "-m", "launch.pretrain", *words], log, {**settings, "PATH": path, "PYTHONPATH": str(ROOT)}
    )


def losses(run: Path) -> dict[int, float]:
    """Training loss by step, the last written for each."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.parametrize("megabits", [None, 100])
def test_two_hosts_train_one_dies_the_other_goes_on(tmp_path: Path, megabits: int | None) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with make_hosts(2, megabits) as hosts:
        words = [*SMALL, "--steps", "10", "--run-dir", str(whole)]
        running = [start(h, tmp_path / f"whole-{i}", "2", hosts[0], 29521, words) for i, h in enumerate(hosts)]
        codes = [process.wait(timeout=120) for process in running]
        text = (tmp_path / "whole-0").read_text()
        assert codes == [0, 0], text
        assert "no problem found" in text  # preflight ran first
        assert json.loads(text.strip().splitlines()[-1])["world_size"] == 2

        words = [*SMALL, "--steps", "4000", "--run-dir", str(broken)]
        running = [start(h, tmp_path / f"broken-{i}", "2", hosts[0], 29522, words) for i, h in enumerate(hosts)]
        deadline = time.monotonic() + 90
        while not list(broken.glob("checkpoints/step-*[0-9]")):
            assert time.monotonic() < deadline, (tmp_path / "broken-0").read_text()
            time.sleep(0.2)
        hosts[1].kill()
        assert running[0].wait(timeout=90) != 0  # an error, not a hang
        last = max(int(path.name.removeprefix("step-")) for path in broken.glob("checkpoints/step-*[0-9]"))
        words = [*SMALL, "--steps", str(last + 5), "--accumulation", "2", "--run-dir", str(broken), "--resume"]
        alone = start(hosts[0], tmp_path / "alone", "1", hosts[0], 29523, words)
        assert alone.wait(timeout=90) == 0, (tmp_path / "alone").read_text()
        assert json.loads((tmp_path / "alone").read_text().strip().splitlines()[-1])["world_size"] == 1
        assert set(range(1, last + 6)) <= losses(broken).keys()


def test_an_elastic_job_grows_and_shrinks(tmp_path: Path) -> None:
    run, words = tmp_path / "run", [*SMALL, "--steps", "100000", "--resume", "auto", "--run-dir", str(tmp_path / "run")]

    def wait_for(world: int, first: bool = False) -> None:
        """Until a step newer than now was taken by `world` ranks, as the settings of the last start say."""
        settings = run / "settings.json"
        deadline, before = time.monotonic() + 120, max(losses(run), default=0) if not first else 0
        while True:
            now = json.loads(settings.read_text())["world_size"] if settings.exists() else 0
            if now == world and max(losses(run), default=0) > before + 10:
                return
            assert time.monotonic() < deadline, (tmp_path / "log-0").read_text()[-3000:]
            time.sleep(0.5)

    with make_hosts(2) as hosts:
        first = start(hosts[0], tmp_path / "log-0", "1:2", hosts[0], 29531, words, restarts=5)
        wait_for(1, first=True)
        start(hosts[1], tmp_path / "log-1", "1:2", hosts[0], 29531, words, restarts=5)
        wait_for(2)
        hosts[1].kill()
        wait_for(1)
        assert first.poll() is None
