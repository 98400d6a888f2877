"""launch/torchrun_multinode.sh and slurm.sbatch by what they run, with stand-ins for what they ask; the yaml files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPT = LAUNCH / "torchrun_multinode.sh"
TWO_GPUS_ONE_CUT = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)
  MIG 1g.10gb     Device  0: (UUID: MIG-1)
  MIG 1g.10gb     Device  1: (UUID: MIG-2)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)"""
NO_DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\nMake sure it is installed."


def stand_in(folder: Path, name: str, text: str) -> None:
    """A command that prints `text`, or a script of bash."""
    file = folder / name
    file.write_text(text if text.startswith("#!") else f"#!/usr/bin/env bash\ncat <<'END'\n{text}\nEND\n")
    file.chmod(0o755)


def run(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script with "echo" for torchrun, the commands of `folder` first in the path, and no variables but these."""
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "TORCHRUN": "echo", "PREFLIGHT": "0", **variables}
    command = ["bash", str(SCRIPT), "-m", "x"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)


@pytest.mark.parametrize(
    ("variables", "listed", "ranks"),
    [
        ({}, TWO_GPUS_ONE_CUT, 2),
        ({}, NO_DRIVER, 1),
        ({"SLURM_GPUS_ON_NODE": "4"}, TWO_GPUS_ONE_CUT, 4),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,3,5"}, TWO_GPUS_ONE_CUT, 3),
        ({"CUDA_VISIBLE_DEVICES": "MIG-1"}, TWO_GPUS_ONE_CUT, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, TWO_GPUS_ONE_CUT, 1),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, TWO_GPUS_ONE_CUT, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "NPROC": "7"}, TWO_GPUS_ONE_CUT, 7),
    ],
)
def test_ranks_are_the_gpus_that_torch_will_see(tmp_path: Path, variables: dict, listed: str, ranks: int) -> None:
    stand_in(tmp_path, "nvidia-smi", listed)
    assert f"--nproc_per_node {ranks} " in run(tmp_path, **variables).stdout


def host(folder: Path, name: str, *addresses: str) -> None:
    """A node with this name, which resolves to these addresses, and the address 10.1.2.3 of its own."""
    stand_in(folder, "getent", "\n".join(f"{address}  STREAM {name}" for address in addresses))
    stand_in(folder, "uname", name)
    words = 'case "$*" in *addr*) echo "2: eth7    inet 10.1.2.3/24 scope global eth7" ;;'
    stand_in(folder, "ip", f'#!/usr/bin/env bash\n{words} *) echo "$4 dev eth7 src 10.1.2.3 uid 0" ;; esac\n')


@pytest.mark.parametrize("addresses", [["127.0.1.1"], ["127.0.1.1", "10.1.2.3"]])
def test_a_head_whose_own_name_is_loopback_hosts_at_its_real_address(tmp_path: Path, addresses: list[str]) -> None:
    host(tmp_path, "node1", *addresses)
    out = run(tmp_path, NNODES="2", HEAD="node1").stdout
    assert "--local_addr 10.1.2.3" in out and "--rdzv_endpoint 10.1.2.3:29400" in out and "is_host=true" in out


@pytest.mark.parametrize(
    ("addresses", "head", "message"),
    [
        (["127.0.1.1"], "node1", "error: HEAD=node1 is 127.0.1.1 on node node2, where other nodes cannot reach it"),
        ([], "node1", "error: HEAD=node1 does not resolve: give an address"),
        (["10.1.2.9"], "", "error: HEAD is unset: give the address of one node"),
    ],
)
def test_a_head_that_cannot_be_reached_is_an_error(
    tmp_path: Path, addresses: list[str], head: str, message: str
) -> None:
    host(tmp_path, "node2", *addresses)
    done = run(tmp_path, NNODES="2", **({"HEAD": head} if head else {}))
    assert done.returncode == 2 and done.stderr.startswith(message), done.stderr


def test_an_elastic_job_gets_what_a_late_node_needs_and_every_job_time_to_save(tmp_path: Path) -> None:
    stand_in(tmp_path, "torchrun", "#!/usr/bin/env bash\nenv\n")
    host(tmp_path, "node1", "10.1.2.3")
    out = run(tmp_path, NNODES="1:2", HEAD="node1", TORCHRUN="torchrun").stdout.splitlines()
    assert {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600"} < set(out)
    assert {"GLOO_SOCKET_IFNAME=eth7", "NCCL_SOCKET_IFNAME=eth7"} < set(out)


def test_make_train_gives_ranks_time_to_save(tmp_path: Path) -> None:
    """Its torchrun sees the longer limit; torchrun's own would kill ranks 30 s after Ctrl-C."""
    (tmp_path / "bin").mkdir()
    (tmp_path / ".installed").touch()
    stand_in(tmp_path / "bin", "torchrun", "#!/usr/bin/env bash\nenv\n")
    words = ["make", "train", f"VENV={tmp_path}"]
    for more, seconds in (((), 600), (("STOP_SECONDS=900",), 900)):
        done = subprocess.run([*words, *more], cwd=LAUNCH.parent, capture_output=True, text=True, timeout=30)
        assert f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={seconds}" in done.stdout.splitlines(), done.stderr


RANK = """#!/usr/bin/env bash
trap 'echo saved; exit 0' TERM
touch "$READY"
while :; do sleep 0.1; done
"""
AGENT = """#!/usr/bin/env bash
trap 'echo torchrun was signalled' TERM
TORCHELASTIC_RUN_ID=1 rank &
wait
echo "torchrun ends"
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_s_signal_goes_to_the_ranks_and_not_to_torchrun(tmp_path: Path, number: signal.Signals) -> None:
    stand_in(tmp_path, "rank", RANK)
    stand_in(tmp_path, "agent", AGENT)
    stand_in(tmp_path, "wrapper", "#!/usr/bin/env bash\nagent\n")  # as a container runtime
    ready = tmp_path / "ready"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCHRUN": "wrapper", "READY": str(ready)}
    process = subprocess.Popen(["bash", str(SCRIPT)], env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "saved\ntorchrun ends\n")


def sbatch(folder: Path, srun: str) -> tuple[int, list[str]]:
    """Exit code of the batch script with this srun, and the jobs that were queued again."""
    stand_in(folder, "srun", f"#!/usr/bin/env bash\n{srun}\n")
    asked = f'case "$1" in show) echo "Command={LAUNCH}/slurm.sbatch" ;; requeue) echo "$2" >>queued ;; esac'
    stand_in(folder, "scontrol", f"#!/usr/bin/env bash\n{asked}\n")
    stand_in(folder, "scancel", '#!/usr/bin/env bash\necho "$*" >>cancelled\ntouch go\n')
    variables = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"},
        "SLURM_SUBMIT_DIR": str(folder),
    }
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "-m", "x"]
    done = subprocess.run(command, env=variables, cwd=folder, timeout=20, capture_output=True, check=False)
    queued = folder / "queued"
    return done.returncode, queued.read_text().split() if queued.exists() else []


WAIT = "while [ ! -e go ]; do sleep 0.05; done"


@pytest.mark.parametrize(
    ("srun", "expected"),
    [
        ("exit 0", (0, [])),
        ("exit 3", (3, [])),
        ("touch slurm-7.stopped", (0, ["7"])),  # --exit-after
        (f"kill -USR1 $PPID; {WAIT}; touch slurm-7.stopped", (0, ["7"])),  # the time limit
        (f"kill -USR1 $PPID; {WAIT}; exit 1", (1, ["7"])),  # at which the job failed to save
        (f"kill -USR1 $PPID; {WAIT}", (0, [])),  # just when it was done
        ("kill -TERM $PPID; sleep 0.2; touch slurm-7.stopped", (0, [])),  # scancel
    ],
)
def test_a_job_is_queued_again_where_there_is_more_to_do(tmp_path: Path, srun: str, expected: tuple) -> None:
    assert sbatch(tmp_path, srun) == expected
    if "USR1" in srun:
        assert (tmp_path / "cancelled").read_text() == "--signal=TERM 7\n"  # to the tasks, not to srun


@pytest.mark.parametrize("name", ["kubeflow_pytorchjob.yaml", "kubeflow_trainjob.yaml"])
def test_pods_have_time_to_save_and_shared_memory(name: str) -> None:
    text = (LAUNCH / name).read_text()
    objects = list(yaml.safe_load_all(text))

    def find(tree: object, key: str) -> list:
        if isinstance(tree, dict):
            return [tree[key] for _ in tree.keys() & {key}] + [
                hit for value in tree.values() for hit in find(value, key)
            ]
        return [hit for value in tree for hit in find(value, key)] if isinstance(tree, list) else []

    (grace,) = find(objects, "terminationGracePeriodSeconds")
    variables = {entry["name"]: entry.get("value") for entries in find(objects, "env") for entry in entries}
    assert 30 < int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace
    assert ["IPC_LOCK"] in find(objects, "add")
    assert {"mountPath": "/dev/shm", "name": "shm"} in find(objects, "volumeMounts")[0]
    (words,) = find(objects, "args")
    assert words[words.index("--resume") + 1] == "auto" and words[words.index("--stop-code") + 1] != "0"


def test_scripts_are_clean() -> None:
    if not (tool := shutil.which("shellcheck")):
        pytest.skip("shellcheck is not installed")
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
    done = subprocess.run([tool, *map(str, scripts)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
