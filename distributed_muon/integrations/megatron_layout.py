"""Megatron's DDP buffers read as parts over a rank domain, and (0.19) a buffer layout that few matrices straddle.

Every bucket of a buffer is cut into equal shards over its data-parallel group. The domain of a buffer is that
group times the tensor-parallel one: its ranks together hold one copy of the matrices of a pipeline stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.options import Options
from distributed_muon.engine.state import Member, OwnedParameter, Part
from distributed_muon.engine.step import ShardedStep
from distributed_muon.integrations.megatron_params import MarkedParameter
from distributed_muon.layout.cutting import Bucket, cut_buckets, make_buckets
from distributed_muon.layout.pieces import Shard

_START = 64  # elements; Megatron aligns parameter starts to it
_PADDING = 1.02  # of a bucket, that whole parameters on ranks are worth


@dataclass(frozen=True)
class Ranks:
    """The ranks that hold one copy of some parameters.

    Args:
        group: of all its ranks, in the order of `coordinates`.
        data_parallel: the group that cuts the buckets.
        coordinates: per domain rank, its (data-parallel rank, tensor-parallel rank).
    """

    group: dist.ProcessGroup
    data_parallel: dist.ProcessGroup
    coordinates: tuple[tuple[int, int], ...]

    @property
    def data_rank(self) -> int:
        """Of this rank."""
        return dist.get_rank(self.data_parallel)

    @property
    def world_ranks(self) -> list[int]:
        """The domain's ranks, by their numbers in the world."""
        return dist.get_process_group_ranks(self.group)


@dataclass(frozen=True, eq=False)
class Domain:
    """The dense or the expert parameters of this rank, and the step that updates them.

    Args:
        members: the parameters in registration order, the same on all ranks.
        ranks: that hold them. engine: the step over these ranks, attached.
        cut: every data-parallel rank's shards. gradients: per part of the engine, its run of the DDP gradient buffer.
    """

    members: Sequence[MarkedParameter]
    ranks: Ranks
    engine: ShardedStep
    cut: Sequence[Sequence[Shard]]
    gradients: Sequence[Tensor]

    @property
    def owned(self) -> list[OwnedParameter]:
        """The parameters of which this rank owns something."""
        return [parameter for parameter in self.engine.parameters if parameter.part is not None]

    @property
    def flops_by_rank(self) -> dict[int, int]:
        """Newton-Schulz FLOPs per step that the plan gives to each rank of the world."""
        return dict(zip(self.ranks.world_ranks, self.engine.plan.ns_flops_by_rank, strict=True))

    def mark_masters(self) -> None:
        """Tell Megatron's norm and zero counting, which go by attributes, which elements count.

        Counted elements are marked as a tensor-parallel cut and the others as shared: right for any TP, ETP and EP,
        where Megatron's own marks are read against one of the groups.
        """
        _, tensor_rank = self.ranks.coordinates[self.engine.collectives.rank]
        for member, parameter in zip(self.members, self.engine.parameters, strict=True):
            param, master = member.param, parameter.master
            if param.dtype != torch.float32:  # what Megatron's parameter norm reads
                param.main_param = master if parameter.part is not None else None
                param.main_param_sharded = True
            if parameter.part is not None:
                counted = tensor_rank == 0 or not member.replicated
                master.shared = getattr(param, "shared", False) or not counted
                master.tensor_model_parallel = counted
                for name in ("allreduce", "grad_norm_group"):
                    if hasattr(param, name):
                        setattr(master, name, getattr(param, name))

    def publish(self) -> None:
        """Round the masters into this rank's slices of the parameter buffers."""
        for part in self.engine.parts:
            part.publish()

    def take_gradients(self) -> None:
        """Let the parts and masters see the reduced mean gradient in fp32: a view of the DDP buffer if that is fp32."""
        for part, grad in zip(self.engine.parts, self.gradients, strict=True):
            part.grad = grad.float()
        for parameter in self.owned:
            parameter.master.grad = parameter.grad


def find_ranks(buffers: Sequence[Any], tensor_parallel: dist.ProcessGroup) -> Ranks | None:
    """The domain of this rank's buffers of one kind; collective over the world.

    Args:
        buffers: dense or expert DDP buffers of all model chunks; may be empty on some ranks.
        tensor_parallel: the group that cut their parameters.

    Returns:
        None where this rank has no such buffer.
    """
    data_parallel = buffers[0].data_parallel_group if buffers else None
    mine = None
    if data_parallel is not None:
        mine = (dist.get_process_group_ranks(data_parallel), dist.get_process_group_ranks(tensor_parallel))
    everyone: list[Any] = Collectives(None).gather_objects(mine)
    groups = {}
    for view in everyone:
        if view is not None:
            groups[tuple(sorted({rank for peer in view[1] for rank in everyone[peer][0]}))] = None
    for ranks in sorted(groups):
        shared = all(everyone[rank][0] == list(ranks) for rank in ranks)
        # The data-parallel group itself where nothing is cut by TP: no second communicator.
        groups[ranks] = data_parallel if shared and dist.get_rank() in ranks else None
        if not shared:
            groups[ranks] = dist.new_group(list(ranks))
    if mine is None:
        return None
    group = next(group for ranks, group in groups.items() if dist.get_rank() in ranks)
    order = dist.get_process_group_ranks(group)
    coordinates = tuple((everyone[rank][0].index(rank), everyone[rank][1].index(rank)) for rank in order)
    return Ranks(group, data_parallel, coordinates)


def build_domain(
    ranks: Ranks,
    members: Sequence[MarkedParameter],
    groups: Sequence[int],
    buffers: Sequence[Any],
    param_groups: Sequence[Mapping[str, Any]],
    options: Options,
    busy: Mapping[int, int],
) -> Domain:
    """The step over this rank's parts of the buffers; collective over the domain.

    A part is a run of neighbouring shards of one algorithm inside this rank's 1/DP of a bucket: its masters are the
    parameter buffer itself where that is fp32.

    Args:
        members: the buffers' parameters, in registration order. groups: per member, the index of its group.
        param_groups, options: as `ShardedStep` takes them.
        busy: FLOPs that the plan of another domain gave to each rank of the world.

    Raises:
        ValueError: a tied embedding shares its bucket, so that its copies would be cut differently.
        RuntimeError: ranks disagree about a parameter.
    """
    trained = [Member(m.spec, m.param, group) for m, group in zip(members, groups, strict=True)]
    device = buffers[0].grad_data.device
    engine = ShardedStep(trained, param_groups, options, Collectives(ranks.group), device)
    size = dist.get_world_size(ranks.data_parallel)
    cut: list[list[Shard]] = [[] for _ in range(size)]
    parts, gradients = [], []
    for bucket, memory in _buckets(buffers, members):
        shards = cut_buckets([bucket], [member.spec.numel for member in members], size)
        for held, new in zip(cut, shards, strict=True):
            held += new
        place = dict(zip(bucket.tensors, bucket.offsets, strict=True))
        for _, run in groupby(shards[ranks.data_rank], key=lambda shard: members[shard.tensor].spec.rule is None):
            own = list(run)
            starts = [place[shard.tensor] + shard.start for shard in own]
            here = slice(starts[0], place[own[-1].tensor] + own[-1].stop)
            parts.append(Part.over(own, [start - starts[0] for start in starts], memory.param_data[here]))
            gradients.append(memory.grad_data[here])
    held = [cut[data] for data, _ in ranks.coordinates]
    flops = [busy.get(rank, 0) for rank in ranks.world_ranks]
    engine.attach(held, parts, [tensor for _, tensor in ranks.coordinates], flops)
    domain = Domain(members, ranks, engine, cut, gradients)
    domain.mark_masters()
    return domain


def _buckets(buffers: Sequence[Any], members: Sequence[MarkedParameter]) -> list[tuple[Bucket, Any]]:
    """Every bucket with Megatron's own, which has its memory."""
    number = {member.param: tensor for tensor, member in enumerate(members)}
    found = []
    for buffer in buffers:
        for bucket in buffer.buckets:
            placed = sorted(
                (buffer.param_index_map[param][0] - bucket.offset, number[param]) for param in bucket.params_list
            )
            offsets, tensors = zip(*placed, strict=True)
            found.append((Bucket(tensors, offsets, bucket.grad_data.numel()), bucket))
            tied = [members[t].name for t in tensors if getattr(members[t].param, "shared_embedding", False)]
            if tied and len(tensors) > 1:
                raise ValueError(f"parameter {tied[0]!r} is tied over pipeline stages but not alone in its bucket")
    return found


def shard_aligned_param_layout(
    module: nn.Module,
    ddp_config: Any,
    data_parallel_size: int,
    expert_data_parallel_size: int | None = None,
    bucket_size: int | None = None,
) -> Any:
    """A `full_param_layout` for DDP whose buckets are ordered so that few parameters straddle a shard (0.19 on).

    Embeddings and the output layer get a bucket each, so that every rank holds as much of their larger AdamW state.

    Args:
        module: the model chunk, before DDP wraps it.
        ddp_config: that DDP will get.
        data_parallel_size: of the group that cuts dense buckets (with context parallelism).
        expert_data_parallel_size: likewise for experts; None is `data_parallel_size`.
        bucket_size: elements after which a bucket is closed; None for one bucket. Buckets grow to
            data_parallel_size x their largest parameter, for none could lie on one rank otherwise.

    Returns:
        megatron.core's FullParamLayout.
    """
    from megatron.core.distributed.param_and_grad_buffer import group_params_for_buffers
    from megatron.core.optimizer.param_layout import FullParamLayout, PerBufferParamLayout

    params = [param for param in module.parameters() if param.requires_grad]
    layouts = {}
    for key, (members, indices) in group_params_for_buffers(params, ddp_config.grad_reduce_in_fp32).items():
        ranks = data_parallel_size
        if key.is_expert_parallel and expert_data_parallel_size is not None:
            ranks = expert_data_parallel_size
        layout = PerBufferParamLayout(param_indices=indices, num_optimizer_shards=ranks)
        begin = 0
        for number, bucket in enumerate(_in_backward_order(members, ranks, bucket_size)):
            numels = [math.ceil(param.numel() / _START) * _START for param in bucket]
            offsets, end = _pack(numels, ranks, ddp_config.pad_buckets_for_high_nccl_busbw)
            for param, offset in zip(bucket, offsets, strict=True):
                start = begin + offset
                layout.param_index_map[param] = (start, start + param.numel(), number)
            layout.bucket_indices.append((begin, begin + end))
            layout.per_bucket_numel_unpadded.append(sum(param.numel() for param in bucket))
            begin += end
        layouts[key] = layout
    return FullParamLayout(layouts=layouts)


def _pack(numels: Sequence[int], ranks: int, high_bandwidth: bool) -> tuple[list[int], int]:
    """Offsets of parameters in a bucket, and the bucket's end.

    Whole parameters, the largest first, each to the emptiest shard: equal layers then give every rank one of each
    kind, and with it an equal share of Newton-Schulz. Where that would pad too much, shards are filled one by one
    and a parameter straddles wherever none fits.
    """
    from megatron.core.optimizer.param_layout import pad_bucket_end

    filled, places = [0] * ranks, [(0, 0)] * len(numels)
    for index in sorted(range(len(numels)), key=lambda index: (-numels[index], index)):
        rank = filled.index(min(filled))
        places[index] = (rank, filled[rank])
        filled[rank] += numels[index]
    # The end must divide by the ranks and by what NCCL likes.
    end = pad_bucket_end(max(filled) * ranks, ranks * _START, high_bandwidth)
    least = pad_bucket_end(sum(numels), ranks * _START, high_bandwidth)
    if end <= least * _PADDING:
        return [rank * (end // ranks) + at for rank, at in places], end
    # A filler of the padding's size keeps the cuts where the shards were packed.
    (bucket,) = make_buckets([*numels, least - sum(numels)], ranks, bucket_numel=None, aligned=True)
    offsets = dict(zip(bucket.tensors, bucket.offsets, strict=True))
    return [offsets[index] for index in range(len(numels))], least


def _in_backward_order(params: Sequence[nn.Parameter], ranks: int, bucket_size: int | None) -> list[list[nn.Parameter]]:
    """Buckets of parameters in reverse registration order; embeddings and output layers alone."""
    buckets: list[list[nn.Parameter]] = [[]]
    for param in reversed(params):
        alone = getattr(param, "is_embedding_or_output_parameter", False) or getattr(param, "shared_embedding", False)
        numels = [p.numel() for p in buckets[-1]]
        full = bucket_size is not None and sum(numels) >= max(bucket_size, ranks * max(numels, default=0))
        if numels and (alone or full):
            buckets.append([])
        buckets[-1].append(param)
        if alone:
            buckets.append([])
    return [bucket for bucket in buckets if bucket]
