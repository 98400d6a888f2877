"""Lightning's Trainer and Fabric on a small network under torchrun; rank 0 prints losses and a digest per case.

torchrun --nproc_per_node 2 -m tests.integrations.lightning_job --folder DIR fabric:ddp trainer-reference:auto

A case is who trains and Lightning's strategy: "-reference" has torch's optimizers, "-saved" stops after step 3 with a
checkpoint, "-resumed" goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_muon import DistributedMuon, muon_param_groups

RANKS_BATCH, STEPS, ACCUMULATION, HALF = 4, 6, 2, 3
LR = 0.02


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 4))


def optimizers_of(model: nn.Module, reference: bool) -> list[torch.optim.Optimizer]:
    """Ours, or torch.optim.Muon and AdamW."""
    groups = muon_param_groups(model)
    if not reference:
        return [DistributedMuon(groups, lr=LR, gradient_reduction="none", ns_form="standard", betas=(0.9, 0.999))]
    muon, adamw = ([p for g in groups if g["algorithm"] == kind for _, p in g["params"]] for kind in ("muon", "adamw"))
    one = torch.optim.Muon(muon, lr=LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [one, torch.optim.AdamW(adamw, lr=LR, weight_decay=0.1, betas=(0.9, 0.999))]


def loader() -> torch.utils.data.DataLoader:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(2 * RANKS_BATCH * ACCUMULATION * STEPS, 8, generator=generator)
    data = torch.utils.data.TensorDataset(inputs, inputs[:, :4] * inputs[:, 4:])
    return torch.utils.data.DataLoader(data, batch_size=RANKS_BATCH, shuffle=False)


def loss_of(model: Any, batch: list[Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


class Module(lightning.LightningModule):
    """Automatic optimization with one optimizer; by hand with the reference's two."""

    def __init__(self, reference: bool) -> None:
        super().__init__()
        self.model, self.reference, self.seen = network(), reference, []
        self.automatic_optimization = not reference

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return optimizers_of(self.model, self.reference)

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        loss = loss_of(self.model, batch)
        self.seen.append(loss.item())
        if self.reference:
            self.manual_backward(loss / ACCUMULATION)
            if (number + 1) % ACCUMULATION == 0:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
                for optimizer in self.optimizers():
                    optimizer.step()
                    optimizer.zero_grad()
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.reference:
            optimizer = self.optimizers().optimizer
            optimizer.gather_state()
            checkpoint["optimizer_states"] = [optimizer.state_dict()]


def by_trainer(folder: Path, who: str, strategy: str) -> tuple[list[float], nn.Module]:
    reference, path = "reference" in who, folder / "half.ckpt"
    module = Module(reference)
    automatic = {} if reference else {"accumulate_grad_batches": ACCUMULATION, "gradient_clip_val": 0.5}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=1 if "saved" in who else 2,
        limit_train_batches=HALF * ACCUMULATION, **automatic,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, loader(), ckpt_path=path if "resumed" in who else None)
    if "saved" in who:
        trainer.save_checkpoint(path)
    return module.seen, module.model


def by_fabric(folder: Path, who: str, strategy: str) -> tuple[list[float], nn.Module]:
    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    bare = network()
    optimizers = optimizers_of(bare, "reference" in who)
    model, *wrapped = fabric.setup(bare, *optimizers)
    batches = list(fabric.setup_dataloaders(loader()))
    seen, path = [], folder / "fabric.ckpt"
    if "resumed" in who:
        state = {"model": model, "optimizer": wrapped[0]}
        fabric.load(path, state)
        batches = batches[HALF * ACCUMULATION :]
    for number, batch in enumerate(batches, start=1):
        last = number % ACCUMULATION == 0
        with fabric.no_backward_sync(model, enabled=not last):
            loss = loss_of(model, batch)
            fabric.backward(loss / ACCUMULATION)
        seen.append(loss.item())
        if last:
            if len(wrapped) == 1:
                fabric.clip_gradients(model, wrapped[0], max_norm=0.5)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for optimizer in wrapped:
                optimizer.step()
                optimizer.zero_grad()
        if "saved" in who and number == HALF * ACCUMULATION:
            optimizers[0].gather_state()
            fabric.save(path, {"model": model, "optimizer": wrapped[0]})
            break
    return seen, bare


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    results = {}
    for case in args.cases:
        who, _, strategy = case.partition(":")
        seen, model = (by_fabric if who.startswith("fabric") else by_trainer)(args.folder, who, strategy)
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (seen, digest))
        results[case] = {
            "losses": [sum(step) / len(step) for step in zip(*(losses for losses, _ in found), strict=True)],
            "digest": digest,
            "same": len({digest for _, digest in found}) == 1,
        }
    if dist.get_rank() == 0:
        print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
