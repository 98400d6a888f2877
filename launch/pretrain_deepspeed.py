"""Pretrain the models of launch.pretrain under DeepSpeed's ZeRO-1 or 2 with distributed Muon.

    torchrun --standalone --nproc_per_node 2 -m launch.pretrain_deepspeed
    deepspeed --num_accelerators 2 --module launch.pretrain_deepspeed

The flags choose model, data, batch, clipping, dtype and learning rate; --deepspeed-config the rest. The last line
on stdout is a JSON object with the results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from distributed_muon.integrations.deepspeed import CONFIG_BLOCK, optimizer_from_config
from launch import arguments
from launch.metrics import MetricsWriter, Progress, plot_losses
from launch.models import update_expert_bias
from launch.run_dir import METRICS, PLOT, RunDirectory
from launch.schedule import cosine_schedule
from launch.validation import validation_loss
from launch.world import StopRequest, World, open_world

CONFIG = Path(__file__).parent / "configs" / "deepspeed_zero1.json"


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, with DeepSpeed's config read into `args.deepspeed`."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    arguments.add_model_flags(parser)
    arguments.add_data_flags(parser)
    arguments.add_run_flags(parser)
    arguments.add_schedule_flags(parser)
    parser.add_argument("--deepspeed-config", type=Path, default=CONFIG, metavar="FILE", help="DeepSpeed's JSON")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment is used")
    args = arguments.parse(parser, words)
    if args.run_dir is None:
        args.run_dir = Path("runs") / f"{args.model}-deepspeed"
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
    """One training run under DeepSpeed.

    Args:
        args: from `parse_arguments`. world: the data-parallel ranks.

    Raises:
        ValueError: an option that cannot be right; the message names it.
    """

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        if world.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        import deepspeed

        self.args, self.world = args, world
        self.stop = StopRequest()
        self.run = RunDirectory(args.run_dir, world, args.keep_checkpoints)
        self.data = arguments.make_data(args)
        self.model = arguments.make_model(args, self.data.vocab_size, world.device)
        self.optimizer = optimizer_from_config(self.model, args.deepspeed)
        schedule = cosine_schedule(self.optimizer, args.lr, args.steps, args.warmup, args.final_lr)
        deepspeed.init_distributed(verbose=False)
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, lr_scheduler=schedule, config=args.deepspeed
        )
        for name, buffer in self.model.named_buffers():
            buffer.data = buffers[name]  # DeepSpeed casts rotary tables and router biases, too
        self.done = 0
        if args.resume:
            path, client = self.engine.load_checkpoint(self._checkpoints)
            if path is None and args.resume == "always":
                raise ValueError(f"--resume: no checkpoint in {self._checkpoints}: start without --resume")
            self.done = client["step"] if path is not None else 0
        elif self.run.checkpoints():
            raise ValueError(f"--run-dir {args.run_dir} holds checkpoints: add --resume, or name another")
        self.seconds = self.optimizer_seconds = 0.0  # of this process, since it started
        self._first = self.done
        world.barrier()

    @property
    def _checkpoints(self) -> str:
        return str(self.args.run_dir / "checkpoints")

    @property
    def tokens_per_second(self) -> float:
        samples = (self.done - self._first) * self.world.size * self.args.accumulation * self.args.batch_size
        return samples * self.args.sequence_length / self.seconds if self.seconds else 0.0

    def _batch(self, microbatch: int) -> list[Tensor]:
        args, world = self.args, self.world
        counts = {"size": args.batch_size, "accumulation": args.accumulation}
        return world.to_device(*self.data.batch(self.done, microbatch, world.rank, world.size, **counts))

    def train_step(self) -> tuple[dict[str, float], bool]:
        """One optimizer step; collective. Returns the step's metrics and whether some rank was asked to stop."""
        args, world = self.args, self.world
        started, lr = time.perf_counter(), self.engine.get_lr()[0]
        local_loss = optimizer_seconds = 0.0
        for microbatch in range(args.accumulation):
            loss = self.engine(*self._batch(microbatch))
            self.engine.backward(loss)
            local_loss += loss.item() / args.accumulation
            backward_done = time.perf_counter()
            self.engine.step()  # DeepSpeed knows which microbatch is the last one
            world.synchronize()
            optimizer_seconds += time.perf_counter() - backward_done
        loss_sum, stop = world.sum(local_loss, self.stop.requested)
        balance = update_expert_bias(self.model, args.expert_bias_rate)
        self.done += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.optimizer_seconds += optimizer_seconds
        metrics = {
            "step": self.done,
            "loss": loss_sum / world.size,
            "lr": lr,
            "grad_norm": float(self.engine.get_global_grad_norm()),
            "seconds": seconds,
            "optimizer_seconds": optimizer_seconds,
        }
        if balance is not None:
            metrics["expert_load_max_over_mean"] = balance
        return metrics, stop > 0

    def validate(self) -> float:
        """Validation loss now; collective."""
        return validation_loss(self.model, self.data, self.world, self.args.validation_samples, self.args.batch_size)

    def save(self) -> None:
        """DeepSpeed's checkpoint now, and older ones deleted; collective."""
        self.engine.save_checkpoint(self._checkpoints, f"step-{self.done:08d}", client_state={"step": self.done})
        if self.world.main:
            for _, old in self.run.checkpoints()[: -self.args.keep_checkpoints]:
                shutil.rmtree(old)
        self.world.barrier()


def train(args: argparse.Namespace, world: World) -> None:
    """Train to the end or to an agreed stop, then print the results; collective."""
    try:
        trainer = Trainer(args, world)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    writer = MetricsWriter(args.run_dir / METRICS, trainer.done, world.main)
    unigram = trainer.data.unigram_loss(args.validation_samples)
    progress = Progress(args.steps, trainer.done, args.log_interval, world.main)
    parameters, saved = sum(p.numel() for p in trainer.model.parameters()), trainer.done
    progress.note(f"{args.model} of {parameters:,} parameters under DeepSpeed, {world.size} x {world.device}")
    value, stopping = math.nan, False
    while trainer.done < args.steps and not stopping:
        metrics, stopping = trainer.train_step()
        progress.update(metrics)
        writer.write(metrics)
        last = trainer.done == args.steps
        if last or (trainer.done % args.validation_interval == 0 and not stopping):
            value = trainer.validate()
            progress.note(f"step {trainer.done} val_loss {value:.4f}")
            writer.write({"step": trainer.done, "val_loss": value})
        if last or stopping or trainer.done % args.checkpoint_interval == 0:
            trainer.save()
            saved = trainer.done
    progress.close()
    writer.close()
    if saved < args.steps:
        progress.note(f"stopped after step {saved}; continue with --resume --run-dir {args.run_dir}")
    elif world.main:
        plot_losses({f"{args.model} deepspeed": args.run_dir / METRICS}, args.run_dir / PLOT, unigram)
        plans = trainer.optimizer.plans.values()
        (args.run_dir / "plan.txt").write_text("\n".join(plan.explain() for plan in plans) + "\n")
        results = {
            "final_val_loss": value,
            "unigram_val_loss": unigram,
            "tokens_per_second": trainer.tokens_per_second,
            "optimizer_seconds_share": trainer.optimizer_seconds / max(trainer.seconds, 1e-9),
            "steps": trainer.done,
            "skipped_steps": trainer.engine.skipped_steps,
            "world_size": world.size,
            "model": args.model,
            "zero_stage": trainer.engine.zero_optimization_stage(),
            "parameters": parameters,
            "run_dir": str(args.run_dir),
        }
        (args.run_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps(results), flush=True)


def main() -> None:
    """Entry point."""
    args = parse_arguments()
    with open_world(args.device) as world:
        train(args, world)


if __name__ == "__main__":
    main()
