"""DistributedMuon: ZeRO-1 Muon and AdamW for plain PyTorch data parallelism."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distributed_muon.checkpoint.view import CheckpointView
from distributed_muon.engine.agreement import Agreement
from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.options import Options, as_groups, check_choice, parameter_names, tensor_spec
from distributed_muon.engine.report import local_report, step_report
from distributed_muon.engine.state import Member, OwnedParameter
from distributed_muon.engine.step import ShardedStep
from distributed_muon.layout.cutting import Bucket, bucket_elements, cut_buckets
from distributed_muon.layout.pieces import Shard
from distributed_muon.layout.plan import Plan
from distributed_muon.native.buckets import FlatBucket, cut_families
from distributed_muon.native.collector import paused_collector
from distributed_muon.native.gather import ParameterGatherer
from distributed_muon.native.gradients import GradientReducer, whole_gradient
from distributed_muon.native.owners import check_launch, release_later, take_over
from distributed_muon.native.parameters import LinkedParameters
from distributed_muon.native.state_dict import SavedState
from distributed_muon.native.view import checkpoint_view

_NO_GRADIENT = "step() found no gradient of any parameter on any rank: nothing was updated"


class DistributedMuon(torch.optim.Optimizer):
    """Muon with optimizer states and gradients partitioned over data-parallel ranks (ZeRO-1).

    The algorithm is section 2.3 of "Muon is Scalable for LLM Training" (arXiv 2502.16982) with one home
    per matrix. Construct it after the model is on its device, on every rank, and do not wrap the model in
    DDP: as there, all ranks start from rank 0's weights, and gradients are averaged by hooks during the last
    backward of a step. They lie in flat buckets then; p.grad holds a stand-in (`native.standin`).
    Construction, `step`, `clip_grad_norm_`, `gradient`, `step_report`, `gather_params` and `check_replicas` are
    collective over `process_group`; `state_dict`, `load_state_dict` and `close` are not.

    Args:
        params: parameters or groups, as torch.optim takes them, best from `muon_param_groups(model)`.
            A group's "algorithm" is "muon" (the default) or "adamw"; a Muon group may carry "matrices",
            a rule of `distributed_muon.layout.matrices` for parameters that are not one 2-D matrix each.
        lr: learning rate, of Muon and AdamW groups.
        process_group: the data-parallel group; None is the default group, or one rank without
            torch.distributed.
        layout: how buckets are cut: "aligned" (tensors ordered so that few straddle ranks; also "auto"),
            "bucketed" (registration order), "flat" (one bucket).
        bucket_mb: MiB of fp32 gradient per bucket; None is `layout.cutting.bucket_elements`' rule.
        gradient_reduction: "reduce_scatter", or "none" where a wrapper already averages p.grad.
        reduce_dtype: torch.float32 or torch.bfloat16, of the reduction; accumulation stays fp32.
        nonfinite: "raise" FloatingPointError on a gradient with inf or nan, or "skip" that step; the state is
            untouched either way. `GradScaler` skips by itself.
        replica_check_every: steps between two comparisons of all parameters over the ranks (`check_replicas`);
            0 for none.
        options: every other option of `engine.options.Options`: torch.optim.Muon's, AdamW's, and how
            matrices are orthogonalized.

    Raises:
        ValueError: an option or parameter that cannot be right; the message names it.
        RuntimeError: ranks disagree about names, shapes, dtypes or options.
    """

    @paused_collector()
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = Options.lr,
        *,
        process_group: dist.ProcessGroup | None = None,
        layout: str = "auto",
        bucket_mb: float | None = None,
        gradient_reduction: str = "reduce_scatter",
        reduce_dtype: torch.dtype = torch.float32,
        nonfinite: str = "raise",
        replica_check_every: int = 1000,
        **options: Any,
    ) -> None:
        everywhere = Options.of({"lr": lr, **options})
        _check_options(layout, bucket_mb, gradient_reduction, reduce_dtype, nonfinite)
        self._sealed = False
        super().__init__(everywhere.complete(as_groups(params)), {})
        # What schedulers look at: they cycle "momentum", which in AdamW groups is the first beta.
        self.defaults = {key: getattr(everywhere, key) for key in ("lr", "weight_decay", "momentum")}
        self._sealed, self._nonfinite = True, nonfinite
        members = _members(self.param_groups, getattr(params, "order", {}))
        self._params: list[nn.Parameter] = [member.param for member in members]
        names = [member.spec.name for member in members]
        self._half = next((member.spec.name for member in members if member.param.dtype == torch.float16), None)
        check_launch()
        take_over(zip(names, self._params, strict=True), self)
        self.collectives, device = Collectives(process_group).apart(), self._params[0].device
        own = f"layout {layout}, bucket_mb {bucket_mb}, {gradient_reduction}, {reduce_dtype}, {nonfinite}"
        self._engine = ShardedStep(members, self.param_groups, everywhere, self.collectives, device, also=[own])

        buckets, shards = _cut(members, self.param_groups, self.collectives.size, layout, bucket_mb)
        reduces = gradient_reduction == "reduce_scatter"
        owned = {shard.tensor: shard for shard in shards[self.collectives.rank]}
        self._buckets = [
            FlatBucket(b, [owned[t] for t in b.tensors if t in owned], self._params, names, self.collectives, reduces)
            for b in buckets
        ]
        timer = self._engine.timer
        self._gatherer = ParameterGatherer(self._buckets, self._params, timer)
        places = getattr(params, "places", {})
        self._linked = LinkedParameters(self._buckets, self._params, names, self._gatherer, self.collectives, places)
        self._linked.start_from_first_rank(getattr(params, "model", lambda: None)())
        self._engine.attach(shards, [bucket.part for bucket in self._buckets if bucket.part.shards])
        self.state.update({p.param: p.state for p in self._engine.parameters})
        self._reducer = GradientReducer(self._buckets, self._params, names, reduce_dtype, timer) if reduces else None
        last = self.plan.last_wave_by_tensor()
        self._last_wave = [max(last[tensor] for tensor in bucket.tensors) for bucket in buckets]
        self._replica_check_every, self._distributed = replica_check_every, dist.is_initialized()
        self._closed, self._steps, self._facts = False, 0, {}
        self._saved = SavedState(self.sharded_parameters, self.param_groups, self.collectives)
        self._forget_agreement()
        self._release = release_later(
            self, [self._reducer, self._gatherer], [self.collectives, *self._engine.teams.values()]
        )

    @property
    def plan(self) -> Plan:
        """Which rank orthogonalizes which matrix, in which wave."""
        return self._engine.plan

    @property
    def sharded_parameters(self) -> list[OwnedParameter]:
        """What this rank owns of every parameter, in forward order."""
        return self._engine.parameters

    # ---- one step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; collective over the process group.

        Args:
            closure: recomputes the loss with gradients enabled, as in torch.optim.

        Returns:
            The closure's loss, or None.

        Raises:
            FloatingPointError: a gradient has an inf or nan (with nonfinite="raise"); no state changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._half is not None and not self._unscaled:
            raise ValueError(f"parameter {self._half!r} is float16: scale the loss with distributed_muon.GradScaler")
        self._steps += 1
        self._saved.forget()
        agreement = self._agree()
        if self._replica_check_every and self._steps % self._replica_check_every == 0:
            # Before the gathers of this step paint over what forward and backward have used. After the gradients of
            # all ranks are reduced: one that lacks a gradient starts a reduction that others wait for only there.
            self.check_replicas()
        skipped = self._must_skip(agreement)
        if not skipped:
            self._engine.step(agreement.present, after_wave=partial(self._gatherer.start_after, self._last_wave))
            if not self._gatherer.overlap:
                self._gatherer.wait()
        if self._reducer is not None:
            self._reducer.restart()
        if not any(agreement.present):
            warnings.warn(_NO_GRADIENT, stacklevel=3)
        self._engine.close()
        self._facts = {"grad_norm": agreement.norm, "skipped": skipped}
        self._forget_agreement()
        return loss

    def _agree(self) -> Agreement:
        """Finish the reduce-scatters, then one all-reduce: norms, present gradients, flags."""
        if self._agreement is not None:
            return self._agreement
        if self._closed:
            raise RuntimeError(
                "this DistributedMuon was closed, or replaced by a newer one on the same parameters: use that one"
            )
        if dist.is_initialized() != self._distributed:
            raise RuntimeError("DistributedMuon was built before init_process_group() (or outlived it): build it after")
        problem, reducer = self._linked.link(), self._reducer
        written = self._linked.written() if problem is None else None
        again = True
        while again:
            has_gradient, stale = _take_averaged(self.sharded_parameters) if reducer is None else reducer.finish()
            agreement = self._engine.agree(has_gradient, [problem is not None, *stale], written)
            wrong, *stale = agreement.flags
            if wrong:
                raise RuntimeError(next(filter(None, self.collectives.gather_objects(problem))))
            again = any(stale)
            if again:
                reducer.reduce_again([bucket for bucket, old in enumerate(stale) if old])
        if agreement.signal:
            self._linked.follow()
        self._agreement = agreement
        if reducer is not None:
            reducer.closed = True
        return agreement

    def _must_skip(self, agreement: Agreement) -> bool:
        if agreement.nonfinite and self._nonfinite == "raise":
            first, *others = self._engine.nonfinite()
            raise FloatingPointError(
                f"gradient of parameter {first!r} has inf or nan ({1 + len(others)} parameters in all): the step was "
                'not taken and no state changed; pass nonfinite="skip" to skip such steps'
            )
        return agreement.nonfinite

    def step_report(self) -> dict[str, Any]:
        """What the last step did; collective over the process group.

        Returns:
            "grad_norm" (raw mean gradient), "skipped", "ns_calls" (matrices this rank orthogonalized),
            "bytes" (sent by this rank, by collective), "seconds" (by phase, on this rank), "communication"
            (per collective of this rank "calls", "bytes", "exposed_seconds" that the step waited for it, and
            "hidden_seconds" that it was under way beside other work), and per matrix name what `track` asks
            for: "update_rms" (of the update at lr 1), "orthogonality" (||U U^T - I||_F / sqrt(rows), the short
            side being the rows). A step begins where the one before returned, so the gathers that
            `overlap_param_gather` left under way count to the next.
        """
        return step_report([self._engine], **self._facts)

    def local_report(self) -> dict[str, Any]:
        """`step_report()` without what is measured per matrix; no collective."""
        return local_report([self._engine], **self._facts)

    def track(self, *names: str) -> None:
        """Choose what every step measures per matrix: any of "update_rms" (the default) and "orthogonality"."""
        self._engine.measures.choose(*names)

    def _forget_agreement(self) -> None:
        self._agreement, self._unscaled, self._clip = None, False, 1.0

    # ---- gradients -----------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without reducing them: for all but the last microbatch of a step."""
        if self._reducer is None:
            raise RuntimeError(
                'no_sync() with gradient_reduction="none": use the no_sync() of the wrapper that reduces'
            )
        with self._reducer.paused():
            yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, the flat ones included.

        Args:
            set_to_none: accepted for torch.optim's sake; p.grad is always set to None.
        """
        if self._reducer is not None:
            self._reducer.reset()
        else:
            super().zero_grad(set_to_none=True)
        self._forget_agreement()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scale the mean gradient so that its global 2-norm is at most `max_norm`; p.grad is not written.

        Collective over the process group.

        Returns:
            The global norm of the raw mean gradient (unscaled if a GradScaler is used); inf or nan where
            a gradient is, and then nothing is scaled.
        """
        if not max_norm >= 0:
            raise ValueError(f"max_norm={max_norm} must be a number >= 0")
        norm = self._agree().norm
        factor = max_norm / (norm * self._clip + 1e-6)  # torch.nn.utils.clip_grad_norm_'s
        if factor < 1 and norm < float("inf"):
            _scale_gradients(self._buckets, factor)
            self._clip *= factor
        return norm

    @torch.no_grad()
    def unscale_gradients(self, inv_scale: float) -> bool:
        """Multiply the mean gradients by `inv_scale`; `GradScaler` calls it. Collective over the process group.

        Returns:
            Whether any rank's gradient has an inf or nan.
        """
        agreement = self._agree()
        _scale_gradients(self._buckets, inv_scale)
        agreement.rescale(inv_scale)
        self._unscaled = True
        return agreement.nonfinite

    @torch.no_grad()
    def gradient(self, name: str) -> torch.Tensor:
        """The mean gradient of one parameter, whole; collective over the process group.

        Args:
            name: of the parameter, as `muon_param_groups` calls it.

        Returns:
            fp32, of the parameter's shape; zeros where no rank has a gradient.
        """
        self._agree()
        return whole_gradient(name, self.sharded_parameters, self.collectives)

    # ---- parameters ----------------------------------------------------------------------------------

    def overlap_param_gather(self, model: nn.Module) -> None:
        """Leave the all-gathers of `step()` under way; each is waited for by the forward that needs it.

        Outside a forward, read parameters only after `wait_params()`.

        Args:
            model: the module whose parameters this optimizer holds.
        """
        self._gatherer.attach(model)

    def wait_params(self) -> None:
        """Wait for the all-gathers that `overlap_param_gather` left under way."""
        self._gatherer.wait()

    @torch.no_grad()
    def gather_params(self) -> None:
        """Rebuild every parameter from the masters of all ranks; collective over the process group.

        Values written into the parameters since the last step are kept, unless masters were restored since.
        """
        self._linked.gather()

    def check_replicas(self) -> None:
        """Raise a RuntimeError that names the first parameter whose bits differ between ranks; collective."""
        self._linked.check_replicas()

    def close(self) -> None:
        """Take hooks and stand-ins off the parameters and give the process groups back; the optimizer ends here.

        Called when the optimizer goes out of use, and when a newer one is built on any of its parameters. The
        parameters stay as they are.
        """
        if not self._closed:
            self._gatherer.wait()
            if self._reducer is not None:
                self._reducer.wait()
            self._release()
            self._closed = True

    # ---- state ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's exact state by parameter name; no collective, no step, same keys on every rank.

        After `gather_state()`, and until the next step, rank 0's is the state of all ranks. `checkpoint.save` writes
        what any number of ranks can load, without bringing it to one rank.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._linked.adopt()
        self._engine.settle()
        state = self._saved.export(stepped=self._steps > 0)
        for hook in self._optimizer_state_dict_post_hooks.values():
            state = hook(self, state) or state
        return state

    @torch.no_grad()
    def gather_state(self) -> None:
        """Let `state_dict()` of rank 0 be the whole state until the next step; collective over the process group.

        For frameworks that save one rank's `state_dict()`. It loads at any number of ranks.
        """
        self._linked.adopt()
        self._saved.gather()

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict()` of the same rank of as many ranks returned, or a whole one; no collective.

        Load the model's weights as well, or call `gather_params()`: a step refuses to run on parameters
        that do not follow from the masters.

        Raises:
            ValueError: the state belongs to another rank, world size or set of parameters.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self._engine.settle()
        self._saved.restore(state_dict)
        self._engine.rebind()
        self._linked.masters_restored()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def checkpoint_view(self) -> CheckpointView:
        """What `checkpoint.save` and `load` work on; no collective."""
        return checkpoint_view(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor adds groups: shards, homes and buckets are fixed there."""
        if getattr(self, "_sealed", False):
            raise RuntimeError(
                "add_param_group() after construction: the shards are fixed; build a new DistributedMuon"
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "DistributedMuon can neither be copied nor pickled, for it holds hooks and process groups: copy the model "
            "and build another, or save with checkpoint.save()"
        )


def _check_options(
    layout: str, bucket_mb: float | None, gradient_reduction: str, reduce_dtype: torch.dtype, nonfinite: str
) -> None:
    check_choice("reduce_dtype", reduce_dtype, (torch.float32, torch.bfloat16))
    check_choice("layout", layout, ("auto", "aligned", "bucketed", "flat"))
    check_choice("gradient_reduction", gradient_reduction, ("reduce_scatter", "none"))
    check_choice("nonfinite", nonfinite, ("raise", "skip"))
    if bucket_mb is not None and (layout == "flat" or bucket_mb <= 0):
        raise ValueError(f"bucket_mb={bucket_mb} with layout={layout!r}: give MiB above 0, and none for 'flat'")
    if gradient_reduction == "none" and reduce_dtype != torch.float32:
        raise ValueError(f'reduce_dtype={reduce_dtype} with gradient_reduction="none": nothing is reduced here')


def _cut(
    members: Sequence[Member], groups: Sequence[Mapping[str, Any]], dp: int, layout: str, bucket_mb: float | None
) -> tuple[list[Bucket], list[list[Shard]]]:
    """The buckets, and per rank its shards of them."""
    families = [(groups[member.group]["algorithm"], member.param.dtype) for member in members]
    numels = [member.spec.numel for member in members]
    size = None if layout == "flat" else bucket_elements(bucket_mb, dp)
    buckets = cut_families(families, numels, dp, size, layout in ("auto", "aligned"))
    return buckets, cut_buckets(buckets, numels, dp)


def _scale_gradients(buckets: Sequence[FlatBucket], factor: float) -> None:
    for bucket in buckets:
        bucket.part.grad.mul_(factor)


def _take_averaged(parameters: Sequence[OwnedParameter]) -> tuple[list[bool], list[bool]]:
    """What `GradientReducer.finish` returns, where a wrapper has reduced: copies this rank's elements of p.grad."""
    for p in parameters:
        if p.part is not None:
            whole = p.param.grad
            p.grad.zero_() if whole is None else p.grad.copy_(whole.reshape(-1)[p.start : p.stop])
    return [p.param.grad is not None for p in parameters], []


def _members(groups: Sequence[Mapping[str, Any]], order: Mapping[str, int]) -> list[Member]:
    """Every parameter, in the model's order where that is known."""
    members = []
    for index, (group, names) in enumerate(zip(groups, parameter_names(groups), strict=True)):
        for name, param in zip(names, group["params"], strict=True):
            if hasattr(param, "placements"):
                raise ValueError(
                    f"parameter {name!r} is a DTensor: use integrations.fsdp2, or pass the model before fully_shard or "
                    "parallelize_module, since DistributedMuon shards by itself"
                )
            members.append(Member(tensor_spec(name, param, group), param, index))
    if not members:
        raise ValueError("optimizer got an empty parameter list: every parameter is frozen, or params was used up")
    return sorted(members, key=lambda member: order.get(member.spec.name, 0))
