"""Newton-Schulz: a matrix's nearest semi-orthogonal matrix, by matmuls alone.

With X0 = M / ||M||_F (rows <= columns), each step computes A = X X^T, B = b A + c A A and
X <- a X + B X (Keller Jordan, "Muon", 2024; also section 2.1 of arXiv 2502.16982). Singular values end near 1,
not at 1; how near depends on the coefficient table.

Two forms compute the same polynomial. *standard* is the lines above. *gram* ("Gram Newton-Schulz", 2026)
iterates on R = X X^T and an accumulator Q, both rows x rows, and applies Q to X only now and then, which
saves work on long matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_muon.engine.coefficients import Table, Triple, coefficient_table
from distributed_muon.kernels import FULL, Products, addmm, mm, products_of
from distributed_muon.kernels.table import KernelTable
from distributed_muon.layout.cost_model import choose_form
from distributed_muon.layout.memory import BATCH_NUMEL

FORMS = ("standard", "gram", "auto")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@torch.no_grad()
def orthogonalize(
    matrices: Tensor,
    *,
    coefficients: str | Triple | Sequence[Triple] = "quintic",
    steps: int | None = 5,
    form: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-7,
    out: Tensor | None = None,
    kernels: KernelTable | None = None,
) -> Tensor:
    """Newton-Schulz of one matrix or of each matrix of a stack. Local; takes part in no collective.

    Every matrix is multiplied by a power of two that brings its largest entry near 1, then divided by its
    Frobenius norm. The power of two is exact, so the output does not depend on the input's scale anywhere in
    fp32's range. An inf or nan makes the output of its matrix nan.

    Args:
        matrices: (rows, cols) or (stack, rows, cols), fp32, bf16 or fp16, any strides; not written to unless it
            is `out`.
        coefficients, steps: as for `coefficient_table`.
        form: "standard": the operations of torch.optim.Muon in its order and strides, one matrix at a time;
            with dtype bf16 and one triple for all steps bit-identical to it on CPU. "gram": the Gram form.
            "auto": whichever `choose_form` names. The latter two stack small matrices into batched matmuls
            and save on symmetric products (`kernels`); their last bits may depend on how matrices are stacked, on
            the device and on the kernel.
        dtype: of the matmuls and of the output: bf16, fp16, fp32 or fp64. Rounding to bf16 comes before the
            division by the norm, as in torch.optim.Muon; to fp16, with its short range, after it.
        eps: least norm to divide by. After the scaling only a zero matrix is below the default: it gives zeros.
        out: of the input's shape and of `dtype`, contiguous; may be `matrices`.
        kernels: which symmetric products to take; None is the shipped table.

    Returns:
        `out`, or a new contiguous tensor like it.

    Raises:
        ValueError: for a shape, form, dtype or coefficients outside the above.
    """
    table = coefficient_table(coefficients, steps)
    if matrices.ndim not in (2, 3):
        raise ValueError(f"matrices has shape {tuple(matrices.shape)}: give (rows, cols) or (stack, rows, cols)")
    if not matrices.is_floating_point():
        raise ValueError(f"matrices has dtype {matrices.dtype}: give fp32, bf16 or fp16")
    if form not in FORMS:
        raise ValueError(f"ns_form={form!r} is unknown: choose one of {', '.join(FORMS)}")
    if dtype not in DTYPES:
        raise ValueError(f"ns_dtype={dtype} is unsupported: choose one of {', '.join(map(str, DTYPES))}")
    output = torch.empty(matrices.shape, dtype=dtype, device=matrices.device) if out is None else out
    if not output.numel():
        return output
    kernels = kernels or KernelTable.load(None, output.device, dtype)
    rows, cols = matrices.shape[-2:]
    iterate = _gram if (choose_form(rows, cols, len(table)) if form == "auto" else form) == "gram" else _standard
    # Work on (rows, cols) where one matrix at a time is right, on (batch, rows, cols) where batching pays.
    batch = 1 if form == "standard" else BATCH_NUMEL["cpu" if output.is_cpu else "accelerator"] // (rows * cols)
    stacks = (matrices.view(-1, rows, cols), output.view(-1, rows, cols))
    for source, target in zip(*(stack.split(batch) if batch > 1 else stack for stack in stacks), strict=True):
        x = _normalized(source, dtype, eps)
        if rows > cols:
            # torch's batched bf16 matmul on a CPU is 80 times slower on transposed views; "standard" is never batched.
            x = x.mT if x.ndim == 2 else x.mT.contiguous()
        # "standard" multiplies in full, in torch.optim.Muon's order.
        result = iterate(x, table, FULL if form == "standard" else products_of(x, kernels))
        target.copy_(result if rows <= cols else result.mT)
    return output


def power_of_two_scale(largest: Tensor) -> Tensor:
    """The power of two that brings `largest` near 1; exact to multiply by, hence free of rounding.

    Args:
        largest: fp32, absolute values, any shape.

    Returns:
        fp32 of that shape: normal numbers come to lie in [1, 4), subnormal ones in [2^-23, 1); finite for zero,
        inf and nan.
    """
    # The exponent bits alone are the power of two below. Zero, subnormals, inf and nan end at the bounds.
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
    return power.clamp(2.0**-126, 2.0**126).reciprocal()


def _normalized(matrices: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    """A copy in `dtype`, every matrix divided by its Frobenius norm."""
    dims = (-2, -1)
    scale = power_of_two_scale(_largest(matrices))
    if matrices.dtype == dtype == torch.bfloat16:  # the same bits as by way of fp32, without a copy in it
        scale = scale.to(dtype)
    x = matrices * scale
    if dtype != torch.float16:
        x = x.to(dtype)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return x.div_(norm.clamp(min=max(eps, _TINY))).to(dtype)


def _largest(matrices: Tensor) -> Tensor:
    """The largest absolute value of every matrix, fp32 (..., 1, 1), without a copy of the input."""
    dims = (-2, -1)
    if matrices.is_cpu:  # two reductions are eight times as fast as one here; elsewhere they are five kernels
        return torch.maximum(matrices.amax(dims, keepdim=True), matrices.amin(dims, keepdim=True).neg()).float()
    return torch.linalg.vector_norm(matrices, ord=math.inf, dim=dims, keepdim=True).float()


_TINY = 1e-30  # eps=0 must not turn a zero matrix into 0/0


def _standard(x: Tensor, table: Table, products: Products) -> Tensor:
    """`table` applied to the normalized `x` (..., m, n), m <= n, which is used up."""
    gram = x.new_empty(*x.shape[:-1], x.shape[-2])
    update, other = torch.empty_like(gram), x.new_empty(x.shape)
    for a, b, c in table:
        products.xxt(x, out=gram)
        products.addmm(gram, gram, gram, beta=b, alpha=c, out=update)
        addmm(x, update, x, beta=a, out=other)
        # torch.optim.Muon's X is contiguous from here on even if it began as a transposed view: same strides,
        # same bits.
        x, other = other, x if x.is_contiguous() else torch.empty_like(other)
    return x


def _gram(x: Tensor, table: Table, products: Products) -> Tensor:
    """As `_standard`, in the Gram form.

    With R = X X^T and Z = b R + c R^2, a step is X <- (a I + Z) X and hence R <- (a I + Z) R (a I + Z). Q gathers
    the factors of X.
    """
    r = x.new_empty(*x.shape[:-1], x.shape[-2])
    z, q, spare = (torch.empty_like(r) for _ in range(3))
    other = x.new_empty(x.shape)
    # Two steps per rebuild of R. Rounding to bf16 moves its eigenvalues by some 2^-8, below zero too, and every
    # further step multiplies the error by a^2, 12 to 67. After one step that is harmless; after two, singular
    # values of ill-conditioned matrices end at 1.4 instead of 1.2 (quintic) or 2.2 instead of 1.1
    # (polar_express), and ten steps overflow.
    for first in range(0, len(table), 2):
        products.xxt(x, out=r)
        a, b, c = table[first]
        products.addmm(r, r, r, beta=b, alpha=c, out=z)
        q.copy_(z).diagonal(dim1=-2, dim2=-1).add_(a)
        if first + 1 < len(table):
            products.addmm(r, r, z, beta=a, out=spare)
            products.addmm(spare, z, spare, beta=a, out=r)
            a, b, c = table[first + 1]
            products.addmm(r, r, r, beta=b, alpha=c, out=z)
            products.addmm(q, q, z, beta=a, out=spare)
            q, spare = spare, q
        mm(q, x, out=other)
        x, other = other, x
    return x
