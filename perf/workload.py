"""What is trained and with which optimizer: the work of a step that `perf.prediction` turns into seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from distributed_muon.layout.cost_model import NewtonSchulzCost
from distributed_muon.planning.model_shapes import NAMED_MODELS, model_shapes
from distributed_muon.planning.simulate import DomainPlan, Job, StageReport, simulate
from perf.cluster import Machine

# Experts per token, which the shapes do not tell.
ACTIVE_EXPERTS = {"moonlight-16b-a3b": 6, "deepseek-v3": 8, "kimi-k2": 8, "qwen3-30b-a3b": 8, "mixtral-8x7b": 2}


@dataclass(frozen=True)
class Setup:
    """The optimizer.

    Args:
        strategy: "home", "gather" or "adamw". layout, bucket_mb: as `simulate.Job` takes them.
        newton_schulz: iteration options; element_bytes also of the wire. overlap: whether reduce-scatter and
            all-gather run under backward and forward.
    """

    strategy: str = "home"
    layout: str = "bucketed"
    bucket_mb: float | None = None
    newton_schulz: NewtonSchulzCost = field(default_factory=NewtonSchulzCost)
    overlap: bool = True


@dataclass(frozen=True)
class Stage:
    """The pipeline stage to predict.

    Args:
        domains: its rank domains. ns_max_over_ideal: Newton-Schulz of its busiest rank.
    """

    domains: tuple[DomainPlan, ...]
    ns_max_over_ideal: float


class Workload(Protocol):
    """What a step does.

    Attributes:
        ranks: all of them. tp, pp: parallel sizes. dp: data-parallel size.
        microbatches: of one data-parallel rank per step.
    """

    ranks: int
    tp: int
    pp: int

    @property
    def dp(self) -> int: ...

    @property
    def microbatches(self) -> float: ...

    def forward_backward_seconds(self, machine: Machine) -> float:
        """Of one step."""

    def stage(self, setup: Setup) -> Stage:
        """The slowest pipeline stage under the optimizer `setup`."""


@dataclass(frozen=True)
class MeasuredTraining:
    """A step of plain data parallelism whose plan and forward-backward are known.

    Args:
        ranks: all data parallel. domain: with the optimizer's own plan and buckets.
        forward_backward: seconds of the step's one microbatch without a collective.
    """

    ranks: int
    domain: DomainPlan
    forward_backward: float
    tp: int = 1
    pp: int = 1
    microbatches: float = 1.0

    @property
    def dp(self) -> int:
        return self.ranks

    def forward_backward_seconds(self, machine: Machine) -> float:
        """As measured, whatever the machine."""
        return self.forward_backward

    def stage(self, setup: Setup) -> Stage:
        """The one there is, whose plan is `setup`'s already."""
        return Stage((self.domain,), self.domain.plan.ns_max_over_ideal)


@dataclass(frozen=True)
class Training:
    """What is trained, on how many ranks, and how well.

    Args:
        model: of NAMED_MODELS. ranks: all of them. tp, pp, ep: parallel sizes; data parallel is the rest.
        global_tokens: per step; each rank gets at least one sequence. sequence: tokens of a sequence, and of a
            microbatch. mfu: share of the peak that forward and backward reach.
    """

    model: str
    ranks: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    global_tokens: int = 2048 * 8192
    sequence: int = 8192
    mfu: float = 0.35

    @property
    def dp(self) -> int:
        return self.ranks // (self.tp * self.pp)

    @property
    def tokens_per_rank(self) -> float:
        """Per step, the tokens of the batch over all ranks: parallel ranks share their sequences."""
        return max(self.global_tokens / self.ranks, self.sequence / (self.tp * self.pp))

    def flops_per_token(self) -> float:
        """Forward and backward, without recomputation."""
        config = NAMED_MODELS[self.model]
        weights = 0.0
        for shape in model_shapes(config):
            if len(shape.shape) == 2 and shape.role != "embedding":
                experts = config.get("n_routed_experts") or config.get("num_experts") or config.get("num_local_experts")
                weights += shape.numel * (ACTIVE_EXPERTS[self.model] / experts if shape.expert else 1)
        heads, plain = config["num_attention_heads"], config.get("head_dim")
        if "v_head_dim" in config:
            width = heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"])
        else:
            width = 2 * heads * (plain or config["hidden_size"] // heads)
        # Scores and their sum over values: 2 FLOPs x half the sequence, forward once and backward twice.
        return 6 * weights + 3 * config["num_hidden_layers"] * self.sequence * width

    def stage(self, setup: Setup) -> Stage:
        """Laid out and planned by `simulate`."""
        strategy = "home" if setup.strategy == "adamw" else setup.strategy
        job = Job(self.dp, self.tp, self.pp, self.ep, setup.layout, strategy, setup.bucket_mb)
        report = simulated(self.model, job)
        return Stage(report.domains, report.ns_max_over_ideal)

    def forward_backward_seconds(self, machine: Machine) -> float:
        """Of one step."""
        return self.flops_per_token() * self.tokens_per_rank / (machine.peak_flops * self.mfu)

    @property
    def microbatches(self) -> float:
        """Sequences of one data-parallel rank per step."""
        return max(1.0, self.global_tokens / self.sequence / self.dp)


@lru_cache(maxsize=4)
def simulated(model: str, job: Job) -> StageReport:
    """`simulate` of a named model; the last few are kept, for setups that differ in other things ask again."""
    return simulate(model_shapes(NAMED_MODELS[model]), job)


def data_parallel(domain: DomainPlan, dp: int) -> int:
    """Ranks that cut a bucket of the domain, in a stage of `dp` data-parallel ranks."""
    return domain.plan.layout.world if domain.name == "experts" else dp
