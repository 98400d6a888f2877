"""Preflight over real links between two hosts: the wrong version, the dead link and the other config are named."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.multihost.hosts import Host, make_hosts, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no hosts: {why_not()}")
ROOT = Path(__file__).resolve().parents[2]


def torchrun(host: Host, number: int, count: int, first: Host, port: int, *words: str) -> list[str]:
    """torchrun on one of `count` hosts, one rank each, rendezvous at the first."""
    flags = ["--nnodes", str(count), "--node_rank", str(number), "--nproc_per_node", "1", "--local_addr", host.address]
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{first.address}:{port}", "--rdzv_id", "preflight"]
    # The hosts share one hostname that resolves to none of their addresses, so torchrun cannot tell who hosts.
    rendezvous += ["--rdzv_conf", f"is_host={str(number == 0).lower()}"]
    return [sys.executable, "-m", "torch.distributed.run", *flags, *rendezvous, *words]


def preflight(
    hosts: list[Host], folder: Path, port: int, words: list[list[str]], environments: list[dict[str, str]] | None = None
) -> tuple[list[int], str, float]:
    """Run preflight on all hosts; exit codes, everything printed, seconds."""
    begin = time.monotonic()
    logs = [folder / f"{port}-{i}.log" for i in range(len(hosts))]
    running = [
        host.start(
            torchrun(host, i, len(hosts), hosts[0], port, *words[i]),
            logs[i],
            {"PYTHONPATH": str(ROOT), **(environments[i] if environments else {})},
        )
        for i, host in enumerate(hosts)
    ]
    codes = [process.wait(timeout=90) for process in running]
    return codes, "\n".join(log.read_text() for log in logs), time.monotonic() - begin


def test_two_hosts(tmp_path: Path) -> None:
    config, other = tmp_path / "run.yaml", tmp_path / "elsewhere"
    config.write_text("lr: 1\n")
    other.mkdir()
    (other / "run.yaml").write_text("lr: 2\n")
    wrong_version = tmp_path / "wrong_version.py"
    wrong_version.write_text(
        "import runpy, sys, torch\ntorch.__version__ = '2.0.0'\n"
        "sys.argv = ['preflight']\nrunpy.run_module('launch.preflight', run_name='__main__')\n"
    )
    good = ["-m", "launch.preflight"]
    with make_hosts(2) as hosts:
        codes, text, _ = preflight(hosts, tmp_path, 29511, [[*good, "--config", str(config)]] * 2)
        assert codes == [0, 0], text
        assert "no problem found" in text and hosts[1].address in text

        words = [[*good, "--config", str(config)], [*good, "--config", str(other / "run.yaml")]]
        codes, text, _ = preflight(hosts, tmp_path, 29512, words)
        assert codes != [0, 0]
        assert f"{hosts[1].address} (ranks 1) has config run.yaml" in text, text

        codes, text, _ = preflight(hosts, tmp_path, 29513, [good, [str(wrong_version)]])
        assert codes != [0, 0]
        assert f"{hosts[1].address} (ranks 1) has torch (imported) 2.0.0" in text, text


def test_a_dead_link_between_two_of_three_hosts_is_named(tmp_path: Path) -> None:
    good = ["-m", "launch.preflight"]
    with make_hosts(3) as hosts:
        # Hosts 1 and 2 reach the rendezvous on host 0 but not each other.
        for host, peer in ((hosts[1], hosts[2]), (hosts[2], hosts[1])):
            route = ["ip", "route", "add", "blackhole", f"{peer.address}/32"]
            assert host.start(route, tmp_path / f"{host.name}.log").wait() == 0
        codes, text, seconds = preflight(hosts, tmp_path, 29514, [good] * 3)
        assert all(codes), text
        assert f"{hosts[1].address} cannot reach node" in text and hosts[2].address in text, text
        assert seconds < 60, text
