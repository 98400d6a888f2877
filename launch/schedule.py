"""Learning-rate schedule shared by the trainers."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(step: int, steps: int, warmup: int, final: float) -> float:
    """Factor on the peak learning rate: linear warmup, then a cosine down to `final`.

    Args:
        step: 0 is the first step; `steps` of them; the last comes out just above `final`.
        warmup: steps of the linear part.
        final: the factor at the end, 0.1 for Moonlight's 4.2e-4 -> 4.2e-5.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def cosine_schedule(optimizer: Optimizer, lr: float, steps: int, warmup: int, final: float, done: int = 0) -> LambdaLR:
    """torch's LambdaLR over `warmup_cosine`; resumes by itself, for the factor is a function of the step.

    Args:
        optimizer: each of its groups gets `lr` as peak.
        steps, warmup, final: as in `warmup_cosine`.
        done: steps already taken, of a resumed run.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = lr
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, warmup, final), last_epoch=done - 1)
