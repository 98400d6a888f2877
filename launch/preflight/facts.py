"""What a rank knows of its node, what must be the same on all nodes, and what is wrong with a node by itself."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import shutil
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from launch.environment import PACKAGES, commit
from launch.sameness import spans

_VARIABLES = ("NCCL_", "TORCH_", "PYTORCH_", "OMP_NUM_THREADS")
# These name devices of the node.
_MAY_DIFFER = ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA")
_LEAST_SHM = 1 << 30  # of NCCL's and the data loaders' shared memory; Docker gives 64 MiB
_LEAST_DISK = 1 << 30
_FILES_PER_RANK = 8  # sockets of a rank to each other rank, over all groups


@dataclass
class NodeFacts:
    """What one rank knows of its node.

    Args:
        rank: of the job. node: host name. address: on the way to the rendezvous host.
        compared: must be equal on all nodes. faults: what is wrong on this node, whatever the others are.
    """

    rank: int
    node: str
    address: str
    compared: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The node, as messages name it."""
        return f"{self.node} {self.address}"


def collect_facts(rank: int, world: int, config: Sequence[Path], writes: Sequence[Path]) -> NodeFacts:
    """Versions, code, devices, variables, configuration and limits of this rank; local.

    Args:
        rank, world: of the job. config: files that must be equal. writes: folders that the job writes to.
    """
    compared = {
        "python": platform.python_version(),
        "torch (imported)": torch.__version__,
        "commit": commit() or "unknown",
        "source code": _source_digest(),
        "ranks on the node": os.environ.get("LOCAL_WORLD_SIZE", "1"),
        "GPUs on the node": str(torch.cuda.device_count()),
        "gpu": "none",
    }
    for package in PACKAGES:
        try:
            compared[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            compared[package] = "not installed"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", 0)))
        compared["gpu"] = f"{device.name}, {device.total_memory >> 30} GiB"
        compared["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for name in sorted(os.environ):
        if name.startswith(_VARIABLES) and name not in _MAY_DIFFER:
            compared[name] = os.environ[name]
    for path in config:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else "missing"
        compared[f"config {path.name}"] = digest
    return NodeFacts(rank, socket.gethostname(), _own_address(), compared, _faults(world, writes))


def _source_digest() -> str:
    """Hash of this project's source, which an installed copy has as well as a checkout."""
    code = hashlib.blake2b(digest_size=6)
    root = Path(__file__).parents[2]
    for folder in ("distributed_muon", "launch"):
        for file in sorted((root / folder).rglob("*.py")):
            code.update(f"{file.relative_to(root)}\n".encode())
            code.update(file.read_bytes())
    return code.hexdigest()


def _faults(world: int, writes: Sequence[Path]) -> list[str]:
    faults = []
    shm = Path("/dev/shm")
    if shm.is_dir() and (size := shutil.disk_usage(shm).total) < _LEAST_SHM:
        faults.append(f"has a /dev/shm of {size >> 20} MiB: mount one of 1 GiB or more (docker: --shm-size)")
    files, need = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 64 + _FILES_PER_RANK * world
    if files != resource.RLIM_INFINITY and files < need:
        faults.append(f"allows {files} open files, and {world} ranks need {need}: ulimit -n {need}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if Path("/dev/infiniband").exists() and locked != resource.RLIM_INFINITY:
        faults.append(f"locks {locked >> 10} KiB of memory at most, and RDMA needs no limit: ulimit -l unlimited")
    for path in (*writes, Path(os.environ.get("TMPDIR", "/tmp"))):
        try:
            path.mkdir(parents=True, exist_ok=True)
            free, writable = shutil.disk_usage(path).free, os.access(path, os.W_OK)
        except OSError as error:
            faults.append(f"cannot write to {path}: {error.strerror}")
            continue
        if not writable:
            faults.append(f"cannot write to {path}: no permission")
        elif free < _LEAST_DISK:
            faults.append(f"has {free >> 20} MiB free in {path}: make room for 1 GiB or more")
    return faults


def _own_address() -> str:
    """This node's address on the way to the rendezvous host; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def find_problems(facts: Sequence[NodeFacts]) -> list[str]:
    """One line per fact of a node that differs from that of most nodes (of two, the first), and per fault of a node."""
    lines = []
    firsts = {fact.label: fact for fact in reversed(facts)}.values()
    for key in sorted({key for fact in facts for key in fact.compared}):
        values = Counter(first.compared.get(key, "unset") for first in reversed(list(firsts)))
        usual = values.most_common(1)[0][0]
        odd: dict[tuple[str, str], list[int]] = {}
        for fact in facts:
            value = fact.compared.get(key, "unset")
            if value != usual:
                odd.setdefault((fact.label, value), []).append(fact.rank)
        for (node, value), ranks in odd.items():
            lines.append(f"node {node} ({spans(ranks)}) has {key} {value}, the others {usual}")
    # All ranks of a node have the same faults.
    return lines + list(dict.fromkeys(f"node {fact.label} {fault}" for fact in facts for fault in fact.faults))
