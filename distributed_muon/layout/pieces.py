"""Who holds which elements: the shards of every rank, and the pieces of every matrix that follow from them.

A *layout* lists, for every rank of a rank domain, its shards (contiguous runs of the rank-local tensors) and
derives the *pieces*: the rectangles of each matrix that each shard holds. Flat buffers, Megatron's buckets,
DeepSpeed's partitions and tensor-parallel slices differ only in the shards they list. Kimi-K2 cut 64 ways has
a million pieces, so they are kept as columns of numbers and computed all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np

from distributed_muon.layout.matrices import Matrix, Rectangle, TensorSpec
from distributed_muon.layout.teams import cut_into_blocks


class Shard(NamedTuple):
    """Flat elements [start, stop) of rank-local tensor number `tensor`, held by one rank."""

    tensor: int
    start: int
    stop: int


class Piece(NamedTuple):
    """A rectangle of a matrix inside one shard of one rank.

    Element (i, j), i < rows, j < cols, is element `offset + i * stride + j` of the shard and element
    `at + i * pitch + j` of the flattened matrix. A contiguous run is one row.
    """

    matrix: int
    rank: int
    shard: int
    offset: int
    stride: int
    at: int
    pitch: int
    rows: int
    cols: int
    replica: int  # 0: the copy that travels to the home; others (TP-replicated tensors) only get updates

    @property
    def numel(self) -> int:
        return self.rows * self.cols


@dataclass(frozen=True)
class Layout:
    """The shards of every rank of a domain, and the matrices and pieces that follow from them.

    Args:
        tensors: the rank-local tensors, in registration (forward) order, the same on every rank.
        shards: for each rank of the domain, the shards it holds.
        tp_ranks: for each rank of the domain, its tensor-parallel rank (all 0 without TP).
        matrices: every matrix of every tensor, in tensor order.
        tensor_of_matrix: per matrix, the number of the tensor it is part of.
        columns: all pieces as one Piece of int64 arrays, ordered by matrix, then rank: piece i is in rows i.
    """

    tensors: tuple[TensorSpec, ...]
    shards: tuple[tuple[Shard, ...], ...]
    tp_ranks: tuple[int, ...]
    matrices: tuple[Matrix, ...]
    tensor_of_matrix: tuple[int, ...]
    columns: Piece = field(compare=False, repr=False)

    @property
    def world(self) -> int:
        """Number of ranks in the domain."""
        return len(self.shards)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Every rectangle of a matrix inside a shard, one by one; for a large model the columns are cheaper."""
        return self.pieces_at(np.arange(len(self.columns.matrix)))

    def pieces_at(self, numbers: np.ndarray) -> tuple[Piece, ...]:
        """The pieces of these numbers."""
        return tuple(map(Piece._make, zip(*(column[numbers].tolist() for column in self.columns), strict=True)))

    @cached_property
    def holders(self) -> list[dict[int, int]]:
        """For each matrix, how many of its elements each rank holds, by rank."""
        keys = self.columns.matrix * self.world + self.columns.rank  # ascending, as the pieces are
        begins = np.flatnonzero(np.diff(keys, prepend=-1))
        numels = np.add.reduceat(self.columns.numel, begins) if len(begins) else begins
        holders: list[dict[int, int]] = [{} for _ in self.matrices]
        columns = (self.columns.matrix[begins], self.columns.rank[begins], numels)
        for matrix, rank, numel in zip(*(column.tolist() for column in columns), strict=True):
            holders[matrix][rank] = numel
        return holders

    @cached_property
    def together(self) -> list[range]:
        """Matrix numbers that are orthogonalized together, in order: the blocks of a team, or one whole matrix."""
        runs, at = [], 0
        while at < len(self.matrices):
            runs.append(range(at, at + self.matrices[at].team))
            at = runs[-1].stop
        return runs

    @staticmethod
    def build(
        tensors: Sequence[TensorSpec],
        shards: Sequence[Sequence[Shard]],
        tp_ranks: Sequence[int] | None = None,
        team_sizes: Sequence[int] | None = None,
    ) -> Layout:
        """Derive matrices and pieces, and check that every matrix element has exactly one sender.

        Args:
            tensors: the rank-local tensors, as on any rank (TP ranks hold equal shapes).
            shards: per domain rank, the shards it holds.
            tp_ranks: per domain rank, its TP rank; None means no tensor parallelism.
            team_sizes: per matrix of the tensors, the blocks it is cut into; None leaves all whole.

        Raises:
            ValueError: the shards leave elements of a matrix out, or hold them twice.
        """
        tp_ranks = tuple(tp_ranks) if tp_ranks is not None else (0,) * len(shards)
        tp = max(tp_ranks, default=0) + 1
        matrices: list[Matrix] = []
        tensor_of_matrix: list[int] = []
        rectangles: list[tuple[int, ...]] = []  # (slot, width of the tensor, Rectangle) by slot: tensor and TP rank
        at = 0
        for number, spec in enumerate(tensors):
            whole = blocks = spec.matrices()
            for tp_rank in range(tp if whole and spec.tp_size > 1 else bool(whole)):
                found: Sequence[Rectangle] = spec.rectangles(tp_rank)
                if team_sizes is not None:
                    blocks, found = cut_into_blocks(whole, found, team_sizes[at : at + len(whole)])
                head = (number * tp + tp_rank, spec.view[2], len(matrices))
                rectangles += [head + rectangle for rectangle in found]
            at += len(whole)
            matrices += blocks
            tensor_of_matrix += [number] * len(blocks)
        columns = _pieces(tensors, shards, np.array(tp_ranks, int), matrices, _table(rectangles, 10))
        layout = Layout(
            tuple(tensors), tuple(map(tuple, shards)), tp_ranks, tuple(matrices), tuple(tensor_of_matrix), columns
        )
        layout._check_coverage()
        return layout

    def with_teams(self, sizes: Sequence[int]) -> Layout:
        """The same shards with matrix m of this layout cut into sizes[m] blocks of its long side."""
        return Layout.build(self.tensors, self.shards, self.tp_ranks, sizes)

    def _check_coverage(self) -> None:
        covered = np.zeros(len(self.matrices), np.int64)
        senders = self.columns.replica == 0
        np.add.at(covered, self.columns.matrix[senders], self.columns.numel[senders])
        for matrix, count in zip(self.matrices, covered.tolist(), strict=True):
            if count != matrix.numel:
                raise ValueError(
                    f"layout holds {count} of the {matrix.numel} elements of matrix {matrix.name!r}: "
                    "every element must lie in exactly one rank's shard"
                )


def expand(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ranges [first[i], first[i] + count[i]) one after the other: for each element its i, and itself."""
    owner = np.repeat(np.arange(len(count)), count)
    before = np.cumsum(count) - count
    return owner, np.arange(len(owner)) + (first - before)[owner]


def _table(rows: Sequence[tuple[int, ...]], width: int) -> np.ndarray:
    """Rows of `width` numbers as `width` columns."""
    return np.fromiter(chain.from_iterable(rows), np.int64, len(rows) * width).reshape(-1, width).T


def _pieces(
    tensors: Sequence[TensorSpec],
    shards: Sequence[Sequence[Shard]],
    tp_ranks: np.ndarray,
    matrices: Sequence[Matrix],
    rectangles: np.ndarray,
) -> Piece:
    """Columns of the pieces: every shard meets the rectangles of its tensor.

    Args:
        rectangles: columns (slot, width of the tensor, its first matrix, then those of Rectangle), by slot.
    """
    tp = tp_ranks.max(initial=0) + 1
    # Shards of parameters with matrices, with who holds them.
    held = [len(own) for own in shards]
    rank, index = expand(np.zeros(len(held), int), np.array(held, int))
    tensor, start, stop = _table(list(chain.from_iterable(shards)), 3)
    cut = np.array([spec.tp_size > 1 for spec in tensors], bool)[tensor]
    known = np.isin(tensor, rectangles[0] // tp) & (start < stop)
    rank, index, tensor, start, stop, cut = (column[known] for column in (rank, index, tensor, start, stop, cut))
    slot = tensor * tp + np.where(cut, tp_ranks[rank], 0)
    replica = np.where(cut, 0, tp_ranks[rank])
    # Rows of all slots on one line, a slot after the other: rectangles are searched for by their place on it.
    slots, widths, firsts, number, local_row, local_col, row, col, rows, cols = rectangles
    span = (local_row + rows).max(initial=0) + 1
    width = widths[np.searchsorted(slots, slot)]
    ends = np.maximum.accumulate(slots * span + local_row + rows)
    low = np.searchsorted(ends, slot * span + start // width, side="right")
    high = np.searchsorted(slots * span + local_row, slot * span - (-stop // width))
    shard, which = expand(low, np.maximum(high - low, 0))
    pitch = np.array([matrix.cols for matrix in matrices], np.int64)[firsts + number]
    geometry = (local_row * widths + local_col, row * pitch + col, widths, pitch, rows, cols)
    pair, *geometry = _meet(start[shard], stop[shard], *(column[which] for column in geometry))
    shard, which = shard[pair], which[pair]
    piece = Piece((firsts + number)[which], rank[shard], index[shard], *geometry, replica[shard])
    order = np.lexsort((piece.offset, piece.shard, piece.rank, piece.matrix))
    return Piece._make(column[order] for column in piece)


def _meet(
    start: np.ndarray,
    stop: np.ndarray,
    begin: np.ndarray,
    at: np.ndarray,
    width: np.ndarray,
    pitch: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """What shards hold of rectangles: up to three pieces each, a part of the first row, whole rows, and of the last.

    Args:
        start, stop: of the shard in its tensor, whose rows are `width` long.
        begin, at: first element of the rectangle in the tensor and in its matrix, whose rows are `pitch` long.

    Returns:
        For each piece the number of the pair it comes from, then offset, stride, at, pitch, rows and cols of Piece.
    """
    # Whole rows on both sides are one contiguous run: one row.
    run = (cols == width) & (width == pitch)
    cols, width, rows = np.where(run, rows * cols, cols), np.where(run, rows * cols, width), np.where(run, 1, rows)
    first = np.maximum((start - begin - cols) // width + 1, 0)
    last = np.minimum(-((begin - stop) // width), rows) - 1
    left = np.maximum(start - begin - first * width, 0)
    right = np.minimum(stop - begin - last * width, cols)
    one, several = first == last, first < last
    head, tail = one | several & (left > 0), several & (right < cols)
    body = last - first + 1 - head - tail
    parts = (  # which pairs, then per pair: first row, rows, first column, end of the columns
        (head, first, np.ones_like(rows), left, np.where(one, right, cols)),
        (body > 0, first + head, body, np.zeros_like(rows), cols),
        (tail, last, np.ones_like(rows), np.zeros_like(rows), right),
    )
    pair = np.concatenate([np.flatnonzero(mask) for mask, *_ in parts])
    row, count, left, right = (np.concatenate([part[column][part[0]] for part in parts]) for column in range(1, 5))
    run, width, pitch, numel = run[pair], width[pair], pitch[pair], right - left
    offset = (begin - start)[pair] + row * width + left
    stride, pitch_out = np.where(run, numel, width), np.where(run, numel, pitch)
    return pair, offset, stride, at[pair] + row * pitch + left, pitch_out, count, numel
