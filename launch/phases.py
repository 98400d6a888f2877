"""Seconds by phase of the step on this rank; over all ranks the least, the most, and who holds the others up."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

# What a rank does without waiting for others; with tensor or pipeline parallelism, with few others.
OWN_WORK = ("data", "forward_backward")
STRAGGLER = 1.2  # a rank whose own work takes this many times the median is named


class Phases:
    """Adds up the seconds of each phase, without those of the phases inside it; torch.profiler shows them as ranges.

    Attributes:
        seconds: by phase, since the start or the last `take()`.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = [0.0]  # per open phase, seconds of the phases inside it

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        profiling = torch.autograd.profiler._is_profiler_enabled
        begin = time.perf_counter()
        self._inside.append(0.0)
        try:
            with torch.profiler.record_function(name) if profiling else nullcontext():
                yield
        finally:
            seconds = time.perf_counter() - begin
            self.seconds[name] += seconds - self._inside.pop()
            self._inside[-1] += seconds

    def take(self) -> dict[str, float]:
        """The seconds so far; counting starts anew."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


@dataclass(frozen=True)
class Spread:
    """Phases of all ranks over the same steps.

    Args:
        least, most: seconds per step by phase.
        straggler: the rank whose own work takes longest, where that is `STRAGGLER` times the median or more.
        ratio: of its own work over the median.
    """

    least: dict[str, float]
    most: dict[str, float]
    straggler: int | None
    ratio: float

    def metrics(self) -> dict[str, float]:
        """As values for metrics.jsonl and trackers."""
        out = {f"seconds_min/{name}": value for name, value in self.least.items()}
        out |= {f"seconds_max/{name}": value for name, value in self.most.items()}
        return out | ({} if self.straggler is None else {"straggler": self.straggler, "straggler_ratio": self.ratio})

    def note(self, hosts: Sequence[str]) -> str | None:
        """A line that names the straggler, or None. `hosts`: of every rank."""
        if self.straggler is None:
            return None
        where = f"rank {self.straggler} on {hosts[self.straggler]}"
        return f"straggler: {where} takes {self.ratio:.1f} times the median for its own forward and backward"


def spread(seconds: Sequence[Mapping[str, float]], steps: int) -> Spread:
    """Compare the ranks.

    Args:
        seconds: of every rank by phase, over `steps` steps.
    """
    names = sorted({name for own in seconds for name in own})
    columns = {name: [own.get(name, 0.0) / max(1, steps) for own in seconds] for name in names}
    work = [sum(own.get(name, 0.0) for name in OWN_WORK) for own in seconds]
    # The lower median: of two ranks the slow one must not be measured against itself.
    median = sorted(work)[(len(work) - 1) // 2]
    slowest = max(range(len(work)), key=work.__getitem__)
    ratio = work[slowest] / median if median > 0 else 1.0
    return Spread(
        {name: min(column) for name, column in columns.items()},
        {name: max(column) for name, column in columns.items()},
        slowest if ratio >= STRAGGLER else None,
        ratio,
    )
