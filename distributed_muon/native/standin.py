"""What p.grad holds once a gradient has moved into its bucket: a tensor without memory that says so when touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# torch's own zero_grad(set_to_none=False) detaches and then zeroes.
_HARMLESS = (aten.detach.default, aten.detach_.default, aten.alias.default)


class MovedGradient(Tensor):
    """Stands in p.grad for a gradient that lies in a flat bucket, in fp32, and is averaged over ranks there.

    It has the parameter's shape, dtype and device, may be set to None (no gradient) or zeroed, and raises when its
    values are read or written: they would be one rank's alone, and a change would be lost.
    """

    def __new__(cls, param: nn.Parameter, name: str, zero: Callable[[], None]) -> MovedGradient:
        moved = torch.Tensor._make_wrapper_subclass(cls, param.shape, dtype=param.dtype, device=param.device)
        moved.parameter_name, moved.zero_values = name, zero
        return moved

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HARMLESS:
            return args[0]
        moved = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, MovedGradient)]
        if func in (aten.zero_.default, aten._foreach_zero_.default):
            for gradient in moved:
                gradient.zero_values()
            return args[0]
        raise RuntimeError(
            f"p.grad of parameter {moved[0].parameter_name!r} was moved into the buckets of DistributedMuon, so "
            f"{func} can neither read nor change it: clip with optimizer.clip_grad_norm_(max_norm), scale with "
            "distributed_muon.GradScaler, change it in a hook (p.register_hook), read it with optimizer.gradient(name)"
            '; where DistributedDataParallel averages it, build the optimizer with gradient_reduction="none"'
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"MovedGradient({self.parameter_name!r}, shape={tuple(self.shape)}, dtype={self.dtype})"
