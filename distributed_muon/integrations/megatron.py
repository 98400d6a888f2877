"""ZeRO-1 Muon for Megatron-core: an optimizer over its DDP buffers, under any TP x PP x EP x DP.

Megatron's DDP reduces gradients and gathers parameters, its ChainedOptimizer takes norms and clips. What is left
is a layout to read (megatron_layout.py) and the core's step on it (megatron_domain.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    _get_param_groups,
    get_standard_config_overrides,
)
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler, MegatronGradScaler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from distributed_muon.engine.agreement import check_same_everywhere
from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.diagnostics import merge_measured
from distributed_muon.engine.options import check_group, check_newton_schulz
from distributed_muon.integrations.megatron_checkpoint import export_shards, import_groups, import_shards
from distributed_muon.integrations.megatron_domain import DomainStep, MasterShard
from distributed_muon.integrations.megatron_layout import make_domain, shard_aligned_param_layout
from distributed_muon.integrations.megatron_params import MarkedParameter, Override, TensorParallel, read_parameters

__all__ = ["MegatronMuon", "get_distributed_muon_optimizer", "shard_aligned_param_layout"]


def get_distributed_muon_optimizer(
    config: OptimizerConfig,
    model_chunks: list[nn.Module],
    config_overrides: Mapping[Any, Any] | None = None,
    use_gloo_process_groups: bool = True,
    pg_collection: ProcessGroupCollection | None = None,
    dump_param_to_param_group_map: str | None = None,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: Any = "quintic",
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str = "match_rms_adamw",
    ns_form: str = "auto",
    ns_dtype: torch.dtype = torch.bfloat16,
    strategy: str = "home",
    overrides: Mapping[str, Override] | None = None,
) -> ChainedOptimizer:
    """Muon for the hidden matrices and AdamW for the rest, where `get_megatron_optimizer` was called.

    Collective over the world. Learning rate, weight decay, AdamW's options, clipping and loss scale are those
    of `config` (optimizer="adam"), and parameter groups follow `config_overrides`, as Megatron's own do.

    Args:
        config, model_chunks, config_overrides, use_gloo_process_groups, pg_collection,
            dump_param_to_param_group_map: as of `get_megatron_optimizer`; the chunks are wrapped in DDP with
            use_distributed_optimizer=True. No gloo group is used, and a map cannot be dumped.
        momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as torch.optim.Muon.
        ns_form, ns_dtype, strategy: as `DistributedMuon`.
        overrides: fnmatch pattern of parameter names -> "muon", "adamw" or a rule (`distributed_muon.layout.matrices`).

    Raises:
        ValueError: an option or parameter that is not supported, by name.
        RuntimeError: ranks of a domain disagree about a parameter, or ranks of the world about options.
    """
    check_newton_schulz(ns_form, ns_dtype, strategy)
    _refuse_options(config, model_chunks, dump_param_to_param_group_map)
    pgs = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "expt_tp"])
    sizes = TensorParallel(dist.get_world_size(pgs.tp), dist.get_world_size(pgs.expt_tp))
    members = read_parameters(model_chunks, sizes, overrides or {}, adjust_lr_fn)
    options = {
        "momentum": momentum,
        "nesterov": nesterov,
        "ns_coefficients": ns_coefficients,
        "eps": eps,
        "ns_steps": ns_steps,
        "adjust_lr_fn": adjust_lr_fn,
        "matrices": None,
        "adamw_betas": (config.adam_beta1, config.adam_beta2),
        "adamw_eps": config.adam_eps,
    }
    if config_overrides is None:
        config_overrides = get_standard_config_overrides(config)
    param_groups = _split_groups(_get_param_groups(model_chunks, config, config_overrides), members, config, options)
    world = Collectives(None)
    lines = [f"options {(ns_form, ns_dtype, strategy, config.bf16, config.fp16, config.clip_grad)}"]
    lines += [f"group {number} {_options_of(group)}" for number, group in enumerate(param_groups)]
    check_same_everywhere(world, lines)

    group_of = {id(param): number for number, group in enumerate(param_groups) for param in group["params"]}
    parts: list[DomainStep] = []
    for expert, tensor_parallel in ((False, pgs.tp), (True, pgs.expt_tp)):
        kind = "expert_parallel_buffers" if expert else "buffers"
        buffers = [buffer for chunk in model_chunks for buffer in getattr(chunk, kind)]
        domain = make_domain(buffers, tensor_parallel)
        if domain is not None:
            busy = parts[0].ns_flops if parts else {}
            held = [member for member in members if member.expert == expert]
            groups = [group_of[id(member.param)] for member in held]
            keywords = dict(ns_form=ns_form, ns_dtype=ns_dtype, strategy=strategy, busy=busy)
            parts.append(DomainStep(held, groups, param_groups, buffers, domain, **keywords))
    if not any(world.gather_objects(any(part.plan.layout.matrices for part in parts))):
        raise ValueError("no parameter of any rank goes to Muon: check requires_grad and overrides")
    stats = ProcessGroupCollection.setup_process_groups_for_optimizer(pg_collection, model_chunks, False)
    optimizer = MegatronMuon(config, model_chunks, members, param_groups, group_of, parts)
    optimizer.grad_stats_parallel_group = stats["intra_dist_opt_group"]
    return ChainedOptimizer([optimizer])


class _Shards(torch.optim.Optimizer):
    """What Megatron reads of a torch optimizer: groups of master shards, and their state."""

    def __init__(self, param_groups: list[dict[str, Any]], shards: Sequence[MasterShard], parts: Sequence[DomainStep]):
        super().__init__(param_groups, {})
        self.state.update({shard.master: shard.state for shard in shards})
        self._parts = parts

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step from the masters' `.grad`; collective over the domains. `closure` is not called."""
        for part in self._parts:
            part.step(self.param_groups)


class MegatronMuon(MegatronOptimizer):
    """The optimizer below the ChainedOptimizer; use `get_distributed_muon_optimizer`.

    Attributes:
        parts: the dense and the expert domain, where this rank has such parameters.
        members: every trainable parameter of this rank, with its matrices.
        model_chunks, ddp_config: Megatron's. steps: steps taken, skipped ones excluded.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        model_chunks: list[nn.Module],
        members: Sequence[MarkedParameter],
        param_groups: list[dict[str, Any]],
        group_of: Mapping[int, int],
        parts: Sequence[DomainStep],
    ) -> None:
        self.model_chunks, self.ddp_config = model_chunks, model_chunks[0].ddp_config
        self.parts, self.members = parts, members
        self.shards = [shard for part in parts for shard in part.shards]
        for group in param_groups:
            group["params"] = []
        for shard in self.shards:
            param_groups[group_of[id(shard.member.param)]]["params"].append(shard.master)
        super().__init__(_Shards(param_groups, self.shards, parts), config)
        self.is_stub_optimizer, self.steps = False, 0
        self.grad_scaler = _grad_scaler(config)
        self._device = members[0].param.device if members else torch.device(torch.cuda.current_device())

    # ---- one step --------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients outside the DDP buffers, which `model_chunk.zero_grad_buffer()` zeroes."""
        for member in self.members:
            member.param.grad = None
        for shard in self.shards:
            shard.master.grad = None

    def get_loss_scale(self) -> Tensor:
        """The loss scale, a tensor of size 1; 1 without a scaler."""
        return torch.ones(1, device=self._device) if self.grad_scaler is None else self.grad_scaler.scale

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Take and unscale the reduced gradients; whether any rank of the world found an inf or nan."""
        for shard in self.shards:
            shard.take_gradient()
        found = torch.zeros(1, device=self._device)
        inverse = torch.ones(1, device=self._device) if self.grad_scaler is None else self.grad_scaler.inv_scale
        if self.shards:
            grads = [shard.master.grad for shard in self.shards]
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found, inverse)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.get_grad_stats_parallel_group())
        nonfinite = bool(found.item() > 0)
        if self.grad_scaler is not None:
            self.grad_scaler.update(nonfinite)
        return nonfinite

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Step, then gather the parameters, unless DDP's forward hooks will (overlap_param_gather)."""
        self.optimizer.step()
        self.steps += 1
        if not self.ddp_config.overlap_param_gather:
            for chunk in self.model_chunks:
                chunk.start_param_sync()
        return True

    def step(self) -> tuple[bool, float | None, float | None]:
        """(success, gradient norm, zeros in gradients) of one whole step; (False, None, None) on inf or nan."""
        return ChainedOptimizer([self]).step()

    def step_report(self) -> dict[str, Any]:
        """What was done since the last report; collective over each domain.

        Returns:
            "ns_calls" (matrices this rank orthogonalized), "bytes" (that it sent in exchanges, by collective),
            "seconds" by phase, "communication" (of the exchange, as
            `DistributedMuon.step_report` has it), and "update_rms" per matrix of the last step (of the update at lr 1).
        """
        report: dict[str, Any] = {"ns_calls": 0, "communication": {}, "update_rms": {}}
        sent, seconds = Counter(), Counter()
        for part in self.parts:
            times = part.timer.take()
            report["ns_calls"] += part.muon.ns_calls
            sent.update(part.collectives.sent_bytes)
            seconds.update(times.seconds())
            for label, counts in times.communication().items():
                report["communication"].setdefault(label, Counter()).update(counts)
            merged = merge_measured(part.collectives, part.plan, part.muon.measured, part.device)
            report["update_rms"] |= merged.get("update_rms", {})
            part.muon.ns_calls = 0
            part.collectives.sent_bytes.clear()
        return {**report, "bytes": dict(sent), "seconds": dict(seconds)}

    def explain(self) -> str:
        """Where every parameter went and why, and the plan of each domain."""
        rows = []
        for member in self.members:
            matrices = ", ".join(f"{m.rows} x {m.cols}" for m in member.spec.matrices())
            rows.append(f"{member.name}  {tuple(member.param.shape)}  {matrices or 'adamw'}  ({member.reason})")
        return "\n".join([*rows, *(part.plan.explain() for part in self.parts)])

    # ---- parameters and checkpoints ----------------------------------------------------------------------

    @torch.no_grad()
    def reload_model_params(self, state_dict: Mapping[str, Any] | None = None) -> None:
        """Take the masters anew from the model's parameters, or in full precision from a state dict of the model.

        Args:
            state_dict: {"model": ...}, {"model0": ..., ...}, or the model's state dict itself.
        """
        values: dict[str, Any] = {}
        if state_dict is not None:
            for index in range(len(self.model_chunks)):
                prefix = f"model{index}." if len(self.model_chunks) > 1 else ""
                inner = state_dict.get(f"model{index}", state_dict.get("model", state_dict))
                values |= {prefix + key.removeprefix("module."): value for key, value in inner.items()}
        for shard in self.shards:
            if state_dict is None:
                shard.master.copy_(shard.own)
            elif shard.member.name not in values:
                raise ValueError(f"the state dict has no parameter {shard.member.name!r}: pass the whole model's")
            else:
                shard.master.copy_(values[shard.member.name].reshape(-1)[shard.start : shard.stop])

    def state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        """Groups, step and loss scale, equal on every rank; tensors are in `sharded_state_dict`.

        Args:
            is_loading: accepted for Megatron's sake; nothing has to be allocated first.
        """
        state: dict[str, Any] = {
            "distributed_muon": 1,
            "param_groups": [_options_of(group) for group in self.param_groups],
            "step": self.steps,
        }
        if self.grad_scaler is not None:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `sharded_state_dict` saved, tensors included where they were loaded; no collective."""
        import_groups(self.param_groups, state_dict["param_groups"])
        if self.grad_scaler is not None and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.steps = state_dict["step"]
        if "param_state" in state_dict:
            import_shards(self.shards, state_dict["param_state"], self.steps)
            for part in self.parts:
                part.write_parameters()

    def sharded_state_dict(
        self, model_sharded_state_dict: Mapping[str, Any], is_loading: bool = False, metadata: Any = None, **_: Any
    ) -> dict[str, Any]:
        """State for `dist_checkpointing`, that loads at any TP x PP x EP x DP; collective when saving.

        Args:
            model_sharded_state_dict: of the model chunks; its keys and offsets are taken over.
            is_loading: request what to load, without data. metadata: accepted; the one format has no choices.
        """
        tensors = {}
        for part in self.parts:
            tensors |= export_shards(part, model_sharded_state_dict, is_loading)
        return {**self.state_dict(), "param_state": tensors}

    def save_parameter_state(self, filename: str) -> None:
        """Refused: it writes Megatron's old format, bound to the number of ranks."""
        raise ValueError("the optimizer has no torch-format checkpoint: use --ckpt-format torch_dist")

    load_parameter_state = save_parameter_state


def _refuse_options(config: OptimizerConfig, model_chunks: Sequence[nn.Module], dump: str | None) -> None:
    """Raise a ValueError for options that would be ignored or train wrongly."""
    ddp = getattr(model_chunks[0], "ddp_config", None)
    if ddp is None:
        raise ValueError("model_chunks must be wrapped in megatron.core's DistributedDataParallel")
    model = model_chunks[0].config
    wrong = {
        "use_distributed_optimizer=False": not ddp.use_distributed_optimizer or not config.use_distributed_optimizer,
        f"optimizer={config.optimizer!r}": config.optimizer != "adam",
        "decoupled_weight_decay=False": not config.decoupled_weight_decay,
        "overlap_param_gather_with_optimizer_step": config.overlap_param_gather_with_optimizer_step,
        "use_precision_aware_optimizer": config.use_precision_aware_optimizer,
        "optimizer_cpu_offload": config.optimizer_cpu_offload,
        "use_layer_wise_distributed_optimizer": getattr(config, "use_layer_wise_distributed_optimizer", False),
        "optimizer_cuda_graph": getattr(config, "optimizer_cuda_graph", False),
        "use_megatron_fsdp": getattr(ddp, "use_megatron_fsdp", False),
        "num_distributed_optimizer_instances > 1": ddp.num_distributed_optimizer_instances > 1,
        "reuse_grad_buf_for_mxfp8_param_ag": ddp.reuse_grad_buf_for_mxfp8_param_ag,
        "fp8_param_gather": ddp.fp8_param_gather,
        "qk_clip (it scales whole masters)": getattr(model, "qk_clip", False),
        "dump_param_to_param_group_map": dump is not None,
    }
    for option, found in wrong.items():
        if found:
            raise ValueError(
                f"{option} is not supported by get_distributed_muon_optimizer: set optimizer='adam' with "
                "use_distributed_optimizer=True and leave the other options at their defaults"
            )


def _split_groups(
    groups: Sequence[Mapping[str, Any]],
    members: Sequence[MarkedParameter],
    config: OptimizerConfig,
    options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Megatron's groups, each divided by algorithm; equal on every rank, so some may be empty here."""
    algorithm_of = {id(m.param): "adamw" if m.spec.rule is None else "muon" for m in members}
    split = []
    for group in groups:
        for algorithm in ("muon", "adamw"):
            chosen = [param for param in group["params"] if algorithm_of[id(param)] == algorithm]
            rates = {"lr": group["max_lr"], "weight_decay": config.weight_decay * group["wd_mult"]}
            split.append({**rates, **group, **options, "params": chosen, "algorithm": algorithm})
            check_group(len(split) - 1, split[-1])
    used = Collectives(None).gather_objects([bool(group["params"]) for group in split])
    return [group for number, group in enumerate(split) if any(flags[number] for flags in used)]


def _options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(v) if isinstance(v, Tensor) else v for key, v in group.items() if key != "params"}


def _grad_scaler(config: OptimizerConfig) -> MegatronGradScaler | None:
    if config.loss_scale:
        return ConstantGradScaler(config.loss_scale)
    if not config.fp16:
        return None
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=config.loss_scale_window,
        hysteresis=config.hysteresis,
    )
