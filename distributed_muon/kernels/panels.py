"""Symmetric products by row panels, in plain torch: down to 5/8 of the FLOPs, the rest is mirrored.

Panel i of the result is multiplied out from the diagonal rightwards only; what lies below the diagonal is copied
from its transpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

# k panels leave (k + 1) / 2k of the FLOPs: 3/4, 2/3, 5/8 for 2, 3, 4. Thinner or more panels measured slower.
MAX_PANELS = 4
MIN_WIDTH = 128


def xxt(x: Tensor, *, out: Tensor) -> Tensor:
    """X X^T.

    Args:
        x: (m, k) or (stack, m, k). out: (m, m) or (stack, m, m) of x's dtype, not overlapping x.
    """
    return _by_panels(None, x, x.mT, 0.0, 1.0, out)


def symmetric_addmm(start: Tensor, x: Tensor, y: Tensor, *, beta: float, alpha: float = 1.0, out: Tensor) -> Tensor:
    """beta S + alpha X Y, read off its upper triangle.

    Args:
        start, x, y: S, X and Y, (m, m) or (stack, m, m), symmetric; X and Y commute.
        out: of that shape and dtype, not overlapping them.
    """
    return _by_panels(start, x, y, beta, alpha, out)


def _by_panels(start: Tensor | None, x: Tensor, y: Tensor, beta: float, alpha: float, out: Tensor) -> Tensor:
    mm, addmm = (torch.mm, torch.addmm) if x.ndim == 2 else (torch.bmm, torch.baddbmm)
    size = x.shape[-2]
    panels = max(1, min(MAX_PANELS, size // MIN_WIDTH))
    width = -(-size // panels)
    for top in range(0, size, width):
        panel = slice(top, top + width)
        target = out[..., panel, top:]
        if start is None:
            mm(x[..., panel, :], y[..., top:], out=target)
        else:
            addmm(start[..., panel, top:], x[..., panel, :], y[..., top:], beta=beta, alpha=alpha, out=target)
        out[..., top + width :, panel].copy_(target[..., width:].mT)
    return out
