"""Views of shards, wires and matrices; neighbouring ones are merged, so that a step issues few operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor


class Window(NamedTuple):
    """(rows, cols) elements of a 1-D tensor: element (i, j) is number `offset + i * stride + j` of tensor `base`."""

    base: int
    offset: int
    stride: int


class Span(NamedTuple):
    """The same (rows, cols) elements in several tensors, such as a piece's momentum and its place on the wire."""

    rows: int
    cols: int
    windows: tuple[Window, ...]

    def view(self, number: int, tensor: Tensor) -> Tensor:
        """The elements of window `number`, whose base is the 1-D `tensor`."""
        _, offset, stride = self.windows[number]
        if self.rows == 1:
            return tensor.narrow(0, offset, self.cols)
        return tensor.as_strided((self.rows, self.cols), (stride, 1), tensor.storage_offset() + offset)


def merge(spans: Iterable[Span]) -> list[Span]:
    """Join runs that follow each other in every window: 5,000 small matrices become one."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: span.windows):
        last = merged[-1] if merged else None
        if last is not None and span.rows == last.rows == 1:
            pairs = zip(last.windows, span.windows, strict=True)
            if all((new.base, new.offset) == (old.base, old.offset + last.cols) for old, new in pairs):
                merged[-1] = last._replace(cols=last.cols + span.cols)
                continue
        merged.append(span)
    return merged
