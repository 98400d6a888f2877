"""What one rank owns of every parameter: the flat memory an adapter brings, and one record per parameter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from distributed_muon.layout.matrices import TensorSpec
from distributed_muon.layout.pieces import Shard

# Elements compared at a time, so that temporaries stay small beside a bucket.
_CHUNK = 1 << 22
MOMENTS = {"muon": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


class Member(NamedTuple):
    """A parameter that is trained: what the planner sees of it, the tensor itself, and its group's number."""

    spec: TensorSpec
    param: Tensor
    group: int


@dataclass(eq=False)
class Part:
    """One flat run of this rank's memory: neighbouring shards of one algorithm and one dtype.

    A flat bucket's own 1/N, a DeepSpeed partition, or a stretch of a Megatron buffer. All tensors are 1-D, have
    `numel` elements and the same arrangement. Adapters may re-point them; after any but `grad`, they call
    `ShardedStep.rebind()`.

    Args:
        shards: in the order of their offsets. offsets: element at which each begins; between them is padding.
        master: (n,) fp32 masters.
        values: (n,) these elements in the parameters themselves; `master` where those are fp32; None where the
            framework copies the masters by itself.
        grad: (n,) fp32 mean gradient, before each step.
        moments: (n,) fp32 by name; what is missing is allocated by the engine.
    """

    shards: Sequence[Shard]
    offsets: Sequence[int]
    master: Tensor
    values: Tensor | None = None
    grad: Tensor | None = None
    moments: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def over(shards: Sequence[Shard], offsets: Sequence[int], values: Tensor, grad: Tensor | None = None) -> Part:
        """A part whose masters are the parameters' own elements where these are fp32, else a copy of them."""
        master = values if values.dtype == torch.float32 else values.float()
        return Part(shards, offsets, master, values, grad)

    @property
    def has_copies(self) -> bool:
        """Whether the masters are memory of their own, to be rounded into the parameters."""
        return self.values is not None and self.values is not self.master

    def behind(self) -> bool:
        """Whether elements of the parameters do not follow from the masters."""
        return self.has_copies and not torch.equal(self.master.to(self.values.dtype), self.values)

    def adopt(self) -> None:
        """Let masters follow values written into the parameters, such as a loaded model.

        An element whose rounded master equals the parameter keeps the master's full precision.
        """
        if self.has_copies:
            for master, values in zip(self.master.split(_CHUNK), self.values.split(_CHUNK), strict=True):
                master.copy_(torch.where(master.to(values.dtype) == values, master, values.float()))

    def publish(self) -> None:
        """Round the masters into the parameters' own elements."""
        if self.has_copies:
            self.values.copy_(self.master)


def publish_all(parts: Iterable[Part]) -> None:
    """`publish` of many parts, in few kernels."""
    copied = [part for part in parts if part.has_copies]
    if copied:
        torch._foreach_copy_([part.values for part in copied], [part.master for part in copied])


class Copies:
    """Parameters' elements beside masters of their own, to be compared in few kernels.

    Args:
        parts: whose masters and values stay where they are.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        copied = [part for part in parts if part.has_copies]
        length = _CHUNK if all(part.master.is_cpu for part in copied) else 8 * _CHUNK  # 64 MiB
        self._groups: list[tuple[list[Tensor], list[Tensor]]] = []
        total = length
        for part in copied:
            for values, masters in zip(part.values.split(length), part.master.split(length), strict=True):
                total += values.numel()
                if total > length or values.dtype != self._groups[-1][0][0].dtype:
                    self._groups.append(([], []))
                    total = values.numel()
                self._groups[-1][0].append(values)
                self._groups[-1][1].append(masters)
        self._longest = max((sum(run.numel() for run in values) for values, _ in self._groups), default=0)

    def differ(self) -> Tensor | None:
        """Whether elements of the parameters do not follow from the masters, unknown to the host.

        Returns:
            () bool on the parts' device; None where no part has masters of its own.
        """
        found, flat = [], None
        for values, masters in self._groups:
            lengths = [run.numel() for run in values]
            if flat is None or flat.dtype != values[0].dtype:
                flat = values[0].new_empty(self._longest)
            rounded = flat[: sum(lengths)].split(lengths)
            torch._foreach_copy_(rounded, masters)
            torch._foreach_sub_(rounded, values)
            found.append(flat[: sum(lengths)].any())  # a nan counts
        return torch.stack(found).any() if found else None


@dataclass(frozen=True, eq=False)
class OwnedParameter:
    """One parameter as one rank holds it.

    Args:
        name, param, group: of the parameter. tensor: its number in the layout.
        start, stop: flat elements of the rank-local tensor that this rank owns; equal where it owns none.
        part, offset: where they lie; None where this rank owns none.
        master: fp32 1-D masters of these elements.
        state: fp32 1-D moments of these elements ("momentum_buffer", or "exp_avg" and "exp_avg_sq"), and
            for AdamW a 0-d "step" on the CPU.
    """

    name: str
    param: Tensor
    group: int
    tensor: int
    start: int
    stop: int
    part: Part | None
    offset: int
    master: Tensor
    state: dict[str, Tensor]

    @property
    def grad(self) -> Tensor:
        """fp32 1-D mean gradient of these elements."""
        return self._own(self.part.grad) if self.part is not None else self.master

    @property
    def values(self) -> Tensor | None:
        """These elements of the parameter itself, 1-D, in its dtype; None where the framework keeps them."""
        return self._own(self.part.values) if self.part is not None else self.master

    @property
    def momentum(self) -> Tensor:
        """The first moment, whatever the algorithm calls it."""
        return next(iter(self.state.values()))

    @property
    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the model: the state, and masters that are not the parameter."""
        return self.state if self.param.dtype == torch.float32 else {**self.state, "master": self.master}

    def _own(self, flat: Tensor | None) -> Tensor | None:
        return None if flat is None else flat.narrow(0, self.offset, self.stop - self.start)


def own_parameters(
    members: Sequence[Member], algorithms: Sequence[str], parts: Sequence[Part], device: torch.device
) -> list[OwnedParameter]:
    """Zero moments for every part, and one record per parameter, also where this rank owns nothing of it."""
    nothing = torch.empty(0, dtype=torch.float32, device=device)
    places: dict[int, tuple[Part, Shard, int]] = {}
    for part in parts:
        for key in MOMENTS[algorithms[part.shards[0].tensor]]:
            if key not in part.moments:
                part.moments[key] = torch.zeros_like(part.master, requires_grad=False)
        for shard, offset in zip(part.shards, part.offsets, strict=True):
            if shard.tensor in places:
                raise ValueError(f"parameter {members[shard.tensor].spec.name!r} lies in two parts of one rank")
            places[shard.tensor] = part, shard, offset
    out = []
    for tensor, member in enumerate(members):
        part, shard, offset = places.get(tensor, (None, Shard(tensor, 0, 0), 0))
        own = slice(offset, offset + shard.stop - shard.start)
        keys = MOMENTS[algorithms[tensor]]
        state = {key: part.moments[key][own] if part else nothing for key in keys}
        if algorithms[tensor] == "adamw":
            state["step"] = torch.zeros(())
        master = part.master[own] if part else nothing
        head = (member.spec.name, member.param, member.group, tensor)
        out.append(OwnedParameter(*head, shard.start, shard.stop, part, offset, master, state))
    return out
