"""What a run shows on the terminal and leaves in its directory."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from launch.environment import describe_run
from launch.metrics import MetricsWriter
from launch.phases import Spread
from launch.progress import open_progress
from launch.resumption import as_settings
from launch.run_dir import METRICS, PLAN, SETTINGS, VERSIONS
from launch.trackers import open_trackers
from launch.world import World


class Reporter:
    """Shows a run on the terminal and writes its records; silent on all ranks but 0. Construction is collective.

    A context: its end gives back the terminal and closes the files. Notes still work then.

    Args:
        args: of the trainer. world: its ranks. hosts: of every rank. done: steps that a resumed run keeps.
    """

    def __init__(self, args: Namespace, world: World, hosts: Sequence[str], done: int) -> None:
        self._directory, self._main, self._hosts = args.run_dir, world.main, hosts
        self._straggler: int | None = None
        self._shown: int | None = None
        self._writers: list[Any] = []
        versions = describe_run(world, hosts)
        if world.main:
            settings = as_settings(args, world.size)
            self._writers.append(MetricsWriter(self._directory / METRICS, done))
            for name, content in ((SETTINGS, settings), (VERSIONS, versions)):
                (self._directory / name).write_text(json.dumps(content, indent=2) + "\n")
            self._writers += open_trackers(args.log_to, self._directory, done, settings)
        self._progress = open_progress(args.steps, done, args.log_interval, world.main)

    def step(self, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        self._progress.update(metrics)
        self._write(metrics)
        if metrics.get("skipped"):
            count = metrics["skipped_steps"]
            self.note(f"step {metrics['step']} was skipped: a gradient has inf or nan; {count} skipped so far")

    def validation(self, step: int, loss: float) -> None:
        """A validation is done."""
        self._progress.validated(step, loss)
        self._write({"step": step, "val_loss": loss})

    def spread(self, step: int, phases: Spread, extra: Mapping[str, float]) -> None:
        """The ranks were compared; a straggler is shown once, when a second comparison in a row finds the same."""
        self._write({"step": step, **phases.metrics(), **extra})
        found, before = phases.straggler, self._straggler
        if found is not None and found == before and found != self._shown:
            self._progress.note(f"step {step} {phases.note(self._hosts)}")
            self._shown = found
        self._straggler = found

    def plan(self, text: str) -> None:
        """Keep the optimizer's plan, unless it is empty."""
        if self._main and text:
            (self._directory / PLAN).write_text(text + "\n")

    def note(self, text: str) -> None:
        """Show a line."""
        self._progress.note(text)

    def _write(self, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(values)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.close()
        for writer in self._writers:
            writer.close()
