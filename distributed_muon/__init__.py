"""ZeRO-1 distributed Muon for PyTorch, Megatron-core and DeepSpeed."""

from distributed_muon import checkpoint
from distributed_muon.grad_scaler import GradScaler
from distributed_muon.layout.matrices import QKV, Conv, Experts, Split, Whole
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
