"""Views of shards, wires and matrices; neighbouring ones are merged, so that a step issues few operations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from distributed_muon.layout.memory import STAGE

# Elements of the four tensors of an AdamW update that a core's cache holds at a time.
CACHE = 1 << 16


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


def cached(run: Span, device: torch.device) -> Iterator[Span]:
    """A run, in lengths whose temporaries stay small: on the CPU in a core's cache from one operation to the next."""
    length = CACHE if device.type == "cpu" else STAGE
    if run.rows > 1 or run.cols <= length:
        yield run
        return
    for at in range(0, run.cols, length):
        windows = tuple(Window(base, offset + at, stride) for base, offset, stride in run.windows)
        yield Span(1, min(length, run.cols - at), windows)


def merge(spans: Iterable[Span]) -> list[Span]:
    """Join runs that follow each other in every window: 5,000 small matrices become one."""
    merged: list[Span] = []
    ends = None  # where each window of the run under way ends; None after a span that is no run
    begun, total = (), 0
    for span in sorted(spans, key=attrgetter("windows")):
        rows, cols, windows = span
        if rows == 1 and ends == [(base, offset) for base, offset, _ in windows]:
            total += cols
            merged[-1] = Span(1, total, begun)
        else:
            begun, total = windows, cols
            merged.append(span)
        ends = [(base, offset + cols) for base, offset, _ in windows] if rows == 1 else None
    return merged
