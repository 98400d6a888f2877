"""Clusters whose steps are predicted: published rates, or those that `perf.links` fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distributed_muon.layout.cost_model import A100_INFINIBAND, H100_ETHERNET, H100_INFINIBAND, Hardware
from perf import links
from perf.links import Link


@dataclass(frozen=True)
class Machine:
    """A cluster, as seen from one rank.

    Args:
        hardware: the planner's rates. peak_flops: dense 16-bit peak, which MFU is a share of.
        memory_bytes_per_second: of device memory. link_efficiency: of the port's rate that NCCL reaches.
        hop_seconds: of a ring, per further node. message_seconds: per peer of an all-to-all.
        links: collectives by kind as fitted at the very number of ranks that is predicted, in place of the rates.
        newton_schulz: seconds of one matrix by (rows, cols), where measured, in place of FLOPs / rate.
    """

    hardware: Hardware
    peak_flops: float
    memory_bytes_per_second: float
    link_efficiency: float = 0.85
    hop_seconds: float = 5e-6
    message_seconds: float = 2e-6
    links: Mapping[str, Link] = field(default_factory=dict)
    newton_schulz: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def delay(self, kind: str) -> float:
        """Of computation beside a collective, as a share of the collective's seconds."""
        return self.links[kind].delay if kind in self.links else 0.0


MACHINES = {
    "h100-ib400": Machine(H100_INFINIBAND, 989e12, 3.35e12),
    "h100-eth100": Machine(H100_ETHERNET, 989e12, 3.35e12),
    "a100-ib200": Machine(A100_INFINIBAND, 312e12, 2.0e12),
}


def fitted_machine(fitted: Mapping[str, Any]) -> Machine:
    """The machine of a result of `perf.links`, from its rates: for any number of ranks."""
    rates = links.hardware(fitted)
    return Machine(rates, rates.matmul_flops, fitted["memory_bytes_per_second"], link_efficiency=1.0)
