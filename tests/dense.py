"""What tensor parallelism and matrix rules mean, written with torch's own indexing on whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_muon.layout.matrices import QKV, Experts, MatrixRule, Split, TensorSpec


def tp_slice(whole: Tensor, rule: MatrixRule | None, dim: int | None, stride: int, tp: int, tp_rank: int) -> Tensor:
    """The part of `whole` on one TP rank: `stride` interleaved parts of dimension `dim` (of one expert)."""
    if dim is None:
        return whole.clone()
    dim += isinstance(rule, Experts)
    return torch.cat(whole.chunk(tp * stride, dim)[tp_rank::tp], dim).contiguous()


def matrices_of(whole: Tensor, rule: MatrixRule) -> list[Tensor]:
    """The matrices of an unsharded tensor, in the order the package counts them."""
    if isinstance(rule, Experts):
        return [part for expert in whole for part in matrices_of(expert, rule.inner)]
    if isinstance(rule, Split):
        return list(whole.split(rule.sizes, rule.dim))
    if isinstance(rule, QKV):
        groups = whole.view(rule.groups, -1, whole.shape[-1])
        query = rule.heads // rule.groups * rule.head_dim
        value = rule.value_dim or rule.head_dim
        sizes = (query, query, rule.head_dim, value) if rule.gate else (query, rule.head_dim, value)
        parts = groups.split(sizes, dim=1)
        if rule.per_group:
            return [part[group] for group in range(rule.groups) for part in parts]
        return [part.reshape(-1, whole.shape[-1]) for part in parts]
    return [whole.flatten(1)]


def spec_of(
    name: str, shape: tuple[int, ...], rule: MatrixRule | None, dim: int | None, stride: int, tp: int
) -> TensorSpec:
    """The planner's view of a tensor of global `shape`, cut over `tp` ranks along `dim`."""
    local = tuple(tp_slice(torch.empty(shape), rule, dim, stride, tp, 0).shape)
    return TensorSpec(name, local, rule, tp_dim=dim, tp_size=tp if dim is not None else 1, tp_stride=stride)
