"""Muon and AdamW as the inner optimizer of DeepSpeed's ZeRO stages 1 and 2.

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=PartitionedOptimizer(muon_param_groups(model), lr=4e-4),
        config={"zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 1}, ...},
    )

DeepSpeed keeps gradient reduction, accumulation, loss scale, clipping, fp32 masters, the parameter
all-gather and the checkpoint files, and nothing of it is patched. `deepspeed.initialize` replaces the
parameters of every group by one flat fp32 tensor, this rank's 1/W of the group; model parameters become
views of the group's whole flat buffer. Names, shapes and matrix rules are therefore taken at construction,
and the layout is read from where the parameters lie in that buffer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distributed_muon.engine.agreement import check_same_everywhere
from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.diagnostics import merge_measured
from distributed_muon.engine.options import check_group, check_newton_schulz, describe, tensor_specs
from distributed_muon.engine.sharded_muon import ShardedMuon
from distributed_muon.engine.timing import StepTimer
from distributed_muon.engine.update import adamw_update
from distributed_muon.integrations.deepspeed_partition import (
    INDEX,
    Partition,
    arrange_groups,
    make_partition,
    read_moments,
    refuse_fp16_autocast,
    refuse_parameters,
)
from distributed_muon.layout.cost_model import NewtonSchulzCost, hardware_of
from distributed_muon.layout.matrices import TensorSpec
from distributed_muon.layout.pieces import Layout
from distributed_muon.layout.plan import Plan, make_plan
from distributed_muon.param_groups import muon_param_groups

CONFIG_BLOCK = "distributed_muon"


class PartitionedOptimizer(torch.optim.Optimizer):
    """Muon with one home per matrix, and AdamW, on the flat partitions of DeepSpeed's ZeRO stages 1 and 2.

    Pass it to `deepspeed.initialize(optimizer=...)` with "zero_allow_untested_optimizer": true. Each state is
    one flat fp32 tensor per group: "exp_avg", the momentum (an exponential moving average), and "exp_avg_sq",
    for Muon groups a single zero seen through a stride of 0, since DeepSpeed's checkpoint converters want
    Adam's keys in every group. `step` is collective over the data-parallel group, as is `step_report`.

    Args:
        params: groups of `muon_param_groups(model)`, made before `deepspeed.initialize`.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn, adamw_betas,
            adamw_eps, ns_form, ns_dtype, strategy: as `DistributedMuon`.

    Raises:
        ValueError: an option or parameter that cannot be right, or a DeepSpeed option that is not supported;
            the message names it.
    """

    # The name must not contain "muon": DeepSpeed orthogonalizes the gradients of an optimizer called so.

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
        strategy: str = "auto",
    ) -> None:
        check_newton_schulz(ns_form, ns_dtype, strategy)
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
            "step": 0,
        }
        self._sealed = False
        super().__init__(arrange_groups(params), defaults)
        self._members: list[tuple[str, nn.Parameter, int]] = []
        for index, group in enumerate(self.param_groups):
            check_group(index, group)
            group[INDEX] = index
            names = group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))]
            self._members += [(n, p, index) for n, p in zip(names, group["params"], strict=True)]
        refuse_parameters(self._members)
        tensor_specs(self._members, self.param_groups)
        self._groups = list(self.param_groups)  # DeepSpeed's step() shows one at a time in param_groups
        self._options = (ns_form, ns_dtype, strategy)
        self._timer = StepTimer(torch.device("cpu"))
        self._partitions: list[Partition] | None = None
        self._muon: dict[int, ShardedMuon] | None = None
        self._adopted = False
        self._sealed = True

    # ---- one step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the groups in `param_groups`, with reduced, unscaled and clipped gradients in the flat `.grad`.

        DeepSpeed calls it, for one group at a time or for all; collective over the data-parallel group.

        Raises:
            ValueError: the groups are not partitioned as ZeRO-1 and 2 do, or in a way that is not supported.
            RuntimeError: ranks disagree about names, shapes, places or options.
        """
        if closure is not None:
            raise ValueError("closure: DeepSpeed computes the gradients before step(), call engine.backward(loss)")
        # DeepSpeed shows one group at a time and would leave it at that after an error: a checkpoint saved then
        # would hold that group only.
        shown, self.param_groups = self.param_groups, self._groups
        partitions = self._attach()
        if self._muon is None:
            self._muon = self._plan(partitions)
        if self._adopted:
            self._check_masters(partitions)
        for group in shown:
            index, (flat,) = group[INDEX], group["params"]
            state, grad = self._moments(group), flat.grad
            group["step"] += 1
            if group["algorithm"] == "muon":
                muon, part = self._muon[index], partitions[index]
                muon.masters, muon.momenta = part.views(flat), part.views(state["exp_avg"])
                count = len(part.specs)
                muon.step(part.views(grad), [group] * count, [True] * count)
                continue
            with self._timer("adamw"):
                adamw_update(
                    [flat],
                    [grad],
                    [state["exp_avg"]],
                    [state["exp_avg_sq"]],
                    [torch.tensor(group["step"] - 1.0)],
                    lr=float(group["lr"]),
                    betas=tuple(group["adamw_betas"]),
                    eps=group["adamw_eps"],
                    weight_decay=group["weight_decay"],
                )
        return None

    def _attach(self) -> list[Partition]:
        """Read the partitions from the groups and the places of the parameters, once; no collective."""
        if self._partitions is None:
            refuse_parameters(self._members)
            if self._holds_model_parameters():
                raise ValueError(
                    "parameters are not partitioned, as in ZeRO stage 0: set zero_optimization.stage to 1 or 2 in the "
                    "DeepSpeed config, which gives the same training with less memory"
                )
            refuse_fp16_autocast()
            specs = tensor_specs(self._members, self._groups)
            by_group: dict[int, tuple[list[TensorSpec], list[nn.Parameter]]] = {}
            for (_, param, index), spec in zip(self._members, specs, strict=True):
                pair = by_group.setdefault(index, ([], []))
                pair[0].append(spec)
                pair[1].append(param)
            shared: dict[Any, Collectives] = {}
            self._partitions = [make_partition(group, *by_group[group[INDEX]], shared) for group in self._groups]
            self._timer = StepTimer(self._members[0][1].device)
            for group in self._groups:
                self._moments(group)
        return self._partitions

    def _plan(self, partitions: list[Partition]) -> dict[int, ShardedMuon]:
        """Agree on the view of every group and plan the Muon groups; collective over the data-parallel group."""
        ns_form, ns_dtype, strategy = self._options
        device = self._members[0][1].device
        for collectives in {id(part.collectives): part.collectives for part in partitions}.values():
            indices = [i for i, part in enumerate(partitions) if part.collectives is collectives]
            members = [member for member in self._members if member[2] in indices]
            places = [f"group {i} lies at {partitions[i].bucket}" for i in indices]
            check_same_everywhere(collectives, describe(self._options, members, self._groups) + places)
            collectives.warm_up(device)
        out = {}
        for index, (group, part) in enumerate(zip(self._groups, partitions, strict=True)):
            if group["algorithm"] == "muon":
                newton_schulz = NewtonSchulzCost(group["ns_steps"], ns_form, ns_dtype.itemsize)
                planning = {"teams": ns_form == "auto", "hardware": hardware_of(device.type)}
                plan = make_plan(Layout.build(part.specs, part.shards), strategy, newton_schulz, **planning)
                options = {"device": device, "ns_dtype": ns_dtype, "ns_form": ns_form, "timer": self._timer}
                out[index] = ShardedMuon(plan, part.collectives, [], [], **options)
        return out

    def _check_masters(self, partitions: list[Partition]) -> None:
        """Refuse a foreign checkpoint that DeepSpeed loaded into other places; collective over the ranks."""
        behind = torch.zeros(1, device=self._members[0][1].device)
        for group, part in zip(self._groups, partitions, strict=True):
            behind += not part.follows(group["params"][0])
        for collectives in {id(part.collectives): part.collectives for part in partitions}.values():
            collectives.all_reduce(behind, counted=False)
        if behind.item():
            raise ValueError(
                "the loaded masters are not those of the model's parameters: DeepSpeed's Muon had other groups or "
                "another order in the earlier run; pass the same with muon_param_groups(overrides=...)"
            )
        self._adopted = False

    @property
    def plans(self) -> dict[int, Plan]:
        """The plan of every Muon group, by number of the group; empty before the first step."""
        return {index: muon.plan for index, muon in (self._muon or {}).items()}

    def step_report(self) -> dict[str, Any]:
        """What happened since the last report; collective over the data-parallel group.

        Returns:
            "ns_calls" (matrices this rank orthogonalized), "bytes" (sent by this rank for Muon's exchange, by
            collective; DeepSpeed's own traffic is not counted), "seconds" (by phase, on this rank),
            "communication" (of the exchange, as `DistributedMuon.step_report` has it) and "update_rms" of the
            last step's updates at lr 1, by matrix name.
        """
        times = self._timer.take()
        report: dict[str, Any] = {"ns_calls": 0, "bytes": Counter(), "update_rms": {}}
        report |= {"seconds": times.seconds(), "communication": times.communication()}
        for index, muon in (self._muon or {}).items():
            collectives = (self._partitions or [])[index].collectives
            report["ns_calls"] += muon.ns_calls
            report["bytes"] += collectives.sent_bytes
            muon.ns_calls = 0
            collectives.sent_bytes.clear()
            device = self._members[0][1].device
            report["update_rms"] |= merge_measured(collectives, muon.plan, muon.measured, device)["update_rms"]
        return {**report, "bytes": dict(report["bytes"])}

    # ---- state ---------------------------------------------------------------------------------------

    def _moments(self, group: dict[str, Any]) -> dict[str, Tensor]:
        """The group's state, complete: DeepSpeed's loaders of universal and elastic checkpoints write into it."""
        (flat,) = group["params"]
        state = self.state[flat]
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state and (key, group["algorithm"]) != ("exp_avg_sq", "muon"):
                state[key] = torch.zeros_like(flat, requires_grad=False)
        if group["algorithm"] == "muon":
            second = state.get("exp_avg_sq")
            if second is None or second.untyped_storage().nbytes() > second.element_size():
                if second is not None and second.any():
                    raise ValueError(
                        f"the loaded state of parameter group {group[INDEX]} is Adam's, whose average cannot serve as "
                        "Muon's momentum: load with load_optimizer_states=False"
                    )
                state["exp_avg_sq"] = flat.new_zeros(1).expand_as(flat)
        return state

    def state_dict(self) -> dict[str, Any]:
        """This rank's state as DeepSpeed saves it; no collective, no step."""
        if not self._holds_model_parameters():
            self._attach()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict()` returned on the same rank of as many ranks; no collective.

        Takes the state of DeepSpeed's own Muon as well, if its groups hold the same parameters: the moments
        are kept, the options stay this optimizer's.

        Raises:
            ValueError: the state belongs to other groups, or to another optimizer; nothing was changed.
        """
        partitions, loaded = self._attach(), []
        if len(state_dict["param_groups"]) != len(self._groups):
            raise ValueError(
                f"the checkpoint has {len(state_dict['param_groups'])} parameter groups, this optimizer "
                f"{len(self._groups)}: build the groups of the earlier run"
            )
        for group, saved, part in zip(self._groups, state_dict["param_groups"], partitions, strict=True):
            moments = state_dict["state"].get(saved["params"][0], {})
            loaded.append(read_moments(group, saved, moments, part))
        for group, saved, moments in zip(self._groups, state_dict["param_groups"], loaded, strict=True):
            state = self._moments(group)
            for key, value in moments.items():
                state[key].copy_(value)
            if "algorithm" in saved:
                group.update({key: value for key, value in saved.items() if key != "params"})
            else:
                step = state_dict["state"].get(saved["params"][0], {}).get("step", saved.get("step", 0))
                group["step"] = int(step)
                self._adopted = True

    def _holds_model_parameters(self) -> bool:
        """Whether no ZeRO stage has replaced the parameters of the groups (yet)."""
        own = {id(param) for _, param, _ in self._members}
        return any(id(param) in own for group in self._groups for param in group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor adds groups: DeepSpeed partitions them once."""
        if getattr(self, "_sealed", False):
            raise RuntimeError("add_param_group() after construction: the partitions are fixed; build a new optimizer")
        super().add_param_group(param_group)


def optimizer_from_config(model: nn.Module, config: Mapping[str, Any] | str | Path) -> PartitionedOptimizer:
    """The optimizer that the block "distributed_muon" of a DeepSpeed config describes.

    For trainers that call `deepspeed.initialize` themselves: give them the same config and this optimizer.

    Args:
        model: the model, before `deepspeed.initialize`.
        config: DeepSpeed's config, as a mapping or a JSON file. The block holds arguments of
            `PartitionedOptimizer`, and under "groups" those of `muon_param_groups`.

    Raises:
        ValueError: the block is missing, or the config asks for something that is not supported.
    """
    if not isinstance(config, Mapping):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    check_config(config)
    if CONFIG_BLOCK not in config:
        raise ValueError(f'{CONFIG_BLOCK}: the DeepSpeed config has no such block; add "{CONFIG_BLOCK}": {{"lr": ...}}')
    options = dict(config[CONFIG_BLOCK])
    groups = muon_param_groups(model, **options.pop("groups", {}))
    if "ns_dtype" in options:
        options["ns_dtype"] = getattr(torch, options["ns_dtype"], options["ns_dtype"])
    return PartitionedOptimizer(groups, **options)


def check_config(config: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first option of a DeepSpeed config that `PartitionedOptimizer` refuses."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (1, 2):
        reason = {
            0: "without partitions there is nothing to save: stage 1 gives the same training with less memory",
            3: "it cuts every parameter over the ranks, which is not supported",
        }.get(stage, "it is unknown")
        raise ValueError(f"zero_optimization.stage={stage}: {reason}; set it to 1 or 2")
    for option in ("offload_optimizer", "offload_param"):
        if (zero.get(option) or {}).get("device", "none") != "none":
            raise ValueError(f"zero_optimization.{option}: states stay on the device of the model; remove the option")
    if zero.get("zenflow"):
        raise ValueError("zero_optimization.zenflow is not supported: remove the option")
    if (config.get("tensor_parallel") or {}).get("autotp_size", 0) > 1:
        raise ValueError("tensor_parallel.autotp_size: matrices cut by AutoTP are not supported; remove the option")
    if zero.get("round_robin_gradients") and (config.get("checkpoint") or {}).get("load_universal"):
        raise ValueError(
            "zero_optimization.round_robin_gradients with checkpoint.load_universal: DeepSpeed would load masters and "
            "moments into wrong places; remove the first"
        )
    autocast = config.get("torch_autocast") or {}
    if autocast.get("enabled") and autocast.get("dtype") not in ("bfloat16", "torch.bfloat16", "bf16"):
        raise ValueError('torch_autocast.dtype: only "bfloat16" is supported; for float16 use fp16.enabled instead')
    if "optimizer" in config:
        raise ValueError(f'optimizer: DeepSpeed would build its own; move the options to the block "{CONFIG_BLOCK}"')
    if not config.get("zero_allow_untested_optimizer"):
        raise ValueError("zero_allow_untested_optimizer: DeepSpeed wants it true for an optimizer that is not its own")
