"""The arithmetic of a step on shards: momentum, scale rules, decoupled decay, AdamW. Imports only torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

ADJUST_LR_FNS = ("original", "match_rms_adamw", "spectral", "unit_rms_norm")


def lr_ratio(rows: int, cols: int, adjust_lr_fn: str) -> float:
    """Factor on the learning rate of one matrix, from its logical (global, unpadded) shape.

    "original" is Keller Jordan's sqrt(max(1, rows / cols)); "match_rms_adamw" is the Moonlight report's
    0.2 * sqrt(max(rows, cols)) (arXiv 2502.16982, section 2.2). Both are bit-equal to torch.optim.Muon's. As
    Emerging-Optimizers names them, "spectral" is sqrt(max(rows, cols)) and "unit_rms_norm" sqrt(rows / cols)
    (arXiv 2502.07529).
    """
    if adjust_lr_fn == "original":
        return math.sqrt(max(1, rows / cols))
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    if adjust_lr_fn == "spectral":
        return math.sqrt(max(rows, cols))
    if adjust_lr_fn == "unit_rms_norm":
        return math.sqrt(rows / cols)
    raise ValueError(f"adjust_lr_fn {adjust_lr_fn!r} is unknown: choose one of {', '.join(ADJUST_LR_FNS)}")


def momentum_update(grads: Sequence[Tensor], momenta: Sequence[Tensor], mu: float, nesterov: bool) -> list[Tensor]:
    """Advance the momentum and return what is orthogonalized; elementwise, so shards do not matter.

    EMA form, as torch.optim.Muon: m = lerp(m, g, 1 - mu); the result is lerp(g, m, mu) with Nesterov
    momentum and m itself without.

    Args:
        grads: fp32 mean gradients, any shapes; not written. momenta: fp32, same shapes; updated in place.

    Returns:
        One tensor per gradient; without Nesterov momentum they are `momenta`, not to be written.
    """
    torch._foreach_lerp_(momenta, grads, 1 - mu)
    return list(torch._foreach_lerp(grads, momenta, mu)) if nesterov else list(momenta)


def apply_update(masters: Sequence[Tensor], updates: Sequence[Tensor], decay: float, step: float) -> None:
    """masters = masters * decay - step * updates, in place.

    Args:
        masters: fp32. updates: fp32 or bf16, same shapes. decay: 1 - lr * weight_decay, with the
        unscaled lr. step: lr * lr_ratio(...).
    """
    torch._foreach_mul_(masters, decay)
    torch._foreach_add_(masters, updates, alpha=-step)


def adamw_update(
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """torch.optim.AdamW's step on flat shards, in place; elementwise, so shards do not matter.

    Args:
        masters, grads, exp_avgs, exp_avg_sqs: fp32 lists of equal shapes. steps: fp32 scalars on the CPU.
    """
    adamw(
        list(masters),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        list(steps),
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
