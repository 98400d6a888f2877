"""What a step allocates beside the state, rank by rank, from the plan alone: the waves in flight and Newton-Schulz.

`ShardedStep.step` holds a workspace of a few slots, which waves take in turn, for its whole length, and above it the
temporaries of one stack's Newton-Schulz at a time. On an accelerator nothing else counts: AdamW is one fused kernel,
and fp32 temporaries of packing and updating lie in the workspace's stage. (On a CPU there is no stage; these
temporaries have the size of a core's cache.) What adapters allocate, such as gradient buckets, is theirs to say.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from distributed_muon.layout.cost_model import NewtonSchulzCost
from distributed_muon.layout.matrices import Matrix
from distributed_muon.layout.plan import Plan

# Waves alive at a time: one on its way to its homes, one being orthogonalized, one on its way back.
IN_FLIGHT = 3
# Elements of fp32 temporaries on an accelerator: 64 MiB, as much as a wave.
STAGE = 1 << 24
# Elements of one batched matmul. CPU: measured, 16 of 128x128 run 2.2 times as fast as one by one, 4 of 256x256
# 1.2 times, 512x512 are no faster together. Accelerators: enough to fill one, 32 MiB a workspace in bf16.
BATCH_NUMEL = {"cpu": 2**18, "accelerator": 2**24}


def slot_elements(plan: Plan) -> np.ndarray:
    """Elements that every wave needs of a workspace slot, on every rank of the domain.

    Returns:
        (waves, ranks, 4) int64: whole matrices at their home; the wire at the holders' end; the wire at the homes'
        end; fp32 temporaries, where there is a stage for them.
    """
    world, pieces, numel = plan.layout.world, plan.layout.columns, plan.layout.columns.numel
    matrices = np.repeat(np.arange(len(plan.homes)), plan.home_count)
    homes = np.fromiter((rank for ranks in plan.homes for rank in ranks), np.int64, len(matrices))
    whole = np.array([matrix.numel for matrix in plan.layout.matrices], np.int64)
    source, away = pieces.replica == 0, plan.away
    wave, first = plan.wave_of[pieces.matrix], plan.first_home[pieces.matrix]

    def add(where: np.ndarray, ranks: np.ndarray, elements: np.ndarray) -> np.ndarray:
        out = np.zeros((len(plan.waves), world), np.int64)
        np.add.at(out, (where, ranks), elements)
        return out

    at_home = add(plan.wave_of[matrices], homes, whole[matrices])
    sent = add(wave[source], pieces.rank[source], (numel * (plan.home_count[pieces.matrix] - 1 + away))[source])
    own = source & ~away  # what a home holds itself does not travel to it
    received = at_home - add(wave[own], pieces.rank[own], numel[own])
    returned, back = (add(wave[away], ranks[away], numel[away]) for ranks in (first, pieces.rank))
    held, longest = add(wave, pieces.rank, numel), np.full((len(plan.waves), world), STAGE)
    np.maximum.at(longest, (wave, pieces.rank), numel)
    return np.stack([at_home, np.maximum(sent, back), np.maximum(received, returned), np.minimum(held, longest)], -1)


def transient_bytes_by_rank(plan: Plan) -> list[int]:
    """Bytes that each rank's step allocates at its peak on an accelerator, and has freed again at its end."""
    sizes, cost = slot_elements(plan), plan.newton_schulz
    workspace = np.zeros(plan.layout.world, np.int64)
    for first in range(IN_FLIGHT):
        workspace += sizes[first::IN_FLIGHT, :, :3].max(axis=0, initial=0).sum(axis=1) * cost.element_bytes
    workspace += 4 * sizes[:, :, 3].max(axis=0, initial=0)
    # Matrices of one shape that a rank orthogonalizes in one wave are one stack.
    stacks: dict[tuple, dict[tuple[int, int], int]] = defaultdict(lambda: defaultdict(int))
    for matrix, homes, wave in zip(plan.layout.matrices, plan.homes, plan.wave_of.tolist(), strict=True):
        for home in homes:
            stacks[matrix[1:]][wave, home] += 1
    above = np.zeros(plan.layout.world, np.int64)
    for kind, counts in stacks.items():
        most = np.zeros(plan.layout.world, np.int64)
        for (_, home), count in counts.items():
            most[home] = max(most[home], count)
        needed = {count: newton_schulz_bytes(Matrix("", *kind), count, cost) for count in set(most.tolist()) - {0}}
        above = np.maximum(above, [needed.get(count, 0) for count in most.tolist()])
    return (workspace + above).tolist()


def newton_schulz_bytes(matrix: Matrix, count: int, cost: NewtonSchulzCost) -> int:
    """Bytes of temporaries while `orthogonalize` runs on a stack of `count` matrices, or a team on its block."""
    if matrix.team > 1:
        return _team_bytes(matrix, cost.element_bytes)
    form = cost.form_of(matrix.rows, matrix.cols)
    batch = 1 if cost.form == "standard" else max(1, min(count, BATCH_NUMEL["accelerator"] // matrix.numel))
    alone = cost.form == "standard" or BATCH_NUMEL["accelerator"] // matrix.numel <= 1
    tall, short = matrix.rows > matrix.cols, min(matrix.rows, matrix.cols)
    x, square = batch * matrix.numel, batch * short * short
    # X, its successor, and the square matrices of the form. A tall matrix alone begins as a transposed view, which the
    # standard form does not write to.
    buffers = (3 if form == "standard" and tall and alone else 2) * x
    return cost.element_bytes * (buffers + (4 if form == "gram" else 2) * square)


def _team_bytes(block: Matrix, element_bytes: int) -> int:
    short = min(block.logical_shape)
    x, square, share = block.numel, short * short, -(-short // block.team)
    rounded = element_bytes if element_bytes < 4 else 0  # in fp32 nothing is copied to be rounded
    scaled = 8 * x + rounded * x
    # The Gram matrix of this iteration, in fp32 while it is summed, and of the one before; X and its successor.
    summed = element_bytes * (x + square) + 4 * square + rounded * square
    advanced = element_bytes * (2 * x + square)
    return max(scaled, element_bytes * block.team * share * short + max(summed, advanced))
