"""What a plan costs at a scale nobody has at hand: shapes and parallel sizes to balance, bytes and seconds.

Assumptions, those of a Megatron-style job:

- Pipeline stages hold contiguous layers, as evenly as they divide; embedding first, head last. Every stage
  is planned, and the one whose busiest rank does the most Newton-Schulz is reported.
- Tensor parallelism cuts attention and feed-forward matrices; router and latent down-projections are whole.
  The rank domain of a stage is dp x tp.
- Routed experts are never cut by tensor parallelism. With ep > 1 or tp > 1 they have a rank domain of their
  own of dp x tp / ep ranks (expert data parallelism), one per slice of the experts, on the same ranks.
- Muon and AdamW parameters have buckets of their own, cut over the data-parallel ranks.
- ZeRO-1 AdamW, to compare with, sends fp32 gradients (reduce-scatter) and bf16 parameters (all-gather).
- The layout "fsdp2" has no buckets: FSDP2 cuts rows of every parameter over the data-parallel ranks, inside what
  tensor parallelism cut. To compare with is what FSDP2 sends itself in one microbatch: bf16 parameters twice, those
  of the root (embedding, final norm, head) once, and fp32 gradients; rows that it pads are left out.
- Memory: bf16 parameters and fp32 gradients whole on every rank, in buckets, or a rank's rows under FSDP2; a step's
  transient peak on top, that of one domain at a time, as `layout.memory` counts it for accelerators. Activations, and
  what FSDP2 gathers for a while, are left out.

Bytes and FLOPs are per rank and step; matrices and parameters those of the whole model.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from distributed_muon.layout.cutting import Bucket, bucket_elements, cut_buckets, cut_rows, make_buckets
from distributed_muon.layout.matrices import TensorSpec, Whole
from distributed_muon.layout.memory import transient_bytes_by_rank
from distributed_muon.layout.pieces import Layout
from distributed_muon.layout.plan import Plan, make_plan
from distributed_muon.planning.model_shapes import ParameterShape

LAYOUTS = ("flat", "bucketed", "aligned", "fsdp2")
_PARAMETER_BYTES, _GRADIENT_BYTES = 2, 4  # bf16 and fp32
_MUON_STATE_BYTES = 8  # fp32 master and momentum
_ADAMW_STATE_BYTES = 12  # fp32 master and two moments


@dataclass(frozen=True)
class Job:
    """Parallel sizes and optimizer options of a simulated job.

    Args:
        dp, tp, pp, ep: data, tensor, pipeline and expert parallel sizes; ep divides dp x tp.
        layout: "flat" (one buffer), "bucketed" (every bucket cut dp ways, whatever straddles), "aligned"
            (bucketed, ordered so that few matrices straddle) or "fsdp2" (rows of every parameter).
        strategy: as in `make_plan`.
        bucket_mb: MiB of fp32 gradients per bucket; None is the rule of
            `bucket_elements`. "flat" and "fsdp2" have no use for it.
    """

    dp: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    layout: str = "bucketed"
    strategy: str = "auto"
    bucket_mb: float | None = None

    def __post_init__(self) -> None:
        for option in ("dp", "tp", "pp", "ep"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} {getattr(self, option)} is not a number of ranks: give 1 or more")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r} is unknown: choose one of {', '.join(LAYOUTS)}")
        if self.bucket_mb is not None and self.bucket_mb <= 0:
            raise ValueError(f"bucket_mb {self.bucket_mb} is no size: give MiB above 0")
        if self.bucket_mb is not None and self.layout in ("flat", "fsdp2"):
            raise ValueError(f"bucket_mb {self.bucket_mb} contradicts layout {self.layout!r}: leave it out")
        if self.dp * self.tp % self.ep:
            raise ValueError(f"ep {self.ep} does not divide dp x tp = {self.dp * self.tp}")


@dataclass(frozen=True)
class DomainPlan:
    """The plan of one rank domain, and the bytes that do not depend on it.

    Args:
        name: "dense", "experts", or "all" where both share the ranks.
        ranks_per_slice: neighbouring ranks of the stage that play the same part in different copies of
            this domain (ep for experts).
        state_bytes: fp32 masters and optimizer state of every rank, bucket padding included.
        state_bytes_ideal: the same without padding. adamw_bytes: see StageReport.
        buckets: elements of each; with layout "fsdp2" of the root and every layer, which FSDP2 moves as one.
        last_buckets: elements of the first layers', one an algorithm, or of the root, if any, and the first layer:
            when backward has filled them, nothing is left to run beside their reduction.
        again_bytes: of `adamw_bytes`, those of the gather that FSDP2 repeats in backward.
        held: elements of parameters that every rank keeps from step to step, padding included.
    """

    name: str
    plan: Plan
    ranks_per_slice: int
    state_bytes: int
    state_bytes_ideal: float
    adamw_bytes: float
    buckets: tuple[int, ...] = ()
    last_buckets: tuple[int, ...] = ()
    held: int = 0
    again_bytes: float = 0.0

    @property
    def parameter_bytes(self) -> int:
        """Of every rank."""
        return self.held * _PARAMETER_BYTES

    @property
    def gradient_bytes(self) -> int:
        """Of every rank."""
        return self.held * _GRADIENT_BYTES


@dataclass(frozen=True)
class StageReport:
    """Costs of one pipeline stage; bytes are per rank and step.

    Args:
        stage: its number. domains: its rank domains.
        ns_flops_max: Newton-Schulz FLOPs of the busiest rank. ns_max_over_ideal: that over an equal share.
        exchange_bytes_max: sent by the busiest rank in the plan's all-to-alls, both ways.
        parameter_bytes, gradient_bytes: held by every rank, as is state_bytes_max.
        transient_bytes_max: what the step of one rank allocates beside these at its peak, at most.
        memory_bytes_max: all four together.
        adamw_bytes: what ZeRO-1 AdamW sends for the same parameters: 6 bytes x (N - 1) / N each. With layout "fsdp2"
            what FSDP2 sends for them: 8 bytes x (N - 1) / N, the root's 6.
        plan_seconds: to lay out and plan this stage.
    """

    stage: int
    domains: tuple[DomainPlan, ...]
    ns_flops_max: int
    ns_max_over_ideal: float
    exchange_bytes_max: int
    parameter_bytes: int
    gradient_bytes: int
    state_bytes_max: int
    state_bytes_ideal: float
    transient_bytes_max: int
    memory_bytes_max: int
    adamw_bytes: float
    plan_seconds: float

    @property
    def comm_over_adamw(self) -> float | None:
        """Traffic of Muon over ZeRO-1 AdamW's; None where AdamW has none (dp 1)."""
        return 1 + self.exchange_bytes_max / self.adamw_bytes if self.adamw_bytes else None


def simulate(shapes: Sequence[ParameterShape], job: Job) -> StageReport:
    """Plan every pipeline stage of a model and return the slowest.

    Args:
        shapes: the model's parameters; frozen ones are ignored.

    Raises:
        ValueError: a parallel size does not divide what it cuts.
    """
    trained = [shape for shape in shapes if shape.algorithm != "frozen"]
    if job.ep > 1 and not any(shape.expert for shape in trained):
        raise ValueError(f"ep {job.ep} wants routed experts, and the model has none")
    reports: dict[tuple, StageReport] = {}
    for number, stage in enumerate(_stages(trained, job.pp)):
        alike = tuple(shape[1:4] + shape[5:] for shape in stage)  # all but name and layer
        if alike not in reports:
            reports[alike] = _report(number, stage, job)
    return max(reports.values(), key=lambda report: report.ns_flops_max)


def _report(number: int, stage: Sequence[ParameterShape], job: Job) -> StageReport:
    started = time.perf_counter()
    domains = _domains(stage, job)
    world = job.dp * job.tp
    flops, sent = [0] * world, [0] * world
    total, transient = 0.0, 0
    for domain in domains:
        transient = max(transient, *transient_bytes_by_rank(domain.plan))
        total += domain.plan.ns_flops_total * domain.ranks_per_slice
        work, exchange = domain.plan.ns_flops_by_rank, domain.plan.exchange_bytes_by_rank
        for rank in range(world):
            flops[rank] += work[rank // domain.ranks_per_slice]
            sent[rank] += exchange[rank // domain.ranks_per_slice]
    parameters, gradients, state = (
        sum(getattr(domain, f"{kind}_bytes") for domain in domains) for kind in ("parameter", "gradient", "state")
    )
    return StageReport(
        stage=number,
        domains=tuple(domains),
        ns_flops_max=max(flops),
        ns_max_over_ideal=max(flops) * world / total if total else 1.0,
        exchange_bytes_max=max(sent),
        parameter_bytes=parameters,
        gradient_bytes=gradients,
        state_bytes_max=state,
        state_bytes_ideal=sum(domain.state_bytes_ideal for domain in domains),
        transient_bytes_max=transient,
        memory_bytes_max=parameters + gradients + state + transient,
        adamw_bytes=sum(domain.adamw_bytes for domain in domains),
        plan_seconds=time.perf_counter() - started,
    )


def _stages(shapes: Sequence[ParameterShape], pp: int) -> list[list[ParameterShape]]:
    """Parameters of each pipeline stage."""
    layers = 1 + max(shape.layer for shape in shapes if shape.layer is not None)
    if pp > layers:
        raise ValueError(f"pp {pp} is more than the model's {layers} layers")
    stage_of = [stage for stage in range(pp) for _ in range(layers * stage // pp, layers * (stage + 1) // pp)]
    stages: list[list[ParameterShape]] = [[] for _ in range(pp)]
    current = 0
    for shape in shapes:
        if shape.layer is not None:
            current = stage_of[shape.layer]
        stages[current].append(shape)
    return stages


def _domains(stage: Sequence[ParameterShape], job: Job) -> list[DomainPlan]:
    experts = [shape for shape in stage if shape.expert]
    if not experts or job.tp == job.ep == 1:
        return [_domain("all", stage, job.dp, job)]
    dense = [shape for shape in stage if not shape.expert]
    slices = _domain("experts", _expert_slice(experts, job.ep), job.dp * job.tp // job.ep, job, expert=True)
    busy = [work for work in slices.plan.ns_flops_by_rank for _ in range(job.ep)]
    return [_domain("dense", dense, job.dp, job, busy=busy), slices]


def _expert_slice(experts: Sequence[ParameterShape], ep: int) -> list[ParameterShape]:
    """The experts of the first of `ep` expert-parallel ranks; the others' are of the same shapes."""
    numbers = [int(shape.name.partition(".experts.")[2].partition(".")[0]) for shape in experts]
    count = 1 + max(numbers)
    if count % ep:
        raise ValueError(f"ep {ep} does not divide the {count} routed experts")
    return [shape for shape, number in zip(experts, numbers, strict=True) if number < count // ep]


def _domain(
    name: str,
    shapes: Sequence[ParameterShape],
    dp: int,
    job: Job,
    *,
    expert: bool = False,
    busy: Sequence[int] = (),
) -> DomainPlan:
    """Lay out and plan `shapes` over `dp` data-parallel ranks (x tp unless they are experts), given `busy` ranks."""
    tp = 1 if expert else job.tp
    tensors = [_tensor(shape, tp) for shape in shapes]
    numels = [tensor.numel for tensor in tensors]
    muon = [index for index, tensor in enumerate(tensors) if tensor.rule is not None]
    adamw = [index for index, tensor in enumerate(tensors) if tensor.rule is None]
    if job.layout == "fsdp2":
        by_layer = _by_layer(shapes, numels)
        sizes = tuple(by_layer.values())
        last = sizes[: 2 if None in by_layer else 1]
        again = sum(_PARAMETER_BYTES * numel for layer, numel in by_layer.items() if layer is not None)
        by_dp_rank = cut_rows([tensor.shape for tensor in tensors], dp)
        most = {shard.tensor: shard.stop - shard.start for shard in by_dp_rank[0]}
        padded = [sum(most[index] for index in chosen) for chosen in (muon, adamw)]
        held = sum(padded)
    else:
        buckets = _buckets(muon, numels, dp, job), _buckets(adamw, numels, dp, job)
        by_dp_rank = cut_buckets([*buckets[0], *buckets[1]], numels, dp)
        padded = [sum(bucket.numel for bucket in some) // dp for some in buckets]
        held = sum(padded) * dp
        sizes = tuple(bucket.numel for some in buckets for bucket in some)
        last, again = tuple(some[-1].numel for some in buckets if some), 0
    shards = [by_dp_rank[rank // tp] for rank in range(dp * tp)]
    layout = Layout.build(tensors, shards, [rank % tp for rank in range(dp * tp)])
    exact = [sum(numels[index] for index in chosen) / dp for chosen in (muon, adamw)]
    return DomainPlan(
        name=name,
        plan=make_plan(layout, job.strategy, busy=busy),
        ranks_per_slice=job.ep if expert else 1,
        state_bytes=padded[0] * _MUON_STATE_BYTES + padded[1] * _ADAMW_STATE_BYTES,
        state_bytes_ideal=exact[0] * _MUON_STATE_BYTES + exact[1] * _ADAMW_STATE_BYTES,
        adamw_bytes=((_GRADIENT_BYTES + _PARAMETER_BYTES) * sum(numels) + again) * (dp - 1) / dp,
        buckets=sizes,
        last_buckets=last,
        held=held,
        again_bytes=again * (dp - 1) / dp,
    )


def _by_layer(shapes: Sequence[ParameterShape], numels: Sequence[int]) -> dict[int | None, int]:
    """Elements of the root (None), where there is one, and of every layer, in the order of forward."""
    out: dict[int | None, int] = defaultdict(int)
    for shape, numel in zip(shapes, numels, strict=True):
        out[shape.layer] += numel
    return dict(sorted(out.items(), key=lambda item: (item[0] is not None, item[0])))


def _buckets(chosen: Sequence[int], numels: Sequence[int], dp: int, job: Job) -> list[Bucket]:
    size = bucket_elements(job.bucket_mb, dp)
    return make_buckets(
        numels,
        dp,
        bucket_numel=None if job.layout == "flat" else size,
        aligned=job.layout == "aligned",
        order=list(reversed(chosen)),  # gradients arrive in backward order
    )


def _tensor(shape: ParameterShape, tp: int) -> TensorSpec:
    """The rank-local tensor of a parameter cut over `tp` ranks."""
    local, dim = list(shape.shape), shape.tp_dim
    if dim is not None:
        if local[dim] % tp:
            raise ValueError(f"tp {tp} does not divide dimension {dim} of {shape.name} {shape.shape}")
        local[dim] //= tp
    rule = Whole() if shape.algorithm == "muon" else None
    cut = dim is not None and tp > 1
    return TensorSpec(shape.name, tuple(local), rule, dim if cut else None, tp if cut else 1)
