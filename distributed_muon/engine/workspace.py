"""Memory of a step, allocated for its length: three slots that waves in flight take in turn, and a scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distributed_muon.layout.memory import IN_FLIGHT, scratch_bytes


class Slot(NamedTuple):
    """Buffers of one wave, 1-D, in the dtype of Newton-Schulz.

    Args:
        matrices: whole matrices at their home, stack after stack: the gathered input, then the output.
        held: the wire at the holders' end: pieces sent to homes, later the results received.
        home: the wire at the homes' end: pieces received, later the results sent back.
        stage: fp32, the scratch, for what an operation leaves to the next one at once; empty on the CPU.
    """

    matrices: Tensor
    held: Tensor
    home: Tensor
    stage: Tensor


class Workspace:
    """Slots for every `IN_FLIGHT` waves, whose views stay valid while their memory comes and goes.

    Memory exists only inside `with workspace:`. Outside, the storages are empty, so that between steps nothing is
    held; views made once are good in every step.

    Args:
        sizes: per wave, the elements of each of a Slot's buffers, and those of Newton-Schulz. dtype, device: of all
            but the stage's dtype.

    Attributes:
        scratch: 1-D, in the dtype of Newton-Schulz, for its work buffers; the stage is the same memory. None on the
            CPU, where it is not held beside what else a step allocates, and where nothing is orthogonalized.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> None:
        self._slots = []
        *_, staged, worked = map(max, zip(*sizes, strict=True)) if sizes and device.type != "cpu" else (0, 0)
        shared = torch.empty(scratch_bytes(staged, worked, dtype.itemsize) // 4, dtype=torch.float32, device=device)
        self.scratch, stage = shared.view(dtype) if worked else None, shared if staged else shared[:0]
        for first in range(min(IN_FLIGHT, len(sizes))):
            own = [max(n) for n in zip(*sizes[first::IN_FLIGHT], strict=True)][:3]
            self._slots.append(Slot(*(torch.empty(n, dtype=dtype, device=device) for n in own), stage))
        self._bytes = [[buffer.untyped_storage().nbytes() for buffer in slot] for slot in self._slots]
        self.__exit__()

    def slot(self, wave: int) -> Slot:
        """The buffers that a wave uses."""
        return self._slots[wave % IN_FLIGHT]

    def __enter__(self) -> None:
        self._resize(self._bytes)

    def __exit__(self, *error: object) -> None:
        self._resize([[0] * len(slot) for slot in self._slots])

    def _resize(self, sizes: Sequence[Sequence[int]]) -> None:
        for slot, wanted in zip(self._slots, sizes, strict=True):
            for buffer, size in zip(slot, wanted, strict=True):
                buffer.untyped_storage().resize_(size)
