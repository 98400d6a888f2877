"""What a model's state dict holds beside its trained parameters: buffers, and parameters that are frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distributed_muon.checkpoint.view import CheckpointView


def other_entries(model: nn.Module | None, view: CheckpointView) -> dict[str, Any]:
    """Entries of the model's state dict that are none of the optimizer's parameters, live; no collective.

    Raises:
        ValueError: a parameter of the optimizer that the model does not have, or an entry that is no tensor.
    """
    if model is None:
        return {}
    state = {key: value for key, value in model.state_dict(keep_vars=True).items() if value is not None}
    held = {id(value) for value in state.values()}
    trained = {id(p.param): p.name for p in view.parameters}
    for number, name in trained.items():
        if number not in held:
            raise ValueError(f"parameter {name!r} of the optimizer is not in the model's state dict: pass its model")
    others = {key: value for key, value in state.items() if id(value) not in trained}
    for key, value in others.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"entry {key!r} of the model's state dict is a {type(value).__name__}, not a tensor")
    return others


def whole(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU; collective where one is a DTensor."""
    with torch.no_grad():
        full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in entries.items()}
        return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in full.items()}


def restore(model: nn.Module, entries: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Load saved values into the entries; collective where one is a DTensor."""
    state = {}
    for key, entry in entries.items():
        state[key] = saved[key]
        if hasattr(entry, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            state[key] = distribute_tensor(saved[key].to(entry.device), entry.device_mesh, entry.placements)
    model.load_state_dict(state, strict=False)
