"""A network as late as NCCL's may be: nothing arrives, and nothing has left, before `wait()`.

gloo copies at once and hides what CUDA streams do not: a buffer that is read before its collective was waited for, or
written while it is still being sent. Inside `late_network()` every collective that the optimizer starts

- fills its receive buffer with NaN, to be replaced by what arrived only in `wait()`;
- must find its send buffer unwritten in `wait()`, and its receive buffer untouched;
- runs after all that were started before it on the same communicator;
- says that it is not done until it was waited for, and must have been waited for in the end.

What breaks a rule is noted, not raised, so that all ranks go on together; `late_network` raises at its end. Values
travel over gloo, between buffers of the double's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_muon.engine import collectives


class LateWork:
    """One collective under way.

    Args:
        network: to which it belongs, and told what went wrong. name: for people.
        sent: buffers that leave, and copies of them. received: buffers, and what arrives in their place.
        queue: of its communicator, in order of issue. work: gloo's.
    """

    def __init__(
        self,
        network: LateNetwork,
        name: str,
        sent: Sequence[tuple[Tensor, Tensor]],
        received: Sequence[tuple[Tensor, Tensor]],
        queue: list[LateWork],
        work: Any,
    ) -> None:
        self._network, self._name, self._sent, self._received, self._work = network, name, sent, received, work
        self._queue = queue
        for buffer, _ in received:
            buffer.fill_(torch.nan)
        queue.append(self)

    def is_completed(self) -> bool:
        """Only once it was waited for: a program must not count on more."""
        return self not in self._queue

    def wait(self) -> None:
        """Let everything before it run, then let this arrive."""
        if self.is_completed():
            return
        for work in self._queue[: self._queue.index(self) + 1]:
            work._run()
        self._queue.remove(self)
        if not all(_same_bits(buffer, copy) for buffer, copy in self._sent):
            self._network.note(f"{self._name}: its send buffer was written or freed before wait()")
        for buffer, arrived in self._received:
            if buffer.untyped_storage().nbytes() < _last_byte(buffer) or not buffer.isnan().all():
                self._network.note(f"{self._name}: its receive buffer was written or freed before wait()")
            else:
                buffer.copy_(arrived)

    def _run(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None


class LateNetwork:
    """Stands in for torch.distributed in `engine.collectives`; what is not a started collective passes through.

    Args:
        direct: keep the reduce-scatter and all-gather that the engine builds from messages for gloo. False takes the
            branch of NCCL.

    Attributes:
        faults: rules that were broken, in order. started: names of all collectives so far.
    """

    def __init__(self, direct: bool) -> None:
        self._direct = direct
        self._queues: dict[Any, list[LateWork]] = {}
        self.faults: list[str] = []
        self.started: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def get_backend(self, group: dist.ProcessGroup | None = None) -> str:
        """gloo's name only where its branch is wanted."""
        return dist.get_backend(group) if self._direct else "late"

    def reduce_scatter_single(self, output: Tensor, input: Tensor, group: Any = None, async_op: bool = False) -> Any:
        """As torch.distributed's."""
        source, target = input.clone(), torch.empty_like(output)
        work = _REDUCE_SCATTER(target, source.clone(), group=group, async_op=True)
        return self._start("reduce_scatter", group, [(input, source)], [(output, target)], work, async_op)

    def all_gather_single(self, output: Tensor, input: Tensor, group: Any = None, async_op: bool = False) -> Any:
        """As torch.distributed's; `input` may be this rank's part of `output`."""
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        source, target = input.clone(), torch.empty_like(output)
        work = _ALL_GATHER(target, source, group=group, async_op=True)
        pairs = list(zip(output.view(size, -1), target.view(size, -1), strict=True))
        if input.data_ptr() == pairs[rank][0].data_ptr():
            del pairs[rank]
        return self._start("all_gather", group, [(input, source)], pairs, work, async_op)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        recv_counts: Sequence[int],
        send_counts: Sequence[int],
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        """As torch.distributed's."""
        source, target = input.clone(), torch.empty_like(output)
        work = dist.all_to_all_single(target, source, list(recv_counts), list(send_counts), group=group, async_op=True)
        return self._start("all_to_all", group, [(input, source)], [(output, target)], work, async_op)

    def batch_isend_irecv(self, ops: Sequence[dist.P2POp]) -> list[Any]:
        """As torch.distributed's; every message is a collective of its own."""
        own = [op.tensor.clone() if op.op is dist.isend else torch.empty_like(op.tensor) for op in ops]
        twins = [dist.P2POp(op.op, t, group=op.group, group_peer=op.group_peer) for op, t in zip(ops, own, strict=True)]
        works = []
        for op, tensor, work in zip(ops, own, dist.batch_isend_irecv(twins), strict=True):
            pair, leaves = [(op.tensor, tensor)], op.op is dist.isend
            sides = (pair, []) if leaves else ([], pair)
            works.append(self._start("message", op.group, *sides, work, True))
        return works

    def note(self, fault: str) -> None:
        """Remember a broken rule."""
        self.faults.append(fault)

    def close(self) -> list[str]:
        """All faults, those included that were never waited for."""
        left = [work._name for queue in self._queues.values() for work in queue]
        return self.faults + [f"{name}: never waited for" for name in left]

    def _start(self, kind: str, group: Any, sent: list, received: list, work: Any, async_op: bool) -> LateWork:
        self.started.append(f"{kind} {len(self.started)}")
        late = LateWork(self, self.started[-1], sent, received, self._queues.setdefault(group, []), work)
        if not async_op:
            late.wait()
        return late


_REDUCE_SCATTER, _ALL_GATHER = collectives.reduce_scatter_single, collectives.all_gather_single


def _same_bits(buffer: Tensor, copy: Tensor) -> bool:
    if buffer.untyped_storage().nbytes() < _last_byte(buffer):
        return False
    return torch.equal(buffer.contiguous().view(torch.uint8), copy.view(torch.uint8))


def _last_byte(tensor: Tensor) -> int:
    return (tensor.storage_offset() + tensor.numel()) * tensor.element_size()


@contextmanager
def late_network(direct: bool = False) -> Iterator[LateNetwork]:
    """Every Collectives made inside starts its collectives on a late network; gloo must be initialized.

    Raises:
        AssertionError: in the end, where a rule was broken on this rank.
    """
    network = LateNetwork(direct)
    with mock.patch.multiple(
        collectives,
        dist=network,
        reduce_scatter_single=network.reduce_scatter_single,
        all_gather_single=network.all_gather_single,
    ):
        yield network
    faults = network.close()
    assert not faults, f"{len(faults)} faults: " + "; ".join(faults[:5])
