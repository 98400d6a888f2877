"""What Newton-Schulz costs in FLOPs and bytes, and the rates that turn these into seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distributed_muon.layout.matrices import Matrix

# (rows of the short side, least long/short): Gram was faster from there on, bf16, CPU, one thread, five steps.
# Its FLOPs are fewer from 1.5 on; the larger aspects pay for its many small matmuls.
_GRAM_MIN_ASPECT = ((128, 1.9), (1, 4.0))


def choose_form(rows: int, cols: int, steps: int) -> str:
    """The form that "auto" takes, by shape alone: "gram" where it was measured faster, else "standard"."""
    short, long = sorted((rows, cols))
    aspect = next((aspect for least, aspect in _GRAM_MIN_ASPECT if short >= least), None)
    return "gram" if steps >= 3 and aspect is not None and long >= aspect * short else "standard"


def ns_flops(rows: int, cols: int, steps: int, form: str) -> int:
    """FLOPs (multiply and add counted apart) of the matmuls of `orthogonalize` on one (rows, cols) matrix.

    With m rows, r = long/short and five steps: standard (20 r + 10) m^3, gram (12 r + 22) m^3. Symmetric
    products are counted in full; `kernels` saves up to half of theirs, depending on device and size.

    Args:
        rows, cols: shape, either way round. steps: iterations. form: "standard" or "gram".
    """
    m, n = sorted((rows, cols))
    pairs, single = divmod(steps, 2) if form == "gram" else (0, steps)
    return pairs * (4 * m * m * n + 10 * m**3) + single * (4 * m * m * n + 2 * m**3)


@dataclass(frozen=True)
class NewtonSchulzCost:
    """What one Newton-Schulz costs, from the few options of the iteration that matter for it.

    Args:
        steps: iterations. form: "standard", "gram" or "auto" (by shape).
        element_bytes: bytes of one element of the iteration and of the wire (2: bf16, 4: fp32).
    """

    steps: int = 5
    form: str = "auto"
    element_bytes: int = 2

    def form_of(self, rows: int, cols: int) -> str:
        """The form a whole (rows, cols) matrix is orthogonalized in."""
        return choose_form(rows, cols, self.steps) if self.form == "auto" else self.form

    def flops(self, matrix: Matrix) -> int:
        """FLOPs (multiply and add counted apart) of one home: of a whole matrix, or of a block in a team.

        A team runs the standard form: of the two products with the long side each rank does its block, of
        the square product its share of the rows.
        """
        if matrix.team == 1:
            return ns_flops(matrix.rows, matrix.cols, self.steps, self.form_of(matrix.rows, matrix.cols))
        short = min(matrix.logical_shape)
        return self.steps * 2 * short * short * (2 * matrix.numel // short + -(-short // matrix.team))

    def flops_of(self, matrices: Sequence[Matrix]) -> list[int]:
        """`flops` of many matrices, of which most are alike."""
        kinds = {matrix[1:]: matrix for matrix in matrices}  # all but the name
        flops = {kind: self.flops(matrix) for kind, matrix in kinds.items()}
        return [flops[matrix[1:]] for matrix in matrices]

    def team_bytes(self, short: int, team: int) -> int:
        """Bytes one rank of a team sends per matrix, `short` being the matrix's short side.

        Per iteration an fp32 all-reduce of the Gram matrix and an all-gather of its polynomial's rows;
        once the absolute maximum and the norm.
        """
        gram = 2 * (short * short * 4 * (team - 1) // team)
        rows = -(-short // team) * team * short * self.element_bytes * (team - 1) // team
        return self.steps * (gram + rows) + 4 * (4 * (team - 1) // team)

    def team_seconds(self, matrix: Matrix, team: int, hardware: Hardware) -> float:
        """Estimated seconds of a whole matrix on a team that lies within one node if it can."""
        short = min(matrix.shape)
        if team == 1:
            return self.flops(matrix) / hardware.matmul_flops
        block = Matrix(matrix.name, short, -(-max(matrix.shape) // team), team, matrix.shape)
        near = team <= hardware.node_ranks
        rate = hardware.node_bytes_per_second if near else hardware.link_bytes_per_second
        latency = (3 * self.steps + 4) * hardware.latency_seconds
        return self.flops(block) / hardware.matmul_flops + self.team_bytes(short, team) / rate + latency


@dataclass(frozen=True)
class Hardware:
    """What one rank has.

    Args:
        name: for tables. matmul_flops: sustained 16-bit matmul, FLOP/s.
        link_bytes_per_second: what one rank can send between nodes.
        latency_seconds: of one small collective.
        node_ranks: consecutive ranks that share a node. node_bytes_per_second: what one rank can send inside it.
    """

    name: str
    matmul_flops: float
    link_bytes_per_second: float
    latency_seconds: float
    node_ranks: int
    node_bytes_per_second: float


# 600 of 989 dense bf16 TFLOP/s; one 400 Gb/s InfiniBand port per GPU; NCCL's small-message latency;
# NVLink 4's 450 GB/s each way among 8 GPUs, of which NCCL reaches about 80 %.
H100_INFINIBAND = Hardware("H100, NVLink 4, 400 Gb/s InfiniBand", 600e12, 50e9, 30e-6, 8, 360e9)
# The same GPUs with one 100 Gb/s Ethernet port each.
H100_ETHERNET = Hardware("H100, NVLink 4, 100 Gb/s Ethernet", 600e12, 12.5e9, 60e-6, 8, 360e9)
# 220 of 312 dense bf16 TFLOP/s; one 200 Gb/s port per GPU; 80 % of NVLink 3's 300 GB/s each way.
A100_INFINIBAND = Hardware("A100, NVLink 3, 200 Gb/s InfiniBand", 220e12, 25e9, 30e-6, 8, 240e9)
# One core of a server CPU per rank, gloo over loopback: what `perf.newton_schulz` and `perf.links` measure.
CPU_GLOO = Hardware("CPU core, gloo over loopback", 0.4e12, 2e9, 200e-6, 1 << 30, 2e9)


def hardware_of(device_type: str) -> Hardware:
    """The rates that plans for a device are decided with: "cpu", or anything else for GPUs."""
    return CPU_GLOO if device_type == "cpu" else H100_INFINIBAND
