"""A run's directory: the names of its files, and the checkpoints in it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from distributed_muon.checkpoint import DamagedCheckpoint, Saving
from launch.manifest import check_manifest, write_manifest
from launch.run_lock import RunLock
from launch.world import World

T = TypeVar("T")
METRICS, PLOT = "metrics.jsonl", "loss.png"
SETTINGS, VERSIONS, PLAN, RESULTS = "settings.json", "versions.json", "plan.txt", "results.json"


class RunDirectory:
    """Names, finds and prunes the checkpoints of one run.

    Args:
        path: the run's directory, on a file system that all ranks share.
        world: the ranks.
        keep: complete checkpoints to keep; older ones are deleted.
    """

    def __init__(self, path: Path, world: World, keep: int) -> None:
        self.path, self._world, self._keep = path, world, keep
        self._saving: Saving | None = None
        self._lock: RunLock | None = None  # of rank 0; it ends with this object, or with the process

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, directory) of the complete checkpoints, oldest first."""
        found = (self.path / "checkpoints").glob("step-*")
        return sorted((int(path.name[5:]), path) for path in found if re.fullmatch(r"step-\d+", path.name))

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or will be."""
        return self.path / "checkpoints" / f"step-{step:08d}"

    def start(self, resume: str | None) -> Path | None:
        """The checkpoint to start from, or None to start anew; the directory is this job's from here on. Collective.

        Args:
            resume: "always", "auto" (where there is a checkpoint), or None.

        Raises:
            ValueError: there is none to resume from, the directory holds another run's, or another job is in it.
        """
        if resume == "always":
            self.latest()  # before a mistyped name becomes a directory
        problem = None
        if self._world.main:
            try:
                self._lock = RunLock(self.path)
            except ValueError as error:
                problem = str(error)
        if (problem := self._world.gather(problem)[0]) is not None:
            raise ValueError(problem)
        if self.checkpoints() and resume is None:
            raise ValueError(
                f"--run-dir {self.path} holds checkpoints of an earlier run: add --resume, or name another"
            )
        return self.latest() if resume == "always" or (resume == "auto" and self.checkpoints()) else None

    def latest(self) -> Path:
        """The newest complete checkpoint.

        Raises:
            ValueError: there is none.
        """
        found = self.checkpoints()
        if not found:
            raise ValueError(f"--resume: no checkpoint in {self.path}/checkpoints: start without --resume")
        return found[-1][1]

    def load(self, read: Callable[[Path], T]) -> T:
        """What `read` makes of the newest whole checkpoint; damaged ones are put aside, with a line each. Collective.

        Args:
            read: loads a checkpoint; raises a DamagedCheckpoint on all ranks, before it has changed anything.

        Raises:
            ValueError: none is whole.
        """
        while True:
            path = self.latest()
            try:
                return read(path)
            except DamagedCheckpoint as error:
                self._world.barrier()
                if self._world.main:
                    print(f"warning: {error}; it is {path.name}.damaged now, an older one is tried", flush=True)
                    path.rename(path.with_name(f"{path.name}.damaged"))
                self._world.barrier()

    def save(self, step: int, write: Callable[[Path], Saving | None]) -> None:
        """Write the checkpoint of `step` unless it is there, and delete old ones; collective.

        Args:
            step: steps done.
            write: writes a checkpoint that appears under the given path only when complete, at once or by the end of
                the save that it returns; collective.
        """
        path = self.checkpoint(step)
        if not path.exists():
            self._saving = write(path)
        self._prune()

    def wait(self) -> None:
        """Wait until the last checkpoint is complete; collective.

        Raises:
            OSError: it could not be written.
        """
        if self._saving is not None:
            self._saving.wait()
            self._prune()
        self._saving = None

    def complete(self, write: Callable[[Path], None]) -> Callable[[Path], None]:
        """Make `write`, which leaves half a folder when it is killed, one whose folder appears only when complete.

        It has a list of its files then, by which `verified` finds damage.
        """

        def write_complete(path: Path) -> None:
            unfinished = path.with_name(path.name + ".unfinished")
            if self._world.main:
                shutil.rmtree(unfinished, ignore_errors=True)
            self._world.barrier()
            write(unfinished)
            self._world.barrier()
            write_manifest(unfinished, self._world)
            if self._world.main:
                unfinished.rename(path)
            self._world.barrier()

        return write_complete

    def verified(self, read: Callable[[Path], T]) -> Callable[[Path], T]:
        """Make `read` raise a DamagedCheckpoint, before it reads, where a file is not what `complete` saw written."""

        def read_verified(path: Path) -> T:
            check_manifest(path, self._world)
            return read(path)

        return read_verified

    def _prune(self) -> None:
        """Delete all but the newest checkpoints; collective."""
        if self._world.main:
            for _, old in self.checkpoints()[: -self._keep]:
                shutil.rmtree(old)
        self._world.barrier()
