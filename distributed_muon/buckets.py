"""Flat parameter and gradient buckets, their reduce-scatter during backward and their all-gather.

A bucket holds whole parameters of one dtype and one algorithm as views of one flat tensor. Rank r
owns the r-th equal part. Gradients accumulate into a flat fp32 twin; when the last gradient of a
bucket lands in the last microbatch, its reduce-scatter starts, always in bucket order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from distributed_muon.engine.collectives import Collectives, Pending
from distributed_muon.engine.timing import StepTimer
from distributed_muon.layout.cutting import Bucket


class FlatBucket:
    """The tensors of one bucket on one rank.

    Args:
        spec: where each tensor lies. params: all parameters, indexed by the spec's tensor numbers; those
            of this bucket become views of `flat`.
        collectives: of the data-parallel group. own_gradients: whether to keep a flat gradient; False
            where a wrapper already averages p.grad.

    Attributes:
        flat: (numel,) parameter dtype. grad: (numel,) fp32 local gradient sums, or None.
        master: (numel / dp,) fp32, this rank's part; a view of `flat` where that is fp32.
        grad_shard: (numel / dp,) fp32 mean gradient of this rank's part.
    """

    def __init__(
        self, spec: Bucket, params: Sequence[nn.Parameter], collectives: Collectives, own_gradients: bool
    ) -> None:
        self.spec, self._collectives = spec, collectives
        first = params[spec.tensors[0]]
        device, dtype, size = first.device, first.dtype, spec.numel // collectives.size
        self.flat = torch.zeros(spec.numel, dtype=dtype, device=device)
        self.own = self.flat.narrow(0, collectives.rank * size, size)
        for tensor, offset in zip(spec.tensors, spec.offsets, strict=True):
            param = params[tensor]
            view = self.flat.narrow(0, offset, param.numel()).view(param.shape)
            view.copy_(param.detach())
            param.data = view
        self.master = self.own if dtype == torch.float32 else self.own.float()
        self.grad = torch.zeros(spec.numel, dtype=torch.float32, device=device) if own_gradients else None
        self.grad_shard = torch.zeros(size, dtype=torch.float32, device=device)

    def reduce_scatter(self, dtype: torch.dtype) -> Pending:
        """Start `grad_shard` = mean over ranks of `grad`, summed in `dtype`; collective over the DP group."""
        assert self.grad is not None
        if dtype == torch.float32:
            output, source = self.grad_shard, self.grad
        else:
            output, source = self.grad_shard.to(dtype), self.grad.to(dtype)
        pending = self._collectives.reduce_scatter(output, source)

        def mean() -> None:
            pending.wait()
            if output is not self.grad_shard:
                self.grad_shard.copy_(output)
            self.grad_shard.div_(self._collectives.size)

        return Pending((), output, source, finish=mean)

    def all_gather(self) -> Pending:
        """Write the masters into this rank's part of `flat` and start gathering the others' parts."""
        if self.own.data_ptr() != self.master.data_ptr():
            self.own.copy_(self.master)
        return self._collectives.all_gather(self.flat)

    def merge_outside_writes(self) -> None:
        """Let masters follow values that were written into the parameters (a loaded checkpoint).

        An element whose rounded master equals the parameter keeps the master's full precision.
        """
        if self.own.data_ptr() != self.master.data_ptr():
            kept = self.master.to(self.own.dtype) == self.own
            self.master.copy_(torch.where(kept, self.master, self.own.float()))


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
                bucket.merge_outside_writes()
        self._versions = [param._version for param in self._params]
