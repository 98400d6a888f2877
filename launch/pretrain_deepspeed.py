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
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from distributed_muon.integrations.deepspeed import CONFIG_BLOCK, optimizer_from_config
from launch import arguments
from launch.loop import train
from launch.models import huggingface, update_expert_bias
from launch.run_dir import RunDirectory
from launch.schedule import cosine_schedule
from launch.validation import validation_loss
from launch.world import StopRequest, World, leave, open_world

CONFIG = Path(__file__).parent / "configs" / "deepspeed_zero1.json"


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, with DeepSpeed's config read into `args.deepspeed`."""
    parser = arguments.trainer_parser(__doc__)
    parser.add_argument("--deepspeed-config", type=Path, default=CONFIG, metavar="FILE", help="DeepSpeed's JSON")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment is used")
    args = arguments.parse(parser, words)
    args.run_dir = args.run_dir or Path("runs") / f"{args.model}-{Trainer.kind}"
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


class Trainer:
    """A run of `launch.loop.train` under DeepSpeed.

    Args:
        args: from `parse_arguments`. world: the data-parallel ranks.

    Raises:
        ValueError: an option that cannot be right; the message names it.
    """

    kind = "deepspeed"

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        if world.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        import deepspeed

        self.args, self.world = args, world
        self.run = RunDirectory(args.run_dir, world, args.keep_checkpoints)
        self.data = arguments.make_data(args)
        self.model = arguments.make_model(args, self.data.vocab_size, world.device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.samples_per_step = world.size * args.accumulation * args.batch_size
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
        self.done = 0
        if args.resume:
            try:
                path, client = self.engine.load_checkpoint(self._checkpoints)
            except deepspeed.runtime.zero.utils.ZeRORuntimeException as error:
                raise ValueError(
                    f"--resume: {error} Convert the checkpoint with python -m deepspeed.checkpoint.ds_to_universal "
                    '--inject_missing_state, and load it with "checkpoint": {"load_universal": true} in the config'
                ) from error
            if path is None and args.resume == "always":
                raise ValueError(f"--resume: no checkpoint in {self._checkpoints}: start without --resume")
            self.done = client["step"] if path is not None else 0
        elif self.run.checkpoints():
            raise ValueError(f"--run-dir {args.run_dir} holds checkpoints: add --resume, or name another")

    @property
    def _checkpoints(self) -> str:
        return str(self.args.run_dir / "checkpoints")

    def _batch(self, microbatch: int) -> list[Tensor]:
        args, world = self.args, self.world
        counts = {"size": args.batch_size, "accumulation": args.accumulation}
        return world.to_device(*self.data.batch(self.done, microbatch, world.rank, world.size, **counts))

    def train_step(self, stop: StopRequest) -> tuple[dict[str, float], bool]:
        """One optimizer step, as `launch.loop.Trainer` has it; collective."""
        args, world = self.args, self.world
        lr = self.engine.get_lr()[0]
        local_loss = optimizer_seconds = 0.0
        for microbatch in range(args.accumulation):
            loss = self.engine(*self._batch(microbatch))
            self.engine.backward(loss)
            local_loss += loss.item() / args.accumulation
            backward_done = time.perf_counter()
            self.engine.step()  # DeepSpeed knows which microbatch is the last one
            world.synchronize()
            optimizer_seconds += time.perf_counter() - backward_done
        loss_sum, stopping = world.sum(local_loss, stop.requested)
        balance = update_expert_bias(self.model, args.expert_bias_rate)
        self.done += 1
        metrics = {
            "loss": loss_sum / world.size,
            "lr": lr,
            "grad_norm": float(self.engine.get_global_grad_norm()),
            "optimizer_seconds": optimizer_seconds,
        }
        if balance is not None:
            metrics["expert_load_max_over_mean"] = balance
        return metrics, stopping > 0

    def validate(self) -> float:
        """Validation loss now; collective."""
        return validation_loss(self.model, self.data, self.world, self.args.validation_samples, self.args.batch_size)

    def save(self) -> None:
        """DeepSpeed's checkpoint now, and older ones deleted; collective."""
        self.engine.save_checkpoint(self._checkpoints, f"step-{self.done:08d}", client_state={"step": self.done})
        self.run.prune()

    def export(self, folder: Path) -> None:
        """The model as a Hugging Face checkpoint; collective."""
        if self.world.main:
            huggingface.save(self.model, folder)
        self.world.barrier()

    def explain(self) -> str:
        """The plan of every Muon group, after the first step."""
        return "\n".join(plan.explain() for plan in self.optimizer.plans.values())

    def results(self) -> dict[str, Any]:
        """What DeepSpeed did."""
        return {"skipped_steps": self.engine.skipped_steps, "zero_stage": self.engine.zero_optimization_stage()}


def main() -> None:
    """Entry point."""
    args = parse_arguments()
    with open_world(args.device) as world:
        train(Trainer, args, world)
    leave()


if __name__ == "__main__":
    main()
