"""Seconds and bytes of a training step at a scale nobody has at hand, from the plan and the rates of a machine.

What is assumed:

- Forward and backward take FLOPs / (peak x MFU). FLOPs per token: 6 per active weight, and causal attention.
  A `MeasuredTraining` brings their seconds instead.
- Reduce-scatters hide under the backward and all-gathers under the forward of one microbatch; the buckets that
  backward fills last, one an algorithm, are always exposed: nothing runs beside their collectives.
- FSDP2 gathers every layer once more under backward, where its reduce-scatters queue behind it; the root (embedding,
  final norm, head) and the first layer have nothing to hide under. It does all that in every microbatch; one counts.
- Rings over several nodes use every port of a node: a rank's rate is NVLink's or that of its group's ports in the
  node, whichever is less. Each starts with a latency and one hop per further node; the step's one small
  all-reduce is a tree.
- All-to-alls between nodes use the rank's own port; each peer costs one message. Who sends or receives most sets
  the time. Waves are pipelined as `ShardedStep.step` issues them; their Newton-Schulz adds up to the busiest
  rank's, for ranks wait only for those they exchange with. Packing and updates hide exchanges too.
- A collective slows the computation beside it (`perf.links` measures by how much; gloo does): what of that exceeds
  the wait for it is a part of its own, "delayed".
- Element-wise work runs at memory bandwidth. Host time, stragglers and congestion are left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distributed_muon.layout.memory import transient_bytes_by_rank
from distributed_muon.planning.simulate import DomainPlan
from perf.cluster import Machine
from perf.links import Link
from perf.waves import WaveSeconds, pipeline, wave_seconds
from perf.workload import Setup, Workload, data_parallel

# Bytes read and written per element of a rank's shard, kernel by kernel. Both: mean of the gradient (8), norm (4),
# outside writes looked for (14), master rounded into the bf16 parameter (6). Muon: momentum (12), decay (8). AdamW: 28.
_MUON_TOUCHED, _ADAMW_TOUCHED = 52, 60
# In a wave: what is orthogonalized, staged and rounded to the wire (26), and the update from it (18).
_WAVES_TOUCHED = 44


@dataclass(frozen=True)
class Prediction:
    """One step of one rank, seconds and bytes.

    Args:
        forward_backward: seconds. exposed: seconds by part that nothing hides: "reduce_scatter",
            "newton_schulz", "exchange", "elementwise", "agreement", "all_gather"; "delayed" is what collectives that
            are hidden slow the computation beside them.
        communication: seconds by collective were nothing hidden. sent_bytes: by the busiest rank.
        memory: bytes by part; activations left out. ns_max_over_ideal: balance of Newton-Schulz; None without.
    """

    forward_backward: float
    exposed: Mapping[str, float]
    communication: Mapping[str, float]
    sent_bytes: float
    memory: Mapping[str, float]
    ns_max_over_ideal: float | None

    @property
    def optimizer_seconds(self) -> float:
        return sum(self.exposed.values())

    @property
    def share(self) -> float:
        """Exposed optimizer seconds over forward-backward."""
        return self.optimizer_seconds / self.forward_backward

    def to_json(self) -> dict[str, Any]:
        return {
            "forward_backward_seconds": self.forward_backward,
            "optimizer_seconds": self.optimizer_seconds,
            "share_of_forward_backward": self.share,
            "exposed_seconds": dict(self.exposed),
            "communication_seconds": dict(self.communication),
            "sent_bytes": self.sent_bytes,
            "memory_bytes": dict(self.memory),
            "ns_max_over_ideal": self.ns_max_over_ideal,
        }


def predict(training: Workload, setup: Setup, machine: Machine) -> Prediction:
    """Predict the slowest pipeline stage.

    Raises:
        ValueError: parallel sizes that do not divide what they cut.
    """
    if training.ranks % (training.tp * training.pp):
        raise ValueError(f"tp x pp = {training.tp * training.pp} does not divide {training.ranks} ranks")
    adamw = setup.strategy == "adamw"
    stage = training.stage(setup)
    forward_backward = training.forward_backward_seconds(machine)
    microbatch = forward_backward / training.microbatches
    ring = {"reduce_scatter": 0.0, "all_gather": 0.0}
    last_ring = dict(ring)
    again = 0.0
    exposed: dict[str, float] = defaultdict(float)
    communication: dict[str, float] = defaultdict(float)
    memory: dict[str, float] = defaultdict(float)
    sent = 0.0
    compute: list[list[float]] = [[] for _ in range(training.dp * training.tp)]  # by rank and domain
    domain_waves: list[tuple[WaveSeconds, float]] = []
    for domain in stage.domains:
        place = place_of(domain, training, machine)
        local = sum(tensor.numel for tensor in domain.plan.layout.tensors)
        muon = 0 if adamw else sum(t.numel for t in domain.plan.layout.tensors if t.rule is not None)
        for kind, share in (("reduce_scatter", 4 / 6), ("all_gather", 2 / 6)):
            moved = (domain.adamw_bytes - domain.again_bytes) * share
            last = sum(domain.last_buckets) / sum(domain.buckets)
            ring[kind] += place.ring_seconds(kind, len(domain.buckets), moved)
            last_ring[kind] += place.ring_seconds(kind, len(domain.last_buckets), moved * last)
        if domain.again_bytes:
            again += place.ring_seconds("all_gather", len(domain.buckets), domain.again_bytes)
        touched = muon * _MUON_TOUCHED + (local - muon) * _ADAMW_TOUCHED
        in_waves = muon * _WAVES_TOUCHED / place.dp / machine.memory_bytes_per_second
        exposed["elementwise"] += touched / place.dp / machine.memory_bytes_per_second + in_waves
        exposed["agreement"] = max(exposed["agreement"], place.tree_latency)
        sent += domain.adamw_bytes
        memory["parameters, bf16"] += domain.parameter_bytes
        memory["gradients, fp32"] += domain.gradient_bytes
        memory["masters and moments, fp32"] += domain.state_bytes + (4 * _rule_numel(domain) / place.dp if adamw else 0)
        if not adamw:
            plan = replace(domain.plan, newton_schulz=setup.newton_schulz)
            waves = wave_seconds(plan, machine, place.near_share)
            for rank in range(training.dp * training.tp):
                compute[rank].append(waves.newton_schulz[rank // domain.ranks_per_slice])
            domain_waves.append((waves, in_waves))
            communication["exchange"] += waves.exchange
            sent += max(map(sum, zip(plan.exchange_bytes_by_rank, plan.team_bytes_by_rank, strict=True)))
            memory["waves, transient"] = max(memory["waves, transient"], *transient_bytes_by_rank(plan))
    if domain_waves:
        busiest = max(compute, key=sum)
        exposed["newton_schulz"] = sum(busiest)
        for (waves, packing), seconds in zip(domain_waves, busiest, strict=True):
            waited = pipeline(waves, seconds + packing) - seconds - packing
            exposed["exchange"] += waited
            exposed["delayed"] += max(0.0, machine.delay("all_to_all") * waves.exchange - waited)
    windows = {"reduce_scatter": microbatch * 2 / 3 - again, "all_gather": microbatch / 3}
    for kind, seconds in ring.items():
        communication[kind] = seconds + (again if kind == "all_gather" else 0.0)
        exposed[kind] = max(last_ring[kind], seconds - windows[kind]) if setup.overlap else seconds
        exposed["delayed"] += max(0.0, seconds * machine.delay(kind) - exposed[kind]) if setup.overlap else 0.0
    return Prediction(
        forward_backward, dict(exposed), dict(communication), sent, dict(memory),
        None if adamw else stage.ns_max_over_ideal,
    )  # fmt: skip


def _rule_numel(domain: DomainPlan) -> int:
    return sum(tensor.numel for tensor in domain.plan.layout.tensors if tensor.rule is not None)


@dataclass(frozen=True)
class _Place:
    """Where a domain's ranks sit: seconds and rates of its collectives."""

    dp: int
    ring_latency: float
    tree_latency: float
    ring_rate: float
    near_share: float  # of an all-to-all's bytes that stay in the node
    links: Mapping[str, Link]

    def ring_seconds(self, kind: str, calls: int, sent_bytes: float) -> float:
        """Of so many calls that send so much in all."""
        if kind in self.links:
            return calls * self.links[kind].seconds(sent_bytes / calls)
        return calls * self.ring_latency + sent_bytes / self.ring_rate


def place_of(domain: DomainPlan, training: Workload, machine: Machine) -> _Place:
    hardware, world = machine.hardware, domain.plan.layout.world
    stride = domain.ranks_per_slice
    in_node = max(1, min(world, hardware.node_ranks // stride))
    dp = data_parallel(domain, training.dp)
    ring_in_node = in_node if domain.name == "experts" else max(1, min(dp, hardware.node_ranks // training.tp))
    nodes = -(-dp // ring_in_node)
    ports = ring_in_node * hardware.link_bytes_per_second * machine.link_efficiency
    rate = hardware.node_bytes_per_second if nodes == 1 else min(hardware.node_bytes_per_second, ports)
    ring = hardware.latency_seconds + (nodes - 1) * machine.hop_seconds
    tree = hardware.latency_seconds + 2 * math.ceil(math.log2(nodes)) * machine.hop_seconds
    return _Place(dp, ring, tree, rate, (in_node - 1) / (world - 1) if world > 1 else 1.0, machine.links)
