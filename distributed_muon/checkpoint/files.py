"""One file of a checkpoint: safetensors with the id of its save, and a checksum that the index keeps."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SAVE_ID = "save_id"
_CHUNK = 1 << 20  # bytes read at a time; they stay in the cache between the disk and the checksum


def write_file(path: Path, tensors: Mapping[str, Tensor], save_id: str) -> dict[str, Any]:
    """Write contiguous CPU tensors, down to the disk.

    Returns:
        What the index says of the file: its "bytes" and "crc32".
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", SAVE_ID: save_id})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from None
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library makes files for their owner only, whatever the umask
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}


def write_text(path: Path, text: str) -> None:
    """Write a text file, down to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def checksum(path: Path) -> str:
    """zlib's CRC-32 of a file's bytes, in hexadecimal."""
    value, buffer = 0, bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            value = zlib.crc32(memoryview(buffer)[:count], value)
    return f"{value:08x}"


def fault(path: Path, entry: Mapping[str, Any], save_id: str) -> str | None:
    """What is wrong with a file, in words; None where it is the one that the index describes."""
    if not path.is_file():
        return "is missing"
    try:
        size = path.stat().st_size
        if size == entry["bytes"] and checksum(path) == entry["crc32"]:
            return None
        with safe_open(path, "pt") as file:
            own = (file.metadata() or {}).get(SAVE_ID)
    except (OSError, SafetensorError):
        own = save_id
    if own != save_id:
        return "belongs to another save"
    if size != entry["bytes"]:
        return f"has {size} of {entry['bytes']} bytes"
    return "has another checksum than when it was saved"


class Files:
    """The tensors of a checkpoint's files, mapped into memory when they are asked for.

    Args:
        folder: of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._open = folder, {}

    def tensor(self, file: str, key: str) -> Tensor:
        """One tensor, not to be written to."""
        if file not in self._open:
            self._open[file] = safe_open(self._folder / file, "pt")
        return self._open[file].get_tensor(key)
