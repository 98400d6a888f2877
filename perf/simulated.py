"""One rank of many on a device that computes nothing: the real optimizer at full size, against a simulated clock.

Parameters are on torch's "meta" device, so a model of any size fits; the process group is torch's fake one. What the
optimizer launches, starts and waits for is real and in its real order, and sets the clock:

- A kernel takes its FLOPs over the matmul rate or its bytes over the memory rate, whichever is longer, and at least
  `KERNEL_SECONDS`. Kernels run one after the other.
- The collectives of one communicator run in the order in which they were started, one at a time. What runs on several
  communicators at a time shares the links evenly.
- The host is never the bottleneck: its time is not simulated.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_muon.engine import collectives, timing
from distributed_muon.engine.agreement import Agreement
from distributed_muon.native import buckets
from perf.cluster import Machine
from perf.fake_world import fake_rank
from perf.launches import LaunchCounter, tensors_in

# The least time of a kernel on a GPU of these days: what an empty one takes.
KERNEL_SECONDS = 3e-6


@dataclass(eq=False)
class Transfer:
    """A collective: seconds before its first byte, and seconds of bytes if it has the links to itself."""

    label: str
    latency: float
    moving: float
    started: float
    begun: float | None = None
    ended: float | None = None


class Clock:
    """The compute stream of a rank, and its network.

    Attributes:
        now: seconds on the compute stream. transfers: all that were started.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.transfers: list[Transfer] = []
        self._network = 0.0
        self._queues: dict[Any, list[Transfer]] = defaultdict(list)

    def start(self, communicator: Any, label: str, latency: float, moving: float) -> Transfer:
        """Queue a collective behind those of its communicator."""
        self._run(self.now)
        transfer = Transfer(label, latency, moving, self.now)
        self.transfers.append(transfer)
        self._queues[communicator].append(transfer)
        return transfer

    def wait(self, transfer: Transfer) -> None:
        """Let the compute stream go on only after it."""
        self._run(math.inf, transfer)
        self.now = max(self.now, transfer.ended)

    def done(self, transfer: Transfer) -> bool:
        """Whether it is over by now."""
        self._run(self.now)
        return transfer.ended is not None

    def _run(self, until: float, last: Transfer | None = None) -> None:
        """Move the network on, but not beyond the end of `last`."""
        while self._network < until and (last is None or last.ended is None):
            heads = [queue[0] for queue in self._queues.values() if queue]
            if not heads:
                self._network = until
                return
            moving = sum(head.latency <= 0 for head in heads)
            ends = [head.latency if head.latency > 0 else head.moving * moving for head in heads]
            step = min([*ends, until - self._network])
            for head, end in zip(heads, ends, strict=True):
                head.begun = self._network if head.begun is None else head.begun
                if head.latency > 0:
                    head.latency = 0.0 if end <= step else head.latency - step
                else:
                    head.moving = 0.0 if end <= step else head.moving - step / moving
            self._network += step
            for queue in self._queues.values():
                if queue and queue[0].latency <= 0 and queue[0].moving <= 0:
                    queue.pop(0).ended = self._network


class SimulatedDevice(LaunchCounter):
    """Counts what a step launches, and moves the clock by what it takes.

    Args:
        clock: to be moved. machine: rates.
    """

    def __init__(self, clock: Clock, machine: Machine) -> None:
        super().__init__()
        self._clock, self._machine = clock, machine

    def launched(self, name: str, kernels: int, args: Any, result: Any) -> None:
        """Let kernels run, if they are the device's."""
        given, made = tensors_in(args), tensors_in(result)
        if any(t.is_cpu for t in (*given, *made) if t.ndim):
            return
        if name.startswith(("_foreach", "_fused")) and name.endswith("_") and "copy" not in name:
            # What is written in place is returned by none of them: the first list, or AdamW's parameters and moments.
            made += [t for n, some in enumerate(args) if n in (0, *(2, 3) * ("adamw" in name)) for t in some]
        touched = sum(t.numel() * t.element_size() for t in (*given, *made))
        seconds = touched / self._machine.memory_bytes_per_second
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left = given[-2] if len(given) < 4 else given[-3]
            seconds = max(seconds, 2 * math.prod(made[0].shape) * left.shape[-1] / self._machine.hardware.matmul_flops)
        self._clock.now += max(seconds, kernels * KERNEL_SECONDS)


@dataclass
class Work:
    """The handle of a collective on the clock."""

    clock: Clock
    transfer: Transfer

    def wait(self) -> None:
        self.clock.wait(self.transfer)

    def is_completed(self) -> bool:
        return self.clock.done(self.transfer)


@dataclass
class SimulatedNetwork:
    """Stands in for torch.distributed in `engine.collectives`.

    Args:
        clock: of the rank. seconds: of a collective by label, its number under that label, and the bytes it sends:
            (latency, moving). communicator: which queue a kind of collective has, given its label.
    """

    clock: Clock
    seconds: Callable[[str, int, int], tuple[float, float]]
    communicator: Callable[[str], Any] = lambda label: None
    label: tuple[str, int] = ("", 0)
    calls: Counter[str] = field(default_factory=Counter)

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, **options: Any) -> Work:
        """As torch.distributed's; nothing moves."""
        return self._start()

    all_gather_single = reduce_scatter_single

    def all_to_all_single(self, *args: Any, **options: Any) -> Work:
        """As torch.distributed's; nothing moves."""
        return self._start()

    def all_reduce(self, *args: Any, **options: Any) -> None:
        """As torch.distributed's; nothing moves."""
        self._start().wait()

    def broadcast(self, *args: Any, **options: Any) -> None:
        """Of construction, which has no clock."""

    def _start(self) -> Work:
        label, sent = self.label
        latency, moving = self.seconds(label, self.calls[label], sent)
        self.calls[label] += 1
        return Work(self.clock, self.clock.start(self.communicator(label), label, latency, moving))


def _place(tensor: Tensor) -> int:
    """An address: every storage has 2^40 bytes for itself."""
    return (tensor.untyped_storage()._cdata << 40) + tensor.storage_offset() * tensor.element_size()


@contextmanager
def simulated_rank(rank: int, world: int, clock: Clock, network: SimulatedNetwork) -> Iterator[None]:
    """Be `rank` of `world`: meta tensors are as good as any, and time is the clock's."""

    def flight(timer: timing.StepTimer, label: str, sent_bytes: int) -> timing.Flight:
        network.label = label, sent_bytes
        return timing.Flight(timer, label, sent_bytes)

    answer: list[float] = []
    agree, tolist = Agreement.reach, Tensor.tolist

    def reach(group: Any, grads: Any, has_gradient: Sequence[bool], flags: Sequence[bool], *rest: Any) -> Agreement:
        # The norm, two codes that are the same everywhere, no signal, gradients everywhere, and no flag.
        answer[:] = [1.0, 0.0, 0.0, 0.0, *[1.0] * len(has_gradient), *[0.0] * len(flags)]
        return agree(group, grads, has_gradient, flags, *rest)

    with ExitStack() as stack:
        stack.enter_context(fake_rank(rank, world))
        for target, name, value in (
            (collectives, "dist", network),
            (collectives, "reduce_scatter_single", network.reduce_scatter_single),
            (collectives, "all_gather_single", network.all_gather_single),
            (timing, "time", SimpleNamespace(perf_counter=lambda: clock.now)),
            (timing.StepTimer, "flight", flight),
            (Agreement, "reach", staticmethod(reach)),
            (buckets, "to_dlpack", lambda tensor: tensor),
            (buckets, "from_dlpack", lambda tensor: tensor),
            (torch.Tensor, "is_meta", property(lambda tensor: False)),
            (torch.Tensor, "data_ptr", _place),
            (torch.Tensor, "tolist", lambda tensor: list(answer) if tensor.device.type == "meta" else tolist(tensor)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield
