"""Preflight over real links between hosts: everything that differs, is slow, dead or missing is named with its node."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.preflight import facts as facts_module
from launch.preflight.__main__ import PreflightError, _exchange
from launch.preflight.facts import NodeFacts, collect_facts, find_problems
from launch.preflight.links import link_problems, partners
from tests.multihost.hosts import DEVICE, Host, make_hosts, why_not

pytestmark = pytest.mark.timeout(400)
hosted = pytest.mark.skipif(why_not() is not None, reason=f"no hosts: {why_not()}")
ROOT = Path(__file__).resolve().parents[2]
GOOD = ["-m", "launch.preflight"]
# A clock that is wrong, a limit on open files, and a torch that is another version, on one host only.
ODD = """
import resource, runpy, sys, time, torch
now = time.time
time.time = lambda: now() + 40
resource.setrlimit(resource.RLIMIT_NOFILE, (70, 70))
torch.__version__ = "2.0.0"
sys.argv = ["preflight", *sys.argv[1:]]
runpy.run_module("launch.preflight", run_name="__main__")
"""


def torchrun(host: Host, number: int, count: int, first: Host, port: int, ranks: int, *words: str) -> list[str]:
    """torchrun on one of `count` hosts, rendezvous at the first."""
    flags = [
        "--nnodes",
        str(count),
        "--node_rank",
        str(number),
        "--nproc_per_node",
        str(ranks),
        "--local_addr",
        host.address,
    ]
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{first.address}:{port}", "--rdzv_id", "preflight"]
    # The hosts share one hostname that resolves to none of their addresses, so torchrun cannot tell who hosts.
    rendezvous += ["--rdzv_conf", f"is_host={str(number == 0).lower()}"]
    return [sys.executable, "-m", "torch.distributed.run", *flags, *rendezvous, *words]


def preflight(
    hosts: list[Host],
    folder: Path,
    port: int,
    words: list[list[str]],
    environments: list[dict[str, str]] | None = None,
    ranks: list[int] | None = None,
) -> tuple[list[int], str, float]:
    """Run preflight on all hosts; exit codes, everything printed, seconds that the checks took."""
    begin = time.monotonic()
    logs = [folder / f"{port}-{i}.log" for i in range(len(hosts))]
    running = [
        host.start(
            torchrun(host, i, len(hosts), hosts[0], port, ranks[i] if ranks else 1, *words[i]),
            logs[i],
            {"PYTHONPATH": str(ROOT), **(environments[i] if environments else {})},
        )
        for i, host in enumerate(hosts)
    ]
    codes = [process.wait(timeout=200) for process in running]
    seconds = time.monotonic() - begin
    text = "\n".join(log.read_text() for log in logs)
    checked = float(re.search(r"checked in ([\d.]+) s", text)[1])  # the rest is starting Python and torch
    print(f"ended with {codes} after {seconds:.0f} s, checked in {checked} s")
    return codes, text, checked


@hosted
def test_two_hosts_that_are_the_same(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("lr: 1\n")
    with make_hosts(2) as hosts:
        words = [[*GOOD, "--config", str(config), "--writes", str(tmp_path / "runs")]] * 2
        codes, text, _ = preflight(hosts, tmp_path, 29511, words)
    assert codes == [0, 0], text
    assert text.count("no problem found") == 2 and hosts[1].address in text  # each host says it
    assert not list((tmp_path / "runs").iterdir())


@hosted
def test_everything_odd_about_a_host_is_named_on_both(tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    shutil.copytree(ROOT / "launch", other / "launch")
    shutil.copytree(ROOT / "distributed_muon", other / "distributed_muon")
    with (other / "launch" / "loop.py").open("a") as file:
        file.write("# edited\n")
    git = ["git", "-C", str(other), "-c", "user.name=a", "-c", "user.email=b@c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "another commit"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "odd.py").write_text(ODD)
    (tmp_path / "run.yaml").write_text("lr: 1\n")
    (other / "run.yaml").write_text("lr: 2\n")
    flags = [["--config", str(folder / "run.yaml"), "--writes", str(folder / "runs")] for folder in (tmp_path, other)]
    words = [[*GOOD, *flags[0]], [str(tmp_path / "odd.py"), *flags[1]]]
    environments = [{}, {"PYTHONPATH": str(other), "TORCH_NCCL_BLOCKING_WAIT": "1"}]
    with make_hosts(2) as hosts:
        codes, text, seconds = preflight(hosts, tmp_path, 29512, words, environments, [1, 2])
    assert all(codes) and seconds < 45, text
    node = f"{hosts[1].address} (ranks 1-2) has "
    for problem in (
        f"{node}config run.yaml",
        f"{node}commit {commit}",
        f"{node}source code",
        f"{node}torch (imported) 2.0.0, the others",
        f"{node}TORCH_NCCL_BLOCKING_WAIT 1, the others unset",
        f"{node}ranks on the node 2, the others 1",
        f"{hosts[1].address} does not see what rank 0 writes to",
        f"{hosts[1].address} allows 70 open files, and 3 ranks need 88: ulimit -n 88",
    ):
        assert text.count(problem) >= 2, (problem, text)
    assert f"{hosts[1].address} is 40.0 s ahead of node" in text, text


@hosted
def test_a_slow_link_between_two_hosts_is_named(tmp_path: Path) -> None:
    with make_hosts(2) as hosts:
        limit = ["tbf", "rate", "20mbit", "burst", "64kb", "latency", "200ms"]
        command = ["tc", "qdisc", "add", "dev", DEVICE, "root", *limit]
        assert hosts[1].start(command, tmp_path / "tc.log").wait() == 0
        codes, text, seconds = preflight(hosts, tmp_path, 29513, [GOOD] * 2)
    assert all(codes) and seconds < 45, text
    named = [line for line in text.splitlines() if line.startswith("PROBLEM")]
    for line in named:
        assert f"{hosts[1].address} to node" in line and "is slow: 2." in line, named
    assert len(named) == 2, named  # the same on both; the way back is fast


@hosted
def test_a_dead_link_between_two_of_three_hosts_is_named(tmp_path: Path) -> None:
    with make_hosts(3) as hosts:
        # Hosts 1 and 2 reach the rendezvous on host 0 but not each other.
        for host, peer in ((hosts[1], hosts[2]), (hosts[2], hosts[1])):
            route = ["ip", "route", "add", "blackhole", f"{peer.address}/32"]
            assert host.start(route, tmp_path / f"{host.name}.log").wait() == 0
        codes, text, seconds = preflight(hosts, tmp_path, 29514, [GOOD] * 3)
        assert all(codes), text
        assert f"{hosts[1].address} cannot reach node" in text and hosts[2].address in text, text
        assert seconds < 45, text


# ---- what needs more nodes than a machine has --------------------------------------------------------------


def test_a_slow_node_a_slow_link_and_a_wrong_clock_among_many() -> None:
    names = [f"n{i}" for i in range(8)]
    links = {a: {b: [100e6, 0.0] for b in names if b != a} for a in names}
    for name in set(names) - {"n5"}:
        links[name]["n5"][0] = 30e6
    links["n2"]["n3"][0] = 10e6
    links["n6"]["n0"][1] = -3.0
    assert link_problems(links, 1e6) == [
        "node n5 is slow: the best link into it carries 30.0 MB/s, the median is 100.0 MB/s",
        "the link from node n2 to node n3 is slow: 10.0 MB/s, the median is 100.0 MB/s",
        "the clock of node n6 is 3.0 s ahead of node n0's: start chrony or ntpd",
    ]


def test_every_node_is_measured_from_others_and_measures_few() -> None:
    for count in (2, 5, 16, 17, 1000):
        asked = {own: partners(own, count) for own in range(count)}
        assert all(own not in others and (own == 0 or 0 in others) for own, others in asked.items())
        assert {other for others in asked.values() for other in others} == set(range(count))
        assert max(map(len, asked.values())) <= max(15, count.bit_length() + 1)


def test_the_odd_node_is_the_one_against_the_majority() -> None:
    facts = [NodeFacts(r, f"n{r // 2}", "a", {"commit": "x" if r // 2 != 3 else "y"}) for r in range(8)]
    facts[2].faults = facts[3].faults = ["has a /dev/shm of 64 MiB"]
    assert find_problems(facts) == [
        "node n3 a (ranks 6-7) has commit y, the others x",
        "node n1 a has a /dev/shm of 64 MiB",
    ]


def test_what_is_wrong_with_a_node_by_itself_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert collect_facts(0, 8, [], [tmp_path]).faults == []
    (tmp_path / "file").touch()
    usage = shutil.disk_usage("/")._replace(total=64 << 20, free=5 << 20)
    monkeypatch.setattr(facts_module.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64 << 10, 64 << 10))
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: str(self) == "/dev/infiniband" or exists(self))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert collect_facts(0, 10_000, [], [tmp_path / "file"]).faults == [
        "has a /dev/shm of 64 MiB: mount one of 1 GiB or more (docker: --shm-size)",
        "allows 65536 open files, and 10000 ranks need 80064: ulimit -n 80064",
        "locks 64 KiB of memory at most, and RDMA needs no limit: ulimit -l unlimited",
        f"cannot write to {tmp_path / 'file'}: File exists",
        f"has 5 MiB free in {tmp_path}: make room for 1 GiB or more",
    ]


def test_a_rank_that_does_not_come_is_named() -> None:
    store = dist.HashStore()
    store.set("preflight/facts/2", "{}")
    with pytest.raises(PreflightError, match="ranks 1, 3 did not report their facts within 1 s"):
        _exchange(store, "facts", {}, 0, 4, 1.0)
