"""Size and checksum of every file of a checkpoint whose format has none: DeepSpeed's and Megatron's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from distributed_muon.checkpoint import DamagedCheckpoint
from distributed_muon.checkpoint.files import checksum, write_text
from launch.world import World

NAME = "files.json"


def write_manifest(folder: Path, world: World) -> None:
    """Note every file below `folder`; collective, the ranks share the reading."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    own = {name: _describe(folder / name) for name in names[world.rank :: world.size]}
    everyone = world.gather(own)
    if world.main:
        write_text(folder / NAME, json.dumps({name: about for own in everyone for name, about in own.items()}))
    world.barrier()


def check_manifest(folder: Path, world: World) -> None:
    """Compare every file with what was noted; collective. A checkpoint of a version that noted nothing passes.

    Raises:
        DamagedCheckpoint: on every rank; names the first file that is not what was saved.
    """
    if not world.gather((folder / NAME).exists())[0]:
        return
    try:
        noted = json.loads((folder / NAME).read_text(encoding="utf-8"))
        problem = _first_fault(folder, noted, list(noted)[world.rank :: world.size])
    except (OSError, ValueError, TypeError, LookupError):
        problem = f"{NAME} cannot be read"
    for found in world.gather(problem):
        if found is not None:
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {found}")


def _first_fault(folder: Path, noted: dict[str, list], names: Iterable[str]) -> str | None:
    for name in names:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != noted[name][0]:
            return f"{name} has {path.stat().st_size} of {noted[name][0]} bytes"
        if _describe(path) != noted[name]:
            return f"{name} has another checksum than when it was saved"
    return None


def _describe(path: Path) -> list:
    return [path.stat().st_size, checksum(path)]
