"""One home per matrix, waves of exchange, and exact counts of the bytes and FLOPs they cost.

A plan is computed alike on every rank from the layout alone: which rank orthogonalizes which matrix
(its home), in which wave, and what each rank sends to whom. No torch, no communication.

Every wave is two all-to-alls. *Gather*: holders send their pieces of the momentum update to the
homes. *Scatter*: homes send the orthogonalized pieces back. The report's Algorithm 1
(arXiv 2502.16982, section 2.3) is the plan whose homes are all holders: then nothing is scattered.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import itemgetter

import numpy as np

from distributed_muon.layout.cost_model import H100_INFINIBAND, Hardware, NewtonSchulzCost
from distributed_muon.layout.homes import Homes, all_holders, one_home
from distributed_muon.layout.pieces import Layout, Piece
from distributed_muon.layout.teams import team_sizes

STRATEGIES = ("home", "gather", "auto")
# A home takes its matrices in waves of about this many bytes in 16 bits; three waves are in flight at a time. With
# 64 MiB, a rank that is home to 1 GiB of matrices goes through 16 waves a step; with twice the model it goes through
# 32, in the same memory. Where one matrix is larger than a wave it counts as the wave. `layout.memory` counts what a
# step allocates: 5 to 14 such waves, fewer where more of a matrix lies at its home.
WAVE_BYTES = 64 << 20


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
        stacks: matrices this rank is the home of, grouped by equal (rows, cols).
        blocks: blocks this rank is the home of, whose matrix it orthogonalizes with a team.
        gather, scatter: the way to the homes and the way back.
    """

    held: tuple[Piece, ...]
    stacks: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...]
    gather: Transfer
    scatter: Transfer


@dataclass(frozen=True)
class Plan:
    """Homes and waves over a layout; see the module docstring.

    Args:
        layout: who holds what. strategy: "home" or "gather", after "auto" was decided.
        newton_schulz: iteration options that set the cost. homes: per matrix, the ranks that
        orthogonalize it; the first one serves holders that are not homes.
        wave_numel: elements of matrices that a home takes into one wave, or one matrix.
    """

    layout: Layout
    strategy: str
    newton_schulz: NewtonSchulzCost
    homes: Homes
    wave_numel: int

    @cached_property
    def waves(self) -> tuple[tuple[int, ...], ...]:
        """Matrices of each wave, in forward order: about `wave_numel` elements per home, so that homes finish together.

        Small matrices come first, so that those of one shape share their matmuls instead of adding some to every wave.
        The blocks of a team are in one wave: their ranks meet in its collectives.
        """
        small = self.wave_numel // 32
        ordered = sorted(self.layout.together, key=lambda blocks: self.layout.matrices[blocks[0]].numel > small)
        taken = [0] * self.layout.world
        waves: dict[int, list[int]] = defaultdict(list)
        for together in ordered:
            wave = max(taken[home] // self.wave_numel for block in together for home in self.homes[block])
            for block in together:
                for home in self.homes[block]:
                    taken[home] = max(taken[home], wave * self.wave_numel) + self.layout.matrices[block].numel
                waves[wave].append(block)
        return tuple(tuple(waves[wave]) for wave in sorted(waves))

    @cached_property
    def wave_of(self) -> np.ndarray:
        """Per matrix, the number of its wave."""
        wave_of = np.empty(len(self.homes), np.int64)
        for wave, matrices in enumerate(self.waves):
            wave_of[list(matrices)] = wave
        return wave_of

    @cached_property
    def home_count(self) -> np.ndarray:
        """Per matrix, the number of its homes."""
        return np.fromiter(map(len, self.homes), np.int64, len(self.homes))

    @cached_property
    def first_home(self) -> np.ndarray:
        """Per matrix, the home that serves holders which are none."""
        return np.fromiter((homes[0] for homes in self.homes), np.int64, len(self.homes))

    @cached_property
    def away(self) -> np.ndarray:
        """Per piece, whether the rank that holds it is no home of its matrix."""
        pieces, world = self.layout.columns, self.layout.world
        matrices = np.repeat(np.arange(len(self.homes)), self.home_count)
        ranks = np.fromiter(chain.from_iterable(self.homes), np.int64, len(matrices))
        return ~np.isin(pieces.matrix * world + pieces.rank, matrices * world + ranks)

    @cached_property
    def ns_flops_by_rank(self) -> list[int]:
        """Newton-Schulz FLOPs of each rank per step."""
        work = [0] * self.layout.world
        for flops, homes in zip(self._flops, self.homes, strict=True):
            for home in homes:
                work[home] += flops
        return work

    @cached_property
    def _flops(self) -> list[int]:
        return self.newton_schulz.flops_of(self.layout.matrices)

    @property
    def ns_flops_total(self) -> int:
        """Newton-Schulz FLOPs per step if every matrix is orthogonalized once."""
        return sum(self._flops)

    @property
    def ns_max_over_ideal(self) -> float:
        """Busiest rank's Newton-Schulz FLOPs over total / ranks; 1.0 is perfect balance without redundancy."""
        ideal = self.ns_flops_total / self.layout.world
        return max(self.ns_flops_by_rank) / ideal if ideal else 1.0

    @cached_property
    def exchange_bytes_by_rank(self) -> list[int]:
        """Bytes each rank sends in the all-to-alls of one step, both ways."""
        sent = np.zeros(self.layout.world, np.int64)
        pieces, numel, away = self.layout.columns, self.layout.columns.numel, self.away
        source = pieces.replica == 0
        np.add.at(sent, pieces.rank[source], (numel * (self.home_count[pieces.matrix] - 1 + away))[source])
        np.add.at(sent, self.first_home[pieces.matrix[away]], numel[away])
        return (sent * self.newton_schulz.element_bytes).tolist()

    @cached_property
    def teams(self) -> dict[int, tuple[int, ...]]:
        """For every block, the ranks of its team in the order of their blocks; nothing for whole matrices."""
        teams = {}
        for blocks in self.layout.together:
            if len(blocks) > 1:
                teams.update(dict.fromkeys(blocks, tuple(home for block in blocks for home in self.homes[block])))
        return teams

    @cached_property
    def team_bytes_by_rank(self) -> list[int]:
        """Bytes each rank sends inside its teams per step."""
        sent = [0] * self.layout.world
        for block, team in self.teams.items():
            matrix = self.layout.matrices[block]
            sent[self.homes[block][0]] += self.newton_schulz.team_bytes(min(matrix.logical_shape), len(team))
        return sent

    def last_wave_by_tensor(self) -> list[int]:
        """Per tensor, the wave that updates the last of its matrices; -1 for tensors without matrices."""
        last = np.full(len(self.layout.tensors), -1)
        np.maximum.at(last, np.array(self.layout.tensor_of_matrix, int), self.wave_of)
        return last.tolist()

    def schedule(self, rank: int) -> list[Wave]:
        """What `rank` holds, orthogonalizes, sends and receives in each wave."""
        pieces, wave_of = self.layout.columns, self.wave_of[self.layout.columns.matrix]
        mine: list[list[int]] = [[] for _ in self.waves]
        for matrix, homes in enumerate(self.homes):
            if rank in homes:
                mine[self.wave_of[matrix]].append(matrix)
        # The pieces that concern this rank: those it holds, and all of the matrices it is a home of.
        near = np.flatnonzero((pieces.rank == rank) | np.isin(pieces.matrix, list(chain.from_iterable(mine))))
        by_wave: list[list[Piece]] = [[] for _ in self.waves]
        for piece, wave in zip(self.layout.pieces_at(near), wave_of[near].tolist(), strict=True):
            by_wave[wave].append(piece)
        sends = (pieces.replica == 0) & (self.away | (self.home_count[pieces.matrix] > 1))
        busy = [set(wave_of[moving].tolist()) for moving in (sends, self.away)]
        return [
            self._wave(rank, mine[wave], by_wave[wave], [wave not in waves for waves in busy])
            for wave in range(len(self.waves))
        ]

    def _wave(self, rank: int, mine: Sequence[int], pieces: Sequence[Piece], idle: Sequence[bool]) -> Wave:
        """One wave of `rank`, home of the matrices `mine`, from the pieces that concern it."""
        matrices, homes = self.layout.matrices, self.homes
        stacks: dict[tuple[int, int], list[int]] = defaultdict(list)
        for matrix in mine:
            if matrices[matrix].team == 1:
                stacks[matrices[matrix].shape].append(matrix)
        held = tuple(piece for piece in pieces if piece.rank == rank)
        sources = [p for p in pieces if p.replica == 0]
        away = [p for p in pieces if p.rank not in homes[p.matrix]]
        gather = self._transfer(
            send=[(home, p) for p in sources if p.rank == rank for home in homes[p.matrix] if home != rank],
            recv=[(p.rank, p) for p in sources if p.rank != rank and rank in homes[p.matrix]],
            idle=idle[0],
        )
        scatter = self._transfer(
            send=[(p.rank, p) for p in away if homes[p.matrix][0] == rank],
            recv=[(homes[p.matrix][0], p) for p in away if p.rank == rank],
            idle=idle[1],
        )
        blocks = tuple(matrix for matrix in mine if matrices[matrix].team > 1)
        return Wave(held, tuple(map(tuple, stacks.values())), blocks, gather, scatter)

    def _transfer(self, send: list[tuple[int, Piece]], recv: list[tuple[int, Piece]], idle: bool) -> Transfer:
        sides = []
        for side in (send, recv):
            side.sort(key=itemgetter(0))  # by peer, and as they came for each
            counts = [0] * self.layout.world
            for peer, piece in side:
                counts[peer] += piece.numel
            sides.append((tuple(piece for _, piece in side), tuple(counts)))
        (sent, send_counts), (received, recv_counts) = sides
        return Transfer(sent, received, send_counts, recv_counts, idle)

    def seconds(self, hardware: Hardware) -> float:
        """Estimate of one step's Newton-Schulz and exchange on the busiest rank, without overlap."""
        compute = max(self.ns_flops_by_rank, default=0) / hardware.matmul_flops
        exchange = max(self.exchange_bytes_by_rank, default=0) / hardware.link_bytes_per_second
        team = max(self.team_bytes_by_rank, default=0) / hardware.node_bytes_per_second
        return compute + exchange + team

    def explain(self) -> str:
        """A page for people: what is orthogonalized where, how balanced, and what travels."""
        layout, sent = self.layout, self.exchange_bytes_by_rank
        homed = Counter(chain.from_iterable(self.homes))
        per_rank = [homed[rank] for rank in range(layout.world)]
        shapes = Counter(matrix.logical_shape for matrix in layout.matrices)
        lines = [
            f"plan: {len(layout.matrices)} matrices over {layout.world} ranks, strategy {self.strategy}, "
            f"{len(self.waves)} waves",
            f"  Newton-Schulz: {self.ns_flops_total / 1e12:.4g} TFLOP per step, busiest rank "
            f"{self.ns_max_over_ideal:.3f} x the ideal share, {sum(per_rank) - len(layout.matrices)} redundant runs",
            f"  matrices per rank: {min(per_rank)} to {max(per_rank)}",
            f"  exchange: {max(sent) / 2**20:.3f} MiB sent by the busiest rank, {sum(sent) / 2**20:.3f} MiB in all",
            "  shapes:",
        ]
        for (rows, cols), count in sorted(shapes.items(), key=lambda item: -item[1] * item[0][0] * item[0][1]):
            lines.append(f"    {count:6d} x {rows} x {cols}  {self.newton_schulz.form_of(rows, cols)}")
        return "\n".join(lines)


def make_plan(
    layout: Layout,
    strategy: str = "auto",
    newton_schulz: NewtonSchulzCost | None = None,
    *,
    wave_bytes: int = WAVE_BYTES,
    hardware: Hardware = H100_INFINIBAND,
    teams: bool = True,
    busy: Sequence[int] = (),
) -> Plan:
    """Choose homes and waves for a layout; deterministic, so every rank computes the same plan.

    Args:
        layout: who holds what.
        strategy: "home" (one home per matrix, balanced by Newton-Schulz cost, at a holder where the
            balance allows), "gather" (every holder is a home: the Moonlight report's Algorithm 1), or
            "auto" (the one the cost model finds faster).
        newton_schulz: iteration options; the defaults of NewtonSchulzCost if None.
        wave_bytes: bytes of matrices a home takes into one wave (at least one matrix).
        hardware: rates that "auto" and the team sizes are decided with.
        teams: whether "home" may split a matrix over several ranks where the cost model finds that
            faster: ranks outnumber matrices, or one matrix dominates. The plan's layout then holds blocks.
        busy: FLOPs that the plans of other domains already gave to each rank, to be balanced against.

    Raises:
        ValueError: unknown strategy.
    """
    newton_schulz = newton_schulz or NewtonSchulzCost()
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is unknown: choose one of {', '.join(STRATEGIES)}")
    if strategy == "auto":
        # "home" first: it wins ties.
        options = {"wave_bytes": wave_bytes, "hardware": hardware, "teams": teams, "busy": busy}
        plans = [make_plan(layout, choice, newton_schulz, **options) for choice in ("home", "gather")]
        return min(plans, key=lambda plan: plan.seconds(hardware))
    if strategy == "gather":
        homes = all_holders(layout)
    else:
        sizes = team_sizes(layout.matrices, layout.world, newton_schulz, hardware) if teams else []
        if max(sizes, default=1) > 1:
            layout = layout.with_teams(sizes)
        homes = one_home(layout, newton_schulz, busy)
    return Plan(layout, strategy, newton_schulz, homes, max(1, wave_bytes // newton_schulz.element_bytes))
