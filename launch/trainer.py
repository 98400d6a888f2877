"""What every trainer is: a run directory, data, a model with its optimizer, and the course of one optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch import arguments, resumption
from launch.models import huggingface, update_expert_bias
from launch.phases import Phases
from launch.run_dir import SETTINGS, RunDirectory
from launch.sameness import check_same
from launch.validation import validation_loss
from launch.world import StopRequest, World


class Trainer(ABC):
    """One training run: its model, optimizer and data, and the steps done so far.

    A subclass builds `model`, its optimizer and `parameters`, loads the checkpoint `begin` where there is one, and
    says in `forward_backward`, `update` and `save` how its framework does them. Construction is collective.

    Args:
        args: with the flags of `arguments.trainer_parser`.
        world: all ranks of the job.

    Attributes:
        begin: the checkpoint to start from, or None. data: what it trains on.
        done: optimizer steps taken or skipped, those of the run it resumes included. skipped: those skipped of them.
        data_rank, data_size: this rank among those with samples of their own, and their number.
        parameters: of the model, each counted once.
        kind: one word for the label of its curves. title: what the first line says of it.
        phases: seconds of this rank by phase of the step.

    Raises:
        ValueError: an option that cannot be right or differs over the ranks; the message names it.
    """

    kind: str
    title: str
    model: nn.Module
    parameters: int

    def __init__(self, args: Namespace, world: World) -> None:
        self.args, self.world = args, world
        self.run = RunDirectory(args.run_dir, world, args.keep_checkpoints)
        self.begin = self.run.start(args.resume)
        self.data = arguments.make_data(args)
        check_same(world, args, self.data)
        self.data_rank, self.data_size = world.rank, world.size
        self.done = self.skipped = 0
        self.phases = Phases()

    @property
    def samples_per_step(self) -> int:
        """Samples of all ranks and microbatches."""
        return self.data_size * self.args.accumulation * self.args.batch_size

    def microbatches(self) -> Iterator[list[Tensor]]:
        """Tokens and targets of this rank's microbatches of the next step, each (batch, length) on its device."""
        args = self.args
        for microbatch in range(args.accumulation):
            place = (self.done, microbatch, self.data_rank, self.data_size)
            with self.phases("data"):
                batch = self.data.batch(*place, size=args.batch_size, accumulation=args.accumulation)
                batch = self.world.to_device(*batch)
            yield batch

    def train_step(self, stop: StopRequest) -> tuple[dict[str, float], bool]:
        """One optimizer step; collective.

        Args:
            stop: of this rank, to be reduced over the ranks beside the loss.

        Returns:
            The step's metrics, the same on every rank but for seconds: "loss", "lr" and "optimizer_seconds", others
            as they are known; "skipped_steps" so far with --nonfinite skip. Then whether some rank was asked to stop.

        Raises:
            SystemExit: a gradient has an inf or nan (with --nonfinite raise); nothing has been changed.
        """
        with self.phases("forward_backward"):
            local = self.forward_backward()
            self.world.wait_for_stream()
        with self.phases("wait"):  # for the slowest rank
            loss, count, stopping = self.world.sum(*local, stop.requested)
        before = self.phases.seconds["optimizer"]
        with self.phases("optimizer"):
            try:
                metrics = self.update()
            except FloatingPointError as error:
                found = str(error).partition(": ")[0]
                raise SystemExit(
                    f"error: step {self.done + 1}: {found}: the step was not taken; resume from the last checkpoint "
                    "with another --lr or --data, or skip such steps with --nonfinite skip"
                ) from None
            self.world.synchronize()
        self.done += 1
        if self.args.nonfinite == "skip":
            self.skipped += bool(metrics.get("skipped"))
            metrics["skipped_steps"] = self.skipped
        seconds = self.phases.seconds["optimizer"] - before
        return {"loss": loss / count, **metrics, "optimizer_seconds": seconds}, stopping > 0

    @abstractmethod
    def forward_backward(self) -> tuple[float, float]:
        """Loss and gradients of `microbatches()`; the sum of this rank's losses and their number."""

    def _summed(self, losses: Sequence[Tensor]) -> tuple[float, float]:
        """What `forward_backward` returns, of detached losses; the host waits once, not for every microbatch."""
        return sum(torch.stack(list(losses)).tolist()), len(losses)

    def _after_step(self, skipped: bool) -> dict[str, float]:
        """Balance the experts; a step that was skipped has counted their loads for nothing.

        Returns:
            The metrics of both: "skipped", and the balance where there are experts.
        """
        metrics: dict[str, float] = {"skipped": 1} if skipped else {}
        balance = update_expert_bias(self.model, 0.0 if skipped else self.args.expert_bias_rate)
        return metrics if balance is None else metrics | {"expert_load_max_over_mean": balance}

    @abstractmethod
    def update(self) -> dict[str, float]:
        """The optimizer step on these gradients; collective.

        Returns:
            Its metrics: "lr", and "skipped" where it was not taken because a gradient has an inf or nan.

        Raises:
            FloatingPointError: with --nonfinite raise it was not taken for that; names the parameter up to ": ".
        """

    def take_seconds(self) -> dict[str, float]:
        """Seconds of this rank by phase since the last call, the optimizer's own beside ours; collective."""
        inside = {f"optimizer/{name}": seconds for name, seconds in self.optimizer_seconds().items()}
        return self.phases.take() | inside

    def optimizer_seconds(self) -> dict[str, float]:
        """What the optimizer timed since the last call, by phase; collective."""
        return {}

    def validate(self) -> float:
        """Validation loss now, in nats per token; collective."""
        return validation_loss(self.model, self.data, self.world, self.args.validation_samples, self.args.batch_size)

    def progress(self) -> dict[str, int]:
        """What a checkpoint says of the run beside model and optimizer."""
        return {"step": self.done, "samples_per_step": self.samples_per_step, "skipped": self.skipped}

    @contextmanager
    def resuming(self, optimizer: Any) -> Iterator[None]:
        """Around the loading of a checkpoint; then rank 0 says which options are other ones than before. Collective.

        Args:
            optimizer: with the parameter groups of this run.

        Raises:
            ValueError: it is of another model; names the size.
        """
        before = self.world.gather(resumption.read_settings(self.args.run_dir / SETTINGS))[0]
        resumption.check_sizes(before, self.args)
        given = resumption.group_options(self.args, optimizer.param_groups)
        yield
        kept = resumption.kept_options(given, resumption.group_options(self.args, optimizer.param_groups))
        line = resumption.differences(before, resumption.as_settings(self.args, self.world.size), kept)
        if self.world.main and line is not None:
            print(line, flush=True)

    def go_on(self, progress: Mapping[str, int]) -> None:
        """Take over what `progress()` of the run that is resumed said."""
        self.done, self.skipped = progress["step"], progress.get("skipped", 0)
        before = progress.get("samples_per_step", self.samples_per_step)
        if self.world.main and before != self.samples_per_step:
            print(
                f"note: {self.samples_per_step} samples per step, before {before}: "
                "choose --accumulation and --batch-size to keep the number"
            )

    @abstractmethod
    def save(self) -> None:
        """Checkpoint now, or begin to (--background-saves), unless it is there; delete old ones. Collective."""

    def wait_for_save(self) -> None:
        """Wait until the last checkpoint is complete; collective."""
        self.run.wait()

    def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face checkpoint; collective."""
        if self.world.main:
            huggingface.save(self.model, folder)
        self.world.barrier()

    @abstractmethod
    def explain(self) -> str:
        """The optimizer's plan, empty as long as there is none."""

    @abstractmethod
    def results(self) -> dict[str, Any]:
        """What the results say beside what they say for every trainer."""
