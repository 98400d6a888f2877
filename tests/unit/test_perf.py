"""The performance tools: fits, predictions, bytes of the real optimizer on a fake process group, the report."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from distributed_muon.cost_model import NewtonSchulz
from perf import fake_world, links, report
from perf.fake_world import Case, run_case
from perf.prediction import MACHINES, Setup, Training, WaveSeconds, pipeline, predict

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
        "links": {kind: {"alpha_seconds": a, "bytes_per_second": b} for kind, (a, b) in rates.items()},
    }
    hardware = links.hardware(fitted)
    assert (hardware.latency_seconds, hardware.link_bytes_per_second) == (5e-5, 1e9)
    assert (hardware.node_bytes_per_second, hardware.node_ranks, hardware.matmul_flops) == (3e9, 2, 1e11)


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
        (MOONLIGHT, Setup(newton_schulz=NewtonSchulz(steps=10)), H100),
        (MOONLIGHT, Setup(newton_schulz=NewtonSchulz(element_bytes=4)), H100),
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
    row = {"seconds": 1.0, "state_bytes": 8 << 20, "sent_bytes": {"all_gather": 1 << 20}, "ns_calls": 3}
    ours = {**row, "name": "DistributedMuon home", "phases": {"newton_schulz": 0.7, "gather_wait": 0.1}}
    step = {"machine": MACHINE, "world": 2, "rows": [ours, {**row, "name": "torch.optim.Muon", "seconds": 2.5}]}
    (tmp_path / "step.json").write_text(json.dumps(step))
    page = report.build(report.load(tmp_path))
    assert "<b>2.50x</b>" in page and "A whole optimizer step" in page and "8 MiB" in page
    assert "&lt;&amp;&gt;" in page
    assert page.count("<svg") == 2
    assert not re.search(r'(src|href)="(?!#)', page)  # no file, no network
    assert page == report.build(report.load(tmp_path))


def test_report_without_results_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no result: run perf\.step"):
        report.load(tmp_path)
    (tmp_path / "scale.json").write_text("{")
    with pytest.raises(ValueError, match=r"scale\.json is not JSON"):
        report.load(tmp_path)
