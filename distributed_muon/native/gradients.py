"""Gradients on their way from autograd to shards: gathered in flat fp32 buckets, reduce-scattered under the backward.

Two hooks per parameter: before autograd accumulates, p.grad is cleared of its stand-in, so that autograd just puts
the new gradient there; afterwards the new gradient is added to the bucket and the stand-in returns. When the last
gradient of a bucket has landed in the last microbatch, its reduce-scatter starts, always in bucket order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress, count
from operator import is_not

import torch
from torch import Tensor, nn

from distributed_muon.engine.collectives import Collectives, Pending
from distributed_muon.engine.options import nearest
from distributed_muon.engine.state import OwnedParameter
from distributed_muon.engine.timing import StepTimer, named_range
from distributed_muon.native.buckets import FlatBucket
from distributed_muon.native.standin import MovedGradient

# Reduce-scatters under way at a time, where each holds a copy of its bucket: all together they would be as large as
# the model. Where the bucket itself is sent there is no limit.
_MOST_COPIES = 2
_ALIVE: weakref.WeakSet[GradientReducer] = weakref.WeakSet()


class GradientReducer:
    """Moves p.grad into the flat buckets and reduce-scatters each once per step.

    Args:
        buckets: in reduction order. params, names: all parameters by tensor number.
        dtype: fp32 or bf16, of the reduction; accumulation over microbatches is fp32.
        timer: waits are added to its "reduce_scatter_wait".

    Attributes:
        syncing: False inside no_sync(): gradients only accumulate.
        closed: True once the ranks agreed on this step's gradients: none may arrive any more.
    """

    def __init__(
        self,
        buckets: Sequence[FlatBucket],
        params: Sequence[nn.Parameter],
        names: Sequence[str],
        dtype: torch.dtype,
        timer: StepTimer,
    ) -> None:
        self._buckets, self._params, self._names, self._dtype, self._timer = buckets, params, names, dtype, timer
        self.syncing = True
        self._views: dict[int, Tensor] = {}
        self._bucket_of: dict[int, int] = {}
        for index, bucket in enumerate(buckets):
            for tensor, view in bucket.gradient_views():
                self._bucket_of[tensor], self._views[tensor] = index, view
        self._moved = [
            MovedGradient(p, n, self._zeroing(t)) for t, (p, n) in enumerate(zip(params, names, strict=True))
        ]
        self._accumulating = [False] * len(params)
        self._pending: dict[int, Pending] = {}
        self._sums: set[int] = set()  # buckets whose shard is, or will be, a sum over ranks
        self._hooks = [hook for tensor in range(len(params)) for hook in self._attach(tensor)]
        self.restart()
        _ALIVE.add(self)

    # ---- hooks -----------------------------------------------------------------------------------------

    def _attach(self, tensor: int) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
        # The hooks live as long as the parameter; they must not keep the reducer alive with them.
        own, param = weakref.ref(self), self._params[tensor]

        def before(grad: Tensor) -> None:
            if (reducer := own()) is not None:
                reducer._before(tensor)

        def after(param: nn.Parameter) -> None:
            if (reducer := own()) is not None:
                reducer._after(tensor)

        return param.register_hook(before), param.register_post_accumulate_grad_hook(after)

    def _before(self, tensor: int) -> None:
        param = self._params[tensor]
        self._accumulating[tensor] = param.grad is self._moved[tensor]
        if self._accumulating[tensor]:
            param.grad = None

    def _after(self, tensor: int) -> None:
        if self.closed:
            raise RuntimeError(
                "backward between clip_grad_norm_() or unscale_() and step(): its gradients would be lost; "
                "run all microbatches first, or call zero_grad() to start over"
            )
        self._absorb(tensor)
        if not self.syncing:
            return
        index = self._bucket_of[tensor]
        if index < self._launched:
            self._stale[index] = True
            return
        self._missing[index].discard(tensor)
        while self._launched < len(self._buckets) and not self._missing[self._launched] and self._has_room():
            self._launch(self._launched)

    def _absorb(self, tensor: int) -> None:
        """Move p.grad, where it is a gradient, into the flat gradient; the stand-in takes its place."""
        param, view = self._params[tensor], self._views[tensor]
        grad = param.grad
        if grad is None or grad is self._moved[tensor]:
            return
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"parameter {self._names[tensor]!r} has a sparse gradient: build its embedding with sparse=False"
            )
        if grad.requires_grad:  # backward(create_graph=True)
            grad = grad.detach()
        if (pending := self._pending.get(self._bucket_of[tensor])) is not None:
            pending.wait()  # the view is being sent
        if self._accumulating[tensor]:  # earlier microbatches are in the flat gradient already
            view.add_(grad)
        else:
            view.copy_(grad)
        self._accumulating[tensor] = False
        param.grad = self._moved[tensor]

    def _zeroing(self, tensor: int) -> Callable[[], None]:
        own = weakref.ref(self)

        def zero() -> None:
            if (reducer := own()) is not None:
                reducer._params[tensor].grad = torch.zeros_like(reducer._params[tensor])

        return zero

    # ---- reduction -------------------------------------------------------------------------------------

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Only accumulate gradients inside."""
        before, self.syncing = self.syncing, False
        try:
            yield
        finally:
            self.syncing = before

    @torch.no_grad()
    def _launch(self, index: int) -> None:
        if (before := self._pending.pop(index, None)) is not None:
            before.wait()
        bucket = self._buckets[index]
        for tensor in bucket.spec.tensors:
            self._absorb(tensor)
            self._sent[tensor] = self._params[tensor].grad
            if self._sent[tensor] is None:
                self._views[tensor].zero_()
        while not self._is_free():
            self._wait([next(iter(self._pending))])
        self._pending[index] = bucket.reduce_scatter(self._dtype)
        self._sums.add(index)
        self._launched = max(self._launched, index + 1)
        self._stale[index] = False

    def _has_room(self) -> bool:
        """Whether another reduce-scatter may start within this backward.

        With several optimizers it must not wait for one under way: other ranks may be in the backward of another
        model, and wait for us there. What finds no room starts with the step.
        """
        return len(_ALIVE) == 1 or self._is_free()

    def _is_free(self) -> bool:
        if not self._buckets[0].copies_gradient(self._dtype):
            return True
        self._wait([index for index, pending in self._pending.items() if pending.is_completed()])
        return len(self._pending) < _MOST_COPIES

    def _wait(self, indices: Sequence[int]) -> None:
        if not indices:
            return
        with self._timer("reduce_scatter_wait"):
            for index in indices:
                with named_range(self._buckets[index].title):
                    self._pending.pop(index).wait()

    def finish(self) -> tuple[list[bool], list[bool]]:
        """Start what has not started and wait for all; collective over the DP group, in bucket order.

        Returns:
            Per tensor, whether this rank has a gradient. Per bucket, whether gradients arrived, went or were replaced
            after it was reduced; such buckets must be reduced again, on every rank.
        """
        while self._launched < len(self._buckets):
            self._launch(self._launched)
        self.wait()
        grads = [param.grad for param in self._params]
        for tensor in compress(count(), map(is_not, grads, self._sent)):
            self._stale[self._bucket_of[tensor]] = True
        return [grad is not None for grad in grads], list(self._stale)

    def wait(self) -> None:
        """Wait for the reduce-scatters that have started, and make means of their sums."""
        self._wait(list(self._pending))
        if self._sums:
            torch._foreach_div_([self._buckets[index].part.grad for index in self._sums], self._buckets[0].ranks)
            self._sums.clear()

    def reduce_again(self, buckets: Sequence[int]) -> None:
        """Repeat the reduce-scatter of the buckets that are stale on any rank."""
        for bucket in buckets:
            self._launch(bucket)

    def drain(self) -> None:
        """Bring a round of reductions that was begun to its end, on every rank.

        A backward that raised leaves some buckets on their way. Dropping them would let their messages meet those
        of the next backward.
        """
        if self._launched:
            self.finish()

    def reset(self) -> None:
        """Forget all gradients: p.grad = None, the flat gradient starts anew."""
        self.drain()
        for param in self._params:
            param.grad = None
        self.restart()

    def restart(self) -> None:
        """Be ready for the next step; gradients that are not dropped accumulate on, as in torch.optim."""
        self._launched = 0
        self._missing = [set(bucket.spec.tensors) for bucket in self._buckets]
        self._sent: list[Tensor | None] = [None] * len(self._params)  # what p.grad was: its stand-in, or none
        self._stale = [False] * len(self._buckets)
        self.closed = False

    @property
    def under_way(self) -> bool:
        """Whether a collective was started and not waited for."""
        return bool(self._pending)

    def remove(self) -> None:
        """Take the hooks off the parameters, and the stand-ins out of p.grad."""
        _ALIVE.discard(self)
        for hook in self._hooks:
            hook.remove()
        for param, moved in zip(self._params, self._moved, strict=True):
            if param.grad is moved:
                param.grad = None


def whole_gradient(name: str, parameters: Sequence[OwnedParameter], collectives: Collectives) -> Tensor:
    """The mean gradient of the named parameter, fp32, in its shape; collective over the DP group."""
    record = next((p for p in parameters if p.name == name), None)
    if record is None:
        raise ValueError(f"{name!r} is no parameter of this optimizer: {nearest(name, [p.name for p in parameters])}")
    whole = torch.zeros(record.param.numel(), dtype=torch.float32, device=record.param.device)
    whole[record.start : record.stop] = record.grad
    return collectives.all_reduce(whole, counted=False).view(record.param.shape)
