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
from itertools import chain, pairwise

import numpy as np

from distributed_muon.layout.cost_model import H100_INFINIBAND, Hardware, NewtonSchulzCost
from distributed_muon.layout.homes import Homes, all_holders, one_home
from distributed_muon.layout.pieces import Layout, Piece, expand
from distributed_muon.layout.teams import team_sizes

STRATEGIES = ("home", "gather", "auto")
# A home takes its matrices in waves of about this many bytes in 16 bits, and holds no more than two waves at a time.
# With 64 MiB, a rank that is home to 1 GiB of matrices goes through 16 waves a step; with twice the model it goes
# through 32, in the same memory. Everything that a step allocates beside the state (matrices and wire of two waves,
# fp32 updates of one, workspaces of Newton-Schulz) stays below TRANSIENT_WAVES such waves. Where one matrix is larger
# than a wave it counts as the wave; where two gradient buckets are larger than all of this, they are the bound.
WAVE_BYTES = 64 << 20
TRANSIENT_WAVES = 7


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

        The blocks of a team are in one wave: their ranks meet in its collectives.
        """
        taken = [0] * self.layout.world
        waves: dict[int, list[int]] = defaultdict(list)
        for together in self.layout.together:
            wave = max(taken[home] // self.wave_numel for block in together for home in self.homes[block])
            for block in together:
                for home in self.homes[block]:
                    taken[home] = max(taken[home], wave * self.wave_numel) + self.layout.matrices[block].numel
                waves[wave].append(block)
        return tuple(tuple(waves[wave]) for wave in sorted(waves))

    @cached_property
    def _wave_of(self) -> np.ndarray:
        """Per matrix, the number of its wave."""
        wave_of = np.empty(len(self.homes), np.int64)
        for wave, matrices in enumerate(self.waves):
            wave_of[list(matrices)] = wave
        return wave_of

    @cached_property
    def _home_ranks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The homes of all matrices one after the other, and per matrix where its own begin and how many they are."""
        count = np.fromiter(map(len, self.homes), np.int64, len(self.homes))
        return np.fromiter(chain.from_iterable(self.homes), np.int64), np.cumsum(count) - count, count

    @cached_property
    def _away(self) -> np.ndarray:
        """Per piece, whether the rank that holds it is no home of its matrix."""
        ranks, _, count = self._home_ranks
        pieces, world = self.layout.columns, self.layout.world
        homes = np.repeat(np.arange(len(count)), count) * world + ranks
        return ~np.isin(pieces.matrix * world + pieces.rank, homes)

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
        pieces, numel, away = self.layout.columns, self.layout.columns.numel, self._away
        ranks, begins, count = self._home_ranks
        source = pieces.replica == 0
        np.add.at(sent, pieces.rank[source], (numel * (count[pieces.matrix] - 1 + away))[source])
        np.add.at(sent, ranks[begins[pieces.matrix[away]]], numel[away])
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
        np.maximum.at(last, np.array(self.layout.tensor_of_matrix, int), self._wave_of)
        return last.tolist()

    def schedule(self, rank: int) -> list[Wave]:
        """What `rank` holds, orthogonalizes, sends and receives in each wave."""
        pieces, away, (ranks, begins, count) = self.layout.columns, self._away, self._home_ranks
        matrix, held, source = pieces.matrix, pieces.rank == rank, pieces.replica == 0
        first_home = ranks[begins[matrix]] if len(matrix) else matrix
        own = np.repeat(np.arange(len(count)), count)[ranks == rank]  # matrices this rank is a home of
        # To the homes: each piece this rank is the source of, once for every home that is another rank.
        sources = np.flatnonzero(held & source)
        which, at = expand(begins[matrix[sources]], count[matrix[sources]])
        elsewhere = ranks[at] != rank
        arriving = np.flatnonzero(source & ~held & np.isin(matrix, own))
        gathers = self._transfers(
            (sources[which[elsewhere]], ranks[at[elsewhere]]),
            (arriving, pieces.rank[arriving]),
            moving=source & (away | (count[matrix] > 1)),
        )
        # And back: the first home serves the holders that are none.
        returning, awaited = np.flatnonzero(away & (first_home == rank)), np.flatnonzero(away & held)
        scatters = self._transfers((returning, pieces.rank[returning]), (awaited, first_home[awaited]), moving=away)
        held_by_wave: list[list[Piece]] = [[] for _ in self.waves]
        mine = np.flatnonzero(held)
        for piece, wave in zip(self.layout.pieces_at(mine), self._wave_of[matrix[mine]].tolist(), strict=True):
            held_by_wave[wave].append(piece)
        blocks: list[list[int]] = [[] for _ in self.waves]
        stacks: list[dict[tuple[int, int], list[int]]] = [defaultdict(list) for _ in self.waves]
        for number, wave in zip(own.tolist(), self._wave_of[own].tolist(), strict=True):
            shape, team = self.layout.matrices[number].shape, self.layout.matrices[number].team
            (blocks[wave] if team > 1 else stacks[wave][shape]).append(number)
        return [
            Wave(tuple(held), tuple(map(tuple, by_shape.values())), tuple(own_blocks), gather, scatter)
            for held, by_shape, own_blocks, gather, scatter in zip(
                held_by_wave, stacks, blocks, gathers, scatters, strict=True
            )
        ]

    def _transfers(
        self, send: tuple[np.ndarray, np.ndarray], recv: tuple[np.ndarray, np.ndarray], moving: np.ndarray
    ) -> list[Transfer]:
        """One rank's part in one all-to-all of each wave.

        Args:
            send, recv: numbers of pieces, and for each the peer. moving: per piece, whether any rank sends it.
        """
        sides = []
        for numbers, peers in (send, recv):
            waves = self._wave_of[self.layout.columns.matrix[numbers]]
            order = np.lexsort((numbers, peers, waves))
            counts = np.zeros((len(self.waves), self.layout.world), np.int64)
            np.add.at(counts, (waves, peers), self.layout.columns.numel[numbers])
            pieces = self.layout.pieces_at(numbers[order])
            ends = np.searchsorted(waves[order], np.arange(len(self.waves) + 1)).tolist()
            sides.append(([pieces[a:b] for a, b in pairwise(ends)], map(tuple, counts.tolist())))
        busy = set(self._wave_of[self.layout.columns.matrix[moving]].tolist())
        (sent, send_counts), (received, recv_counts) = sides
        parts = zip(sent, received, send_counts, recv_counts, strict=True)
        return [Transfer(*part, idle=wave not in busy) for wave, part in enumerate(parts)]

    def seconds(self, hardware: Hardware) -> float:
        """Estimate of one step's Newton-Schulz and exchange on the busiest rank, without overlap."""
        compute = max(self.ns_flops_by_rank, default=0) / hardware.matmul_flops
        exchange = max(self.exchange_bytes_by_rank, default=0) / hardware.link_bytes_per_second
        team = max(self.team_bytes_by_rank, default=0) / hardware.node_bytes_per_second
        return compute + exchange + team

    def explain(self) -> str:
        """A page for people: what is orthogonalized where, how balanced, and what travels."""
        layout, sent = self.layout, self.exchange_bytes_by_rank
        per_rank = np.bincount(self._home_ranks[0], minlength=layout.world)
        copies = per_rank.sum()
        shapes = Counter(matrix.logical_shape for matrix in layout.matrices)
        lines = [
            f"plan: {len(layout.matrices)} matrices over {layout.world} ranks, strategy {self.strategy}, "
            f"{len(self.waves)} waves",
            f"  Newton-Schulz: {self.ns_flops_total / 1e12:.4g} TFLOP per step, busiest rank "
            f"{self.ns_max_over_ideal:.3f} x the ideal share, {copies - len(layout.matrices)} redundant runs",
            f"  matrices per rank: {per_rank.min()} to {per_rank.max()}",
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
