"""launch/benchmark.sh between two hosts: every result arrives on rank 0's, and a failing job is named on both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf.two_hosts import run_benchmark
from tests.integrations import megatron_cpu
from tests.multihost.hosts import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no hosts: {why_not()}")
TINY = {
    "LINKS_FLAGS": "--rounds 1",
    "STEP_FLAGS": "--layers 1 --rounds 1 --ours",
    "COMM_FLAGS": "--hidden-size 64 --layers 1 --batch-size 1 --steps 1",
    "BUCKETS": "0.1 1",
    "PREFLIGHT": "0",
}
MEGATRON = {
    "SPLITS": "2x1",
    "MEGATRON": "tests.integrations.megatron_cpu launch.pretrain_megatron",
    "MEGATRON_FLAGS": "--model dense --num-hidden-layers 2 --hidden-size 64 --intermediate-size 128 --dtype fp32 "
    "--num-attention-heads 2 --batch-size 2 --sequence-length 32 --validation-samples 4 --warmup 2 --steps 4",
}


@pytest.mark.slow
def test_every_result_is_gathered(tmp_path: Path) -> None:
    out = tmp_path / "out"
    splits = MEGATRON if megatron_cpu.available() else {"SPLITS": ""}
    printed = run_benchmark(out, tmp_path, None, {**TINY, **splits}, port=29640)
    result = json.loads((out / "benchmark.json").read_text())
    assert result["world"] == 2 and result["node_ranks"] == 1
    assert set(result["links"]["links"]) == {"reduce_scatter", "all_gather", "all_to_all"}
    assert [row["name"] for row in result["step"]["rows"]]
    assert [run["settings"]["bucket_mb"] for run in result["comm"]] == [0.1, 1.0]
    names = ["home", "gather", "adamw"]
    for run, check in zip(result["comm"], result["checks"], strict=True):
        assert list(run["contenders"]) == names == [row["name"] for row in check["rows"]]
        assert all(row["predicted_seconds"] > row["forward_backward_seconds"] > 0 for row in check["rows"])
    found = [(row["tp"], row["pp"], row["world_size"]) for row in result["megatron"]]
    assert found == ([(2, 1, 2)] if megatron_cpu.available() else [])
    page = (out / "report.html").read_text()
    assert "Strategies and bucket sizes" in page and "Predicted against measured" in page
    assert "benchmark: comm-0.1" in printed and "over AdamW" in printed


def test_a_job_that_fails_ends_all_hosts_and_is_named(tmp_path: Path) -> None:
    settings = {**TINY, "STEP_FLAGS": "--no-such-flag"}
    with pytest.raises(RuntimeError, match=r"ended with \[1, 1\]"):
        run_benchmark(tmp_path / "out", tmp_path, None, settings, port=29670)
    for host in range(2):
        assert "benchmark: step failed" in (tmp_path / f"host-{host}.txt").read_text()
    assert not (tmp_path / "out" / "benchmark.json").exists()
