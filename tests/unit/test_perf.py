"""The performance tools: fits, predictions, bytes of the real optimizer on a fake process group, the report."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distributed_muon.layout.cost_model import Hardware, NewtonSchulzCost
from distributed_muon.layout.matrices import TensorSpec, Whole
from distributed_muon.layout.pieces import Layout, Shard
from distributed_muon.layout.plan import make_plan
from distributed_muon.planning.simulate import DomainPlan
from launch.world import World
from perf import comm, fake_world, links
from perf.check import check
from perf.cluster import MACHINES, Machine
from perf.fake_world import Case, run_case
from perf.prediction import predict
from perf.report import assemble
from perf.waves import WaveSeconds, pipeline
from perf.workload import MeasuredTraining, Setup, Training

H100 = MACHINES["h100-ib400"]
MOONLIGHT = Training("moonlight-16b-a3b", 64, ep=8)


def test_fit_recovers_alpha_and_bandwidth() -> None:
    points = [(sent, 2e-4 + sent / 5e9) for sent in (4096, 65536, 1 << 20, 1 << 24)]
    link = links.fit(points)
    assert link.alpha_seconds == pytest.approx(2e-4, rel=1e-6)
    assert link.bytes_per_second == pytest.approx(5e9, rel=1e-6)
    assert link.seconds(1 << 20) == pytest.approx(2e-4 + (1 << 20) / 5e9)


def test_fit_never_has_a_negative_latency() -> None:
    link = links.fit([(1000, 0.9e-6), (2000, 2.1e-6), (4000, 4.4e-6)])
    assert link.alpha_seconds == 0
    assert link.bytes_per_second == pytest.approx(1e9, rel=0.1)


def test_fit_refuses_messages_that_get_faster_with_size() -> None:
    with pytest.raises(ValueError, match="--rounds"):
        links.fit([(1000, 3.0), (2000, 2.0), (4000, 1.0)])


def test_fitted_rates_become_hardware() -> None:
    rates = {"reduce_scatter": (1e-5, 4e9), "all_gather": (2e-5, 3e9), "all_to_all": (5e-5, 1e9)}
    fitted = {
        "machine": {"gpu": None, "cpu": "a CPU"},
        "world": 2,
        "node_ranks": 2,
        "backend": "gloo",
        "matmul_flops": 1e11,
        "links": {
            kind: {"alpha_seconds": a, "bytes_per_second": b, "delay": 0.5, "points": [[1000, 0.1], [3000, 0.2]]}
            for kind, (a, b) in rates.items()
        },
    }
    hardware = links.hardware(fitted)
    assert (hardware.latency_seconds, hardware.link_bytes_per_second) == (5e-5, 1e9)
    assert (hardware.node_bytes_per_second, hardware.node_ranks, hardware.matmul_flops) == (3e9, 2, 1e11)


def test_measured_points_are_interpolated_and_extended() -> None:
    link = links.Link(1e-3, 1000.0, points=((1000, 1.0), (3000, 2.0)))
    assert [link.seconds(sent) for sent in (10, 1000, 2000, 3000, 5000)] == [1.0, 1.0, 1.5, 2.0, 4.0]


def test_links_of_an_older_format_are_refused() -> None:
    with pytest.raises(ValueError, match="'delay' is missing: measure again"):
        links.fitted_links({"links": {kind: {"alpha_seconds": 0, "bytes_per_second": 1} for kind in links.KINDS}})


def two_rank_training() -> MeasuredTraining:
    """Two 16x16 matrices and an AdamW vector of 32, in two buckets of 272 elements."""
    tensors = [TensorSpec("a", (16, 16), Whole()), TensorSpec("b", (16, 16), Whole()), TensorSpec("norm", (32,), None)]
    # Rank 0 holds all of a and half of the norm; rank 1 the rest.
    shards = [[Shard(0, 0, 256), Shard(2, 0, 16)], [Shard(1, 0, 256), Shard(2, 16, 32)]]
    plan = make_plan(Layout.build(tensors, shards), "home")
    domain = DomainPlan("all", plan, 1, 0, 0, adamw_bytes=6 * 544 / 2, buckets=(272, 272), last_buckets=(272,))
    return MeasuredTraining(2, domain, forward_backward=3.0)


def measured_machine(delay: float) -> Machine:
    """A byte a microsecond after 10 us; 1 s a matrix; 1 KB/s of memory."""
    rates = Hardware("made up", 1e9, 1e6, 1e-5, 1, 1e6)
    link = links.Link(1e-5, 1e6, delay)
    return Machine(rates, 1e9, 1e3, links=dict.fromkeys(links.KINDS, link), newton_schulz={(16, 16): 1.0})


def test_a_measured_step_is_predicted_as_by_hand() -> None:
    found = predict(two_rank_training(), Setup("home"), measured_machine(0.0))
    assert found.forward_backward == 3.0
    assert found.exposed["newton_schulz"] == 1.0  # a matrix at each home, where it lies already
    assert found.exposed["exchange"] == 0.0
    # 512 Muon elements of 96 bytes and 32 of AdamW's 60, half of them on each rank.
    assert found.exposed["elementwise"] == pytest.approx((512 * 96 + 32 * 60) / 2 / 1e3)
    # fp32 reduce-scatter: 544 x 4 / 2 = 1,088 bytes in 2 calls, of which the last is exposed; bf16 all-gather: half.
    assert found.communication["reduce_scatter"] == pytest.approx(2e-5 + 1088e-6)
    assert found.exposed["reduce_scatter"] == pytest.approx(1e-5 + 544e-6)
    assert found.exposed["all_gather"] == pytest.approx(1e-5 + 272e-6)


def test_a_collective_that_delays_computation_is_exposed_and_a_slow_one_outlasts_its_window() -> None:
    training = two_rank_training()
    found = predict(training, Setup("home"), measured_machine(0.75))
    # The wait for the last of two is less than the delay that all of it causes; for the all-gather likewise.
    assert found.exposed["reduce_scatter"] == pytest.approx(1e-5 + 544e-6)
    delays = [0.75 * (2e-5 + sent) - (1e-5 + sent / 2) for sent in (1088e-6, 544e-6)]
    assert found.exposed["delayed"] == pytest.approx(sum(delays))
    short = replace(training, forward_backward=6e-4)  # of which the backward is 4e-4
    found = predict(short, Setup("home"), measured_machine(0.0))
    assert found.exposed["reduce_scatter"] == pytest.approx(2e-5 + 1088e-6 - 4e-4)


def test_pieces_away_from_home_pay_two_all_to_alls() -> None:
    training = two_rank_training()
    tensors = training.domain.plan.layout.tensors
    shards = [[Shard(0, 0, 128), Shard(1, 0, 128), Shard(2, 0, 32)], [Shard(0, 128, 256), Shard(1, 128, 256)]]
    plan = make_plan(Layout.build(tensors, shards), "home")
    found = predict(replace(training, domain=replace(training.domain, plan=plan)), Setup("home"), measured_machine(0.0))
    # A half matrix of bf16 each way: 256 bytes.
    assert found.exposed["exchange"] == pytest.approx(2 * (1e-5 + 256e-6))
    assert found.exposed["newton_schulz"] == 1.0


def measured_run(world: int) -> dict:
    """What perf.comm would have written of "home", but for its plan."""
    words = ["--hidden-size", "64", "--layers", "2", "--bucket-mb", "0.1"]
    computation = {"forward_backward_seconds": 2.0, "newton_schulz_seconds": {"64x192": 0.5, "192x64": 0.25}}
    rows = {"reduce_scatter": {"calls": 5, "exposed_seconds_least": 0.25}}
    contender = {"computation": computation, "collectives": rows, "phases": {"newton_schulz": 0.125, "update": 0.5,
                 "momentum": 0.25}, "step_seconds": 4.0, "plan": "another"}  # fmt: skip
    settings = vars(comm.parse_arguments(words))
    return {"world": world, "device": "cpu", "settings": settings, "contenders": {"home": contender}}


def test_a_check_compares_the_plan_of_the_measured_run() -> None:
    fitted = {
        "world": 2, "node_ranks": 1, "backend": "gloo", "machine": MACHINE, "matmul_flops": 1e12,
        "memory_bytes_per_second": 1e12,
        "links": {kind: {"alpha_seconds": 0.0, "bytes_per_second": 1e9, "delay": 0.0, "points": [[1, 0.125]]}
                  for kind in links.KINDS},
    }  # fmt: skip
    measured = measured_run(2)
    with pytest.raises(ValueError, match="home: the plan built here is not the measured one"):
        check(fitted, measured)
    with fake_world.fake_rank(0, 2):
        world = World(0, 2, torch.device("cpu"))
        optimizer = comm.Training("home", world, Namespace(**measured["settings"])).optimizer
    measured["contenders"]["home"]["plan"] = comm.plan_digest(optimizer.plan)
    (row,) = check(fitted, measured)
    seconds = {(64, 192): 0.5, (192, 64): 0.25}
    by_rank = [0.0, 0.0]
    for matrix, homes in zip(optimizer.plan.layout.matrices, optimizer.plan.homes, strict=True):
        by_rank[homes[0]] += seconds.get(matrix.shape, 0.0)
    parts = row["parts"]
    assert parts["newton_schulz"] == {"predicted": pytest.approx(max(by_rank), rel=1e-3), "measured": 0.125}
    assert parts["elementwise"]["measured"] == 0.75
    # Five calls of 0.125 s are 0.625 s, all under a backward of 4/3 s but the last of Muon's and of AdamW's.
    assert parts["reduce_scatter"] == {"predicted": pytest.approx(0.25, rel=1e-2), "measured": 0.25}
    assert row["predicted_seconds"] == pytest.approx(2.0 + sum(part["predicted"] for part in parts.values()))
    assert row["ratio"] == row["predicted_seconds"] / 4.0
    assert parts["delayed"] == {"predicted": 0.0, "measured": 4.0 - 2.0 - 0.125 - 0.75 - 0.25}
    distances = {name: abs(part["predicted"] - part["measured"]) for name, part in parts.items()}
    assert row["off"] == pytest.approx(sum(distances.values()) / 4.0)
    assert row["worst"] == max(distances, key=lambda name: distances[name])
    with pytest.raises(ValueError, match=r"--links is of 2 ranks and --check of 4"):
        check(fitted, measured_run(4))


def test_pipeline_hides_exchange_behind_newton_schulz() -> None:
    waves = WaveSeconds(gather=(1.0, 1.0, 1.0), work=(4.0, 4.0, 4.0), scatter=(1.0, 1.0, 1.0), newton_schulz=(12.0,))
    assert pipeline(waves, 12.0) == 14.0  # only the first gather and the last scatter show
    # Work of nothing: six all-to-alls one after the other.
    assert pipeline(waves, 0.0) == 6.0
    slow = replace(waves, gather=(5.0, 5.0, 5.0))
    # g0 5, g1 10, NS0 9 -> s0 11, g2 16, NS1 14 -> s1 17, NS2 20 -> s2 21
    assert pipeline(slow, 12.0) == 21.0


def test_flops_per_token_of_llama_3_8b() -> None:
    training = Training("llama-3-8b", 8, sequence=8192)
    layer = 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336
    assert training.flops_per_token() == 6 * (32 * layer + 128256 * 4096) + 3 * 32 * 8192 * 2 * 4096
    assert training.tokens_per_rank == 2048 * 8192 / 8
    seconds = training.flops_per_token() * training.tokens_per_rank / (989e12 * 0.35)
    assert training.forward_backward_seconds(H100) == pytest.approx(seconds)


def test_moonlight_at_64_ranks() -> None:
    home, adamw = predict(MOONLIGHT, Setup(), H100), predict(MOONLIGHT, Setup("adamw"), H100)
    assert home.forward_backward == adamw.forward_backward == pytest.approx(14.3, rel=0.01)
    assert 0.001 < home.share < 0.005
    assert "newton_schulz" not in adamw.exposed and adamw.share < home.share
    # Half of AdamW's moments: 4 bytes x 1/64 of dense and 1/8 of the expert matrices of one slice.
    saved = adamw.memory["masters and moments, fp32"] - home.memory["masters and moments, fp32"]
    dense = 15_291_662_336 - 26 * 64 * 3 * 1408 * 2048  # matrices outside routed experts
    assert saved == pytest.approx(4 * (dense / 64 + 26 * 8 * 3 * 1408 * 2048 / 8), rel=0.02)


@pytest.mark.parametrize(
    "worse",
    [
        (MOONLIGHT, Setup("gather"), H100),
        (MOONLIGHT, Setup(overlap=False), H100),
        (MOONLIGHT, Setup(layout="flat"), H100),
        (MOONLIGHT, Setup(newton_schulz=NewtonSchulzCost(steps=10)), H100),
        (MOONLIGHT, Setup(newton_schulz=NewtonSchulzCost(element_bytes=4)), H100),
        (replace(MOONLIGHT, mfu=0.5), Setup(), H100),
        (replace(MOONLIGHT, global_tokens=MOONLIGHT.global_tokens // 4), Setup(), H100),
        (MOONLIGHT, Setup(), MACHINES["h100-eth100"]),
    ],
)
def test_what_makes_it_worse_does(worse: tuple) -> None:
    assert predict(*worse).share > predict(MOONLIGHT, Setup(), H100).share


def test_impossible_parallel_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="tp x pp = 6 does not divide 64 ranks"):
        predict(replace(MOONLIGHT, tp=3, pp=2), Setup(), H100)


@pytest.mark.parametrize(
    "case, low, high",
    [
        (Case("llama-3-8b", 64, "home", "bucketed", 64), 1.0, 1.02),
        (Case("llama-3-8b", 256, "gather", "flat", 64), 1.0, 1.25),
        (Case("llama-3-8b", 16, "gather", "bucketed", 64), 1.25, 4 / 3),
    ],
)
def test_real_optimizer_sends_what_is_predicted(case: Case, low: float, high: float) -> None:
    outcome = run_case(case)
    assert outcome.predicted == outcome.measured
    assert outcome.measured["to_homes"] > 0
    assert low < outcome.over_adamw <= high
    assert outcome.over_adamw == pytest.approx(outcome.over_adamw_full_size, abs=0.02)
    assert outcome.within_bounds


def test_a_wrong_prediction_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fake_world.predicted_bytes

    def wrong(optimizer: object) -> dict[str, int]:
        labels = right(optimizer)
        return {**labels, "to_homes": labels["to_homes"] + 2}

    monkeypatch.setattr(fake_world, "predicted_bytes", wrong)
    with pytest.raises(RuntimeError, match="was predicted to send"):
        run_case(Case("llama-3-8b", 64, "home", "flat", 128))


MACHINE = {
    "gpu": None, "cpu": "a CPU", "cores": 2, "threads_per_rank": 1, "versions": {"torch": "2"}, "date": "2026-01-01",
    "command": "python -m perf.x <&>",
}  # fmt: skip


def test_report_is_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    row = {"seconds": 1.0, "state_bytes": 8 << 20, "sent_bytes": 1 << 20, "transient_bytes": 2 << 20, "ns_calls": 3}
    ours = {**row, "name": "DistributedMuon home", "phases": {"newton_schulz": 0.7, "gather_wait": 0.1}}
    rows = [ours, {**row, "name": "torch.optim.Muon", "seconds": 2.5}]
    step = {"machine": MACHINE, "world": 2, "floor_seconds": 0.5, "rows": rows}
    (tmp_path / "step.json").write_text(json.dumps(step))
    page = assemble.build(assemble.load(tmp_path))
    assert "<b>2.50x</b>" in page and "A whole optimizer step" in page and "8 MiB" in page
    assert "&lt;&amp;&gt;" in page
    assert page.count("<svg") == 4  # each chart for screens and for phones
    assert not re.search(r'(src|href)="(?!#)', page)  # no file, no network
    assert page == assemble.build(assemble.load(tmp_path))


@pytest.mark.parametrize("kind", [kind for kind in assemble.SECTIONS])
def test_a_result_of_another_format_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"{kind}_old.json"
    path.write_text(json.dumps({"machine": MACHINE, "rows": [{"seconds": {}}]}))
    with pytest.raises(ValueError, match=rf"{kind}_old\.json is no result of this perf\.{kind} .*: measure again"):
        assemble.build(assemble.load(tmp_path))


def test_report_without_results_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no result: run perf\.step"):
        assemble.load(tmp_path)
    (tmp_path / "scale.json").write_text("{")
    with pytest.raises(ValueError, match=r"scale\.json is not JSON"):
        assemble.load(tmp_path)
