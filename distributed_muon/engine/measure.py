"""Values measured per matrix at its home, brought to every rank when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.options import check_choice
from distributed_muon.layout.plan import Plan

KINDS = ("update_rms", "orthogonality")


class Measures:
    """Squares of what is measured of each stack; a team's blocks add up to their matrix.

    Attributes:
        track: what to measure, of KINDS: "update_rms" (of the update at lr 1) and "orthogonality"
            (||U U^T - I||_F / sqrt(rows), the short side being the rows).
    """

    def __init__(self) -> None:
        self.track = {"update_rms"}
        self.clear()

    def choose(self, *names: str) -> None:
        """Set `track`; raises a ValueError for a name that is not in KINDS."""
        for name in names:
            check_choice("track", name, KINDS)
        self.track = set(names)

    def clear(self) -> None:
        """Forget the last step."""
        self._found: dict[str, list[tuple[Sequence[int], Tensor]]] = {name: [] for name in self.track}

    def take(self, matrices: Sequence[int], output: Tensor, shape: tuple[int, int], ratio: float) -> None:
        """Note what is tracked of (matrices, rows, cols) outputs whose whole matrices have `shape`."""
        if "update_rms" in self.track:
            scale = ratio**2 / (shape[0] * shape[1])
            squares = torch.linalg.vector_norm(output, dim=(1, 2), dtype=torch.float32).square() * scale
            self._found["update_rms"].append((matrices, squares))
        if "orthogonality" in self.track and shape == output.shape[1:]:
            wide = output.float() if shape[0] <= shape[1] else output.float().mT
            gram = wide @ wide.mT
            gram.diagonal(dim1=1, dim2=2).sub_(1)
            self._found["orthogonality"].append((matrices, torch.linalg.matrix_norm(gram).square() / gram.shape[-1]))

    def by_name(self, collectives: Collectives, plan: Plan, device: torch.device) -> dict[str, dict[str, float]]:
        """Per quantity, {matrix name: value} of every matrix orthogonalized; collective over the plan's domain."""
        out = {}
        for quantity, found in sorted(self._found.items()):
            total = torch.zeros(2, len(plan.homes), device=device)
            for matrices, squares in found:
                # Where all holders are homes they measured the same: one of them reports.
                mine = torch.tensor([plan.homes[m][0] == collectives.rank for m in matrices], device=device)
                index = torch.tensor(matrices, device=device)[mine]
                total[0, index], total[1, index] = squares[mine].to(total.dtype), 1.0
            sums, counts = collectives.all_reduce(total, counted=False).tolist()
            by_name: dict[str, float] = {}
            for matrix, value, count in zip(plan.layout.matrices, sums, counts, strict=True):
                if count:
                    by_name[matrix.name] = by_name.get(matrix.name, 0.0) + value
            out[quantity] = {name: value**0.5 for name, value in by_name.items()}
        return out
