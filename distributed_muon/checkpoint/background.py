"""A save in the background: state copied to the host, written by a thread, one at a time."""

from __future__ import annotations

import atexit
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_muon.checkpoint.view import CheckpointView
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


class Stage:
    """Host memory for the state of saves in the background, the same from save to save.

    What only a step changes is copied by the thread, under the next forward and backward: a step waits for `filled`
    before it changes any.

    Attributes:
        filled: set once all is copied, or never will be; of the save that began last.
    """

    def __init__(self) -> None:
        self._memory: list[Tensor] = []
        self.begin()

    def begin(self) -> None:
        """Start a save, which takes tensors in the order of the one before."""
        self._used, self._pairs = 0, []
        self.filled = threading.Event()
        self._stream: torch.Stream | None = None

    def now(self, tensor: Tensor) -> Tensor:
        """A copy of (n,) `tensor` on the host."""
        copy = self._next(tensor)
        _copy(copy, tensor)
        return copy

    def later(self, tensor: Tensor) -> Tensor:
        """What `fill` makes a copy of (n,) `tensor`."""
        self._pairs.append((copy := self._next(tensor), tensor))
        if tensor.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        return copy

    def fill(self) -> None:
        """Make the copies that were put off; beside the kernels that training starts meanwhile."""
        with self._stream or nullcontext():
            for pair in self._pairs:
                _copy(*pair)
        self.release()

    def release(self) -> None:
        """Keep no step waiting any more."""
        self._pairs = []
        self.filled.set()

    def _next(self, tensor: Tensor) -> Tensor:
        number = self._used
        self._used += 1
        old = self._memory[number] if number < len(self._memory) else None
        if old is None or (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
            fresh = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._memory[number : number + 1] = [fresh]
        return self._memory[number]


def _copy(host: Tensor, tensor: Tensor) -> None:
    if tensor.is_cuda:
        host.copy_(tensor)
    else:
        np.copyto(host.numpy(), tensor.numpy())  # past the caches: on one core twice as fast as copy_


_last = Saving()
# Per optimizer: its stage, and a process group whose messages meet nobody else's.
_stages: weakref.WeakKeyDictionary[Any, Stage] = weakref.WeakKeyDictionary()
_groups: weakref.WeakKeyDictionary[Any, Collectives] = weakref.WeakKeyDictionary()
atexit.register(lambda: _last.complain())


def wait_for_last() -> None:
    """Wait for the save that is under way in this process; raises what went wrong with it."""
    _last.wait()


def stage_of(optimizer: Any) -> Stage:
    """The optimizer's stage, for a new save."""
    stage = _stages.setdefault(optimizer, Stage())
    stage.begin()
    return stage


def in_background(optimizer: Any, view: CheckpointView, write: Callable[[Collectives], None]) -> Saving:
    """Start `write`, which fills the optimizer's stage, in a thread, with collectives of its own.

    Collective over `view.collectives`.
    """
    global _last
    if optimizer not in _groups:
        # Not on the accelerator, where messages of a thread would wait for, and delay, those of the step.
        _groups[optimizer] = own = view.collectives.apart(backend="gloo")
        weakref.finalize(optimizer, own.close).atexit = False
    own, stage = _groups[optimizer], _stages[optimizer]

    def run() -> None:
        try:
            write(own)
        finally:
            stage.release()

    _last = Saving(run)
    for engine in view.engines:
        engine.settle = stage.filled.wait  # only now: a save that failed before must not keep steps waiting
    return _last
