"""A flat bucket: whole parameters of one dtype and algorithm in one tensor, of which rank r owns the r-th part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from distributed_muon.engine.collectives import Collectives, Pending
from distributed_muon.engine.state import Part
from distributed_muon.layout.cutting import Bucket
from distributed_muon.layout.pieces import Shard


class FlatBucket:
    """The tensors of one bucket on one rank.

    Args:
        spec: where each tensor lies. shards: of this rank in it.
        params: all parameters, indexed by the spec's tensor numbers; those of this bucket become views of `flat`.
        collectives: of the data-parallel group. own_gradients: whether to keep a flat gradient; False
            where a wrapper already averages p.grad.

    Attributes:
        flat: (numel,) parameter dtype. grad: (numel,) fp32 local gradient sums, or None.
        part: this rank's (numel / dp,) masters, values and mean gradient.
    """

    def __init__(
        self,
        spec: Bucket,
        shards: Sequence[Shard],
        params: Sequence[nn.Parameter],
        collectives: Collectives,
        own_gradients: bool,
    ) -> None:
        self.spec, self._collectives = spec, collectives
        first, size = params[spec.tensors[0]], spec.numel // collectives.size
        self.flat = torch.zeros(spec.numel, dtype=first.dtype, device=first.device)
        for tensor, offset in zip(spec.tensors, spec.offsets, strict=True):
            param = params[tensor]
            view = self.flat.narrow(0, offset, param.numel()).view(param.shape)
            view.copy_(param.detach())
            param.data = view
        begin = collectives.rank * size
        place = dict(zip(spec.tensors, spec.offsets, strict=True))
        offsets = [place[shard.tensor] + shard.start - begin for shard in shards]
        grad = torch.zeros(size, dtype=torch.float32, device=first.device)
        self.part = Part.over(shards, offsets, self.flat.narrow(0, begin, size), grad)
        self.grad = torch.zeros(spec.numel, dtype=torch.float32, device=first.device) if own_gradients else None

    def reduce_scatter(self, dtype: torch.dtype) -> Pending:
        """Start `part.grad` = mean over ranks of `grad`, summed in `dtype`; collective over the DP group."""
        assert self.grad is not None
        output, source = self.part.grad, self.grad
        if dtype != torch.float32:
            output, source = output.to(dtype), source.to(dtype)
        pending = self._collectives.reduce_scatter(output, source)

        def mean() -> None:
            pending.wait()
            if output is not self.part.grad:
                self.part.grad.copy_(output)
            self.part.grad.div_(self._collectives.size)

        return Pending((), output, source, finish=mean)

    def all_gather(self) -> Pending:
        """Round the masters into this rank's part of `flat` and start gathering the others' parts."""
        self.part.publish()
        return self._collectives.all_gather(self.flat)
