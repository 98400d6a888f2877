"""The training loop of every trainer: steps, validation, checkpoints, an agreed stop, records and results."""

from __future__ import annotations

import json
import math
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from launch.data import TokenData
from launch.environment import describe_run
from launch.metrics import MetricsWriter, plot_losses
from launch.models.huggingface import check_target
from launch.progress import open_progress
from launch.run_dir import METRICS, PLAN, PLOT, RESULTS, SETTINGS, VERSIONS
from launch.trackers import open_trackers
from launch.world import StopRequest, World


class Trainer(Protocol):
    """One training run: its model, optimizer and data, and the steps done so far.

    Attributes:
        data: what it trains on.
        done: optimizer steps taken, those of the run it resumes included.
        samples_per_step: over all ranks.
        parameters: of the model, each counted once.
        kind: one word for the label of its curves. title: what the first line says of it.
    """

    data: TokenData
    done: int
    samples_per_step: int
    parameters: int
    kind: str
    title: str

    def train_step(self, stop: StopRequest) -> tuple[dict[str, float], bool]:
        """One optimizer step; collective.

        Args:
            stop: of this rank, to be reduced over the ranks beside the loss.

        Returns:
            The step's metrics, the same on every rank but for seconds: "loss", "lr" and "optimizer_seconds", others
            as they are known. Then whether some rank was asked to stop.
        """

    def validate(self) -> float:
        """Validation loss now, in nats per token; collective."""

    def save(self) -> None:
        """Checkpoint now, and delete old ones; collective."""

    def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face checkpoint; collective."""

    def explain(self) -> str:
        """The optimizer's plan, empty as long as there is none."""

    def results(self) -> dict[str, Any]:
        """What the results say beside what they say for every trainer."""


def train(build: Callable[[Namespace, World], Trainer], args: Namespace, world: World) -> dict[str, Any] | None:
    """Train to the end or to an agreed stop; collective over the world.

    Args:
        build: makes the trainer; a ValueError of it becomes a one-line error.
        args: with the flags of `arguments.trainer_parser`.
        world: all ranks of the job.

    Returns:
        The results, which rank 0 has printed as JSON and written beside the metrics; None after a stop.
    """
    stop = StopRequest()
    try:
        if args.save_hf is not None:
            check_target(args.save_hf)  # rather now than after the training
        trainer = build(args, world)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    # Every rank must have looked for checkpoints before rank 0 writes one.
    world.barrier()
    unigram, parameters = trainer.data.unigram_loss(args.validation_samples), trainer.parameters
    clock = StepClock(trainer.samples_per_step * args.sequence_length)
    with Reporter(args, world, trainer.done) as report:
        report.note(
            f"{args.model} of {parameters:,} parameters, {trainer.title}, {world.size} x {world.device}; "
            f"unigram validation loss {unigram:.4f}; writing to {args.run_dir}"
        )
        plan = trainer.explain()
        report.plan(plan)
        validated, loss = -1, math.nan
        saved, stopping = trainer.done, False
        while trainer.done < args.steps and not stopping:
            metrics, stopping = clock.time(trainer, stop)
            report.step(metrics)
            if not plan:
                plan = trainer.explain()
                report.plan(plan)
            if trainer.done % args.validation_interval == 0 and not stopping:
                validated, loss = trainer.done, trainer.validate()
                report.validation(validated, loss)
            if trainer.done % args.checkpoint_interval == 0:
                trainer.save()
                saved = trainer.done
        if saved != trainer.done:
            trainer.save()
        if trainer.done == args.steps and validated != trainer.done:
            loss = trainer.validate()
            report.validation(trainer.done, loss)
        if trainer.done == args.steps and args.save_hf is not None:
            trainer.export(args.save_hf)
            report.note(f"the model is in {args.save_hf}, in Hugging Face's format")
    if trainer.done < args.steps:
        report.note(f"stopped after step {trainer.done}; continue with --resume --run-dir {args.run_dir}")
        return None
    results = {
        "final_val_loss": loss,
        "unigram_val_loss": unigram,
        **clock.results(),
        "steps": trainer.done,
        "world_size": world.size,
        "model": args.model,
        "parameters": parameters,
        **trainer.results(),
        "run_dir": str(args.run_dir),
    }
    if world.main:
        plot_losses({f"{args.model} {trainer.kind}": args.run_dir / METRICS}, args.run_dir / PLOT, unigram)
        (args.run_dir / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps(results), flush=True)
    return results


class StepClock:
    """Times the steps of this process.

    Args:
        tokens: per step, over all ranks.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens, self._steps, self._seconds, self._optimizer_seconds = tokens, 0, 0.0, 0.0

    def time(self, trainer: Trainer, stop: StopRequest) -> tuple[dict[str, float], bool]:
        """`trainer.train_step(stop)`, its metrics completed by what follows from the time."""
        started = time.perf_counter()
        metrics, stopping = trainer.train_step(stop)
        seconds = time.perf_counter() - started
        self._steps += 1
        self._seconds += seconds
        self._optimizer_seconds += metrics["optimizer_seconds"]
        rates = {
            "seconds": seconds,
            "tokens_per_second": self._tokens / seconds,
            "optimizer_share": metrics["optimizer_seconds"] / seconds,
        }
        return {"step": trainer.done, **metrics, **rates}, stopping

    def results(self) -> dict[str, float]:
        """Means over all steps; 0 before the first."""
        seconds = max(self._seconds, 1e-9)
        return {
            "tokens_per_second": self._steps * self._tokens / seconds,
            "optimizer_seconds_share": self._optimizer_seconds / seconds,
        }


class Reporter:
    """Shows a run on the terminal and writes its records; silent on all ranks but 0. Construction is collective.

    A context: its end gives back the terminal and closes the files. Notes still work then.

    Args:
        args: of the trainer. world: its ranks. done: steps that a resumed run keeps.
    """

    def __init__(self, args: Namespace, world: World, done: int) -> None:
        self._directory, self._main = args.run_dir, world.main
        self._writers: list[Any] = []
        versions = describe_run(world)
        if world.main:
            # Paths and the like become text.
            settings = json.loads(json.dumps({**vars(args), "world_size": world.size}, default=str))
            self._writers.append(MetricsWriter(self._directory / METRICS, done))
            for name, content in ((SETTINGS, settings), (VERSIONS, versions)):
                (self._directory / name).write_text(json.dumps(content, indent=2) + "\n")
            self._writers += open_trackers(args.log_to, self._directory, done, settings)
        self._progress = open_progress(args.steps, done, args.log_interval, world.main)

    def step(self, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        self._progress.update(metrics)
        self._write(metrics)

    def validation(self, step: int, loss: float) -> None:
        """A validation is done."""
        self._progress.validated(step, loss)
        self._write({"step": step, "val_loss": loss})

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
