"""Runs the real optimizer as one rank of up to thousands and compares the bytes it sends with the prediction.

torch's fake process group lets one process be rank r of W: collectives return at once and move nothing, so what
a rank packs, posts and counts is real and what it receives is not. The model has every matrix of the real one
with each side divided by `shrink`; buckets shrink alike, so matrices straddle ranks as they do at full size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from distributed_muon import DistributedMuon
from distributed_muon.layout.cutting import bucket_elements
from distributed_muon.planning.model_shapes import NAMED_MODELS, ParameterShape, model_shapes
from distributed_muon.planning.simulate import Job, simulate
from perf.comm import predicted_bytes


@dataclass(frozen=True)
class Case:
    """One optimizer at one scale.

    Args:
        model: of NAMED_MODELS. ranks: world size, all data parallel. strategy, layout: as DistributedMuon takes
            them. shrink: divides both sides of every matrix.
    """

    model: str
    ranks: int
    strategy: str
    layout: str
    shrink: int

    def bounds(self) -> tuple[float, float]:
        """What the traffic over ZeRO-1 AdamW's has to lie in.

        The Moonlight report (arXiv 2502.16982, section 2.3) gives (1, 1.25] for its gather, with 8 bytes per
        parameter of AdamW's; with bf16 parameters AdamW sends 6, and a bucket cut over all ranks makes it 8/6.
        """
        if self.strategy == "home":
            return 1.0, 1.02
        return 1.0, 1.25 if self.layout == "flat" else 4 / 3


CASES = (
    *(Case("moonlight-16b-a3b", ranks, "gather", "flat", 32) for ranks in (64, 256, 1024)),
    *(Case("moonlight-16b-a3b", ranks, "home", "bucketed", 32) for ranks in (64, 256)),
    Case("moonlight-16b-a3b", 1024, "home", "bucketed", 16),  # smaller shards would be a good part padding
    *(Case("llama-3-405b", ranks, "gather", "flat", 128) for ranks in (64, 256)),
    Case("llama-3-405b", 64, "gather", "bucketed", 128),
    Case("llama-3-405b", 64, "home", "bucketed", 128),
)


@dataclass(frozen=True)
class Outcome:
    """What the rank that sends most sent in one step.

    Args:
        case: that was run. rank: that sends most.
        predicted, measured: its bytes by collective.
        over_adamw: its measured traffic over that of the same rank under ZeRO-1 AdamW.
        over_adamw_full_size, ns_max_over_ideal: traffic over AdamW's of the busiest rank, and its Newton-Schulz
            over an equal share, from the plan of the model at full size.
    """

    case: Case
    rank: int
    predicted: dict[str, int]
    measured: dict[str, int]
    over_adamw: float
    over_adamw_full_size: float
    ns_max_over_ideal: float

    @property
    def within_bounds(self) -> bool:
        low, high = self.case.bounds()
        return low < self.over_adamw <= high

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "bounds": self.case.bounds(), "within_bounds": self.within_bounds}


class _Done:
    """The handle of a collective that is over."""

    def wait(self) -> None:
        """Nothing to wait for."""


@contextmanager
def fake_rank(rank: int, world: int) -> Iterator[None]:
    """Be `rank` of `world` on torch's fake process group."""
    all_to_all = dist.all_to_all_single

    def tolerant(output: Tensor, input: Tensor, *args: Any, **options: Any) -> Any:
        # The fake group fills outputs from this rank's input, and refuses where there is none.
        return all_to_all(output, input, *args, **options) if input.numel() else _Done()

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with mock.patch.object(dist, "all_to_all_single", tolerant):
            yield
    finally:
        dist.destroy_process_group()


def shrunk(model: str, shrink: int) -> list[ParameterShape]:
    """The matrices of a model, embedding and head included, with every side divided by `shrink`, rounded up.

    Vectors are left out: next to nothing at full size, but their padding would count in small buckets.
    """
    shapes = [shape for shape in model_shapes(NAMED_MODELS[model]) if len(shape.shape) == 2]
    return [shape._replace(shape=tuple(-(-side // shrink) for side in shape.shape)) for shape in shapes]


def run_case(case: Case) -> Outcome:
    """Run one step as rank 0 and as the rank that sends most, and AdamW as the latter.

    Raises:
        RuntimeError: a rank sent other bytes than predicted.
    """
    shapes = shrunk(case.model, case.shrink)
    outcome, sent_by_rank = run_rank(case, 0, shapes)
    busiest = max(range(case.ranks), key=sent_by_rank.__getitem__)
    if busiest:
        _check(case, 0, *outcome)
        outcome, _ = run_rank(case, busiest, shapes)
    _check(case, busiest, *outcome)
    (_, adamw), _ = run_rank(case, busiest, shapes, algorithm="adamw")
    job = Job(dp=case.ranks, layout=case.layout, strategy=case.strategy)
    full_size = simulate(model_shapes(NAMED_MODELS[case.model]), job)
    assert full_size.comm_over_adamw is not None
    predicted, measured = outcome
    ratio = sum(measured.values()) / sum(adamw.values())
    return Outcome(case, busiest, predicted, measured, ratio, full_size.comm_over_adamw, full_size.ns_max_over_ideal)


def _check(case: Case, rank: int, predicted: dict[str, int], measured: dict[str, int]) -> None:
    if predicted != measured:
        raise RuntimeError(f"{case}: rank {rank} was predicted to send {predicted} and sent {measured}")


def run_rank(
    case: Case, rank: int, shapes: list[ParameterShape], *, algorithm: str = "muon"
) -> tuple[tuple[dict[str, int], dict[str, int]], list[int]]:
    """One step of the real optimizer as one rank, bf16 parameters with random gradients.

    Args:
        algorithm: "adamw" puts every parameter under AdamW.

    Returns:
        Bytes predicted and bytes counted, by collective; and what each rank sends for Newton-Schulz by the plan.
    """
    with fake_rank(rank, case.ranks):
        generator = torch.Generator().manual_seed(0)
        groups: list[dict[str, Any]] = [{"params": [], "algorithm": name} for name in ("muon", "adamw")]
        for shape in shapes:
            param = nn.Parameter(torch.randn(shape.shape, generator=generator).bfloat16())
            param.grad = param.detach().clone()
            groups[algorithm == "adamw" or shape.algorithm == "adamw"]["params"].append((shape.name, param))
        bucket_mb = bucket_elements(None, case.ranks) / case.shrink**2 / 2**18
        optimizer = DistributedMuon(
            [group for group in groups if group["params"]],
            strategy=case.strategy,
            layout=case.layout,
            bucket_mb=None if case.layout == "flat" else bucket_mb,
            ns_steps=1,  # bytes do not depend on it
        )
        optimizer.track()
        optimizer.step()
        landed = optimizer.local_report()["communication"]
        predicted = predicted_bytes(optimizer)
        measured = {label: landed[label]["bytes"] if label in landed else 0 for label in predicted}
        plan = optimizer.plan
        sent = [sum(pair) for pair in zip(plan.exchange_bytes_by_rank, plan.team_bytes_by_rank, strict=True)]
        return (predicted, measured), sent


def format_outcomes(outcomes: Sequence[Outcome]) -> str:
    """A table for people."""
    lines = [
        "bytes of the real optimizer on torch's fake process group, one rank of W, busiest sender:",
        f"  {'model':20s} {'W':>5s} {'strategy':8s} {'layout':9s} {'predicted':>12s} {'measured':>12s} "
        f"{'over AdamW':>10s} {'full size':>9s} {'bound':>11s} {'NS work':>8s}",
    ]
    for outcome in outcomes:
        case, (low, high) = outcome.case, outcome.case.bounds()
        lines.append(
            f"  {case.model:20s} {case.ranks:5d} {case.strategy:8s} {case.layout:9s} "
            f"{sum(outcome.predicted.values()):12,d} {sum(outcome.measured.values()):12,d} {outcome.over_adamw:10.4f} "
            f"{outcome.over_adamw_full_size:9.4f} ({low:g}, {high:.2f}] {outcome.ns_max_over_ideal:7.1f}x"
        )
    return "\n".join(lines)
