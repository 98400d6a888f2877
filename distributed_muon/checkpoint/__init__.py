"""Checkpoints that any framework and any number of ranks can load: safetensors files and one index.json.

    checkpoint.save("step_100", model, optimizer, extra={"step": 100})
    extra = checkpoint.load("step_100", model, optimizer)

No code runs on load, a checkpoint is there whole or not at all, and every file is verified before anything is changed.
"""

from distributed_muon.checkpoint.background import Saving
from distributed_muon.checkpoint.index import DamagedCheckpoint, Index
from distributed_muon.checkpoint.loading import load
from distributed_muon.checkpoint.saving import save

__all__ = ["DamagedCheckpoint", "Index", "Saving", "load", "save"]
