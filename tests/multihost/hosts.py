"""Several "hosts" on one machine: network namespaces on one bridge, each link limited by tc tbf."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SUBNET = "10.77.31"
DEVICE = "eth0"


@dataclass(frozen=True)
class Host:
    """One namespace; `address` is its own on the shared network."""

    name: str
    address: str

    def start(
        self, command: Sequence[str], log: Path, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Run a command on this host, output to `log`."""
        variables = {
            **os.environ,
            "GLOO_SOCKET_IFNAME": DEVICE,
            "TP_SOCKET_IFNAME": DEVICE,
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            env=variables,
        )

    def kill(self) -> None:
        """Kill every process of this host at once, as a power cut would."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        for pid in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def why_not() -> str | None:
    """Why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"dm-probe-{os.getpid()}"
    try:
        _run("ip", "netns", "add", probe)
        _run("ip", "netns", "del", probe)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces cannot be made: {error}"
    return None


@contextmanager
def make_hosts(count: int, megabits: int | None = None) -> Iterator[list[Host]]:
    """`count` hosts joined by a bridge, every link limited to `megabits` per second each way (None: unlimited)."""
    # A name is free again only some time after its namespace is gone, so every call takes new ones.
    tag = f"dm{uuid.uuid4().hex[:6]}"
    bridge = f"{tag}br"
    hosts = [Host(f"{tag}h{i}", f"{SUBNET}.{i + 1}") for i in range(count)]
    try:
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        for i, host in enumerate(hosts):
            outer = f"{tag}v{i}"
            inside = ("ip", "netns", "exec", host.name)
            _run("ip", "netns", "add", host.name)
            _run("ip", "link", "add", outer, "type", "veth", "peer", "name", DEVICE, "netns", host.name)
            _run("ip", "link", "set", outer, "master", bridge, "up")
            _run(*inside, "ip", "addr", "add", f"{host.address}/24", "dev", DEVICE)
            _run(*inside, "ip", "link", "set", DEVICE, "up")
            _run(*inside, "ip", "link", "set", "lo", "up")
            if megabits:
                limit = ("root", "tbf", "rate", f"{megabits}mbit", "burst", "64kb", "latency", "200ms")
                _run("tc", "qdisc", "add", "dev", outer, *limit)
                _run(*inside, "tc", "qdisc", "add", "dev", DEVICE, *limit)
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
