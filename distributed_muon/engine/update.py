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


def advance_momentum(momenta: Sequence[Tensor], grads: Sequence[Tensor], mu: float) -> None:
    """m = lerp(m, g, 1 - mu) in place: the exponential moving average of torch.optim.Muon.

    Args:
        momenta, grads: fp32, equal shapes; elementwise, so shards do not matter.
    """
    torch._foreach_lerp_(momenta, grads, 1 - mu)


def pack_momentum(
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    targets: Sequence[Tensor],
    mu: float,
    nesterov: bool,
    staged: Sequence[Tensor] = (),
) -> None:
    """Round what is orthogonalized into `targets`: lerp(g, m, mu) with Nesterov momentum, m itself without.

    Args:
        grads, momenta: fp32, not written. targets: of the wire's dtype, equal shapes.
        staged: fp32 temporaries of these shapes, if there are some.
    """
    if nesterov and staged:
        torch._foreach_copy_(staged, grads)
        torch._foreach_lerp_(staged, momenta, mu)
        torch._foreach_copy_(targets, staged)
    else:
        torch._foreach_copy_(targets, torch._foreach_lerp(grads, momenta, mu) if nesterov else momenta)


def decay(masters: Sequence[Tensor], lr: float, weight_decay: float) -> None:
    """p = p * (1 - lr * weight_decay) in place, with the unscaled lr."""
    torch._foreach_mul_(masters, 1 - lr * weight_decay)


def apply_update(
    masters: Sequence[Tensor], updates: Sequence[Tensor], lr: float, ratio: float, staged: Sequence[Tensor] = ()
) -> None:
    """p = p - lr * ratio * update in place.

    Args:
        masters: fp32. updates: fp32 or bf16, same shapes, and on another device where masters are offloaded.
        ratio: `lr_ratio` of their matrices.
        staged: fp32 temporaries of these shapes, if there are some: where dtypes differ, a list is added one kernel
            per tensor.
    """
    if masters and masters[0].device != updates[0].device:
        updates = [update.to(masters[0].device) for update in updates]
    if staged and updates[0].dtype != torch.float32:
        torch._foreach_copy_(staged, updates)
        updates = staged
    torch._foreach_add_(masters, updates, alpha=-lr * ratio)


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
        masters, grads, exp_avgs, exp_avg_sqs: fp32 lists of equal shapes. steps: fp32 scalars on their device.
    """
    adamw(
        list(masters),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        list(steps),
        # One kernel on an accelerator, without a copy of exp_avg_sq. On the CPU its bits are not torch's default's.
        fused=bool(masters) and masters[0].device.type != "cpu",
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
