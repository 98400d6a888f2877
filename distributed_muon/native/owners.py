"""Which optimizer a parameter belongs to: a second one on the same parameters takes them over from the first."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

_OWNERS = WeakTensorKeyDictionary()


def take_over(params: Iterable[nn.Parameter], optimizer: Any) -> None:
    """Make `optimizer` the owner of `params`; whoever owned one of them before is closed."""
    for param in params:
        before = _OWNERS[param]() if param in _OWNERS else None
        if before is not None and before is not optimizer:
            before.close()
        _OWNERS[param] = weakref.ref(optimizer)


def refuse_shared_memory(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise a ValueError where two parameters lie in the same memory: their tie would be cut silently."""
    spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name) for name, p in named)
    for (_, end, first), (begin, _, second) in pairwise(spans):
        if begin < end:
            raise ValueError(
                f"parameters {first!r} and {second!r} share memory: tie them by assigning the same nn.Parameter to "
                "both modules"
            )
