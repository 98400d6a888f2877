"""Rates of chips and links that turn the plan's exact FLOPs and bytes into seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """What one rank has.

    Args:
        name: for tables. matmul_flops: sustained 16-bit matmul, FLOP/s.
        link_bytes_per_second: what one rank can send between nodes. latency_seconds: of one collective.
    """

    name: str
    matmul_flops: float
    link_bytes_per_second: float
    latency_seconds: float


# 600 of 989 dense bf16 TFLOP/s; one 400 Gb/s InfiniBand port per GPU; NCCL's small-message latency.
H100_INFINIBAND = Hardware("H100, 400 Gb/s InfiniBand", 600e12, 50e9, 30e-6)
