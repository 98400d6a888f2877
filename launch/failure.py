"""One line for a job that failed, whichever rank it was and however many; the traceback goes to a file."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist


class JobFailure:
    """Reports what ends this rank; of all ranks the first one speaks, for the others only lost their peer.

    Attributes:
        store: of the job, set once it is joined. folder: for tracebacks, set once it is known.
    """

    def __init__(self) -> None:
        self.store: dist.Store | None = None
        self.folder: Path | None = None

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Turn any exception into the line and exit code 1; an exit with a code passes."""
        try:
            yield
        except SystemExit as error:
            if not isinstance(error.code, str):
                raise
            self.report(error.code)
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            rank = os.environ.get("RANK", "0")
            line = f"error: rank {rank} on {socket.gethostname()}: {type(error).__name__}: {first[0]}"
            self.report(line, traceback.format_exc())
        else:
            return
        sys.exit(1)

    def report(self, line: str, trace: str | None = None) -> None:
        """Print `line`, unless another rank has printed one, and hand it to torchrun for the end of its own report.

        Args:
            line: all on one line, with the way out. trace: the traceback of an error that nobody foresaw.
        """
        if trace is not None and self.folder is not None:
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                file = self.folder / f"rank-{os.environ.get('RANK', '0')}.txt"
                file.write_text(trace, encoding="utf-8")
                line, trace = f"{line} (traceback: {file})", None
        tell_torchrun(line)
        if not self._first():
            return
        print(line if trace is None else f"{trace}{line}", file=sys.stderr, flush=True)

    def _first(self) -> bool:
        if self.store is None:
            return speaks_for_node()  # not joined yet: every rank of a node has the same words
        try:
            return self.store.add("failures", 1) == 1
        except RuntimeError:  # the store went with its host
            return True


def speaks_for_node() -> bool:
    """Whether this rank is its node's first; the others come back late, for torchrun ends all when one has ended."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        time.sleep(20)
    return first


def tell_torchrun(line: str) -> None:
    """Leave the line where torchrun looks for the cause of a failure; it then prints it last, under its traceback."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
