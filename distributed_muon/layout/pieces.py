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
    """Flat elements [start, stop) of rank-local tensor number `tensor`, held by one rank.

    Where several ranks hold the same elements (HSDP), one of them has `replica` 0: it sends them to the home and
    counts them in norms, the others only get updates.
    """

    tensor: int
    start: int
    stop: int
    replica: int = 0


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
    replica: int  # 0: the copy that travels to the home; others (of replicated tensors) only get updates

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
        holders: list[dict[int, int]] = [{} for _ in self.matrices]
        columns = (self.columns.matrix, self.columns.rank, self.columns.numel)
        for matrix, rank, numel in zip(*(column.tolist() for column in columns), strict=True):
            holders[matrix][rank] = holders[matrix].get(rank, 0) + numel
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
        matrices: list[Matrix] = []
        tensor_of_matrix: list[int] = []
        # The elements of all tensors with matrices stand on one line, those of a tensor that tensor parallelism cut
        # once per TP rank. `lines` says where a tensor begins on it.
        lines = np.full((len(tensors), max(tp_ranks, default=0) + 1), -1)
        rectangles: list[tuple[int, ...]] = []
        line = at = 0
        for number, spec in enumerate(tensors):
            whole = blocks = spec.matrices()
            for tp_rank in range(lines.shape[1] if spec.tp_size > 1 else 1) if whole else ():
                found: Sequence[Rectangle] = spec.rectangles(tp_rank)
                if team_sizes is not None:
                    blocks, found = cut_into_blocks(whole, found, team_sizes[at : at + len(whole)])
                head = (line, spec.view[2], len(matrices))
                rectangles += [head + rectangle for rectangle in found]
                lines[number, tp_rank:] = line
                line += spec.numel
            at += len(whole)
            matrices += blocks
            tensor_of_matrix += [number] * len(blocks)
        replicated = np.array([spec.tp_size == 1 for spec in tensors], bool)
        placed = _placed_shards(shards, np.array(tp_ranks, int), lines, replicated)
        columns = _meet(placed, _placed_rectangles(rectangles, matrices))
        own = tuple(map(tuple, shards))
        layout = Layout(tuple(tensors), own, tp_ranks, tuple(matrices), tuple(tensor_of_matrix), columns)
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


def _table(rows: Sequence[tuple[int, ...]], width: int) -> np.ndarray:
    """Rows of `width` numbers as `width` columns."""
    return np.fromiter(chain.from_iterable(rows), np.int64, len(rows) * width).reshape(-1, width).T


def _placed_shards(
    shards: Sequence[Sequence[Shard]], tp_ranks: np.ndarray, lines: np.ndarray, replicated: np.ndarray
) -> np.ndarray:
    """Columns (start, stop, rank, number of the shard, replica) of the shards that stand on the line, see `build`."""
    rank = np.repeat(np.arange(len(shards)), [len(own) for own in shards])
    number = np.fromiter(chain.from_iterable(range(len(own)) for own in shards), np.int64, len(rank))
    tensor, start, stop, replica = _table(list(chain.from_iterable(shards)), 4)
    line, replica = lines[tensor, tp_ranks[rank]], replica + np.where(replicated[tensor], tp_ranks[rank], 0)
    return np.stack([line + start, line + stop, rank, number, replica])[:, (line >= 0) & (start < stop)]


def _placed_rectangles(rectangles: Sequence[tuple[int, ...]], matrices: Sequence[Matrix]) -> np.ndarray:
    """Columns (begin, matrix, at, width, pitch, rows, cols): `begin` on the line, the others as in Piece."""
    line, width, first, matrix, local_row, local_col, row, col, rows, cols = _table(rectangles, 10)
    matrix = first + matrix
    pitch = np.array([matrix.cols for matrix in matrices], np.int64)[matrix]
    return np.stack([line + local_row * width + local_col, matrix, row * pitch + col, width, pitch, rows, cols])


def _meet(shards: np.ndarray, rectangles: np.ndarray) -> Piece:
    """Columns of the pieces, from those of shards and of rectangles; the rectangles ascend on the line.

    A shard that begins and ends inside a rectangle's rows holds up to three pieces of it: what is left of the first
    row, the whole rows, and what it reaches of the last.
    """
    begin, _, _, width, _, rows, cols = rectangles
    ends = np.maximum.accumulate(begin + (rows - 1) * width + cols)
    low, high = np.searchsorted(ends, shards[0], side="right"), np.searchsorted(begin, shards[1])
    count = high - low
    shard = np.repeat(np.arange(len(count)), count)
    near = np.arange(len(shard)) + (low + count - np.cumsum(count))[shard]
    start, stop, rank, number, replica = shards[:, shard]
    begin, matrix, at, width, pitch, rows, cols = rectangles[:, near]
    # Where both sides have whole rows the rectangle is one contiguous run, a single long row.
    run = (cols == width) & (width == pitch)
    cols, rows = np.where(run, rows * cols, cols), np.where(run, 1, rows)
    width = np.where(run, cols, width)
    first = np.maximum((start - begin - cols) // width + 1, 0)
    last = np.minimum(-((begin - stop) // width), rows) - 1
    left = np.maximum(start - begin - first * width, 0)
    right = np.minimum(stop - begin - last * width, cols)
    single, several = first == last, first < last
    head, tail = single | several & (left > 0), several & (right < cols)
    body = last - first + 1 - head - tail
    none = np.zeros_like(rows)
    parts = (  # where there is such a piece, then its first row, rows, first column and end of columns
        (head, first, none + 1, left, np.where(single, right, cols)),
        (body > 0, first + head, body, none, cols),
        (tail, last, none + 1, none, right),
    )
    pair, row, rows, left, right = np.concatenate(
        [np.stack([np.flatnonzero(there), *(column[there] for column in part)]) for there, *part in parts], axis=1
    )
    offset, at = (begin - start)[pair] + row * width[pair] + left, at[pair] + row * pitch[pair] + left
    cols = right - left
    stride, pitch = np.where(run[pair], cols, width[pair]), np.where(run[pair], cols, pitch[pair])
    held = (matrix[pair], rank[pair], number[pair])
    order = np.lexsort((offset, *reversed(held)))
    return Piece._make(column[order] for column in (*held, offset, stride, at, pitch, rows, cols, replica[pair]))
