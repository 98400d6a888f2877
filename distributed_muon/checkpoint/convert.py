"""Checkpoints of other optimizers made into ours: their torch.save files, whose names and momenta mean other things.

DeepSpeed's and Megatron's own Muon and AdamW come in through their frameworks' loaders: `PartitionedOptimizer` takes
DeepSpeed's checkpoints, `get_distributed_muon_optimizer(take_over=...)` Megatron's; `save` then writes this format.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distributed_muon.checkpoint.held import Held, describe
from distributed_muon.checkpoint.index import Index, as_json, versions
from distributed_muon.checkpoint.places import Patch
from distributed_muon.checkpoint.saving import WriteJob, make_room
from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.state import MOMENTS

_NEEDS = 'a torch.save file of {"model": model.state_dict(), "optimizers": [optimizer.state_dict(), ...]}'
# Options that mean the same in torch.optim and here.
_OPTIONS = {"lr", "initial_lr", "weight_decay", "momentum", "nesterov", "ns_steps", "betas", "eps"}


def convert(source: Path, target: Path, kind: str, trust: bool) -> str:
    """Write a checkpoint from a torch.save file of {"model": state dict, "optimizers": [state dicts]}.

    The optimizers were built from `(name, parameter)` pairs, so that their groups hold "param_names".

    Args:
        kind: "torch-muon" for torch.optim.Muon, or "keller" for a Muon whose momentum is a sum, m = momentum * m + g:
            the average here is (1 - momentum) times that. torch.optim.AdamW's stands beside either.
        trust: unpickle the file, which may run code.

    Returns:
        A line that says what was converted.

    Raises:
        ValueError: the file is something else; the message says what.
    """
    saved = _read(source, trust)
    if not isinstance(saved, Mapping) or not {"model", "optimizers"} <= set(saved):
        raise ValueError(f"{source} is not {_NEEDS}")
    model: dict[str, Tensor] = {k: v for k, v in saved["model"].items() if isinstance(v, Tensor)}
    held, groups = Held(), []
    for state_dict in saved["optimizers"]:
        for group in state_dict["param_groups"]:
            if "param_names" not in group:
                raise ValueError(f"{source}: groups have no param_names: build optimizers from (name, parameter) pairs")
            states = [state_dict["state"].get(number, {}) for number in group["params"]]
            algorithm = "adamw" if any("exp_avg_sq" in state for state in states) else "muon"
            options = {key: value for key, value in group.items() if key in _OPTIONS}
            scale = 1 - group["momentum"] if algorithm == "muon" and kind == "keller" else 1.0
            for name, state in zip(group["param_names"], states, strict=True):
                _parameter(name, model, state, algorithm, len(groups), scale, held)
            groups.append(as_json({"algorithm": algorithm, **options}, "parameter group"))
    others = {key: value.contiguous() for key, value in model.items() if key not in held.parameters}
    steps = max((about["step"] for about in held.parameters.values() if "step" in about), default=0)
    header = Index(uuid.uuid4().hex, "torch", steps, groups, extra={}, ranks=1, versions=versions())
    make_room(target)
    WriteJob(target, header, held, others).write(Collectives(None))
    return f"{len(held.parameters)} parameters and {len(others)} other tensors of {source} are in {target}"


def _read(source: Path, trust: bool) -> Any:
    if not trust:
        raise ValueError(
            f"{source} is a pickle, and reading one runs whatever code is in it: add --trust if the file is your own"
        )
    # The one place that reads a pickle: a foreign file, whose optimizer may have classes of its own in its state.
    return torch.load(source, map_location="cpu", weights_only=False)


def _parameter(
    name: str,
    model: Mapping[str, Tensor],
    state: Mapping[str, Any],
    algorithm: str,
    group: int,
    scale: float,
    held: Held,
) -> None:
    """Add a parameter's master and moments to what is written."""
    if name not in model:
        raise ValueError(f"parameter {name!r} of the optimizer is not in the model's state dict")
    value, keys = model[name], MOMENTS[algorithm]
    held.tensors[f"{name}.master"] = value.float().contiguous()
    for key in keys:
        moment = state[key].float() * scale if key in state else torch.zeros(value.shape)
        held.tensors[f"{name}.{key}"] = moment.contiguous()
    step = state.get("step", 0) if algorithm == "adamw" else None
    held.parameters[name] = describe(value.shape, value.dtype, algorithm, group, ["master", *keys], step)
    held.parts[name] = [Patch(0, value.numel(), 0, value.numel(), 1, value.numel())]
