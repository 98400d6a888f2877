"""Fits seconds = alpha + bytes / beta to each collective on the links at hand; times matmul and memory.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m perf.links [--json FILE]

Bytes are those one rank sends, as `Collectives` counts them, so beta is the bus bandwidth of nccl-tests. Seconds are
means: a step adds up many collectives, the few that meet a busy moment among them. The delay
says what cannot be hidden: by what share of a large message's seconds matmuls take longer while it is under way. Where
gloo copies with the cores that compute it is about 1; on slow wires, or a GPU's own links, about 0.
`perf.scale --links FILE` predicts with the result.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from distributed_muon.engine.collectives import Collectives, Pending
from distributed_muon.layout.cost_model import Hardware
from launch.environment import describe_machine
from launch.world import open_world
from perf.options import at_least_one, output_file, write_json

KINDS = ("reduce_scatter", "all_gather", "all_to_all")
_MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
_LARGEST_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}

Point = tuple[int, float]  # bytes one rank sends, seconds


@dataclass(frozen=True)
class Link:
    """A fitted collective.

    Args:
        alpha_seconds: before the first byte. bytes_per_second: sent by each rank.
        delay: of computation beside it, as a share of its seconds.
        points: measured, by size. Where there are some, `seconds` lies on the line through them, not on the fitted.
    """

    alpha_seconds: float
    bytes_per_second: float
    delay: float = 0.0
    points: tuple[Point, ...] = ()

    def seconds(self, sent_bytes: float) -> float:
        """Predicted seconds of one collective in which each rank sends `sent_bytes`."""
        if self.points:
            sizes, seconds = zip(*self.points, strict=True)
            beyond = max(0.0, sent_bytes - sizes[-1]) / self.bytes_per_second
            return float(np.interp(sent_bytes, sizes, seconds)) + beyond
        return self.alpha_seconds + sent_bytes / self.bytes_per_second


def fit(points: Sequence[Point]) -> Link:
    """Least squares of the relative error, so that small messages set alpha and large ones beta.

    Raises:
        ValueError: large messages were not slower than small ones.
    """
    sent, seconds = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    columns = np.stack([1 / seconds, sent / seconds], axis=1)
    (alpha, slope), *_ = np.linalg.lstsq(columns, np.ones(len(points)), rcond=None)
    if alpha < 0:  # too small to see beside the noise
        alpha, (slope, *_) = 0.0, np.linalg.lstsq(columns[:, 1:], np.ones(len(points)), rcond=None)[0]
    if slope <= 0:
        raise ValueError("large messages were not slower than small ones: measure again with more --rounds")
    return Link(float(alpha), float(1 / slope))


def fitted_links(fitted: dict[str, Any]) -> dict[str, Link]:
    """The fitted collectives of a result of `measure_links`, by kind.

    Raises:
        ValueError: it is a result of another kind or of an older perf.links.
    """
    try:
        found = {kind: {field.name: fitted["links"][kind][field.name] for field in fields(Link)} for kind in KINDS}
    except KeyError as error:
        raise ValueError(f"no result of this perf.links, {error} is missing: measure again with --json") from None
    return {kind: Link(**{**link, "points": tuple(map(tuple, link["points"]))}) for kind, link in found.items()}


def started_as(module: str) -> str:
    """The command line that this rank's node was started with, as torchrun's variables and sys.argv tell it."""
    world, local = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    where = "--standalone" if world == local else f"--nnodes {world // local}"
    return f"torchrun {where} --nproc_per_node {local} -m {module} {' '.join(sys.argv[1:])}"


def hardware(fitted: dict[str, Any]) -> Hardware:
    """The planner's view of a result of `measure_links`.

    Args:
        fitted: the JSON object that `perf.links --json` wrote.
    """
    links = fitted_links(fitted)
    return Hardware(
        name=f"fitted: {fitted['world']} ranks on {fitted['machine']['gpu'] or fitted['machine']['cpu']}, "
        f"{fitted['backend']}",
        matmul_flops=fitted["matmul_flops"],
        link_bytes_per_second=links["all_to_all"].bytes_per_second,
        latency_seconds=max(link.alpha_seconds for link in links.values()),
        node_ranks=fitted["node_ranks"],
        node_bytes_per_second=min(links[kind].bytes_per_second for kind in ("reduce_scatter", "all_gather")),
    )


def measure(collectives: Collectives, kind: str, sent_bytes: int, rounds: int, device: torch.device) -> Point:
    """Mean seconds of one collective on the slowest rank; collective over the group.

    Args:
        kind: one of KINDS. sent_bytes: about what each rank is to send.

    Returns:
        What each rank really sent, and the seconds.
    """
    call = _call(collectives, kind, sent_bytes, device)
    before = collectives.sent_bytes[kind]
    seconds = [timed(collectives, call, device) for _ in range(rounds + 1)][1:]
    sent = (collectives.sent_bytes[kind] - before) // (rounds + 1)
    return sent, _slowest(collectives, seconds, device)


def measure_delay(collectives: Collectives, kind: str, point: Point, rounds: int, device: torch.device) -> float:
    """What matmuls beside a collective take longer, over the collective's seconds; collective over the group.

    Args:
        kind: one of KINDS. point: of `measure`.
    """
    (sent, seconds), x = point, _square(device)
    call = _call(collectives, kind, sent, device)
    one = _slowest(collectives, run_seconds(lambda: x @ x, device, rounds), device)
    count = math.ceil(1.5 * seconds / one)  # so that the collective ends while they run

    def compute(beside: Callable[[], Pending]) -> Callable[[], Pending]:
        def run() -> Pending:
            pending = beside()
            for _ in range(count):
                x @ x
            return pending

        return run

    alone, together = (
        _slowest(collectives, [timed(collectives, compute(beside), device) for _ in range(rounds)], device)
        for beside in (lambda: Pending(()), call)
    )
    return max(0.0, (together - alone) / seconds)


def _call(collectives: Collectives, kind: str, sent_bytes: int, device: torch.device) -> Callable[[], Pending]:
    """Starts a collective in which each rank sends about `sent_bytes`."""
    share = max(1, sent_bytes // (4 * (collectives.size - 1)))  # fp32 elements for each peer
    whole, own = torch.ones(share * collectives.size, device=device), torch.empty(share, device=device)
    counts = [share] * collectives.size
    received = torch.empty_like(whole)
    calls: dict[str, Callable[[], Pending]] = {
        "reduce_scatter": lambda: collectives.reduce_scatter(own, whole),
        "all_gather": lambda: collectives.all_gather(whole),
        "all_to_all": lambda: collectives.all_to_all(received, whole, counts, counts),
    }
    return calls[kind]


def _slowest(collectives: Collectives, seconds: Sequence[float], device: torch.device) -> float:
    """The largest of the ranks' means; collective."""
    mean = torch.tensor([statistics.mean(seconds)], dtype=torch.float64, device=device)
    return float(collectives.all_reduce(mean, maximum=True, counted=False))


def timed(collectives: Collectives, call: Callable[[], Pending], device: torch.device) -> float:
    """Seconds until one collective, started by all ranks at once, is done on this rank."""
    collectives.all_reduce(torch.zeros(1, device=device), counted=False)
    _synchronize(device)
    begin = time.perf_counter()
    call().wait()
    _synchronize(device)
    return time.perf_counter() - begin


def matmul_flops(device: torch.device, rounds: int) -> float:
    """Median FLOP/s of a square bf16 matmul on this rank."""
    x = _square(device)
    return 2 * len(x) ** 3 / statistics.median(run_seconds(lambda: x @ x, device, rounds))


def _square(device: torch.device) -> torch.Tensor:
    side = _MATMUL_SIDE[device.type]
    return torch.randn(side, side, device=device).bfloat16()


def memory_rate(device: torch.device, rounds: int) -> float:
    """Median bytes per second that this rank reads and writes, copying a tensor larger than caches."""
    source = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(run_seconds(lambda: target.copy_(source), device, rounds))


def run_seconds(call: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    """Seconds of each call after one of warm-up."""
    seconds = []
    for _ in range(rounds + 1):
        _synchronize(device)
        begin = time.perf_counter()
        call()
        _synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_links(device: torch.device, rounds: int) -> dict[str, Any]:
    """Fit every collective over the default group; collective over it."""
    collectives = Collectives()
    sizes = [4096]
    while sizes[-1] < _LARGEST_BYTES[device.type]:
        sizes.append(sizes[-1] * 4)
    links = {}
    for kind in KINDS:
        points = [measure(collectives, kind, size, rounds, device) for size in sizes]
        delay = measure_delay(collectives, kind, points[-1], max(3, rounds // 3), device)
        links[kind] = asdict(replace(fit(points), delay=delay, points=tuple(points)))
    return {
        "machine": describe_machine(started_as("perf.links")),
        "world": collectives.size,
        "node_ranks": int(os.environ.get("LOCAL_WORLD_SIZE", collectives.size)),
        "backend": torch.distributed.get_backend(),
        "matmul_flops": matmul_flops(device, rounds),
        "memory_bytes_per_second": memory_rate(device, rounds),
        "links": links,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least_one, default=15, help="repetitions, of which the mean counts")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the result here (rank 0)")
    args = parser.parse_args()
    with open_world(args.device) as world:
        if world.size == 1:
            raise SystemExit("error: one rank has no link: start with torchrun --nproc_per_node 2 or more")
        result = measure_links(world.device, args.rounds)
        if not world.main:
            return
        print(f"{result['world']} ranks, {result['backend']}; one rank: bf16 matmul {result['matmul_flops'] / 1e9:.1f} "
              f"GFLOP/s, memory {result['memory_bytes_per_second'] / 1e9:.1f} GB/s")  # fmt: skip
        print(f"{'collective':16s} {'alpha':>10s} {'busbw':>12s} {'delay':>6s}   seconds at bytes sent per rank")
        for kind, link in result["links"].items():
            points = ", ".join(f"{sent / 1024:.0f} KiB {seconds * 1e3:.2f} ms" for sent, seconds in link["points"])
            alpha, rate = link["alpha_seconds"] * 1e6, link["bytes_per_second"] / 1e9
            print(f"{kind:16s} {alpha:7.0f} us {rate:7.3f} GB/s {link['delay']:6.0%}   {points}")
        write_json(args.json, result)


if __name__ == "__main__":
    main()
