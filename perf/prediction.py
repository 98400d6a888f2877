"""Seconds and bytes of a training step at a scale nobody has at hand, from the plan and the rates of a machine.

What is assumed:

- Forward and backward take FLOPs / (peak x MFU). FLOPs per token: 6 per active weight, and causal attention.
  A `MeasuredTraining` brings their seconds instead.
- Reduce-scatters hide under the backward and all-gathers under the forward of one microbatch; one bucket of each
  is always exposed, for nothing runs beside the first all-gather or the last reduce-scatter.
- Rings over several nodes use every port of a node: a rank's rate is NVLink's or that of its group's ports in the
  node, whichever is less. Each starts with a latency and one hop per further node; the step's one small
  all-reduce is a tree.
- All-to-alls between nodes use the rank's own port; each peer costs one message. Who sends or receives most sets
  the time. Waves are pipelined as `ShardedMuon.step` issues them; their Newton-Schulz adds up to the busiest
  rank's, for ranks wait only for those they exchange with.
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

from distributed_muon.layout.plan import Plan
from distributed_muon.planning.simulate import DomainPlan
from perf.cluster import Machine
from perf.links import Link
from perf.workload import Setup, Workload, data_parallel

# Bytes read and written per element of a rank's shard. Both: mean of the fp32 gradient (8), gradient (4), master
# (8), bf16 parameter (2). Muon: momentum (8), wire out and in (4). AdamW: two moments (16).
_MUON_TOUCHED, _ADAMW_TOUCHED = 34, 38


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
    one_bucket = dict(ring)
    exposed: dict[str, float] = defaultdict(float)
    communication: dict[str, float] = defaultdict(float)
    memory: dict[str, float] = defaultdict(float)
    sent = 0.0
    compute: list[list[float]] = [[] for _ in range(training.dp * training.tp)]  # by rank and domain
    domain_waves: list[WaveSeconds] = []
    for domain, buckets in zip(stage.domains, stage.buckets, strict=True):
        place = _place(domain, training, machine)
        local = sum(tensor.numel for tensor in domain.plan.layout.tensors)
        muon = 0 if adamw else sum(t.numel for t in domain.plan.layout.tensors if t.rule is not None)
        for kind, share in (("reduce_scatter", 4 / 6), ("all_gather", 2 / 6)):
            seconds = place.ring_seconds(kind, buckets, domain.adamw_bytes * share)
            ring[kind] += seconds
            one_bucket[kind] = max(one_bucket[kind], seconds / buckets)
        touched = muon * _MUON_TOUCHED + (local - muon) * _ADAMW_TOUCHED
        exposed["elementwise"] += touched / place.dp / machine.memory_bytes_per_second
        exposed["agreement"] = max(exposed["agreement"], place.tree_latency)
        sent += domain.adamw_bytes
        memory["parameters, bf16"] += 2 * local
        memory["gradients, fp32"] += 4 * local
        memory["masters and moments, fp32"] += domain.state_bytes + (4 * _rule_numel(domain) / place.dp if adamw else 0)
        if not adamw:
            plan = replace(domain.plan, newton_schulz=setup.newton_schulz)
            waves = _waves(plan, place, machine)
            for rank in range(training.dp * training.tp):
                compute[rank].append(waves.newton_schulz[rank // domain.ranks_per_slice])
            domain_waves.append(waves)
            communication["exchange"] += waves.exchange
            sent += max(map(sum, zip(plan.exchange_bytes_by_rank, plan.team_bytes_by_rank, strict=True)))
            memory["waves, transient"] = max(memory["waves, transient"], 5 * waves.home_bytes)
    if domain_waves:
        busiest = max(compute, key=sum)
        exposed["newton_schulz"] = sum(busiest)
        for waves, seconds in zip(domain_waves, busiest, strict=True):
            waited = pipeline(waves, seconds) - seconds
            exposed["exchange"] += waited
            exposed["delayed"] += max(0.0, machine.delay("all_to_all") * waves.exchange - waited)
    windows = {"reduce_scatter": microbatch * 2 / 3, "all_gather": microbatch / 3}
    for kind, seconds in ring.items():
        communication[kind] = seconds
        exposed[kind] = max(one_bucket[kind], seconds - windows[kind]) if setup.overlap else seconds
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


def _place(domain: DomainPlan, training: Workload, machine: Machine) -> _Place:
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


@dataclass(frozen=True)
class WaveSeconds:
    """A domain's waves.

    Args:
        gather, work, scatter: per wave, seconds on the rank that each keeps busiest.
        newton_schulz: per rank of the domain, its seconds of Newton-Schulz over all waves.
        home_bytes: of matrices at one home in one wave, at most.
    """

    gather: tuple[float, ...]
    work: tuple[float, ...]
    scatter: tuple[float, ...]
    newton_schulz: tuple[float, ...]
    home_bytes: int = 0

    @property
    def exchange(self) -> float:
        """Seconds of all all-to-alls, were nothing hidden."""
        return sum(self.gather) + sum(self.scatter)


def pipeline(waves: WaveSeconds, compute: float) -> float:
    """Seconds of the waves as `ShardedMuon.step` issues them, with one queue for all-to-alls.

    Args:
        compute: seconds of Newton-Schulz in all, spread over the waves as their `work` is.
    """
    clock = queue = 0.0
    gathered: list[float] = []
    scattered: list[float] = []
    count, factor = len(waves.work), compute / max(sum(waves.work), 1e-30)

    def issue(done: list[float], seconds: float) -> None:
        nonlocal queue
        queue = max(queue, clock) + seconds
        done.append(queue)

    for number in range(count):
        if number == 0:
            issue(gathered, waves.gather[0])
        if number + 1 < count:
            issue(gathered, waves.gather[number + 1])
        clock = max(clock, gathered[number]) + waves.work[number] * factor
        issue(scattered, waves.scatter[number])
        if number:
            clock = max(clock, scattered[number - 1])
    # Rounding must not make the sum of the parts more than the whole.
    return max(clock, queue, compute)


def _waves(plan: Plan, place: _Place, machine: Machine) -> WaveSeconds:
    """The seconds of each wave's parts on the rank that does, sends or receives most."""
    hardware, newton_schulz, matrices = machine.hardware, plan.newton_schulz, plan.layout.matrices
    wave_of = {matrix: wave for wave, members in enumerate(plan.waves) for matrix in members}
    # Per wave: elements by rank, sent and received on the way to the homes; the way back is its mirror.
    sent: list[dict[int, int]] = [defaultdict(int) for _ in plan.waves]
    received: list[dict[int, int]] = [defaultdict(int) for _ in plan.waves]
    back: list[dict[int, int]] = [defaultdict(int) for _ in plan.waves]
    peers: list[dict[int, set[int]]] = [defaultdict(set) for _ in plan.waves]
    copies = [0] * len(plan.waves)  # homes of one matrix, for plans whose homes are all holders
    for piece in plan.layout.pieces:
        wave, homes = wave_of[piece.matrix], plan.homes[piece.matrix]
        away = piece.rank not in homes
        sent[wave][piece.rank] += piece.numel * (len(homes) - 1 + away)
        copies[wave] = max(copies[wave], len(homes) - 1)
        if away:
            received[wave][homes[0]] += piece.numel
            back[wave][homes[0]] += piece.numel
            peers[wave][homes[0]].add(piece.rank)
            peers[wave][piece.rank].add(homes[0])
        elif len(homes) > 1:
            received[wave][piece.rank] += matrices[piece.matrix].numel - piece.numel
    gathers, works, scatters = [], [], []
    total = [0.0] * plan.layout.world
    home_bytes = 0
    for wave, members in enumerate(plan.waves):
        seconds: dict[int, float] = defaultdict(float)
        at_home: dict[int, int] = defaultdict(int)
        for matrix in members:
            team = plan.teams.get(matrix, ())
            work = machine.newton_schulz.get(matrices[matrix].shape)
            if work is None or team:
                work = newton_schulz.flops(matrices[matrix]) / hardware.matmul_flops
            if team:
                near = len(team) <= hardware.node_ranks
                rate = hardware.node_bytes_per_second if near else hardware.link_bytes_per_second
                moved = newton_schulz.team_bytes(min(matrices[matrix].logical_shape), len(team))
                work += moved / rate + (3 * newton_schulz.steps + 4) * hardware.latency_seconds
            for home in plan.homes[matrix]:
                seconds[home] += work
                at_home[home] += matrices[matrix].numel
        messages = max(copies[wave], max(map(len, peers[wave].values()), default=0))
        ways = [
            newton_schulz.element_bytes * max((*side_a.values(), *side_b.values()), default=0)
            for side_a, side_b in ((sent[wave], received[wave]), (back[wave], back[wave]))
        ]
        gather, scatter = (_all_to_all(count, messages, place, machine) for count in ways)
        gathers.append(gather)
        scatters.append(scatter)
        works.append(max(seconds.values()))
        home_bytes = max(home_bytes, newton_schulz.element_bytes * max(at_home.values()))
        for rank, value in seconds.items():
            total[rank] += value
    return WaveSeconds(tuple(gathers), tuple(works), tuple(scatters), tuple(total), home_bytes)


def _all_to_all(count: int, messages: int, place: _Place, machine: Machine) -> float:
    """Seconds until the rank that moves `count` bytes is done; nothing where nobody moves any."""
    if not count:
        return 0.0
    if "all_to_all" in place.links:
        return place.links["all_to_all"].seconds(count)
    hardware = machine.hardware
    far = count * (1 - place.near_share) / (hardware.link_bytes_per_second * machine.link_efficiency)
    near = count * place.near_share / hardware.node_bytes_per_second
    return hardware.latency_seconds + messages * machine.message_seconds + max(far, near)
