"""The user's parameters and our masters: who follows whom, and whether all ranks have the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.state import Copies
from distributed_muon.native.buckets import FlatBucket
from distributed_muon.native.gather import ParameterGatherer


class LinkedParameters:
    """Parameters that lie in buckets, and stay the user's: they may be written, moved and loaded between steps.

    Args:
        buckets: all. params, names: by tensor number. gatherer: of the buckets. collectives: of the DP group.
        places: name -> (the dictionary its module keeps the parameter in, the name there), where known.

    Attributes:
        behind: whether masters were restored that the parameters do not follow from yet.
    """

    def __init__(
        self,
        buckets: Sequence[FlatBucket],
        params: Sequence[nn.Parameter],
        names: Sequence[str],
        gatherer: ParameterGatherer,
        collectives: Collectives,
        places: Mapping[str, tuple[dict[str, Any], str]],
    ) -> None:
        self._buckets, self._params, self._names = buckets, params, names
        self._gatherer, self._collectives = gatherer, collectives
        self._held = [(param, name, *places[name]) for param, name in zip(params, names, strict=True) if name in places]
        self._copies = Copies(bucket.part for bucket in buckets)
        self.behind = False

    @torch.no_grad()
    def start_from_first_rank(self, model: nn.Module | None) -> None:
        """Let all ranks have rank 0's parameters and the model's buffers, as DDP does; collective."""
        for bucket in self._buckets:
            self._collectives.broadcast(bucket.flat)
            bucket.part.adopt()
        for buffer in model.buffers() if model is not None else ():
            buffer.copy_(self._collectives.broadcast(buffer.contiguous()))

    @torch.no_grad()
    def link(self) -> str | None:
        """Take back parameters that were moved since the last step; no collective.

        Returns:
            What cannot be taken over, in words.
        """
        self._gatherer.wait()
        for param, name, held, leaf in self._held:
            if held.get(leaf, param) is not param:
                return (
                    f"parameter {name!r} of the model was replaced by another nn.Parameter, as load_state_dict("
                    "assign=True) does: load without assign, or build a new DistributedMuon"
                )
        try:
            moved = [bucket.link_again() for bucket in self._buckets]
        except RuntimeError as error:
            return str(error)
        if self.behind and not any(moved):
            self.masters_restored()
            if self.behind:
                return (
                    "parameters differ from the masters that load_state_dict() restored: call "
                    "optimizer.gather_params() after loading, before the first forward"
                )
        self.behind = False
        return None

    def written(self) -> torch.Tensor | None:
        """Whether anything was written into the parameters since the last step; () bool, None where masters see it."""
        return self._copies.differ()

    @torch.no_grad()
    def follow(self) -> None:
        """Let masters take over what was written into the parameters; no collective."""
        for bucket in self._buckets:
            bucket.part.adopt()

    def adopt(self) -> None:
        """`link` and `follow`, unless restored masters lead; a RuntimeError for what cannot be taken over."""
        if not self.behind:
            if (problem := self.link()) is not None:
                raise RuntimeError(problem)
            self.follow()

    def masters_restored(self) -> None:
        """Note whether the parameters follow from masters that were loaded."""
        self.behind = any(bucket.part.behind() for bucket in self._buckets)

    @torch.no_grad()
    def gather(self) -> None:
        """Rebuild every parameter from the masters of all ranks; collective."""
        self.adopt()
        self._gatherer.wait()
        self._gatherer.start(range(len(self._buckets)))
        self._gatherer.wait()
        self.behind = False

    @torch.no_grad()
    def check_replicas(self) -> None:
        """Raise a RuntimeError that names the first parameter whose bits differ between ranks; collective."""
        self._gatherer.wait()
        bits = {2: torch.int16, 4: torch.int32}
        sums = [p.detach().reshape(-1).view(bits[p.element_size()]).sum(dtype=torch.int64) for p in self._params]
        mine = torch.stack(sums)
        extremes = self._collectives.all_reduce(torch.cat([mine, -mine]), maximum=True, counted=False).view(2, -1)
        for number in (extremes[0] != -extremes[1]).nonzero().flatten().tolist()[:1]:
            everyone = self._collectives.gather_objects(mine[number].item())
            rank = next(rank for rank, other in enumerate(everyone) if other != everyone[0])
            raise RuntimeError(
                f"parameter {self._names[number]!r} differs between ranks 0 and {rank}: one of them computes or "
                "remembers wrongly, or was written to by itself; resume from a checkpoint"
            )
