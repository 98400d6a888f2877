"""The report's section on sample efficiency shows the numbers of the result it is given."""

from __future__ import annotations

import re

import pytest

from perf.report.sample_efficiency import sample_efficiency_section, sample_efficiency_tile

MACHINE = {"gpu": None, "cpu": "a CPU", "cores": 2, "threads_per_rank": 1, "versions": {}, "date": "2026-01-01",
           "command": "a command"}  # fmt: skip


@pytest.mark.parametrize("models", [1, 6])
def test_sample_efficiency(models: int) -> None:
    curves = {"adamw": [[10, 3.0], [20, 2.0]], "muon": [[10, 2.5], [20, 1.5]], "short": [[10, 2.5], [13, 2.0]]}
    curves["tuned"] = curves["muon"]
    row = {
        "kind": "dense", "size": "small", "parameters": 131392, "lr": 4e-3, "share_of_steps": [0.5, None],
        "final": {"adamw": [2.0, 3.0], "muon": [1.5, 1.6], "tuned": [1.3, 1.5], "short": [2.0, 2.1]}, "curves": curves,
        "tuned_lr": 8e-3, "tuned_share_of_steps": [0.25, 0.3], "update_over_lr": {"adamw": 0.412, "muon": 0.18},
        "entropy": {"adamw": {"attention": 0.9}, "muon": {"attention": 0.95}},
    }  # fmt: skip
    result = {"machine": MACHINE, "steps": 20, "seeds": [0, 1], "rows": [row] * models}
    result["sweep"] = [{"optimizer": "adamw", "lr": 1e-3}, {"optimizer": "muon", "lr": 4e-3}]
    body = re.sub(r' data-label="[^"]*"', "", sample_efficiency_section(result)[1])
    assert "<td>2.5000</td><td>1.5500</td><td>0.50, never</td><td>0.008</td><td>1.4000</td><td>0.25, 0.30</td>" in body
    assert "<td>2.0500</td><td>0.41, 0.18</td>" in body and "in 0.65 of the steps" in body and body.count("<svg") == 4
    assert sample_efficiency_tile(result) == (
        "0.28", "of AdamW's steps to its best loss, median of toy runs at Muon's own rate; at AdamW's rate "
        f"{models} of {2 * models} get there",
    )  # fmt: skip
