"""Counts the bytes that any library sends through torch.distributed, to compare with optimizers that do not count."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WireCounter(TorchFunctionMode):
    """Counts the bytes that collectives and messages send from this rank while `on`.

    Attributes:
        sent: bytes by name of the torch.distributed function, as the ring algorithm of each sends them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.on = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name, module = getattr(func, "__name__", ""), getattr(func, "__module__", "") or ""
        functional = "_c10d_functional" in str(func)
        if self.on and (module.startswith("torch.distributed") or functional):
            if functional:
                name = str(func).partition("_c10d_functional.")[2].partition(".")[0]
            sent = _functional_bytes(name, args) if functional else _sent_bytes(name, args, kwargs)
            if sent:
                self.sent[name] += sent
        return func(*args, **kwargs)


def _sent_bytes(name: str, args: tuple, kwargs: dict) -> int:
    """Bytes that leave this rank, by the ring algorithm of each collective."""
    groups = [value for value in (*args, *kwargs.values()) if isinstance(value, dist.ProcessGroup)]
    group = groups[0] if groups else None
    size = dist.get_world_size(group)
    share = (size - 1) / size
    if name == "isend":
        return _bytes(args[0])
    if name == "all_reduce":
        return round(2 * share * _bytes(args[0]))
    if name.startswith("reduce_scatter"):
        return round(share * _bytes(args[1]))
    if name in ("all_gather_into_tensor", "all_gather_single"):
        return round(share * _bytes(args[0]))
    if name == "all_gather":
        return round(share * sum(map(_bytes, args[0])))
    if name == "gather":
        receives = (args[1] if len(args) > 1 else kwargs.get("gather_list")) is not None
        return 0 if receives else _bytes(args[0])
    if name == "scatter":
        sends = (args[1] if len(args) > 1 else kwargs.get("scatter_list")) is not None
        return (size - 1) * _bytes(args[0]) if sends else 0
    return _bytes(args[0]) if name in ("broadcast", "all_to_all_single") else 0


def _functional_bytes(name: str, args: tuple) -> int:
    """As `_sent_bytes`, for the operators that DTensor calls."""
    if name == "all_gather_into_tensor":
        return (args[1] - 1) * _bytes(args[0])
    if name == "reduce_scatter_tensor":
        return round((args[2] - 1) / args[2] * _bytes(args[0]))
    return 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
