"""Which rank is the home of which matrix."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from distributed_muon.layout.cost_model import NewtonSchulzCost
from distributed_muon.layout.pieces import Layout
from distributed_muon.layout.teams import seat

# A home at a rank that holds the matrix already saves its exchange, but may balance the work worse: that is taken
# where the busiest rank works at most 1/200 longer. If perfect balance means 10 ms of Newton-Schulz on every rank,
# homes go to holders as long as no rank comes to more than 10.05 ms. Where the ranks cut one flat buffer, so that
# most matrices lie on a single rank, this is enough to leave out nearly all of the exchange.
_SLACK = 200

Homes = tuple[tuple[int, ...], ...]


def all_holders(layout: Layout) -> Homes:
    """Every rank that holds a piece of a matrix is its home: the Moonlight report's Algorithm 1."""
    return tuple(map(tuple, layout.holders))


def one_home(layout: Layout, newton_schulz: NewtonSchulzCost, busy: Sequence[int] = ()) -> Homes:
    """Longest-processing-time assignment by FLOPs; then homes move to holders within nearly the same makespan.

    Teams are seated first: the blocks of a team go to consecutive ranks that start at a multiple of its size.

    Args:
        busy: FLOPs that other plans already gave to each rank of this domain; none if empty.
    """
    costs = newton_schulz.flops_of(layout.matrices)
    loads = list(busy) or [0] * layout.world
    teams = {blocks.start: len(blocks) for blocks in layout.together if len(blocks) > 1}
    seats = seat(teams, costs, loads)
    homes = {first + i: seats[first] + i for first, size in teams.items() for i in range(size)}
    order = sorted((m for m in range(len(costs)) if m not in homes), key=lambda m: (-costs[m], m))
    free, makespan = _longest_first(order, costs, loads)
    allowed = makespan + makespan // _SLACK
    near, reached = _longest_first(order, costs, loads, layout.holders, allowed)
    homes.update(near if reached <= allowed else free)
    return tuple((homes[matrix],) for matrix in range(len(costs)))


def _longest_first(
    order: Sequence[int],
    costs: Sequence[int],
    base: Sequence[int],
    holders: Sequence[Mapping[int, int]] | None = None,
    makespan: int = 0,
) -> tuple[dict[int, int], int]:
    """Each matrix to its largest holder that stays within `makespan`, else to the least loaded rank.

    Args:
        order: matrices, the most work first. costs: by matrix. base: load of each rank before.
        holders: per matrix, the elements that each rank holds; None looks at the loads alone.

    Returns:
        The homes, and the load of the busiest rank.
    """
    loads = list(base)
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    homes = {}
    for matrix in order:
        cost = costs[matrix]
        held = holders[matrix] if holders is not None else {}
        fitting = [(numel, -loads[r], -r) for r, numel in held.items() if loads[r] + cost <= makespan]
        if fitting:
            home = -max(fitting)[2]
        else:
            while heap[0][0] != loads[heap[0][1]]:  # stale: the rank took a matrix since
                heapq.heapreplace(heap, (loads[heap[0][1]], heap[0][1]))
            home = heap[0][1]
        loads[home] += cost
        homes[matrix] = home
    return homes, max(loads)
