"""What a step allocates beside the state, rank by rank, from the plan alone: the waves in flight and Newton-Schulz.

`ShardedStep.step` holds a workspace for its whole length: a few slots, which waves take in turn, and one scratch for
whatever operation is under way, be it Newton-Schulz of a batch or the fp32 temporaries of packing and updating. On an
accelerator nothing else counts but what a team's Newton-Schulz allocates: AdamW is one fused kernel. (On a CPU there is
no scratch: batches are small, and fp32 temporaries have the size of a core's cache.) What adapters allocate, such as
gradient buckets, is theirs to say.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distributed_muon.layout.matrices import Matrix
from distributed_muon.layout.plan import Plan

# Waves alive at a time: one on its way to its homes, one being orthogonalized, one on its way back.
IN_FLIGHT = 3
# Elements of fp32 temporaries on an accelerator, more where Newton-Schulz has more: 64 MiB, as much as a wave.
STAGE = 1 << 24
# Elements of one batched matmul. CPU: measured, 16 of 128x128 run 2.2 times as fast as one by one, 4 of 256x256
# 1.2 times, 512x512 are no faster together. Accelerators: all of one shape in a wave, so that few kernels are launched.
BATCH_NUMEL = {"cpu": 2**18, "accelerator": 2**26}
# Work buffers of Newton-Schulz begin at multiples of 64 bytes, as those of torch's allocators do.
_ALIGNED = 32


def slot_elements(plan: Plan) -> np.ndarray:
    """Elements that every wave needs of the workspace, on every rank of the domain.

    Returns:
        (waves, ranks, 5) int64: whole matrices at their home; the wire at the holders' end; the wire at the homes'
        end; and on an accelerator fp32 temporaries; Newton-Schulz of whole matrices.
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
    scratch, cost = np.zeros_like(held), plan.newton_schulz
    whole_matrix = np.array([matrix.team == 1 for matrix in plan.layout.matrices], bool)
    sides = np.sort(np.array([matrix.shape for matrix in plan.layout.matrices], np.int64).reshape(-1, 2), axis=1)
    for short, long in set(map(tuple, sides[whole_matrix].tolist())):
        chosen = (whole_matrix & (sides == (short, long)).all(axis=1))[matrices]
        count = add(plan.wave_of[matrices][chosen], homes[chosen], np.int64(1))
        gram, batch = cost.form_of(short, long) == "gram", batch_size(short * long, cost.form)
        scratch = np.maximum(scratch, newton_schulz_elements(short, long, count, gram, batch))
    wires = np.maximum(sent, back), np.maximum(received, returned)
    return np.stack([at_home, *wires, np.minimum(held, longest), scratch], -1)


def scratch_bytes(staged: int, newton_schulz: int, element_bytes: int) -> int:
    """Bytes for so many fp32 temporaries or, at another time, so many elements of Newton-Schulz."""
    return -(-max(4 * staged, element_bytes * newton_schulz) // 8) * 8


def transient_bytes_by_rank(plan: Plan) -> list[int]:
    """Bytes that each rank's step allocates at its peak on an accelerator, and has freed again at its end."""
    sizes, cost = slot_elements(plan), plan.newton_schulz
    total = np.zeros(plan.layout.world, np.int64)
    for first in range(IN_FLIGHT):
        total += sizes[first::IN_FLIGHT, :, :3].max(axis=0, initial=0).sum(axis=1) * cost.element_bytes
    total += [scratch_bytes(*most, cost.element_bytes) for most in sizes[:, :, 3:].max(axis=0, initial=0).tolist()]
    above = [0] * plan.layout.world
    for block, homes in zip(plan.layout.matrices, plan.homes, strict=True):
        for home in homes if block.team > 1 else ():
            above[home] = max(above[home], _team_bytes(block, cost.element_bytes))
    return (total + above).tolist()


def batch_size(numel: int, ns_form: str, device_type: str = "accelerator") -> int:
    """Matrices of `numel` elements that are multiplied at once; "standard" takes them one by one, as torch does."""
    most = BATCH_NUMEL["cpu" if device_type == "cpu" else "accelerator"]
    return 1 if ns_form == "standard" else max(1, most // numel)


def aligned(elements: Any) -> Any:
    """Elements from the beginning of one work buffer to that of the next."""
    return -(-elements // _ALIGNED) * _ALIGNED


def newton_schulz_elements(short: int, long: int, count: Any, gram: bool, batch: int) -> Any:
    """Elements of Newton-Schulz's work buffers for `count` matrices, a number or an array, `batch` at a time.

    These are X, where matrices are taken one by one its successor too (else the output serves), and the square
    matrices of the form.
    """
    count = np.minimum(count, batch)
    x, square = aligned(count * short * long), aligned(count * short * short)
    return (2 if batch == 1 else 1) * x + (4 if gram else 2) * square


def _team_bytes(block: Matrix, element_bytes: int) -> int:
    short = min(block.logical_shape)
    x, square, share = block.numel, short * short, -(-short // block.team)
    rounded = element_bytes if element_bytes < 4 else 0  # in fp32 nothing is copied to be rounded
    scaled = 8 * x + rounded * x
    # The Gram matrix of this iteration, in fp32 while it is summed, and of the one before; X and its successor.
    summed = element_bytes * (x + square) + 4 * square + rounded * square
    advanced = element_bytes * (2 * x + square)
    return max(scaled, element_bytes * block.team * share * short + max(summed, advanced))
