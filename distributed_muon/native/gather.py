"""Updated parameters on their way to every rank, now or under the next forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from distributed_muon.engine.collectives import Pending
from distributed_muon.engine.timing import StepTimer
from distributed_muon.native.buckets import FlatBucket


class ParameterGatherer:
    """All-gathers updated buckets, now or under the next forward, and notices writes by others.

    Args:
        buckets, params: as for GradientReducer. timer: waits are added to its "all_gather_wait".

    Attributes:
        overlap: whether `attach()` was called, so that a step may return with gathers under way.
    """

    def __init__(self, buckets: Sequence[FlatBucket], params: Sequence[nn.Parameter], timer: StepTimer) -> None:
        self._buckets, self._params, self._timer = buckets, params, timer
        self._pending: dict[int, Pending] = {}
        self._versions = [param._version for param in params]
        self.overlap = False

    def start(self, index: int) -> None:
        """Start the all-gather of one bucket; collective over the DP group."""
        self._pending[index] = self._buckets[index].all_gather()

    def wait(self, indices: Iterable[int] | None = None) -> None:
        """Wait for the buckets' all-gathers that are under way, all of them if None."""
        with self._timer("all_gather_wait"):
            for index in list(self._pending) if indices is None else indices:
                if index in self._pending:
                    self._pending.pop(index).wait()

    def attach(self, model: nn.Module) -> None:
        """Let every module of `model` wait for its own parameters before its forward.

        Parameters of a container without a forward of its own belong to the module around it.
        """
        bucket_of = {id(self._params[t]): i for i, b in enumerate(self._buckets) for t in b.spec.tensors}

        def walk(module: nn.Module, user: nn.Module) -> None:
            user = user if type(module).forward is nn.Module.forward else module
            needs = sorted({bucket_of[id(p)] for p in module.parameters(recurse=False) if id(p) in bucket_of})
            if needs:
                user.register_forward_pre_hook(lambda *_: self.wait(needs))
            for child in module.children():
                walk(child, user)

        walk(model, model)
        self.overlap = True

    def adopt_outside_writes(self) -> None:
        """Let masters follow parameters written by others since the last step, such as a loaded model."""
        for bucket in self._buckets:
            if any(self._params[t]._version != self._versions[t] for t in bucket.spec.tensors):
                bucket.part.adopt()
        self._versions = [param._version for param in self._params]
