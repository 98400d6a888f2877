"""ZeRO-1 distributed Muon for PyTorch, Megatron-core and DeepSpeed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distributed_muon.layout.matrices import QKV, Conv, Experts, Split, Whole

if TYPE_CHECKING:
    from distributed_muon import checkpoint
    from distributed_muon.grad_scaler import GradScaler
    from distributed_muon.optimizer import DistributedMuon
    from distributed_muon.param_groups import muon_param_groups

__all__ = [
    "QKV",
    "Conv",
    "DistributedMuon",
    "Experts",
    "GradScaler",
    "Split",
    "Whole",
    "checkpoint",
    "muon_param_groups",
]

# Imported when first asked for, so that planning on a laptop does not wait for torch.
_MODULES = {
    "DistributedMuon": "optimizer",
    "GradScaler": "grad_scaler",
    "checkpoint": "checkpoint",
    "muon_param_groups": "param_groups",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name, module)
