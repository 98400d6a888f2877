"""One case of `perf.overhead`, measured on the checkout that is the working directory: a JSON object on stdout.

Only what older checkouts also have is called, so that any two can be compared: the constructor, `step`, `zero_grad`,
`local_report`, the command line, and `perf.fake_world`.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_muon import DistributedMuon
from distributed_muon.__main__ import main as command_line

MATRICES, SIDE = 5000, 8
MODEL, RANKS, SHRINK = "moonlight-16b-a3b", 64, 64
PLAN = ("plan", "--model", "kimi-k2", "--dp", "64")


class GivenGradients(torch.autograd.Function):
    """Zero, with given gradients: a backward that is nothing but its hooks."""

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.grads)


def small_matrices() -> list[tuple[str, nn.Parameter]]:
    """MATRICES named fp32 parameters."""
    generator = torch.Generator().manual_seed(0)
    return [(f"layer.{i}.weight", nn.Parameter(torch.randn(SIDE, SIDE, generator=generator))) for i in range(MATRICES)]


@contextlib.contextmanager
def counted_calls(calls: Counter[str]) -> Iterator[None]:
    """Counts calls of Python functions as "call" and of functions in C as "c_call"."""

    def note(frame: FrameType, event: str, arg: Any) -> None:
        calls[event] += 1

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


class GroupSeconds:
    """Seconds inside a process group's collectives: the fake one copies this rank's part to where all ranks' belong."""

    METHODS = ("all_gather_single", "_allgather_base", "reduce_scatter_single", "_reduce_scatter_base", "alltoall_base",
               "allreduce")  # fmt: skip

    def __init__(self) -> None:
        self.total = 0.0
        for name in self.METHODS:
            if hasattr(dist.ProcessGroup, name):
                setattr(dist.ProcessGroup, name, self._timed(getattr(dist.ProcessGroup, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                self.total += time.perf_counter() - begin

        return timed


def measure_steps(
    optimizer: DistributedMuon, params: list[nn.Parameter], steps: int, group: GroupSeconds | None = None
) -> dict[str, Any]:
    """Medians of the steps after two that warm up, and the Python calls of one more; copies of `group` apart."""
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
    seconds: dict[str, list[float]] = {"backward": [], "step": [], "orthogonalizing": [], "copying": []}

    def backward() -> None:
        GivenGradients.apply([grad.clone() for grad in grads], *params).backward()

    for _ in range(steps + 2):
        marks = [time.perf_counter()]
        backward()
        marks.append(time.perf_counter())
        copied = group.total if group else 0.0
        optimizer.step()
        marks.append(time.perf_counter())
        optimizer.zero_grad()
        for name, value in zip(("backward", "step"), (marks[1] - marks[0], marks[2] - marks[1]), strict=True):
            seconds[name].append(value)
        seconds["copying"].append((group.total if group else 0.0) - copied)
        seconds["orthogonalizing"].append(optimizer.local_report()["seconds"].get("newton_schulz", 0.0))
    backward()
    calls: Counter[str] = Counter()
    with counted_calls(calls):
        optimizer.step()
    timed = {name: values[2:] for name, values in seconds.items()}
    host = [a - b - c for a, b, c in zip(timed["step"], timed["orthogonalizing"], timed["copying"], strict=True)]
    return {
        "seconds": {name: statistics.median(values) for name, values in {**timed, "host": host}.items()},
        "matrices": len(optimizer.plan.layout.matrices),
        "calls": calls["call"],
        "c_calls": calls["c_call"],
    }


def steps_of_small_matrices(rank: int, world: int, steps: int, rendezvous: str) -> dict[str, Any]:
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    named = small_matrices()
    result = measure_steps(DistributedMuon(named), [param for _, param in named], steps)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return result


def steps_of_one_rank_of_many(steps: int) -> dict[str, Any]:
    """MODEL's matrices, sides divided by SHRINK, as rank 0 of RANKS; one Newton-Schulz step."""
    from perf.fake_world import bucket_elements, fake_rank, shrunk  # bucket_elements: its own module has moved

    with fake_rank(0, RANKS):
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {"muon": [], "adamw": []}
        for shape in shrunk(MODEL, SHRINK):
            param = nn.Parameter(torch.randn(shape.shape).bfloat16())
            groups["adamw" if shape.algorithm == "adamw" else "muon"].append((shape.name, param))
        optimizer = DistributedMuon(
            [{"params": named, "algorithm": name} for name, named in groups.items()],
            strategy="home",
            layout="bucketed",
            bucket_mb=bucket_elements(None, RANKS) / SHRINK**2 / 2**18,
            ns_steps=1,
        )
        params = [param for named in groups.values() for _, param in named]
        return measure_steps(optimizer, params, steps, GroupSeconds())


def construction(repeats: int) -> dict[str, Any]:
    """Median seconds of a constructor over MATRICES parameters on one rank, after one that imports what it needs."""
    DistributedMuon(small_matrices()[:8])
    return {"seconds": {"host": _median(lambda named: DistributedMuon(named), small_matrices, repeats)},
            "matrices": MATRICES}  # fmt: skip


def planning(repeats: int) -> dict[str, Any]:
    """Median seconds of `python -m distributed_muon plan`, imports not counted."""

    def plan(_: None) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            command_line(PLAN)

    return {"seconds": {"host": _median(plan, lambda: None, repeats)}}


def _median(call: Callable[[Any], Any], prepare: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        given = prepare()
        begin = time.perf_counter()
        call(given)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def main(case: str, repeats: int, rank: int, world: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    if case == "small":
        result = steps_of_small_matrices(rank, world, repeats, rendezvous)
    elif case == "fake":
        result = steps_of_one_rank_of_many(repeats)
    else:
        result = {"construction": construction, "plan": planning}[case](repeats)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
