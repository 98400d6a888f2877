"""Seconds of a plan's waves: the way to the homes, Newton-Schulz, the way back, and how they overlap."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from distributed_muon.layout.plan import Plan
from perf.cluster import Machine


@dataclass(frozen=True)
class WaveSeconds:
    """A domain's waves.

    Args:
        gather, work, scatter: per wave, seconds on the rank that each keeps busiest.
        newton_schulz: per rank of the domain, its seconds of Newton-Schulz over all waves.
    """

    gather: tuple[float, ...]
    work: tuple[float, ...]
    scatter: tuple[float, ...]
    newton_schulz: tuple[float, ...]

    @property
    def exchange(self) -> float:
        """Seconds of all all-to-alls, were nothing hidden."""
        return sum(self.gather) + sum(self.scatter)


def pipeline(waves: WaveSeconds, compute: float) -> float:
    """Seconds of the waves as `ShardedStep.step` issues them, with one queue for all-to-alls.

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


@dataclass(frozen=True)
class Exchange:
    """Of the rank that each wave's all-to-alls keep busiest.

    Args:
        to_homes, from_homes: per wave, elements that it sends or receives. messages: per wave, ranks it talks to.
    """

    to_homes: list[int]
    from_homes: list[int]
    messages: list[int]


def exchange(plan: Plan) -> Exchange:
    """Of a plan, all pieces at once."""
    world, count = plan.layout.world, len(plan.waves)
    pieces, copies, away = plan.layout.columns, plan.home_count - 1, plan.away
    numel, wave, home = pieces.numel, plan.wave_of[pieces.matrix], plan.first_home[pieces.matrix]
    holder, at_home = wave * world + pieces.rank, wave * world + home

    def by_rank(places: np.ndarray, elements: np.ndarray) -> np.ndarray:
        # float64 counts exactly to 9e15.
        return np.bincount(places, elements, count * world).reshape(count, world)

    sent = by_rank(holder, numel * (copies[pieces.matrix] + away))
    received = by_rank(at_home[away], numel[away])
    # A home that others share receives all that it does not hold.
    shared = ~away & (copies[pieces.matrix] > 0)
    matrix_numel = np.array([matrix.numel for matrix in plan.layout.matrices], np.int64)
    to_homes = np.maximum(sent, received + by_rank(holder[shared], (matrix_numel[pieces.matrix] - numel)[shared]))
    both = [holder[away] * world + home[away], at_home[away] * world + pieces.rank[away]]
    peers = by_rank(np.unique(np.concatenate(both)) // world, None)
    most_copies = np.zeros(count, np.int64)
    np.maximum.at(most_copies, plan.wave_of, copies)
    return Exchange(
        to_homes.max(axis=1).astype(int).tolist(),
        received.max(axis=1).astype(int).tolist(),
        np.maximum(peers.max(axis=1), most_copies).astype(int).tolist(),
    )


def wave_seconds(plan: Plan, machine: Machine, near_share: float) -> WaveSeconds:
    """The seconds of each wave's parts on the rank that does, sends or receives most.

    Args:
        near_share: of an all-to-all's bytes that stay in the node.
    """
    matrices, element_bytes = plan.layout.matrices, plan.newton_schulz.element_bytes
    works: list[float] = []
    total = [0.0] * plan.layout.world
    kinds: dict[tuple, float] = {}
    for members in plan.waves:
        seconds: dict[int, float] = defaultdict(float)
        for matrix in members:
            team = len(plan.teams.get(matrix, ()))
            kind = (matrices[matrix].shape, matrices[matrix].logical_shape, team)
            if kind not in kinds:
                kinds[kind] = _work(plan, machine, matrix, team)
            for home in plan.homes[matrix]:
                seconds[home] += kinds[kind]
        works.append(max(seconds.values()))
        for rank, value in seconds.items():
            total[rank] += value
    moved = exchange(plan)
    gather, scatter = (
        tuple(
            _all_to_all(elements * element_bytes, messages, machine, near_share)
            for elements, messages in zip(way, moved.messages, strict=True)
        )
        for way in (moved.to_homes, moved.from_homes)
    )
    return WaveSeconds(gather, tuple(works), scatter, tuple(total))


def _work(plan: Plan, machine: Machine, number: int, team: int) -> float:
    """Seconds of Newton-Schulz of one matrix, or of one block of a team's."""
    hardware, newton_schulz, matrix = machine.hardware, plan.newton_schulz, plan.layout.matrices[number]
    if not team and matrix.shape in machine.newton_schulz:
        return machine.newton_schulz[matrix.shape]
    work = newton_schulz.flops(matrix) / hardware.matmul_flops
    if team:
        rate = hardware.node_bytes_per_second if team <= hardware.node_ranks else hardware.link_bytes_per_second
        moved = newton_schulz.team_bytes(min(matrix.logical_shape), team)
        work += moved / rate + (3 * newton_schulz.steps + 4) * hardware.latency_seconds
    return work


def _all_to_all(count: int, messages: int, machine: Machine, near_share: float) -> float:
    """Seconds until the rank that moves `count` bytes is done; nothing where nobody moves any."""
    if not count:
        return 0.0
    if "all_to_all" in machine.links:
        return machine.links["all_to_all"].seconds(count)
    hardware = machine.hardware
    far = count * (1 - near_share) / (hardware.link_bytes_per_second * machine.link_efficiency)
    near = count * near_share / hardware.node_bytes_per_second
    return hardware.latency_seconds + messages * machine.message_seconds + max(far, near)
