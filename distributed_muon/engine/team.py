"""Newton-Schulz of one matrix by a team of ranks, each holding a block of its long side.

With X = [X_1 ... X_k] cut along the long side, X X^T is the sum of the blocks' Gram matrices (an all-reduce),
the rows of b A + c A A are shared out (an all-gather), and each rank advances its own block. All elements are
computed on one rank and copied, so the result is identical wherever it goes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.newton_schulz import power_of_two_scale_


def orthogonalize_block(
    block: Tensor,
    tall: bool,
    team: Collectives,
    *,
    coefficients: Sequence[tuple[float, float, float]],
    dtype: torch.dtype,
    eps: float,
) -> Tensor:
    """This rank's block of the orthogonalized matrix; collective over the team.

    Args:
        block: (rows, cols) of `dtype`: consecutive columns of a wide or square matrix, rows of a tall one.
            Not written.
        tall: whether the whole matrix has more rows than columns. team: ranks in the order of their blocks.
        coefficients: (a, b, c) per iteration. eps: guards the zero matrix.

    Returns:
        A new tensor of the block's shape and `dtype`, equal to the standard form on the whole matrix but for
        the order of summation.
    """
    x = (block.mT if tall else block).float()
    biggest = x.abs().amax() if x.numel() else x.new_zeros(())
    biggest = team.all_reduce(biggest.reshape(1), maximum=True)
    x = x * power_of_two_scale_(biggest)
    norm = team.all_reduce(x.square().sum().reshape(1)).sqrt().clamp(min=eps)
    x = (x / norm).to(dtype)
    short = x.shape[0]
    share = -(-short // team.size)
    begin = min(team.rank * share, short)
    polynomial = torch.zeros(team.size * share, short, dtype=dtype, device=x.device)
    for a, b, c in coefficients:
        gram = team.all_reduce((x @ x.mT).float().contiguous()).to(dtype)
        own = gram[begin : begin + share]
        polynomial[begin : begin + len(own)] = torch.addmm(own, own, gram, beta=b, alpha=c)
        team.all_gather(polynomial.view(-1)).wait()
        x = torch.addmm(x, polynomial[:short], x, beta=a)
    return (x.mT if tall else x).contiguous()
