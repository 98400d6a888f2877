"""What one process computes on the mean gradient: torch's optimizers, a 2-D parameter per logical matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from distributed_muon.engine.coefficients import coefficient_table
from tests.dense import matrices_of
from tests.fuzz.weights import Weight

RATIOS = {
    "original": lambda rows, cols: math.sqrt(max(1, rows / cols)),
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "spectral": lambda rows, cols: math.sqrt(max(rows, cols)),
    "unit_rms_norm": lambda rows, cols: math.sqrt(rows / cols),
}


class OneProcess:
    """torch.optim.Muon and AdamW in fp32; what torch's Muon lacks (tables, precision, rates) is put in its place.

    Args:
        weights: parameters. values: fp32, whole. muon, adamw: options of the groups. ns_dtype: of Newton-Schulz.

    Attributes:
        ratio: factor on the rate of a matrix of some rows and columns.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        values: Sequence[Tensor],
        muon: dict[str, Any],
        adamw: dict[str, Any],
        ns_dtype: torch.dtype,
    ) -> None:
        self.weights, self._dtype = weights, ns_dtype
        muon = dict(muon)
        self._table = coefficient_table(muon.pop("ns_coefficients"), muon["ns_steps"])
        ratio, scale = RATIOS[muon.pop("adjust_lr_fn")], muon.pop("update_scale")
        self.ratio = lambda rows, cols: ratio(rows, cols) * scale
        self._parts = [
            [nn.Parameter(part.clone()) for part in _parts(weight, value)]
            for weight, value in zip(weights, values, strict=True)
        ]
        of = {kind: [p for w, own in self._pairs() if (w.rule is None) == kind for p in own] for kind in (True, False)}
        self.optimizers: list[torch.optim.Optimizer] = []
        if of[False]:
            self.optimizers.append(torch.optim.Muon(of[False], **muon))
        if of[True]:
            self.optimizers.append(torch.optim.AdamW(of[True], **adamw))
        self._state = {
            p: optimizer.state for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]
        }

    def _pairs(self) -> list[tuple[Weight, list[nn.Parameter]]]:
        return list(zip(self.weights, self._parts, strict=True))

    def step(self, grads: Sequence[Tensor | None], lr: float) -> None:
        """One step on fp32 mean gradients of whole parameters; None leaves the parameter alone."""
        for (weight, parts), grad in zip(self._pairs(), grads, strict=True):
            for i, part in enumerate(parts):
                part.grad = None if grad is None else _parts(weight, grad)[i].clone()
        with (
            mock.patch("torch.optim._muon._zeropower_via_newtonschulz", self._orthogonalize),
            mock.patch("torch.optim._muon._adjust_lr", self._adjust),
        ):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()

    def values(self, number: int) -> Tensor:
        """Parameter `number` now, whole, fp32."""
        return self._together(number, lambda part: part.detach())

    def state(self, number: int, key: str) -> Tensor:
        """A moment of parameter `number`, whole; zeros before its first step."""
        return self._together(number, lambda part: self._state[part][part].get(key, torch.zeros_like(part)))

    def _together(self, number: int, of: Any) -> Tensor:
        weight = self.weights[number]
        whole = torch.zeros(weight.shape)
        # Matrices of a parameter are views of it where they can be, so number its elements instead.
        places = _parts(weight, torch.arange(weight.numel).view(weight.shape))
        for place, part in zip(places, self._parts[number], strict=True):
            whole.view(-1)[place.reshape(-1)] = of(part).reshape(-1)
        return whole

    def _adjust(self, lr: float, name: str, shape: torch.Size) -> float:
        return lr * self.ratio(*shape)

    def _orthogonalize(self, grad: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
        """torch's own function with a triple per step, and in fp32 where asked for."""
        x = grad.to(self._dtype, copy=True)
        x = x.T if grad.size(0) > grad.size(1) else x
        x.div_(x.norm().clamp(min=eps))
        for a, b, c in self._table:
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.T if grad.size(0) > grad.size(1) else x


def _parts(weight: Weight, whole: Tensor) -> list[Tensor]:
    return [whole] if weight.rule is None else [part.contiguous() for part in matrices_of(whole, weight.rule)]
