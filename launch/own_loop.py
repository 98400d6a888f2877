"""What the plain and the FSDP2 trainer share: a loop of their own around an optimizer that steps by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from distributed_muon import DistributedMuon, checkpoint
from launch.schedule import cosine_schedule
from launch.trainer import Trainer

if TYPE_CHECKING:
    from distributed_muon.integrations.fsdp2 import FullyShardedMuon


class OwnLoopTrainer(Trainer):
    """A trainer that calls backward and step itself.

    A subclass builds model and optimizer, then calls `start_or_resume`.
    """

    optimizer: DistributedMuon | FullyShardedMuon

    def start_or_resume(self) -> None:
        """Start at the checkpoint `begin`, if there is one, and at its place of the schedule; collective."""
        args = self.args
        self._seconds: Counter[str] = Counter()
        if self.begin is not None:
            with self.resuming(self.optimizer):
                self.go_on(self.run.load(lambda path: checkpoint.load(path, self.model, self.optimizer)))
        self.schedule = cosine_schedule(self.optimizer, args.lr, args.steps, args.warmup, args.final_lr, self.done)

    @abstractmethod
    def reducing(self, reduces: bool) -> AbstractContextManager[Any]:
        """Around a microbatch whose backward reduces the gradients, or only accumulates them."""

    def forward_backward(self) -> tuple[float, float]:
        """The last microbatch's backward reduces the gradients."""
        losses, count = [], self.args.accumulation
        for number, (tokens, targets) in enumerate(self.microbatches(), 1):
            with self.reducing(number == count):
                loss = self.model(tokens, targets)
                (loss / count).backward()
            losses.append(loss.detach())
        return self._summed(losses)

    def update(self) -> dict[str, float]:
        """Clip, step, and balance the experts."""
        metrics = {"lr": self.schedule.get_last_lr()[0]}
        metrics["grad_norm"] = self.optimizer.clip_grad_norm_(self.args.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        report = self.optimizer.local_report()
        self._seconds.update(report["seconds"])
        self.schedule.step()
        metrics |= self._after_step(report["skipped"])
        if self.world.size > 1:
            metrics["exposed_seconds"] = sum(one["exposed_seconds"] for one in report["communication"].values())
        return metrics

    def optimizer_seconds(self) -> dict[str, float]:
        """Its phases, of which it only reports the last step's; FSDP2's own collectives are not among them."""
        taken, self._seconds = dict(self._seconds), Counter()
        return taken

    def save(self) -> None:
        """Checkpoint now, or begin to, unless it is there; it loads on any ranks, and in the other trainers."""
        extra, wait = self.progress(), not self.args.background_saves
        self.run.save(self.done, lambda path: checkpoint.save(path, self.model, self.optimizer, extra, wait=wait))
