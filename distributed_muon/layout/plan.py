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

from distributed_muon.layout.cost_model import H100_INFINIBAND, Hardware, NewtonSchulzCost
from distributed_muon.layout.homes import all_holders, one_home, team_sizes
from distributed_muon.layout.pieces import Layout, Piece

STRATEGIES = ("home", "gather", "auto")
# Of 16-bit matrices that a home takes into one wave. What a step allocates on a rank beyond the state stays below
# this number of such waves (two waves of matrices and wire, the fp32 updates of one, workspaces), or of the largest
# matrix where that is more, or below two gradient buckets: it does not grow with the model.
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
        orthogonalize it; the first one serves holders that are not homes. waves: matrices of each wave.
    """

    layout: Layout
    strategy: str
    newton_schulz: NewtonSchulzCost
    homes: tuple[tuple[int, ...], ...]
    waves: tuple[tuple[int, ...], ...]

    @cached_property
    def ns_flops_by_rank(self) -> list[int]:
        """Newton-Schulz FLOPs of each rank per step."""
        work = [0] * self.layout.world
        for matrix, homes in zip(self.layout.matrices, self.homes, strict=True):
            for home in homes:
                work[home] += self.newton_schulz.flops(matrix)
        return work

    @cached_property
    def ns_flops_total(self) -> int:
        """Newton-Schulz FLOPs per step if every matrix is orthogonalized once."""
        return sum(self.newton_schulz.flops(matrix) for matrix in self.layout.matrices)

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
        blocks = tuple(matrix for matrix in mine if self.layout.matrices[matrix].team > 1)
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for matrix in mine:
            if self.layout.matrices[matrix].team == 1:
                by_shape[self.layout.matrices[matrix].shape].append(matrix)
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
        return Wave(held, tuple(map(tuple, by_shape.values())), blocks, gather, scatter)

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

    def seconds(self, hardware: Hardware) -> float:
        """Estimate of one step's Newton-Schulz and exchange on the busiest rank, without overlap."""
        compute = max(self.ns_flops_by_rank, default=0) / hardware.matmul_flops
        exchange = max(self.exchange_bytes_by_rank, default=0) / hardware.link_bytes_per_second
        team = max(self.team_bytes_by_rank, default=0) / hardware.node_bytes_per_second
        return compute + exchange + team

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
            shapes[matrix.logical_shape] += 1
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
        sizes = team_sizes(layout, newton_schulz, hardware) if teams else [1] * len(layout.matrices)
        if max(sizes, default=1) > 1:
            layout = layout.with_teams(sizes)
        homes = one_home(layout, newton_schulz, busy)
    waves = _waves(layout, homes, max(1, wave_bytes // newton_schulz.element_bytes))
    return Plan(layout, strategy, newton_schulz, homes, waves)


def _waves(layout: Layout, homes: Sequence[tuple[int, ...]], wave_numel: int) -> tuple[tuple[int, ...], ...]:
    """Give every home about `wave_numel` elements per wave, in forward order, so that homes finish together."""
    taken = [0] * layout.world
    waves: dict[int, list[int]] = defaultdict(list)
    # The blocks of a team belong into one wave: their ranks meet in its collectives.
    for together in layout.together:
        wave = max(taken[home] // wave_numel for block in together for home in homes[block])
        for block in together:
            for home in homes[block]:
                taken[home] = max(taken[home], wave * wave_numel) + layout.matrices[block].numel
            waves[wave].append(block)
    return tuple(tuple(waves[wave]) for wave in sorted(waves))
