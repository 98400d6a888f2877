"""Checkpoints of model and optimizer that load at any number of ranks, through torch.distributed.checkpoint.

Keys are `model.<name>` and `optimizer.<parameter name>.<state>`; they do not depend on the world size, the
layout or the rank. State of a parameter is stored as its flat elements, of which each rank writes and reads
its own shard.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from distributed_muon.native.state_dict import check_groups, export_groups, import_groups
from distributed_muon.optimizer import DistributedMuon


class FlatShard(Tensor):
    """Elements [start, start + n) of a flat tensor of `total`, in the form torch.distributed.checkpoint asks for."""

    start: int
    total: int

    @staticmethod
    def of(tensor: Tensor, start: int, total: int) -> FlatShard:
        """View `tensor` (n,) as the part of a flat (total,) tensor that begins at `start`."""
        shard = tensor.detach().as_subclass(FlatShard)
        shard.start, shard.total = start, total
        return shard

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The flat tensor's size, which torch.distributed.checkpoint compares with the saved one; `shape` is local."""
        return torch.Size([self.total]) if dim is None else self.total

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if not self.numel():
            return []
        return [ChunkStorageMetadata(offsets=torch.Size([self.start]), sizes=self.shape)]

    def __create_write_items__(self, fqn: str, shard: FlatShard) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.as_subclass(Tensor))
        size = torch.Size([self.total])
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=size),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.as_subclass(Tensor)


def save(path: str | Path, model: nn.Module, optimizer: DistributedMuon, extra: dict[str, Any] | None = None) -> None:
    """Write model, optimizer and `extra`; collective over the optimizer's process group.

    The checkpoint appears under `path` only when it is complete; an older one there is replaced then.

    Args:
        path: a directory all ranks see. extra: what else to restore, such as a scheduler's state and the
            step number; rank 0's is written. Must be loadable by torch.load.
    """
    optimizer.wait_params()
    path, group = Path(path), optimizer.collectives.group
    unfinished, old = path.with_name(path.name + ".unfinished"), _replaced(path)
    lead = optimizer.collectives.rank == 0
    _restore_replaced(path, optimizer)
    if lead:
        shutil.rmtree(unfinished, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
    _barrier(optimizer)
    state = _tensors(model, optimizer)
    state["groups"] = json.dumps(
        export_groups(optimizer.sharded_parameters, optimizer.param_groups),
        default=float,  # options may be one-element tensors, such as a learning rate
    )
    state["extra"] = _Opaque(extra or {})
    with _quiet():
        dcp.save(state, checkpoint_id=unfinished, process_group=group, no_dist=not _distributed())
    if lead:
        if path.exists():
            path.rename(old)
        unfinished.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    _barrier(optimizer)


def load(path: str | Path, model: nn.Module, optimizer: DistributedMuon) -> dict[str, Any]:
    """Restore what `save` wrote, at this or another number of ranks; collective over the process group.

    Every parameter is rebuilt from the masters, moments keep their bits, and the groups their options.

    Returns:
        The `extra` that was saved.

    Raises:
        FileNotFoundError: no complete checkpoint under `path`. ValueError: it holds other parameters.
    """
    path = Path(path)
    _restore_replaced(path, optimizer)
    if not (path / ".metadata").is_file():
        raise FileNotFoundError(
            f"no complete checkpoint in {path}: give the directory that checkpoint.save() was given"
        )
    optimizer.wait_params()
    keywords = {"checkpoint_id": path, "process_group": optimizer.collectives.group, "no_dist": not _distributed()}
    header: dict[str, Any] = {"groups": "", "extra": _Opaque({})}
    with _quiet():
        dcp.load(header, **keywords)
    groups = [{k: _tuples(v) for k, v in g.items()} | {"params": g["params"]} for g in json.loads(header["groups"])]
    check_groups(optimizer.sharded_parameters, optimizer.param_groups, groups)
    state = _tensors(model, optimizer)
    with _quiet():
        dcp.load(state, **keywords)
    model.load_state_dict(state["model"])
    import_groups(optimizer.param_groups, groups)
    optimizer.follow_masters()
    return header["extra"].value


def _replaced(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _restore_replaced(path: Path, optimizer: DistributedMuon) -> None:
    """Take the older checkpoint back where a crash came between its removal and the arrival of the new one."""
    if optimizer.collectives.rank == 0:
        if not path.exists() and _replaced(path).exists():
            _replaced(path).rename(path)
        shutil.rmtree(_replaced(path), ignore_errors=True)
    _barrier(optimizer)


class _Opaque:
    """Keeps torch.distributed.checkpoint from taking a dictionary apart."""

    def __init__(self, value: dict[str, Any]) -> None:
        self.value = value


def _tensors(model: nn.Module, optimizer: DistributedMuon) -> dict[str, Any]:
    """Every tensor of a checkpoint, as views of the live state."""
    state: dict[str, Any] = {}
    for p in optimizer.sharded_parameters:
        state[p.name] = {
            key: FlatShard.of(value, p.start, p.param.numel()) if value.ndim else value
            for key, value in p.saved.items()
        }
    return {"model": model.state_dict(), "optimizer": state}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _quiet() -> Iterator[None]:
    """One process without torch.distributed is a supported way to run, not a reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _barrier(optimizer: DistributedMuon) -> None:
    optimizer.collectives.gather_objects(None)
