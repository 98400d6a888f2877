"""transformers' Trainer and Accelerate under plain torchrun, where DDP averages the gradients.

    trainer = MuonTrainer(model=model, args=TrainingArguments(...), train_dataset=..., muon={"lr": 4e-3})

DDP keeps gradients, accumulation, clipping and the scaler as they are; the optimizer partitions its states and the
work of a step over the ranks (`gradient_reduction="none"`), and is saved whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer

from distributed_muon.optimizer import DistributedMuon
from distributed_muon.param_groups import muon_param_groups


def ddp_optimizer(model: nn.Module, *, groups: Mapping[str, Any] | None = None, **options: Any) -> DistributedMuon:
    """The optimizer for a model that DDP will wrap, or did; collective over the default process group.

    Args:
        model: not wrapped. groups: arguments of `muon_param_groups`. options: of `DistributedMuon`.
    """
    return DistributedMuon(muon_param_groups(model, **(groups or {})), gradient_reduction="none", **options)


def save_with(accelerator: Accelerator, optimizer: DistributedMuon) -> None:
    """Let `accelerator.save_state()` save the optimizer's state of all ranks."""
    accelerator.register_save_state_pre_hook(lambda *_: optimizer.gather_state())


class MuonTrainer(Trainer):
    """A Trainer whose optimizer is `DistributedMuon`, under DDP or on one process.

    Learning rate, weight decay and Adam's betas and epsilon are those of TrainingArguments.

    Args:
        muon: further options of `DistributedMuon`, and under "groups" the arguments of `muon_param_groups`.
        args, kwargs: of Trainer.

    Raises:
        ValueError: DeepSpeed or FSDP is configured; the message names the way there.
    """

    def __init__(self, *args: Any, muon: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.muon = dict(muon or {})
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "MuonTrainer is for DDP: under DeepSpeed use integrations.deepspeed.optimizer_from_config in "
                "create_optimizer, under FSDP2 integrations.fsdp2"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As of Trainer."""
        if self.optimizer is None:
            given = self.args
            options = {
                "lr": given.learning_rate,
                "weight_decay": given.weight_decay,
                "betas": (given.adam_beta1, given.adam_beta2),
                "adamw_eps": given.adam_epsilon,
            }
            self.optimizer = ddp_optimizer(model or self.model, **(options | self.muon))
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As of Trainer, which calls it on every rank before rank 0 alone saves the optimizer."""
        if _internal_call and self.optimizer is not None:
            getattr(self.optimizer, "optimizer", self.optimizer).gather_state()
        super().save_model(output_dir, _internal_call)
