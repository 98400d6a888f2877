"""Which kernel multiplies which shape on which device: measured once per device by `perf.newton_schulz --tune`.

A table file is JSON: {device: {"measured": text, "rules": [{"product", "rows", "cols", "kernel", "config"}, ...]}}.
Nothing is tuned while training, so a run takes the same kernels in every step and on every rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

PRODUCTS = ("xxt", "addmm")
KERNELS = ("matmul", "panels", "triton")


class Rule(NamedTuple):
    """A kernel for one product of X (rows, cols) or of square matrices, and for larger ones up to the next rule.

    Args:
        product: "xxt" or "addmm", see `kernels.Products`. kernel: "matmul" is torch's own, of full matrices.
        config: tile, depth of a tile, warps and stages of "triton"; None for the others.
    """

    product: str
    rows: int
    cols: int
    kernel: str
    config: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class KernelTable:
    """The rules of one device.

    Args:
        device: its name. measured: with what, or that it was not. rules: in any order.
        source: digest of the file they are from, equal on ranks that will take the same kernels.
    """

    device: str
    measured: str
    rules: tuple[Rule, ...]
    source: str = "shipped"

    def rule(self, product: str, rows: int, cols: int) -> Rule:
        """The largest rule that is no larger than (rows, cols); torch's matmul where there is none."""
        fitting = (r for r in self.rules if r.product == product and r.rows <= rows and r.cols <= cols)
        return max(fitting, key=lambda r: r[1:3], default=Rule(product, 0, 0, "matmul"))

    @staticmethod
    def load(path: str | Path | None, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> KernelTable:
        """The rules for a device from a file, or those shipped for it and `dtype` of the products if `path` is None.

        Raises:
            ValueError: the file cannot be read, is no table, or lacks the device; the message names it.
        """
        if path is None:
            key = "cpu with AMX" if device.type == "cpu" and dtype == torch.bfloat16 and has_amx() else device.type
            return SHIPPED.get(key, KernelTable(device.type, "nothing to choose", ()))
        name = device_name(device)
        try:
            text = Path(path).read_text(encoding="utf-8")
            tables: Mapping[str, Any] = json.loads(text)
            if name in tables:
                rules = tuple(_rule(**entry) for entry in tables[name]["rules"])
                digest = hashlib.sha256(text.encode()).hexdigest()[:12]
                return KernelTable(name, tables[name]["measured"], rules, digest)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"ns_table={str(path)!r} is no kernel table ({error}): make one with {_TUNE} {path}"
            ) from None
        raise ValueError(f"ns_table={str(path)!r} has nothing for {name!r}: run {_TUNE} {path} on one")


_TUNE = "python -m perf.newton_schulz --tune"


def has_amx() -> bool:
    """Whether the CPU multiplies bf16 in tiles (AMX). Releases of torch that cannot say so count as without."""
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False))


def device_name(device: torch.device) -> str:
    """What a table calls a device: "cpu", or the name of the GPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _rule(product: str, rows: int, cols: int, kernel: str, config: Any = None, **_: Any) -> Rule:
    if product not in PRODUCTS or kernel not in KERNELS:
        raise ValueError(f"{product!r} by {kernel!r} is unknown")
    return Rule(product, int(rows), int(cols), kernel, None if config is None else tuple(map(int, config)))


# CPU: below 512 rows two panels were measured to be no faster than one product; from there on panels took 0.6 to 0.8 of
# the time with AVX-512, with and without its bf16 instructions, and with AVX2.
# With AMX a bf16 product is five to ten times as fast as without, and what panels add does not shrink. They took, on a
# core while it ran products at 1.1 TFLOP/s, and while a busy host left it 0.4: 2.2 and 1.5 times the time of 512 x 512,
# 1.2 and 0.9 of 1024 x 1024 (addmm 1.3 and 0.9), 0.9 and 0.7 of X X^T with 1024 rows of 2,048 or more, 1.0 and 0.8 of
# 2048 x 2048.
# CUDA: reasoned for an H100's 132 processors. Fewer than 512 rows are too few tiles for halving them to show; half of
# 1,024 rows in tiles of 64 is 136 tiles, and so is half of 2,048 rows in tiles of 128, which fill a warp group's wgmma.
_SMALL, _LARGE = (64, 64, 4, 4), (128, 64, 8, 3)
SHIPPED = {
    "cpu": KernelTable("cpu", "bf16, one thread", tuple(Rule(p, 512, 0, "panels") for p in PRODUCTS)),
    "cpu with AMX": KernelTable(
        "cpu", "bf16, one thread, AMX", (Rule("xxt", 1024, 2048, "panels"), Rule("addmm", 2048, 0, "panels"))
    ),
    "cuda": KernelTable(
        "cuda",
        "not measured on a GPU",
        tuple(Rule(p, rows, 0, "triton", of) for p in PRODUCTS for rows, of in ((512, _SMALL), (2048, _LARGE))),
    ),
}
