"""Plans: balance, homes near the holders, waves, and transfers that match on both sides."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from distributed_muon.layout.cost_model import H100_INFINIBAND, NewtonSchulzCost
from distributed_muon.layout.cutting import cut_buckets, make_buckets
from distributed_muon.layout.matrices import Experts, Split, TensorSpec, Whole
from distributed_muon.layout.pieces import Layout, Shard
from distributed_muon.layout.plan import Plan, make_plan
from tests.unit.test_layout import build


def transformer(layers: int = 12, hidden: int = 256, ffn: int = 704) -> list[TensorSpec]:
    """Embedding and head for AdamW, the rest for Muon, as a small Llama."""
    specs = [TensorSpec("embedding", (8000, hidden))]
    for i in range(layers):
        specs += [
            TensorSpec(f"{i}.norm", (hidden,)),
            TensorSpec(f"{i}.q", (hidden, hidden), Whole()),
            TensorSpec(f"{i}.k", (hidden // 4, hidden), Whole()),
            TensorSpec(f"{i}.v", (hidden // 4, hidden), Whole()),
            TensorSpec(f"{i}.o", (hidden, hidden), Whole()),
            TensorSpec(f"{i}.gate_up", (2 * ffn, hidden), Split((ffn, ffn))),
            TensorSpec(f"{i}.down", (hidden, ffn), Whole()),
        ]
    return [*specs, TensorSpec("head", (8000, hidden))]


def layout_of(specs: list[TensorSpec], dp: int, bucket_numel: int | None, aligned: bool) -> Layout:
    """Buckets of AdamW and of Muon tensors apart, as DistributedMuon makes them."""
    shards: list[list[Shard]] = [[] for _ in range(dp)]
    for muon in (True, False):
        tensors = [t for t, spec in enumerate(specs) if (spec.rule is not None) == muon]
        numels = [specs[t].numel for t in tensors]
        buckets = make_buckets(numels, dp, bucket_numel=bucket_numel, aligned=aligned)
        for rank, held in enumerate(cut_buckets(buckets, numels, dp)):
            shards[rank] += [shard._replace(tensor=tensors[shard.tensor]) for shard in held]
    return Layout.build(specs, shards)


KINDS = {"flat": (None, False), "bucketed": (600_000, False), "aligned": (600_000, True)}


def max_over_mean(values: list[float]) -> float:
    return max(values) / (sum(values) / len(values))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dp", [2, 4, 8, 16, 31])
def test_work_and_state_are_balanced(dp: int, kind: str) -> None:
    """Row 36: state within 1.1 and Newton-Schulz within 1.3 of the mean, the embedding on no single rank."""
    layout = layout_of(transformer(), dp, *KINDS[kind])
    muon, adamw = [0] * dp, [0] * dp
    for rank, shards in enumerate(layout.shards):
        for shard in shards:
            held = muon if layout.tensors[shard.tensor].rule else adamw
            held[rank] += shard.stop - shard.start
    assert max_over_mean([8 * m + 12 * a for m, a in zip(muon, adamw, strict=True)]) <= 1.1
    plan = make_plan(layout, "home")
    assert plan.ns_max_over_ideal <= 1.3
    assert plan.ns_max_over_ideal == pytest.approx(max_over_mean(plan.ns_flops_by_rank))
    assert (
        sum(plan.ns_flops_by_rank)
        == plan.ns_flops_total
        == sum(plan.newton_schulz.flops(matrix) for matrix in plan.layout.matrices)
    )


@pytest.mark.parametrize("dp", [100, 256])
def test_more_ranks_than_matrices_stay_near_what_is_possible(dp: int) -> None:
    """Row 36: without teams the largest matrix is the bound; teams never make it worse."""
    layout = layout_of(transformer(), dp, None, False)
    alone = make_plan(layout, "home", teams=False)
    largest = max(alone.newton_schulz.flops(m) for m in layout.matrices)
    assert max(alone.ns_flops_by_rank) == largest
    shared = make_plan(layout, "home")
    assert max(shared.ns_flops_by_rank) <= largest


def test_teams_are_taken_where_the_links_allow() -> None:
    """One matrix on four ranks: all of them share it over fast links, none over slow ones."""
    layout = layout_of([TensorSpec("w", (4096, 16384), Whole())], 4, None, False)
    slow = replace(H100_INFINIBAND, node_bytes_per_second=1e6)
    for hardware, team in ((H100_INFINIBAND, 4), (slow, 1)):
        plan = make_plan(layout, "home", hardware=hardware)
        assert [matrix.team for matrix in plan.layout.matrices] == [team] * team
        assert sorted(plan.homes) == [(rank,) for rank in range(team)]


def test_experts_are_homes_of_their_own() -> None:
    """A stack of 64 experts is spread over all ranks, not one rank's work."""
    plan = make_plan(layout_of([TensorSpec("experts", (64, 96, 32), Experts())], 8, None, False), "home")
    assert Counter(home for (home,) in plan.homes) == dict.fromkeys(range(8), 8)
    assert plan.exchange_bytes_by_rank == [0] * 8


@pytest.mark.parametrize("dp", [2, 4, 8, 16])
def test_homes_stay_with_the_holders(dp: int) -> None:
    """A flat buffer hardly exchanges anything: less than a third of what homes anywhere would cost."""
    near = make_plan(layout_of(transformer(), dp, None, False), "home", teams=False)
    numel = sum(matrix.numel for matrix in near.layout.matrices)
    anywhere = 2 * 2 * numel * (dp - 1) / dp  # bf16, to the home and back
    assert sum(near.exchange_bytes_by_rank) < anywhere / 3
    aligned = make_plan(
        layout_of([TensorSpec(str(i), (64, 64), Whole()) for i in range(2 * dp)], dp, None, True), "home"
    )
    assert sum(aligned.exchange_bytes_by_rank) == 0


@pytest.mark.parametrize("strategy", ["home", "gather"])
@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (3, 1), (4, 1), (2, 2), (2, 4)])
@pytest.mark.parametrize("wave_bytes", [1, 400, 1 << 20])
def test_transfers_match_on_both_sides_and_count_their_bytes(strategy: str, dp: int, tp: int, wave_bytes: int) -> None:
    """Rows 28 and 37: what one rank sends another expects, in the same order; idle means idle for all."""
    plan = make_plan(build(dp, tp, 150, False), strategy, wave_bytes=wave_bytes, teams=False)
    world = dp * tp
    schedules = [plan.schedule(rank) for rank in range(world)]
    sent = [0] * world
    arrived: Counter = Counter()
    for waves in zip(*schedules, strict=True):
        for way in ("gather", "scatter"):
            transfers = [getattr(wave, way) for wave in waves]
            assert len({t.idle for t in transfers}) == 1
            assert transfers[0].idle == (not any(t.send or t.recv for t in transfers))
            for a, b in itertools.product(range(world), repeat=2):
                out, into = (
                    slices(transfers[a].send, transfers[a].send_counts, b),
                    slices(transfers[b].recv, transfers[b].recv_counts, a),
                )
                assert out == into
                assert a != b or not out, "nothing is sent to oneself"
                sent[a] += 2 * sum(piece.numel for piece in out)
                if way == "gather":
                    arrived.update((piece.matrix, b, piece.at) for piece in out)
                else:
                    assert all(piece.rank == b and plan.homes[piece.matrix][0] == a for piece in out)
    assert sent == plan.exchange_bytes_by_rank
    # Every home gets every piece of its matrices once, by wire or because it holds it.
    for piece in plan.layout.pieces:
        if piece.replica == 0:
            for home in plan.homes[piece.matrix]:
                assert arrived[piece.matrix, home, piece.at] == (home != piece.rank)


def slices(pieces: tuple, counts: tuple[int, ...], peer: int) -> list:
    """The pieces that go to or come from `peer`, as the counts cut the wire."""
    begin, stop = sum(counts[:peer]), sum(counts[: peer + 1])
    out, at = [], 0
    for piece in pieces:
        if begin <= at < stop:
            out.append(piece)
        at += piece.numel
    assert at == sum(counts)
    return out


@pytest.mark.parametrize("strategy", ["home", "gather"])
def test_waves_bound_what_is_alive(strategy: str) -> None:
    """Row 37: a home takes no more into a wave than asked for, or one matrix; every matrix in one wave."""
    for teams, wave_bytes in itertools.product((False, True), (1, 300_000, 1 << 30)):
        plan = make_plan(layout_of(transformer(), 8, 600_000, False), strategy, wave_bytes=wave_bytes, teams=teams)
        assert sorted(m for wave in plan.waves for m in wave) == list(range(len(plan.layout.matrices)))
        if wave_bytes == 1 << 30:
            assert len(plan.waves) == 1
        for wave in plan.waves:
            held: dict[int, list[int]] = {}
            for matrix in wave:
                for home in plan.homes[matrix]:
                    held.setdefault(home, []).append(2 * plan.layout.matrices[matrix].numel)
            for sizes in held.values():
                assert sum(sizes) - sizes[-1] < max(wave_bytes, 1) or len(sizes) == 1
    assert len(make_plan(layout_of(transformer(), 8, None, False), strategy, wave_bytes=300_000).waves) > 3


def test_last_waves_cover_fused_parameters() -> None:
    """A bucket is gathered only after the last of a parameter's matrices was updated; AdamW's at once."""
    plan = make_plan(layout_of(transformer(), 4, 600_000, False), "home", wave_bytes=200_000, teams=False)
    last = plan.last_wave_by_tensor()
    for tensor, spec in enumerate(plan.layout.tensors):
        waves = [
            w for w, matrices in enumerate(plan.waves) for m in matrices if plan.layout.tensor_of_matrix[m] == tensor
        ]
        assert last[tensor] == max(waves, default=-1)
        assert (last[tensor] == -1) == (spec.rule is None)


def test_plans_are_deterministic() -> None:
    """Row 10: equal layouts give equal plans, whatever the hash seed or insertion order."""
    for strategy in ("home", "gather", "auto"):
        first, second = (make_plan(layout_of(transformer(), 16, *KINDS["bucketed"]), strategy) for _ in range(2))
        assert first == second
        assert [first.schedule(r) for r in range(16)] == [second.schedule(r) for r in range(16)]


def test_gather_has_every_holder_as_home_and_sends_nothing_back() -> None:
    plan = make_plan(layout_of(transformer(), 8, *KINDS["bucketed"]), "gather")
    holders: list[set[int]] = [set() for _ in plan.layout.matrices]
    for piece in plan.layout.pieces:
        holders[piece.matrix].add(piece.rank)
    assert [set(homes) for homes in plan.homes] == holders
    assert all(wave.scatter.idle and not wave.scatter.send for rank in range(8) for wave in plan.schedule(rank))
    assert sum(plan.ns_flops_by_rank) > 2 * plan.ns_flops_total, "buckets cut eight ways are gathered redundantly"


def test_auto_takes_the_faster_one() -> None:
    """With free links redundancy is what counts, with free matmuls the bytes."""
    layout = layout_of(transformer(), 8, *KINDS["bucketed"])
    slow_chip = replace(H100_INFINIBAND, matmul_flops=1e9)
    slow_link = replace(H100_INFINIBAND, matmul_flops=1e18, link_bytes_per_second=1e3, node_bytes_per_second=1e3)
    homes = make_plan(layout, "auto", hardware=slow_chip, teams=False)
    gather = make_plan(layout, "auto", hardware=slow_link, teams=False)
    assert homes.strategy == "home"
    sent = {s: max(make_plan(layout, s, teams=False).exchange_bytes_by_rank) for s in ("home", "gather")}
    assert gather.strategy == min(sent, key=sent.get)


def test_fp32_on_the_wire_doubles_the_bytes() -> None:
    layout = layout_of(transformer(), 8, *KINDS["bucketed"])
    plans: list[Plan] = [make_plan(layout, "gather", NewtonSchulzCost(element_bytes=size)) for size in (2, 4)]
    assert [2 * count for count in plans[0].exchange_bytes_by_rank] == plans[1].exchange_bytes_by_rank
    assert sum(plans[0].exchange_bytes_by_rank) > 0


def test_a_plan_without_matrices_is_empty() -> None:
    plan = make_plan(layout_of([TensorSpec("b", (100,))], 4, None, False), "auto")
    assert plan.waves == () and plan.exchange_bytes_by_rank == [0] * 4 and plan.ns_max_over_ideal == 1.0


def test_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="strategy 'best' is unknown: choose one of home, gather, auto"):
        make_plan(layout_of([], 1, None, False), "best")
