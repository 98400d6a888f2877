"""A parameter and its matrices: what Newton-Schulz is applied to, tensor parallelism included.

A *rule* says how the whole (unsharded) parameter divides into matrices. `TensorSpec` adds how tensor
parallelism cut it. `rectangles()` then answers the one question the layout asks: which rectangle of the
rank-local tensor is which rectangle of which matrix. Pure Python; nothing here touches torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

Range = tuple[int, int]  # [start, stop)


class Matrix(NamedTuple):
    """One matrix Newton-Schulz is applied to, or one block of a matrix that a team of ranks shares.

    `rows` and `cols` are logical (global, unpadded). A block is one of `team` consecutive parts of the
    long side of the matrix of shape `whole`.
    """

    name: str
    rows: int
    cols: int
    team: int = 1
    whole: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def logical_shape(self) -> tuple[int, int]:
        """Shape of the whole matrix, which sets the scale of its update."""
        return self.whole or self.shape


class Region(NamedTuple):
    """One matrix of a rule: rows `row_ranges` (concatenated in order) and columns `cols` of the 2-D view."""

    suffix: str
    row_ranges: tuple[Range, ...]
    cols: Range

    @property
    def shape(self) -> tuple[int, int]:
        return sum(stop - start for start, stop in self.row_ranges), self.cols[1] - self.cols[0]


class Rectangle(NamedTuple):
    """A rectangle of the rank-local 2-D view that is a rectangle of matrix `matrix` of the parameter."""

    matrix: int
    local_row: int
    local_col: int
    row: int
    col: int
    rows: int
    cols: int


@dataclass(frozen=True)
class MatrixRule:
    """How a whole (unsharded) parameter divides into matrices; a rule overrides what does not fit it."""

    def view(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(stack, rows, cols) of a parameter of `shape`; raises ValueError where the rule does not fit."""
        if len(shape) != 2:
            raise ValueError(f"shape {tuple(shape)} is not 2-D: give the group matrices=Conv() or Experts()")
        return 1, shape[0], shape[1]

    def regions(self, rows: int, cols: int) -> list[Region]:
        """The matrices inside one (rows, cols) element of the stack."""
        return [Region("", ((0, rows),), (0, cols))]


@dataclass(frozen=True)
class Whole(MatrixRule):
    """The 2-D parameter is one matrix."""


@dataclass(frozen=True)
class Conv(MatrixRule):
    """A convolution kernel (out, in, k...) is one matrix of out x (in * k * ...), Keller Jordan's flattening."""

    def view(self, shape: Sequence[int]) -> tuple[int, int, int]:
        if len(shape) < 3:
            raise ValueError(f"shape {tuple(shape)} is not a convolution kernel: matrices=Conv() wants 3-D or more")
        return 1, shape[0], math.prod(shape[1:])


@dataclass(frozen=True)
class Split(MatrixRule):
    """A fused 2-D parameter: `sizes` consecutive rows (dim 0) or columns (dim 1) are a matrix each.

    Gate/up is `Split((ffn, ffn))`; query, key and value stored one after the other are
    `Split((q, k, v))`.
    """

    sizes: tuple[int, ...] = ()
    dim: int = 0
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))  # rules are hashed, and lists would not be
        object.__setattr__(self, "names", tuple(self.names))

    def regions(self, rows: int, cols: int) -> list[Region]:
        extent = cols if self.dim else rows
        if sum(self.sizes) != extent or min(self.sizes, default=0) < 1:
            raise ValueError(f"Split sizes {self.sizes} do not add up to the {extent} of dim {self.dim}")
        names = self.names or tuple(str(i) for i in range(len(self.sizes)))
        if len(names) != len(self.sizes):
            raise ValueError(f"Split has {len(self.sizes)} sizes but {len(names)} names")
        out, start = [], 0
        for name, size in zip(names, self.sizes, strict=True):
            span = (start, start + size)
            out.append(Region(name, ((0, rows),), span) if self.dim else Region(name, (span,), (0, cols)))
            start += size
        return out


@dataclass(frozen=True)
class QKV(MatrixRule):
    """Fused attention input, interleaved by query group: rows [q x (heads/groups), (gate), k, v] per group.

    The layout of Megatron's linear_qkv. Query, (gate,) key and value become a matrix each, over all
    groups; with `per_group=True` each of them in each group is a matrix of its own.

    Args:
        heads: query heads. groups: key/value groups. head_dim: rows of one query or key head.
        value_dim: rows of one value head, head_dim if None.
        gate: an output gate of the query's size follows each group's query (attention_output_gate).
    """

    heads: int = 1
    groups: int = 1
    head_dim: int = 1
    value_dim: int | None = None
    gate: bool = False
    per_group: bool = False

    def regions(self, rows: int, cols: int) -> list[Region]:
        if self.groups < 1 or self.heads % self.groups:
            raise ValueError(f"QKV heads {self.heads} is not a multiple of groups {self.groups}")
        query = self.heads // self.groups * self.head_dim
        value = self.head_dim if self.value_dim is None else self.value_dim
        sizes = {"q": query, **({"gate": query} if self.gate else {}), "k": self.head_dim, "v": value}
        stride = sum(sizes.values())
        if stride * self.groups != rows:
            raise ValueError(f"QKV of {self.groups} groups x {stride} rows does not add up to {rows} rows")
        spans: dict[str, list[Range]] = {}
        for group in range(self.groups):
            start = group * stride
            for name, size in sizes.items():
                key = f"{name}{group}" if self.per_group else name
                spans.setdefault(key, []).append((start, start + size))
                start += size
        return [Region(name, tuple(ranges), (0, cols)) for name, ranges in spans.items()]


@dataclass(frozen=True)
class Experts(MatrixRule):
    """A stack (experts, rows, cols): every expert is its own 2-D parameter under the rule `inner`."""

    inner: MatrixRule = field(default_factory=Whole)

    def view(self, shape: Sequence[int]) -> tuple[int, int, int]:
        if len(shape) != 3:
            raise ValueError(f"shape {tuple(shape)} is not an expert stack: matrices=Experts() wants 3-D")
        return shape[0], shape[1], shape[2]

    def regions(self, rows: int, cols: int) -> list[Region]:
        return self.inner.regions(rows, cols)


@dataclass(frozen=True)
class TensorSpec:
    """A rank-local parameter as the planner sees it.

    Args:
        name: unique parameter name; keys of state and checkpoints.
        shape: shape of the rank-local tensor.
        rule: how the whole parameter divides into matrices; None for AdamW parameters.
        tp_dim: dimension of the 2-D view (within one expert) that tensor parallelism cut; None if replicated.
        tp_size: ranks it was cut over (1: every TP rank holds all of it).
        tp_stride: interleaved parts per rank; 2 where a rank holds [gate_r; up_r] of a fused [gate; up].
    """

    name: str
    shape: tuple[int, ...]
    rule: MatrixRule | None = None
    tp_dim: int | None = None
    tp_size: int = 1
    tp_stride: int = 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def view(self) -> tuple[int, int, int]:
        """(stack, rows, cols) of the rank-local tensor."""
        assert self.rule is not None
        return self._ask(self.rule.view, self.shape)

    def matrices(self) -> list[Matrix]:
        """The parameter's matrices, in the order that `Rectangle.matrix` counts them. Empty for AdamW."""
        if self.rule is None:
            return []
        parts = self._ask(_parts, self.rule, self.shape, self.tp_dim, self.tp_size)
        return [Matrix(self.name + suffix, rows, cols) for suffix, (rows, cols), _, _ in parts]

    def rectangles(self, tp_rank: int) -> tuple[Rectangle, ...]:
        """Where the elements held by `tp_rank` lie in the matrices, in the order of the local rows."""
        if self.rule is None:
            return ()
        return self._ask(_rectangles, self.rule, self.shape, self.tp_dim, self.tp_size, self.tp_stride, tp_rank)

    def _ask(self, question: Callable[..., Any], *args: Any) -> Any:
        """The answer of a rule, whose errors then name the parameter."""
        try:
            return question(*args)
        except ValueError as error:
            raise ValueError(f"parameter {self.name!r}: {error}") from None


# Layers repeat the same few shapes, so what a shape divides into is worked out once.
@lru_cache(maxsize=4096)
def _parts(
    rule: MatrixRule, shape: tuple[int, ...], tp_dim: int | None, tp_size: int
) -> tuple[tuple[str, tuple[int, int], int, Region], ...]:
    """(suffix of its name, shape, stack index, region within one element of the stack) of each matrix."""
    stack, rows, cols = rule.view(shape)
    rows *= tp_size if tp_dim == 0 else 1
    cols *= tp_size if tp_dim == 1 else 1
    if not rows or not cols:
        return ()
    regions, out = rule.regions(rows, cols), []
    for index in range(stack):
        for region in regions:
            tags = ([str(index)] if stack > 1 else []) + ([region.suffix] if region.suffix else [])
            out.append((f"[{','.join(tags)}]" if tags else "", region.shape, index, region))
    return tuple(out)


@lru_cache(maxsize=4096)
def _rectangles(
    rule: MatrixRule, shape: tuple[int, ...], tp_dim: int | None, tp_size: int, tp_stride: int, tp_rank: int
) -> tuple[Rectangle, ...]:
    """See `TensorSpec.rectangles`."""
    _, rows, cols = rule.view(shape)
    row_map, col_map = (
        _placement(extent, tp_size, tp_stride, tp_rank) if dim == tp_dim and tp_size > 1 else [(0, 0, extent)]
        for dim, extent in enumerate((rows, cols))
    )
    out = []
    for matrix, (_, _, index, region) in enumerate(_parts(rule, shape, tp_dim, tp_size)):
        row = 0
        for span in region.row_ranges:
            for local_row, top, height in _overlaps(row_map, span):
                for local_col, left, width in _overlaps(col_map, region.cols):
                    corner = (index * rows + local_row, local_col, row + top - span[0], left - region.cols[0])
                    out.append(Rectangle(matrix, *corner, height, width))
            row += span[1] - span[0]
    return tuple(sorted(out, key=lambda r: (r.local_row, r.local_col)))


def _placement(extent: int, tp_size: int, tp_stride: int, tp_rank: int) -> list[tuple[int, int, int]]:
    """(local start, global start, length) of each interleaved part along the dimension that is cut."""
    if extent % tp_stride:
        raise ValueError(f"{extent} does not divide into tp_stride {tp_stride}")
    part = extent // tp_stride
    return [(i * part, (i * tp_size + tp_rank) * part, part) for i in range(tp_stride)]


def _overlaps(placement: list[tuple[int, int, int]], span: Range) -> list[tuple[int, int, int]]:
    """(local start, global start, length) of each placed part's intersection with the global `span`."""
    out = []
    for local, start, length in placement:
        low, high = max(start, span[0]), min(start + length, span[1])
        if low < high:
            out.append((local + low - start, low, high - low))
    return out
