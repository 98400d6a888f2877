"""Teams: several ranks that orthogonalize one matrix together, each of them a *block* of its long side.

For the rest of the layout a block is a matrix of its own with a home of its own. Only the waves (a team meets
in one) and the engine (which sums the blocks' Gram matrices) know that blocks belong together.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import pairwise

from distributed_muon.layout.cost_model import Hardware, NewtonSchulzCost
from distributed_muon.layout.matrices import Matrix, Rectangle


def cut_into_blocks(
    matrices: Sequence[Matrix], rectangles: Sequence[Rectangle], sizes: Sequence[int]
) -> tuple[list[Matrix], list[Rectangle]]:
    """Cut each matrix into near-equal consecutive blocks of its long side, columns where the sides are equal.

    A 24 x 90 matrix of a team of two becomes two blocks of 24 x 45. A rectangle of its columns 40 to 50 becomes
    two rectangles: columns 40 to 45 of the first block and 0 to 5 of the second.

    Args:
        matrices: of one parameter. rectangles: of the same. sizes: per matrix, the ranks of its team; 1 leaves it.
    """
    blocks: list[Matrix] = []
    lines: list[tuple[int, bool, list[int]]] = []  # per matrix: its first block, whether columns are cut, and where
    for matrix, size in zip(matrices, sizes, strict=True):
        wide = matrix.cols >= matrix.rows
        cuts = [i * max(matrix.shape) // size for i in range(size + 1)]
        lines.append((len(blocks), wide, cuts))
        for low, high in pairwise(cuts):
            shape = (matrix.rows, high - low) if wide else (high - low, matrix.cols)
            blocks.append(Matrix(matrix.name, *shape, size, matrix.shape) if size > 1 else matrix)
    parts = []
    for r in rectangles:
        first, wide, cuts = lines[r.matrix]
        start, stop = (r.col, r.col + r.cols) if wide else (r.row, r.row + r.rows)
        for block, (low, high) in enumerate(pairwise(cuts), first):
            begin, length = max(start, low), min(stop, high) - max(start, low)
            if length > 0 and wide:
                local_col = r.local_col + begin - start
                parts.append(r._replace(matrix=block, local_col=local_col, col=begin - low, cols=length))
            elif length > 0:
                local_row = r.local_row + begin - start
                parts.append(r._replace(matrix=block, local_row=local_row, row=begin - low, rows=length))
    return blocks, sorted(parts, key=lambda r: (r.local_row, r.local_col))


def team_sizes(
    matrices: Sequence[Matrix], world: int, newton_schulz: NewtonSchulzCost, hardware: Hardware
) -> list[int]:
    """Per matrix, the ranks that share it: powers of two, 1 unless the cost model finds teams faster.

    Each candidate bounds what one rank may do for one matrix by a multiple of the ideal share, gives every
    matrix the smallest team that obeys, and is judged by the estimated seconds of the busiest rank.
    """
    whole = [1] * len(matrices)
    flops = newton_schulz.flops_of(matrices)
    ideal = sum(flops) / world
    if not matrices or max(flops) <= ideal:
        return whole

    def smallest_team(matrix: Matrix, flops: int, bound: float) -> int:
        size = 1
        # A block of less than one row or column of the long side is no block.
        while flops / size > bound and 2 * size <= min(world, max(matrix.shape)):
            size *= 2
        return size

    def busiest_seconds(sizes: Sequence[int]) -> float:
        seconds = [newton_schulz.team_seconds(m, size, hardware) for m, size in zip(matrices, sizes, strict=True)]
        loads = [0.0] * world
        seat(dict(enumerate(sizes)), seconds, loads)
        return max(loads)

    bounds = (shares * ideal for shares in (1.0, 1.25, 1.5, 2.0, 3.0, 4.0))
    teams = [[smallest_team(*pair, bound) for pair in zip(matrices, flops, strict=True)] for bound in bounds]
    return min([whole, *teams], key=busiest_seconds)


def seat(sizes: Mapping[int, int], costs: Sequence[float], loads: list[float] | list[int]) -> dict[int, int]:
    """Seat teams on consecutive ranks from a multiple of their size, largest teams and longest work first.

    A team of up to a node's ranks then stays in the node.

    Args:
        sizes: per team, its ranks. costs: by team number, what each of its ranks does. loads: per rank;
            added to.

    Returns:
        Per team, its first rank.
    """
    seats = {}
    for size in sorted(set(sizes.values()), reverse=True):
        windows = [(max(loads[i : i + size]), i) for i in range(0, len(loads) - size + 1, size)]
        heapq.heapify(windows)
        for team in sorted((t for t in sizes if sizes[t] == size), key=lambda t: (-costs[t], t)):
            load, first = windows[0]
            heapq.heapreplace(windows, (load + costs[team], first))
            for rank in range(first, first + size):
                loads[rank] += costs[team]
            seats[team] = first
    return seats
