"""Symmetric products by half, in Triton: compute the tiles on and below the diagonal, store each one twice.

One kernel serves X X^T and beta S + alpha X Y with S, X and Y symmetric and commuting, where Y is Y^T:
out = alpha X Y^T (+ beta S).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton reads the variable when it is imported; under the interpreter kernels run on CPU tensors, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# The interpreter keeps bf16 as 16-bit integers and multiplies those.
DTYPES = (torch.float16, torch.float32) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)

_DTYPE_NAMES = " or ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)


class Config(NamedTuple):
    """How the kernel is cut: output tiles of `tile` squared (a mirrored tile is a tile), read `tile_k` deep."""

    tile: int
    tile_k: int
    warps: int
    stages: int


# Without a table's word. Its loads fit the shared memory of any GPU that multiplies bf16, in fp32 too.
DEFAULT = Config(16, 16, 1, 1) if INTERPRETED else Config(64, 64, 4, 3)
# What tuning tries. Hopper: 128 x 128 fills a warp group's wgmma; 64 keeps all SMs busy on small matrices; deep
# pipelines hide the loads.
CANDIDATES = (
    Config(128, 64, 8, 3),
    Config(128, 64, 8, 4),
    Config(128, 64, 4, 4),
    Config(128, 128, 8, 3),
    Config(64, 64, 4, 4),
    Config(64, 128, 4, 3),
    Config(64, 32, 4, 5),
)


@triton.jit
def _symmetric_kernel(
    start_ptr,
    x_ptr,
    y_ptr,
    out_ptr,
    rows,
    cols,
    start_batch,
    start_row,
    start_col,
    x_batch,
    x_row,
    x_col,
    y_batch,
    y_row,
    y_col,
    out_batch,
    out_row,
    out_col,
    alpha,
    beta,
    ADD_START: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """out = alpha X Y^T (+ beta S) for every X, Y (rows, cols) of a stack; one program per tile of out."""
    tile_row = tl.program_id(0)
    tile_col = tl.program_id(1)
    if tile_col > tile_row:
        return
    # 64-bit offsets: a stack of large matrices exceeds 2^31 elements.
    batch = tl.program_id(2).to(tl.int64)
    row = tile_row.to(tl.int64) * TILE + tl.arange(0, TILE)
    col = tile_col.to(tl.int64) * TILE + tl.arange(0, TILE)
    inner = tl.arange(0, TILE_K)
    left = x_ptr + batch * x_batch + row[:, None] * x_row + inner[None, :] * x_col
    right = y_ptr + batch * y_batch + col[None, :] * y_row + inner[:, None] * y_col
    product = tl.zeros((TILE, TILE), dtype=tl.float32)
    for begin in range(0, cols, TILE_K):
        rest = cols - begin
        x = tl.load(left, mask=(row[:, None] < rows) & (inner[None, :] < rest), other=0.0)
        y = tl.load(right, mask=(col[None, :] < rows) & (inner[:, None] < rest), other=0.0)
        # "ieee" keeps fp32 inputs fp32; it means nothing to 16-bit ones.
        product = tl.dot(x, y, product, input_precision="ieee")
        left += TILE_K * x_col
        right += TILE_K * y_col
    inside = (row[:, None] < rows) & (col[None, :] < rows)
    product *= alpha
    if ADD_START:
        start = start_ptr + batch * start_batch + row[:, None] * start_row + col[None, :] * start_col
        product += beta * tl.load(start, mask=inside, other=0.0).to(tl.float32)
    result = product.to(out_ptr.dtype.element_ty)
    out_ptr += batch * out_batch
    tl.store(out_ptr + row[:, None] * out_row + col[None, :] * out_col, result, mask=inside)
    if tile_col < tile_row:
        tl.store(out_ptr + col[None, :] * out_row + row[:, None] * out_col, result, mask=inside)


def _launch(
    name: str, start: Tensor | None, x: Tensor, y: Tensor, alpha: float, beta: float, out: Tensor | None, config: Config
) -> Tensor:
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"{name} got a tensor on {x.device}: it is a GPU kernel, use matmuls elsewhere")
    if x.ndim not in (2, 3) or x.dtype not in DTYPES:
        raise ValueError(f"{name} got {x.dtype} of shape {tuple(x.shape)}: give {_DTYPE_NAMES}, 2-D or stacked")
    rows, cols = x.shape[-2:]
    shape = (*x.shape[:-1], rows)
    out = x.new_empty(shape) if out is None else out
    wanted = [(out, shape), (y, x.shape), (x if start is None else start, x.shape if start is None else shape)]
    for other, expected in wanted:
        if other.shape != expected or other.dtype != x.dtype or other.device != x.device:
            got = f"{other.dtype} of shape {tuple(other.shape)} on {other.device}"
            raise ValueError(f"{name} got {got}: want {x.dtype} of shape {tuple(expected)} on {x.device}")
    if not out.numel():
        return out
    stacks = [t if t.ndim == 3 else t[None] for t in (x if start is None else start, x, y, out)]

    tiles = triton.cdiv(rows, config.tile)
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device_of(x):
        strides = [stride for stack in stacks for stride in stack.stride()]
        _symmetric_kernel[tiles, tiles, len(stacks[0])](
            *stacks, rows, cols, *strides, alpha, beta, ADD_START=start is not None,
            TILE=config.tile, TILE_K=config.tile_k, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out


def xxt(x: Tensor, out: Tensor | None = None, config: Config = DEFAULT) -> Tensor:
    """X X^T, accumulated in fp32.

    Args:
        x: (m, k) or (stack, m, k), bf16, fp16 or fp32, any strides. out: (m, m) or (stack, m, m) of x's dtype,
            not overlapping x; a new tensor if None. config: of the kernel.
    """
    return _launch("xxt", None, x, x, 1.0, 0.0, out, config)


def symmetric_addmm(
    start: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    beta: float,
    alpha: float = 1.0,
    out: Tensor | None = None,
    config: Config = DEFAULT,
) -> Tensor:
    """beta S + alpha X Y, accumulated in fp32 and read off its lower triangle.

    Args:
        start, x, y: S, X and Y, (m, m) or (stack, m, m), bf16, fp16 or fp32, symmetric; X and Y commute.
        out: of that shape and dtype, not overlapping them; a new tensor if None. config: of the kernel.
    """
    return _launch("symmetric_addmm", start, x, y, alpha, beta, out, config)
