"""Read a checkpoint: verify all of it first, then let every rank take its own elements of what any ranks wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distributed_muon.checkpoint.background import wait_for_last
from distributed_muon.checkpoint.files import Files, fault
from distributed_muon.checkpoint.held import OwnShard, own_shards
from distributed_muon.checkpoint.index import MODEL, DamagedCheckpoint, Index, as_tuples
from distributed_muon.checkpoint.model import other_entries, restore
from distributed_muon.checkpoint.places import copy_elements, whole_shape
from distributed_muon.checkpoint.saving import restore_replaced
from distributed_muon.checkpoint.together import on_all
from distributed_muon.checkpoint.view import CheckpointView, view_of
from distributed_muon.engine.collectives import Collectives
from distributed_muon.layout.matrices import TensorSpec

_AS_FAR_AS = "; strict=False takes what it has"


@torch.no_grad()
def load(
    path: str | Path,
    model: nn.Module | None,
    optimizer: Any,
    *,
    names: Callable[[str], str] = str,
    strict: bool = True,
) -> dict[str, Any]:
    """Restore what `save` wrote, on this or any other number of ranks, by this or another framework.

    Collective over all ranks that hold some of the model. Masters, momentum and moments keep their bits, parameters
    are rebuilt from the masters, groups get their options. Nothing is changed before all files are verified.

    Args:
        path: the directory. model: as of `save`; None leaves buffers and frozen parameters alone.
        optimizer: of this package.
        names: this optimizer's name of a parameter -> the checkpoint's, where the two models name them differently.
        strict: False takes a parameter whose algorithm changed, or that the checkpoint lacks: what it has is kept,
            missing moments start at zero, missing masters at the parameter; a line on rank 0 counts them.

    Returns:
        The `extra` that was saved.

    Raises:
        FileNotFoundError: no checkpoint under `path`. DamagedCheckpoint: a file is not what was saved.
        ValueError: it holds other parameters.
    """
    wait_for_last()
    view, path = view_of(optimizer), Path(path)
    index = read_whole(path, view.collectives)
    task = _Load(path, index, view, names, strict)
    entries = on_all(view.collectives, lambda: other_entries(model, view))
    on_all(view.collectives, lambda: task.check(None if model is None else entries))
    task.check_unused()
    missing = sum(view.collectives.gather_objects(task.fill()))
    said = task.restore_options()
    if model is not None:
        restore(model, entries, task.other(entries))
    view.restored(index.steps)
    if missing:
        said.append(f"{missing} shards of state were not in {path}: moments start at zero, masters at the parameters")
    if said and view.collectives.rank == 0:
        print("\n".join(said), flush=True)
    return index.extra


def read_whole(path: Path, collectives: Collectives) -> Index:
    """The index of a checkpoint, all files of which are what was saved; collective. The ranks share the reading.

    Raises:
        FileNotFoundError, DamagedCheckpoint, ValueError: as of `load`.
    """

    def read() -> str:
        if collectives.rank:
            return ""
        restore_replaced(path)
        return Index.read_text(path)

    index = Index.parse(collectives.gather_objects(on_all(collectives, read))[0], path)

    own = list(index.files)[collectives.rank :: collectives.size]
    on_all(collectives, lambda: verify_files(path, index, own))
    return index


def verify_files(folder: Path, index: Index, names: Iterable[str]) -> None:
    """Raise a DamagedCheckpoint for the first of the named files that is not what the index says."""
    for name in names:
        if (problem := fault(folder / name, index.files[name], index.save_id)) is not None:
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {name} {problem}")


class _Load:
    """One load: what is in the checkpoint, and for whom.

    Args:
        path, names, strict: as of `load`. index: of the checkpoint. view: of the optimizer.
    """

    def __init__(
        self, path: Path, index: Index, view: CheckpointView, names: Callable[[str], str], strict: bool
    ) -> None:
        self._path, self._index, self._view, self._strict = path, index, view, strict
        self._files, self._sources = Files(path), index.sources()
        self._names = lambda name: names(view.copies.get(name, name))

    # ---- before anything is changed --------------------------------------------------------------------

    def check(self, entries: Mapping[str, Any] | None) -> None:
        """Raise a ValueError where this rank cannot load it.

        Args:
            entries: of the model beside its trained parameters; None where no model is loaded.
        """
        if self._view.problem is not None:
            raise ValueError(self._view.problem)
        for engine in self._view.engines:
            for member in engine.members:
                self._check(member.spec, self._view.param_groups[member.group]["algorithm"])
        others = set(self._index.model)
        if entries is not None and others != set(entries):
            first = sorted(others.symmetric_difference(entries))[0]
            raise ValueError(
                f"{self._path} is of another model: entry {first!r} of its state dict, beside trained parameters, is "
                f"{'not here' if first in others else 'missing in it'}"
            )

    def _check(self, spec: TensorSpec, algorithm: str) -> None:
        name = self._names(spec.name)
        about, shape = self._index.parameters.get(name), whole_shape(spec)
        if about is None:
            if self._strict:
                raise ValueError(f"{self._path} holds other parameters: {name!r} is not among them{_AS_FAR_AS}")
        elif tuple(about["shape"]) != shape:
            raise ValueError(f"parameter {name!r} has shape {shape}, in {self._path} {tuple(about['shape'])}")
        elif self._strict and about["algorithm"] != algorithm:
            raise ValueError(
                f"parameter {name!r} is for {algorithm}, in {self._path} for {about['algorithm']}{_AS_FAR_AS}"
            )

    def check_unused(self) -> None:
        """Raise a ValueError for parameters of the checkpoint that no rank has; collective."""
        mine = {self._names(p.name) for p in self._view.parameters}
        bits = sum(1 << number for number, name in enumerate(self._index.parameters) if name in mine)
        used = reduce(or_, self._view.collectives.gather_objects(bits))
        for number, name in enumerate(self._index.parameters):
            if self._strict and not used >> number & 1:
                raise ValueError(f"{self._path} holds other parameters: {name!r} is not one of this run{_AS_FAR_AS}")

    # ---- the state -------------------------------------------------------------------------------------

    def fill(self) -> int:
        """Copy this rank's elements of everything; the number of shards that the checkpoint had nothing for."""
        missing = 0
        for own in own_shards(self._view):
            about = self._index.parameters.get(self._names(own.parameter.name), {})
            for key, target in own.states.items():
                if key in about.get("states", ()):
                    self._copy(own, key, target)
                else:  # masters are then the parameters
                    missing += 1
                    target.zero_() if key != "master" else None
        for parameter in self._view.parameters:
            if "step" in parameter.state:
                about = self._index.parameters.get(self._names(parameter.name), {})
                parameter.state["step"].fill_(about.get("step", 0))
        return missing

    def _copy(self, own: OwnShard, key: str, target: Tensor) -> None:
        name = self._names(own.parameter.name)
        for file, patches in self._sources[name]:
            if patches == own.place.patches:  # saved by a rank that held the same
                target.copy_(self._files.tensor(file, f"{name}.{key}").view(-1))
                return
        shards = ((self._files.tensor(f, f"{name}.{key}").view(-1), patches) for f, patches in self._sources[name])
        copy_elements(shards, target, own.place.patches)

    def other(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The model's other tensors."""
        return {key: self._files.tensor(MODEL, key) for key in keys}

    # ---- the options -----------------------------------------------------------------------------------

    def restore_options(self) -> list[str]:
        """Give every group the options that its parameters had; collective.

        Returns:
            A line for each option that stays this run's, because the group's parameters had several values.
        """
        said, view = [], self._view
        mine: list[set[int]] = [set() for _ in view.param_groups]
        for parameter in view.parameters:
            about = self._index.parameters.get(self._names(parameter.name))
            if about is not None and about["algorithm"] == view.param_groups[parameter.group]["algorithm"]:
                mine[parameter.group].add(about["group"])
        for number, everyone in enumerate(zip(*view.collectives.gather_objects(mine), strict=True)):
            saved = [self._index.groups[other] for other in sorted(set().union(*everyone))]
            own = view.options(number)
            for key in {key: None for group in saved for key in group}:
                if key not in own and self._index.framework != view.framework:
                    continue  # another framework's business
                values = [as_tuples(group.get(key)) for group in saved]
                if all(value == values[0] for value in values):
                    view.param_groups[number][key] = values[0]
                elif key in own:
                    said.append(f"{key} of parameter group {number} stays {own[key]}: {self._path} has several values")
        return said
