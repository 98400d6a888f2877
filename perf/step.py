"""One whole optimizer step, gradient reduction to whole parameters, against what people use today.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m perf.step [--json FILE]

Every contender starts with each rank's own gradients in p.grad and ends with updated whole parameters on
every rank. Contenders take turns within a round, so a drifting machine hits all alike; medians are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from distributed_muon import DistributedMuon
from perf.machine import describe_machine

LAYER = ((1024, 1024),) * 4 + ((4096, 1024), (1024, 4096))


@dataclass
class Contender:
    """One optimizer under test: `step()` goes from local p.grad to whole updated parameters."""

    name: str
    params: list[nn.Parameter]
    step: Callable[[], None]
    state_bytes: Callable[[], int]
    report: Callable[[], dict[str, Any]] = dict


def _average(params: Sequence[nn.Parameter]) -> None:
    """Flat all-reduce of all gradients, as a hand-written data-parallel loop does it."""
    flat = torch.cat([p.grad.reshape(-1) for p in params])
    dist.all_reduce(flat)
    flat.div_(dist.get_world_size())
    for param, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        param.grad = part.view(param.shape)


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _ours(name: str, shapes: Sequence[tuple[int, int]], algorithm: str, strategy: str) -> Contender:
    params = _params(shapes)
    group = {"params": params, "algorithm": algorithm}
    optimizer = DistributedMuon([group], lr=1e-3, strategy=strategy)
    optimizer.track()

    def step() -> None:
        optimizer.step()

    return Contender(name, params, step, lambda: _optimizer_bytes(optimizer), optimizer.step_report)


def _replicated_muon(shapes: Sequence[tuple[int, int]]) -> Contender:
    params = _params(shapes)
    optimizer = torch.optim.Muon(params, lr=1e-3, adjust_lr_fn="match_rms_adamw")

    def step() -> None:
        _average(params)
        optimizer.step()

    return Contender("all-reduce + torch.optim.Muon", params, step, lambda: _optimizer_bytes(optimizer))


def _zero_redundancy(shapes: Sequence[tuple[int, int]]) -> Contender:
    params = _params(shapes)
    optimizer = ZeroRedundancyOptimizer(params, torch.optim.AdamW, lr=1e-3, foreach=True)

    def step() -> None:
        _average(params)
        optimizer.step()

    return Contender("ZeroRedundancyOptimizer(AdamW)", params, step, lambda: _optimizer_bytes(optimizer.optim))


def _params(shapes: Sequence[tuple[int, int]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.02) for shape in shapes]


def measure(contenders: Sequence[Contender], rounds: int) -> list[dict[str, Any]]:
    """Median seconds of each contender over `rounds` interleaved rounds, after one round of warm-up."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    grads = [torch.randn(p.shape, generator=generator) for p in contenders[0].params]
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    reports: dict[str, list[dict[str, Any]]] = {c.name: [] for c in contenders}
    for turn in range(rounds + 1):
        for contender in contenders:
            for param, grad in zip(contender.params, grads, strict=True):
                param.grad = grad.clone()
            dist.barrier()
            begin = time.perf_counter()
            contender.step()
            dist.barrier()
            if turn:
                seconds[contender.name].append(time.perf_counter() - begin)
                reports[contender.name].append(contender.report())
            for param in contender.params:
                param.grad = None
    rows = []
    for contender in contenders:
        phases = [report.get("seconds", {}) for report in reports[contender.name]]
        last = reports[contender.name][-1]
        rows.append(
            {
                "name": contender.name,
                "seconds": statistics.median(seconds[contender.name]),
                "seconds_all": seconds[contender.name],
                "state_bytes": contender.state_bytes(),
                "sent_bytes": last.get("bytes"),
                "ns_calls": last.get("ns_calls"),
                "phases": {key: statistics.median(p[key] for p in phases) for key in (phases[0] if phases else {})},
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="layers of 4 x 1024x1024, 4096x1024, 1024x4096")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the result here (rank 0)")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    shapes = LAYER * args.layers
    contenders = [
        _ours("DistributedMuon home", shapes, "muon", "home"),
        _ours("DistributedMuon gather", shapes, "muon", "gather"),
        _ours("DistributedMuon AdamW", shapes, "adamw", "home"),
        _replicated_muon(shapes),
        _zero_redundancy(shapes),
    ]
    rows = measure(contenders, args.rounds)
    if dist.get_rank() == 0:
        base = rows[0]["seconds"]
        for row in rows:
            print(f"{row['name']:34s} {row['seconds']:8.3f} s  {row['seconds'] / base:5.2f} x ours  "
                  f"state {row['state_bytes'] / 2**20:8.1f} MiB")  # fmt: skip
        print("phases of DistributedMuon home (rank 0, median seconds):")
        for phase, value in rows[0]["phases"].items():
            print(f"  {phase:22s} {value:7.3f}")
        result = {"machine": describe_machine(), "world": dist.get_world_size(), "layers": args.layers, "rows": rows}
        if args.json:
            args.json.write_text(json.dumps(result, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
