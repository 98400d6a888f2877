"""What a step measured: seconds by phase, and per-matrix values collected from the homes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from distributed_muon.collectives import Collectives
from distributed_muon.plan import Plan


class PhaseTimer:
    """Adds up seconds under phase names: `with timer("newton_schulz"): ...`; torch.profiler shows them as ranges.

    Args:
        device: the device whose work is timed; CUDA phases are read from events when `seconds()` is called.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: Counter[str] = Counter()
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        # Only while a profiler listens: a range costs microseconds even when nobody does.
        profiling = torch.autograd.profiler._is_profiler_enabled
        with torch.profiler.record_function(phase) if profiling else nullcontext(), self._timed(phase):
            yield

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        if self._cuda:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            try:
                yield
            finally:
                stop.record()
                self._events.append((phase, start, stop))
            return
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - begin

    def seconds(self) -> dict[str, float]:
        """Seconds per phase since the last `reset()`; waits for CUDA work that was timed."""
        for phase, start, stop in self._events:
            stop.synchronize()
            self._seconds[phase] += start.elapsed_time(stop) / 1e3
        self._events.clear()
        return dict(self._seconds)

    def reset(self) -> None:
        """Forget all phases."""
        self._seconds.clear()
        self._events.clear()


def merge_measured(
    collectives: Collectives, plan: Plan, measured: Mapping[str, Mapping[int, Tensor]], device: torch.device
) -> dict[str, dict[str, float]]:
    """Bring values measured at the homes to every rank; collective over the plan's domain, not counted.

    Args:
        measured: per quantity, {matrix or block number: 0-d square} of this rank's homes.

    Returns:
        Per quantity, {matrix name: root of the sum of its squares} for every matrix that was orthogonalized.
    """
    out = {}
    for quantity, squares in sorted(measured.items()):
        # Where all holders are homes they measured the same: one of them reports.
        mine = [matrix for matrix in squares if plan.homes[matrix][0] == collectives.rank]
        total = torch.zeros(2, len(plan.homes), device=device)
        if mine:
            total[0, mine] = torch.stack([squares[matrix] for matrix in mine]).to(total.dtype)
            total[1, mine] = 1
        sums, counts = collectives.all_reduce(total, counted=False).tolist()
        by_name: dict[str, float] = {}
        for matrix, value, count in zip(plan.layout.matrices, sums, counts, strict=True):
            if count:
                by_name[matrix.name] = by_name.get(matrix.name, 0.0) + value
        out[quantity] = {name: value**0.5 for name, value in by_name.items()}
    return out
