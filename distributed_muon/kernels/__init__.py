"""Symmetric products at about half the cost: Triton on GPUs, row panels on CPU. Importing this needs no Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Products(NamedTuple):
    """Two products whose result is symmetric, of (m, k) matrices or stacks of them.

    xxt(x, out=) is X X^T. addmm(start, x, y, beta=, alpha=, out=) is beta S + alpha X Y for symmetric S, X and
    Y that commute, as polynomials of one matrix do. `out` overlaps no input.
    """

    xxt: Callable[..., Tensor]
    addmm: Callable[..., Tensor]


@cache
def triton_available() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def symmetric_products(x: Tensor) -> Products | None:
    """The products that suit `x` (..., m, k) and its m x m companions; None where full matmuls are as fast.

    Triton is for 16-bit CUDA tensors alone. It is passed over under torch.use_deterministic_algorithms, since
    tuning picks a kernel by the clock and with it, perhaps, the last bits.
    """
    rows = x.shape[-2]
    if x.is_cpu and rows >= _PANEL_MIN_ROWS:
        from distributed_muon.kernels import panels

        return Products(panels.xxt, panels.symmetric_addmm)
    triton_fits = x.is_cuda and x.element_size() == 2 and rows >= _TRITON_MIN_ROWS
    if triton_fits and not torch.are_deterministic_algorithms_enabled() and triton_available():
        from distributed_muon.kernels import symmetric

        return Products(symmetric.xxt, symmetric.symmetric_addmm)
    return None


_PANEL_MIN_ROWS = 512  # below, two panels were measured to be no faster than one product (bf16, one thread)
_TRITON_MIN_ROWS = 512  # fewer rows are too few tiles for halving them to show
