"""Pretrain a language model with distributed Muon or ZeRO-1 AdamW, in plain PyTorch.

    torchrun --standalone --nproc_per_node 2 -m launch.pretrain --model moonlight
    python -m launch.pretrain --model dense --optimizer adamw      # one process

The last line on stdout is a JSON object with the results.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

from distributed_muon import DistributedMuon, checkpoint, muon_param_groups
from launch import arguments
from launch.metrics import MetricsWriter, Progress, plot_losses
from launch.models import CausalLM, update_expert_bias
from launch.run_dir import METRICS, PLOT, RunDirectory
from launch.schedule import cosine_schedule
from launch.validation import validation_loss
from launch.world import StopRequest, World, open_world


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; every default together is the job of `make train`."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    arguments.add_model_flags(parser)
    arguments.add_data_flags(parser)
    arguments.add_run_flags(parser)
    arguments.add_schedule_flags(parser)
    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="for hidden matrices")
    optimizer.add_argument("--momentum", type=float, default=0.95, help="of Muon")
    optimizer.add_argument("--ns-steps", type=int, default=5, help="Newton-Schulz steps")
    optimizer.add_argument("--ns-coefficients", default="quintic", help="coefficient table")
    optimizer.add_argument("--ns-form", choices=("auto", "standard", "gram"), default="auto")
    optimizer.add_argument("--strategy", choices=("auto", "home", "gather"), default="auto")
    optimizer.add_argument("--layout", choices=("auto", "flat", "bucketed", "aligned"), default="auto")
    optimizer.add_argument("--bucket-mb", type=float, help="MiB of fp32 gradient per bucket")
    optimizer.add_argument(
        "--overlap-param-gather", action="store_true", help="all-gather parameters under the next forward"
    )
    args = arguments.parse(parser, words)
    if args.run_dir is None:
        args.run_dir = Path("runs") / f"{args.model}-{args.optimizer}"
    return args


def make_optimizer(args: argparse.Namespace, model: CausalLM) -> DistributedMuon:
    """Muon for hidden matrices and AdamW for the rest, or AdamW for everything; ZeRO-1 either way."""
    if args.optimizer == "muon":
        groups = muon_param_groups(model)
    else:
        groups = [{"params": list(model.named_parameters()), "algorithm": "adamw"}]
    optimizer = DistributedMuon(
        groups,
        lr=args.lr,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        ns_coefficients=args.ns_coefficients,
        ns_steps=args.ns_steps,
        ns_form=args.ns_form,
        strategy=args.strategy,
        layout=args.layout,
        bucket_mb=args.bucket_mb,
    )
    if args.overlap_param_gather:
        optimizer.overlap_param_gather(model)
    return optimizer


class Trainer:
    """One training run: its model, optimizer and data, and the steps done so far.

    Args:
        args: from `parse_arguments`.
        world: the data-parallel ranks.

    Raises:
        ValueError: an option that cannot be right; the message names it.
    """

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        self.args, self.world = args, world
        self.stop = StopRequest()
        self.run = RunDirectory(args.run_dir, world, args.keep_checkpoints)
        begin = self.run.start(args.resume)
        self.data = arguments.make_data(args)
        self.model = arguments.make_model(args, self.data.vocab_size, world.device)
        self.optimizer = make_optimizer(args, self.model)
        self.done = 0
        if begin is not None:
            extra = checkpoint.load(begin, self.model, self.optimizer)
            self.done = extra["step"]
            if world.main and extra["samples_per_step"] != self._samples_per_step:
                print(
                    f"note: {self._samples_per_step} samples per step, before {extra['samples_per_step']}: "
                    "choose --accumulation and --batch-size to keep the number"
                )
        self.schedule = cosine_schedule(self.optimizer, args.lr, args.steps, args.warmup, args.final_lr, self.done)
        self.seconds = self.optimizer_seconds = 0.0  # of this process, since it started
        self._first = self.done
        # Every rank must have looked for checkpoints before rank 0 writes one.
        world.barrier()

    @property
    def _samples_per_step(self) -> int:
        return self.world.size * self.args.accumulation * self.args.batch_size

    @property
    def tokens_per_second(self) -> float:
        tokens = (self.done - self._first) * self._samples_per_step * self.args.sequence_length
        return tokens / self.seconds if self.seconds else 0.0

    def train_step(self) -> tuple[dict[str, float], bool]:
        """One optimizer step; collective.

        Returns:
            The step's metrics, the same on every rank but for the seconds, and whether some rank was asked
            to stop.

        Raises:
            FloatingPointError: a gradient is not finite; no parameter has been changed.
        """
        args, world = self.args, self.world
        started = time.perf_counter()
        local_loss = 0.0
        for microbatch in range(args.accumulation):
            tokens, targets = self.data.batch(
                self.done,
                microbatch,
                world.rank,
                world.size,
                size=args.batch_size,
                accumulation=args.accumulation,
            )
            last = microbatch == args.accumulation - 1
            with nullcontext() if last else self.optimizer.no_sync():
                loss = self.model(*world.to_device(tokens, targets)) / args.accumulation
                loss.backward()
            local_loss += loss.item()
        loss_sum, stop = world.sum(local_loss, self.stop.requested)
        backward_done = time.perf_counter()
        lr = self.schedule.get_last_lr()[0]
        norm = float(self.optimizer.clip_grad_norm_(args.clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        world.synchronize()
        optimizer_done = time.perf_counter()
        self.schedule.step()
        balance = update_expert_bias(self.model, args.expert_bias_rate)
        seconds, optimizer_seconds = time.perf_counter() - started, optimizer_done - backward_done
        self.done += 1
        self.seconds += seconds
        self.optimizer_seconds += optimizer_seconds
        metrics = {
            "step": self.done,
            "loss": loss_sum / world.size,
            "lr": lr,
            "grad_norm": norm,
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
        """Checkpoint now; collective."""
        extra = {"step": self.done, "samples_per_step": self._samples_per_step}
        self.run.save(self.done, lambda path: checkpoint.save(path, self.model, self.optimizer, extra))


def train(args: argparse.Namespace, world: World) -> None:
    """Train to the end or to an agreed stop, then print the results; collective."""
    try:
        trainer = Trainer(args, world)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    directory, parameters = args.run_dir, sum(p.numel() for p in trainer.model.parameters())
    writer = MetricsWriter(directory / METRICS, trainer.done, world.main)
    unigram = trainer.data.unigram_loss(args.validation_samples)
    if world.main:
        settings = json.dumps({**vars(args), "world_size": world.size}, indent=2, default=str)
        (directory / "settings.json").write_text(settings + "\n")
        (directory / "plan.txt").write_text(trainer.optimizer.plan.explain() + "\n")
    progress = Progress(args.steps, trainer.done, args.log_interval, world.main)
    progress.note(
        f"{args.model} of {parameters:,} parameters, {args.optimizer}, {world.size} x {world.device}; "
        f"unigram validation loss {unigram:.4f}; writing to {directory}"
    )

    validation: tuple[int, float] = (-1, math.nan)  # step, loss
    stopping = False
    while trainer.done < args.steps and not stopping:
        metrics, stopping = trainer.train_step()
        progress.update(metrics)
        writer.write(metrics)
        if trainer.done % args.validation_interval == 0 and not stopping:
            validation = (trainer.done, trainer.validate())
            progress.note(f"step {trainer.done} val_loss {validation[1]:.4f}")
            writer.write({"step": trainer.done, "val_loss": validation[1]})
        if trainer.done % args.checkpoint_interval == 0:
            trainer.save()
    trainer.save()
    if trainer.done < args.steps:
        progress.note(f"stopped after step {trainer.done}; continue with --resume --run-dir {directory}")
        progress.close()
        return
    if validation[0] != trainer.done:
        validation = (trainer.done, trainer.validate())
        writer.write({"step": trainer.done, "val_loss": validation[1]})
    progress.close()
    writer.close()
    if not world.main:
        return
    plot_losses({f"{args.model} {args.optimizer}": directory / METRICS}, directory / PLOT, unigram)
    results = {
        "final_val_loss": validation[1],
        "unigram_val_loss": unigram,
        "tokens_per_second": trainer.tokens_per_second,
        "optimizer_seconds_share": trainer.optimizer_seconds / max(trainer.seconds, 1e-9),
        "steps": trainer.done,
        "world_size": world.size,
        "model": args.model,
        "optimizer": args.optimizer,
        "parameters": parameters,
        "run_dir": str(directory),
    }
    (directory / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results), flush=True)


def main() -> None:
    """Entry point."""
    args = parse_arguments()
    with open_world(args.device) as world:
        train(args, world)


if __name__ == "__main__":
    main()
