"""The collectives of one process group: contiguous, counted, and skipped where the group is one rank.

Every byte the optimizer sends goes through here, so `sent_bytes` is what was really moved. On gloo the
reduce-scatter and all-gather are built from point-to-point messages: gloo's own reduce-scatter is an
all-reduce (twice the bytes) and its all-gather copies through a ring.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_muon.engine.groups import make_group
from distributed_muon.engine.timing import Flight, StepTimer

# torch 2.13 renamed the two; older releases only know the first names.
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Pending:
    """A collective under way; holds its tensors alive until `wait()` returns."""

    def __init__(
        self,
        works: Sequence[Any],
        *tensors: Tensor,
        finish: Callable[[], None] | None = None,
        flight: Flight | None = None,
    ) -> None:
        self._works, self._tensors, self._finish, self._flight = works, tensors, finish, flight

    def wait(self) -> None:
        """Block (CPU) or make the current stream wait (CUDA) until the result is there; idempotent."""
        with self._flight.landing() if self._flight is not None else nullcontext():
            for work in self._works:
                work.wait()
            if self._finish is not None:
                self._finish()
        self._works, self._tensors, self._finish, self._flight = (), (), None, None

    def is_completed(self) -> bool:
        """Whether `wait()` would not block."""
        return all(work.is_completed() for work in self._works)


class Collectives:
    """Collectives over `group`, issued by all its ranks in the same order.

    Args:
        group: the process group; None is the default group, or a single rank where torch.distributed
            is not initialized.

    Attributes:
        rank, size: of this rank in the group.
        sent_bytes: bytes this rank sent, by collective ("reduce_scatter", "all_gather", "all_to_all",
            "all_reduce"), counted as the (size - 1) / size share that leaves the rank; an all-reduce
            counts as reduce-scatter plus all-gather.
        timer: if set, times every counted collective under its label.
        direct: whether reduce-scatter and all-gather are built from messages between ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        self.group = group
        self.size = dist.get_world_size(group) if initialized else 1
        self.rank = dist.get_rank(group) if initialized else 0
        if self.rank < 0:
            raise ValueError("process_group does not contain this rank: pass the group this rank belongs to")
        self.sent_bytes: Counter[str] = Counter()
        self.timer: StepTimer | None = None
        self._label: str | None = None
        self._own = False
        self.direct = initialized and dist.get_backend(group) == "gloo"

    def reduce_scatter(self, output: Tensor, input: Tensor) -> Pending:
        """Sum `input` over the ranks; `output` gets this rank's 1/size of it.

        Args:
            output: (n,) contiguous. input: (n * size,) contiguous, same dtype; not written.
        """
        if self.size == 1:
            output.copy_(input)
            return Pending(())
        flight = self._count("reduce_scatter", _share(input, self.size))
        if not self.direct:
            work = reduce_scatter_single(output, input, group=self.group, async_op=True)
            return Pending([work], output, input, flight=flight)
        parts = input.view(self.size, -1)
        received = torch.empty_like(parts)
        others = self._others()
        works = self._messages({peer: parts[peer] for peer in others}, {peer: received[peer] for peer in others})

        def add_up() -> None:
            # In rank order, so that the sum does not depend on which rank owns the shard.
            received[self.rank] = parts[self.rank]
            torch.add(received[0], received[1], out=output)
            for peer in range(2, self.size):
                output.add_(received[peer])

        return Pending(works, output, input, received, finish=add_up, flight=flight)

    def all_gather(self, output: Tensor) -> Pending:
        """Fill `output`, of which this rank already wrote its own 1/size, with every rank's part.

        Args:
            output: (n * size,) contiguous.
        """
        if self.size == 1:
            return Pending(())
        flight = self._count("all_gather", _share(output, self.size))
        if not self.direct:
            own = output.numel() // self.size
            mine = output[self.rank * own : (self.rank + 1) * own]
            work = all_gather_single(output, mine, group=self.group, async_op=True)
            return Pending([work], output, flight=flight)
        parts, others = output.view(self.size, -1), self._others()
        works = self._messages({p: parts[self.rank] for p in others}, {p: parts[p] for p in others})
        return Pending(works, output, flight=flight)

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        recv_counts: Sequence[int],
        send_counts: Sequence[int],
        label: str = "all_to_all",
    ) -> Pending:
        """Send `send_counts[r]` consecutive elements of `input` to each rank r; receive likewise.

        Args:
            output: (sum(recv_counts),) contiguous. input: (sum(send_counts),) contiguous.
            label: what it is timed as.
        """
        sent = (sum(send_counts) - send_counts[self.rank]) * input.element_size()
        flight = self._count("all_to_all", sent, label)
        if self.direct:
            sends, recvs = input.split(list(send_counts)), output.split(list(recv_counts))
            works = self._messages(
                {peer: sends[peer] for peer in self._others() if send_counts[peer]},
                {peer: recvs[peer] for peer in self._others() if recv_counts[peer]},
            )
            recvs[self.rank].copy_(sends[self.rank])
            return Pending(works, output, input, flight=flight)
        work = dist.all_to_all_single(
            output, input, list(recv_counts), list(send_counts), group=self.group, async_op=True
        )
        return Pending([work], output, input, flight=flight)

    def all_reduce(self, tensor: Tensor, *, maximum: bool = False, counted: bool = True) -> Tensor:
        """Sum (or take the maximum of) a contiguous tensor over the ranks, in place, and wait for it."""
        if self.size > 1:
            flight = self._count("all_reduce", 2 * _share(tensor, self.size)) if counted else None
            op = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
            with flight.landing() if flight is not None else nullcontext():
                dist.all_reduce(tensor, op, group=self.group)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's values of a contiguous tensor, in place; not counted, for use at construction only."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value` (picklable), by rank; not counted, for use at construction only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def warm_up(self, device: torch.device) -> None:
        """Connect all pairs of ranks, so that the first real all-to-all cannot deadlock across nodes; not counted."""
        if self.size > 1:
            counts = [1] * self.size
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)
            self.all_to_all(
                torch.zeros(self.size, device=device), torch.zeros(self.size, device=device), counts, counts
            ).wait()
            self.sent_bytes.clear()

    def apart(self, backend: str | None = None) -> Collectives:
        """Collectives over the same ranks on a process group of their own, whose traffic meets no one else's.

        Called by all ranks of this group. `close()` gives the group back.

        Args:
            backend: None is this group's.
        """
        everyone = tuple(range(self.size))
        return self.subgroups([everyone], backend=backend)[everyone] if self.size > 1 else Collectives(self.group)

    def subgroups(
        self, teams: Sequence[tuple[int, ...]], label: str | None = None, backend: str | None = None
    ) -> dict[Any, Collectives]:
        """Collectives over process groups of their own, of those of `teams` that this rank is in.

        Called by all ranks of this group with the same teams.

        Args:
            teams: ranks of this group. label: what everything is timed as. backend: None is this group's.

        Returns:
            By team.
        """
        group = self.group if self.group is not None else dist.group.WORLD
        name = self.gather_objects(f"distributed_muon-{uuid.uuid4().hex}")[0]
        out = {}
        for number, ranks in enumerate(teams):
            if self.rank in ranks:
                part = out[ranks] = Collectives(make_group(group, ranks, f"{name}-{number}", backend))
                part.timer, part._label, part._own = self.timer, label, True
        return out

    def close(self) -> None:
        """Give back the process group, where it is this object's own; not collective."""
        if self._own and dist.is_initialized():
            with suppress(ValueError):  # it went with the world that it belonged to; now there is another
                dist.destroy_process_group(self.group)
        self._own = False

    def _others(self) -> list[int]:
        return [peer for peer in range(self.size) if peer != self.rank]

    def _messages(self, sends: dict[int, Tensor], recvs: dict[int, Tensor]) -> list[Any]:
        ops = [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer) for peer, tensor in recvs.items()]
        ops += [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer) for peer, tensor in sends.items()]
        return dist.batch_isend_irecv(ops) if ops else []

    def _count(self, kind: str, sent: int, label: str | None = None) -> Flight | None:
        self.sent_bytes[kind] += sent
        return None if self.timer is None else self.timer.flight(self._label or label or kind, sent)


def _share(tensor: Tensor, size: int) -> int:
    """Bytes of a tensor cut over `size` ranks that leave one of them."""
    return tensor.nbytes * (size - 1) // size
