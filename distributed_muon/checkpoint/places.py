"""Which elements of whole parameters a rank's shards hold: a checkpoint is one more reading of the layout.

Elements are counted in the order in which the whole (unsharded) parameter stores them, row by row. A flat shard, a
tensor-parallel slice and a DTensor's box are then a few rectangles each.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from distributed_muon.engine.step import ShardedStep
from distributed_muon.layout.matrices import MatrixRule, TensorSpec
from distributed_muon.layout.pieces import Layout


class Patch(NamedTuple):
    """A rectangle of a whole parameter inside a shard.

    Element (i, j), i < rows, j < cols, is element `offset + i * stride + j` of the flat shard and element
    `at + i * pitch + j` of the flattened parameter. A contiguous run is one row.
    """

    offset: int
    stride: int
    at: int
    pitch: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def end(self) -> int:
        """One past its last element in the parameter."""
        return self.at + (self.rows - 1) * self.pitch + self.cols

    def in_shard(self, flat: Tensor) -> Tensor:
        """Its elements of a flat shard, (rows, cols), without a copy."""
        place = flat.storage_offset() + self.offset
        return flat.as_strided((self.rows, self.cols), (self.stride, 1), place)

    def in_whole(self, flat: Tensor, begin: int) -> Tensor:
        """Its elements of the flattened parameter, of which `flat` begins at element `begin`; without a copy."""
        place = flat.storage_offset() + self.at - begin
        return flat.as_strided((self.rows, self.cols), (self.pitch, 1), place)

    def clipped(self, begin: int, end: int) -> Iterator[Patch]:
        """What of it lies in elements [begin, end) of the parameter."""
        first = max(0, -((self.at + self.cols - 1 - begin) // self.pitch)) if self.rows > 1 else 0
        last = min(self.rows, (end - self.at - 1) // self.pitch + 1) if self.rows > 1 else 1
        row = first
        while row < last:
            at = self.at + row * self.pitch
            left, right = max(0, begin - at), min(self.cols, end - at)
            rows = 1
            if (left, right) == (0, self.cols):  # and all rows after it that are whole, too
                rows = max(1, min(last - row, (end - self.cols - at) // self.pitch + 1))
            if left < right:
                offset = self.offset + row * self.stride + left
                yield Patch(offset, self.stride, at + left, self.pitch, rows, right - left)
            row += rows


class Place(NamedTuple):
    """Where a shard lies in its whole parameter: the parameter's shape, and patches that add up to the shard.

    `first` says whether this is the copy of these elements that is saved, where several ranks hold the same.
    """

    shape: tuple[int, ...]
    patches: tuple[Patch, ...]
    first: bool


@dataclass(frozen=True)
class _AsStored(MatrixRule):
    """The whole parameter instead of its matrices, seen in two dimensions (below a stack) as its own rule sees it."""

    rule: MatrixRule | None

    def view(self, shape: Sequence[int]) -> tuple[int, int, int]:
        if self.rule is not None:
            return self.rule.view(shape)
        return 1, (shape[0] if shape else 1), math.prod(shape[1:])


_known: WeakKeyDictionary[ShardedStep, dict[int, Place]] = WeakKeyDictionary()


def places(engine: ShardedStep) -> dict[int, Place]:
    """By tensor number, where this rank's shards lie; what it holds nothing of is left out."""
    if engine not in _known:  # plans do not change
        _known[engine] = _places(engine)
    return _known[engine]


def _places(engine: ShardedStep) -> dict[int, Place]:
    layout, rank = engine.plan.layout, engine.collectives.rank
    specs = [replace(spec, rule=_AsStored(spec.rule)) for spec in layout.tensors]
    stored = Layout.build(specs, layout.shards, layout.tp_ranks)
    first_matrix: dict[int, int] = {}
    for matrix, tensor in enumerate(stored.tensor_of_matrix):
        first_matrix.setdefault(tensor, matrix)
    found: dict[int, list[Patch]] = defaultdict(list)
    replicas: dict[int, int] = {}
    for piece in stored.pieces_at((stored.columns.rank == rank).nonzero()[0]):
        tensor = layout.shards[rank][piece.shard].tensor
        # The elements of a stack follow each other.
        before = (piece.matrix - first_matrix[tensor]) * stored.matrices[piece.matrix].numel
        patch = Patch(piece.offset, piece.stride, before + piece.at, piece.pitch, piece.rows, piece.cols)
        found[tensor].append(patch)
        replicas[tensor] = piece.replica
    return {
        tensor: Place(whole_shape(layout.tensors[tensor]), tuple(sorted(patches)), not replicas[tensor])
        for tensor, patches in found.items()
    }


def whole_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of the parameter that tensor parallelism cut."""
    shape = list(spec.shape)
    if spec.tp_size > 1:
        shape[spec.tp_dim + max(0, len(shape) - 2)] *= spec.tp_size
    return tuple(shape)


def copy_elements(sources: Iterable[tuple[Tensor, Sequence[Patch]]], target: Tensor, patches: Sequence[Patch]) -> None:
    """Fill a flat shard from others.

    Args:
        sources: flat shards that together hold the whole parameter once, on the CPU; read only where they are needed.
        target: (n,) written in place. patches: its own, that add up to it.
    """
    begin, end = min(patch.at for patch in patches), max(patch.end for patch in patches)
    span = torch.empty(end - begin, dtype=target.dtype)
    for shard, held in sources:
        for part in (part for patch in held for part in patch.clipped(begin, end)):
            part.in_whole(span, begin).copy_(part.in_shard(shard))
    for patch in patches:
        patch.in_shard(target).copy_(patch.in_whole(span, begin))
