"""DTensor shards as a layout: which elements of every parameter each rank of a mesh holds.

A rank's shard is a box of the global tensor, an interval per dimension. The planner wants contiguous runs of a flat
tensor, so a tensor is thought of as stored box after box: FSDP's rows are then runs of the tensor itself, and what
column cuts scatter is told by `BlockSpec`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distributed_muon.layout.matrices import Range, Rectangle, TensorSpec
from distributed_muon.layout.pieces import Shard

Box = tuple[Range, ...]  # per dimension


@dataclass(frozen=True)
class BlockSpec(TensorSpec):
    """A tensor of global `shape` stored as `boxes`, one after the other, because columns are cut as well.

    Args:
        boxes: the distinct boxes that ranks hold, in storage order.
    """

    boxes: tuple[Box, ...] = ()

    @property
    def view(self) -> tuple[int, int, int]:
        """Rows of one box's width; where boxes differ in width, a single row."""
        widths = {cols[1] - cols[0] for *_, cols in self._blocks()}
        width = widths.pop() if len(widths) == 1 else self.numel
        return 1, self.numel // width, width

    def rectangles(self, tp_rank: int) -> tuple[Rectangle, ...]:
        """Where the stored elements lie in the matrices, in the order in which they are stored."""
        _, rows, cols = self.rule.view(self.shape)
        regions, width = self.rule.regions(rows, cols), self.view[2]
        out, at = [], 0
        for stack, (top, bottom), (left, right) in self._blocks():
            pitch = right - left
            for index in range(*stack):
                for number, region in enumerate(regions, index * len(regions)):
                    before = 0
                    for low, high in region.row_ranges:
                        row, col = max(low, top), max(region.cols[0], left)
                        height, length = min(high, bottom) - row, min(region.cols[1], right) - col
                        place = at + (row - top) * pitch + col - left
                        corner = before + row - low, col - region.cols[0]
                        if height > 0 and length > 0 and pitch == width:
                            out.append(Rectangle(number, *divmod(place, width), *corner, height, length))
                        elif length > 0:  # a row of the box is no row of the view
                            out += [
                                Rectangle(number, 0, place + i * pitch, corner[0] + i, corner[1], 1, length)
                                for i in range(height)
                            ]
                        before += high - low
                at += (bottom - top) * pitch
        return tuple(sorted(out, key=lambda r: (r.local_row, r.local_col)))

    def _blocks(self) -> Iterator[tuple[Range, Range, Range]]:
        """Every box as intervals of the stack, the rows and the columns of the rule's view."""
        _, rows, cols = self.rule.view(self.shape)
        for box in self.boxes:
            if (rows, cols) == self.shape[-2:]:
                yield box[0] if len(box) == 3 else (0, 1), box[-2], box[-1]
                continue
            inner = math.prod(self.shape[2:])  # a convolution's (in, k, ...) are its columns
            if any(span != (0, extent) for span, extent in zip(box[2:], self.shape[2:], strict=True)):
                raise ValueError(f"parameter {self.name!r} is cut inside its kernels: use Shard(0) or Shard(1)")
            yield (0, 1), box[0], (box[1][0] * inner, box[1][1] * inner)


def read_shards(
    spec: TensorSpec, param: DTensor, ranks: Sequence[int], tensor: int
) -> tuple[TensorSpec, list[Shard | None]]:
    """What every rank of a parameter's mesh holds of it; no collective.

    Args:
        spec: of global shape. ranks: global ranks of the domain, which are those of the mesh. tensor: its number.

    Returns:
        The spec, a `BlockSpec` where a rank's elements are no run of the flat tensor; and per domain rank its shard,
        None where it holds nothing.

    Raises:
        ValueError: a placement that is not known, by the parameter's name.
    """
    mesh, placements = param.device_mesh, param.placements
    for placement in placements:
        if not (placement.is_replicate() or hasattr(placement, "dim")):
            raise ValueError(
                f"parameter {spec.name!r} has placement {placement}: only shards and replicas can be stepped"
            )
    held: dict[int, tuple[Box, int]] = {}
    for coordinate, rank in zip(_coordinates(mesh.shape), mesh.mesh.flatten().tolist(), strict=True):
        held[rank] = _box(spec.shape, mesh.shape, coordinate, placements), _copy(mesh.shape, coordinate, placements)
    own = held[mesh.get_rank()][0]
    found = compute_local_shape_and_global_offset(param.shape, mesh, placements)
    if tuple(stop - start for start, stop in own) != found[0] or (
        _numel(own) and tuple(start for start, _ in own) != found[1]
    ):
        raise ValueError(
            f"parameter {spec.name!r} with placements {placements} has {found[0]} elements at {found[1]} on this rank, "
            f"not {own}, where torch.chunk would cut it: this way of cutting is not supported"
        )
    boxes = sorted({box for box, _ in held.values() if _numel(box)})
    starts, at = {}, 0
    for box in boxes:
        starts[box] = at
        at += _numel(box)
    copies = math.prod(size for size, placement in zip(mesh.shape, placements, strict=True) if placement.is_replicate())
    shards = []
    for box, copy in (held[rank] for rank in ranks):
        # Replicas take turns in sending, so that no replica's links carry all of the exchange.
        run = (tensor, starts[box], starts[box] + _numel(box), (copy + tensor) % copies) if box in starts else None
        shards.append(run and Shard(*run))
    whole_rows = all(span == (0, extent) for box in boxes for span, extent in zip(box[1:], spec.shape[1:], strict=True))
    if whole_rows:
        return spec, shards
    return BlockSpec(spec.name, spec.shape, spec.rule, boxes=tuple(boxes)), shards


def _coordinates(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every coordinate of a mesh, in the order of its flattened ranks."""
    for number in range(math.prod(shape)):
        out = []
        for size in reversed(shape):
            number, index = divmod(number, size)
            out.append(index)
        yield tuple(reversed(out))


def _box(shape: Sequence[int], mesh: Sequence[int], coordinate: Sequence[int], placements: Sequence) -> Box:
    """The box at a mesh coordinate, cut as torch.chunk does; what tensor parallelism cut, FSDP cuts once more.

    Such a second cut stands to the left of the first and is marked by a split factor: (_StridedShard(0), Shard(0)) on
    [dp, tp] is cut over tp, then over dp.
    """
    box = [(0, extent) for extent in shape]
    for again in (False, True):
        for size, index, placement in zip(mesh, coordinate, placements, strict=True):
            if placement.is_replicate() or hasattr(placement, "split_factor") != again:
                continue
            start, stop = box[placement.dim]
            step = -(-(stop - start) // size)
            box[placement.dim] = min(start + index * step, stop), min(start + (index + 1) * step, stop)
    return tuple(box)


def _copy(mesh: Sequence[int], coordinate: Sequence[int], placements: Sequence) -> int:
    """The number of this replica among the ranks that hold the same box."""
    number = 0
    for size, index, placement in zip(mesh, coordinate, placements, strict=True):
        if placement.is_replicate():
            number = number * size + index
    return number


def _numel(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)
