"""The state dict of one rank: exact, by parameter name, without a collective or a step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.options import describe_group
from distributed_muon.engine.state import OwnedParameter

FORMAT = 1
_ONE_SHARD = (
    "state_dict() of DistributedMuon holds the shard of rank {} of {} only: save it on every rank, call "
    "optimizer.gather_state() on every rank before, or use distributed_muon.checkpoint.save()"
)


class SavedState:
    """What `state_dict()` returns and `load_state_dict()` takes: one rank's shard, or the whole.

    Args:
        parameters, param_groups: of the optimizer. collectives: of the data-parallel group.
    """

    def __init__(
        self,
        parameters: Sequence[OwnedParameter],
        param_groups: Sequence[dict[str, Any]],
        collectives: Collectives,
    ) -> None:
        self._parameters, self._groups, self._collectives = parameters, param_groups, collectives
        self._place = (collectives.rank, collectives.size)
        self.forget()

    def forget(self) -> None:
        """The whole state that was gathered is of the past."""
        self._whole: dict[str, Any] | None = None
        self._gathered = False

    def gather(self) -> None:
        """Bring the state of all ranks to rank 0; collective."""
        self._whole = export_whole(self._parameters, self._groups, self._collectives)
        self._gathered = True

    def export(self, stepped: bool) -> dict[str, Any]:
        """The whole state where it was gathered, else this rank's, which a warning says where any would be lost."""
        if self._whole is not None:
            return self._whole
        if self._collectives.size > 1 and stepped and not self._gathered:
            warnings.warn(_ONE_SHARD.format(*self._place), stacklevel=3)
        return export_state(self._parameters, self._groups, *self._place)

    def restore(self, state_dict: Mapping[str, Any]) -> None:
        """Copy a state of either kind back."""
        if state_dict.get("whole"):
            import_whole(self._parameters, self._groups, state_dict)
        else:
            import_state(self._parameters, self._groups, *self._place, state_dict)


def export_state(
    parameters: Sequence[OwnedParameter], param_groups: Sequence[Mapping[str, Any]], rank: int, world: int
) -> dict[str, Any]:
    """This rank's state by parameter name; tensors are references to live state, as in torch.optim."""
    return {
        "format": FORMAT,
        "rank": rank,
        "world_size": world,
        "state": {p.name: {"shard": (p.start, p.stop), **p.saved} for p in parameters},
        "param_groups": export_groups(parameters, param_groups),
    }


def export_whole(
    parameters: Sequence[OwnedParameter], param_groups: Sequence[Mapping[str, Any]], collectives: Collectives
) -> dict[str, Any] | None:
    """The state of all ranks by parameter name, on the CPU of rank 0 (None elsewhere); collective.

    Tensors are fp32 and flat, of all elements of their parameter.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for p in parameters:
        own = state[p.name] = {}
        for key, value in p.saved.items():
            whole = value
            if value.ndim:
                # Integers add up without a change of any bit, where -0.0 + 0.0 would be 0.0.
                bits = torch.zeros(p.param.numel(), dtype=torch.int32, device=value.device)
                bits[p.start : p.stop] = value.view(torch.int32)
                whole = collectives.all_reduce(bits, counted=False).view(torch.float32)
            if collectives.rank == 0:
                own[key] = whole.cpu()
    if collectives.rank:
        return None
    return {"format": FORMAT, "whole": True, "state": state, "param_groups": export_groups(parameters, param_groups)}


def import_whole(
    parameters: Sequence[OwnedParameter], param_groups: Sequence[dict[str, Any]], state_dict: Mapping[str, Any]
) -> None:
    """Copy this rank's elements out of an exported whole state, at any number of ranks."""
    check_groups(parameters, param_groups, state_dict["param_groups"])
    for p in parameters:
        for key, value in p.saved.items():
            whole = state_dict["state"][p.name][key]
            value.copy_(whole[p.start : p.stop] if value.ndim else whole)
    import_groups(param_groups, state_dict["param_groups"])


def import_state(
    parameters: Sequence[OwnedParameter],
    param_groups: Sequence[dict[str, Any]],
    rank: int,
    world: int,
    state_dict: Mapping[str, Any],
) -> None:
    """Copy an exported state back, bit by bit.

    Raises:
        ValueError: the state belongs to another rank, world size or set of parameters; nothing was changed.
    """
    for key, mine in (("format", FORMAT), ("world_size", world), ("rank", rank)):
        if state_dict.get(key) != mine:
            raise ValueError(
                f"state_dict has {key} {state_dict.get(key)!r}, this optimizer {mine!r}: use checkpoint.save/load to "
                "resume on another number of ranks"
            )
    check_groups(parameters, param_groups, state_dict["param_groups"])
    for p in parameters:
        saved = state_dict["state"][p.name]
        if saved["shard"] != (p.start, p.stop) or set(saved) != {"shard", *p.saved}:
            raise ValueError(
                f"state_dict holds elements {saved['shard']} of parameter {p.name!r}, this rank {(p.start, p.stop)}: "
                "use the same layout and bucket_mb, or checkpoint.save/load"
            )
    for p in parameters:
        for key, value in p.saved.items():
            value.copy_(state_dict["state"][p.name][key])
    import_groups(param_groups, state_dict["param_groups"])


def export_groups(
    parameters: Sequence[OwnedParameter], param_groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The options of every group, with parameter names in place of tensors."""
    return [
        {
            **{k: v for k, v in describe_group(group).items() if k != "matrices"},
            "params": _names(parameters, index),
        }
        for index, group in enumerate(param_groups)
    ]


def check_groups(
    parameters: Sequence[OwnedParameter],
    param_groups: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
) -> None:
    """Raise a ValueError unless the saved groups hold the same parameters."""
    if [group["params"] for group in saved_groups] != [_names(parameters, i) for i in range(len(param_groups))]:
        raise ValueError("the saved state has other parameter names or groups: build the same parameter groups first")


def import_groups(param_groups: Sequence[dict[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> None:
    """Restore the options of every group, such as a scheduled learning rate."""
    for group, saved in zip(param_groups, saved_groups, strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})


def _names(parameters: Sequence[OwnedParameter], group: int) -> list[str]:
    return [p.name for p in parameters if p.group == group]
