"""Seconds of a step: by phase, and per collective how long it was waited for and how long it ran unseen."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Mark = float | torch.cuda.Event
# Spans of CUDA events kept before the finished ones are added up, so that a report nobody asks for cannot grow.
_MOST_OPEN = 4096


class Times:
    """Spans between marks, added up by key; CUDA's are read when a sum is asked for, not before."""

    def __init__(self) -> None:
        self._open: list[tuple[Any, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[Any, float] = defaultdict(float)
        self._flights: dict[str, dict[str, int]] = defaultdict(lambda: {"calls": 0, "bytes": 0})

    def add(self, kind: str, name: str, begin: Mark, end: Mark) -> None:
        """Count the span as `kind` ("phase", "flight" or "exposed") of `name`."""
        if isinstance(begin, float):
            self._seconds[kind, name] += end - begin
            return
        self._open.append(((kind, name), begin, end))
        if len(self._open) > _MOST_OPEN:
            self._close([span for span in self._open if span[2].query()])

    def add_flight(self, label: str, sent_bytes: int, begin: Mark, wait: Mark, end: Mark) -> None:
        """Count a collective that was under way from `begin` and waited for from `wait`; both until `end`."""
        self.add("exposed", label, wait, end)
        self.add("flight", label, begin, end)
        counts = self._flights[label]
        counts["calls"] += 1
        counts["bytes"] += sent_bytes

    def seconds(self) -> dict[str, float]:
        """Seconds by phase; waits for CUDA work that was timed."""
        self._close(list(self._open))
        return {name: value for (kind, name), value in self._seconds.items() if kind == "phase"}

    def communication(self) -> dict[str, dict[str, float]]:
        """Per collective "calls", "bytes", "exposed_seconds" and "hidden_seconds"; see `StepTimer.flight`."""
        self._close(list(self._open))
        out = {}
        for label, counts in self._flights.items():
            exposed = self._seconds["exposed", label]
            hidden = max(0.0, self._seconds["flight", label] - exposed)
            out[label] = {**counts, "exposed_seconds": exposed, "hidden_seconds": hidden}
        return out

    def _close(self, spans: list[tuple[Any, torch.cuda.Event, torch.cuda.Event]]) -> None:
        for key, begin, end in spans:
            end.synchronize()
            self._seconds[key] += begin.elapsed_time(end) / 1e3
        closed = set(map(id, spans))
        self._open = [span for span in self._open if id(span) not in closed]


def named_range(name: str) -> AbstractContextManager[Any]:
    """A range for torch.profiler, while it listens: one costs microseconds even when nobody does."""
    return torch.profiler.record_function(name) if torch.autograd.profiler._is_profiler_enabled else nullcontext()


def describe(names: Sequence[str]) -> str:
    """A list of names that stays short: "a", "a to c (12)", "nothing"."""
    if not names:
        return "nothing"
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"


class StepTimer:
    """Times phases, `with timer("newton_schulz"): ...`, and collectives; torch.profiler shows phases as ranges.

    Args:
        device: the device whose work is timed; on CUDA the current stream's, by events.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._times = Times()

    def take(self) -> Times:
        """What was timed since the last call."""
        taken, self._times = self._times, Times()
        return taken

    def __call__(self, phase: str, of: str = "") -> Phase:
        """Time a phase; its range in the profile says of what it is, such as "update: wave 2, ..."."""
        return Phase(self, phase, of)

    def flight(self, label: str, sent_bytes: int) -> Flight:
        """Call when a collective starts.

        From there to the end of its wait it is in flight. The wait is exposed; the rest, in which other work
        ran, is hidden: an upper bound of what was saved, for the collective may have landed long before.
        """
        return Flight(self, label, sent_bytes)

    def mark(self) -> Mark:
        """Now, in the device's order of work."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Phase:
    """One phase of a step, around its work."""

    def __init__(self, timer: StepTimer, phase: str, of: str) -> None:
        self._timer, self._phase = timer, phase
        self._range = named_range(f"{phase}: {of}" if of else phase)

    def __enter__(self) -> None:
        self._range.__enter__()
        self._begin = self._timer.mark()

    def __exit__(self, *error: object) -> None:
        self._timer._times.add("phase", self._phase, self._begin, self._timer.mark())
        self._range.__exit__(*error)


class Flight:
    """One collective under way; `with flight.landing(): ...` around the wait for it."""

    def __init__(self, timer: StepTimer, label: str, sent_bytes: int) -> None:
        self._timer, self._label, self._bytes = timer, label, sent_bytes
        self._begin = timer.mark()

    def landing(self) -> Flight:
        """Around the wait for it."""
        return self

    def __enter__(self) -> None:
        self._wait = self._timer.mark()

    def __exit__(self, *error: object) -> None:
        self._timer._times.add_flight(self._label, self._bytes, self._begin, self._wait, self._timer.mark())
