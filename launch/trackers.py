"""Experiment trackers beside metrics.jsonl, chosen by --log-to: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Takes the metrics of a step; on one rank only."""

    def write(self, values: Mapping[str, float]) -> None:
        """Log all values but "step", at that step."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Event files in a directory; what an earlier run logged after the step `done` is no longer shown.

    Args:
        directory: of the run; the events go below it. done: steps that a resumed run keeps.
        settings: shown as text.
    """

    def __init__(self, directory: Path, done: int, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=done + 1, flush_secs=10)
        self._writer.add_text("settings", f"```\n{json.dumps(settings, indent=2)}\n```", done)

    def write(self, values: Mapping[str, float]) -> None:
        for name, value in _without_step(values).items():
            self._writer.add_scalar(name, value, int(values["step"]))

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; a resumed job is a new run of the same group, for steps cannot be taken back.

    Args:
        directory, done, settings: as of `TensorBoard`.
    """

    def __init__(self, directory: Path, done: int, settings: Mapping[str, Any]) -> None:
        import wandb

        name = f"{directory.name} from step {done}" if done else directory.name
        self._run = wandb.init(dir=str(directory), name=name, group=directory.name, config=dict(settings))

    def write(self, values: Mapping[str, float]) -> None:
        self._run.log(_without_step(values), step=int(values["step"]))

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow; a resumed job is a new run of the same name with the tag "from_step".

    Args:
        directory, done, settings: as of `TensorBoard`.
    """

    def __init__(self, directory: Path, done: int, settings: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.start_run(run_name=directory.name, tags={"from_step": str(done)})
        mlflow.log_params(dict(settings))

    def write(self, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(_without_step(values), step=int(values["step"]))

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}


def check_installed(names: Sequence[str]) -> None:
    """Leave with one line where the package of a chosen tracker, which has the tracker's name, is missing."""
    for name in names:
        if find_spec(name) is None:
            raise SystemExit(
                f"error: --log-to {name}: the package {name} is not installed: pip install {name}, or name others "
                "(--log-to without a name logs to metrics.jsonl alone)"
            )


def open_trackers(names: Sequence[str], directory: Path, done: int, settings: Mapping[str, Any]) -> list[Tracker]:
    """The chosen trackers of a run, for rank 0.

    Args:
        names: keys of TRACKERS. directory: of the run. done: steps that a resumed run keeps.
        settings: JSON-serializable, to be shown with the run.
    """
    return [TRACKERS[name](directory, done, settings) for name in names]


def _without_step(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != "step"}
