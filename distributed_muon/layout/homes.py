"""Which rank is the home of which matrix, and which matrices are shared by a team of ranks."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence

from distributed_muon.layout.cost_model import Hardware, NewtonSchulzCost
from distributed_muon.layout.pieces import Layout

# A makespan 1/200 longer is worth the exchange it saves: on one flat buffer over 64 ranks nearly all of it.
_SLACK = 200

Homes = tuple[tuple[int, ...], ...]


def all_holders(layout: Layout) -> Homes:
    """Every rank that holds a piece of a matrix is its home: the Moonlight report's Algorithm 1."""
    return tuple(tuple(sorted(held)) for held in _holders(layout))


def one_home(layout: Layout, newton_schulz: NewtonSchulzCost, busy: Sequence[int] = ()) -> Homes:
    """Longest-processing-time assignment by FLOPs; then homes move to holders within nearly the same makespan.

    The blocks of a team go to consecutive ranks that start at a multiple of its size, so that a team of up
    to a node's ranks stays in the node.

    Args:
        busy: FLOPs that other plans already gave to each rank of this domain; none if empty.
    """
    costs = [newton_schulz.flops(matrix) for matrix in layout.matrices]
    holders = _holders(layout)
    base = list(busy) or [0] * layout.world
    teams = {blocks.start: len(blocks) for blocks in layout.together if len(blocks) > 1}
    seats = _seat(teams, costs, base)
    homes = {first + i: seats[first] + i for first, size in teams.items() for i in range(size)}
    order = sorted((m for m in range(len(costs)) if m not in homes), key=lambda m: (-costs[m], m))
    free, makespan = _longest_first(order, costs, holders, base, 0)
    allowed = makespan + makespan // _SLACK
    near, reached = _longest_first(order, costs, holders, base, allowed)
    homes.update(near if reached <= allowed else free)
    return tuple((homes[matrix],) for matrix in range(len(costs)))


def team_sizes(layout: Layout, newton_schulz: NewtonSchulzCost, hardware: Hardware) -> list[int]:
    """Per matrix, the ranks that share it: powers of two, 1 unless the cost model finds teams faster.

    Each candidate bounds what one rank may do for one matrix by a multiple of the ideal share, gives every
    matrix the smallest team that obeys, and is judged by the estimated seconds of the busiest rank.
    """
    matrices, world = layout.matrices, layout.world
    whole = [1] * len(matrices)
    flops = [newton_schulz.flops(matrix) for matrix in matrices]
    ideal = sum(flops) / world
    if not matrices or max(flops) <= ideal:
        return whole
    best, best_seconds = whole, _busiest_seconds(layout, whole, newton_schulz, hardware)
    for bound in (1.0, 1.25, 1.5, 2.0, 3.0, 4.0):
        sizes = []
        for matrix, cost in zip(matrices, flops, strict=True):
            size = 1
            # A block of less than one row or column of the long side is no block.
            while cost / size > bound * ideal and 2 * size <= min(world, max(matrix.shape)):
                size *= 2
            sizes.append(size)
        seconds = _busiest_seconds(layout, sizes, newton_schulz, hardware)
        if seconds < best_seconds:
            best, best_seconds = sizes, seconds
    return best


def _busiest_seconds(
    layout: Layout, sizes: Sequence[int], newton_schulz: NewtonSchulzCost, hardware: Hardware
) -> float:
    """Estimated Newton-Schulz seconds of the busiest rank."""
    seconds = [
        newton_schulz.team_seconds(matrix, size, hardware) for matrix, size in zip(layout.matrices, sizes, strict=True)
    ]
    loads = [0.0] * layout.world
    _seat(dict(enumerate(sizes)), seconds, loads)
    return max(loads)


def _seat(sizes: Mapping[int, int], costs: Sequence[float], loads: list[float] | list[int]) -> dict[int, int]:
    """Seat teams on consecutive ranks from a multiple of their size, largest teams and longest work first.

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


def _holders(layout: Layout) -> list[dict[int, int]]:
    """For each matrix, the elements that each rank would have to send were it not the home."""
    holders: list[dict[int, int]] = [defaultdict(int) for _ in layout.matrices]
    for piece in layout.pieces:
        holders[piece.matrix][piece.rank] += piece.numel
    return holders


def _longest_first(
    order: Sequence[int], costs: Sequence[int], holders: Sequence[dict[int, int]], base: Sequence[int], makespan: int
) -> tuple[dict[int, int], int]:
    """Each matrix to its largest holder that stays within `makespan`, else to the least loaded rank.

    Returns:
        The homes, and the load of the busiest rank.
    """
    loads = list(base)
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    homes = {}
    for matrix in order:
        cost = costs[matrix]
        fitting = [(held, -loads[r], -r) for r, held in holders[matrix].items() if loads[r] + cost <= makespan]
        if fitting:
            home = -max(fitting)[2]
        else:
            while heap[0][0] != loads[heap[0][1]]:  # stale: the rank took a matrix since
                heapq.heapreplace(heap, (loads[heap[0][1]], heap[0][1]))
            home = heap[0][1]
        loads[home] += cost
        homes[matrix] = home
    return homes, max(loads)
