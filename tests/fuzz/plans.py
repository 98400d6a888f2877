"""What must hold for every plan, whatever the parameters, the cut and the options; no process group."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from distributed_muon.layout.cost_model import CPU_GLOO, H100_INFINIBAND, NewtonSchulzCost
from distributed_muon.layout.cutting import ALIGNMENT, cut_buckets
from distributed_muon.layout.pieces import Layout, Piece, Shard
from distributed_muon.layout.plan import STRATEGIES, Plan, Transfer, Wave, make_plan
from distributed_muon.native.buckets import cut_families
from tests.dense import matrices_of, tp_slice
from tests.fuzz.weights import Weight, weights

BUCKETED = ("flat", "bucketed", "aligned")
CUTS = (*BUCKETED, "rows", "runs", "whole")
# Links and chips between which plans differ: where sharing a matrix costs nothing, and where nothing is worth it.
HARDWARE = {"gpu": H100_INFINIBAND, "cpu": CPU_GLOO, "free links": replace(H100_INFINIBAND, matmul_flops=1e6)}


@dataclass(frozen=True)
class PlanCase:
    """One plan.

    Args:
        weights: the parameters. dp, tp, copies: ranks that cut each parameter, tensor-parallel ranks, and HSDP's
            copies of the shards; their product is the world.
        cut: flat, bucketed and aligned as DistributedMuon cuts; "rows" as FSDP2, "runs" into runs of any length in
            any order of the ranks, "whole" every parameter on one rank.
        bucket_numel: of the bucketed cuts. families: per weight, its dtype. seed: of runs and whole.
        strategy, wave_bytes, teams, hardware, element_bytes, form, busy: of `make_plan`.
    """

    weights: tuple[Weight, ...]
    dp: int = 1
    tp: int = 1
    copies: int = 1
    cut: str = "flat"
    bucket_numel: int = 100
    families: tuple[str, ...] = ()
    seed: int = 0
    strategy: str = "home"
    wave_bytes: int = 1 << 20
    teams: bool = False
    hardware: str = "gpu"
    element_bytes: int = 2
    form: str = "auto"
    busy: tuple[int, ...] = ()

    @property
    def world(self) -> int:
        return self.dp * self.tp * self.copies

    def shards(self) -> list[list[Shard]]:
        """What every rank of the domain holds; rank = (copy * dp + dp rank) * tp + tp rank."""
        by_dp = self._bucketed() if self.cut in BUCKETED else self._by_weight()
        return [
            [shard._replace(replica=rank // (self.tp * self.dp)) for shard in by_dp[rank // self.tp % self.dp]]
            for rank in range(self.world)
        ]

    def tp_ranks(self) -> list[int]:
        """Per rank of the domain."""
        return [rank % self.tp for rank in range(self.world)]

    def layout(self) -> Layout:
        """The layout over all ranks."""
        specs = [weight.spec(number, self.tp) for number, weight in enumerate(self.weights)]
        return Layout.build(specs, self.shards(), self.tp_ranks())

    def plan(self) -> Plan:
        """The plan."""
        cost = NewtonSchulzCost(form=self.form, element_bytes=self.element_bytes)
        rates = {"hardware": HARDWARE[self.hardware], "teams": self.teams, "busy": self.busy}
        return make_plan(self.layout(), self.strategy, cost, wave_bytes=self.wave_bytes, **rates)

    def _numels(self) -> list[int]:
        return [weight.spec(number, self.tp).numel for number, weight in enumerate(self.weights)]

    def _bucketed(self) -> list[list[Shard]]:
        numels = self._numels()
        kinds = [(weight.rule is None, family) for weight, family in zip(self.weights, self.families, strict=True)]
        size = None if self.cut == "flat" else self.bucket_numel
        buckets = cut_families(kinds, numels, self.dp, size, self.cut == "aligned")
        assert sorted(tensor for bucket in buckets for tensor in bucket.tensors) == list(range(len(numels)))
        for bucket in buckets:
            assert len({kinds[tensor] for tensor in bucket.tensors}) == 1, "one family per bucket"
            assert bucket.numel % (self.dp * ALIGNMENT) == 0
            ends = 0
            for tensor, offset in zip(bucket.tensors, bucket.offsets, strict=True):
                assert offset % ALIGNMENT == 0 and offset >= ends, "tensors do not overlap"
                ends = offset + numels[tensor]
            assert ends <= bucket.numel
            filled = sum(-(-numels[tensor] // ALIGNMENT) * ALIGNMENT for tensor in bucket.tensors)
            assert bucket.numel < max(1, filled) + self.dp * ALIGNMENT, "no more padding than equal shards need"
        return cut_buckets(buckets, numels, self.dp)

    def _by_weight(self) -> list[list[Shard]]:
        chance, shards = random.Random(self.seed), [[] for _ in range(self.dp)]
        for tensor, numel in enumerate(self._numels()):
            order = list(range(self.dp))
            if self.cut == "rows":
                shape = self.weights[tensor].spec(tensor, self.tp).shape
                rows = shape[0] if shape else 1
                cuts = [min(-(-rows // self.dp) * rank, rows) * (numel // max(rows, 1)) for rank in range(1, self.dp)]
            else:
                chance.shuffle(order)
                cuts = sorted(chance.randint(0, numel) if self.cut == "runs" else 0 for _ in range(self.dp - 1))
            for rank, start, stop in zip(order, [0, *cuts], [*cuts, numel], strict=True):
                if start < stop:
                    shards[rank].append(Shard(tensor, start, stop))
        return shards


@st.composite
def plan_cases(draw: st.DrawFn) -> PlanCase:
    """Any plan of up to nine ranks."""
    dp, tp, copies = draw(
        st.one_of(
            st.tuples(st.integers(1, 9), st.just(1), st.just(1)),
            st.sampled_from([(1, 2, 1), (2, 2, 1), (3, 2, 1), (4, 2, 1), (2, 3, 1), (1, 4, 1), (2, 4, 1)]),
            st.sampled_from([(1, 1, 2), (2, 1, 2), (3, 1, 3), (4, 1, 2), (2, 2, 2)]),
        )
    )
    given = draw(weights(tp, empty=True))
    world = dp * tp * copies
    return PlanCase(
        given,
        dp,
        tp,
        copies,
        cut=draw(st.sampled_from(CUTS)),
        bucket_numel=draw(st.one_of(st.integers(1, 300), st.integers(300, 5000))),
        families=tuple(draw(st.sampled_from(["fp32", "bf16"])) for _ in given),
        seed=draw(st.integers(0, 99)),
        strategy=draw(st.sampled_from(STRATEGIES)),
        wave_bytes=draw(st.one_of(st.integers(1, 500), st.integers(500, 20_000), st.just(1 << 26))),
        teams=draw(st.booleans()),
        hardware=draw(st.sampled_from(sorted(HARDWARE))),
        element_bytes=draw(st.sampled_from([2, 4])),
        form=draw(st.sampled_from(["auto", "standard", "gram"])),
        busy=draw(st.one_of(st.just(()), st.tuples(*[st.integers(0, 10**6)] * world))),
    )


def check_plan(case: PlanCase) -> Plan:
    """Every invariant of one plan; AssertionError where one is broken."""
    shards = case.shards()
    _check_owners(case, shards)
    plan = case.plan()
    assert plan == case.plan() and plan.layout.world == case.world, "equal layouts give equal plans"
    _check_pieces(case, plan.layout)
    _check_homes(case, plan)
    _check_waves(plan)
    schedules = [plan.schedule(rank) for rank in range(case.world)]
    for rank, waves in enumerate(schedules):
        _check_own_work(plan, rank, waves)
    _check_exchange(plan, schedules)
    assert plan.explain().startswith(f"plan: {len(plan.layout.matrices)} matrices over {case.world} ranks")
    assert 0 <= plan.seconds(HARDWARE[case.hardware]) < float("inf")
    return plan


def _check_owners(case: PlanCase, shards: Sequence[Sequence[Shard]]) -> None:
    """Every element of every parameter on exactly one of the ranks that cut it; no rank holds two runs of one."""
    for tensor, numel in enumerate(case._numels()):
        for copy in range(case.copies):
            for tp_rank in range(case.tp):
                ranks = [(copy * case.dp + dp_rank) * case.tp + tp_rank for dp_rank in range(case.dp)]
                held = [[shard for shard in shards[rank] if shard.tensor == tensor] for rank in ranks]
                assert all(len(runs) <= 1 for runs in held)
                runs = sorted((shard.start, shard.stop) for own in held for shard in own)
                assert all(start < stop for start, stop in runs), "no empty shard"
                ends = [0, *(stop for _, stop in runs)]
                assert [start for start, _ in runs] == ends[:-1] and ends[-1] == numel, "once, without a gap"


def _check_pieces(case: PlanCase, layout: Layout) -> None:
    """The pieces of every matrix bring every element of it once, as dense indexing of the parameters finds it."""
    expected, local = [], {}
    for tensor, weight in enumerate(case.weights):
        whole = torch.arange(weight.numel).view(weight.shape)
        for tp_rank in range(case.tp):
            local[tensor, tp_rank] = tp_slice(whole, *weight[1:], case.tp, tp_rank).reshape(-1)
        if weight.rule is not None and weight.numel:
            expected += matrices_of(whole, weight.rule)
    assert len(layout.together) == len(expected)
    replicas = case.copies * case.tp
    copies = [[torch.full(layout.matrices[m].shape, -1) for m in range(len(layout.matrices))] for _ in range(replicas)]
    for piece in layout.pieces:
        shard = layout.shards[piece.rank][piece.shard]
        held = local[shard.tensor, layout.tp_ranks[piece.rank]][shard.start : shard.stop]
        assert piece.offset + (piece.rows - 1) * piece.stride + piece.cols <= held.numel(), "inside its shard"
        size = (piece.rows, piece.cols)
        source = held.as_strided(size, (piece.stride, 1), held.storage_offset() + piece.offset)
        copy = piece.rank // (case.tp * case.dp) * case.tp
        replicated = layout.tensors[shard.tensor].tp_size == 1
        copy += layout.tp_ranks[piece.rank] if replicated else 0
        assert (piece.replica == 0) == (copy == 0), "the first copy sends, no other does"
        target = copies[copy][piece.matrix].as_strided(size, (piece.pitch, 1), piece.at)
        assert (target == -1).all(), "an element lies in two pieces"
        target.copy_(source)
    for blocks, want in zip(layout.together, expected, strict=True):
        replicated = layout.tensors[layout.tensor_of_matrix[blocks[0]]].tp_size == 1
        for copy, built in enumerate(copies):
            whole = torch.cat([built[block] for block in blocks], int(want.shape[1] >= want.shape[0]))
            there = replicated or copy % case.tp == 0
            assert torch.equal(whole, want if there else torch.full_like(want, -1)), layout.matrices[blocks[0]].name


def _check_homes(case: PlanCase, plan: Plan) -> None:
    """One home, or every holder; work as balanced as longest-processing-time promises; teams side by side."""
    layout = plan.layout
    flops = [plan.newton_schulz.flops(matrix) for matrix in layout.matrices]
    work = [0] * case.world
    for cost, homes in zip(flops, plan.homes, strict=True):
        for home in homes:
            work[home] += cost
    assert plan.ns_flops_by_rank == work and plan.ns_flops_total == sum(flops)
    if plan.strategy == "gather":
        assert case.strategy != "home" and not plan.teams
        holders: list[set[int]] = [set() for _ in layout.matrices]
        for piece in layout.pieces:
            holders[piece.matrix].add(piece.rank)
        assert [set(homes) for homes in plan.homes] == holders
        return
    assert all(len(homes) == 1 for homes in plan.homes)
    for blocks in layout.together:
        team = [plan.homes[block][0] for block in blocks]
        size = len(team)
        assert size == 1 or case.teams
        assert size & (size - 1) == 0 and team == list(range(team[0], team[0] + size))
        assert size == 1 or team[0] % size == 0
    if not plan.teams:
        # Whoever took its last matrix was the least loaded rank then, so had at most the mean; 1/200 is what a home
        # near its holders may cost.
        busy = list(case.busy) or [0] * case.world
        bound = max(max(busy), (sum(busy) + sum(flops)) / case.world + max(flops, default=0))
        assert max(map(sum, zip(work, busy, strict=True))) <= bound * 1.005
    if not case.teams:
        assert layout.together == [range(m, m + 1) for m in range(len(layout.matrices))]


def _check_waves(plan: Plan) -> None:
    """Every matrix in one wave, teams together, and no home with more than a wave, or one matrix, at a time."""
    layout, wave_of = plan.layout, {m: number for number, wave in enumerate(plan.waves) for m in wave}
    assert sorted(m for wave in plan.waves for m in wave) == list(range(len(layout.matrices)))
    for blocks in layout.together:
        assert len({wave_of[block] for block in blocks}) == 1, "a team meets in one wave"
    for wave in plan.waves:
        taken: dict[int, list[int]] = defaultdict(list)
        for matrix in wave:
            for home in plan.homes[matrix]:
                taken[home].append(layout.matrices[matrix].numel)
        for sizes in taken.values():
            # The last one may reach over the edge; a matrix that is larger than a wave counts as one.
            assert sum(sizes[:-1]) < plan.wave_numel
    last = plan.last_wave_by_tensor()
    for tensor in range(len(layout.tensors)):
        own = [wave_of[m] for m, of in enumerate(layout.tensor_of_matrix) if of == tensor]
        assert last[tensor] == max(own, default=-1)


def _check_own_work(plan: Plan, rank: int, waves: Sequence[Wave]) -> None:
    """A rank orthogonalizes what it is home of, and holds its pieces, each in the wave of its matrix."""
    assert len(waves) == len(plan.waves)
    for wave, matrices in zip(waves, plan.waves, strict=True):
        mine = [m for m in matrices if rank in plan.homes[m]]
        assert sorted([m for stack in wave.stacks for m in stack] + list(wave.blocks)) == sorted(mine)
        assert all(plan.layout.matrices[block].team > 1 for block in wave.blocks)
        for stack in wave.stacks:
            assert len({plan.layout.matrices[m].shape for m in stack}) == 1
            assert all(plan.layout.matrices[m].team == 1 for m in stack)
        assert {piece.matrix for piece in wave.held} <= set(matrices)
        assert all(piece.rank == rank for piece in wave.held)
    held = Counter(piece for wave in waves for piece in wave.held)
    assert held == Counter(piece for piece in plan.layout.pieces if piece.rank == rank)


def _check_exchange(plan: Plan, schedules: Sequence[Sequence[Wave]]) -> None:
    """What rank a sends rank b is what b expects of a, in order; every home gets all, every holder its update."""
    world, layout = plan.layout.world, plan.layout
    sent = [0] * world
    to_homes: Counter[tuple[int, Piece]] = Counter()
    updated: Counter[Piece] = Counter()
    for waves in zip(*schedules, strict=True):
        for way in ("gather", "scatter"):
            transfers: list[Transfer] = [getattr(wave, way) for wave in waves]
            sends = [_by_peer(t.send, t.send_counts) for t in transfers]
            recvs = [_by_peer(t.recv, t.recv_counts) for t in transfers]
            assert {t.idle for t in transfers} == {not any(t.send or t.recv for t in transfers)}
            for a in range(world):
                assert not sends[a][a] and not recvs[a][a], "nothing is sent to oneself"
                for b in range(world):
                    assert sends[a][b] == recvs[b][a]
                    sent[a] += sum(piece.numel for piece in sends[a][b]) * plan.newton_schulz.element_bytes
                    for piece in sends[a][b]:
                        if way == "gather":
                            assert piece.rank == a and piece.replica == 0 and b in plan.homes[piece.matrix]
                            to_homes[b, piece] += 1
                        else:
                            assert piece.rank == b and plan.homes[piece.matrix][0] == a
                            updated[piece] += 1
    assert sent == plan.exchange_bytes_by_rank
    for piece in layout.pieces:
        homes = plan.homes[piece.matrix]
        assert updated[piece] == (piece.rank not in homes), "an update comes once, or is made here"
        for home in homes:
            assert to_homes[home, piece] == (piece.replica == 0 and piece.rank != home)
    assert to_homes.total() + updated.total() == sum(
        len(t.send) for s in schedules for w in s for t in (w.gather, w.scatter)
    )


def _by_peer(pieces: Sequence[Piece], counts: Sequence[int]) -> list[list[Piece]]:
    """The pieces as the counts cut the wire, per peer."""
    out: list[list[Piece]] = []
    left = list(pieces)
    for count in counts:
        mine = []
        while sum(piece.numel for piece in mine) < count:
            mine.append(left.pop(0))
        assert sum(piece.numel for piece in mine) == count, "a piece lies across two peers"
        out.append(mine)
    assert not left
    return out
