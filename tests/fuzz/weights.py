"""Generated parameters: any shape and rule that the package knows, cut by tensor parallelism or not."""

from __future__ import annotations

import math
from typing import NamedTuple

from hypothesis import strategies as st

from distributed_muon.layout.matrices import QKV, Conv, Experts, MatrixRule, Split, TensorSpec, Whole
from tests.dense import spec_of


class Weight(NamedTuple):
    """One parameter.

    Args:
        shape: of the whole parameter. rule: None is AdamW's. dim: that tensor parallelism cuts, within one expert;
            None leaves the parameter whole on every TP rank. stride: interleaved parts per TP rank.
    """

    shape: tuple[int, ...]
    rule: MatrixRule | None = None
    dim: int | None = None
    stride: int = 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def spec(self, number: int, tp: int = 1) -> TensorSpec:
        """What the planner sees of parameter `number` on a TP rank."""
        return spec_of(str(number), *self, tp)


# Rows and columns: mostly small, so that cuts fall inside rows, and now and then long.
_SIDES = st.one_of(st.integers(1, 12), st.integers(1, 40), st.sampled_from([1, 16, 17, 64, 97]))


def _sizes(draw: st.DrawFn, total: int) -> tuple[int, ...]:
    """`total` as a sum of one to four."""
    cuts = sorted(draw(st.sets(st.integers(1, total - 1), max_size=3))) if total > 1 else []
    return tuple(high - low for low, high in zip([0, *cuts], [*cuts, total], strict=True))


@st.composite
def plain_weights(draw: st.DrawFn, empty: bool = False) -> Weight:
    """Parameters of AdamW: scalars, vectors, matrices, more dimensions; with `empty` also without elements."""
    shapes = [
        st.just(()),
        st.tuples(st.integers(1, 200)),
        st.tuples(_SIDES, _SIDES),
        st.tuples(*[st.integers(1, 4)] * 4),
    ]
    if empty:
        shapes.append(st.sampled_from([(0,), (0, 3), (3, 0), (2, 0, 3)]))
    return Weight(draw(st.one_of(*shapes)))


@st.composite
def matrix_weights(draw: st.DrawFn, tp: int = 1) -> Weight:
    """Parameters of Muon, of which `tp` ranks can hold equal parts."""
    rows, cols = draw(_SIDES), draw(_SIDES)
    kind = draw(st.sampled_from(["whole", "whole", "conv", "split", "experts", "fused experts", "qkv"]))
    dim = draw(st.sampled_from([None, 0, 1])) if tp > 1 else None
    stride = draw(st.sampled_from([1, 2])) if dim is not None else 1
    if kind == "conv":
        kernel = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
        dim, stride = (0, 1) if dim is not None else (None, 1)
        return Weight((rows * (tp if dim == 0 else 1), cols, *kernel), Conv(), dim, stride)
    if kind == "qkv":
        groups, per_group, width, value = (draw(st.integers(1, 3)) for _ in range(4))
        groups *= tp
        rule = QKV(groups * per_group, groups, width, value, draw(st.booleans()), draw(st.booleans()))
        rows = groups * (per_group * width * (2 if rule.gate else 1) + width + value)
        return Weight((rows, cols), rule, None if dim is None else 0, 1)
    rows, cols = (n * tp * stride if d == dim else n for d, n in enumerate((rows, cols)))
    rule: MatrixRule = Whole()
    if kind in ("split", "fused experts"):
        across = draw(st.integers(0, 1))
        rule = Split(_sizes(draw, (rows, cols)[across]), across)
    if "experts" in kind:
        return Weight((draw(st.integers(1, 5)), rows, cols), Experts(rule), dim, stride)
    return Weight((rows, cols), rule, dim, stride)


def weights(tp: int = 1, most: int = 8, empty: bool = False) -> st.SearchStrategy[tuple[Weight, ...]]:
    """Parameter sets, more of Muon's than of AdamW's."""
    one = st.one_of(matrix_weights(tp), matrix_weights(tp), plain_weights(empty))
    return st.lists(one, min_size=1, max_size=most).map(tuple)
