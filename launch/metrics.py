"""The numbers that a run leaves behind: metrics.jsonl, and a plot of the loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


class MetricsWriter:
    """Appends one JSON object per line to a file; on one rank only.

    Args:
        path: the file; its directory is created where missing.
        done: steps that a resumed run keeps; lines of later steps are dropped. 0 starts a new file.
    """

    def __init__(self, path: Path, done: int) -> None:
        found, strange = _read(path) if done else ([], 0)
        kept = [line for line in found if line["step"] <= done]
        if strange:
            print(f"note: {strange} lines of {path} are no metrics and were dropped", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        for line in kept:
            self.write(line)

    def write(self, values: Mapping[str, object]) -> None:
        """Write one line, at once, so that a killed run keeps it; `step` is required."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; empty where there is none. What is no metrics, such as half a line, is left out."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict], int]:
    """The lines with metrics, and the number of others."""
    lines, strange = [], 0
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            if not isinstance(line["step"], int):
                raise TypeError
            lines.append(line)
        except (ValueError, TypeError, KeyError):
            strange += 1
    return lines, strange


def plot_losses(runs: Mapping[str, Path], target: Path, baseline: float | None = None) -> None:
    """Plot training and validation losses over steps.

    Args:
        runs: label -> metrics.jsonl with `step` and `loss` and/or `val_loss` per line.
        target: the PNG to write.
        baseline: a loss to mark, the unigram model's.
    """
    from matplotlib.figure import Figure  # not pyplot: no display and no global state

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (label, path) in enumerate(runs.items()):
        lines = read_metrics(path)
        for key, style, text in (
            ("loss", {"alpha": 0.4}, "train"),
            ("val_loss", {"marker": "o"}, "validation"),
        ):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=f"C{number}", label=f"{label} {text}", **style)
    if baseline is not None:
        axes.axhline(baseline, color="grey", linestyle=":", label="unigram model")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=120)
