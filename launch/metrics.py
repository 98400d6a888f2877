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
        kept = [line for line in read_metrics(path) if line["step"] <= done] if done else []
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
    """The lines of a metrics.jsonl; empty where there is none. A line cut off by a kill is dropped."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


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
