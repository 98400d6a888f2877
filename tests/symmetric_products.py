"""What the Triton kernels of symmetric products compute, in plain torch on any device."""

from __future__ import annotations

from torch import Tensor


def xxt_reference(x: Tensor) -> Tensor:
    """What `kernels.symmetric.xxt` computes."""
    return (x.float() @ x.float().mT).to(x.dtype)


def symmetric_addmm_reference(start: Tensor, x: Tensor, y: Tensor, *, beta: float, alpha: float = 1.0) -> Tensor:
    """What `symmetric_addmm` computes."""
    return (beta * start.float() + alpha * (x.float() @ y.float())).to(x.dtype)
