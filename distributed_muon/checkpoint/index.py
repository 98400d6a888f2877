"""index.json: what a checkpoint holds, in which file, and under which conventions. Plain JSON; nothing in it runs."""

from __future__ import annotations

import json
import platform
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from distributed_muon.checkpoint.places import Patch

INDEX, MODEL = "index.json", "model.safetensors"
FORMAT, VERSION = "distributed_muon checkpoint", 1
CONVENTIONS = {
    "order": "elements of a parameter are counted row by row of its shape, which is that of the whole parameter",
    "momentum_buffer": "exponential moving average, m = momentum * m + (1 - momentum) * gradient",
    "exp_avg, exp_avg_sq": "as of torch.optim.AdamW, without bias correction, after 'step' steps",
    "master": "float32 values of the parameter; in its own dtype it holds them rounded",
    "parts": "per parameter [offset, stride, at, pitch, rows, cols]: element (i, j) is element offset + i*stride + j "
    "of the file's tensors NAME.STATE and element at + i*pitch + j of the parameter",
}


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was saved; the message names the file."""


@dataclass(frozen=True)
class Index:
    """What index.json says.

    Args:
        save_id: also written into every file. framework, steps: of the optimizer that saved.
        groups: options of its parameter groups. extra: the caller's own.
        ranks: that saved. versions: of what wrote it.
        parameters: per name "shape", "dtype", "algorithm", "group", "states", and for AdamW "step".
        files: per name "bytes", "crc32", and "parts": {parameter: its patches}.
        model: names of the model's other tensors, in MODEL.
    """

    save_id: str
    framework: str
    steps: int
    groups: list[dict[str, Any]]
    extra: dict[str, Any]
    ranks: int
    versions: dict[str, str]
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: list[str] = field(default_factory=list)

    def text(self) -> str:
        """As JSON, with a checksum of its own."""
        body = {"format": FORMAT, "version": VERSION, "conventions": CONVENTIONS, **vars(self)}
        return json.dumps({"crc32": _crc32(body), **body})

    @staticmethod
    def parse(text: str, where: Path) -> Index:
        """What `text` wrote.

        Raises:
            DamagedCheckpoint: it is not what was written. ValueError: a newer version of this package wrote it.
        """
        try:
            body = json.loads(text)
            own = body.pop("crc32")
            if body["format"] != FORMAT or own != _crc32(body):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedCheckpoint(f"checkpoint {where} is damaged: {INDEX} is not what was saved") from None
        if body["version"] != VERSION:
            raise ValueError(
                f"checkpoint {where} has format version {body['version']}, this package reads {VERSION}: update it"
            )
        return Index(**{key: body[key] for key in Index.__dataclass_fields__})

    @staticmethod
    def read(folder: Path) -> Index:
        """The index of a checkpoint; raises as `read_text` and `parse` do."""
        return Index.parse(Index.read_text(folder), folder)

    @staticmethod
    def read_text(folder: Path) -> str:
        """The text of a checkpoint's index, to be parsed.

        Raises:
            FileNotFoundError: there is no checkpoint. DamagedCheckpoint: it has no index, or one that is no text.
        """
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no complete checkpoint in {folder}: give the directory that checkpoint.save() was given"
            )
        try:
            return (folder / INDEX).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {INDEX} is missing") from None
        except UnicodeDecodeError:
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {INDEX} is not what was saved") from None

    def sources(self) -> dict[str, list[tuple[str, tuple[Patch, ...]]]]:
        """Per parameter, the files that hold some of it, and what."""
        out: dict[str, list[tuple[str, tuple[Patch, ...]]]] = defaultdict(list)
        for file, entry in self.files.items():
            for name, rows in entry.get("parts", {}).items():
                out[name].append((file, tuple(Patch(*row) for row in rows)))
        return out

    def incomplete(self) -> str | None:
        """The parameter of which elements are missing or held twice, in words; None where each is held once."""
        held = {name: sum(p.numel for _, patches in found for p in patches) for name, found in self.sources().items()}
        for name, about in self.parameters.items():
            numel = torch.Size(about["shape"]).numel()
            if held.get(name, 0) != numel:
                return (
                    f"parameter {name!r} would be saved with {held.get(name, 0)} of its {numel} elements: its name must"
                    " mean one parameter on all ranks, and all ranks that hold some of it must save"
                )
        return None


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Of what writes a checkpoint."""
    out = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("distributed_muon", "deepspeed", "megatron-core"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def as_json(value: Any, where: str) -> Any:
    """`value` as JSON will give it back: tuples as lists, one-element tensors as numbers.

    Raises:
        ValueError: something in it is no JSON; the message says where.
    """
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}: a checkpoint holds JSON, whose keys are strings")
        return {key: as_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [as_json(item, f"{where}[{number}]") for number, item in enumerate(value)]
    raise ValueError(
        f"{where} is a {type(value).__name__}: a checkpoint holds JSON (numbers, strings, lists, dictionaries); save "
        "tensors in a safetensors file of your own"
    )


def as_tuples(value: Any) -> Any:
    """Options as they were: lists of JSON are the tuples of the optimizer."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def _crc32(body: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"
