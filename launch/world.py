"""The ranks of a job: start and end of torch.distributed, small reductions, a stop agreed by all ranks."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

# Read when a process group is made: torch keeps this many of its last collectives for `launch.watchdog`.
_FLIGHT_RECORDS = 2000


@dataclass(frozen=True)
class World:
    """This process among the data-parallel ranks.

    Args:
        rank, size: of this process and of all. device: it computes on.
        store: what all ranks read and write without a collective; None where a test made the world.
    """

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None

    @property
    def main(self) -> bool:
        """Whether this is the rank that prints and writes files."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sums over the ranks; collective, each rank passes as many values."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (picklable), by rank; collective."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for every rank; collective."""
        if self.size > 1:
            dist.barrier()

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Copies on this rank's device."""
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def wait_for_stream(self) -> None:
        """Wait for this rank's own computation, but not for collectives on streams of their own."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def synchronize(self) -> None:
        """Wait for the device's queue, so that a clock read next is true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def open_world(device: str = "auto", timeout: float = 0.0) -> Iterator[World]:
    """Join the job that torchrun started, or be alone without torch.distributed where there is none.

    Args:
        device: "cpu", "cuda", or "auto": a CUDA device per local rank where there is one.
        timeout: seconds after which a watchdog ends a hanging job; torch's own limits then come later. 0: none does.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        chosen = torch.device("cuda", torch.cuda.current_device())
    else:
        chosen = torch.device(device)
    if "RANK" not in os.environ:
        yield World(0, 1, chosen)
        return
    store, rank, size = next(dist.rendezvous("env://"))
    store.set_timeout(timedelta(seconds=300))
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(_FLIGHT_RECORDS))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
        store=dist.PrefixStore("groups", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=2 * timeout + 60) if timeout else None,
    )
    yield World(rank, size, chosen, dist.PrefixStore("launch", store))
    # Not reached after an exception: a rank that fails must leave at once, not wait for its peers.
    dist.destroy_process_group()


def leave(code: int = 0) -> NoReturn:
    """End this process, all of whose work is done, without the destructors of C++ libraries.

    Under DeepSpeed's CPU backend one rank in some dozens aborts in them ("terminate called without an active
    exception", DeepSpeed 0.19.8 on torch 2.13), and the launcher takes the whole job for failed.

    Args:
        code: exit code.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class StopRequest:
    """Remembers SIGINT and SIGTERM, or that the time is up, so that the loop can stop at a step boundary.

    Signals reach ranks at different times, or only some of them: pass `requested` through a reduction
    and act on the result, never on the local flag.

    Args:
        minutes: after which a stop is requested, counted from now; None: never.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self._signalled = False
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    @property
    def requested(self) -> bool:
        """Whether this rank wants to stop."""
        return self._signalled or (self._deadline is not None and time.monotonic() >= self._deadline)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
