"""Muon and AdamW as the inner optimizer of DeepSpeed's ZeRO stages 1, 2 and 3.

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=PartitionedOptimizer(muon_param_groups(model), lr=4e-4),
        config={"zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 1}, ...},
    )

DeepSpeed keeps gradient reduction, accumulation, loss scale, clipping, fp32 masters, the parameter
all-gather and the checkpoint files, and nothing of it is patched. `deepspeed.initialize` replaces the
parameters of every group by one flat fp32 tensor, this rank's 1/W of the group, or in stage 3 by one per
sub-group. Names, shapes and matrix rules are therefore taken at construction; where the parameters lie in
these tensors is read afterwards (`deepspeed_partition`). With offload_optimizer, the flat tensors and all
state are on the host, and what travels to a matrix's home passes through the accelerator wave by wave.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distributed_muon.checkpoint.view import CheckpointView
from distributed_muon.engine.options import Options, check_choice, parameter_names, tensor_spec
from distributed_muon.engine.report import step_report
from distributed_muon.engine.state import Member, Part
from distributed_muon.engine.step import ShardedStep
from distributed_muon.integrations.deepspeed_config import CONFIG_BLOCK, check_config, read_block
from distributed_muon.integrations.deepspeed_partition import (
    INDEX,
    Partition,
    arrange_groups,
    checkpoint_view,
    read_moments,
    read_partitions,
    refuse_fp16_autocast,
    refuse_parameters,
)
from distributed_muon.layout.plan import Plan
from distributed_muon.param_groups import muon_param_groups, whole_shape

__all__ = ["CONFIG_BLOCK", "PartitionedOptimizer", "check_config", "optimizer_from_config"]


class PartitionedOptimizer(torch.optim.Optimizer):
    """Muon with one home per matrix, and AdamW, on the flat partitions of DeepSpeed's ZeRO stages.

    Pass it to `deepspeed.initialize(optimizer=...)` with "zero_allow_untested_optimizer": true. Each state is
    one flat fp32 tensor per partition: "exp_avg", the momentum (an exponential moving average), and "exp_avg_sq",
    for Muon groups a single zero seen through a stride of 0, since DeepSpeed's checkpoint converters want
    Adam's keys in every group. `step` is collective over the data-parallel group, as is `step_report`.

    Args:
        params: groups of `muon_param_groups(model)`, made before `deepspeed.initialize`, also under `zero.Init`.
        lr: learning rate, of Muon and AdamW groups.
        missing_gradients: what becomes of a parameter that no rank's backward reached since the last step, since it
            was not used or is frozen, and for which DeepSpeed hands in zeros (its last gradient in stage 3). "skip":
            nothing, as torch does where p.grad is None; "zero", in stages 1 and 2: a step from these zeros, as
            DeepSpeed's own optimizers take it, in which a matrix goes on moving at full size.
        options: every other option of `engine.options.Options`.

    Raises:
        ValueError: an option or parameter that cannot be right, or a DeepSpeed option that is not supported;
            the message names it.
    """

    # The name must not contain "muon": DeepSpeed orthogonalizes the gradients of an optimizer called so.

    def __init__(
        self, params: Iterable[Any], lr: float = Options.lr, *, missing_gradients: str = "skip", **options: Any
    ) -> None:
        self._options = Options.of({"lr": lr, **options})
        check_choice("missing_gradients", missing_gradients, ("skip", "zero"))
        self._sealed = False
        groups = self._options.complete(arrange_groups(params))
        # "missed": AdamW parameters whose counter is behind the group's, and by how many steps.
        own = [{**group, "step": 0, "missed": {}, INDEX: index} for index, group in enumerate(groups)]
        super().__init__(own, {})
        self.defaults["betas"] = self._options.betas  # without it DeepSpeed's OneCycle leaves momentum alone
        self._groups = list(self.param_groups)  # DeepSpeed's step() shows one at a time in param_groups
        self._members = [
            [
                Member(tensor_spec(name, param, group, whole_shape(param)), param, group[INDEX])
                for name, param in zip(names, group["params"], strict=True)
            ]
            for names, group in zip(parameter_names(self._groups), self._groups, strict=True)
        ]
        refuse_parameters(self._members)
        self._given = [{key: value for key, value in group.items() if key != "params"} for group in self._groups]
        self._partitions: dict[Tensor, Partition] = {}
        # Parameters that a backward reached since their last step; None if that does not matter.
        self._reached: set[Tensor] | None = set() if missing_gradients == "skip" else None
        for member in chain.from_iterable(self._members) if self._reached is not None else ():
            member.param.register_post_accumulate_grad_hook(self._reached.add)
        self._adopted = False
        self._sealed = True

    # ---- one step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the groups in `param_groups`, with reduced, unscaled and clipped gradients in the flat `.grad`.

        DeepSpeed calls it, for one group at a time or for all; collective over the data-parallel group.

        Raises:
            ValueError: the groups are not partitioned, or in a way that is not supported.
            RuntimeError: ranks disagree about names, shapes, places or options.
        """
        if closure is not None:
            raise ValueError("closure: DeepSpeed computes the gradients before step(), call engine.backward(loss)")
        # DeepSpeed shows one group at a time and would leave it at that after an error: a checkpoint saved then
        # would hold that group only.
        shown, self.param_groups = self.param_groups, self._groups
        self._restore_groups()
        partitions = self._attach()
        for partition in partitions.values():
            if partition.engine is None:
                self._start(partition)
        if self._adopted:
            self._check_masters()
        for flat in [flat for group in shown for flat in group["params"]]:
            self._step(partitions[flat])

    def _step(self, partition: Partition) -> None:
        group, part = self._groups[partition.group], partition.part
        self._point(partition)
        engine = partition.engine
        active = self._active(partition)
        engine.step(active)
        part.grad = None  # DeepSpeed frees it: so must every view
        engine.release_gradients()
        if group["algorithm"] == "adamw":
            for name in (p.name for p, stepped in zip(engine.parameters, active, strict=True) if not stepped):
                group["missed"][name] = group["missed"].get(name, 0) + 1
        partition.steps = group["step"] + 1
        group["step"] += partition.last
        if partition.spent is not None:
            # DeepSpeed overwrites the gradients that the next backward reaches, and would count the others in its
            # norm again, or add to them from the second microbatch on.
            partition.spent.zero_()

    def _active(self, partition: Partition) -> list[bool]:
        """Per parameter, whether any rank's backward reached it; collective over the partition's ranks."""
        params = [member.param for member in partition.members]
        if self._reached is None:
            return [True] * len(params)
        reached = torch.tensor([float(param in self._reached) for param in params]).to(partition.engine.device)
        self._reached.difference_update(params)
        return [count > 0 for count in partition.collectives.all_reduce(reached).tolist()]

    def _attach(self) -> dict[Tensor, Partition]:
        """Read the partitions from the groups and the places of the parameters, once; no collective."""
        if not self._partitions:
            refuse_parameters(self._members)
            if self._holds_model_parameters():
                raise ValueError(
                    "parameters are not partitioned, as in ZeRO stage 0: set zero_optimization.stage to 1 in the "
                    "DeepSpeed config, which gives the same training with less memory"
                )
            refuse_fp16_autocast()
            found = read_partitions(self._groups, self._members)
            if self._reached is None and not all(partition.whole for partition in found):
                raise ValueError(
                    'missing_gradients="zero" under ZeRO stage 3: DeepSpeed hands in the last gradient again, '
                    'not zeros; leave it at "skip"'
                )
            self._partitions = {partition.flat: partition for partition in found}
            for partition in found:
                self._moments(partition)
        return self._partitions

    def _start(self, partition: Partition) -> None:
        """Agree on the view of a partition and plan it; collective over its ranks."""
        from deepspeed.accelerator import get_accelerator

        device = torch.device(get_accelerator().current_device_name())
        partition.engine = ShardedStep(
            partition.members, self._groups, self._options, partition.collectives, device, also=[partition.place]
        )
        partition.part = Part(partition.own, partition.offsets, partition.flat.detach(), moments=self._bind(partition))
        partition.engine.attach(partition.shards, [partition.part] if partition.own else [])

    def _point(self, partition: Partition) -> None:
        """The engine on the memory that DeepSpeed uses now, which loading a checkpoint may have replaced."""
        engine, part = partition.engine, partition.part
        master, moments = partition.flat.detach(), self._bind(partition)
        group = self._groups[partition.group]
        steps, missed = group["step"], group["missed"]
        if group["algorithm"] == "muon" and "betas" in group:  # OneCycle's way to set momentum
            group["momentum"] = group["betas"][0]
        part.grad = partition.flat.grad
        places = [t.data_ptr() for t in (master, *moments.values())]
        if places != [t.data_ptr() for t in (part.master, *part.moments.values())] or steps != partition.steps:
            part.master, part.moments = master, moments
            for p in engine.parameters:
                if "step" in p.state:
                    p.state["step"].fill_(steps - missed.get(p.name, 0))
            engine.rebind()

    def _bind(self, partition: Partition) -> dict[str, Tensor]:
        """The engine's names for a partition's moments."""
        state = self._moments(partition)
        if self._groups[partition.group]["algorithm"] == "muon":
            return {"momentum_buffer": state["exp_avg"]}
        return {key: state[key] for key in ("exp_avg", "exp_avg_sq")}

    def _check_masters(self) -> None:
        """Refuse a foreign checkpoint that DeepSpeed loaded into other places; collective over the ranks."""
        behind = 0.0
        for partition in self._partitions.values():
            mine = torch.tensor([float(not partition.follows())], device=partition.flat.device)
            behind += partition.collectives.all_reduce(mine, counted=False).item()
        if behind:
            raise ValueError(
                "the loaded masters are not those of the model's parameters: DeepSpeed's Muon had other groups or "
                "another order in the earlier run; pass the same with muon_param_groups(overrides=...)"
            )
        self._adopted = False

    @property
    def plans(self) -> dict[int, Plan]:
        """The plan of every Muon group, or of its sub-groups, by number; empty before the first step."""
        engines = [partition.engine for partition in self._partitions.values()]
        return {number: engine.plan for number, engine in enumerate(engines) if engine and engine.plan.homes}

    def step_report(self) -> dict[str, Any]:
        """What happened since the last report, as `DistributedMuon.step_report` has it; collective over the ranks.

        Of "bytes" and "communication", DeepSpeed's own traffic is not counted.
        """
        engines = [partition.engine for partition in self._partitions.values() if partition.engine is not None]
        for engine in engines:
            engine.close()
        return step_report(engines)

    # ---- state ---------------------------------------------------------------------------------------

    def _moments(self, partition: Partition) -> dict[str, Tensor]:
        """The partition's state, complete: DeepSpeed's loaders of universal and elastic checkpoints write into it."""
        flat, group = partition.flat, self._groups[partition.group]
        state = self.state[flat]
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state and (key, group["algorithm"]) != ("exp_avg_sq", "muon"):
                state[key] = torch.zeros_like(flat, requires_grad=False)
        if group["algorithm"] == "muon":
            second = state.get("exp_avg_sq")
            if second is None or second.untyped_storage().nbytes() > second.element_size():
                if second is not None and second.any():
                    raise ValueError(
                        f"the loaded state of parameter group {partition.group} is Adam's, whose average cannot serve "
                        "as Muon's momentum: load with load_optimizer_states=False"
                    )
                state["exp_avg_sq"] = flat.new_zeros(1).expand_as(flat)
        return state

    def state_dict(self) -> dict[str, Any]:
        """This rank's state as DeepSpeed saves it; no collective, no step."""
        if self._holds_model_parameters():
            return super().state_dict()
        self._attach()
        self._restore_groups()
        out, step = super().state_dict(), self._groups[0]["step"]
        # The loader of stage 3's universal checkpoints looks for it here.
        return {**out, "state": {key: {**state, "step": step} for key, state in out["state"].items()}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict()` returned on the same rank of as many ranks; no collective.

        Takes the state of DeepSpeed's own Muon as well, if its groups hold the same parameters: the moments
        are kept, the options stay this optimizer's.

        Raises:
            ValueError: the state belongs to other groups, or to another optimizer; nothing was changed.
        """
        partitions, loaded = self._attach(), []
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) != len(self._groups):
            raise ValueError(
                f"the checkpoint has {len(saved_groups)} parameter groups, this optimizer {len(self._groups)}: build "
                "the groups of the earlier run"
            )
        pairs = list(zip(self._groups, saved_groups, strict=True))
        for group, saved in pairs:
            if len(group["params"]) != len(saved["params"]):
                raise ValueError(
                    f"parameter group {group[INDEX]} was cut into {len(saved['params'])} sub-groups when it was saved, "
                    f"now into {len(group['params'])}: keep zero_optimization.sub_group_size"
                )
            for flat, key in zip(group["params"], saved["params"], strict=True):
                state = state_dict["state"].get(key, {})
                loaded.append((partitions[flat], read_moments(group, saved, state, partitions[flat])))
        for partition, moments in loaded:
            for key, value in moments.items():
                self._moments(partition)[key].copy_(value)
        for group, saved in pairs:
            if "algorithm" in saved:
                group.update({key: value for key, value in saved.items() if key != "params"})
            else:
                state = state_dict["state"].get(saved["params"][0], {})
                group["step"] = int(state.get("step", saved.get("step", 0)))
                self._adopted = True

    @torch.no_grad()
    def checkpoint_view(self) -> CheckpointView:
        """What `checkpoint.save` and `load` work on; collective where no step was taken yet."""
        if self._holds_model_parameters():
            raise ValueError(
                "parameters are not partitioned: call deepspeed.initialize with ZeRO stage 1, 2 or 3 first"
            )
        self._restore_groups()
        partitions = list(self._attach().values())
        for partition in partitions:
            if partition.engine is None:
                self._start(partition)
            self._point(partition)
        self._adopted = False
        return checkpoint_view(partitions, self._groups)

    def _restore_groups(self) -> None:
        """Undo what DeepSpeed's loader of stage 3's universal checkpoints does: group 0's options in every group.

        The step is the loaded one, and so is the learning rate, in the proportion of the groups.
        """
        for group, given in zip(self._groups, self._given, strict=True):
            if group[INDEX] != given[INDEX]:
                ratio = given["lr"] / self._given[0]["lr"] if self._given[0]["lr"] else 1.0
                loaded = {"params": group["params"], "step": group["step"], "lr": group["lr"] * ratio}
                group.clear()
                group.update({**given, **loaded, "missed": {}})

    def _holds_model_parameters(self) -> bool:
        """Whether no ZeRO stage has replaced the parameters of the groups (yet)."""
        own = {id(member.param) for members in self._members for member in members}
        return any(id(param) in own for group in self._groups for param in group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor adds groups: DeepSpeed partitions them once."""
        if getattr(self, "_sealed", False):
            raise RuntimeError("add_param_group() after construction: the partitions are fixed; build a new optimizer")
        super().add_param_group(param_group)


def optimizer_from_config(model: nn.Module, config: Any) -> PartitionedOptimizer:
    """The optimizer that the block "distributed_muon" of a DeepSpeed config describes.

    For trainers that call `deepspeed.initialize` themselves: give them the same config and this optimizer.

    Args:
        model: the model, before `deepspeed.initialize`.
        config: DeepSpeed's config, as a mapping, a JSON file, or Hugging Face's TrainingArguments that hold it. The
            block holds arguments of `PartitionedOptimizer`, and under "groups" those of `muon_param_groups`; "auto"
            is filled in from TrainingArguments, in place.

    Raises:
        ValueError: the block is missing, or the config asks for something that is not supported.
    """
    arguments = config if hasattr(config, "hf_deepspeed_config") else None
    if arguments is not None:
        config = arguments.hf_deepspeed_config.config
    elif not isinstance(config, Mapping):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    check_config(config)
    options, groups = read_block(config, arguments)
    return PartitionedOptimizer(muon_param_groups(model, **groups), **options)
