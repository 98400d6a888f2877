"""Ends a job that makes no progress, and says in one line which rank the others wait for, and where.

Every rank has a thread that looks at the clock. When one finds no progress, all write what they are doing into the
job's store: their place in the code and what torch's flight recorder knows of their collectives. A rank that is
stopped, or whose node is gone, writes nothing, and that tells.
"""

from __future__ import annotations

import json
import linecache
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch

from launch.failure import tell_torchrun
from launch.sameness import spans
from launch.world import World

GRACE = 5.0  # seconds that a rank has to write what it is doing
_ROOT = str(Path(__file__).parents[1])
_TORCH_DISTRIBUTED = os.path.join(os.path.dirname(torch.__file__), "distributed")
_WAITING_CALLS = (".wait(", "synchronize(", ".item()", ".tolist()", "barrier(", "all_reduce(", "all_gather")


@dataclass
class RankState:
    """What one rank does.

    Args:
        place: file, line and function of this project that its main thread is in.
        waits: whether that is a wait for others.
        groups: of each process group by name, the number of its last collective, its name, and whether it is done.
    """

    place: str
    waits: bool
    groups: dict[str, tuple[int, str, bool]] = field(default_factory=dict)


class Watchdog:
    """Watches one run; a context around it. Nothing is watched with `seconds` 0, or on a single rank.

    Args:
        world: all ranks. seconds: the longest time between two calls of `progress`.
        hosts: of every rank. folder: gets torch's flight records, for `torchfrtrace`.
    """

    def __init__(self, world: World, seconds: float, hosts: Sequence[str], folder: Path) -> None:
        self._world, self._seconds, self._hosts, self._folder = world, seconds, hosts, folder
        self._main, self._over = threading.main_thread().ident, threading.Event()
        self._thread: threading.Thread | None = None
        self.progress("the first step")

    def progress(self, what: str) -> None:
        """Something is done, and `what` comes next."""
        self._what, self._since = what, time.monotonic()

    def __enter__(self) -> Watchdog:
        if self._seconds and self._world.size > 1 and self._world.store is not None:
            # The main thread may wait inside its own connection to the store.
            self._store = self._world.store.clone()
            self._store.set_timeout(timedelta(seconds=GRACE))
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
            threading.Thread(target=self._watch_store, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(GRACE)

    def _watch(self) -> None:
        interval = min(5.0, self._seconds / 10)
        while not self._over.wait(interval):
            late = time.monotonic() - self._since > self._seconds
            try:
                if late or self._store.check(["stuck"]):
                    self._end()
            except RuntimeError:  # `_watch_store` speaks if it stays so; a job goes on without its store
                continue

    def _watch_store(self) -> None:
        """Where the process that holds the store is stopped, `_watch` waits for an answer that never comes."""
        while not self._over.wait(GRACE):
            if time.monotonic() - self._since > self._seconds + 4 * GRACE:
                # Without a store ranks cannot agree who speaks; on the node of rank 0 its neighbour can.
                speak = os.environ.get("LOCAL_RANK", "0") in ("0", "1")
                self._leave(
                    f"the job's store does not answer: rank 0 on {self._hosts[0]} is stopped, or is gone", speak
                )

    def _end(self) -> None:
        """Write this rank's state; the first rank here waits for the others' and prints the line."""
        store, rank = self._store, self._world.rank
        store.set("stuck", "1")
        self._keep_flight_records()
        store.set(f"state/{rank}", json.dumps(asdict(own_state(self._main))))
        if store.add("stuck_first", 1) == 1:
            until = time.monotonic() + GRACE
            keys = {other: f"state/{other}" for other in range(self._world.size)}
            while time.monotonic() < until and not all(store.check([key]) for key in keys.values()):
                time.sleep(0.1)
            states = {
                other: RankState(**json.loads(store.get(key))) for other, key in keys.items() if store.check([key])
            }
            found = diagnose(states, self._hosts)
            store.set("diagnosis", found)
            self._leave(found)
        until = time.monotonic() + 2 * GRACE
        while time.monotonic() < until and not store.check(["diagnosis"]):
            time.sleep(0.1)
        self._leave(store.get("diagnosis").decode(), speak=False)

    def _leave(self, found: str, speak: bool = True) -> None:
        line = f"error: no progress for {self._seconds:.0f} s in {self._what}: {found}"
        if speak:
            print(f"{line} (flight records: {self._folder}; --timeout)", file=sys.stderr, flush=True)
        tell_torchrun(line)
        time.sleep(0.5)  # the store's host must not be the first to go
        os._exit(1)

    def _keep_flight_records(self) -> None:
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"rank_{self._world.rank}").write_bytes(
                _dump("_dump_nccl_trace") or _dump("_dump_fr_trace")
            )


def own_state(thread: int | None) -> RankState:
    """What this rank does now.

    Args:
        thread: identity of its main thread.
    """
    place, waits = _place(sys._current_frames().get(thread))
    return RankState(place, waits, _last_collectives())


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """Innermost place in this project, and whether a wait for others is at or below it."""
    waits = False
    while frame is not None:
        file = frame.f_code.co_filename
        line = linecache.getline(file, frame.f_lineno)
        waits = waits or file.startswith(_TORCH_DISTRIBUTED) or any(call in line for call in _WAITING_CALLS)
        if file.startswith(_ROOT) and "site-packages" not in file:
            return f"{os.path.relpath(file, _ROOT)}:{frame.f_lineno} {frame.f_code.co_name}", waits
        frame = frame.f_back
    return "code that is not this project's", waits


def _last_collectives() -> dict[str, tuple[int, str, bool]]:
    """Per process group, the last collective in torch's flight recorder: its number, name, and whether it is done."""
    groups: dict[str, tuple[int, str, bool]] = {}
    for dump in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        with suppress(ValueError):
            for entry in json.loads(_dump(dump) or "{}").get("entries", []):
                done = entry["retired"] or entry["state"] == "completed"
                name = entry["profiling_name"].partition(":")[2] or entry["profiling_name"]
                groups[" ".join(filter(None, entry["process_group"]))] = (entry["collective_seq_id"], name, done)
    return groups


def _dump(name: str) -> bytes:
    """What a function of torch's flight recorder returns; empty where this build has none."""
    function = getattr(torch._C._distributed_c10d, name, None)
    try:
        return function() if function is not None else b""
    except (RuntimeError, TypeError):
        return b""


def diagnose(states: Mapping[int, RankState], hosts: Sequence[str]) -> str:
    """Who waits for whom, and where.

    Args:
        states: of the ranks that answered. hosts: of every rank.
    """
    silent = [rank for rank in range(len(hosts)) if rank not in states]
    waiting = [rank for rank, state in states.items() if state.waits or _pending(state)]
    busy = [rank for rank in states if rank not in waiting]
    late = _late(states)
    if silent:
        culprits, why = silent, "which does not answer: its process is stopped, or its node is gone"
    elif busy and waiting:
        culprits, why = busy, f"which is at {states[busy[0]].place}"
    elif late:
        culprits, why = late, f"which is at {states[late[0]].place}, collectives behind"
    elif not waiting:
        return f"no rank waits for another; rank 0 is at {states[0].place}"
    else:
        return f"all ranks wait; rank {waiting[0]} {_where(states[waiting[0]])}"
    waiting = [rank for rank in waiting if rank not in culprits]
    whom = f"{spans(culprits)} on {', '.join(dict.fromkeys(hosts[rank] for rank in culprits))}, {why}"
    if not waiting:
        return f"the job waits for {whom}"
    verb = "waits" if len(waiting) == 1 else "wait"
    return f"{spans(waiting)} {verb} {_where(states[waiting[0]])} for {whom}"


def _pending(state: RankState) -> list[str]:
    return [
        f"{name} number {number} of group {group}" for group, (number, name, done) in state.groups.items() if not done
    ]


def _where(state: RankState) -> str:
    return " ".join([*(f"in {name}" for name in _pending(state)[:1]), f"at {state.place}"])


def _late(states: Mapping[int, RankState]) -> list[int]:
    """The ranks whose last collective of some group is before that of others."""
    for group in sorted({group for state in states.values() for group in state.groups}):
        numbers = {rank: state.groups[group][0] for rank, state in states.items() if group in state.groups}
        if min(numbers.values()) < max(numbers.values()):
            return [rank for rank, number in numbers.items() if number == min(numbers.values())]
    return []
