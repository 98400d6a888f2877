"""One whole optimizer step, gradient reduction to whole parameters, against what people use today.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m perf.step [--json FILE]

Every contender (`perf.peers`) starts with each rank's own gradients in p.grad and ends with updated whole
parameters on every rank. Contenders take turns within a round, so a drifting machine hits all alike; medians are
printed. Beside them, of the rank that has most: bytes of optimizer state, bytes sent (counted at torch.distributed),
transient bytes (allocated at the peak of a step and freed again), and matrices orthogonalized. The floor is the time
that the Newton-Schulz FLOPs of the standard form, shared evenly, take at the rate of a large bf16 matmul measured in
the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from distributed_muon.layout.cost_model import ns_flops
from launch.environment import describe_machine
from launch.world import World, open_world
from perf.bandwidth import overlap
from perf.links import matmul_flops, started_as
from perf.memory import transient_bytes
from perf.options import at_least_one, output_file, write_json
from perf.peers import Contender, contenders
from perf.wire import WireCounter

LAYER = ((1024, 1024),) * 4 + ((4096, 1024), (1024, 4096))
NS_STEPS = 5


def newton_schulz_floor(layers: int, world_size: int, rate: float) -> float:
    """Seconds of the standard form's FLOPs of so many LAYERs, shared evenly, at `rate` FLOP/s per rank."""
    return layers * sum(ns_flops(*shape, NS_STEPS, "standard") for shape in LAYER) / world_size / rate


def measure(competitors: Sequence[Contender], rounds: int, world: World) -> list[dict[str, Any]]:
    """Each contender's medians over `rounds` interleaved rounds, after one that warms up and counts; collective."""
    generator = torch.Generator().manual_seed(1 + world.rank)
    grads = [torch.randn(p.shape, generator=generator).to(world.device) for p in competitors[0].params]
    seconds: dict[str, list[float]] = {c.name: [] for c in competitors}
    reports: dict[str, list[dict[str, Any]]] = {c.name: [] for c in competitors}
    most: dict[str, list[int]] = {}
    for turn in range(rounds + 2):
        for contender in competitors:
            for param, grad in zip(contender.params, grads, strict=True):
                param.grad = grad.clone()
            world.barrier()
            if turn == 0:
                contender.step()
            elif turn == 1:
                # Dynamo cannot trace the counter.
                with torch.compiler.set_stance("force_eager"), WireCounter() as wire:
                    wire.on = True
                    peak = transient_bytes(contender.step, world.device)
                counts = [contender.state_bytes(), wire.sent.total(), peak, contender.ns_calls()]
                most[contender.name] = largest(counts, world)
            else:
                begin = time.perf_counter()
                contender.step()
                world.synchronize()
                world.barrier()
                seconds[contender.name].append(time.perf_counter() - begin)
                reports[contender.name].append(contender.report())
            for param in contender.params:
                param.grad = None
    rows = []
    for contender in competitors:
        phases = [report.get("seconds", {}) for report in reports[contender.name]]
        state, sent, transient, calls = most[contender.name]
        rows.append(
            {
                "name": contender.name,
                "seconds": statistics.median(seconds[contender.name]),
                "seconds_all": seconds[contender.name],
                "state_bytes": state,
                "sent_bytes": sent,
                "transient_bytes": transient,
                "ns_calls": calls,
                "phases": {key: statistics.median(p[key] for p in phases) for key in phases[0]},
                "communication": reports[contender.name][-1].get("communication", {}),
            }
        )
    return rows


def largest(values: list[int], world: World) -> list[int]:
    """Elementwise maximum over the ranks; collective."""
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [int(value) for value in tensor.tolist()]


def print_rows(rows: Sequence[dict[str, Any]], floor: float, rate: float) -> None:
    """The table, and where the time of the first row went."""
    base, mib = rows[0]["seconds"], 2**20
    print(f"{'':32s} {'seconds':>8s} {'x ours':>7s} {'state':>10s} {'sent':>10s} {'transient':>10s} {'NS':>5s}")
    for row in rows:
        sizes = " ".join(f"{row[f'{key}_bytes'] / mib:6.1f} MiB" for key in ("state", "sent", "transient"))
        print(f"{row['name']:32s} {row['seconds']:8.3f} {row['seconds'] / base:7.2f} {sizes} {row['ns_calls']:5d}")
    print(f"floor of Newton-Schulz: {floor:.3f} s at the {rate / 1e9:.0f} GFLOP/s of a large matmul on one rank")
    print(f"{rows[0]['name']}, median seconds by phase on rank 0:")
    for phase, value in rows[0]["phases"].items():
        print(f"  {phase:22s} {value:7.3f}")
    print("and by collective, of one step:")
    for label, counts in rows[0]["communication"].items():
        print(f"  {label:22s} {counts['calls']:3d} calls, {counts['bytes'] / mib:7.2f} MiB, exposed "
              f"{counts['exposed_seconds']:.3f} s, hidden {counts['hidden_seconds']:.3f} s, overlap "
              f"{overlap(counts):.0%}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=at_least_one, default=8, help="layers of 4 x 1024x1024, 4096x1024, 1024x4096")
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--ours", action="store_true", help="leave the others' optimizers out")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=output_file, help="write the result here (rank 0)")
    args = parser.parse_args()
    with open_world(args.device) as world:
        if world.size == 1:
            raise SystemExit("error: one rank reduces nothing: start with torchrun --nproc_per_node 2 or more")
        shapes = LAYER * args.layers
        rate = matmul_flops(world.device, args.rounds)
        floor = newton_schulz_floor(args.layers, world.size, rate)
        rows = measure(list(contenders(shapes, world.device, not args.ours)), args.rounds, world)
        if not world.main:
            return
        print_rows(rows, floor, rate)
        result = {"machine": describe_machine(started_as("perf.step")), "world": world.size, "layers": args.layers,
                  "rows": rows, "floor_seconds": floor, "matmul_flops": rate}  # fmt: skip
        write_json(args.json, result)


if __name__ == "__main__":
    main()
