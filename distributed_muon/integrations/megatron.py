"""ZeRO-1 Muon for Megatron-core: an optimizer over its DDP buffers, under any TP x PP x EP x DP.

Megatron's DDP reduces gradients and gathers parameters, its ChainedOptimizer takes norms and clips. What is left
is a layout to read (megatron_layout.py) and the engine's step on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

from distributed_muon.checkpoint.view import CheckpointView
from distributed_muon.engine.agreement import check_same_everywhere
from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.options import describe_group
from distributed_muon.engine.report import step_report
from distributed_muon.engine.state import OwnedParameter
from distributed_muon.integrations import megatron_checkpoint as checkpoint
from distributed_muon.integrations import megatron_options
from distributed_muon.integrations.megatron_layout import Domain, build_domain, find_ranks, shard_aligned_param_layout
from distributed_muon.integrations.megatron_memory import PartState
from distributed_muon.integrations.megatron_params import (
    MarkedParameter,
    Override,
    TensorParallel,
    check_overrides,
    read_parameters,
    unwrapped,
)

__all__ = ["MegatronMuon", "get_distributed_muon_optimizer", "shard_aligned_param_layout"]


def get_distributed_muon_optimizer(
    config: OptimizerConfig,
    model_chunks: list[nn.Module],
    config_overrides: Mapping[Any, Any] | None = None,
    use_gloo_process_groups: bool = True,
    pg_collection: ProcessGroupCollection | None = None,
    dump_param_to_param_group_map: str | None = None,
    *,
    overrides: Mapping[str, Override] | None = None,
    take_over: str | None = None,
    **options: Any,
) -> ChainedOptimizer:
    """Muon for the hidden matrices and AdamW for the rest, where `get_megatron_optimizer` was called.

    Collective over the world. Learning rate, weight decay, AdamW's options, clipping and loss scale are those
    of `config` (optimizer="adam"), and parameter groups follow `config_overrides`, as Megatron's own do.

    Args:
        config, model_chunks, config_overrides, use_gloo_process_groups, pg_collection,
            dump_param_to_param_group_map: as of `get_megatron_optimizer`; the chunks are wrapped in DDP with
            use_distributed_optimizer=True. No gloo group is used, and a map cannot be dumped.
        overrides: fnmatch pattern of parameter names -> "muon", "per_head" (each attention head a matrix), "adamw" or a
            rule (`distributed_muon.layout.matrices`). Names are those of the whole model, whatever the parallelism;
            `explain()` prints them.
        take_over: directory of a torch_dist checkpoint that Megatron's own Muon or AdamW wrote. What is loaded from it
            through `sharded_state_dict(..., is_loading=True)` is its optimizer state, as far as it goes.
        options: Muon's, as `engine.options.Options` has them.

    Raises:
        ValueError: an option or parameter that is not supported, by name.
        RuntimeError: ranks of a domain disagree about a parameter, or ranks of the world about options.
    """
    everywhere = megatron_options.read_options(config, options)
    megatron_options.refuse_unsupported(config, model_chunks, dump_param_to_param_group_map)
    megatron_options.refuse_checkpoint_format()
    pgs = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "expt_tp"])
    sizes = TensorParallel(dist.get_world_size(pgs.tp), dist.get_world_size(pgs.expt_tp))
    if config_overrides is None:
        config_overrides = get_standard_config_overrides(config)
    groups, world = _get_param_groups(model_chunks, config, config_overrides), Collectives(None)
    chosen = megatron_options.chosen_algorithms(groups)
    members = read_parameters(model_chunks, sizes, overrides or {}, everywhere.adjust_lr_fn, chosen)
    check_overrides(overrides or {}, members, world)
    muon = {member.param for member in members if member.spec.rule is not None}
    groups = _get_param_groups(model_chunks, config, megatron_options.spare(muon, config_overrides))
    param_groups = everywhere.complete(megatron_options.split_groups(groups, members, config))
    lines = [f"options {(everywhere, config.bf16, config.fp16, config.clip_grad)}"]
    lines += [f"group {number} {describe_group(group)}" for number, group in enumerate(param_groups)]
    check_same_everywhere(world, lines)

    group_of = {id(param): number for number, group in enumerate(param_groups) for param in group["params"]}
    domains: list[Domain] = []
    for expert, tensor_parallel in ((False, pgs.tp), (True, pgs.expt_tp)):
        kind = "expert_parallel_buffers" if expert else "buffers"
        buffers = [buffer for chunk in model_chunks for buffer in getattr(chunk, kind)]
        ranks = find_ranks(buffers, tensor_parallel)
        if ranks is not None:
            held = [member for member in members if member.expert == expert]
            numbers = [group_of[id(member.param)] for member in held]
            busy = domains[0].flops_by_rank if domains else {}
            domains.append(build_domain(ranks, held, numbers, buffers, param_groups, everywhere, busy))
    if not any(world.gather_objects(any(domain.engine.plan.layout.matrices for domain in domains))):
        raise ValueError("no parameter of any rank goes to Muon: check requires_grad and overrides")
    stats = ProcessGroupCollection.setup_process_groups_for_optimizer(pg_collection, model_chunks, False)
    optimizer = MegatronMuon(config, model_chunks, members, param_groups, domains)
    optimizer.take_over = take_over
    optimizer.grad_stats_parallel_group = stats["intra_dist_opt_group"]
    return ChainedOptimizer([optimizer])


class MegatronMuon(MegatronOptimizer):
    """The optimizer below the ChainedOptimizer; use `get_distributed_muon_optimizer`.

    Attributes:
        domains: the dense and the expert domain, where this rank has such parameters.
        members: every trainable parameter of this rank, with its matrices.
        owned: the parameters of which this rank owns something, with their masters and state.
        model_chunks, ddp_config: Megatron's. steps: steps taken, skipped ones excluded.
        take_over: the foreign checkpoint that the next load reads, or None.
    """

    take_over: str | None = None

    def __init__(
        self,
        config: OptimizerConfig,
        model_chunks: list[nn.Module],
        members: Sequence[MarkedParameter],
        param_groups: list[dict[str, Any]],
        domains: Sequence[Domain],
    ) -> None:
        self.model_chunks, self.ddp_config = model_chunks, model_chunks[0].ddp_config
        self.domains, self.members = domains, members
        self.owned: list[OwnedParameter] = [parameter for domain in domains for parameter in domain.owned]
        # What Megatron reads of a torch optimizer: groups of masters, and their state.
        for number, group in enumerate(param_groups):
            group["params"] = [owned.master for owned in self.owned if owned.group == number]
        shards = torch.optim.Optimizer(param_groups, {})
        self._memory = {part.master: PartState(part) for domain in domains for part in domain.engine.parts}
        shards.state.update(self._memory)
        super().__init__(shards, config)
        self.is_stub_optimizer, self.steps = False, 0
        self.grad_scaler = _grad_scaler(config)
        self._device = members[0].param.device if members else torch.device(torch.cuda.current_device())
        self._versions = self._parameter_versions()

    # ---- one step --------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients outside the DDP buffers, which `model_chunk.zero_grad_buffer()` zeroes."""
        for tensor in (*(member.param for member in self.members), *(owned.master for owned in self.owned)):
            tensor.grad = None

    def get_loss_scale(self) -> Tensor:
        """The loss scale, a tensor of size 1; 1 without a scaler."""
        return torch.ones(1, device=self._device) if self.grad_scaler is None else self.grad_scaler.scale

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Take and unscale the reduced gradients; whether any rank of the world found an inf or nan."""
        self._check_present()
        for domain in self.domains:
            domain.take_gradients()
        found = torch.zeros(1, device=self._device)
        inverse = torch.ones(1, device=self._device) if self.grad_scaler is None else self.grad_scaler.inv_scale
        if self.owned:
            grads = [owned.master.grad for owned in self.owned]
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found, inverse)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.get_grad_stats_parallel_group())
        nonfinite = bool(found.item() > 0)
        if self.grad_scaler is not None:
            self.grad_scaler.update(nonfinite)
        return nonfinite

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Step, then gather the parameters, unless DDP's forward hooks will (overlap_param_gather)."""
        self._adopt_outside_writes()
        for domain in self.domains:
            domain.engine.param_groups = self.param_groups
            domain.engine.step()
            domain.publish()
            domain.engine.close()
        self.steps += 1
        if not self.ddp_config.overlap_param_gather:
            for chunk in self.model_chunks:
                chunk.start_param_sync()
        return True

    def step(self) -> tuple[bool, float | None, float | None]:
        """(success, gradient norm, zeros in gradients) of one whole step; (False, None, None) on inf or nan."""
        return ChainedOptimizer([self]).step()

    def nonfinite(self) -> list[str]:
        """Names of the parameters whose gradient had an inf or nan in the last step; collective over the world."""
        mine = [name for domain in self.domains for name in domain.engine.nonfinite()]
        return list(dict.fromkeys(name for names in Collectives(None).gather_objects(mine) for name in names))

    def step_report(self) -> dict[str, Any]:
        """What the last step did, as `DistributedMuon.step_report` has it; collective over each domain."""
        return step_report([domain.engine for domain in self.domains], steps=self.steps)

    def explain(self) -> str:
        """Where every parameter went and why, and the plan of each domain."""
        rows = []
        for member in self.members:
            matrices = ", ".join(f"{m.rows} x {m.cols}" for m in member.spec.matrices())
            rows.append(f"{member.name}  {tuple(member.param.shape)}  {matrices or 'adamw'}  ({member.reason})")
        return "\n".join([*rows, *(domain.engine.plan.explain() for domain in self.domains)])

    # ---- parameters and checkpoints ----------------------------------------------------------------------

    @torch.no_grad()
    def reload_model_params(self, state_dict: Mapping[str, Any] | None = None) -> None:
        """Take the masters anew from the model's parameters, or in full precision from a state dict of the model.

        Args:
            state_dict: {"model": ...}, {"model0": ..., ...}, or the model's state dict itself.
        """
        values: dict[Tensor, Any] = {}
        for index, chunk in enumerate(self.model_chunks if state_dict is not None else ()):
            inner = state_dict.get(f"model{index}", state_dict.get("model", state_dict))
            given = {unwrapped(name): value for name, value in inner.items()}
            values |= {param: given.get(unwrapped(name)) for name, param in chunk.named_parameters()}
        for owned in self.owned:
            if state_dict is None:
                owned.master.copy_(owned.values)
            elif values[owned.param] is None:
                raise ValueError(f"the state dict has no parameter {owned.name!r}: pass the whole model's")
            else:
                owned.master.copy_(values[owned.param].reshape(-1)[owned.start : owned.stop])

    def _adopt_outside_writes(self) -> None:
        """Let masters follow parameters that others wrote since the last step, such as a loaded model."""
        versions = self._parameter_versions()
        for part in {owned.part for owned in self.owned if versions[owned.param] != self._versions[owned.param]}:
            part.adopt()
        self._versions = versions

    def _parameter_versions(self) -> dict[Tensor, int]:
        return {member.param: member.param._version for member in self.members}

    @property
    def data_parallel_group(self) -> dist.ProcessGroup:
        """The group that cuts this rank's dense parameters, or its experts where it has no others."""
        return self.domains[0].ranks.data_parallel

    def offload_to_cpu(self) -> None:
        """Move moments, and masters that are copies, to the CPU until `restore_from_cpu()`; no step in between."""
        for state in self._memory.values():
            state.offload()

    def restore_from_cpu(self) -> None:
        """Bring back what `offload_to_cpu()` took, bit by bit."""
        for state in self._memory.values():
            state.restore()

    def _check_present(self) -> None:
        if any(state.away for state in self._memory.values()):
            raise RuntimeError(
                "the optimizer's state is offloaded: call restore_from_cpu() before a step or a checkpoint"
            )

    @torch.no_grad()
    def checkpoint_view(self) -> CheckpointView:
        """What `checkpoint.save` and `load` work on; collective over the world."""
        self._check_present()
        self._adopt_outside_writes()
        world = Collectives(None)
        tied = [m for m in self.members if getattr(m.param, "shared_embedding", False)]
        originals = world.gather_objects([m.name for m in tied if not getattr(m.param, "shared", False)])
        original = next((name for names in originals for name in names), "")
        copies = {m.name: original for m in tied if getattr(m.param, "shared", False)}

        def restored(steps: int) -> None:
            self.steps = steps
            for domain in self.domains:
                domain.publish()
            for chunk in self.model_chunks:
                chunk.start_param_sync(force_sync=True)
            self._versions = self._parameter_versions()

        engines = [domain.engine for domain in self.domains]
        return CheckpointView("megatron", engines, world, self.param_groups, self.steps, restored, copies)

    def _common_state(self) -> dict[str, Any]:
        """What is equal on every rank: groups, step and loss scale."""
        state: dict[str, Any] = {
            "distributed_muon": 1,
            "param_groups": [_options_of(group) for group in self.param_groups],
            "step": self.steps,
        }
        if self.grad_scaler is not None:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        """This rank's whole state, for this rank of as many; tensors are references to live state.

        `sharded_state_dict` is what loads under any parallelism.

        Args:
            is_loading: accepted for Megatron's sake; nothing has to be allocated first.
        """
        self._check_present()
        place = (dist.get_rank(), dist.get_world_size())
        return {**self._common_state(), "place": place, "state": checkpoint.export_own(self.owned)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` or `sharded_state_dict` saved; no collective.

        A group's options are the checkpoint's, as with Megatron's optimizers; what of this run's gives way is printed.

        Raises:
            ValueError: the state has no tensors, or belongs to another rank or to other parameters.
        """
        self._check_present()
        if self.take_over is not None:
            said = self.take_state(state_dict["param_state"], state_dict)
            if dist.get_rank() == 0:
                print(said, flush=True)
            return
        if "param_state" in state_dict:
            checkpoint.import_shards(self.owned, state_dict["param_state"], state_dict["step"])
        elif "state" in state_dict and "place" in state_dict:
            checkpoint.import_own(self.owned, state_dict, (dist.get_rank(), dist.get_world_size()))
        elif self.owned:
            raise ValueError("the state dict has no tensors of distributed_muon: save with --ckpt-format torch_dist")
        said = checkpoint.import_groups(self.param_groups, state_dict["param_groups"])
        if dist.get_rank() == 0 and said:
            print("\n".join(said), flush=True)
        if self.grad_scaler is not None and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.steps = state_dict["step"]
        for domain in self.domains:
            domain.publish()

    @torch.no_grad()
    def take_state(self, tensors: Mapping[str, Any], common: Any) -> str:
        """Import what `take_over` had; what was kept, in a line."""
        self.steps, told = checkpoint.import_foreign(self.owned, tensors, common)
        for domain in self.domains:
            domain.publish()
        path, self.take_over = self.take_over, None
        return f"kept from {path}: {told}"

    def sharded_state_dict(
        self, model_sharded_state_dict: Mapping[str, Any], is_loading: bool = False, metadata: Any = None, **_: Any
    ) -> dict[str, Any]:
        """State for `dist_checkpointing`, that loads at any TP x PP x EP x DP; collective when saving.

        Args:
            model_sharded_state_dict: of the model chunks; its keys and offsets are taken over.
            is_loading: request what to load, without data.
            metadata: Megatron's; the one format serves every "distrib_optim_sharding_type" of torch_dist.

        Raises:
            ValueError: metadata of another checkpoint format, or a parameter that the model's state lacks.
        """
        self._check_present()
        if (metadata or {}).get("distrib_optim_sharding_type") == "fsdp_dtensor":
            raise ValueError("the optimizer has no fsdp_dtensor checkpoint: use --ckpt-format torch_dist")
        tensors = {}
        for domain in self.domains:
            tensors |= checkpoint.export_shards(domain, model_sharded_state_dict, is_loading)
        if is_loading and self.take_over is not None:
            return {"param_state": checkpoint.foreign_request(self.take_over, tensors)}
        return {**self._common_state(), "param_state": tensors}

    def save_parameter_state(self, filename: str) -> None:
        """Refused: it writes Megatron's old format, bound to the number of ranks."""
        raise ValueError("the optimizer has no torch-format checkpoint: use --ckpt-format torch_dist")

    def load_parameter_state(self, filename: str, *, update_legacy_format: bool = False) -> None:
        """Refused likewise."""
        self.save_parameter_state(filename)


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
