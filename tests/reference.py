"""A one-process twin of DistributedMuon from torch's own optimizers, and small models to compare on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Straddling cuts inside rows, rows that do not divide, tall, wide, tiny: at W = 2, 3, 4 every cut hits some.
MUON_SHAPES = ((7, 5), (33, 17), (64, 48), (3, 40), (40, 3), (1, 9), (18, 18), (72, 8))
ADAMW_SHAPES = ((3,), (17, 5), (1,), (64,))


def make_params(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    """Equal parameters on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def rank_gradient(shape: tuple[int, ...], step: int, rank: int, index: int) -> Tensor:
    """Small integers, so that sums over ranks and microbatches are exact in any order."""
    generator = torch.Generator().manual_seed(1000003 * step + 1009 * rank + index)
    return torch.randint(-8, 9, shape, generator=generator).float()


def mean_gradient(shape: tuple[int, ...], step: int, world: int, index: int) -> Tensor:
    """The mean of every rank's gradient, divided once."""
    return torch.stack([rank_gradient(shape, step, rank, index) for rank in range(world)]).sum(0) / world


def backward(params: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
    """Accumulate exactly `grads` through autograd."""
    terms = [(p * g.to(p.dtype)).sum() for p, g in zip(params, grads, strict=True) if g is not None]
    torch.stack([term.float() for term in terms]).sum().backward()


class Reference:
    """torch.optim.Muon and torch.optim.AdamW over fp32 copies of the parameters.

    Args:
        params: (parameter, algorithm) pairs; copied. muon, adamw: options of the two optimizers.
    """

    def __init__(self, params: Sequence[tuple[nn.Parameter, str]], muon: dict, adamw: dict | None = None) -> None:
        self.params = [nn.Parameter(p.detach().float().clone()) for p, _ in params]
        by_algorithm = {
            name: [copy for copy, (_, algorithm) in zip(self.params, params, strict=True) if algorithm == name]
            for name in ("muon", "adamw")
        }
        self.optimizers: list[torch.optim.Optimizer] = []
        if by_algorithm["muon"]:
            self.optimizers.append(torch.optim.Muon(by_algorithm["muon"], adjust_lr_fn="match_rms_adamw", **muon))
        if by_algorithm["adamw"]:
            self.optimizers.append(torch.optim.AdamW(by_algorithm["adamw"], **(adamw or {})))

    def groups(self) -> list[dict]:
        """The parameter groups of both optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, grads: Sequence[Tensor | None]) -> None:
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = None if grad is None else grad.float().clone()
        for optimizer in self.optimizers:
            optimizer.step()
