"""The plain trainer with the fault that the variable FAULT names.

"kill PLACE STEP": rank 1, in backward, exchange or save. "slow SECONDS": every save. "full STEP": the disk, from it on.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

from distributed_muon.checkpoint import saving
from distributed_muon.engine.collectives import Collectives
from launch import pretrain
from launch.pretrain import PlainTrainer

KIND, *WORDS = os.environ["FAULT"].split()
_begin, _write, _send = PlainTrainer.forward_backward, saving.write_file, Collectives.all_to_all
_now: dict[str, Any] = {"step": 0, "backward": False, "updating": False}


def _die_if(place: str) -> None:
    if KIND == "kill" and os.environ["RANK"] == "1" and " ".join(WORDS) == f"{place} {_now['step']}":
        os.kill(os.getpid(), signal.SIGKILL)


def _forward_backward(self: PlainTrainer) -> tuple[float, float]:
    if not _now["backward"]:
        parameter = list(self.model.parameters())[2]  # neither the first nor the last to get its gradient
        parameter.register_hook(lambda grad: _die_if("backward"))
        _now["backward"] = True
    _now["step"] = self.done + 1
    if KIND == "full" and self.done == int(WORDS[0]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return _begin(self)


def _all_to_all(self: Collectives, *arguments: Any, **options: Any) -> Any:
    _die_if("exchange")
    return _send(self, *arguments, **options)


def _write_file(path: Path, *arguments: Any) -> dict[str, Any]:
    if KIND == "kill" and " ".join(WORDS) == f"save {_now['step']}" and os.environ["RANK"] == "1":
        path.write_bytes(b"half a file")
        _die_if("save")
    if KIND == "slow":
        time.sleep(float(WORDS[0]))
    return _write(path, *arguments)


if __name__ == "__main__":
    PlainTrainer.forward_backward, Collectives.all_to_all, saving.write_file = (
        _forward_backward,
        _all_to_all,
        _write_file,
    )
    pretrain.main()
