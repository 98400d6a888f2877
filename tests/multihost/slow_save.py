"""Runs the plain trainer with checkpoints that take SLOW_SAVE seconds more."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from launch import pretrain
from launch.run_dir import RunDirectory

_save = RunDirectory.save


def _slow_save(self: RunDirectory, step: int, write: Callable[[Path], None]) -> None:
    time.sleep(float(os.environ["SLOW_SAVE"]))
    _save(self, step, write)


if __name__ == "__main__":
    RunDirectory.save = _slow_save
    pretrain.main()
