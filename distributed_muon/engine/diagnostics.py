"""Values that a step measured per matrix, collected from the homes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distributed_muon.engine.collectives import Collectives
from distributed_muon.layout.plan import Plan


def merge_measured(
    collectives: Collectives, plan: Plan, measured: Mapping[str, Mapping[int, Tensor]], device: torch.device
) -> dict[str, dict[str, float]]:
    """Bring values measured at the homes to every rank; collective over the plan's domain, not counted.

    Args:
        measured: per quantity, {matrix or block number: 0-d square} of this rank's homes.

    Returns:
        Per quantity, {matrix name: root of the sum of its squares} for every matrix that was orthogonalized.
    """
    out = {}
    for quantity, squares in sorted(measured.items()):
        # Where all holders are homes they measured the same: one of them reports.
        mine = [matrix for matrix in squares if plan.homes[matrix][0] == collectives.rank]
        total = torch.zeros(2, len(plan.homes), device=device)
        if mine:
            total[0, mine] = torch.stack([squares[matrix] for matrix in mine]).to(total.dtype)
            total[1, mine] = 1
        sums, counts = collectives.all_reduce(total, counted=False).tolist()
        by_name: dict[str, float] = {}
        for matrix, value, count in zip(plan.layout.matrices, sums, counts, strict=True):
            if count:
                by_name[matrix.name] = by_name.get(matrix.name, 0.0) + value
        out[quantity] = {name: value**0.5 for name, value in by_name.items()}
    return out
