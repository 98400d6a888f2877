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
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distributed_muon.engine.coefficients import Table, Triple, coefficient_table
from distributed_muon.kernels import FULL, Products, addmm, mm, products_of
from distributed_muon.kernels.table import KernelTable
from distributed_muon.layout.cost_model import choose_form
from distributed_muon.layout.memory import aligned, batch_size, newton_schulz_elements

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
    if output.numel():
        stack = matrices.view(-1, *matrices.shape[-2:])
        kernels = kernels or KernelTable.load(None, output.device, dtype)
        orthogonalize_stacks([stack], output.view(-1), table, form=form, eps=eps, kernels=kernels)
    return output


def orthogonalize_stacks(
    stacks: Sequence[Tensor],
    out: Tensor,
    table: Table,
    *,
    form: str,
    eps: float,
    kernels: KernelTable,
    scratch: Tensor | None = None,
) -> None:
    """`orthogonalize` of stacks whose matrices have the same two sides, either way round, in the same matmuls.

    Args:
        stacks: (stack, rows, cols) each. table: of coefficients. form, eps, kernels: as for `orthogonalize`.
        out: (elements,) contiguous: the results, stack after stack; may be the memory of `stacks`.
        scratch: (n,) of `out`'s dtype, at least `newton_schulz_elements`; a new tensor if None.
    """
    short, long = sorted(stacks[0].shape[1:])
    batch = batch_size(short * long, form, out.device.type)
    gram = (choose_form(short, long, len(table)) if form == "auto" else form) == "gram"
    if scratch is None:
        scratch = out.new_empty(newton_schulz_elements(short, long, sum(map(len, stacks)), gram, batch))
    for parts in _batches(stacks, batch):
        count, tall = sum(map(len, parts)), any(part.shape[1] > part.shape[2] for part in parts)
        place, out = out.tensor_split([count * short * long])
        lead = () if batch == 1 else (count,)  # torch has other kernels for a stack than for one matrix
        x_shapes, squares = [(*lead, short, long)], [(*lead, short, short)] * (4 if gram else 2)
        if batch == 1:
            spare, other, *squares = _carve(scratch, x_shapes * 2 + squares)
            x = spare.view(parts[0].shape[1:])
            _normalize([parts[0][0]], x, x, eps)
            buffers = other, spare
            if tall:
                # The Gram form leaves a tall matrix the transposed view it is; torch.optim.Muon's turns contiguous.
                x = x.mT
                buffers = (other.view(long, short).mT, x) if gram else buffers
        else:
            # Of two buffers that take turns, the last one is the output, or the spare one if that is to be transposed.
            # torch's batched bf16 matmul on a CPU is 80 times slower on transposed views.
            spare, *squares = _carve(scratch, x_shapes + squares)
            buffers = place.view(spare.shape), spare
            if (-(-len(table) // 2) if gram else len(table)) % 2 == tall:
                buffers = buffers[::-1]
            x = buffers[1]
            _normalize([part if part.shape[1] == short else part.mT for part in parts], spare, x, eps)
        # "standard" multiplies in full, in torch.optim.Muon's order.
        products = FULL if form == "standard" else products_of(x, kernels)
        x = (_gram if gram else _standard)(x, buffers, squares, table, products)
        if batch == 1 or tall:
            results = x.view(count, short, long).split([len(part) for part in parts])
            for part, result, target in zip(parts, results, place.split([part.numel() for part in parts]), strict=True):
                target.view(part.shape).copy_(result if part.shape[1] == short else result.mT)


def _batches(stacks: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Parts of the stacks, in their order: together as many matrices as are multiplied at once, or fewer."""
    batch: list[Tensor] = []
    for part in (part for stack in stacks for part in stack.split(most)):
        if sum(map(len, batch)) + len(part) > most:
            yield batch
            batch = []
        batch.append(part)
    yield batch


def _carve(scratch: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Tensors of these shapes, one behind the other."""
    made, at = [], 0
    for shape in shapes:
        made.append(scratch.narrow(0, at, math.prod(shape)).view(shape))
        at += aligned(math.prod(shape))
    return made


def power_of_two_scale_(largest: Tensor) -> Tensor:
    """The power of two that brings `largest` near 1, written into it; exact to multiply by, hence free of rounding.

    Args:
        largest: fp32 or bf16, absolute values, any shape.

    Returns:
        `largest`: normal numbers come to lie in [1, 4), subnormal ones in [2^-23, 1); finite for zero,
        inf and nan.
    """
    # The exponent bits alone are the power of two below. Zero, subnormals, inf and nan end at the bounds.
    bits, exponent = (torch.int16, 0x7F80) if largest.dtype == torch.bfloat16 else (torch.int32, 0x7F800000)
    largest.view(bits).bitwise_and_(exponent)
    return largest.clamp_(2.0**-126, 2.0**126).reciprocal_()


def _normalize(stacks: Sequence[Tensor], scaled: Tensor, out: Tensor, eps: float) -> None:
    """Every matrix divided by its Frobenius norm.

    Args:
        stacks: (..., rows, cols). scaled, out: of one shape and dtype, for the matrices of all stacks; may be one
            tensor. `scaled` gets them multiplied by powers of two, unless they are fp16.
    """
    wide = torch.float32 if out.dtype == torch.float16 else out.dtype
    if wide != out.dtype:  # rounded to its short range once, after the division
        scaled = torch.empty_like(out, dtype=wide)
    # In bf16 the same bits as by way of fp32, without a copy in it.
    exact = torch.bfloat16 if stacks[0].dtype == out.dtype == torch.bfloat16 else torch.float32
    largest = out.new_empty((*out.shape[:-2], 1, 1), dtype=exact)
    for stack, found in zip(stacks, _apart(largest, stacks), strict=True):
        _largest(stack, found)
    scales = _apart(power_of_two_scale_(largest), stacks)
    for stack, scale, target in zip(stacks, scales, _apart(scaled, stacks), strict=True):
        torch.mul(stack, scale, out=target)
    norm = largest if exact == wide else largest.to(wide)  # memory of this shape
    torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True, out=norm)
    torch.div(scaled, norm.clamp_(min=max(eps, _TINY)), out=out)


def _apart(whole: Tensor, stacks: Sequence[Tensor]) -> Sequence[Tensor]:
    """What belongs to each of the stacks."""
    return [whole] if len(stacks) == 1 else whole.split([len(stack) for stack in stacks])


def _largest(matrices: Tensor, out: Tensor) -> None:
    """The largest absolute value of every matrix into `out` (..., 1, 1), without a copy of the input."""
    dims = (-2, -1)
    if matrices.is_cpu:  # two reductions are eight times as fast as one here; elsewhere they are three kernels
        torch.maximum(matrices.amax(dims, keepdim=True), matrices.amin(dims, keepdim=True).neg_(), out=out)
    else:
        matrices = matrices.float() if matrices.dtype == torch.float64 else matrices
        torch.linalg.vector_norm(matrices, ord=math.inf, dim=dims, keepdim=True, dtype=out.dtype, out=out)


_TINY = 1e-30  # eps=0 must not turn a zero matrix into 0/0


def _standard(
    x: Tensor, buffers: tuple[Tensor, Tensor], squares: Sequence[Tensor], table: Table, products: Products
) -> Tensor:
    """`table` applied to the normalized `x` (..., m, n), m <= n.

    Args:
        buffers: like `x`, contiguous, written in turn; the second may be the memory of `x`.
        squares: (..., m, m), as many as are needed.
    """
    gram, update = squares
    for step, (a, b, c) in enumerate(table):
        products.xxt(x, out=gram)
        products.addmm(gram, gram, gram, beta=b, alpha=c, out=update)
        # torch.optim.Muon's X is contiguous from here on even if it began as a transposed view: same strides,
        # same bits.
        x = addmm(x, update, x, beta=a, out=buffers[step % 2])
    return x


def _gram(
    x: Tensor, buffers: tuple[Tensor, Tensor], squares: Sequence[Tensor], table: Table, products: Products
) -> Tensor:
    """As `_standard`, in the Gram form.

    With R = X X^T and Z = b R + c R^2, a step is X <- (a I + Z) X and hence R <- (a I + Z) R (a I + Z). Q gathers
    the factors of X.
    """
    r, z, q, spare = squares
    # Two steps per rebuild of R. Rounding to bf16 moves its eigenvalues by some 2^-8, below zero too, and every
    # further step multiplies the error by a^2, 12 to 67. After one step that is harmless; after two, singular
    # values of ill-conditioned matrices end at 1.4 instead of 1.2 (quintic) or 2.2 instead of 1.1
    # (polar_express), and ten steps overflow.
    for first in range(0, len(table), 2):
        products.xxt(x, out=r)
        a, b, c = table[first]
        products.addmm(r, r, r, beta=b, alpha=c, out=z)
        out = buffers[first // 2 % 2]
        if first + 1 == len(table):
            return addmm(x, z, x, beta=a, out=out)
        q.copy_(z).diagonal(dim1=-2, dim2=-1).add_(a)
        products.addmm(r, r, z, beta=a, out=spare)
        products.addmm(spare, z, spare, beta=a, out=r)
        a, b, c = table[first + 1]
        products.addmm(r, r, r, beta=b, alpha=c, out=z)
        products.addmm(q, q, z, beta=a, out=spare)
        x = mm(spare, x, out=out)
    return x
