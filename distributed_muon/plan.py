"""One home per matrix, waves of exchange, and exact counts of the bytes and FLOPs they cost.

A plan is computed alike on every rank from the layout alone: which rank orthogonalizes which matrix
(its home), in which wave, and what each rank sends to whom. Pure Python, no torch.distributed.

Every wave is two all-to-alls. *Gather*: holders send their pieces of the momentum update to the
homes. *Scatter*: homes send the orthogonalized pieces back. The report's Algorithm 1
(arXiv 2502.16982, section 2.3) is the plan whose homes are all holders: then nothing is scattered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from distributed_muon.cost_model import H100_INFINIBAND, Hardware
from distributed_muon.layout import Layout, Piece
from distributed_muon.newton_schulz import choose_form, ns_flops

STRATEGIES = ("home", "gather", "auto")
# A home keeps one wave's matrices, their workspaces and two waves of wire buffers alive, about five times this.
WAVE_BYTES = 64 << 20


@dataclass(frozen=True)
class NewtonSchulz:
    """What the planner must know of the iteration.

    Args:
        steps: iterations. form: "standard", "gram" or "auto" (by shape).
        element_bytes: bytes of one element of the iteration and of the wire (2: bf16, 4: fp32).
    """

    steps: int = 5
    form: str = "auto"
    element_bytes: int = 2

    def flops(self, rows: int, cols: int) -> int:
        """FLOPs (multiply and add counted apart) to orthogonalize one (rows, cols) matrix."""
        form = choose_form(rows, cols, self.steps) if self.form == "auto" else self.form
        return ns_flops(rows, cols, self.steps, form)


@dataclass(frozen=True)
class Transfer:
    """One rank's part in one all-to-all: pieces ordered by peer, and the elements for each peer.

    Args:
        send, recv: the pieces, in wire order. send_counts, recv_counts: elements per peer rank.
        idle: no rank of the domain moves anything, so the collective is left out everywhere.
    """

    send: tuple[Piece, ...]
    recv: tuple[Piece, ...]
    send_counts: tuple[int, ...]
    recv_counts: tuple[int, ...]
    idle: bool


@dataclass(frozen=True)
class Wave:
    """One rank's part in one wave.

    Args:
        held: the pieces this rank holds (momentum and update happen here).
        stacks: matrices this rank is home of, grouped by equal (rows, cols).
        gather, scatter: the way to the homes and the way back.
    """

    held: tuple[Piece, ...]
    stacks: tuple[tuple[int, ...], ...]
    gather: Transfer
    scatter: Transfer


@dataclass(frozen=True)
class Plan:
    """Homes and waves over a layout; see the module docstring.

    Args:
        layout: who holds what. strategy: "home" or "gather", after "auto" was decided.
        newton_schulz: iteration options that set the cost. homes: per matrix, the ranks that
        orthogonalize it; the first one serves holders that are not homes. waves: matrices of each wave.
    """

    layout: Layout
    strategy: str
    newton_schulz: NewtonSchulz
    homes: tuple[tuple[int, ...], ...]
    waves: tuple[tuple[int, ...], ...]

    @cached_property
    def ns_flops_by_rank(self) -> list[int]:
        """Newton-Schulz FLOPs of each rank per step."""
        work = [0] * self.layout.world
        for matrix, homes in zip(self.layout.matrices, self.homes, strict=True):
            for home in homes:
                work[home] += self.newton_schulz.flops(matrix.rows, matrix.cols)
        return work

    @cached_property
    def ns_flops_total(self) -> int:
        """Newton-Schulz FLOPs per step if every matrix is orthogonalized once."""
        return sum(self.newton_schulz.flops(m.rows, m.cols) for m in self.layout.matrices)

    @property
    def ns_max_over_ideal(self) -> float:
        """Busiest rank's Newton-Schulz FLOPs over total / ranks; 1.0 is perfect balance without redundancy."""
        ideal = self.ns_flops_total / self.layout.world
        return max(self.ns_flops_by_rank) / ideal if ideal else 1.0

    @cached_property
    def exchange_bytes_by_rank(self) -> list[int]:
        """Bytes each rank sends in the all-to-alls of one step, both ways."""
        sent = [0] * self.layout.world
        for piece in self.layout.pieces:
            homes = self.homes[piece.matrix]
            away = piece.rank not in homes
            if piece.replica == 0:
                sent[piece.rank] += piece.numel * (len(homes) - 1 + away)
            if away:
                sent[homes[0]] += piece.numel
        return [count * self.newton_schulz.element_bytes for count in sent]

    @cached_property
    def _pieces_by_matrix(self) -> dict[int, list[Piece]]:
        by_matrix = defaultdict(list)
        for piece in self.layout.pieces:
            by_matrix[piece.matrix].append(piece)
        return by_matrix

    def last_wave_by_tensor(self) -> list[int]:
        """Per tensor, the wave that updates the last of its matrices; -1 for tensors without matrices."""
        wave_of = {matrix: wave for wave, matrices in enumerate(self.waves) for matrix in matrices}
        last = [-1] * len(self.layout.tensors)
        for matrix, tensor in enumerate(self.layout.tensor_of_matrix):
            last[tensor] = max(last[tensor], wave_of[matrix])
        return last

    def schedule(self, rank: int) -> list[Wave]:
        """What `rank` holds, orthogonalizes, sends and receives in each wave."""
        return [self._wave(matrices, rank) for matrices in self.waves]

    def _wave(self, matrices: Sequence[int], rank: int) -> Wave:
        pieces = [piece for matrix in matrices for piece in self._pieces_by_matrix[matrix]]
        held = tuple(piece for piece in pieces if piece.rank == rank)
        mine = [matrix for matrix in matrices if rank in self.homes[matrix]]
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for matrix in mine:
            by_shape[self.layout.matrices[matrix][1:]].append(matrix)
        sources = [p for p in pieces if p.replica == 0]
        gather = self._transfer(
            idle=all(self.homes[p.matrix] == (p.rank,) for p in sources),
            send=[(home, p) for p in held if p.replica == 0 for home in self.homes[p.matrix] if home != rank],
            recv=[(p.rank, p) for p in sources if p.rank != rank and rank in self.homes[p.matrix]],
        )
        away = [p for p in pieces if p.rank not in self.homes[p.matrix]]
        scatter = self._transfer(
            idle=not away,
            send=[(p.rank, p) for p in away if self.homes[p.matrix][0] == rank],
            recv=[(self.homes[p.matrix][0], p) for p in away if p.rank == rank],
        )
        return Wave(held, tuple(map(tuple, by_shape.values())), gather, scatter)

    def _transfer(self, idle: bool, send: Iterable[tuple[int, Piece]], recv: Iterable[tuple[int, Piece]]) -> Transfer:
        sides = []
        for side in (send, recv):
            counts = [0] * self.layout.world
            by_peer: dict[int, list[Piece]] = defaultdict(list)
            for peer, piece in side:
                by_peer[peer].append(piece)
                counts[peer] += piece.numel
            sides.append((tuple(p for peer in sorted(by_peer) for p in by_peer[peer]), tuple(counts)))
        (sent, send_counts), (received, recv_counts) = sides
        return Transfer(sent, received, send_counts, recv_counts, idle)

    def explain(self) -> str:
        """A page for people: what is orthogonalized where, how balanced, and what travels."""
        layout, sent = self.layout, self.exchange_bytes_by_rank
        per_rank = [0] * layout.world
        for homes in self.homes:
            for home in homes:
                per_rank[home] += 1
        copies = sum(map(len, self.homes))
        shapes: dict[tuple[int, int], int] = defaultdict(int)
        for matrix in layout.matrices:
            shapes[matrix[1:]] += 1
        lines = [
            f"plan: {len(layout.matrices)} matrices over {layout.world} ranks, strategy {self.strategy}, "
            f"{len(self.waves)} waves",
            f"  Newton-Schulz: {self.ns_flops_total / 1e12:.4g} TFLOP per step, busiest rank "
            f"{self.ns_max_over_ideal:.3f} x the ideal share, {copies - len(layout.matrices)} redundant runs",
            f"  matrices per rank: {min(per_rank)} to {max(per_rank)}",
            f"  exchange: {max(sent) / 2**20:.3f} MiB sent by the busiest rank, {sum(sent) / 2**20:.3f} MiB in all",
            "  shapes:",
        ]
        for (rows, cols), count in sorted(shapes.items(), key=lambda item: -item[1] * item[0][0] * item[0][1]):
            form = self.newton_schulz.form
            form = choose_form(rows, cols, self.newton_schulz.steps) if form == "auto" else form
            lines.append(f"    {count:6d} x {rows} x {cols}  {form}")
        return "\n".join(lines)


def make_plan(
    layout: Layout,
    strategy: str = "auto",
    newton_schulz: NewtonSchulz | None = None,
    *,
    wave_bytes: int = WAVE_BYTES,
    hardware: Hardware = H100_INFINIBAND,
) -> Plan:
    """Choose homes and waves for a layout; deterministic, so every rank computes the same plan.

    Args:
        layout: who holds what.
        strategy: "home" (one home per matrix, balanced by Newton-Schulz cost, at a holder where the
            balance allows), "gather" (every holder is a home: the Moonlight report's Algorithm 1), or
            "auto" (the one the cost model finds faster).
        newton_schulz: iteration options; the defaults of NewtonSchulz if None.
        wave_bytes: bytes of matrices a home takes into one wave (at least one matrix).
        hardware: rates that "auto" compares with.

    Raises:
        ValueError: unknown strategy.
    """
    newton_schulz = newton_schulz or NewtonSchulz()
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is unknown: choose one of {', '.join(STRATEGIES)}")
    if strategy == "auto":
        # "home" first: it wins ties.
        plans = [make_plan(layout, s, newton_schulz, wave_bytes=wave_bytes) for s in ("home", "gather")]
        return min(plans, key=lambda plan: _seconds(plan, hardware))
    homes = _all_holders(layout) if strategy == "gather" else _one_home(layout, newton_schulz)
    waves = _waves(layout, homes, max(1, wave_bytes // newton_schulz.element_bytes))
    return Plan(layout, strategy, newton_schulz, homes, waves)


def _seconds(plan: Plan, hardware: Hardware) -> float:
    flops, sent = max(plan.ns_flops_by_rank, default=0), max(plan.exchange_bytes_by_rank, default=0)
    return flops / hardware.matmul_flops + sent / hardware.link_bytes_per_second


def _holders(layout: Layout) -> list[dict[int, int]]:
    """For each matrix, the elements that each rank would have to send were it not the home."""
    holders: list[dict[int, int]] = [defaultdict(int) for _ in layout.matrices]
    for piece in layout.pieces:
        holders[piece.matrix][piece.rank] += piece.numel
    return holders


def _all_holders(layout: Layout) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(sorted(held)) for held in _holders(layout))


def _one_home(layout: Layout, newton_schulz: NewtonSchulz) -> tuple[tuple[int, ...], ...]:
    """Longest-processing-time assignment; a second pass moves homes to holders within the same makespan."""
    costs = [newton_schulz.flops(m.rows, m.cols) for m in layout.matrices]
    order = sorted(range(len(costs)), key=lambda m: (-costs[m], m))
    holders = _holders(layout)
    free = _longest_first(order, costs, holders, layout.world, makespan=0)
    makespan = max(_loads(free, costs, layout.world), default=0)
    near = _longest_first(order, costs, holders, layout.world, makespan)
    if max(_loads(near, costs, layout.world), default=0) > makespan:
        near = free
    return tuple((home,) for home in near)


def _loads(homes: Sequence[int], costs: Sequence[int], world: int) -> list[int]:
    loads = [0] * world
    for home, cost in zip(homes, costs, strict=True):
        loads[home] += cost
    return loads


def _longest_first(
    order: Sequence[int], costs: Sequence[int], holders: Sequence[dict[int, int]], world: int, makespan: int
) -> list[int]:
    """Most expensive matrix first, each to its largest holder that stays within `makespan`, else the least loaded."""
    import heapq

    loads = [0] * world
    heap = [(0, rank) for rank in range(world)]
    homes = [0] * len(costs)
    for matrix in order:
        fitting = [(held, -loads[r], -r) for r, held in holders[matrix].items() if loads[r] + costs[matrix] <= makespan]
        if fitting:
            home = -max(fitting)[2]
        else:
            while heap[0][0] != loads[heap[0][1]]:  # stale: the rank took a matrix as a holder since
                rank = heapq.heappop(heap)[1]
                heapq.heappush(heap, (loads[rank], rank))
            home = heap[0][1]
        loads[home] += costs[matrix]
        homes[matrix] = home
    return homes


def _waves(layout: Layout, homes: Sequence[tuple[int, ...]], wave_numel: int) -> tuple[tuple[int, ...], ...]:
    """Give every home about `wave_numel` elements per wave, in forward order, so that homes finish together."""
    taken = [0] * layout.world
    waves: dict[int, list[int]] = defaultdict(list)
    for index, matrix in enumerate(layout.matrices):
        wave = max(taken[home] // wave_numel for home in homes[index])
        for home in homes[index]:
            taken[home] = max(taken[home], wave * wave_numel) + matrix.numel
        waves[wave].append(index)
    return tuple(tuple(waves[wave]) for wave in sorted(waves))
