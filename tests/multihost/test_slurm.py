"""launch/slurm.sbatch with stand-ins for Slurm's commands: stopped before the time limit, queued again, continued."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.multihost.hosts import Host, make_hosts, why_not
from tests.multihost.test_training import ROOT, SMALL, losses
from tests.torchrun import run_to_end

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"no hosts: {why_not()}"),
    pytest.mark.timeout(900),
]
SAVE_SECONDS = int(os.environ.get("SAVE_SECONDS", "35"))  # more than the 30 that torchrun leaves its ranks after TERM
STEPS = 60


def sbatch(folder: Path, hosts: list[Host], words: list[str], restarts: int = 0) -> subprocess.Popen[bytes]:
    """The batch script as Slurm starts it: a copy elsewhere, in the folder that sbatch was called in."""
    spool = folder / "spool" / "slurm_script"
    spool.parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / "launch" / "slurm.sbatch", spool)
    stand_ins = Path(__file__).parent / "slurm"
    variables = {
        "PATH": f"{stand_ins}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "FAKE_SLURM": str(folder),
        "FAKE_HOSTS": " ".join(f"{host.name}:{host.address}" for host in hosts),
        "FAKE_COMMAND": str(ROOT / "launch" / "slurm.sbatch"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": str(len(hosts)),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_CPUS_PER_TASK": "3",
        "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_GPUS_ON_NODE": "1",
        "PORT": str(29700 + restarts),
        "PREFLIGHT": "0",
        "GLOO_SOCKET_IFNAME": "",
        "SLOW_SAVE": str(SAVE_SECONDS if restarts == 0 else 0),
    }
    log = (folder / f"batch-{restarts}.log").open("wb")
    return subprocess.Popen(
        ["bash", str(spool), *words], cwd=folder, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_is_queued_again_and_continues_bit_equal(tmp_path: Path) -> None:
    words = [*SMALL, "--steps", str(STEPS), "--checkpoint-interval", "100000", "--warmup", "2"]
    with make_hosts(2) as hosts:
        job = sbatch(tmp_path, hosts, ["-m", "tests.multihost.slow_save", *words, "--run-dir", "run"])
        deadline = time.monotonic() + 240
        while max(losses(tmp_path / "run"), default=0) < 3:
            assert job.poll() is None and time.monotonic() < deadline, _logs(tmp_path)
            time.sleep(0.1)
        begin = time.monotonic()
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=SAVE_SECONDS + 60) == 0, _logs(tmp_path)
        assert time.monotonic() - begin >= SAVE_SECONDS
        print(f"saved and queued again {time.monotonic() - begin:.0f} s after the signal")
        assert (tmp_path / "requeued").read_text() == "7\n"
        assert not list(tmp_path.glob("*.stopped"))
        assert "--cpus-per-task=3" in (tmp_path / "srun_options").read_text()
        (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*[0-9]")
        assert "Signal" not in _logs(tmp_path), _logs(tmp_path)

        again = sbatch(tmp_path, hosts, ["-m", "tests.multihost.slow_save", *words, "--run-dir", "run"], restarts=1)
        assert again.wait(timeout=240) == 0, _logs(tmp_path)
        assert (tmp_path / "requeued").read_text() == "7\n"  # it is done
    run_to_end(["launch.pretrain", *words, "--run-dir", tmp_path / "straight"], limit=240)
    stopped = int(checkpoint.name.removeprefix("step-"))
    assert 3 <= stopped < STEPS
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def _logs(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("*.log")))
