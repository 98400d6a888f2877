"""A flat bucket: whole parameters of one dtype and algorithm in one tensor, of which rank r owns the r-th part."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack, to_dlpack

from distributed_muon.engine.collectives import Collectives, Pending
from distributed_muon.engine.state import Part
from distributed_muon.engine.timing import describe
from distributed_muon.layout.cutting import Bucket, make_buckets
from distributed_muon.layout.pieces import Shard


class FlatBucket:
    """The tensors of one bucket on one rank.

    Args:
        spec: where each tensor lies. shards: of this rank in it.
        params, names: of all parameters, indexed by the spec's tensor numbers; those of this bucket are linked.
        collectives: of the data-parallel group. own_gradients: whether to keep a flat gradient; False
            where a wrapper already averages p.grad.

    Attributes:
        flat: (numel,) parameter dtype, the memory of the parameters. grad: (numel,) fp32 local gradient sums, or None.
        title: for the profile. ranks: that cut it. part: this rank's (numel / dp,) masters, values and mean gradient.
    """

    def __init__(
        self,
        spec: Bucket,
        shards: Sequence[Shard],
        params: Sequence[nn.Parameter],
        names: Sequence[str],
        collectives: Collectives,
        own_gradients: bool,
    ) -> None:
        self.spec, self._collectives, self.ranks = spec, collectives, collectives.size
        self._params, self._names = [params[t] for t in spec.tensors], [names[t] for t in spec.tensors]
        first, size = self._params[0], spec.numel // collectives.size
        self.flat = torch.zeros(spec.numel, dtype=first.dtype, device=first.device)
        self.title = f"bucket of {describe(self._names)}, {self.flat.nbytes} bytes"
        self._shapes = [param.shape for param in self._params]
        self._places: list[Any] = [None] * len(self._params)
        self._link(range(len(self._params)))
        begin = collectives.rank * size
        place = dict(zip(spec.tensors, spec.offsets, strict=True))
        offsets = [place[shard.tensor] + shard.start - begin for shard in shards]
        grad = torch.zeros(size, dtype=torch.float32, device=first.device)
        self.part = Part.over(shards, offsets, self.flat.narrow(0, begin, size), grad)
        self.grad = torch.zeros(spec.numel, dtype=torch.float32, device=first.device) if own_gradients else None

    @torch.no_grad()
    def _link(self, numbers: Sequence[int]) -> None:
        """Copy parameters' values into the bucket and give them that memory, each as a tensor of its own.

        A view would share its storage with all parameters of the bucket, and savers take what shares storage for
        tied weights. Through DLPack the parameter gets a storage of its own over the same memory.

        Args:
            numbers: of the members.
        """
        views = self._views(self.flat)
        torch._foreach_copy_([views[number] for number in numbers], [self._params[number] for number in numbers])
        for number in numbers:
            self._params[number].data = from_dlpack(to_dlpack(views[number]))
            self._places[number] = _place(self._params[number])

    def link_again(self) -> bool:
        """Take back parameters that were given other memory, with the values they have there.

        Returns:
            Whether there were any.

        Raises:
            RuntimeError: a parameter was moved to another dtype, device or shape.
        """
        now = list(map(_place, self._params))
        if now == self._places:
            return False
        moved = [number for number, place in enumerate(self._places) if now[number] != place]
        begin, end = self.flat.data_ptr(), self.flat.data_ptr() + self.flat.nbytes
        for number in moved:
            param, built = self._params[number], (self._shapes[number], self.flat.dtype, self.flat.device)
            if (param.shape, param.dtype, param.device) != built:
                is_now, was = (
                    f"{tuple(s)} {t} on {d}" for s, t, d in ((param.shape, param.dtype, param.device), built)
                )
                raise RuntimeError(
                    f"parameter {self._names[number]!r} is now {is_now}, the optimizer was built for {was}: move or "
                    "resize the model first, then build DistributedMuon"
                )
            if begin <= param.data_ptr() < end:  # turned in place: it must not be copied onto itself
                param.data = param.data.clone()
        self._link(moved)
        return True

    def gradient_views(self) -> Iterator[tuple[int, Tensor]]:
        """(tensor number, its flat gradient in the parameter's shape)."""
        assert self.grad is not None
        return zip(self.spec.tensors, self._views(self.grad), strict=True)

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Every member's elements of `flat`, in its shape."""
        # One operation each; `narrow` and `view` together take seven times as long.
        return [
            flat.as_strided(shape, _strides(shape), offset)
            for shape, offset in zip(self._shapes, self.spec.offsets, strict=True)
        ]

    def copies_gradient(self, dtype: torch.dtype) -> bool:
        """Whether a reduce-scatter in `dtype` holds a copy of the bucket while it is under way."""
        return dtype != torch.float32 or self._collectives.direct

    def reduce_scatter(self, dtype: torch.dtype) -> Pending:
        """Start `part.grad` = sum over ranks of `grad`, added up in `dtype`; collective over the DP group."""
        assert self.grad is not None
        output, source = self.part.grad, self.grad
        if dtype != torch.float32:
            output, source = output.to(dtype), source.to(dtype)
        pending = self._collectives.reduce_scatter(output, source)

        widen = None if output is self.part.grad else lambda: self.part.grad.copy_(output)
        return Pending([pending], output, source, finish=widen)

    def all_gather(self) -> Pending:
        """Start gathering the others' parts of `flat`, of which this rank's was published."""
        return self._collectives.all_gather(self.flat)


def _place(param: Tensor) -> tuple[Any, ...]:
    """Changes whenever a parameter is given other memory, or another view of its own."""
    return param.data_ptr(), param.shape, param.stride(), param.dtype


@lru_cache(maxsize=4096)
def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return torch.empty(shape, device="meta").stride()


def cut_families(
    families: Sequence[Hashable], numels: Sequence[int], dp: int, bucket_numel: int | None, aligned: bool
) -> list[Bucket]:
    """Buckets of one family each, so that every rank's share of each is equal, in the order of the backward.

    Args:
        families, numels: per tensor, such as its algorithm and dtype, and its elements.
        dp, bucket_numel, aligned: of `make_buckets`.
    """
    members: dict[Hashable, list[int]] = {}
    for tensor, family in enumerate(families):
        members.setdefault(family, []).append(tensor)
    buckets = []
    for tensors in members.values():
        for bucket in make_buckets([numels[t] for t in tensors], dp, bucket_numel=bucket_numel, aligned=aligned):
            buckets.append(bucket._replace(tensors=tuple(tensors[i] for i in bucket.tensors)))
    # A bucket is complete when the gradient of its first layer arrives: reduce the last layers' first.
    return sorted(buckets, key=lambda bucket: -min(bucket.tensors))
