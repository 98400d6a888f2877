"""A save in the background: state copied to the host at once, written by a thread, one at a time."""

from __future__ import annotations

import atexit
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_muon.engine.collectives import Collectives


class Saving:
    """A save, finished or under way."""

    def __init__(self, write: Callable[[], None] | None = None) -> None:
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if write is not None:
            # Python waits for it before it ends.
            self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=False)
            self._thread.start()

    @property
    def done(self) -> bool:
        """Whether `wait()` would return, or raise, at once."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the checkpoint is complete; raises what went wrong, once."""
        if self._thread is not None:
            self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error

    def complain(self) -> None:
        """Say what went wrong if nobody has asked."""
        if self._error is not None:
            print(f"error: {self._error}", file=sys.stderr, flush=True)


_last = Saving()
# Per optimizer: host memory that copies are made in, and a process group whose messages meet nobody else's.
_stages: weakref.WeakKeyDictionary[Any, list[Tensor]] = weakref.WeakKeyDictionary()
_groups: weakref.WeakKeyDictionary[Any, Collectives] = weakref.WeakKeyDictionary()
atexit.register(lambda: _last.complain())


def wait_for_last() -> None:
    """Wait for the save that is under way in this process; raises what went wrong with it."""
    _last.wait()


def in_background(optimizer: Any, collectives: Collectives, write: Callable[[Collectives], None]) -> Saving:
    """Start `write` in a thread, with collectives of its own; collective over `collectives`."""
    global _last
    if optimizer not in _groups:
        # Not on the accelerator, where messages of a thread would wait for, and delay, those of the step.
        _groups[optimizer] = own = collectives.apart(backend="gloo")
        weakref.finalize(optimizer, own.close).atexit = False
    own = _groups[optimizer]
    _last = Saving(lambda: write(own))
    return _last


def copies_of(optimizer: Any) -> Callable[[Tensor], Tensor]:
    """A function that copies tensors into host memory, the same from save to save, for tensors in the same order."""
    stage, used = _stages.setdefault(optimizer, []), iter(range(sys.maxsize))

    def copy(tensor: Tensor) -> Tensor:
        number = next(used)
        if number == len(stage) or stage[number].shape != tensor.shape or stage[number].dtype != tensor.dtype:
            fresh = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            stage[number : number + 1] = [fresh]
        if tensor.is_cuda:
            return stage[number].copy_(tensor)
        np.copyto(stage[number].numpy(), tensor.numpy())  # past the caches: on one core twice as fast as copy_
        return stage[number]

    return copy
