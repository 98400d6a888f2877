"""How DeepSpeed's ZeRO stages 1 and 2 cut a parameter group: the layout, what is refused, saved moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_muon.engine.collectives import Collectives
from distributed_muon.layout.cutting import Bucket, cut_buckets
from distributed_muon.layout.matrices import TensorSpec
from distributed_muon.layout.pieces import Shard

# Groups name themselves by this key: DeepSpeed passes them to step() one by one, and dicts may be replaced.
INDEX = "group_index"


@dataclass(frozen=True)
class Partition:
    """One parameter group as ZeRO cut it, on one rank.

    Args:
        specs, params: the tensors of the group, in the order of construction.
        bucket: where each of them lies in the group's whole flat buffer.
        collectives: over the ranks that share the buffer.
    """

    specs: list[TensorSpec]
    params: list[nn.Parameter]
    bucket: Bucket
    collectives: Collectives

    @cached_property
    def shards(self) -> list[list[Shard]]:
        """Per rank, the shards that its part of the buffer holds."""
        return cut_buckets([self.bucket], [spec.numel for spec in self.specs], self.collectives.size)

    @cached_property
    def _cuts(self) -> list[tuple[int, int]]:
        """(offset in this rank's part, elements) of each of its shards."""
        begin = self.collectives.rank * (self.bucket.numel // self.collectives.size)
        own = self.shards[self.collectives.rank]
        return [(self.bucket.offsets[s.tensor] + s.start - begin, s.stop - s.start) for s in own]

    def views(self, flat: Tensor) -> list[Tensor]:
        """This rank's shards as 1-D views of its flat partition (or of its gradient, or its moments)."""
        return [flat.narrow(0, *cut) for cut in self._cuts]

    def follows(self, flat: Tensor) -> bool:
        """Whether this rank's elements of the parameters are those of its flat masters."""
        own = zip(self.shards[self.collectives.rank], self.views(flat), strict=True)
        held = [(self.params[shard.tensor].detach().view(-1)[shard.start : shard.stop], view) for shard, view in own]
        return all(torch.equal(param, master.to(param.dtype)) for param, master in held)

    def cut_whole_matrices(self, buffer: Tensor, flat: Tensor) -> Tensor:
        """This rank's partition out of DeepSpeed's momentum: every tensor it touches, whole, end to end."""
        own = {
            s.tensor: (s, view) for s, view in zip(self.shards[self.collectives.rank], self.views(flat), strict=True)
        }
        at = 0
        for tensor in sorted(own, key=lambda t: self.bucket.offsets[t]):
            shard, view = own[tensor]
            if at + self.specs[tensor].numel <= buffer.numel():
                view.copy_(buffer[at + shard.start : at + shard.stop])
            at += self.specs[tensor].numel
        if at != buffer.numel():
            raise ValueError(
                f"the checkpoint's momentum_buffer has {buffer.numel()} elements, the matrices of "
                f"{self.specs[0].name!r}'s group on this rank {at}: use muon_param_groups(overrides=...) to get the "
                "groups of the earlier run"
            )
        return flat


def arrange_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups as DeepSpeed should lay them out.

    Experts of a DeepSpeed MoE layer lie apart, marked as DeepSpeed wants them. Muon's matrices are sorted as
    DeepSpeed's own Muon sorts them, since its checkpoints hold masters and momentum by position only.

    Args:
        params: parameters or groups, as torch.optim takes them.
    """
    groups = list(params)
    groups = groups if groups and isinstance(groups[0], Mapping) else [{"params": groups}]
    out = []
    for group in groups:
        apart: dict[str | None, list[Any]] = {}
        for item in group["params"]:
            # DeepSpeed's own mark: experts are reduced over the expert data-parallel group of this name.
            name = None if getattr(_tensor(item), "allreduce", True) else _tensor(item).group_name
            apart.setdefault(name, []).append(item)
        for name, items in apart.items():
            if group.get("algorithm", "muon") == "muon":
                items.sort(key=lambda item: _tensor(item).size(), reverse=True)
            out.append({**group, "params": items, **({"moe": True, "name": name} if name else {})})
    return out


def _tensor(item: Any) -> Tensor:
    return item[1] if isinstance(item, tuple) else item


def refuse_parameters(members: Sequence[tuple[str, nn.Parameter, int]]) -> None:
    """Raise a ValueError that names the first parameter that some DeepSpeed feature has marked."""
    for name, param, _ in members:
        if getattr(param, "use_muon", False):
            raise ValueError(
                f"parameter {name!r} is tagged use_muon, for DeepSpeed's own Muon: delete the tag, and the optimizer "
                "block from the DeepSpeed config"
            )
        if hasattr(param, "ds_id"):
            raise ValueError(f"parameter {name!r} is partitioned: set zero_optimization.stage to 1 or 2, not 3")
        if hasattr(param, "_zero_optimizer"):
            raise ValueError(
                f"parameter {name!r} has its master on the CPU: remove zero_optimization.offload_optimizer"
            )
        if getattr(param, "tensor_model_parallel", False) or getattr(param, "model_parallel", False):
            raise ValueError(f"parameter {name!r} is cut by tensor parallelism: remove tensor_parallel from the config")


def refuse_fp16_autocast() -> None:
    """Raise a ValueError under torch_autocast in float16: its scaler would skip single groups on single ranks."""
    from deepspeed.runtime.torch_autocast import get_autocast_dtype, is_autocast_initialized

    if is_autocast_initialized() and get_autocast_dtype() == torch.float16:
        raise ValueError('torch_autocast.dtype=float16 is not supported: use "bfloat16", or fp16.enabled')


def make_partition(
    group: Mapping[str, Any], specs: list[TensorSpec], params: list[nn.Parameter], shared: dict[Any, Collectives]
) -> Partition:
    """The layout of one group, from where its parameters lie in the flat buffer.

    DeepSpeed's own map, `param._hp_mapping`, is not used: under `round_robin_gradients` it is wrong.
    """
    (flat,) = group["params"]
    name = specs[0].name
    process_group = params[0]._dp_group
    collectives = shared.setdefault(process_group, Collectives(process_group))
    if collectives.size != dist.get_world_size() and not group.get("moe"):
        raise ValueError(
            f"parameter {name!r} is partitioned over {collectives.size} of {dist.get_world_size()} ranks: tensor "
            "and pipeline parallelism are not supported under DeepSpeed"
        )
    numel = flat.numel() * collectives.size
    for spec, param in zip(specs, params, strict=True):
        storage = param.untyped_storage()
        if (
            storage.nbytes() != numel * param.element_size()
            or storage.data_ptr() != params[0].untyped_storage().data_ptr()
        ):
            raise ValueError(
                f"parameter {spec.name!r} is no view of its group's flat buffer of {numel} elements: DeepSpeed laid it "
                "out in a way that is not supported; use deepspeed 0.19.8"
            )
    bucket = Bucket(tuple(range(len(params))), tuple(p.storage_offset() for p in params), numel)
    return Partition(specs, params, bucket, collectives)


def read_moments(
    group: Mapping[str, Any], saved: Mapping[str, Any], moments: Mapping[str, Any], part: Partition
) -> dict[str, Tensor]:
    """The moments of one group in a saved state, checked, as tensors of this rank's partition."""
    (flat,) = group["params"]
    names = group.get("param_names")
    keys = ("exp_avg",) if group["algorithm"] == "muon" else ("exp_avg", "exp_avg_sq")
    where = f"parameter group {group[INDEX]}"
    if "use_muon" in saved:
        theirs = "muon" if saved["use_muon"] else "adamw"
        if theirs == "muon" and moments:
            moments = {"exp_avg": _own_part(moments["momentum_buffer"], flat, part)}
    elif "algorithm" in saved:
        theirs = saved["algorithm"]
        if names != saved.get("param_names"):
            raise ValueError(f"{where} held other parameters when it was saved: build the groups of the earlier run")
    else:
        raise ValueError(
            f"{where} was saved by another optimizer, whose state cannot serve: load with load_optimizer_states=False"
        )
    if theirs != group["algorithm"]:
        raise ValueError(f"{where} was trained by {theirs}, is now for {group['algorithm']}: keep the groups")
    out = {key: moments[key] for key in keys if key in moments}
    for key, value in out.items():
        if value.shape != flat.shape:
            raise ValueError(
                f"{key} of {where} has {value.numel()} elements in the checkpoint, {flat.numel()} here: convert it "
                "with ds_to_universal to resume on another number of ranks"
            )
    return out


def _own_part(momentum: Tensor, flat: Tensor, part: Partition) -> Tensor:
    """This rank's partition of a momentum that DeepSpeed's own Muon saved."""
    dtype = part.params[0].dtype
    if dtype == torch.float16:
        raise ValueError(
            f"momentum of parameter {part.specs[0].name!r} carries the loss scale of DeepSpeed's fp16 run: load with "
            "load_optimizer_states=False"
        )
    if dtype == torch.bfloat16 and momentum.dtype == torch.float32 and momentum.shape == flat.shape:
        return momentum  # BF16_Optimizer's, already a partition
    return part.cut_whole_matrices(momentum.to(flat.device, torch.float32), torch.zeros_like(flat))
