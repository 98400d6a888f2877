"""Checkpoints of other optimizers made into ours: their torch.save files, whose names and momenta mean other things.

DeepSpeed's and Megatron's own Muon and AdamW come in through their frameworks' loaders: `PartitionedOptimizer` takes
DeepSpeed's checkpoints, `get_distributed_muon_optimizer(take_over=...)` Megatron's; `save` then writes this format.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distributed_muon.checkpoint.files import write_file, write_text
from distributed_muon.checkpoint.index import INDEX, MODEL, Index, as_json, versions
from distributed_muon.checkpoint.places import Patch

MUON, ADAMW = ("momentum_buffer",), ("exp_avg", "exp_avg_sq")
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
    tensors: dict[str, Tensor] = {}
    parameters: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for state_dict in saved["optimizers"]:
        for group in state_dict["param_groups"]:
            if "param_names" not in group:
                raise ValueError(f"{source}: groups have no param_names: build optimizers from (name, parameter) pairs")
            states = [state_dict["state"].get(number, {}) for number in group["params"]]
            muon = not any("exp_avg_sq" in state for state in states)
            options = {key: value for key, value in group.items() if key in _OPTIONS}
            groups.append(as_json({"algorithm": "muon" if muon else "adamw", **options}, "parameter group"))
            scale = 1 - group["momentum"] if muon and kind == "keller" else 1.0
            for name, state in zip(group["param_names"], states, strict=True):
                parameters[name] = _parameter(name, model, state, MUON if muon else ADAMW, scale, tensors)
                parameters[name]["group"] = len(groups) - 1
    others = {key: value.contiguous() for key, value in model.items() if key not in parameters}
    _write(target, tensors, parameters, groups, others)
    return f"{len(parameters)} parameters and {len(others)} other tensors of {source} are in {target}"


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
    keys: tuple[str, ...],
    scale: float,
    tensors: dict[str, Tensor],
) -> dict[str, Any]:
    """Put a parameter's master and moments among the tensors; what the index says of it."""
    if name not in model:
        raise ValueError(f"parameter {name!r} of the optimizer is not in the model's state dict")
    value = model[name]
    tensors[f"{name}.master"] = value.float().contiguous()
    for key in keys:
        moment = state[key].float() * scale if key in state else torch.zeros(value.shape)
        tensors[f"{name}.{key}"] = moment.contiguous()
    return {
        "shape": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
        "algorithm": "muon" if keys == MUON else "adamw",
        "states": ["master", *keys],
        **({"step": int(state.get("step", 0))} if keys == ADAMW else {}),
    }


def _write(
    target: Path,
    tensors: dict[str, Tensor],
    parameters: dict[str, dict[str, Any]],
    groups: list[dict[str, Any]],
    others: dict[str, Tensor],
) -> None:
    unfinished = target.with_name(target.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_id, file = uuid.uuid4().hex, "rank-00000.safetensors"
    files = {file: write_file(unfinished / file, tensors, save_id)}
    numels = {name: torch.Size(about["shape"]).numel() for name, about in parameters.items()}
    files[file]["parts"] = {name: [Patch(0, count, 0, count, 1, count)] for name, count in numels.items()}
    if others:
        files[MODEL] = write_file(unfinished / MODEL, others, save_id)
    steps = max((about["step"] for about in parameters.values() if "step" in about), default=0)
    index = Index(save_id, "torch", steps, groups, {}, 1, versions(), parameters, files, list(others))
    write_text(unfinished / INDEX, index.text())
    unfinished.rename(target)
