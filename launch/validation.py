"""Validation loss over all ranks."""

from __future__ import annotations

import torch
from torch import nn

from launch.data import TokenData
from launch.world import World


@torch.no_grad()
def validation_loss(
    model: nn.Module, data: TokenData, world: World, samples: int, size: int, share: tuple[int, int] | None = None
) -> float:
    """Mean loss on held-out windows, in nats per token; collective.

    Args:
        model: maps (tokens, targets) to the mean loss.
        data: holds the windows.
        world: the ranks that share them.
        samples: windows over all ranks.
        size: windows per forward pass.
        share: this rank's number among those with samples of their own, and how many they are; None: of all ranks.
    """
    rank, ranks = share or (world.rank, world.size)
    model.eval()
    total, count = 0.0, 0
    for tokens, targets in data.validation_batches(samples, rank, ranks, size):
        total += float(model(*world.to_device(tokens, targets))) * targets.numel()
        count += targets.numel()
    model.train()
    total, count = world.sum(total, count)
    return total / count
