"""Newton-Schulz: a matrix's nearest semi-orthogonal matrix, by matmuls alone.

With X0 = M / ||M||_F (rows <= columns), each step computes A = X X^T, B = b A + c A A and
X <- a X + B X (Keller Jordan, "Muon", 2024; also section 2.1 of arXiv 2502.16982). Singular values end near 1,
not at 1; how near depends on the coefficient table.

Two forms compute the same polynomial. *standard* is the lines above. *gram* ("Gram Newton-Schulz", 2026)
iterates on R = X X^T and an accumulator Q, both rows x rows, and applies Q to X only now and then, which
saves work on long matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Triple = tuple[float, float, float]
Table = tuple[Triple, ...]

FORMS = ("standard", "gram", "auto")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_STEPS = 99  # torch.optim.Muon's limit


def _with_safety(table: Sequence[Triple], s: float) -> Table:
    """The table for inputs whose spectral norm may exceed 1 by the factor `s`: a/s, b/s^3, c/s^5."""
    return tuple((a / s, b / s**3, c / s**5) for a, b, c in table)


_KELLER = (3.4445, -4.7750, 2.0315)

COEFFICIENTS: dict[str, Table] = {
    "quintic": (_KELLER,) * 5,
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": _with_safety(
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        ),
        1.01,
    ),
    "cans": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
    "deepseek_v4": (_KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2,
}
"""Tables of (a, b, c) per step, by name.

quintic: Keller Jordan's, the default of torch.optim.Muon and of the Moonlight report. you: Jiacheng You's
(Emerging-Optimizers calls it "quintic"). polar_express: the first five of arXiv 2505.16932, with a safety factor
of 1.01 applied to every step as a/s, b/s^3, c/s^5; tables of this name with 1.02 or 1.05 exist elsewhere.
cans: arXiv 2506.10935. deepseek_v4: eight quintic steps, then two that pull the values to 1.
"""


def coefficient_table(coefficients: str | Triple | Sequence[Triple], steps: int | None) -> Table:
    """The (a, b, c) of every step.

    Args:
        coefficients: a name in COEFFICIENTS, one (a, b, c) for all steps as torch.optim.Muon takes it, or one
            per step.
        steps: how many; the last triple repeats where the table is shorter. None: the table as it is.

    Raises:
        ValueError: for an unknown name, something that is not triples, or steps outside 1 to 99.
    """
    known = f"give one of {', '.join(COEFFICIENTS)}, one (a, b, c), or one (a, b, c) per step"
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(f"ns_coefficients={coefficients!r} is no known table: {known}")
        table = COEFFICIENTS[coefficients]
    else:
        try:
            rows = list(coefficients)
            rows = rows if all(hasattr(row, "__len__") for row in rows) else [rows]
            table = tuple((float(a), float(b), float(c)) for a, b, c in rows)
        except (TypeError, ValueError):
            raise ValueError(f"ns_coefficients={coefficients!r} are no triples: {known}") from None
        if not table:
            raise ValueError(f"ns_coefficients is empty: {known}")
    steps = len(table) if steps is None else steps
    if not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"ns_steps={steps!r} must be an integer from 1 to {MAX_STEPS}")
    return (table + table[-1:] * (steps - len(table)))[:steps]


def choose_form(rows: int, cols: int, steps: int) -> str:
    """ "gram" where it was measured faster than "standard", by shape alone; symmetric in rows and cols."""
    short, long = sorted((rows, cols))
    return "gram" if steps >= 3 and short >= 1 and long >= GRAM_MIN_ASPECT * short else "standard"


GRAM_MIN_ASPECT = 1.9


def ns_flops(rows: int, cols: int, steps: int, form: str) -> int:
    """FLOPs (multiply and add counted apart) of the matmuls of `orthogonalize` on one (rows, cols) matrix.

    Args:
        rows, cols: shape, either way round. steps: iterations. form: "standard" or "gram".
    """
    m, n = sorted((rows, cols))
    if form == "standard":
        return steps * (4 * m * m * n + 2 * m**3)
    # Per stretch: X X^T and Q X; R^2 for every step, Q Z for all but the first, and two for R but at the end.
    return sum(4 * m * m * n + (8 * length - 6) * m**3 for length in _stretches(steps))


def _stretches(steps: int) -> list[int]:
    """Steps between two rebuilds of R in the Gram form: the first 2, then 3 at a time.

    Rounding leaves R with eigenvalues around -1e-2 where the smallest should be, and every step multiplies them
    by a^2. Two steps are as far as 16 bits go at first; later the smallest eigenvalues are large enough for
    three. fp32 would need no rebuild; one schedule for all dtypes keeps FLOP counts a matter of shape.
    """
    out = [min(2, steps)]
    while sum(out) < steps:
        out.append(min(3, steps - sum(out)))
    return out


@torch.no_grad()
def orthogonalize(
    matrices: Tensor,
    *,
    coefficients: str | Triple | Sequence[Triple] = "quintic",
    steps: int | None = 5,
    form: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-7,
) -> Tensor:
    """Newton-Schulz of one matrix or of each matrix of a stack. Local; takes part in no collective.

    Every matrix is multiplied by a power of two that brings its largest entry near 1, then divided by its
    Frobenius norm. The power of two is exact, so the output does not depend on the input's scale anywhere in
    fp32's range. An inf or nan makes the output of its matrix nan.

    Args:
        matrices: (rows, cols) or (stack, rows, cols), fp32, bf16 or fp16, any strides; never written to.
        coefficients, steps: as for `coefficient_table`.
        form: "standard": the operations of torch.optim.Muon in its order and strides, one matrix at a time;
            with dtype bf16 and one triple for all steps bit-identical to it on CPU. "gram": the Gram form.
            "auto": whichever `choose_form` names. The latter two stack small matrices into batched matmuls
            and, on CUDA with Triton, compute symmetric products by half; their last bits may depend on how
            matrices are stacked, on the device and on the tuned kernel.
        dtype: of the matmuls and of the output. bf16 input of the norm is rounded first, as torch.optim.Muon
            does; fp16 is cast to only after normalizing in fp32.
        eps: least norm to divide by. After the scaling only a zero matrix is below the default: it gives zeros.

    Returns:
        A new contiguous tensor of the input's shape and of `dtype`.

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
    output = torch.empty(matrices.shape, dtype=dtype, device=matrices.device)
    if not output.numel():
        return output
    rows, cols = matrices.shape[-2:]
    iterate = _gram if (choose_form(rows, cols, len(table)) if form == "auto" else form) == "gram" else _standard
    # Work on (rows, cols) where one matrix at a time is right, on (batch, rows, cols) where batching pays.
    batch = 1 if form == "standard" else _BATCH_NUMEL["cpu" if output.is_cpu else "accelerator"] // (rows * cols)
    stacks = (matrices.view(-1, rows, cols), output.view(-1, rows, cols))
    for source, target in zip(*(stack.split(batch) if batch > 1 else stack for stack in stacks), strict=True):
        x = _normalized(source, dtype, eps)
        x = x if rows <= cols else x.mT
        result = iterate(x, table, *_symmetric_products(x, form))
        target.copy_(result if rows <= cols else result.mT)
    return output


# Elements of one batched matmul. CPU: measured, 16 of 128x128 run 2.2 times as fast as one by one, 4 of 256x256
# 1.2 times, 512x512 are no faster together. Accelerators: enough to fill one, 32 MiB a workspace in bf16.
_BATCH_NUMEL = {"cpu": 2**18, "accelerator": 2**24}


def _normalized(matrices: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    """A copy in `dtype`, every matrix divided by its Frobenius norm."""
    dims = (-2, -1)
    # Two reductions rather than matrices.abs().amax(): no copy of the input.
    largest = torch.maximum(matrices.amax(dims, keepdim=True), matrices.amin(dims, keepdim=True).neg()).float()
    # Keep the exponent bits alone: the power of two below. Zero, subnormals, inf and nan end at the bounds.
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(2.0**-126, 2.0**126)
    x = matrices * power.reciprocal()
    if dtype != torch.float16:
        x = x.to(dtype)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return x.div_(norm.clamp(min=max(eps, _TINY))).to(dtype)


_TINY = 1e-30  # eps=0 must not turn a zero matrix into 0/0


def _standard(x: Tensor, table: Table, xxt: Callable[..., Tensor], polynomial: Callable[..., Tensor]) -> Tensor:
    """`table` applied to the normalized `x` (..., m, n), m <= n, which is used up."""
    gram = x.new_empty(*x.shape[:-1], x.shape[-2])
    update, other = torch.empty_like(gram), x.new_empty(x.shape)
    for a, b, c in table:
        xxt(x, out=gram)
        polynomial(gram, b, c, out=update)
        _addmm(x, update, x, beta=a, out=other)
        # torch.optim.Muon's result is contiguous even where its input is a transposed view; strides can change bits.
        x, other = other, x if x.is_contiguous() else torch.empty_like(other)
    return x


def _gram(x: Tensor, table: Table, xxt: Callable[..., Tensor], polynomial: Callable[..., Tensor]) -> Tensor:
    """As `_standard`, in the Gram form: X <- Q X, where Q gathers the factors (a I + Z), Z = b R + c R^2."""
    r = x.new_empty(*x.shape[:-1], x.shape[-2])
    z, q, spare = (torch.empty_like(r) for _ in range(3))
    other = x.new_empty(x.shape)
    remaining = iter(table)
    for stretch in _stretches(len(table)):
        xxt(x, out=r)
        for step in range(stretch):
            a, b, c = next(remaining)
            polynomial(r, b, c, out=z)
            if step == 0:
                q.copy_(z).diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                _addmm(q, q, z, beta=a, out=spare)
                q, spare = spare, q
            if step + 1 < stretch:
                _addmm(r, r, z, beta=a, out=spare)
                _addmm(spare, z, spare, beta=a, out=r)
        _mm(q, x, out=other)
        x, other = other, x
    return x


def _symmetric_products(x: Tensor, form: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(X -> X X^T, (A, b, c) -> b A + c A A) for `x`: Triton's on a GPU where large enough, else torch's."""
    # Tuning picks a kernel by the clock, which may change last bits from run to run.
    fixed = form == "standard" or torch.are_deterministic_algorithms_enabled()
    if x.is_cuda and not fixed and x.dtype != torch.float64 and x.shape[-2] >= _KERNEL_MIN_ROWS:
        from distributed_muon import kernels

        if kernels.available():
            return kernels.xxt, kernels.symmetric_polynomial
    return _xxt, _polynomial


_KERNEL_MIN_ROWS = 512  # fewer rows are a handful of tiles, of which the half saved is lost in the noise


def _mm(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    return torch.mm(x, y, out=out) if x.ndim == 2 else torch.bmm(x, y, out=out)


def _addmm(start: Tensor, x: Tensor, y: Tensor, *, beta: float, out: Tensor, alpha: float = 1.0) -> Tensor:
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    return add(start, x, y, beta=beta, alpha=alpha, out=out)


def _xxt(x: Tensor, out: Tensor) -> Tensor:
    return _mm(x, x.mT, out)


def _polynomial(a: Tensor, b: float, c: float, out: Tensor) -> Tensor:
    return _addmm(a, a, a, beta=b, alpha=c, out=out)
