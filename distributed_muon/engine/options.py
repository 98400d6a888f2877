"""Checks at construction: every option and parameter that cannot be right is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distributed_muon.engine.coefficients import coefficient_table
from distributed_muon.engine.update import ADJUST_LR_FNS
from distributed_muon.layout.matrices import TensorSpec, Whole
from distributed_muon.layout.plan import STRATEGIES

ALGORITHMS = ("muon", "adamw")


def check_choice(option: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise a ValueError naming the option unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{option}={value!r} is unknown: choose one of {', '.join(map(str, allowed))}")


def check_newton_schulz(ns_form: str, ns_dtype: torch.dtype, strategy: str) -> None:
    """Raise a ValueError that names the first of these options, which every adapter has, that cannot be right."""
    check_choice("ns_form", ns_form, ("auto", "standard", "gram"))
    check_choice("ns_dtype", ns_dtype, (torch.bfloat16, torch.float32))
    check_choice("strategy", strategy, STRATEGIES)


def check_group(index: int, group: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first option of a parameter group that cannot be right."""
    check_choice("algorithm", group["algorithm"], ALGORITHMS)
    for option in ("lr", "weight_decay", "momentum", "eps", "adamw_eps"):
        if not float(group[option]) >= 0:
            raise ValueError(f"{option}={group[option]} of parameter group {index} must be >= 0")
    if "betas" in group:
        raise ValueError(f"betas of parameter group {index}: AdamW groups call them adamw_betas (and eps adamw_eps)")
    if not group["momentum"] < 1:
        raise ValueError(f"momentum={group['momentum']} of parameter group {index} must be below 1")
    if not all(0 <= beta < 1 for beta in group["adamw_betas"]):
        raise ValueError(f"adamw_betas={group['adamw_betas']} of parameter group {index} must be in [0, 1)")
    if group["algorithm"] == "muon":
        check_choice("adjust_lr_fn", group["adjust_lr_fn"], ADJUST_LR_FNS)
        coefficient_table(group["ns_coefficients"], group["ns_steps"])
    elif group["matrices"] is not None:
        raise ValueError(f"matrices={group['matrices']} of parameter group {index}: AdamW groups take no matrix rule")


def tensor_specs(
    members: Sequence[tuple[str, nn.Parameter, int]], groups: Sequence[Mapping[str, Any]]
) -> list[TensorSpec]:
    """The planner's view of the parameters; raises a ValueError that names the first unsupported one.

    Args:
        members: (name, parameter, group index) of every parameter. groups: the parameter groups.
    """
    names = [name for name, _, _ in members]
    if len(set(names)) < len(names):
        raise ValueError("parameter names are not unique: pass the (name, tensor) pairs of one model")
    return [_tensor_spec(name, param, groups[group]) for name, param, group in members]


def describe(
    options: Sequence[Any], members: Sequence[tuple[str, nn.Parameter, int]], groups: Sequence[Mapping[str, Any]]
) -> list[str]:
    """One line for the options and one per parameter, equal on ranks that will take the same decisions."""
    lines = [f"options {tuple(options)}"]
    for name, param, number in members:
        group = {k: v for k, v in groups[number].items() if k not in ("params", "param_names", "positions")}
        lines.append(f"parameter {name!r} of shape {tuple(param.shape)}, {param.dtype}, group {number} {group}")
    return lines


def _tensor_spec(name: str, param: nn.Parameter, group: Mapping[str, Any]) -> TensorSpec:
    """The planner's view of one parameter; raises a ValueError that names it where it is unsupported."""
    if hasattr(param, "placements"):
        raise ValueError(f"parameter {name!r} is a DTensor: DistributedMuon shards by itself, pass plain tensors")
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"parameter {name!r} is {param.dtype}: float32, bfloat16 and float16 are supported")
    if not param.numel():
        raise ValueError(f"parameter {name!r} is empty: leave it out, or pass the model before a wrapper shards it")
    if not param.requires_grad:
        raise ValueError(f"parameter {name!r} is frozen: leave it out of the parameter groups")
    if group["algorithm"] == "adamw":
        return TensorSpec(name, tuple(param.shape))
    if param.ndim < 2:
        raise ValueError(
            f"parameter {name!r} of shape {tuple(param.shape)} is no matrix: give its group algorithm='adamw', use "
            "muon_param_groups(model), or construct the optimizer before a wrapper flattens the model"
        )
    spec = TensorSpec(name, tuple(param.shape), group["matrices"] or Whole())
    spec.matrices()
    return spec
