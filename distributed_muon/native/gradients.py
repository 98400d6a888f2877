"""Gradients on their way from autograd to shards: accumulated in flat buckets, reduce-scattered under the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distributed_muon.engine.collectives import Pending
from distributed_muon.engine.timing import StepTimer
from distributed_muon.native.buckets import FlatBucket

# Reduce-scatters under way at a time: one travels while the next is packed. Each holds a copy of its bucket where
# it is reduced in bf16 or by messages, so that all of them together would be as large as the model.
_MOST_IN_FLIGHT = 2


class GradientReducer:
    """Accumulates p.grad into the flat buckets and reduce-scatters each once per step.

    Args:
        buckets: in reduction order. params: all parameters by tensor number.
        dtype: fp32 or bf16, of the reduction; accumulation over microbatches is fp32.
        timer: waits are added to its "reduce_scatter_wait".

    Attributes:
        syncing: False inside no_sync(): gradients only accumulate.
        closed: True once the ranks agreed on this step's gradients: none may arrive any more.
        stale: per bucket, whether gradients arrived after its reduce-scatter (a second backward
            outside no_sync()); such buckets must be reduced again, on every rank.
    """

    def __init__(
        self,
        buckets: Sequence[FlatBucket],
        params: Sequence[nn.Parameter],
        dtype: torch.dtype,
        timer: StepTimer,
    ) -> None:
        self._buckets, self._params, self._dtype, self._timer = buckets, params, dtype, timer
        self.syncing = True
        self._views: dict[int, Tensor] = {}
        self._bucket_of: dict[int, int] = {}
        for index, bucket in enumerate(buckets):
            assert bucket.grad is not None
            for tensor, offset in zip(bucket.spec.tensors, bucket.spec.offsets, strict=True):
                self._bucket_of[tensor] = index
                self._views[tensor] = bucket.grad.narrow(0, offset, params[tensor].numel()).view(params[tensor].shape)
        for tensor, param in enumerate(params):
            param.register_post_accumulate_grad_hook(self._hook(tensor))
        self.reset()

    def has_gradient(self, tensor: int) -> bool:
        """Whether this rank has a gradient of the tensor since the last zero_grad()."""
        return self._params[tensor].grad is not None or self._drained[tensor]

    def written_outside(self) -> bool:
        """Whether a p.grad was written or replaced after it was reduced: the change would be lost."""
        replaced = any(
            param.grad is not None and param.grad.data_ptr() != self._views[tensor].data_ptr()
            for tensor, param in enumerate(self._params)
        )
        return replaced or self._versions != self._flat_versions()

    def _flat_versions(self) -> list[int]:
        # Every fp32 p.grad is a view of its bucket's flat gradient and shares its version counter.
        return [bucket.grad._version for bucket in self._buckets if bucket.grad is not None]

    def _hook(self, tensor: int) -> Callable[[nn.Parameter], None]:
        def accumulate(param: nn.Parameter) -> None:
            if self.closed:
                raise RuntimeError(
                    "backward between clip_grad_norm_() or unscale_() and step(): its gradients would be lost; "
                    "run all microbatches first, or call zero_grad() to start over"
                )
            self._absorb(tensor)
            if self.syncing:
                self._arrived(tensor)

        return accumulate

    @torch.no_grad()
    def _absorb(self, tensor: int) -> None:
        """Move p.grad into the flat gradient; p.grad becomes its view (fp32) or None (other dtypes)."""
        param, view = self._params[tensor], self._views[tensor]
        grad = param.grad
        if grad is None or grad.data_ptr() == view.data_ptr():
            return
        if self._drained[tensor]:  # earlier microbatches are in the flat gradient already
            view.add_(grad)
        else:
            view.copy_(grad)
        if grad.dtype == view.dtype:
            param.grad = view
        else:
            param.grad = None
            self._drained[tensor] = True

    def _arrived(self, tensor: int) -> None:
        if not self._callback_queued:
            # At the end of this backward every bucket is on its way and waited for: no later backward
            # writes into a gradient that is being sent, and ranks that miss a gradient do not lag behind.
            self._callback_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_done)
        bucket = self._bucket_of[tensor]
        if bucket < self._launched:
            self.stale[bucket] = True
            self._versions[bucket] = self._flat_versions()[bucket]  # autograd's own write, to be reduced again
            return
        self._missing[bucket].discard(tensor)
        while self._launched < len(self._buckets) and not self._missing[self._launched]:
            self._launch(self._launched)

    @torch.no_grad()
    def _launch(self, index: int) -> None:
        bucket = self._buckets[index]
        for tensor in bucket.spec.tensors:
            self._absorb(tensor)
            if not self.has_gradient(tensor):
                self._views[tensor].zero_()
        if len(self._pending) == _MOST_IN_FLIGHT:
            with self._timer("reduce_scatter_wait"):
                self._pending.pop(0).wait()
        self._pending.append(bucket.reduce_scatter(self._dtype))
        self._launched = max(self._launched, index + 1)

    def _backward_done(self) -> None:
        self._callback_queued = False
        self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Start what has not started and wait for all; collective over the DP group, in bucket order."""
        while self._launched < len(self._buckets):
            self._launch(self._launched)
        with self._timer("reduce_scatter_wait"):
            for pending in self._pending:
                pending.wait()
        if self._pending:
            self._versions = self._flat_versions()
        self._pending.clear()

    def reduce_again(self, buckets: Sequence[int]) -> None:
        """Repeat the reduce-scatter of the buckets that are stale on any rank."""
        for bucket in buckets:
            self._launch(bucket)
            self.stale[bucket] = False
        self.finish()

    def reset(self) -> None:
        """Forget all gradients: p.grad = None, the flat gradient starts anew."""
        for param in self._params:
            param.grad = None
        self.restart()

    def restart(self) -> None:
        """Be ready for the next step: p.grad stays where it is fp32, gradients of other dtypes start anew."""
        self._drained = [False] * len(self._params)
        self._pending: list[Pending] = []
        self._launched = 0
        self._missing = [set(bucket.spec.tensors) for bucket in self._buckets]
        self._callback_queued = False
        self.closed = False
        self.stale = [False] * len(self._buckets)
        self._versions = self._flat_versions()
