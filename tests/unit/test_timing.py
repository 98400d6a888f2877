"""Seconds by phase, and what of a collective the step waited for, on a clock that the test moves."""

from __future__ import annotations

import pytest
import torch

from distributed_muon.engine import timing
from distributed_muon.engine.timing import StepTimer, Times


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(timing, "time", fake)
    return fake


def test_a_collective_is_exposed_while_waited_for_and_hidden_before(clock: Clock) -> None:
    timer = StepTimer(torch.device("cpu"))
    first, second = timer.flight("gather", 100), timer.flight("gather", 20)
    clock.now += 3.0  # other work
    with first.landing():
        clock.now += 0.5
    with second.landing():
        clock.now += 0.25
    row = timer.take().communication()["gather"]
    assert row == {"calls": 2, "bytes": 120, "exposed_seconds": 0.75, "hidden_seconds": 3.0 + 3.5}


def test_phases_add_up_also_when_they_end_in_an_error(clock: Clock) -> None:
    timer = StepTimer(torch.device("cpu"))
    for _ in range(2):
        with pytest.raises(KeyError), timer("update"):
            clock.now += 2.0
            raise KeyError
    times = timer.take()
    assert times.seconds() == {"update": 4.0}
    assert times.communication() == {}
    assert timer.take().seconds() == {}


def test_a_collective_counts_where_it_lands(clock: Clock) -> None:
    timer = StepTimer(torch.device("cpu"))
    flight = timer.flight("all_gather", 8)
    assert timer.take().communication() == {}
    clock.now += 1.0
    with flight.landing():
        pass
    assert timer.take().communication()["all_gather"]["hidden_seconds"] == 1.0


class Event:
    """As a CUDA event: reads its time only when synchronized."""

    def __init__(self, at: float, done: bool) -> None:
        self.at, self.done, self.synchronized = at, done, False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.synchronized = True

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


def test_device_spans_are_not_waited_for_before_somebody_asks_and_do_not_pile_up() -> None:
    times = Times()
    for number in range(3 * timing._MOST_OPEN):
        times.add("phase", "update", Event(number, True), Event(number + 1, True))
        assert len(times._open) <= timing._MOST_OPEN
    late = Event(0.0, False), Event(5.0, False)
    times.add("phase", "wait", *late)
    assert not late[1].synchronized
    assert times.seconds() == {"update": 3 * timing._MOST_OPEN, "wait": 5.0}
    assert late[1].synchronized
