"""The report's sections on whole runs show the numbers of the results they are given."""

from __future__ import annotations

import re
from typing import Any

from perf.report.benchmark import check_section, sweep_section
from perf.report.step import deepspeed_section, fsdp2_section, megatron_section
from perf.report.timeline import timeline_section

MACHINE = {"gpu": None, "cpu": "a CPU", "cores": 2, "threads_per_rank": 1, "versions": {}, "date": "2026-01-01",
           "command": "a command"}  # fmt: skip


def text_of(section: tuple[str, str]) -> str:
    """A section's HTML without the headings that its cells repeat for phones."""
    return re.sub(r' data-label="[^"]*"', "", section[1])


def benchmark() -> dict[str, Any]:
    link = {"alpha_seconds": 1e-4, "bytes_per_second": 12.5e6, "delay": 0.25, "points": [[1000, 2e-4], [5000, 4e-4]]}
    collective = {
        "name": "reduce-scatter gradients", "calls": 2, "bytes_predicted": 7, "bytes_measured": 7, "alone_seconds": 0.1,
        "exposed_seconds": 0.2, "exposed_seconds_least": 0.0125, "hidden_seconds": 0.0, "bus_bytes_per_second": 70.0,
    }  # fmt: skip
    contenders = {
        name: {"step_seconds": seconds, "collectives": {"reduce_scatter": collective}, "traffic_over_adamw": ratio,
               "sent_bytes_by_rank": [1 << 20, 3 << 20]}
        for name, seconds, ratio in (("home", 0.8, 1.0625), ("adamw", 0.4, 1.0))
    }  # fmt: skip
    settings = {
        "model": "dense",
        "layout": "bucketed",
        "bucket_mb": 4.0,
        "hidden_size": 64,
        "layers": 2,
        "batch_size": 3,
    }
    common = {"machine": MACHINE, "world": 4, "backend": "gloo"}
    row = {"name": "DistributedMuon home", "seconds": 1.0, "state_bytes": 0, "sent_bytes": 0, "transient_bytes": 0,
           "ns_calls": 3, "phases": {"newton_schulz": 0.7}}  # fmt: skip
    parts = {"newton_schulz": {"predicted": 0.101, "measured": 0.202}}
    check = {"name": "home", "predicted_seconds": 0.6, "measured_seconds": 0.8, "ratio": 0.75, "parts": parts,
             "forward_backward_seconds": 0.3, "worst": "newton_schulz", "off": 0.12}  # fmt: skip
    late, cancelling = (
        {**check, "name": "adamw", "ratio": 1.26},
        {**check, "name": "gather", "ratio": 0.98, "off": 0.31},
    )
    kinds = ("reduce_scatter", "all_gather", "all_to_all")
    return {
        **common,
        "node_ranks": 2,
        "links": {**common, "matmul_flops": 1e9, "links": dict.fromkeys(kinds, link)},
        "step": {**common, "floor_seconds": 0.5, "rows": [row]},
        "comm": [{**common, "settings": settings, "contenders": contenders}],
        "megatron": [{"model": "dense", "tp": 2, "pp": 1, "ep": 1, "world_size": 4, "strategy": "home", "steps": 3,
                      "seconds": 0.5, "optimizer_seconds": 0.05, "tokens_per_second": 1234.0}],
        "checks": [{"settings": settings, "rows": [check, late, cancelling]}],
    }  # fmt: skip


def test_sweep() -> None:
    title, _ = sweep_section(benchmark())
    body = text_of(sweep_section(benchmark()))
    assert title == "Strategies and bucket sizes, 4 ranks on 2 hosts at 0.1 Gbit/s"
    assert "<td>800 ms</td><td>2.00x</td><td>12.5 ms</td><td>3.0 MiB</td><td>1.0625</td>" in body
    assert "TP 2 x PP 1 x DP 2" in body and "1,234" in body
    assert "Links at hand" in body and "A whole optimizer step" in body  # folded


def test_checks_are_marked_within_a_quarter() -> None:
    body = text_of(check_section(benchmark()))
    assert "<td>101.0 / 202.0</td>" in body and "<td>300</td><td>600</td><td>800</td><td>0.75</td>" in body
    marked = re.findall(r'<td>([\d.]+)</td><td>newton schulz</td><td class="(\w+)">(\d+%)</td>', body)
    assert marked == [("0.75", "good", "12%"), ("1.26", "bad", "12%"), ("0.98", "bad", "31%")]


def test_timeline() -> None:
    sent = {"calls": 1, "bytes": 8, "exposed_seconds": 0.002, "hidden_seconds": 0.0, "network_seconds": 0.25}
    row = {
        "setup": "Muon", "ranks": 1024, "forward_backward_seconds": 0.5, "added_seconds": 0.01, "share": 0.02,
        "phases": {"newton_schulz": 0.004, "update": 0.0025}, "communication": {"to_homes": sent, "all_gather": sent},
        "counts": {"launches": 1111, "allocations": 22},
    }  # fmt: skip
    body = text_of(timeline_section({"machine": MACHINE, "rows": [row]}))
    cells = ("1,024", "Muon", "0.50 s", "10.0 ms", "2.00%", "500 ms", "4.0 ms", "1,111", "22")
    assert "".join(f"<td>{cell}</td>" for cell in cells) in body
    assert "newton schulz" in body and "the rest" in body and " 6.5" in body


def test_deepspeed() -> None:
    def row(name: str, seconds: float) -> dict[str, Any]:
        return {"name": name, "seconds": seconds, "seconds_all": [seconds, seconds - 0.5], "state_bytes": 8 << 20,
                "newton_schulz_runs": 6, "matrices": 3}  # fmt: skip

    wire = {"stage 1": {"all_reduce": 4.0}, "stage 2": {"reduce": 2.5}}
    pairs = {"Muon": [row("ours", 1.0), row("Muon", 2.5)]}
    result = {"machine": MACHINE, "world": 2, "stage": 1, "offload": True, "pairs": pairs, "wire": wire}
    body = text_of(deepspeed_section(result))
    assert "<td>2.500 s</td><td>2.000 s</td><td>8 MiB</td><td>6 for 3 matrices</td><td>2.50x</td>" in body
    assert "<td>stage 1</td><td>4</td><td>-</td>" in body and "<td>stage 2</td><td>-</td><td>2.5</td>" in body


def test_megatron() -> None:
    row = {"seconds": 1.0, "fastest": 0.5, "state_bytes": [2e6, 4e6], "sent_bytes": [1e6, 1e6]}
    contenders = {"distributed_muon": row, "Megatron Muon": {**row, "seconds": 3.0}}
    result = {
        "machine": MACHINE,
        "cosine": {"blockwise": {"linear_qkv": 0.5, "length ratio": 0.1}},
        "contenders": contenders,
    }
    body = text_of(megatron_section(result))
    assert "<td>4.00 MB</td><td>3.00 MB</td><td>1.00 MB</td><td>1.00 MB</td><td>3.00x</td>" in body
    assert "less than 1 by 5e-01 (blockwise) at most" in body


def test_fsdp2() -> None:
    row = {"name": "distributed_muon", "seconds": 0.5, "cpu_seconds": 0.8, "collectives": 4, "sent_bytes": 1 << 20,
           "state_bytes": 2 << 20, "transient_bytes": 3 << 20, "ns_calls": 6}  # fmt: skip
    traffic = {"rows": {"fsdp2": 4 << 20, "exchange": 2 << 20, "exchange_predicted": 2 << 20}}
    rows = [row, {**row, "name": "another", "seconds": 1.0}]
    body = text_of(fsdp2_section({"machine": MACHINE, "note": "", "world": 2, "rows": rows, "traffic": traffic}))
    assert (
        "<td>another</td><td>1.000 s</td><td>2.00x</td><td>0.800 s</td><td>4</td><td>1.0 MiB</td><td>2.0 MiB</td>"
        in body
    )
    assert "<td>rows</td><td>4.00 MiB</td><td>2.00 MiB</td><td>1.500x</td>" in body
