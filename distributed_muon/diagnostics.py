"""Seconds by phase of a step, on the CPU clock or by CUDA events without stopping the stream."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up seconds under phase names: `with timer("newton_schulz"): ...`.

    Args:
        device: the device whose work is timed; CUDA phases are read from events when `seconds()` is called.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: Counter[str] = Counter()
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
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
