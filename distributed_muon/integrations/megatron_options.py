"""Megatron's options as ours: what its config and parameter groups say, and what is refused by name."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from torch import nn

from distributed_muon.engine.coefficients import COEFFICIENTS
from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.options import Options
from distributed_muon.integrations.megatron_params import MarkedParameter

# What config_overrides may set; "optimizer" and "eps" are read here, the others by Megatron's scheduler.
_OVERRIDES = ("max_lr", "min_lr", "start_wd", "end_wd", "wd_mult", "optimizer", "eps")
_OF_MEGATRON = ("params", "is_expert_parallel", "default_config", "lr_mult", "is_decoupled_lr")
_ALGORITHMS = {"adam": "adamw", "muon": "muon"}


def refuse_unsupported(config: OptimizerConfig, model_chunks: Sequence[nn.Module], dump: str | None) -> None:
    """Raise a ValueError for options that would be ignored or train wrongly."""
    ddp = getattr(model_chunks[0], "ddp_config", None)
    if ddp is None:
        raise ValueError("model_chunks must be wrapped in megatron.core's DistributedDataParallel")
    model = model_chunks[0].config
    fp32 = "masters and moments are fp32 shards: leave it off"
    refused = [
        ("use_distributed_optimizer=False", not ddp.use_distributed_optimizer or not config.use_distributed_optimizer,
         "set it in OptimizerConfig and DistributedDataParallelConfig (--use-distributed-optimizer)"),
        (f"optimizer={config.optimizer!r}", config.optimizer != "adam",
         "use 'adam', which is AdamW for what Muon does not take; muon_ options are read with it"),
        ("decoupled_weight_decay=False", not config.decoupled_weight_decay, "Muon's decay is decoupled: leave it True"),
        ("overlap_param_gather_with_optimizer_step", config.overlap_param_gather_with_optimizer_step,
         "use overlap_param_gather alone"),
        ("use_precision_aware_optimizer", config.use_precision_aware_optimizer, fp32),
        ("optimizer_cpu_offload", config.optimizer_cpu_offload,
         "leave it off; offload_to_cpu() moves the state between trainings"),
        ("use_layer_wise_distributed_optimizer", getattr(config, "use_layer_wise_distributed_optimizer", False),
         "leave it off: matrices are put together only where they are orthogonalized"),
        ("optimizer_cuda_graph", getattr(config, "optimizer_cuda_graph", False), "leave it off"),
        ("use_megatron_fsdp", getattr(ddp, "use_megatron_fsdp", False), "use DistributedDataParallel"),
        ("num_distributed_optimizer_instances > 1", ddp.num_distributed_optimizer_instances > 1, "set it to 1"),
        ("reuse_grad_buf_for_mxfp8_param_ag", ddp.reuse_grad_buf_for_mxfp8_param_ag, "leave it off"),
        ("fp8_param_gather", ddp.fp8_param_gather, "gather parameters in bf16"),
        ("fp4_param_gather", getattr(ddp, "fp4_param_gather", False), "gather parameters in bf16"),
        ("qk_clip", getattr(model, "qk_clip", False), "it scales whole masters, which are shards here: leave it off"),
        ("dump_param_to_param_group_map", dump is not None, "explain() prints every parameter"),
    ]  # fmt: skip
    for option, found, advice in refused:
        if found:
            raise ValueError(f"{option} is not supported with distributed_muon: {advice}")


def refuse_checkpoint_format() -> None:
    """Raise a ValueError where Megatron-LM's command line asks for checkpoints that could not be saved, or resharded.

    Otherwise the run would learn it at its first save, or when it is continued. Other loops pass their format as
    metadata to `sharded_state_dict`.
    """
    given = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
    if given is None or not (given.save or given.load) or (given.no_save_optim and given.no_load_optim):
        return
    if given.ckpt_format != "torch_dist":
        raise ValueError(f"--ckpt-format {given.ckpt_format} is not supported with distributed_muon: use torch_dist")
    if not given.dist_ckpt_optim_fully_reshardable:
        raise ValueError(
            "--dist-ckpt-optim-fully-reshardable is missing: Megatron-LM would not load the state at another TP or PP"
        )


def read_options(config: OptimizerConfig, given: Mapping[str, Any]) -> Options:
    """Every option: those that Megatron's config has, and the keywords, which win over Muon's of the config."""
    of_config = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "betas": (config.adam_beta1, config.adam_beta2),
        "adamw_eps": config.adam_eps,
    }
    for name in of_config:
        if name in given:
            raise ValueError(f"{name} is given twice: leave it to the OptimizerConfig")
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    said = [name for name, usual in fields.items() if name.startswith("muon_") and getattr(config, name) != usual]
    return Options.of({**of_config, **muon_options(config, said), **given})


# Megatron's flag (without "muon_"): its values as ours, each a dict of options; other values are refused by name.
_FLAGS: dict[str, Mapping[Any, dict[str, Any]]] = {
    "nesterov": {True: {"nesterov": True}, False: {"nesterov": False}},
    "coefficient_type": {
        "simple": {"ns_coefficients": "quintic"},
        "quintic": {"ns_coefficients": COEFFICIENTS["you"] * 20},  # begins anew after its five steps
        "deepseekv4": {"ns_coefficients": "deepseek_v4"},
    },
    "fp32_matmul_prec": {"medium": {"ns_dtype": torch.bfloat16}, "highest": {"ns_dtype": torch.float32}},
    "scalar_optimizer": {"adam": {}},
    "split_qkv": {True: {}},
    "tp_mode": {"duplicated": {}, "distributed": {}},
    "scale_mode": {
        "spectral": {"adjust_lr_fn": "spectral"},
        "shape_scaling": {"adjust_lr_fn": "original"},
        "unit_rms_norm": {"adjust_lr_fn": "unit_rms_norm"},
    },
}
_ADVICE = {
    "coefficient_type": "ns_coefficients takes any table",
    "split_qkv": "give overrides={'*linear_qkv.weight': Whole()}",
    "tp_mode": "whole matrices are orthogonalized, as with 'duplicated', whatever TP is",
}


def muon_options(config: Any, said: Collection[str]) -> dict[str, Any]:
    """Options that Megatron's own Muon has, where they mean the same.

    Args:
        config: an OptimizerConfig, or Megatron-LM's arguments. said: the names of its muon_ fields that the user set.

    Raises:
        ValueError: a value that means something else here, by name, with the way out.
    """
    options: dict[str, Any] = {}
    if "muon_momentum" in said:
        options["momentum"] = config.muon_momentum
    if "muon_num_ns_steps" in said:
        options["ns_steps"] = config.muon_num_ns_steps
    if "muon_extra_scale_factor" in said or "muon_scale_mode" in said:  # both, since each has the other's default
        options |= {"update_scale": config.muon_extra_scale_factor}
        said = {*said, "muon_scale_mode"}
    for name, known in _FLAGS.items():
        field = next((f for f in (f"muon_{name}", f"muon_use_{name}") if f in said), None)
        if field is not None:
            value = getattr(config, field)
            if value not in known:
                advice = _ADVICE.get(name, f"use {' or '.join(map(repr, known))}")
                raise ValueError(f"{field}={value!r} is not supported with distributed_muon: {advice}")
            options |= known[value]
    return options


def chosen_algorithms(groups: Sequence[Mapping[str, Any]]) -> dict[nn.Parameter, str]:
    """The algorithm of parameters for which `config_overrides` names an optimizer."""
    chosen = {}
    for group in groups:
        for key in group:
            if key not in (*_OVERRIDES, *_OF_MEGATRON):
                raise ValueError(f"{key} in config_overrides is not supported: use {', '.join(_OVERRIDES)}")
        name = group.get("optimizer")
        if name is not None:
            if name not in _ALGORITHMS:
                raise ValueError(f"optimizer={name!r} in config_overrides is not supported: use 'adam' or 'muon'")
            chosen |= {param: _ALGORITHMS[name] for param in group["params"]}
    return chosen


def spare(muon: Collection[nn.Parameter], config_overrides: Mapping[Any, Any]) -> dict[Any, Any]:
    """`config_overrides` with those of muP for AdamW's matrices only, as Megatron's own Muon has them.

    muP divides Adam's learning rate and eps of a matrix by its width; an orthogonalized update has a scale of its own.
    """
    out = {}
    for key, values in config_overrides.items():
        predicate = key.with_name_predicate
        if isinstance(predicate, ParamWithNamePredicate) and predicate.name.startswith("mup_"):
            rest = partial(lambda fn, param, name: param not in muon and fn(param, name), predicate.fn)
            key = dataclasses.replace(key, with_name_predicate=ParamWithNamePredicate(predicate.name, rest))
        out[key] = values
    return out


def split_groups(
    groups: Sequence[Mapping[str, Any]], members: Sequence[MarkedParameter], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Megatron's groups, each divided by algorithm; equal on every rank, so some may be empty here."""
    member_of = {member.param: member for member in members}
    split: list[dict[str, Any]] = []
    for group in groups:
        rates = {"lr": group["max_lr"], "weight_decay": config.weight_decay * group["wd_mult"]}
        for algorithm in ("muon", "adamw"):
            chosen = [p for p in group["params"] if (member_of[p].spec.rule is None) == (algorithm == "adamw")]
            split.append({**rates, **group, "params": chosen, "algorithm": algorithm})
    names = [[member_of[param].name for param in group["params"][:1]] for group in split]
    kept = []
    for group, *everyone in zip(split, *Collectives(None).gather_objects(names), strict=True):
        first = [name for names in everyone for name in names]
        if first:
            kept.append(group)
        if group["algorithm"] == "muon" and group.pop("eps", None) is not None and first:
            raise ValueError(
                f"eps in config_overrides is AdamW's, and parameter {first[0]!r} goes to Muon: add optimizer='adam' or "
                "use a narrower ParamKey"
            )
    return kept
