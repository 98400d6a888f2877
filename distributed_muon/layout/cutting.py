"""Flat buckets of whole tensors and the equal parts that data-parallel ranks cut them into; or rows of every tensor."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from distributed_muon.layout.pieces import Shard

# Elements a tensor's start is padded to in a bucket: 64 bytes of fp32, one cache line, and more than
# the 16 bytes that GPU vector loads and NCCL want.
ALIGNMENT = 16


class Bucket(NamedTuple):
    """A flat buffer of whole tensors: tensor `tensors[i]` starts at element `offsets[i]` of `numel`."""

    tensors: tuple[int, ...]
    offsets: tuple[int, ...]
    numel: int


def bucket_elements(bucket_mb: float | None, dp: int) -> int:
    """Elements of a bucket of `bucket_mb` MiB of fp32 gradient.

    None is Megatron's rule for up to 64 ranks, 40 M elements and at least 1 M per rank; beyond it is 64 M, and at
    least 250 k per rank. That keeps a ring's latency, which grows with its ranks, at a fifth of a message. Larger
    buckets leave more at the ends of backward and step, where nothing runs beside the last and the first of them.
    """
    return (
        max(40_000_000, 1_000_000 * min(dp, 64), 250_000 * dp)
        if bucket_mb is None
        else max(1, round(bucket_mb * 2**18))
    )


def make_buckets(
    numels: Sequence[int],
    dp: int,
    *,
    bucket_numel: int | None,
    aligned: bool,
    order: Sequence[int] | None = None,
) -> list[Bucket]:
    """Group tensors into flat buckets, each later cut into `dp` equal shards.

    Args:
        numels: elements of each tensor.
        dp: ranks that will cut each bucket.
        bucket_numel: elements after which a bucket is closed; None puts everything into one.
        aligned: order the tensors inside a bucket so that as few as possible straddle a cut.
        order: tensor numbers in the order their gradients arrive; None is reverse registration order.

    Returns:
        The buckets; each tensor starts at a multiple of ALIGNMENT elements.
    """
    buckets: list[Bucket] = []
    pending: list[int] = []
    filled = 0
    order = list(reversed(range(len(numels)))) if order is None else list(order)
    for number, tensor in enumerate(order):
        pending.append(tensor)
        filled += _padded(numels[tensor])
        if number == len(order) - 1 or (bucket_numel is not None and filled >= bucket_numel):
            shard_numel = -(-max(filled, 1) // (dp * ALIGNMENT)) * ALIGNMENT  # tensors may be empty
            packed = _fill_slots(pending, numels, shard_numel) if aligned else pending
            offsets, at = [], 0
            for item in packed:
                offsets.append(at)
                at += _padded(numels[item])
            buckets.append(Bucket(tuple(packed), tuple(offsets), shard_numel * dp))
            pending, filled = [], 0
    return buckets


def _padded(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT


def _fill_slots(tensors: Sequence[int], numels: Sequence[int], slot: int) -> list[int]:
    """Order tensors so that slots of `slot` elements are filled by whole tensors, largest first.

    Where none fits into the room left in a slot, the largest remaining one straddles into the next.
    """
    waiting: dict[int, list[int]] = defaultdict(list)  # tensors by padded size, the one to take next last
    for tensor in sorted(tensors, key=lambda t: (numels[t], -t)):
        waiting[_padded(numels[tensor])].append(tensor)
    sizes = sorted(waiting)
    packed, at = [], 0
    while sizes:
        pick = bisect_right(sizes, slot - at % slot) - 1  # -1 where none fits: the largest of all
        size = sizes[pick]
        packed.append(waiting[size].pop())
        at += size
        if not waiting[size]:
            del sizes[pick]
    return packed


def cut_buckets(buckets: Sequence[Bucket], numels: Sequence[int], dp: int) -> list[list[Shard]]:
    """Cut every bucket into `dp` equal parts; the shards of each rank, bucket by bucket."""
    shards: list[list[Shard]] = [[] for _ in range(dp)]
    for bucket in buckets:
        size = bucket.numel // dp
        for tensor, offset in zip(bucket.tensors, bucket.offsets, strict=True):
            first, numel = offset // size, numels[tensor]
            cuts = [0, *range((first + 1) * size - offset, numel, size), numel] if numel else []
            for rank, (start, stop) in enumerate(pairwise(cuts), first):
                shards[rank].append(Shard(tensor, start, stop))
    return shards


def cut_rows(shapes: Sequence[Sequence[int]], dp: int) -> list[list[Shard]]:
    """Cut every tensor's first dimension as torch.chunk and FSDP2 do; the shards of each of `dp` ranks."""
    shards: list[list[Shard]] = [[] for _ in range(dp)]
    for tensor, shape in enumerate(shapes):
        numel, step = math.prod(shape), -(-shape[0] // dp) * math.prod(shape[1:])
        for rank, start in enumerate(range(0, numel, max(step, 1))):
            shards[rank].append(Shard(tensor, start, min(start + step, numel)))
    return shards
