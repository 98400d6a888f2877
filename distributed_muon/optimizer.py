"""DistributedMuon: ZeRO-1 Muon and AdamW for plain PyTorch data parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distributed_muon.buckets import FlatBucket, GradientReducer, ParameterGatherer
from distributed_muon.engine.agreement import Agreement, check_same_everywhere
from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.diagnostics import merge_measured
from distributed_muon.engine.options import check_choice, check_group, check_newton_schulz, describe, tensor_specs
from distributed_muon.engine.sharded_muon import ShardedMuon
from distributed_muon.engine.state import allocate_state, behind_masters, export_state, import_state
from distributed_muon.engine.timing import StepTimer
from distributed_muon.engine.update import adamw_update
from distributed_muon.layout.cost_model import hardware_of
from distributed_muon.layout.cutting import Bucket, bucket_elements, cut_buckets, make_buckets
from distributed_muon.layout.matrices import TensorSpec
from distributed_muon.layout.pieces import Layout
from distributed_muon.layout.plan import NewtonSchulz, Plan, make_plan


class DistributedMuon(torch.optim.Optimizer):
    """Muon with optimizer states and gradients partitioned over data-parallel ranks (ZeRO-1).

    The algorithm is section 2.3 of "Muon is Scalable for LLM Training" (arXiv 2502.16982) with one home
    per matrix. Construct it after the model is on its device, on every rank with equal weights, and do
    not wrap the model in DDP: gradients are reduce-scattered from hooks during the last backward of a
    step. Construction, `step`, `clip_grad_norm_`, `step_report` and `gather_params` are collective over
    `process_group`; `state_dict` and `load_state_dict` are not.

    Args:
        params: parameters or groups, as torch.optim takes them, best from `muon_param_groups(model)`.
            A group's "algorithm" is "muon" (the default) or "adamw"; a Muon group may carry "matrices",
            a rule of `distributed_muon.layout.matrices` for parameters that are not one 2-D matrix each.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as
            torch.optim.Muon; each may differ by group. `ns_coefficients` also takes a table's name
            (`engine.coefficients.COEFFICIENTS`). `eps` guards the zero matrix only: inputs are scaled first.
        adamw_betas, adamw_eps: of AdamW groups, which share `lr` and `weight_decay`.
        ns_form: "standard" is bit-identical to torch.optim.Muon on CPUs; "gram"; "auto", the faster by shape.
        ns_dtype: of Newton-Schulz and of what travels for it: torch.bfloat16 or torch.float32.
        process_group: the data-parallel group; None is the default group, or one rank without
            torch.distributed.
        strategy: "home", "gather" or "auto" (`plan.make_plan`).
        layout: how buckets are cut: "aligned" (tensors ordered so that few straddle ranks; also "auto"),
            "bucketed" (registration order), "flat" (one bucket).
        bucket_mb: MiB of fp32 gradient per bucket; None is Megatron's rule.
        gradient_reduction: "reduce_scatter", or "none" where a wrapper already averages p.grad.
        reduce_dtype: torch.float32 or torch.bfloat16, of the reduction; accumulation stays fp32.
        nonfinite: "raise" FloatingPointError on a gradient with inf or nan, or "skip" that step; the state is
            untouched either way. `GradScaler` skips by itself.

    Raises:
        ValueError: an option or parameter that cannot be right; the message names it.
        RuntimeError: ranks disagree about names, shapes, dtypes or options.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Any = "quintic",
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        *,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        ns_form: str = "auto",
        ns_dtype: torch.dtype = torch.bfloat16,
        process_group: dist.ProcessGroup | None = None,
        strategy: str = "auto",
        layout: str = "auto",
        bucket_mb: float | None = None,
        gradient_reduction: str = "reduce_scatter",
        reduce_dtype: torch.dtype = torch.float32,
        nonfinite: str = "raise",
    ) -> None:
        check_newton_schulz(ns_form, ns_dtype, strategy)
        check_choice("reduce_dtype", reduce_dtype, (torch.float32, torch.bfloat16))
        check_choice("layout", layout, ("auto", "aligned", "bucketed", "flat"))
        check_choice("gradient_reduction", gradient_reduction, ("reduce_scatter", "none"))
        check_choice("nonfinite", nonfinite, ("raise", "skip"))
        if bucket_mb is not None and (layout == "flat" or bucket_mb <= 0):
            raise ValueError(f"bucket_mb={bucket_mb} with layout={layout!r}: give MiB above 0, and none for 'flat'")
        if gradient_reduction == "none" and reduce_dtype != torch.float32:
            raise ValueError(f'reduce_dtype={reduce_dtype} with gradient_reduction="none": nothing is reduced here')
        defaults = {
            "algorithm": "muon",
            "matrices": None,
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
        }
        self._sealed = False
        super().__init__(params, defaults)
        for index, group in enumerate(self.param_groups):
            check_group(index, group)
        members = _members(self.param_groups)
        specs = tensor_specs(members, self.param_groups)
        self.collectives = Collectives(process_group)
        options = (ns_form, ns_dtype, strategy, layout, bucket_mb, gradient_reduction, reduce_dtype, nonfinite)
        check_same_everywhere(self.collectives, describe(options, members, self.param_groups))
        self._params = [param for _, param, _ in members]
        self._algorithms = [self.param_groups[group]["algorithm"] for _, _, group in members]
        self._nonfinite = nonfinite
        self._device = self._params[0].device
        self._timer = StepTimer(self._device)
        self.collectives.warm_up(self._device)

        dp, rank = self.collectives.size, self.collectives.rank
        numel = None if layout == "flat" else bucket_elements(bucket_mb, dp)
        buckets = self._cut(specs, numel, layout in ("auto", "aligned"))
        shards = cut_buckets(buckets, [spec.numel for spec in specs], dp)
        newton_schulz = NewtonSchulz(ns_steps, ns_form, ns_dtype.itemsize)
        # Sharing a matrix changes the order of sums, which "standard" promises not to.
        planning = {"teams": ns_form == "auto", "hardware": hardware_of(self._device.type)}
        self.plan: Plan = make_plan(Layout.build(specs, shards), strategy, newton_schulz, **planning)

        reduces = gradient_reduction == "reduce_scatter"
        with torch.no_grad():
            self._buckets = [FlatBucket(bucket, self._params, self.collectives, reduces) for bucket in buckets]
        self._reducer = GradientReducer(self._buckets, self._params, reduce_dtype, self._timer) if reduces else None
        self._gatherer = ParameterGatherer(self._buckets, self._params, self._timer)
        self.sharded_parameters = allocate_state(self._buckets, shards[rank], members, self._algorithms, rank)
        self.state.update({p.param: p.state for p in self.sharded_parameters})
        self._owned = [(shard.tensor, self.sharded_parameters[shard.tensor]) for shard in shards[rank]]
        self._muon = ShardedMuon(
            self.plan,
            self.collectives,
            [p.master for _, p in self._owned],
            [p.momentum for _, p in self._owned],
            device=self._device,
            ns_dtype=ns_dtype,
            ns_form=ns_form,
            timer=self._timer,
        )
        self._last_wave = self.plan.last_wave_by_tensor()
        self._agreement: Agreement | None = None
        self._unscaled = self._behind_masters = False
        self._clip = 1.0
        self._times = self._timer.take()
        self._report: dict[str, Any] = {}
        self._sealed = True

    def _cut(self, specs: list[TensorSpec], bucket_numel: int | None, aligned: bool) -> list[Bucket]:
        """Buckets of one algorithm and dtype each, so that every rank's share of the state is equal."""
        families: dict[Any, list[int]] = {}
        for tensor, (param, algorithm) in enumerate(zip(self._params, self._algorithms, strict=True)):
            families.setdefault((algorithm, param.dtype), []).append(tensor)
        dp, buckets = self.collectives.size, []
        for tensors in families.values():
            numels = [specs[tensor].numel for tensor in tensors]
            for bucket in make_buckets(numels, dp, bucket_numel=bucket_numel, aligned=aligned):
                buckets.append(bucket._replace(tensors=tuple(tensors[i] for i in bucket.tensors)))
        # A bucket is complete when the gradient of its first layer arrives: reduce the last layers' first.
        return sorted(buckets, key=lambda bucket: -min(bucket.tensors))

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
        if not self._unscaled:
            for p in self.sharded_parameters:
                if p.param.dtype == torch.float16:
                    raise ValueError(
                        f"parameter {p.name!r} is float16: scale the loss with distributed_muon.GradScaler"
                    )
        agreement = self._agree()
        skipped = self._must_skip(agreement)
        if not skipped:
            self._gatherer.adopt_outside_writes()
            self._adamw_step(agreement.present)
            self._start_gathers(after_wave=-1)
            grads = [p.grad for _, p in self._owned]
            groups = [self.param_groups[p.group] for p in self.sharded_parameters]
            self._muon.step(grads, groups, agreement.present, after_wave=self._start_gathers)
            if not self._gatherer.overlap:
                self._gatherer.wait()
        self._finish_step(agreement, skipped)
        return loss

    def _agree(self) -> Agreement:
        """Finish the reduce-scatters, then one all-reduce: norms, present gradients, flags."""
        if self._agreement is not None:
            return self._agreement
        self._gatherer.wait()
        if self._behind_masters:  # unless the model was loaded since
            self._behind_masters = behind_masters(self.sharded_parameters)
        stale = [True]
        while any(stale):
            written, stale = False, [False] * len(self._buckets)
            if self._reducer is None:
                has_gradient = [param.grad is not None for param in self._params]
                self._copy_averaged_gradients()
            else:
                self._reducer.finish()
                has_gradient = [self._reducer.has_gradient(tensor) for tensor in range(len(self._params))]
                written, stale = self._reducer.written_outside(), self._reducer.stale
            grads = [(tensor, p.grad) for tensor, p in self._owned]
            flags = [self._behind_masters, written, *stale]
            with self._timer("agreement"):
                agreement = Agreement.reach(self.collectives, grads, has_gradient, flags, self._device)
            behind, written, *stale = agreement.flags
            if behind:
                raise RuntimeError(
                    "parameters differ from the masters that load_state_dict() restored: call "
                    "optimizer.gather_params() after loading, before the first forward"
                )
            if written:
                raise RuntimeError(
                    "p.grad was changed in place after backward had reduced it, so the change would be lost: use "
                    "optimizer.clip_grad_norm_() or distributed_muon.GradScaler, or backward inside no_sync()"
                )
            if any(stale):
                assert self._reducer is not None
                self._reducer.reduce_again([bucket for bucket, again in enumerate(stale) if again])
        self._agreement = agreement
        if self._reducer is not None:
            self._reducer.closed = True
        return agreement

    def _must_skip(self, agreement: Agreement) -> bool:
        bad = agreement.nonfinite
        if bad and self._nonfinite == "raise":
            raise FloatingPointError(
                f"gradient of parameter {self.sharded_parameters[bad[0]].name!r} has inf or nan ({len(bad)} parameters "
                'in all): the step was not taken and no state changed; pass nonfinite="skip" to skip such steps'
            )
        return bool(bad)

    def _copy_averaged_gradients(self) -> None:
        for _, p in self._owned:
            whole = p.param.grad
            p.grad.zero_() if whole is None else p.grad.copy_(whole.reshape(-1)[p.start : p.stop])

    def _adamw_step(self, present: list[bool]) -> None:
        with self._timer("adamw"):
            for index, group in enumerate(self.param_groups):
                owned = [p for tensor, p in self._owned if p.group == index and present[tensor]]
                if group["algorithm"] == "adamw" and owned:
                    adamw_update(
                        [p.master for p in owned],
                        [p.grad for p in owned],
                        *([p.state[key] for p in owned] for key in ("exp_avg", "exp_avg_sq", "step")),
                        lr=float(group["lr"]),
                        betas=group["adamw_betas"],
                        eps=group["adamw_eps"],
                        weight_decay=group["weight_decay"],
                    )
            for tensor, p in enumerate(self.sharded_parameters):
                if "step" in p.state and present[tensor] and p.start == p.stop:
                    p.state["step"] += 1  # the owners' was advanced above: the same count on every rank

    def _start_gathers(self, after_wave: int) -> None:
        """Start the all-gather of the buckets whose last matrix was updated in this wave (-1: AdamW)."""
        for index, bucket in enumerate(self._buckets):
            if max(self._last_wave[tensor] for tensor in bucket.spec.tensors) == after_wave:
                self._gatherer.start(index)

    def _finish_step(self, agreement: Agreement, skipped: bool) -> None:
        if self._reducer is not None:
            self._reducer.restart()
        self._report = {
            "grad_norm": agreement.norm,
            "skipped": skipped,
            "ns_calls": self._muon.ns_calls,
            "bytes": dict(self.collectives.sent_bytes),
        }
        self._times = self._timer.take()
        self.collectives.sent_bytes.clear()
        self._muon.ns_calls = 0
        self._forget_agreement()

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
        measured = merge_measured(self.collectives, self.plan, self._muon.measured, self._device)
        return {**self.local_report(), **measured}

    def local_report(self) -> dict[str, Any]:
        """`step_report()` without what is measured per matrix; no collective."""
        times = {"seconds": self._times.seconds(), "communication": self._times.communication()}
        return {**self._report, **times} if self._report else {}

    def track(self, *names: str) -> None:
        """Choose what every step measures per matrix: any of "update_rms" (the default) and "orthogonality"."""
        for name in names:
            check_choice("track", name, ("update_rms", "orthogonality"))
        self._muon.track = set(names)

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
        before, self._reducer.syncing = self._reducer.syncing, False
        try:
            yield
        finally:
            self._reducer.syncing = before

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
        norm = self._agree().norm
        factor = max_norm / (norm * self._clip + 1e-6)  # torch.nn.utils.clip_grad_norm_'s
        if factor < 1 and norm < float("inf"):
            self._scale_gradients(factor)
            self._clip *= factor
        return norm

    @torch.no_grad()
    def unscale_gradients(self, inv_scale: float) -> bool:
        """Multiply the mean gradients by `inv_scale`; `GradScaler` calls it. Collective over the process group.

        Returns:
            Whether any rank's gradient has an inf or nan.
        """
        agreement = self._agree()
        self._scale_gradients(inv_scale)
        agreement.rescale(inv_scale)
        self._unscaled = True
        return bool(agreement.nonfinite)

    def _scale_gradients(self, factor: float) -> None:
        for bucket in self._buckets:
            bucket.grad_shard.mul_(factor)

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
        """Rebuild every parameter from the masters of all ranks; collective over the process group."""
        self._gatherer.wait()
        for index in range(len(self._buckets)):
            self._gatherer.start(index)
        self._gatherer.wait()
        self._behind_masters = False

    @torch.no_grad()
    def resync_masters(self) -> None:
        """Take over values written through `p.data`; writes into `p` itself are noticed at the next step."""
        for bucket in self._buckets:
            bucket.merge_outside_writes()
        self._behind_masters = False

    # ---- state ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's exact state by parameter name; no collective, no step, same keys on every rank.

        `checkpoint.save` writes what any number of ranks can load.
        """
        return export_state(self.sharded_parameters, self.param_groups, *self._place)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict()` of the same rank of as many ranks returned; no collective.

        Load the model's weights as well, or call `gather_params()`: a step refuses to run on parameters
        that do not follow from the masters.

        Raises:
            ValueError: the state belongs to another rank, world size or set of parameters.
        """
        self._behind_masters = import_state(self.sharded_parameters, self.param_groups, *self._place, state_dict)

    @property
    def _place(self) -> tuple[int, int]:
        return self.collectives.rank, self.collectives.size

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor adds groups: shards, homes and buckets are fixed there."""
        if getattr(self, "_sealed", False):
            raise RuntimeError(
                "add_param_group() after construction: the shards are fixed; build a new DistributedMuon"
            )
        super().add_param_group(param_group)


def _members(groups: list[dict[str, Any]]) -> list[tuple[str, nn.Parameter, int]]:
    """(name, parameter, group index) of every parameter, in the model's order where the groups tell it."""
    members = []
    for index, group in enumerate(groups):
        names = group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))]
        positions = group.get("positions") or range(len(members), len(members) + len(names))
        members += zip(positions, names, group["params"], [index] * len(names), strict=True)
    members.sort(key=lambda member: member[0])
    return [member[1:] for member in members]
