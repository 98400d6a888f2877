"""One job at a time in a run directory."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

NAME = "lock"


class RunLock:
    """A run directory for this process alone, from construction to `release()`.

    A POSIX record lock: it ends with its process, however that ends (kill -9 included), so none is ever stale, and
    children do not inherit it. NFS carries it between hosts; a server gives up the lock of a host that is gone when
    its lease is over (NFSv4: after 90 s as a rule). On a file system without locks a line says that nothing is locked.

    Args:
        folder: made where it is missing.

    Raises:
        ValueError: another process holds it, which the message names, or the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / NAME).open("a+", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--run-dir {folder} cannot be written to ({error.strerror}): name another") from None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = self._holder()
            self._file.close()
            raise ValueError(
                f"--run-dir {folder} is in use by another job ({holder}): wait for its end, or name another"
            ) from None
        except OSError as error:
            print(f"note: {folder} cannot be locked ({error.strerror}): see yourself that no other job uses it")
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}) + "\n")
        self._file.flush()

    def release(self) -> None:
        """Let other jobs in. The file stays: one that was deleted could be locked twice."""
        self._file.close()

    def _holder(self) -> str:
        self._file.seek(0)
        with suppress(ValueError, KeyError):
            about = json.loads(self._file.read())
            return f"process {about['pid']} on {about['host']}, since {about['since']}"
        return "which has not said its name yet"
