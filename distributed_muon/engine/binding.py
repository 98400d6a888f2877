"""A plan bound to memory: every view a step works on, made once for as long as shards and active tensors stay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distributed_muon.engine.coefficients import Table, coefficient_table
from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.exchange import Shipment
from distributed_muon.engine.state import OwnedParameter, Part
from distributed_muon.engine.timing import describe
from distributed_muon.engine.update import lr_ratio
from distributed_muon.engine.views import CACHE, Span, Window, cached, merge
from distributed_muon.engine.workspace import Slot, Workspace
from distributed_muon.layout.pieces import Piece, Shard
from distributed_muon.layout.plan import Plan, Wave

# What a window's base is, where it is no part: a wire, or the matrices at their home.
_WIRE, _MATRICES = -1, -2


@dataclass
class Views:
    """The same elements in the tensors of an update; gradients are looked up anew when a framework moves them."""

    group: int
    spans: list[Span]
    masters: list[Tensor] = field(default_factory=list)
    moments: dict[str, list[Tensor]] = field(default_factory=dict)
    grads: list[Tensor] = field(default_factory=list)
    others: list[Tensor] = field(default_factory=list)  # on a wire or in a matrix
    staged: list[Tensor] = field(default_factory=list)  # fp32 temporaries of the same shapes, on an accelerator
    chunks: list[slice] = field(default_factory=list)  # of all lists: what fits into the stage at a time
    steps: list[Tensor] = field(default_factory=list)

    def bind(self, parts: Sequence[Part]) -> None:
        """Look up masters and moments."""
        owners = [parts[span.windows[0].base] for span in self.spans]
        self.masters = [span.view(0, part.master) for span, part in zip(self.spans, owners, strict=True)]
        for key in owners[0].moments:
            self.moments[key] = [span.view(0, part.moments[key]) for span, part in zip(self.spans, owners, strict=True)]

    def bind_gradients(self, parts: Sequence[Part]) -> None:
        """Look up the gradients."""
        self.grads = [span.view(0, parts[span.windows[0].base].grad) for span in self.spans]


@dataclass
class Stack:
    """Matrices of one shape at their home.

    Args:
        matrices: their numbers. whole: (matrices, rows, cols), input and output. ratio: factor on the learning rate.
    """

    matrices: list[int]
    whole: Tensor
    ratio: float


@dataclass
class Batch:
    """Stacks that are orthogonalized together: of the same two sides, either way round, and the same options.

    Args:
        stacks: one after the other in `memory`, 1-D. table, eps: of the iteration.
        team: ranks that share the one matrix of a block; empty for whole matrices.
    """

    stacks: list[Stack]
    memory: Tensor
    table: Table
    eps: float
    team: tuple[int, ...] = ()


@dataclass
class BoundWave:
    """One wave: what to pack, where it arrives, what to orthogonalize, and what to update.

    Args:
        title: for the profile: its number, the matrices orthogonalized here, the bytes that leave this rank.
        packed: per parameter group, pieces of the momentum and their places (`others`) on the wire or at home.
        copies: (targets, sources) of pieces with several homes, packed once and copied.
        unpacked: (matrix views, wire views) at the home. returned: (wire views, matrix views) of the results.
        updates: (ratio, views) of masters and their results (`others`).
    """

    title: str
    packed: list[Views]
    copies: tuple[list[Tensor], list[Tensor]]
    to_homes: Shipment
    unpacked: tuple[list[Tensor], list[Tensor]]
    batches: list[Batch]
    returned: tuple[list[Tensor], list[Tensor]]
    from_homes: Shipment
    updates: list[tuple[float, Views]]

    @property
    def views(self) -> list[Views]:
        """All views of shards."""
        return [*self.packed, *(views for _, views in self.updates)]


class Binding:
    """All views of a step in which the tensors `active` take part.

    Args:
        plan, schedule: of the domain, and this rank's part in it. parts, owned: this rank's memory.
        param_groups: of the optimizer. active: per tensor. workspace: of the waves.
        collectives: of the domain.

    Attributes:
        flat: per Muon group, runs of whole shards, which momentum and decay act on.
        adamw: likewise for AdamW groups; `steps` holds one counter per run, advanced with it.
        adamw_steps: the counters of every active AdamW parameter.
        waves: in the plan's order.
    """

    def __init__(
        self,
        plan: Plan,
        schedule: Sequence[Wave],
        parts: Sequence[Part],
        owned: Sequence[OwnedParameter],
        param_groups: Sequence[Mapping[str, Any]],
        active: Sequence[bool],
        workspace: Workspace,
        collectives: Collectives,
    ) -> None:
        self._plan, self._parts, self._owned = plan, parts, owned
        self._groups, self._active, self._collectives = param_groups, active, collectives
        self._places = [
            (number, offset) for number, part in enumerate(parts) for offset in part.offsets
        ]  # by shard of this rank
        self._tensor_of = plan.layout.tensor_of_matrix
        self.waves = [self._wave(number, wave, workspace.slot(number)) for number, wave in enumerate(schedule)]
        for views in (views for wave in self.waves for views in wave.views):
            views.bind(parts)
        self.bind_runs()

    def look_up_gradients(self) -> None:
        """Follow gradients that a framework put elsewhere since the last step."""
        now = [part.grad.data_ptr() for part in self._parts]
        if now != self._gradients:
            self._gradients = now
            for views in (*self.flat, *self.adamw, *(views for wave in self.waves for views in wave.packed)):
                views.bind_gradients(self._parts)

    def release_gradients(self) -> None:
        """Hold no view of a gradient until the next look-up."""
        self._gradients = []
        for views in (*self.flat, *self.adamw, *(views for wave in self.waves for views in wave.packed)):
            views.grads = []

    def bind_runs(self) -> None:
        """Neighbouring active shards of one group as one run, the padding between them included.

        AdamW's counters are read here: to be called again where steps were taken with other active tensors.
        """
        runs: dict[tuple[int, float | None], list[Span]] = defaultdict(list)
        for number, part in enumerate(self._parts):
            before = None
            for shard, offset in zip(part.shards, part.offsets, strict=True):
                if not self._active[shard.tensor]:
                    before = None
                    continue
                key, stop = self._run_key(shard), offset + shard.stop - shard.start
                if key == before:
                    begin = runs[key][-1].windows[0].offset
                    runs[key][-1] = Span(1, stop - begin, (Window(number, begin, 0),))
                else:
                    runs[key].append(Span(1, stop - offset, (Window(number, offset, 0),)))
                before = key
        self.flat, self.adamw = [], []
        for (group, step), spans in runs.items():
            views = Views(group, list(_in_cache(spans, self._parts)))
            (self.flat if step is None else self.adamw).append(views)
            views.bind(self._parts)
            views.steps = [torch.tensor(step, device=m.device) for m in views.masters] if step is not None else []
        counted = (p for p in self._owned if self._active[p.tensor] and "step" in p.state)
        self.adamw_steps = [p.state["step"] for p in counted]
        self._gradients: list[int] = []

    def _run_key(self, shard: Shard) -> tuple[int, float | None]:
        """What neighbours must share: the group, and how often AdamW has stepped."""
        record = self._owned[shard.tensor]
        return record.group, record.state["step"].item() if "step" in record.state else None

    def _wave(self, number: int, wave: Wave, slot: Slot) -> BoundWave:
        batches, homes = self._batches(wave, slot)
        packed, copies = self._packed(wave, slot, homes)
        names = [self._plan.layout.tensors[self._tensor_of[matrix]].name for matrix in homes]
        sent = sum(wave.gather.send_counts) + sum(wave.scatter.send_counts)
        return BoundWave(
            f"wave {number}, {describe(names)}, {sent * slot.held.element_size()} bytes sent",
            packed,
            copies,
            Shipment(wave.gather, self._collectives, slot.held, slot.home, "to_homes"),
            self._moved(wave.gather.recv, slot, homes),
            batches,
            self._moved(wave.scatter.send, slot, homes)[::-1],
            Shipment(wave.scatter, self._collectives, slot.home, slot.held, "from_homes"),
            self._updates(wave, slot, homes),
        )

    def _batches(self, wave: Wave, slot: Slot) -> tuple[list[Batch], dict[int, int]]:
        """Active matrices at their home, and the element of `slot.matrices` at which each begins."""
        layout = self._plan.layout
        order = {piece.matrix: self._source(piece) for piece in reversed(wave.held)}
        alike: dict[Any, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
        for matrix in (matrix for stack in (*wave.stacks, wave.blocks) for matrix in stack):
            if self._active[self._tensor_of[matrix]]:
                group, shape = self._groups[self._owned[self._tensor_of[matrix]].group], layout.matrices[matrix].shape
                table = coefficient_table(group["ns_coefficients"], group["ns_steps"])
                team = self._plan.teams.get(matrix, ())
                key = table, group["eps"], team, matrix if team else None, *sorted(shape)
                alike[key][shape, _ratio(group, layout.matrices[matrix].logical_shape)].append(matrix)
        batches, homes, at = [], {}, 0
        for (table, eps, team, *_), by_shape in alike.items():
            stacks, begin = [], at
            for (shape, ratio), matrices in by_shape.items():
                # In the order in which their own elements lie here, so that neighbours are copied in one run.
                matrices.sort(key=lambda matrix: order.get(matrix, (len(self._parts), matrix)))
                for matrix in matrices:
                    homes[matrix] = at
                    at += shape[0] * shape[1]
                whole = slot.matrices[homes[matrices[0]] : at].view(len(matrices), *shape)
                stacks.append(Stack(matrices, whole, ratio))
            batches.append(Batch(stacks, slot.matrices[begin:at], table, eps, team))
        return batches, homes

    def _packed(
        self, wave: Wave, slot: Slot, homes: Mapping[int, int]
    ) -> tuple[list[Views], tuple[list[Tensor], list[Tensor]]]:
        targets: dict[Piece, list[Window]] = defaultdict(list)
        for piece in wave.held:
            if piece.replica == 0 and piece.matrix in homes:
                targets[piece].append(self._at_home(piece, homes))
        for piece, window in _on_wire(wave.gather.send):
            targets[piece].append(window)
        by_group: dict[int, list[Span]] = defaultdict(list)
        again = []
        for piece, (first, *others) in targets.items():
            if self._active[self._tensor_of[piece.matrix]]:
                spans = by_group[self._owned[self._tensor_of[piece.matrix]].group]
                spans.append(Span(piece.rows, piece.cols, (Window(*self._source(piece), piece.stride), first)))
                again += [Span(piece.rows, piece.cols, (other, first)) for other in others]
        packed = [self._with_others(group, self._cut(spans), slot.held, slot) for group, spans in by_group.items()]
        return packed, _pair(merge(again), slot.held, slot)

    def _moved(
        self, pieces: Sequence[Piece], slot: Slot, homes: Mapping[int, int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(matrix views, wire views) of pieces on the homes' wire."""
        spans = [
            Span(piece.rows, piece.cols, (self._at_home(piece, homes), window))
            for piece, window in _on_wire(pieces)
            if piece.matrix in homes
        ]
        return _pair(merge(spans), slot.home, slot)

    def _updates(self, wave: Wave, slot: Slot, homes: Mapping[int, int]) -> list[tuple[float, Views]]:
        arrived = dict(_on_wire(wave.scatter.recv))
        by_rule: dict[tuple[int, float], list[Span]] = defaultdict(list)
        for piece in wave.held:
            tensor = self._tensor_of[piece.matrix]
            if self._active[tensor]:
                group = self._owned[tensor].group
                ratio = _ratio(self._groups[group], self._plan.layout.matrices[piece.matrix].logical_shape)
                result = self._at_home(piece, homes) if piece.matrix in homes else arrived[piece]
                window = Window(*self._source(piece), piece.stride)
                by_rule[group, ratio].append(Span(piece.rows, piece.cols, (window, result)))
        return [
            (ratio, self._with_others(group, self._cut(spans), slot.held, slot))
            for (group, ratio), spans in by_rule.items()
        ]

    def _cut(self, spans: Sequence[Span]) -> list[Span]:
        """Merged spans, in the lengths of temporaries."""
        return list(_in_cache(merge(spans), self._parts))

    def _with_others(self, group: int, spans: list[Span], wire: Tensor, slot: Slot) -> Views:
        views = Views(group, spans)
        views.others = [span.view(1, _base(span.windows[1], wire, slot)) for span in views.spans]
        device = self._parts[0].master.device
        if device == slot.stage.device and slot.stage.numel():
            views.chunks = _chunks(views.others, slot.stage.numel())
            views.staged = [staged for some in views.chunks for staged in _staged(views.others[some], slot.stage)]
        else:
            views.chunks = _chunks(views.others, CACHE) if device.type == "cpu" else [slice(None)]
        return views

    def _source(self, piece: Piece) -> tuple[int, int]:
        """The part that holds a piece, and its first element there."""
        part, offset = self._places[piece.shard]
        return part, offset + piece.offset

    def _at_home(self, piece: Piece, homes: Mapping[int, int]) -> Window:
        return Window(_MATRICES, homes[piece.matrix] + piece.at, piece.pitch)


def _ratio(group: Mapping[str, Any], shape: tuple[int, int]) -> float:
    return lr_ratio(*shape, group["adjust_lr_fn"]) * group["update_scale"]


def _on_wire(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Window]]:
    """Every piece with its place on a wire that packs them one after the other."""
    at = 0
    for piece in pieces:
        yield piece, Window(_WIRE, at, piece.cols)
        at += piece.numel


def _in_cache(runs: Sequence[Span], parts: Sequence[Part]) -> Iterator[Span]:
    for run in runs:
        yield from cached(run, parts[run.windows[0].base].master.device)


def _chunks(views: Sequence[Tensor], most: int) -> list[slice]:
    """Runs of views that have at most `most` elements, or are a single one."""
    starts, total = [0], 0
    for number, view in enumerate(views):
        total += view.numel()
        if total > most and number:
            starts.append(number)
            total = view.numel()
    return [slice(*ends) for ends in pairwise([*starts, len(views)])]


def _staged(views: Sequence[Tensor], stage: Tensor) -> Iterator[Tensor]:
    """Places for tensors like `views`, one after the other in `stage`."""
    at = 0
    for view in views:
        yield stage.narrow(0, at, view.numel()).view(view.shape)
        at += view.numel()


def _base(window: Window, wire: Tensor, slot: Slot) -> Tensor:
    return wire if window.base == _WIRE else slot.matrices


def _pair(spans: Sequence[Span], wire: Tensor, slot: Slot) -> tuple[list[Tensor], list[Tensor]]:
    """Views of both windows of every span."""
    pairs = [[span.view(i, _base(span.windows[i], wire, slot)) for span in spans] for i in (0, 1)]
    return pairs[0], pairs[1]


class ShardGradients:
    """The gradients of all shards of a rank without padding, each element on one of the ranks that hold it.

    Args:
        parts: of the rank.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        runs: list[list[int]] = []  # [part, end, begin], neighbours without padding between them as one
        for number, part in enumerate(parts):
            for (_, start, stop, replica), offset in zip(part.shards, part.offsets, strict=True):
                if replica:
                    continue
                if not runs or runs[-1][:2] != [number, offset]:
                    runs.append([number, offset, offset])
                runs[-1][1] += stop - start
        spans = [Span(1, end - begin, (Window(number, begin, 0),)) for number, end, begin in runs]
        self._spans = list(_in_cache(spans, parts))
        self._places: list[int] = []
        self._views: list[Tensor] = []

    def views(self) -> list[Tensor]:
        """1-D fp32 views, looked up anew where a framework put gradients elsewhere."""
        now = [part.grad.data_ptr() for part in self._parts]
        if now != self._places:
            self._places = now
            self._views = [span.view(0, self._parts[span.windows[0].base].grad) for span in self._spans]
        return self._views

    def release(self) -> None:
        """Hold no view until the next look-up."""
        self._places, self._views = [], []
