"""Sample efficiency: the runs that are asked for, what is read out of them, and what one run trains and measures."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from launch.models import huggingface
from perf import sample_efficiency, sample_runs, sample_studies
from perf.report.measurements import measurements
from perf.report.sample_efficiency import sample_efficiency_section, sample_efficiency_tile
from perf.sample_efficiency import KeptRuns
from perf.sample_runs import Run, build, fuse_qkv, hidden_matrices, make_optimizer, train
from perf.sample_studies import MODELS, PARTS, bracket, compare, power_law, steps_to, tables, wanted
from tests.torchrun import ROOT

MACHINE = {"gpu": None, "cpu": "a CPU", "cores": 2, "threads_per_rank": 1, "versions": {}, "date": "2026-01-01",
           "command": "a command"}  # fmt: skip


def result_of(run: Run, best: float = 2e-3) -> dict[str, Any]:
    """A run whose loss falls linearly in the steps: AdamW from 5 to 3 at its best rate, Muon twice as fast."""
    last = 3 + abs(math.log2(run.lr / best)) * 0.1 if run.optimizer == "adamw" else 5 - 4 * min(run.share, 1.0)
    larger = (run.parameters / MODELS["small"].runs("muon", 1.0)[0].parameters) ** -0.05
    curve = [[run.steps * part / 10, larger * (5 + (last - 5) * part / 10), 0.03, 0.2] for part in range(1, 11)]
    entropy = {
        "a.self_attn.q.weight": 0.9 if run.optimizer == "muon" else 0.8,
        "a.mlp.gate.weight": 0.5,
        "a.mlp.up.weight": 0.5,
    }
    return {"run": asdict(run), "curve": curve, "entropy": entropy, "weight_rms": entropy,
            "newton_schulz_flops": run.flops / 4}  # fmt: skip


def all_results(parts: tuple[str, ...], best: float = 2e-3) -> dict[Run, dict[str, Any]]:
    known: dict[Run, dict[str, Any]] = {}
    while missing := wanted(parts, known):
        known |= {run: result_of(run, best) for run in missing[:1]}
    return known


def test_the_best_rate_has_a_worse_one_on_either_side() -> None:
    for best, tried in ((2e-3, [1, 2, 4]), (5e-4, [0.25, 0.5, 1, 2, 4]), (8e-3, [1, 2, 4, 8, 16])):
        known = all_results(("small",), best)
        rates, found = bracket(MODELS["small"], known)
        assert found == best and [lr * 1e3 for lr in rates] == pytest.approx(tried)
        assert {run.lr for run in known if run.optimizer == "muon"} == {best}  # no tuning of Muon's
    assert bracket(MODELS["small"], {}) == ([1e-3, 2e-3, 4e-3], None)


def test_every_part_is_asked_for_once_and_ends() -> None:
    known = all_results(PARTS)
    titles = [table.title for table in tables(known)]
    assert len(titles) == 3 + len(sample_studies.STUDIES) and wanted(PARTS, known) == []
    assert {run.seed for run in known if run.size == "small" and run.kind == "dense"} == {0, 1, 2}
    starts = [run.start for run in known if run.start is not None]
    assert len(starts) == 12 and all(start in known for start in starts)
    assert tables({}) == []


def test_comparison() -> None:
    known = all_results(("small",))
    one = compare(MODELS["small"], known)
    assert one is not None and one.lr == 2e-3
    assert one.shares == pytest.approx([0.5] * 3) and one.margins == pytest.approx([5 - 4 * 0.52 - 3] * 3)
    del known[one.short[2]]
    assert compare(MODELS["small"], known) is None


def test_steps_to_a_loss() -> None:
    curve = [[10, 3.0, 0, 0], [20, 2.0, 0, 0], [30, 1.0, 0, 0]]
    assert steps_to(curve, 1.5) == 25 and steps_to(curve, 0.5) is None and steps_to(curve, 2.0) == 20


def test_power_law() -> None:
    assert power_law([(x, 3 * x**-0.05) for x in (1e3, 1e5, 1e6)]) == pytest.approx((3, -0.05))


def test_section_and_tile_show_the_runs() -> None:
    content = {"machine": MACHINE, "runs": list(all_results(("small", "medium", "moe", "decay")).values())}
    title, body = sample_efficiency_section(json.loads(json.dumps(content)))
    body = re.sub(r' data-label="[^"]*"', "", body)
    assert title == "Steps to AdamW's loss at AdamW's rate" and body.count("<svg") == 8
    assert "<td>0.50</td><td>0.50 0.50 0.50</td><td>2.9200</td><td>-0.0800</td>" in body
    assert "Muon&#x27;s is higher in 7 of 21 matrices" in body
    assert "No part is complete yet" in sample_efficiency_section({"machine": MACHINE, "runs": []})[1]
    row = measurements("sample_efficiency", content)[0]
    assert row.row == "dense-small-adamw-lr0.001-seed0" and row.value == pytest.approx(3.1)
    tile = sample_efficiency_tile(content)
    assert tile == ("0.50", "of AdamW's steps to its loss at its best rate; dense small, 3 seeds")


def test_kept_runs_are_read_again(tmp_path: Path) -> None:
    kept = KeptRuns(tmp_path / "kept.json")
    runs = [Run(start=Run(optimizer="adamw")), Run(seed=1, fused_qkv=True)]
    for run in runs:
        kept.add(result_of(run))
    again = KeptRuns(tmp_path / "kept.json")
    assert again.known == {run: result_of(run) for run in runs} and again.machine == kept.machine
    assert not list(tmp_path.glob("*.new"))


def test_missing_runs_are_trained_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Run(seed=7), Run(seed=8)
    kept = KeptRuns(tmp_path / "kept.json")
    kept.add(result_of(first))
    monkeypatch.setattr(sample_efficiency, "ProcessPoolExecutor", lambda workers, context: InThisProcess())
    monkeypatch.setattr(
        sample_efficiency, "wanted", lambda parts, known: [r for r in (first, second) if r not in known]
    )
    monkeypatch.setattr(sample_efficiency, "train", lambda run, weights, compiled: result_of(run))
    sample_efficiency.train_missing(PARTS, kept, 1, tmp_path, False)
    assert list(KeptRuns(kept.path).known) == [first, second]


class InThisProcess:
    """A pool that does the work at once."""

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, work: Any, *args: Any) -> Any:
        future = sample_efficiency.Future()
        future.set_result(work(*args))
        return future


def test_a_run_trains_and_measures(tmp_path: Path) -> None:
    run = Run(share=0.003, lr=4e-3)  # 12 steps
    first = train(run, tmp_path)
    schema = json.loads((ROOT / "perf" / "results.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate({"machine": MACHINE, "runs": [json.loads(json.dumps(first))]},
                        {**schema, "$ref": "#/$defs/sample_efficiency"})  # fmt: skip
    assert first["curve"][-1][0] == run.steps == 12 and first["curve"][-1][1] < first["curve"][0][1] < 5.6
    assert all(0.17 < moved < 0.19 for *_, moved in first["curve"])  # Newton-Schulz's 0.9 of the rule's 0.2
    assert first["newton_schulz_flops"] > 0 and len(first["entropy"]) == 14
    tuned = train(replace(run, start=run), tmp_path)
    assert tuned["curve"][0][1] < first["curve"][0][1] - 0.5  # goes on from the weights
    model = build(run)
    huggingface.load_weights(model, tmp_path / run.name)
    entropy = {name: sample_runs.entropy(matrix) for name, matrix in hidden_matrices(model)}
    assert entropy == pytest.approx(first["entropy"], abs=1e-6)


def test_update_rms_and_scale_rule_keep_the_decay() -> None:
    for run, factors in (
        (Run(update_rms=0.05), {(64, 64): 0.25, (192, 64): 0.25}),
        (Run(scale="hidden"), {(64, 64): 1.0, (192, 64): 3**-0.5, (64, 192): 3**-0.5}),
    ):
        groups = [group for group in make_optimizer(run, build(run)).param_groups if group["algorithm"] == "muon"]
        found = {tuple(group["params"][0].shape): group for group in groups}
        for shape, factor in factors.items():
            assert found[shape]["lr"] == pytest.approx(run.lr * factor)
            assert found[shape]["lr"] * found[shape]["weight_decay"] == pytest.approx(run.lr * run.weight_decay)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_norms_do_not_decay(optimizer: str) -> None:
    run = Run("moe", optimizer=optimizer)
    groups = make_optimizer(run, build(run)).param_groups
    assert {group["weight_decay"] for group in groups if group["params"][0].ndim == 1} == {0.0}
    assert {group["weight_decay"] for group in groups if group["params"][0].ndim > 1} == {0.1}
    assert {group["algorithm"] for group in groups} == {optimizer, "adamw"}


def test_router_or_experts_stay_with_adamw() -> None:
    for study in sample_studies.study("router", 1e-3).variants.values():
        run = study[0]
        model = build(run)
        names = {param: name for name, param in model.named_parameters()}
        muon = {names[p] for group in make_optimizer(run, model).param_groups if group["algorithm"] == "muon"
                for p in group["params"]}  # fmt: skip
        assert any("mlp.gate.weight" in name for name in muon) == ("gate" not in run.adamw)
        assert any(".experts." in name for name in muon) == ("experts" not in run.adamw)
        assert any("shared_experts" in name for name in muon)


def test_fused_attention_computes_the_same() -> None:
    torch.manual_seed(0)
    model = build(Run())
    tokens = torch.arange(128).view(1, -1)
    expected = model(tokens)
    for layer in model.layers:
        fuse_qkv(layer.self_attn)
    torch.testing.assert_close(model(tokens), expected)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in build(Run()).parameters())
    run = Run(fused_qkv=True)
    shapes = {matrix.shape for matrix in make_optimizer(run, build(run)).plan.layout.matrices}
    assert (128, 64) in shapes and (32, 64) not in shapes


def test_entropy_of_singular_values() -> None:
    assert sample_runs.entropy(torch.eye(8, 20)) == pytest.approx(1)
    assert sample_runs.entropy(torch.ones(8, 20)) == pytest.approx(0, abs=1e-9)
    halves = torch.zeros(4, 4)
    halves[0, 1] = halves[2, 0] = 3.0
    assert sample_runs.entropy(halves) == pytest.approx(0.5)  # log 2 / log 4


def test_matrices_are_those_that_muon_orthogonalizes() -> None:
    for run in (Run("moe"), Run()):
        model = build(run)
        ours = sorted(tuple(matrix.shape) for _, matrix in hidden_matrices(model))
        assert ours == sorted(matrix.shape for matrix in make_optimizer(run, model).plan.layout.matrices)
