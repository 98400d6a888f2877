"""Measures which kernel is fastest for the products of Newton-Schulz, and writes the table that optimizers read."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distributed_muon import kernels
from distributed_muon.kernels.table import PRODUCTS, Rule, device_name

TUNED_SHAPES = {
    "cpu": [(rows, rows * aspect) for rows in (128, 256, 512, 1024) for aspect in (1, 4)],
    "cuda": [(rows, rows * aspect) for rows in (256, 512, 1024, 2048, 4096, 8192) for aspect in (1, 4)],
}
_CALLS = {"cpu": 1, "cuda": 10}  # in one timing: a kernel is short beside the wait for a GPU


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds until the work of one call is done; of this thread where it is the only one."""
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - begin


def tune(
    path: Path, shapes: Sequence[tuple[int, ...]], rounds: int, device: torch.device, machine: Mapping[str, Any]
) -> None:
    """Measure every kernel on every shape in bf16 and write this device's rules, keeping other devices'.

    Args:
        path: the table. shapes: (rows, cols), either way round. rounds: timed turns of each kernel, after one untimed.
        device: to measure on. machine: of `describe_machine`.

    Raises:
        ValueError: `path` holds something else.
    """
    tables: dict[str, Any] = {}
    if path.exists():
        try:
            tables = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ValueError(f"--tune {path} is no kernel table: name another file") from None
    rules = []
    for shape in shapes:
        short, long = sorted(shape[-2:])
        for product, cols in zip(PRODUCTS, (long, short), strict=True):
            seconds = _measure(product, short, cols, rounds, device)
            rule = min(seconds, key=seconds.__getitem__)
            named = {_name(candidate): value for candidate, value in seconds.items()}
            rules.append({**rule._asdict(), "seconds": named})
            print(f"{product:5s} {short}x{cols}: {_name(rule)}, "
                  + ", ".join(f"{name} {value * 1e3:.3f} ms" for name, value in named.items()))  # fmt: skip
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    measured = f"{machine['date']}, {machine['threads_per_rank']} thread(s), {versions}"
    tables[device_name(device)] = {"measured": measured, "rules": rules}
    path.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


def _name(rule: Rule) -> str:
    return rule.kernel if rule.config is None else f"{rule.kernel} {'x'.join(map(str, rule.config))}"


def _candidates(product: str, rows: int, cols: int, device: torch.device) -> Iterator[Rule]:
    yield Rule(product, rows, cols, "matmul")
    if device.type == "cpu":
        yield Rule(product, rows, cols, "panels")
    elif kernels.triton_available():
        from distributed_muon.kernels.symmetric import CANDIDATES

        for config in CANDIDATES:
            yield Rule(product, rows, cols, "triton", tuple(config))


def _measure(product: str, rows: int, cols: int, rounds: int, device: torch.device) -> dict[Rule, float]:
    """Median seconds of every kernel that runs; all take turns."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(rows, cols, generator=generator) / cols**0.5).to(device, torch.bfloat16)
    x = x if product == "xxt" else (x + x.mT) / 2
    out = x.new_empty(rows, rows)
    calls: dict[Rule, Callable[[], None]] = {}
    for rule in _candidates(product, rows, cols, device):
        run = kernels.kernel(rule, x)

        def call(run: Callable[..., Any] = run) -> None:
            for _ in range(_CALLS[device.type]):
                run(x, out=out) if product == "xxt" else run(x, x, x, beta=-0.5, out=out)

        try:
            seconds_of(call, device)
        except Exception as error:
            if type(error).__name__ != "OutOfResources":  # Triton's, where a tile is too large for this GPU
                raise
            continue
        calls[rule] = call
    seconds: dict[Rule, list[float]] = {rule: [] for rule in calls}
    for _ in range(rounds):
        for rule, call in calls.items():
            seconds[rule].append(seconds_of(call, device) / _CALLS[device.type])
    return {rule: statistics.median(values) for rule, values in seconds.items()}
