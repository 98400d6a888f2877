"""Who holds which elements: buckets, the shards that cut them, and the pieces of every matrix.

A *layout* lists, for every rank of a rank domain, its shards (contiguous runs of the rank-local
tensors) and derives from them the *pieces*: the rectangle of each matrix that each shard holds.
Flat buffers, Megatron's buckets, DeepSpeed's partitions and tensor-parallel slices differ only in
the shards they list. Pure Python, so thousands of ranks can be planned on a laptop.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from distributed_muon.layout.matrices import Matrix, Rectangle, TensorSpec


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
        pieces: every rectangle of a matrix inside a shard, ordered by matrix, then rank.
    """

    tensors: tuple[TensorSpec, ...]
    shards: tuple[tuple[Shard, ...], ...]
    tp_ranks: tuple[int, ...]
    matrices: tuple[Matrix, ...]
    pieces: tuple[Piece, ...]

    @property
    def world(self) -> int:
        """Number of ranks in the domain."""
        return len(self.shards)

    @cached_property
    def tensor_of_matrix(self) -> list[int]:
        """Per matrix, the number of the tensor it is part of."""
        return [tensor for tensor, spec in enumerate(self.tensors) for _ in spec.matrices()]

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
    ) -> Layout:
        """Derive matrices and pieces, and check that every matrix element has exactly one sender.

        Args:
            tensors: the rank-local tensors, as on any rank (TP ranks hold equal shapes).
            shards: per domain rank, the shards it holds.
            tp_ranks: per domain rank, its TP rank; None means no tensor parallelism.

        Raises:
            ValueError: the shards leave elements of a matrix out, or hold them twice.
        """
        tp_ranks = tuple(tp_ranks) if tp_ranks is not None else (0,) * len(shards)
        matrices: list[Matrix] = []
        first: list[int] = []
        for spec in tensors:
            first.append(len(matrices))
            matrices += spec.matrices()
        blocks: dict[tuple[int, int], tuple[list[Rectangle], list[int]]] = {}
        pieces: list[Piece] = []
        for rank, held in enumerate(shards):
            for index, shard in enumerate(held):
                spec = tensors[shard.tensor]
                if spec.rule is None:
                    continue
                key = (shard.tensor, tp_ranks[rank] if spec.tp_size > 1 else 0)
                if key not in blocks:
                    found = spec.rectangles(key[1])
                    blocks[key] = found, list(accumulate((b.local_row + b.rows for b in found), max))
                replica = tp_ranks[rank] if spec.tp_size == 1 else 0
                where = (first[shard.tensor], rank, index, replica)
                pieces += _cut(shard, spec.view[2], *blocks[key], matrices, *where)
        pieces.sort(key=lambda p: (p.matrix, p.rank, p.shard, p.offset))
        layout = Layout(tuple(tensors), tuple(map(tuple, shards)), tp_ranks, tuple(matrices), tuple(pieces))
        layout._check_coverage()
        return layout

    def with_teams(self, sizes: Sequence[int]) -> Layout:
        """The same shards with matrix m of this layout cut into sizes[m] blocks of its long side."""
        tensors, at = [], 0
        for spec in self.tensors:
            count = len(spec.matrices())
            tensors.append(replace(spec, teams=tuple(sizes[at : at + count])))
            at += count
        return Layout.build(tensors, self.shards, self.tp_ranks)

    def _check_coverage(self) -> None:
        covered = [0] * len(self.matrices)
        for piece in self.pieces:
            if piece.replica == 0:
                covered[piece.matrix] += piece.numel
        for matrix, count in zip(self.matrices, covered, strict=True):
            if count != matrix.numel:
                raise ValueError(
                    f"layout holds {count} of the {matrix.numel} elements of matrix {matrix.name!r}: "
                    "every element must lie in exactly one rank's shard"
                )


def _cut(
    shard: Shard,
    width: int,
    blocks: list[Rectangle],
    last_rows: list[int],
    matrices: Sequence[Matrix],
    first_matrix: int,
    rank: int,
    index: int,
    replica: int,
) -> Iterator[Piece]:
    """The pieces of `shard` in a tensor whose local 2-D view is `width` wide."""
    if shard.start >= shard.stop:
        return
    # last_rows[i] is where the first i + 1 blocks end: all blocks before this one end above the shard.
    for block in blocks[bisect_right(last_rows, shard.start // width) :]:
        base = block.local_row * width + block.local_col
        if block.local_row * width >= shard.stop:
            return
        matrix = first_matrix + block.matrix
        pitch = matrices[matrix].cols
        target = block.row * pitch + block.col

        def piece(
            row: int, rows: int, low: int, cols: int, *, base: int = base, matrix: int = matrix, pitch: int = pitch,
            target: int = target,
        ) -> Piece:  # fmt: skip
            offset = base + row * width + low - shard.start
            return Piece(matrix, rank, index, offset, width, target + row * pitch + low, pitch, rows, cols, replica)

        if block.cols == width == pitch:  # whole rows on both sides: one contiguous run
            low, high = max(shard.start - base, 0), min(shard.stop - base, block.rows * width)
            if low < high:
                run = piece(0, 1, low, high - low)
                yield run._replace(stride=high - low, pitch=high - low)
            continue
        row = max(0, (shard.start - block.cols - base) // width + 1)
        stop = min(block.rows, -((base - shard.stop) // width))
        while row < stop:
            begins = base + row * width
            low, high = max(0, shard.start - begins), min(block.cols, shard.stop - begins)
            if (low, high) != (0, block.cols):
                yield piece(row, 1, low, high - low)
                row += 1
                continue
            whole = min(stop, (shard.stop - base - block.cols) // width + 1) - row
            yield piece(row, whole, 0, block.cols)
            row += whole
