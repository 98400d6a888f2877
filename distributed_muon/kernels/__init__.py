"""The products of Newton-Schulz: full matmuls, or symmetric ones at about half the cost, as a table chooses.

Triton on GPUs, row panels on CPU. Importing this needs no Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from distributed_muon.kernels import panels
from distributed_muon.kernels.table import KernelTable, Rule


class Products(NamedTuple):
    """Two products whose result is symmetric, of (m, k) matrices or stacks of them.

    xxt(x, out=) is X X^T. addmm(start, x, y, beta=, alpha=, out=) is beta S + alpha X Y for symmetric S, X and
    Y that commute, as polynomials of one matrix do. `out` overlaps no input.
    """

    xxt: Callable[..., Tensor]
    addmm: Callable[..., Tensor]


def mm(x: Tensor, y: Tensor, *, out: Tensor) -> Tensor:
    """X Y of matrices or stacks of them."""
    return torch.mm(x, y, out=out) if x.ndim == 2 else torch.bmm(x, y, out=out)


def addmm(start: Tensor, x: Tensor, y: Tensor, *, beta: float, alpha: float = 1.0, out: Tensor) -> Tensor:
    """beta S + alpha X Y of matrices or stacks of them."""
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    return add(start, x, y, beta=beta, alpha=alpha, out=out)


FULL = Products(lambda x, out: mm(x, x.mT, out=out), addmm)


@cache
def triton_available() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def products_of(x: Tensor, table: KernelTable) -> Products:
    """The products that `table` names for `x` (..., m, k) and its m x m companions."""
    rows, cols = x.shape[-2:]
    return Products(*(kernel(table.rule(name, rows, width), x) for name, width in (("xxt", cols), ("addmm", rows))))


def kernel(rule: Rule, x: Tensor) -> Callable[..., Tensor]:
    """What a rule names, a function like those of Products; full matmuls where `x` is not of its kind."""
    if rule.kernel == "panels" and x.is_cpu:
        return panels.xxt if rule.product == "xxt" else panels.symmetric_addmm
    if rule.kernel == "triton" and x.is_cuda and x.element_size() == 2 and triton_available():
        from distributed_muon.kernels import symmetric

        own = symmetric.xxt if rule.product == "xxt" else symmetric.symmetric_addmm
        return partial(own, config=symmetric.Config(*rule.config)) if rule.config else own
    return getattr(FULL, rule.product)
