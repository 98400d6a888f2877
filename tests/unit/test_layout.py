"""Buckets, shards and pieces by brute force: every element of every matrix once, where it belongs."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from distributed_muon.layout.cutting import ALIGNMENT, bucket_elements, cut_buckets, make_buckets
from distributed_muon.layout.matrices import Split, TensorSpec, Whole
from distributed_muon.layout.pieces import Layout, Shard
from tests.dense import matrices_of, spec_of, tp_slice
from tests.unit.test_matrices import CASES

ALL = {**CASES, "vector": ((13,), None, None, 1), "scalar": ((), None, None, 1), "long": ((1, 97), Whole(), None, 1)}


def build(dp: int, tp: int, bucket_numel: int | None, aligned: bool) -> Layout:
    specs = [spec_of(name, *ALL[name], tp) for name in ALL]
    numels = [spec.numel for spec in specs]
    by_dp = cut_buckets(make_buckets(numels, dp, bucket_numel=bucket_numel, aligned=aligned), numels, dp)
    shards = [by_dp[rank // tp] for rank in range(dp * tp)]
    return Layout.build(specs, shards, tp_ranks=[rank % tp for rank in range(dp * tp)])


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("bucket_numel", [1, 150, None])
@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (2, 1), (3, 1), (4, 1), (7, 1), (1, 2), (2, 2), (3, 4)])
def test_pieces_hold_every_element_once_and_in_its_place(
    dp: int, tp: int, bucket_numel: int | None, aligned: bool
) -> None:
    """Rows 1, 11, 14 and 27: pieces against dense indexing, for cuts inside rows and more ranks than rows."""
    layout = build(dp, tp, bucket_numel, aligned)
    numbers, expected = [], []
    for name, (shape, rule, _, _) in ALL.items():
        start = 10_000 * len(numbers)
        numbers.append(start + torch.arange(torch.Size(shape).numel()).view(shape))
        expected += [part.contiguous() for part in matrices_of(numbers[-1], rule)] if rule else []
        assert len([m for m in layout.matrices if m.name.split("[")[0] == name]) == (
            len(matrices_of(numbers[-1], rule)) if rule else 0
        )
    local = {
        (t, tp_rank): tp_slice(whole, rule, dim, stride, tp, tp_rank).reshape(-1)
        for t, (whole, (_, rule, dim, stride)) in enumerate(zip(numbers, ALL.values(), strict=True))
        for tp_rank in range(tp)
    }
    copies = {(m, r): torch.full(matrix.shape, -1) for m, matrix in enumerate(layout.matrices) for r in range(tp)}
    for piece in layout.pieces:
        shard = layout.shards[piece.rank][piece.shard]
        held = local[shard.tensor, layout.tp_ranks[piece.rank]][shard.start : shard.stop]
        source = held.as_strided((piece.rows, piece.cols), (piece.stride, 1), held.storage_offset() + piece.offset)
        assert piece.offset + (piece.rows - 1) * piece.stride + piece.cols <= held.numel(), "inside its shard"
        target = copies[piece.matrix, piece.replica]
        target = target.as_strided((piece.rows, piece.cols), (piece.pitch, 1), piece.at)
        assert (target == -1).all(), "an element lies in two pieces"
        target.copy_(source)
    for m, want in enumerate(expected):
        replicated = layout.tensors[layout.tensor_of_matrix[m]].tp_size == 1
        for replica in range(tp):
            if replica == 0 or replicated:
                assert torch.equal(copies[m, replica], want), layout.matrices[m].name
            else:
                assert (copies[m, replica] == -1).all()


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("bucket_numel", [1, 150, None])
@pytest.mark.parametrize("dp", [1, 2, 3, 8])
def test_shards_are_equal_cuts_of_the_buckets(dp: int, bucket_numel: int | None, aligned: bool) -> None:
    numels = [5, 97, 1, 561, 16, 33, 200, 7]
    buckets = make_buckets(numels, dp, bucket_numel=bucket_numel, aligned=aligned)
    assert sorted(tensor for bucket in buckets for tensor in bucket.tensors) == list(range(len(numels)))
    covered = [torch.zeros(n) for n in numels]
    for bucket in buckets:
        assert bucket.numel % (dp * ALIGNMENT) == 0
        ends = 0
        for tensor, offset in zip(bucket.tensors, bucket.offsets, strict=True):
            assert offset % ALIGNMENT == 0 and offset >= ends, "tensors do not overlap"
            ends = offset + numels[tensor]
        assert ends <= bucket.numel
    for rank, shards in enumerate(cut_buckets(buckets, numels, dp)):
        for shard in shards:
            covered[shard.tensor][shard.start : shard.stop] += 1
            bucket = next(b for b in buckets if shard.tensor in b.tensors)
            offset = bucket.offsets[bucket.tensors.index(shard.tensor)]
            size = bucket.numel // dp
            assert rank * size <= offset + shard.start < offset + shard.stop <= (rank + 1) * size
    assert all((count == 1).all() for count in covered)


def test_buckets_close_at_their_size_in_backward_order() -> None:
    buckets = make_buckets([64] * 6, 2, bucket_numel=128, aligned=False)
    assert [bucket.tensors for bucket in buckets] == [(5, 4), (3, 2), (1, 0)]
    assert [bucket.tensors for bucket in make_buckets([64] * 3, 2, bucket_numel=None, aligned=False)] == [(2, 1, 0)]
    assert [b.tensors for b in make_buckets([64] * 3, 2, bucket_numel=128, aligned=False, order=[1, 2, 0])] == [
        (1, 2),
        (0,),
    ]
    assert make_buckets([], 2, bucket_numel=None, aligned=True) == []


def test_megatrons_bucket_size() -> None:
    assert bucket_elements(None, 8) == 40_000_000
    assert bucket_elements(None, 64) == 64_000_000
    assert bucket_elements(1.0, 8) == 2**18


def test_aligned_order_keeps_matrices_on_one_rank() -> None:
    """Row 1: equal matrices that fill the shards straddle in no aligned bucket, but in registration order."""
    numels = [48, 16, 32, 64, 16, 16, 32, 32] * 2
    for aligned, straddling in ((True, 0), (False, 2)):
        shards = cut_buckets(make_buckets(numels, 4, bucket_numel=None, aligned=aligned), numels, 4)
        holders = [sum(any(s.tensor == t for s in held) for held in shards) for t in range(len(numels))]
        assert sum(count > 1 for count in holders) == straddling


@pytest.mark.parametrize("seed", range(20))
def test_aligned_order_takes_the_largest_that_fits(seed: int) -> None:
    """Against the rule itself: the largest tensor that fits into what is left of a shard, else the largest of all."""
    rng = random.Random(seed)
    numels = [rng.choice([1, 16, 17, 48, 64, 200, 500]) for _ in range(rng.randint(1, 60))]
    dp = rng.choice([1, 2, 5])
    (bucket,) = make_buckets(numels, dp, bucket_numel=None, aligned=True)
    left, at = sorted(range(len(numels)), key=lambda t: (-numels[t], t)), 0
    for tensor in bucket.tensors:
        room = bucket.numel // dp - at % (bucket.numel // dp)
        padded = {t: -(-numels[t] // ALIGNMENT) * ALIGNMENT for t in left}
        expected = next((t for t in left if padded[t] <= room), left[0])
        assert tensor == expected
        left.remove(tensor)
        at += padded[tensor]


def test_a_tensor_without_elements_has_no_shard() -> None:
    (bucket,) = make_buckets([16, 0], 2, bucket_numel=None, aligned=False, order=[0, 1])
    assert cut_buckets([bucket], [16, 0], 2) == [[Shard(0, 0, 16)], []]


def test_padding_is_small() -> None:
    """Row 37: at most 2 % of a model's elements, not the world size times the largest shard."""
    layer = [1408 * 128, 128 * 1408, 576 * 128, 128, 512 * 16, 3000 * 128, 64, 192 * 128]
    for dp, aligned in itertools.product((2, 8, 64), (False, True)):
        buckets = make_buckets(layer * 12, dp, bucket_numel=200_000 * dp, aligned=aligned)
        assert sum(bucket.numel for bucket in buckets) <= 1.02 * sum(layer * 12)


def test_a_shard_holds_at_most_three_pieces_of_a_rectangle() -> None:
    """Columns 0 to 2 of a 6 x 5 tensor, cut inside rows 1 and 4: the rest of a row, whole rows, the begin of a row."""
    spec = TensorSpec("w", (6, 5), Split((2, 3), dim=1))
    layout = Layout.build([spec], [[Shard(0, 0, 6)], [Shard(0, 6, 21)], [Shard(0, 21, 30)]])
    found = [(p.rank, p.offset, p.stride, p.at, p.rows, p.cols) for p in layout.pieces if p.matrix == 0]
    assert found == [
        (0, 0, 5, 0, 1, 2), (0, 5, 5, 2, 1, 1),
        (1, 0, 5, 3, 1, 1), (1, 4, 5, 4, 2, 2), (1, 14, 5, 8, 1, 1),
        (2, 0, 5, 9, 1, 1), (2, 4, 5, 10, 1, 2),
    ]  # fmt: skip
    whole = Layout.build([spec], [[Shard(0, 0, 10)], [Shard(0, 10, 30)]])
    assert [(p.rank, p.at, p.rows, p.cols) for p in whole.pieces if p.matrix == 0] == [(0, 0, 2, 2), (1, 4, 4, 2)]


def test_equal_layouts_are_equal_and_pieces_are_numbers() -> None:
    """Plans are compared across ranks; pieces that kept numpy's integers would not print or hash like others."""
    assert build(2, 1, 150, False) == build(2, 1, 150, False) != build(2, 1, 150, True)
    layout = build(3, 2, 150, True)
    assert all(type(value) is int for piece in layout.pieces for value in piece)
    assert list(layout.pieces) == sorted(layout.pieces, key=lambda p: (p.matrix, p.rank, p.shard, p.offset))
    assert [tuple(column) for column in layout.columns] == list(zip(*layout.pieces, strict=True))
    for matrix, held in enumerate(layout.holders):
        pieces = [piece for piece in layout.pieces if piece.matrix == matrix]
        assert held == {
            rank: sum(p.numel for p in pieces if p.rank == rank) for rank in sorted({p.rank for p in pieces})
        }


@pytest.mark.parametrize(
    ("shards", "count"),
    [
        ([[Shard(0, 0, 20)], [Shard(0, 21, 40)]], 39),
        ([[Shard(0, 0, 20)], [Shard(0, 19, 40)]], 41),
        ([[Shard(0, 0, 40)], []], 0),
    ],
)
def test_a_layout_with_holes_or_doubles_is_refused(shards: list[list[Shard]], count: int) -> None:
    if count:
        with pytest.raises(ValueError, match=f"holds {count} of the 40 elements of matrix 'w'"):
            Layout.build([TensorSpec("w", (5, 8), Whole())], shards)
    else:
        assert len(Layout.build([TensorSpec("w", (5, 8), Whole())], shards).pieces) == 1
