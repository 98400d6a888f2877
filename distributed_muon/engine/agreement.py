"""One decision on every rank: the same construction, and the same view of each step's gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from distributed_muon.engine.collectives import Collectives


def check_same_everywhere(collectives: Collectives, description: Iterable[str]) -> None:
    """Raise on every rank, naming the first difference, unless all ranks bring the same lines.

    Args:
        collectives: of the group that must agree; this is collective over it.
        description: one line per thing that must be equal, such as a parameter with shape and options; not read on
            one rank.

    Raises:
        RuntimeError: the first line that differs from rank 0's, and the rank that has it.
    """
    if collectives.size == 1:
        return
    description = list(description)
    digest = hashlib.sha256("\n".join(description).encode()).hexdigest()
    if len(set(collectives.gather_objects(digest))) == 1:
        return
    first, *others = collectives.gather_objects(description)
    for rank, lines in enumerate(others, start=1):
        for ours, theirs in zip_longest(first, lines, fillvalue="nothing"):
            if ours != theirs:
                raise RuntimeError(
                    f"ranks disagree: rank 0 has {ours}, rank {rank} has {theirs}; build the model and the "
                    "parameter groups in the same order and with the same options on every rank"
                )


class Agreement:
    """The same view of this step's gradients on every rank, from one all-reduce.

    Attributes:
        square: sum of squares of the mean gradient (unscaled once `rescale` was called); inf or nan where any
            element is.
        present: per tensor, whether any rank has a gradient.
        flags: per flag, whether any rank raised it.
        same_options: whether all ranks brought the same options, as far as 16 bits of a hash can tell in one step.
        signal: whether any rank's device raised it.
    """

    def __init__(
        self, square: float, present: list[bool], flags: list[bool], same_options: bool, signal: bool = False
    ) -> None:
        self.square, self.present, self.flags, self.same_options = square, present, flags, same_options
        self.signal = signal

    @staticmethod
    def reach(
        collectives: Collectives,
        grads: Sequence[Tensor],
        has_gradient: Sequence[bool],
        flags: Sequence[bool],
        options: Sequence[str],
        device: torch.device,
        signal: Tensor | None = None,
    ) -> Agreement:
        """Sum every rank's view; collective over the data-parallel group.

        Args:
            grads: fp32 mean gradients of this rank's shards, padding excluded.
            has_gradient: per tensor, on this rank. flags: anything that must lead to one decision.
            options: what must be equal on all ranks. signal: () bool that the host has not read; None is False.
        """
        code = int(hashlib.sha256("\n".join(options).encode()).hexdigest()[:4], 16)
        # fp64 sums where the device has it, so that squares of fp32's largest numbers do not overflow.
        wide = torch.float32 if device.type == "mps" else torch.float64
        numbers = np.concatenate([[0, code, code * code, 0], np.frombuffer(bytes([*has_gradient, *flags]), np.uint8)])
        view = torch.from_numpy(numbers).to(wide).to(device)
        if signal is not None:
            view[3] = signal
        if grads:
            view[0] = torch.stack(torch._foreach_norm(grads, 2, dtype=wide)).square().sum()
        square, codes, squares, *counts = collectives.all_reduce(view).tolist()
        signalled, *raised = [count > 0 for count in counts]
        # Numbers whose squares add up to N times the square of their mean are all the same.
        same = squares * collectives.size == codes * codes
        return Agreement(square, raised[: len(has_gradient)], raised[len(has_gradient) :], same, signalled)

    @property
    def norm(self) -> float:
        """Global 2-norm of the mean gradient; inf or nan where any element is."""
        return self.square**0.5

    @property
    def nonfinite(self) -> bool:
        """Whether any element of any gradient is inf or nan."""
        return not self.square < float("inf")

    def rescale(self, factor: float) -> None:
        """Follow a multiplication of every gradient by `factor`."""
        self.square *= factor * factor
