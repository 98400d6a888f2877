"""Ranks that live for many generated runs: one spawn, then a case at a time, and a new spawn where one hangs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

from tests.spawn import run_ranks

PATIENCE = 30  # seconds for one case, a start of the ranks not included


class Pool:
    """`world` ranks that run one function on whatever `run` is given; a context.

    Args:
        function: importable; called as `function(rank, world, case)` on every rank, returns what is wrong or "".
        world: number of ranks.
    """

    def __init__(self, function: Callable[[int, int, Any], str], world: int) -> None:
        self._function, self._world = function, world
        self._ranks: list[tuple[int, Connection]] = []
        self._thread: threading.Thread | None = None

    def run(self, case: Any) -> None:
        """Run one case on all ranks; AssertionError with what the first rank reports, or that one died or hangs."""
        if not self._ranks:
            self._start()
        verdicts: dict[int, str] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._ranks)}
        until = time.monotonic() + PATIENCE
        try:
            for connection in waiting:
                connection.send(case)
            while waiting and time.monotonic() < until:
                for connection in wait(list(waiting), until - time.monotonic()):
                    verdicts[waiting.pop(connection)] = connection.recv()
        except (EOFError, OSError) as error:
            verdicts[-1] = f"a rank died: {error!r}"
        wrong = [f"rank {rank}: {verdict}" for rank, verdict in verdicts.items() if verdict]
        if waiting:
            wrong.append(f"ranks {sorted(waiting.values())} did not come to the end within {PATIENCE} s")
            self._stop()
        assert not wrong, "\n".join(wrong)

    def _start(self) -> None:
        with Listener(("127.0.0.1", 0), backlog=self._world) as listener:
            args = (serve, self._world, self._function, listener.address)
            self._thread = threading.Thread(target=_ignore_failure, args=args, daemon=True)
            self._thread.start()
            connected = {}
            for _ in range(self._world):
                connection = listener.accept()
                rank, pid = connection.recv()
                connected[rank] = (pid, connection)
        self._ranks = [connected[rank] for rank in range(self._world)]

    def _stop(self) -> None:
        for pid, connection in self._ranks:
            connection.close()
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._ranks = []
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()


def _ignore_failure(function: Callable[..., Any], world: int, *args: Any) -> None:
    with suppress(AssertionError):  # the verdicts tell
        run_ranks(function, world, *args, timeout=10**7)


def serve(rank: int, world: int, function: Callable[[int, int, Any], str], address: tuple[str, int]) -> None:
    """What a rank does: take cases until the other side hangs up."""
    with Client(address) as connection:
        connection.send((rank, os.getpid()))
        while True:
            try:
                case = connection.recv()
            except (EOFError, OSError):
                return
            connection.send(function(rank, world, case))
