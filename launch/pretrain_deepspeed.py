"""Pretrain the models of launch.pretrain under DeepSpeed's ZeRO-1 or 2 with distributed Muon.

    torchrun --standalone --nproc_per_node 2 -m launch.pretrain_deepspeed
    deepspeed --num_accelerators 2 --module launch.pretrain_deepspeed

The flags choose model, data, batch, clipping, dtype and learning rate; --deepspeed-config the rest. The last line
on stdout is a JSON object with the results.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from distributed_muon.integrations.deepspeed import CONFIG_BLOCK, optimizer_from_config
from launch import arguments
from launch.job import run_job
from launch.schedule import cosine_schedule
from launch.trainer import Trainer
from launch.world import World, leave

CONFIG = Path(__file__).parent / "configs" / "deepspeed_zero1.json"


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, with DeepSpeed's config read into `args.deepspeed`."""
    parser = arguments.trainer_parser(__doc__)
    parser.add_argument("--deepspeed-config", type=Path, default=CONFIG, metavar="FILE", help="DeepSpeed's JSON")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment is used")
    args = arguments.parse(parser, words)
    args.run_dir = args.run_dir or Path("runs") / f"{args.model}-{DeepSpeedTrainer.kind}"
    try:
        args.deepspeed = deepspeed_config(args)
    except (OSError, ValueError) as error:
        parser.error(f"--deepspeed-config {args.deepspeed_config}: {error}")
    return args


def deepspeed_config(args: argparse.Namespace) -> dict[str, Any]:
    """The file's config with what the flags decide; raises a ValueError where both decide."""
    config = json.loads(args.deepspeed_config.read_text(encoding="utf-8"))
    flags = {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": args.accumulation,
        "gradient_clipping": args.clip,
        "bf16": {"enabled": args.dtype == "bf16"},
    }
    for key in (*flags, "train_batch_size", "fp16", "scheduler"):
        if key in config:
            raise ValueError(f"{key} is decided by the trainer's flags: remove it from the file")
    block = {**config.get(CONFIG_BLOCK, {}), "lr": args.lr, "weight_decay": args.weight_decay}
    return {**config, **flags, CONFIG_BLOCK: block}


class DeepSpeedTrainer(Trainer):
    """A run of `launch.loop.train` under DeepSpeed."""

    kind = "deepspeed"

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        if world.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        if args.background_saves:
            raise ValueError("--background-saves: DeepSpeed writes its own files; the plain and FSDP2 trainers can")
        import deepspeed

        super().__init__(args, world)
        self.model = arguments.make_model(args, self.data.vocab_size, world.device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.optimizer = optimizer_from_config(self.model, args.deepspeed)
        schedule = cosine_schedule(self.optimizer, args.lr, args.steps, args.warmup, args.final_lr)
        deepspeed.init_distributed(verbose=False)
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, lr_scheduler=schedule, config=args.deepspeed
        )
        for name, buffer in self.model.named_buffers():
            buffer.data = buffers[name]  # DeepSpeed casts rotary tables and router biases, too
        self.title = f"DeepSpeed ZeRO {self.engine.zero_optimization_stage()}"
        if self.begin is not None:
            with self.resuming(self.optimizer):
                self.go_on(self.run.load(self.run.verified(self._load)))

    def _load(self, path: Path) -> dict[str, Any]:
        from deepspeed.runtime.zero.utils import ZeRORuntimeException

        try:
            return self.engine.load_checkpoint(str(path.parent), path.name)[1]
        except ZeRORuntimeException as error:
            raise ValueError(
                f"--resume: {error} Convert the checkpoint with python -m deepspeed.checkpoint.ds_to_universal "
                '--inject_missing_state, and load it with "checkpoint": {"load_universal": true} in the config'
            ) from error

    def forward_backward(self) -> tuple[float, float]:
        """DeepSpeed counts microbatches in `step`, and reduces where its config says."""
        losses = []
        for number, batch in enumerate(self.microbatches()):
            if number:
                self.engine.step()  # not the last of the step: nothing but counting
            loss = self.engine(*batch)
            self.engine.backward(loss)
            losses.append(loss.detach())
        return self._summed(losses)

    def update(self) -> dict[str, float]:
        """The step after the last microbatch, which DeepSpeed skips by itself, and the balance of the experts."""
        metrics = {"lr": self.engine.get_lr()[0]}
        before = self.engine.skipped_steps
        self.engine.step()
        skipped = self.engine.skipped_steps > before
        if skipped and self.args.nonfinite == "raise":
            names = self._nonfinite() or ["of another rank's sum"]
            raise FloatingPointError(
                f"gradient of parameter {names[0]!r} has inf or nan ({len(names)} parameters in all)"
            )
        metrics["grad_norm"] = float(self.engine.get_global_grad_norm())
        return metrics | self._after_step(skipped)

    def _nonfinite(self) -> list[str]:
        """Names of the parameters whose gradient of this step has an inf or nan on some rank; collective.

        DeepSpeed has dropped the gradients: the same backward runs once more, and is looked at.
        """
        bad: set[str] = set()

        def look(name: str, grad: Tensor) -> None:
            if not grad.isfinite().all():
                bad.add(name)

        names = [name for name, _ in self.model.named_parameters()]
        for name, param in self.model.named_parameters():
            param.register_hook(partial(look, name))
        self.forward_backward()
        found = set().union(*self.world.gather(bad))
        return [name for name in names if name in found]

    def optimizer_seconds(self) -> dict[str, float]:
        """Of the inner optimizer; DeepSpeed's own collectives are not among them."""
        return self.optimizer.step_report().get("seconds", {})

    def save(self) -> None:
        """DeepSpeed's checkpoint now, unless it is there; collective."""

        def write(path: Path) -> None:
            self.engine.save_checkpoint(str(path.parent), path.name, client_state=self.progress(), save_latest=False)

        self.run.save(self.done, self.run.complete(write))
        if self.world.main:  # what DeepSpeed's converters read
            (self.run.checkpoint(self.done).parent / "latest").write_text(self.run.checkpoint(self.done).name)

    def explain(self) -> str:
        """The plan of every Muon group, after the first step."""
        return "\n".join(plan.explain() for plan in self.optimizer.plans.values())

    def results(self) -> dict[str, Any]:
        """What DeepSpeed did."""
        return {"skipped_steps": self.skipped, "zero_stage": self.engine.zero_optimization_stage()}


def main() -> None:
    """Entry point."""
    run_job(DeepSpeedTrainer, parse_arguments)
    leave()


if __name__ == "__main__":
    main()
