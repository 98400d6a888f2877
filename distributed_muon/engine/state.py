"""What one rank owns of every parameter, and its exact, collective-free state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distributed_muon.buckets import FlatBucket
from distributed_muon.layout.pieces import Shard

FORMAT = 1


_MOMENTS = {"muon": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


@dataclass(frozen=True)
class ShardedParameter:
    """One parameter as one rank holds it.

    Args:
        name, param: of the whole parameter. group: index of its parameter group.
        start, stop: flat elements of the parameter that this rank owns; equal where it owns none.
        master: fp32 1-D masters of these elements; part of the parameter itself where that is fp32.
        grad: fp32 1-D mean gradient of these elements.
        state: fp32 1-D moments of these elements ("momentum_buffer", or "exp_avg" and "exp_avg_sq"), and
            for AdamW a 0-d "step".
    """

    name: str
    param: nn.Parameter
    group: int
    start: int
    stop: int
    master: Tensor
    grad: Tensor
    state: dict[str, Tensor]

    @property
    def momentum(self) -> Tensor:
        """The first moment, whatever the algorithm calls it."""
        return next(iter(self.state.values()))

    @property
    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the model: the state, and masters that are not the parameter."""
        return self.state if self.param.dtype == torch.float32 else {**self.state, "master": self.master}


def allocate_state(
    buckets: Sequence[FlatBucket],
    shards: Sequence[Shard],
    members: Sequence[tuple[str, nn.Parameter, int]],
    algorithms: Sequence[str],
    rank: int,
) -> list[ShardedParameter]:
    """Zero moments for every bucket's own part; shards are views into the buckets.

    Args:
        buckets: of this rank. shards: that this rank owns. members: (name, parameter, group index) by
            tensor number. algorithms: "muon" or "adamw" by tensor number, one per bucket.
        rank: data-parallel rank.

    Returns:
        One entry per tensor, by tensor number, also where this rank owns nothing of it.
    """
    owned = {shard.tensor: shard for shard in shards}
    out: dict[int, ShardedParameter] = {}
    for bucket in buckets:
        begin = bucket.master.numel() * rank
        algorithm = algorithms[bucket.spec.tensors[0]]
        moments = {key: torch.zeros_like(bucket.master) for key in _MOMENTS[algorithm]}
        for tensor, offset in zip(bucket.spec.tensors, bucket.spec.offsets, strict=True):
            _, start, stop = owned.get(tensor, Shard(tensor, 0, 0))
            window = (0, offset + start - begin if stop > start else 0, stop - start)
            state = {key: moment.narrow(*window) for key, moment in moments.items()}
            if algorithm == "adamw":
                state["step"] = torch.zeros(())
            views = (bucket.master.narrow(*window), bucket.grad_shard.narrow(*window))
            out[tensor] = ShardedParameter(*members[tensor], start, stop, *views, state)
    return [out[tensor] for tensor in range(len(members))]


def export_state(
    parameters: Sequence[ShardedParameter], param_groups: Sequence[Mapping[str, Any]], rank: int, world: int
) -> dict[str, Any]:
    """This rank's state by parameter name; tensors are references to live state, as in torch.optim."""
    return {
        "format": FORMAT,
        "rank": rank,
        "world_size": world,
        "state": {p.name: {"shard": (p.start, p.stop), **p.saved} for p in parameters},
        "param_groups": export_groups(parameters, param_groups),
    }


def import_state(
    parameters: Sequence[ShardedParameter],
    param_groups: Sequence[dict[str, Any]],
    rank: int,
    world: int,
    state_dict: Mapping[str, Any],
) -> bool:
    """Copy an exported state back, bit by bit.

    Returns:
        Whether elements of a parameter on this rank do not follow from the restored masters.

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
    return behind_masters(parameters)


def behind_masters(parameters: Sequence[ShardedParameter]) -> bool:
    """Whether elements of a parameter on this rank do not follow from the masters."""
    own = ((p.param.detach().view(-1)[p.start : p.stop], p.master) for p in parameters)
    return any(not torch.equal(master.to(values.dtype), values) for values, master in own)


def export_groups(
    parameters: Sequence[ShardedParameter], param_groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The options of every group, with parameter names in place of tensors."""
    return [
        {
            **{k: v for k, v in group.items() if k not in ("param_names", "positions", "matrices")},
            "params": _names(parameters, index),
        }
        for index, group in enumerate(param_groups)
    ]


def check_groups(
    parameters: Sequence[ShardedParameter],
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


def _names(parameters: Sequence[ShardedParameter], group: int) -> list[str]:
    return [p.name for p in parameters if p.group == group]
