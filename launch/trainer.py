"""What every trainer is: a run directory, data, a model with its optimizer, and the course of one optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from launch import arguments
from launch.models import huggingface
from launch.phases import Phases
from launch.run_dir import RunDirectory
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
        done: optimizer steps taken, those of the run it resumes included.
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
        self.done = 0
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
            as they are known. Then whether some rank was asked to stop.
        """
        with self.phases("forward_backward"):
            local = self.forward_backward()
            self.world.wait_for_stream()
        with self.phases("wait"):  # for the slowest rank
            loss, count, stopping = self.world.sum(*local, stop.requested)
        before = self.phases.seconds["optimizer"]
        with self.phases("optimizer"):
            metrics = self.update()
            self.world.synchronize()
        self.done += 1
        seconds = self.phases.seconds["optimizer"] - before
        return {"loss": loss / count, **metrics, "optimizer_seconds": seconds}, stopping > 0

    @abstractmethod
    def forward_backward(self) -> tuple[float, float]:
        """Loss and gradients of `microbatches()`; the sum of this rank's losses and their number."""

    @abstractmethod
    def update(self) -> dict[str, float]:
        """The optimizer step on these gradients; its metrics, "lr" among them. Collective."""

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

    @abstractmethod
    def save(self) -> None:
        """Checkpoint now, unless it is there, and delete old ones; collective."""

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
