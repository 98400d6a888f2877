"""How DeepSpeed's ZeRO stages cut parameter groups: the layout, what is refused, saved moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_muon.checkpoint.view import CheckpointView
from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.options import as_groups
from distributed_muon.engine.state import Member, Part
from distributed_muon.engine.step import ShardedStep
from distributed_muon.layout.cutting import Bucket, cut_buckets
from distributed_muon.layout.pieces import Shard

# Groups name themselves by this key: DeepSpeed passes them to step() one by one, and dicts may be replaced.
INDEX = "group_index"


@dataclass(eq=False)
class Partition:
    """One flat tensor of fp32 masters that ZeRO cut for this rank, and what it is a part of.

    Args:
        group: number of the parameter group. flat: this rank's masters.
        members: the tensors cut, in the order of construction.
        shards: per rank, what it holds of them. offsets: where this rank's lie in `flat`.
        place: what must be equal on all ranks for that. collectives: over these ranks.
        last: whether it is the last of its group to be stepped. whole: whether its parameters stay whole between
            steps, as in stages 1 and 2.
        spent: DeepSpeed's gradients of all sub-groups, where this one is the last to be stepped.
        engine, part: of the steps, from the first one on. steps: how many were taken.
    """

    group: int
    flat: Tensor
    members: list[Member]
    shards: list[list[Shard]]
    offsets: list[int]
    place: str
    collectives: Collectives
    last: bool = True
    whole: bool = True
    spent: Tensor | None = None
    engine: ShardedStep | None = None
    part: Part | None = None
    steps: int = 0

    @property
    def own(self) -> list[Shard]:
        """This rank's shards."""
        return self.shards[self.collectives.rank]

    def _views(self, flat: Tensor) -> list[tuple[Shard, Tensor]]:
        return [(s, flat.narrow(0, at, s.stop - s.start)) for s, at in zip(self.own, self.offsets, strict=True)]

    def follows(self) -> bool:
        """Whether this rank's elements of the parameters are those of its flat masters."""
        held = [
            (self.members[s.tensor].param.detach().view(-1)[s.start : s.stop], v) for s, v in self._views(self.flat)
        ]
        return all(torch.equal(param, master.to(param.dtype)) for param, master in held)

    def cut_whole_matrices(self, buffer: Tensor) -> Tensor:
        """This rank's partition out of DeepSpeed's momentum: every tensor it touches, whole, end to end."""
        flat, at = torch.zeros_like(self.flat), 0
        for shard, view in self._views(flat):
            numel = self.members[shard.tensor].spec.numel
            if at + numel <= buffer.numel():
                view.copy_(buffer[at + shard.start : at + shard.stop])
            at += numel
        if at != buffer.numel():
            raise ValueError(
                f"the checkpoint's momentum_buffer has {buffer.numel()} elements, the matrices of "
                f"{self.members[0].spec.name!r}'s group on this rank {at}: use muon_param_groups(overrides=...) to get "
                "the groups of the earlier run"
            )
        return flat


def arrange_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups as DeepSpeed should lay them out.

    Experts of a DeepSpeed MoE layer lie apart, marked as DeepSpeed wants them. Muon's matrices are sorted as
    DeepSpeed's own Muon sorts them, since its checkpoints hold masters and momentum by position only.

    Args:
        params: parameters or groups, as torch.optim takes them.
    """
    out = []
    for group in as_groups(params):
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


def refuse_parameters(members: Iterable[Iterable[Member]]) -> None:
    """Raise a ValueError that names the first parameter that some DeepSpeed feature has marked."""
    for member in chain.from_iterable(members):
        name, param = member.spec.name, member.param
        if getattr(param, "use_muon", False):
            raise ValueError(
                f"parameter {name!r} is tagged use_muon, for DeepSpeed's own Muon: delete the tag, and the optimizer "
                "block from the DeepSpeed config"
            )
        if getattr(param, "tensor_model_parallel", False) or getattr(param, "model_parallel", False):
            raise ValueError(f"parameter {name!r} is cut by tensor parallelism: remove tensor_parallel from the config")


def refuse_fp16_autocast() -> None:
    """Raise a ValueError under torch_autocast in float16: its scaler would skip single groups on single ranks."""
    from deepspeed.runtime.torch_autocast import get_autocast_dtype, is_autocast_initialized

    if is_autocast_initialized() and get_autocast_dtype() == torch.float16:
        raise ValueError('torch_autocast.dtype=float16 is not supported: use "bfloat16", or fp16.enabled')


def read_partitions(groups: Sequence[Mapping[str, Any]], members: Sequence[list[Member]]) -> list[Partition]:
    """The layout of all groups, in the order in which DeepSpeed steps them; no collective.

    Raises:
        ValueError: DeepSpeed laid a parameter out in a way that is not supported.
    """
    wrapper = getattr(members[0][0].param, "_z3_optimizer", None)
    if wrapper is None:
        found = [_flat_buffer(*pair) for pair in zip(groups, members, strict=True)]
    else:
        by_param = {member.param: member for member in chain.from_iterable(members)}
        count = len(wrapper.fp16_groups)
        found = [_sub_group(wrapper, number, by_param) for number in range(count)]
        for partition, following in pairwise(found):
            partition.last = partition.group != following.group
        found[-1].spent = wrapper.grad_partitions_flat_buffer
    for partition in found:
        name, size = partition.members[0].spec.name, partition.collectives.size
        if size != dist.get_world_size() and not groups[partition.group].get("moe"):
            raise ValueError(
                f"parameter {name!r} is partitioned over {size} of {dist.get_world_size()} ranks: tensor, pipeline and "
                "sequence parallelism, and MiCS, are not supported under DeepSpeed"
            )
        if partition.flat.dtype != torch.float32:
            raise ValueError(
                f"masters of parameter {name!r} are {partition.flat.dtype}: remove bf16_master_weights_and_grads or "
                "fp16_master_weights_and_grads from the DeepSpeed config"
            )
    return found


def _flat_buffer(group: Mapping[str, Any], members: list[Member]) -> Partition:
    """One group of stages 1 and 2, from where its parameters lie in their flat buffer.

    DeepSpeed's own map, `param._hp_mapping`, is not used: under `round_robin_gradients` it is wrong.
    """
    (flat,) = group["params"]
    first = members[0].param
    collectives = Collectives(first._dp_group)
    numel = flat.numel() * collectives.size
    for member in members:
        storage = member.param.untyped_storage()
        whole = storage.nbytes() == numel * member.param.element_size()
        if not whole or storage.data_ptr() != first.untyped_storage().data_ptr():
            raise ValueError(
                f"parameter {member.spec.name!r} is no view of its group's flat buffer of {numel} elements: DeepSpeed "
                "laid it out in a way that is not supported; use deepspeed 0.19.8"
            )
    places = sorted((member.param.storage_offset(), tensor) for tensor, member in enumerate(members))
    bucket = Bucket(tuple(tensor for _, tensor in places), tuple(offset for offset, _ in places), numel)
    shards = cut_buckets([bucket], [member.spec.numel for member in members], collectives.size)
    begin = collectives.rank * flat.numel()
    offsets = [members[s.tensor].param.storage_offset() + s.start - begin for s in shards[collectives.rank]]
    return Partition(group[INDEX], flat, members, shards, offsets, f"group {group[INDEX]} at {bucket}", collectives)


def _sub_group(wrapper: Any, number: int, by_param: Mapping[Tensor, Member]) -> Partition:
    """One sub-group of stage 3, where every parameter is cut evenly and a rank's parts lie end to end."""
    flat, params = wrapper.fp32_partitioned_groups_flat[number], wrapper.fp16_groups[number]
    members, sizes = [by_param[param] for param in params], [param.partition_numel() for param in params]
    collectives = Collectives(wrapper.sub_group_process_groups[number])
    starts = list(accumulate(sizes, initial=0))
    if starts[-1] != flat.numel():
        raise ValueError(
            f"sub-group {number} has {flat.numel()} elements, its parameters {starts[-1]}: DeepSpeed laid it out in a "
            "way that is not supported; use deepspeed 0.19.8"
        )
    buckets = [Bucket((tensor,), (0,), size * collectives.size) for tensor, size in enumerate(sizes)]
    shards = cut_buckets(buckets, [member.spec.numel for member in members], collectives.size)
    offsets = [starts[shard.tensor] for shard in shards[collectives.rank]]
    place = f"sub-group {number} of parts {sizes}"
    return Partition(members[0].group, flat, members, shards, offsets, place, collectives, whole=False)


def checkpoint_view(partitions: Sequence[Partition], groups: Sequence[dict[str, Any]]) -> CheckpointView:
    """What a checkpoint works on: started partitions, in the order of `read_partitions`, and their groups."""

    def restored(steps: int) -> None:
        for group in groups:
            group.update({"step": steps, "missed": {}})
        for partition in partitions:
            missed, partition.steps = groups[partition.group]["missed"], steps
            late = {p.name: steps - int(p.state["step"]) for p in partition.engine.parameters if "step" in p.state}
            missed.update({name: count for name, count in late.items() if count})
        publish(partitions)

    engines, experts = [partition.engine for partition in partitions], [g["name"] for g in groups if g.get("moe")]
    problem = None
    if experts:
        problem = f"group {experts[0]!r}: names of experts mean others on each rank, use engine.save_checkpoint"
    private = ("step", "missed", INDEX, "moe", "name")
    place = ("deepspeed", engines, Collectives(None), groups, groups[0]["step"], restored)
    return CheckpointView(*place, private=private, problem=problem)


def publish(partitions: Sequence[Partition]) -> None:
    """Let the model's parameters follow from masters that were written in place; collective over the ranks.

    Args:
        partitions: all, in the order of `read_partitions`.
    """
    for number, partition in enumerate(partitions):
        param, flat, collectives = partition.members[0].param, partition.flat.detach(), partition.collectives
        if partition.whole:
            buffer = torch.empty(0, dtype=param.dtype, device=param.device).set_(param.untyped_storage())
            buffer.narrow(0, collectives.rank * flat.numel(), flat.numel()).copy_(flat)
            collectives.all_gather(buffer).wait()
        else:
            wrapper = param._z3_optimizer
            wrapper.fp16_partitioned_groups_flat[number].data.copy_(flat)
            wrapper._unflatten_partitioned_parameters(number)
    wrapper = getattr(partitions[0].members[0].param, "_z3_optimizer", None)
    kept = wrapper.persistent_parameters if wrapper is not None else []
    if kept:  # small ones stay gathered between steps
        kept[0].partition(kept)
        kept[0].all_gather(kept)


def read_moments(
    group: Mapping[str, Any], saved: Mapping[str, Any], moments: Mapping[str, Any], part: Partition
) -> dict[str, Tensor]:
    """The moments of one group in a saved state, checked, as tensors of this rank's partition."""
    flat, names = part.flat, group.get("param_names")
    keys = ("exp_avg",) if group["algorithm"] == "muon" else ("exp_avg", "exp_avg_sq")
    where = f"parameter group {group[INDEX]}"
    if "use_muon" in saved and part.whole:
        theirs = "muon" if saved["use_muon"] else "adamw"
        if theirs == "muon" and moments:
            moments = {"exp_avg": _own_part(moments["momentum_buffer"], part)}
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
                "with ds_to_universal to resume on another number of ranks, and keep zero_optimization.sub_group_size"
            )
    return out


def _own_part(momentum: Tensor, part: Partition) -> Tensor:
    """This rank's partition of a momentum that DeepSpeed's own Muon saved."""
    flat, dtype = part.flat, part.members[0].param.dtype
    if dtype == torch.float16:
        raise ValueError(
            f"momentum of parameter {part.members[0].spec.name!r} carries the loss scale of DeepSpeed's fp16 run: load "
            "with load_optimizer_states=False"
        )
    if dtype == torch.bfloat16 and momentum.dtype == torch.float32 and momentum.shape == flat.shape:
        return momentum  # BF16_Optimizer's, already a partition
    return part.cut_whole_matrices(momentum.to(flat.device, torch.float32))
