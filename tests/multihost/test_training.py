"""Training over two hosts with the launch script: it runs, survives the loss of a host, and goes on alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.multihost.hosts import Host, make_hosts, why_not

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"no hosts: {why_not()}"),
    pytest.mark.timeout(400),
]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "launch" / "torchrun_multinode.sh")
FLAGS = (
    "--model dense --num-hidden-layers 2 --hidden-size 64 --intermediate-size 128 --num-attention-heads 2 "
    "--batch-size 4 --sequence-length 32 --validation-samples 4 --warmup 2 --checkpoint-interval 5 "
    "--validation-interval 1000"
)
SMALL = [*FLAGS.split(), "--data", str(ROOT / "tests" / "corpus.txt")]


def start(host: Host, log: Path, nodes: str, head: Host, port: int, words: list[str]) -> subprocess.Popen[bytes]:
    """The launch script on one host, as a user would start it."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # 100 Mbit/s, one of the speeds tried here, is less than preflight wants.
    settings = {
        "NNODES": nodes,
        "NPROC": "1",
        "HEAD": head.address,
        "PORT": str(port),
        "RESTARTS": "0",
        "PREFLIGHT": "0",
    }
    return host.start(
        [SCRIPT, "-m", "launch.pretrain", *words], log, {**settings, "PATH": path, "PYTHONPATH": str(ROOT)}
    )


def start_worker(hosts: list[Host], number: int, log: Path, words: list[str]) -> subprocess.Popen[bytes]:
    """A worker of launch/kubeflow_pytorchjob.yaml on a host."""
    job = yaml.safe_load((ROOT / "launch" / "kubeflow_pytorchjob.yaml").read_text())["spec"]
    elastic = job["elasticPolicy"]
    (container,) = job["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    args = container["args"]
    kept = args[args.index("--resume") :]
    operator = {
        "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}",
        "PET_NPROC_PER_NODE": "1",
        "PET_MAX_RESTARTS": str(elastic["maxRestarts"]),
        "PET_RDZV_BACKEND": elastic["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"{hosts[0].address}:29531",
        "PET_RDZV_ID": "distributed-muon",
        # Pods have names that resolve to their addresses; these hosts have not.
        "PET_RDZV_CONF": f"is_host={str(number == 0).lower()}",
        "PET_LOCAL_ADDR": hosts[number].address,
    }
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    command = [str(Path(sys.executable).with_name("torchrun")), *container["command"][1:], *words, *kept]
    return hosts[number].start(command, log, {**operator, **given, "PYTHONPATH": str(ROOT)})


def losses(run: Path) -> dict[int, float]:
    """Training loss by step, the last written for each."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_the_first_snippet_of_the_manual_trains_on_two_hosts(tmp_path: Path) -> None:
    snippet = (ROOT / "docs" / "many_nodes.md").read_text().partition("```sh\n")[2].partition("```")[0]
    assert "HEAD=10.0.0.1" in snippet
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "README.md").symlink_to(ROOT / "README.md")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with make_hosts(2, megabits=100) as hosts:
        text = snippet.replace("HEAD=10.0.0.1", f"HEAD={hosts[0].address}")
        # 100 Mbit/s is less than preflight wants.
        settings = {"PATH": path, "PYTHONPATH": str(ROOT), "NPROC": "1", "PREFLIGHT_FLAGS": "--least-mbit 20"}
        running = [
            host.start(["bash", "-c", f"cd {tmp_path} && {text}"], tmp_path / f"log-{number}", settings)
            for number, host in enumerate(hosts)
        ]
        codes = [process.wait(timeout=150) for process in running]
    out = (tmp_path / "log-0").read_text()
    assert codes == [0, 0], out
    assert "no problem found" in out  # preflight ran first
    results = json.loads((tmp_path / "runs" / "mine" / "results.json").read_text())
    assert results["world_size"] == 2 and results["final_val_loss"] < results["unigram_val_loss"] + 1


def test_the_loss_of_a_host_ends_the_job_and_the_other_goes_on_alone(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    with make_hosts(2) as hosts:
        words = [*SMALL, "--steps", "4000", "--run-dir", str(broken)]
        running = [start(h, tmp_path / f"broken-{i}", "2", hosts[0], 29522, words) for i, h in enumerate(hosts)]
        deadline = time.monotonic() + 150
        while not list(broken.glob("checkpoints/step-*[0-9]")):
            assert time.monotonic() < deadline, (tmp_path / "broken-0").read_text()
            time.sleep(0.2)
        hosts[1].kill()
        begin = time.monotonic()
        assert running[0].wait(timeout=90) != 0  # an error, not a hang
        print(f"ended {time.monotonic() - begin:.0f} s after the fault")
        lines = [line for line in (tmp_path / "broken-0").read_text().splitlines() if line.startswith("error")]
        assert len(lines) == 1 and ("reset by peer" in lines[0] or "closed by peer" in lines[0]), lines
        last = max(int(path.name.removeprefix("step-")) for path in broken.glob("checkpoints/step-*[0-9]"))
        words = [*SMALL, "--steps", str(last + 5), "--accumulation", "2", "--run-dir", str(broken), "--resume"]
        alone = start(hosts[0], tmp_path / "alone", "1", hosts[0], 29523, words)
        assert alone.wait(timeout=150) == 0, (tmp_path / "alone").read_text()
        assert json.loads((tmp_path / "alone").read_text().strip().splitlines()[-1])["world_size"] == 1
        assert set(range(1, last + 6)) <= losses(broken).keys()


@pytest.mark.slow
def test_an_elastic_job_grows_and_shrinks(tmp_path: Path) -> None:
    """With the command and the environment of the yaml, as Kubeflow's operator starts its workers."""
    run = tmp_path / "run"
    words = [*SMALL, "--steps", "100000", "--run-dir", str(run)]

    def wait_for(world: int, first: bool = False) -> None:
        """Until a step newer than now was taken by `world` ranks, as the settings of the last start say."""
        settings = run / "settings.json"
        deadline, before = time.monotonic() + 150, max(losses(run), default=0) if not first else 0
        while True:
            now = json.loads(settings.read_text())["world_size"] if settings.exists() else 0
            if now == world and max(losses(run), default=0) > before + 10:
                return
            assert time.monotonic() < deadline, (tmp_path / "log-0").read_text()[-3000:]
            time.sleep(0.5)

    with make_hosts(2) as hosts:
        first = start_worker(hosts, 0, tmp_path / "log-0", words)
        wait_for(1, first=True)
        start_worker(hosts, 1, tmp_path / "log-1", words)
        wait_for(2)
        hosts[1].kill()
        wait_for(1)
        assert first.poll() is None
