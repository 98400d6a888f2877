"""Which matrices a parameter has, against dense indexing; what does not add up is refused by name."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from distributed_muon.layout.matrices import QKV, Conv, Experts, Matrix, MatrixRule, Rectangle, Split, TensorSpec, Whole
from distributed_muon.layout.teams import cut_into_blocks
from tests.dense import matrices_of, spec_of, tp_slice

# name: global shape, rule, dimension that tensor parallelism cuts, interleaved parts per TP rank
CASES = {
    "whole": ((8, 12), Whole(), None, 1),
    "column parallel": ((8, 12), Whole(), 0, 1),
    "row parallel": ((8, 12), Whole(), 1, 1),
    "conv": ((8, 3, 2, 2), Conv(), 0, 1),
    "rows": ((12, 5), Split((2, 7, 3)), None, 1),
    "columns": ((5, 12), Split((2, 7, 3), dim=1), None, 1),
    "columns cut in columns": ((5, 12), Split((2, 7, 3), dim=1), 1, 1),
    "gate/up strided": ((16, 3), Split((8, 8)), 0, 2),
    "gate/up apart": ((16, 3), Split((8, 8)), 0, 1),
    "rows cut anywhere": ((12, 5), Split((2, 7, 3)), 0, 1),
    "qkv": ((16, 5), QKV(heads=8, groups=4, head_dim=1), 0, 1),
    "one group over two ranks": ((8, 5), QKV(heads=4, groups=1, head_dim=1, value_dim=3), 0, 1),
    "gated qkv": ((28, 5), QKV(heads=8, groups=4, head_dim=1, value_dim=2, gate=True), 0, 1),
    "per group": ((16, 5), QKV(heads=4, groups=4, head_dim=1, value_dim=2, per_group=True), 0, 1),
    "experts": ((3, 4, 8), Experts(), 1, 1),
    "expert rows": ((3, 8, 4), Experts(), 0, 1),
    "expert gate/up": ((2, 8, 3), Experts(Split((4, 4))), 0, 2),
    "expert columns": ((2, 3, 8), Experts(Split((2, 6), dim=1)), 1, 2),
}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_rectangles_place_every_element_of_every_tp_rank(case: str, tp: int) -> None:
    """Rows 11, 14 and 15: local rectangles land where dense indexing of the whole tensor puts them."""
    shape, rule, dim, stride = CASES[case]
    spec = spec_of("w", shape, rule, dim, stride, tp)
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    dense = matrices_of(numbers, rule)
    matrices = spec.matrices()
    assert [m.shape for m in matrices] == [tuple(part.shape) for part in dense], "logical, unsharded shapes"
    assert len({m.name for m in matrices}) == len(matrices)
    built = [torch.full(part.shape, -1) for part in dense]
    stack, rows, cols = spec.view
    for tp_rank in range(tp if dim is not None else 1):
        local = tp_slice(numbers, rule, dim, stride, tp, tp_rank).view(stack * rows, cols)
        rectangles = spec.rectangles(tp_rank)
        corners = [(r.local_row, r.local_col) for r in rectangles]
        assert corners == sorted(corners)
        for r in rectangles:
            target = built[r.matrix][r.row : r.row + r.rows, r.col : r.col + r.cols]
            assert (target == -1).all(), "an element is placed twice"
            target.copy_(local[r.local_row : r.local_row + r.rows, r.local_col : r.local_col + r.cols])
    for got, want in zip(built, dense, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("team", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_teams_cut_the_long_side_and_keep_the_logical_shape(case: str, team: int, tp: int) -> None:
    """Row 12: the blocks of a team cover the matrix once, and its scale is that of the whole."""
    shape, rule, dim, stride = CASES[case]
    spec = spec_of("w", shape, rule, dim, stride, tp)
    whole = spec.matrices()
    sizes = [min(team, max(m.shape)) for m in whole]
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = []
    for dense, size in zip(matrices_of(numbers, rule), sizes, strict=True):
        long = 1 if dense.shape[1] >= dense.shape[0] else 0
        cuts = [i * dense.shape[long] // size for i in range(size + 1)]
        parts += [dense.narrow(long, a, b - a) for a, b in pairwise(cuts)]
    built = [torch.full(part.shape, -1) for part in parts]
    for tp_rank in range(spec.tp_size):
        blocks, rectangles = cut_into_blocks(whole, spec.rectangles(tp_rank), sizes)
        assert [m.shape for m in blocks] == [tuple(part.shape) for part in parts]
        expected = [(m.shape, size) for m, size in zip(whole, sizes, strict=True) for _ in range(size)]
        assert [(m.logical_shape, m.team) for m in blocks] == expected
        corners = [(r.local_row, r.local_col) for r in rectangles]
        assert corners == sorted(corners)
        stack, rows, cols = spec.view
        local = tp_slice(numbers, rule, dim, stride, tp, tp_rank).view(stack * rows, cols)
        for r in rectangles:
            target = built[r.matrix][r.row : r.row + r.rows, r.col : r.col + r.cols]
            assert (target == -1).all(), "an element is placed twice"
            target.copy_(local[r.local_row : r.local_row + r.rows, r.local_col : r.local_col + r.cols])
    for got, want in zip(built, parts, strict=True):
        assert torch.equal(got, want)


def test_a_block_is_cut_out_of_the_rectangles_it_meets() -> None:
    """The docstring's example, and a tall matrix in near-equal parts; columns where the sides are equal."""
    wide, tall, square = Matrix("a", 24, 90), Matrix("b", 11, 3), Matrix("c", 4, 4)
    rectangles = [Rectangle(0, 5, 0, 0, 40, 24, 10), Rectangle(1, 29, 0, 0, 0, 11, 3)]
    blocks, parts = cut_into_blocks([wide, tall, square], rectangles, [2, 3, 2])
    assert [m.shape for m in blocks] == [(24, 45), (24, 45), (3, 3), (4, 3), (4, 3), (4, 2), (4, 2)]
    assert blocks[0] == blocks[1] == Matrix("a", 24, 45, 2, (24, 90))
    assert parts == [
        Rectangle(0, 5, 0, 0, 40, 24, 5), Rectangle(1, 5, 5, 0, 0, 24, 5),
        Rectangle(2, 29, 0, 0, 0, 3, 3), Rectangle(3, 32, 0, 0, 0, 4, 3), Rectangle(4, 36, 0, 0, 0, 4, 3),
    ]  # fmt: skip
    assert cut_into_blocks([wide, tall, square], rectangles, [1, 1, 1]) == ([wide, tall, square], rectangles)


def test_names_say_which_part() -> None:
    names = {
        TensorSpec("w", (4, 6), Whole()): ["w"],
        TensorSpec("w", (4, 6), Split((1, 3))): ["w[0]", "w[1]"],
        TensorSpec("w", (4, 6), Split((1, 3), names=("gate", "up"))): ["w[gate]", "w[up]"],
        TensorSpec("w", (2, 4, 6), Experts()): ["w[0]", "w[1]"],
        TensorSpec("w", (2, 2, 6), Experts(Split((1, 1), names=("a", "b")))): ["w[0,a]", "w[0,b]", "w[1,a]", "w[1,b]"],
        TensorSpec("w", (8, 6), QKV(4, 2, 1)): ["w[q]", "w[k]", "w[v]"],
        TensorSpec("w", (8, 6), QKV(4, 2, 1, per_group=True)): ["w[q0]", "w[k0]", "w[v0]", "w[q1]", "w[k1]", "w[v1]"],
        TensorSpec("b", (8,)): [],
    }
    for spec, expected in names.items():
        assert [m.name for m in spec.matrices()] == expected


def test_a_matrix_that_is_no_block_is_its_own_logical_shape() -> None:
    assert Matrix("w", 3, 5).logical_shape == (3, 5) and Matrix("w", 3, 5).numel == 15
    assert Matrix("w", 3, 5, 2, (3, 10)).logical_shape == (3, 10)


@pytest.mark.parametrize(
    ("shape", "rule", "message"),
    [
        ((6,), Whole(), r"'w': shape \(6,\) is not 2-D"),
        ((2, 3, 4), Whole(), "is not 2-D.*Conv.*Experts"),
        ((6, 4), Conv(), "is not a convolution kernel"),
        ((6, 4), Experts(), "is not an expert stack"),
        ((2, 3, 4, 5), Experts(), "is not an expert stack"),
        ((6, 4), Split((3, 4)), r"\(3, 4\) do not add up to the 6 of dim 0"),
        ((6, 4), Split((3, 3), dim=1), r"do not add up to the 4 of dim 1"),
        ((6, 4), Split((0, 6)), "do not add up"),
        ((6, 4), Split(()), "do not add up"),
        ((6, 4), Split((3, 3), names=("one",)), "2 sizes but 1 names"),
        ((6, 4), QKV(3, 2, 1), "heads 3 is not a multiple of groups 2"),
        ((6, 4), QKV(2, 1, 2), "1 groups x 8 rows does not add up to 6 rows"),
        ((2, 6, 4), Experts(Split((3, 4))), "do not add up"),
    ],
)
def test_what_does_not_add_up_is_refused_by_name(shape: tuple[int, ...], rule: MatrixRule, message: str) -> None:
    """Row 14: sizes that do not add up raise."""
    with pytest.raises(ValueError, match=message) as caught:
        TensorSpec("w", shape, rule).matrices()
    assert str(caught.value).startswith("parameter 'w'")


def test_rows_that_do_not_divide_into_interleaved_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="'w': 5 does not divide into tp_stride 2"):
        TensorSpec("w", (5, 4), Whole(), tp_dim=0, tp_size=2, tp_stride=2).rectangles(0)


def test_empty_parameters_have_no_matrices() -> None:
    assert TensorSpec("w", (0, 4), Whole()).matrices() == []
    assert TensorSpec("w", (4, 0), Whole()).matrices() == []


def test_rules_given_as_lists_are_hashed_like_tuples() -> None:
    assert hash(Split([1, 3], names=["a", "b"])) == hash(Split((1, 3), names=("a", "b")))
    assert [m.name for m in TensorSpec("w", (4, 6), Split([1, 3], names=["a", "b"])).matrices()] == ["w[a]", "w[b]"]


def test_rules_derive_from_one_base_and_are_not_each_other() -> None:
    rules = (Whole(), Conv(), Split((1,)), QKV(), Experts())
    assert all(isinstance(rule, MatrixRule) for rule in rules)
    assert not any(isinstance(rule, Whole) for rule in rules[1:])
