"""Write a checkpoint, whole or not at all: every rank its own shards, rank 0 the index."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distributed_muon.checkpoint.background import Saving, in_background, stage_of, wait_for_last
from distributed_muon.checkpoint.files import write_file, write_text
from distributed_muon.checkpoint.held import Held, hold
from distributed_muon.checkpoint.index import INDEX, MODEL, Index, as_json, versions
from distributed_muon.checkpoint.model import other_entries, whole
from distributed_muon.checkpoint.together import on_all
from distributed_muon.checkpoint.view import CheckpointView, view_of
from distributed_muon.engine.collectives import Collectives


def save(
    path: str | Path,
    model: nn.Module | None,
    optimizer: Any,
    extra: Mapping[str, Any] | None = None,
    *,
    wait: bool = True,
) -> Saving:
    """Write model, optimizer and `extra`; collective over all ranks that hold some of the model.

    The checkpoint appears under `path` only when it is complete; an older one there is replaced then.

    Args:
        path: a directory all ranks see.
        model: its trained parameters are saved as the optimizer's masters, what else its state dict holds as rank 0
            has it; None for the trained parameters alone.
        optimizer: of this package, for plain PyTorch, FSDP2, DeepSpeed or Megatron.
        extra: what else to restore, such as a scheduler's state and the step number; rank 0's is written. Plain JSON.
        wait: False returns once the masters are copied to the host. A thread copies the moments, for which the next
            step and `load_state_dict` wait, and writes. At most one such save is under way: the next one waits for it.
            Call `wait()` of what is returned before the process groups end.

    Returns:
        The save, finished unless `wait` is False.

    Raises:
        ValueError: something that cannot be saved; the message names it.
        OSError: a rank could not write; the older checkpoint is as it was. In the background: raised by `wait()` of
            what is returned, or by the next save.
    """
    wait_for_last()
    view, path = view_of(optimizer), Path(path)
    lead = view.collectives.rank == 0
    header, entries = on_all(view.collectives, lambda: (_header(view, extra), other_entries(model, view)))
    others = whole(entries)
    on_all(view.collectives, lambda: make_room(path) if lead else None, _not_saved(path))
    header = replace(header, save_id=view.collectives.gather_objects(header.save_id)[0])
    others = others if lead else {}
    if not wait:
        stage = stage_of(optimizer)
        held = hold(view, stage.now, stage.later if view.steady else stage.now)
        return in_background(optimizer, view, WriteJob(path, header, held, others, stage.fill).write)
    held = hold(view, Tensor.cpu, Tensor.cpu)
    WriteJob(path, header, held, others).write(view.collectives)
    return Saving()


def _header(view: CheckpointView, extra: Mapping[str, Any] | None) -> Index:
    """What the index says before the shards are known; raises a ValueError for what cannot be saved."""
    if view.problem is not None:
        raise ValueError(view.problem)
    return Index(
        save_id=uuid.uuid4().hex,
        framework=view.framework,
        steps=view.steps,
        groups=[as_json(view.options(i), f"parameter group {i}") for i in range(len(view.param_groups))],
        extra=as_json(dict(extra or {}), "extra") if view.collectives.rank == 0 else {},
        ranks=view.collectives.size,
        versions=versions(),
    )


@dataclass(frozen=True)
class WriteJob:
    """What is left to do once all state is held: to write it.

    Args:
        path: of the checkpoint. header: its index so far. held: of this rank. others: the model's other tensors, on
            rank 0. fill: gives `held` the values that it lacks.
    """

    path: Path
    header: Index
    held: Held
    others: dict[str, Tensor]
    fill: Callable[[], None] = lambda: None

    def write(self, collectives: Collectives) -> None:
        """Write this rank's files, then rank 0 the index; collective over `collectives`."""
        words = _not_saved(self.path)
        try:
            files = on_all(collectives, lambda: self._write_files(collectives.rank), words)
            everyone = collectives.gather_objects((files, self.held.parameters))
            on_all(collectives, lambda: None if collectives.rank else self._finish(everyone), words)
        except Exception:
            if collectives.rank == 0:  # a full disk gets its room back
                shutil.rmtree(_unfinished(self.path), ignore_errors=True)
            raise

    def _write_files(self, rank: int) -> dict[str, dict[str, Any]]:
        self.fill()
        files, folder = {}, _unfinished(self.path)
        if self.held.tensors:
            name = f"rank-{rank:05d}.safetensors"
            files[name] = write_file(folder / name, self.held.tensors, self.header.save_id)
            files[name]["parts"] = self.held.parts
        if self.others:
            files[MODEL] = write_file(folder / MODEL, self.others, self.header.save_id)
        return files

    def _finish(self, everyone: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        """Put the index together and rename; rank 0."""
        parameters: dict[str, dict[str, Any]] = {}
        for _, own in everyone:
            for name, about in own.items():
                if parameters.setdefault(name, about) != about:
                    raise ValueError(f"parameter {name!r} is {about} on one rank and {parameters[name]} on another")
        files = {name: entry for own, _ in everyone for name, entry in own.items()}
        index = replace(self.header, parameters=parameters, files=files, model=list(self.others))
        if (problem := index.incomplete()) is not None:
            raise ValueError(problem)
        write_text(_unfinished(self.path) / INDEX, index.text())
        old = _replaced(self.path)
        if self.path.exists():
            self.path.rename(old)
        _unfinished(self.path).rename(self.path)
        shutil.rmtree(old, ignore_errors=True)


def restore_replaced(path: Path) -> None:
    """Take the older checkpoint back where a crash came between its removal and the arrival of the new one."""
    if not path.exists() and _replaced(path).exists():
        _replaced(path).rename(path)
    shutil.rmtree(_replaced(path), ignore_errors=True)


def make_room(path: Path) -> None:
    """Make an empty folder for a `WriteJob` to write into."""
    restore_replaced(path)
    shutil.rmtree(_unfinished(path), ignore_errors=True)
    _unfinished(path).mkdir(parents=True)


def _unfinished(path: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return path.with_name(path.name + ".unfinished")


def _replaced(path: Path) -> Path:
    """Where the older checkpoint is while the new one takes its place."""
    return path.with_name(path.name + ".old")


def _not_saved(path: Path) -> str:
    return f"checkpoint {path} was not saved, an older one there is as it was: "
