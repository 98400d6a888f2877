"""Megatron's sharded state dicts through plain torch.distributed.checkpoint, without megatron's own writers.

`save` and `load` take the same state dicts as megatron.core.dist_checkpointing's, so the checkpoint loads at any
TP x PP x EP x DP too; what is stored is ordinary DCP: one tensor per key, with every rank's rectangles of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    apply_factory_merges,
    is_main_replica,
)
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

_COMMON = "common"


class Rectangles(Tensor):
    """This rank's rectangles of one global tensor, in the form torch.distributed.checkpoint asks for."""

    parts: dict[tuple[int, ...], Tensor]  # offset -> data
    whole: torch.Size

    @staticmethod
    def of(shards: Iterable[ShardedTensor]) -> Rectangles:
        """Views of the data of sharded tensors of one key; prepended axes have extent 1."""
        shards = list(shards)
        rectangles = torch.empty(0, dtype=shards[0].data.dtype).as_subclass(Rectangles)
        rectangles.whole = torch.Size(shards[0].global_shape)
        rectangles.parts = {}
        for shard in shards:
            data = shard.data.detach().contiguous()
            shape = [1] * shard.prepend_axis_num + list(shard.local_shape)
            rectangles.parts[tuple(shard.global_offset)] = data.view(shape)
        return rectangles

    def size(self, dim: int | None = None) -> Any:
        return self.whole if dim is None else self.whole[dim]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(at), data.size()) for at, data in self.parts.items()]

    def __create_write_items__(self, fqn: str, rectangles: Rectangles) -> list[WriteItem]:
        items = []
        for chunk in self.__create_chunk_list__():
            properties = TensorProperties.create_from_tensor(self.parts[tuple(chunk.offsets)])
            data = TensorWriteData(chunk=chunk, properties=properties, size=self.whole)
            items.append(WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        return items

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.parts[tuple(index.offset)]


class Common:
    """Keeps torch.distributed.checkpoint from taking the unsharded part of a state dict apart."""

    def __init__(self, value: Any) -> None:
        self.value = value


def save(sharded_state_dict: dict[str, Any], path: str | Path) -> None:
    """Write a sharded state dict; collective over the world. Its unsharded part is rank 0's.

    Args:
        sharded_state_dict: as of dist_checkpointing.save; its factories are applied in place.
        path: a directory all ranks see.
    """
    apply_factories(sharded_state_dict)
    sharded, common = extract_matching_values(
        sharded_state_dict, lambda v: isinstance(v, (ShardedBase, LocalNonpersistentObject))
    )
    leaves = [leaf for leaf in nested_values(sharded) if isinstance(leaf, ShardedBase)]
    state = _requests(leaf for leaf in leaves if is_main_replica(leaf.replica_id))
    if dist.get_rank() == 0:
        state[_COMMON] = Common(common)
    dcp.save(state, checkpoint_id=path)


def load(sharded_state_dict: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Read what `save` wrote, under any parallelism; collective over the world.

    Args:
        sharded_state_dict: as of dist_checkpointing.load. path: the checkpoint's directory.

    Returns:
        The state dict with loaded tensors in place of sharded ones, and the unsharded part that was saved.
    """
    factories, _ = extract_matching_values(
        sharded_state_dict, lambda v: isinstance(v, ShardedTensorFactory), return_lists_as_dicts=True
    )
    apply_factories(sharded_state_dict)
    sharded, _ = extract_matching_values(
        sharded_state_dict, lambda v: isinstance(v, (ShardedBase, LocalNonpersistentObject))
    )
    state = _requests(leaf for leaf in nested_values(sharded) if isinstance(leaf, ShardedBase))
    state[_COMMON] = Common(None)
    dcp.load(state, checkpoint_id=path)

    def loaded(leaf: Any) -> Any:
        if isinstance(leaf, ShardedTensor):
            return state[leaf.key].parts[tuple(leaf.global_offset)].view(leaf.local_shape)
        return state[leaf.unique_key].value if isinstance(leaf, ShardedObject) else leaf.unwrap()

    dict_list_map_inplace(loaded, sharded)
    return apply_factory_merges(merge(state[_COMMON].value, sharded), factories)


def _is_local(value: Any) -> bool:
    """Whether a value belongs to this rank rather than to the unsharded part."""
    return isinstance(value, (ShardedBase, LocalNonpersistentObject))


def _requests(leaves: Iterable[ShardedBase]) -> dict[str, Any]:
    """DCP's view of sharded tensors and objects, by key."""
    tensors: dict[str, list[ShardedTensor]] = {}
    state: dict[str, Any] = {}
    for leaf in leaves:
        if isinstance(leaf, ShardedTensor):
            tensors.setdefault(leaf.key, []).append(leaf)
        else:
            state[leaf.unique_key] = Common(leaf.data)
    return state | {key: Rectangles.of(shards) for key, shards in tensors.items()}
