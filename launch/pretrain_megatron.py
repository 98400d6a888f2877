"""Pretrain GPT or Moonlight from megatron-core's modules with distributed Muon, under any TP x PP x EP x DP.

    torchrun --standalone --nproc_per_node 8 -m launch.pretrain_megatron --tp 2 --pp 2 --config run.yaml

Every flag may also stand in the YAML file of --config, by its name; flags on the command line win. The last line
on stdout is a JSON object with the results.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor, nn

from distributed_muon.integrations.megatron import get_distributed_muon_optimizer
from launch import arguments
from launch.megatron_models import build_chunks, transformer_config
from launch.metrics import MetricsWriter, Progress, plot_losses
from launch.run_dir import METRICS, PLOT, RunDirectory
from launch.world import StopRequest, World, open_world

Batch = tuple[Tensor, Tensor]


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, after the flags of the --config file."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    arguments.add_model_flags(parser)
    arguments.add_data_flags(parser)
    arguments.add_run_flags(parser)
    arguments.add_schedule_flags(parser)
    parallel = parser.add_argument_group("parallelism", "data parallelism takes the ranks that are left")
    parallel.add_argument("--tp", type=int, default=1, help="tensor-parallel size, with sequence parallelism")
    parallel.add_argument("--pp", type=int, default=1, help="pipeline stages")
    parallel.add_argument("--vpp", type=int, help="model chunks per stage (interleaved schedule)")
    parallel.add_argument("--ep", type=int, default=1, help="expert-parallel size")
    parallel.add_argument("--etp", type=int, help="tensor-parallel size of experts; that of --tp if not given")
    parallel.add_argument("--overlap", action="store_true", help="of gradient reduction and parameter gathering")
    parallel.add_argument("--bucket-mb", type=float, help="MiB of fp32 gradient per bucket, with --overlap")
    parallel.add_argument("--aligned", action="store_true", help="shard-aligned buffers (megatron-core 0.19 on)")
    muon = parser.add_argument_group("muon")
    muon.add_argument("--momentum", type=float, default=0.95)
    muon.add_argument("--ns-steps", type=int, default=5, help="Newton-Schulz steps")
    muon.add_argument("--ns-coefficients", default="quintic", help="coefficient table")
    muon.add_argument("--ns-form", choices=("auto", "standard", "gram"), default="auto")
    muon.add_argument("--strategy", choices=("auto", "home", "gather"), default="home")
    args = arguments.parse(parser, words)
    if args.run_dir is None:
        args.run_dir = Path("runs") / f"{args.model}-megatron"
    return args


class Trainer:
    """One training run under Megatron-core.

    Args:
        args: from `parse_arguments`. world: all ranks of the job.

    Raises:
        ValueError: an option that cannot be right; the message names it.
    """

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        if world.size % (args.tp * args.pp):
            raise ValueError(f"{world.size} ranks are not a multiple of --tp {args.tp} x --pp {args.pp}")
        self.args, self.world = args, world
        self.stop = StopRequest()
        self.run = RunDirectory(args.run_dir, world, args.keep_checkpoints)
        begin = self.run.start(args.resume)
        self.data = arguments.make_data(args)
        self.config = transformer_config(args)
        parallel_state.initialize_model_parallel(
            args.tp,
            args.pp,
            virtual_pipeline_model_parallel_size=args.vpp,
            expert_model_parallel_size=args.ep,
            expert_tensor_parallel_size=args.etp,
        )
        model_parallel_cuda_manual_seed(args.seed)
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        self.chunks = build_chunks(args, self.config, self.data.vocab_size)
        self.optimizer = get_distributed_muon_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=args.lr,
                min_lr=args.lr * args.final_lr,
                weight_decay=args.weight_decay,
                adam_beta2=0.95,
                clip_grad=args.clip,
                bf16=self.config.bf16,
                params_dtype=self.config.params_dtype,
                use_distributed_optimizer=True,
                overlap_param_gather=args.overlap,
            ),
            self.chunks,
            momentum=args.momentum,
            ns_steps=args.ns_steps,
            ns_coefficients=args.ns_coefficients,
            ns_form=args.ns_form,
            strategy=args.strategy,
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=args.lr,
            min_lr=args.lr * args.final_lr,
            lr_warmup_steps=min(args.warmup, args.steps - 1),
            lr_decay_steps=args.steps,
            lr_decay_style="cosine",
            start_wd=args.weight_decay,
            end_wd=args.weight_decay,
            wd_incr_steps=args.steps,
            wd_incr_style="constant",
        )
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        if args.overlap:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.done = 0
        if begin is not None:
            self._load(begin)
        else:
            self.scheduler.step(1)  # its step 0 has a learning rate of 0
        self.seconds = self.optimizer_seconds = 0.0  # of this process, since it started
        self._first = self.done
        world.barrier()

    @property
    def parameters(self) -> int:
        """Parameters of the model, tensor-parallel and tied copies counted once; collective."""
        counted = sum(s.master.numel() for s in self.optimizer.chained_optimizers[0].shards if not s.master.shared)
        return int(self.world.sum(counted)[0])

    @property
    def tokens_per_second(self) -> float:
        samples = (self.done - self._first) * self.data_size * self.args.accumulation * self.args.batch_size
        return samples * self.args.sequence_length / self.seconds if self.seconds else 0.0

    def _microbatches(self) -> Iterator[Batch]:
        args = self.args
        for microbatch in range(args.accumulation):
            place = (self.done, microbatch, self.data_rank, self.data_size)
            yield self.data.batch(*place, size=args.batch_size, accumulation=args.accumulation)

    def _run(self, batches: Callable[[], Iterator[Batch]], count: int, forward_only: bool) -> tuple[float, float]:
        """Forward (and backward) over `count` microbatches; (sum of their losses, their number) of this rank."""
        several = len(self.chunks) > 1
        reports = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=[batches() for _ in self.chunks] if several else batches(),
            model=self.chunks if several else self.chunks[0],
            num_microbatches=count,
            seq_length=self.args.sequence_length,
            micro_batch_size=self.args.batch_size,
            forward_only=forward_only,
        )
        return sum(float(report["loss"]) for report in reports or []), len(reports or [])

    def _forward(self, batches: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        tokens, targets = self.world.to_device(*next(batches))
        length = self.args.sequence_length
        positions = torch.arange(length, device=tokens.device).expand(len(tokens), -1)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)

        def mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = losses.float().mean()
            return loss, {"loss": loss.detach().clone()}

        return model(tokens, positions, mask, labels=targets), mean

    def train_step(self) -> tuple[dict[str, float], bool]:
        """One optimizer step; collective. Returns the step's metrics and whether some rank was asked to stop."""
        started = time.perf_counter()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        local = self._run(self._microbatches, self.args.accumulation, forward_only=False)
        loss, count, stop = self.world.sum(*local, self.stop.requested)
        backward_done = time.perf_counter()
        lr = float(self.optimizer.param_groups[0]["lr"])
        success, norm, _ = self.optimizer.step()
        self.world.synchronize()
        self.optimizer_seconds += time.perf_counter() - backward_done
        if success:
            self.scheduler.step(1)
        self.done += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        metrics = {"step": self.done, "loss": loss / count, "lr": lr, "seconds": seconds, "skipped": float(not success)}
        return metrics | ({"grad_norm": norm} if success else {}), stop > 0

    def validate(self) -> float:
        """Validation loss now, over as many whole microbatches as the held-out samples fill; collective."""
        args = self.args
        batches = list(
            self.data.validation_batches(args.validation_samples, self.data_rank, self.data_size, args.batch_size)
        )
        whole = [batch for batch in batches if len(batch[0]) == args.batch_size]
        counts = torch.tensor([len(whole)], device=self.world.device)
        dist.all_reduce(counts, op=dist.ReduceOp.MIN)
        count = int(counts) - (int(counts) % args.pp if args.vpp else 0)  # the interleaved schedule wants a multiple
        if not count:
            raise ValueError(f"--validation-samples {args.validation_samples}: give every rank a batch of it")
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            loss, number = self.world.sum(*self._run(lambda: iter(whole[:count]), count, forward_only=True))
        for chunk in self.chunks:
            chunk.train()
        return loss / number

    # ---- checkpoints -----------------------------------------------------------------------------------

    def _model_state(self) -> dict[str, Any]:
        states = (chunk.module.sharded_state_dict() for chunk in self.chunks)
        return {f"model{index}": state for index, state in enumerate(states)}

    def _state(self, is_loading: bool) -> dict[str, Any]:
        model = self._model_state()
        given = model if len(model) > 1 else {"model": model["model0"]}
        optimizer = self.optimizer.sharded_state_dict(given, is_loading=is_loading)
        return {**model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict(), "step": self.done}

    def save(self) -> None:
        """Checkpoint now, unless it is there; collective."""

        def write(path: Path) -> None:
            unfinished = path.with_name(path.name + ".unfinished")
            if self.world.main:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
            self.world.barrier()
            for chunk in self.chunks:
                if self.args.overlap:
                    chunk.start_param_sync(force_sync=True)
            dist_checkpointing.save(self._state(is_loading=False), str(unfinished))
            if self.world.main:
                unfinished.rename(path)
            self.world.barrier()

        self.run.save(self.done, write)

    def _load(self, path: Path) -> None:
        state = dist_checkpointing.load(self._state(is_loading=True), str(path))
        for index, chunk in enumerate(self.chunks):
            chunk.module.load_state_dict(state[f"model{index}"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.done = state["step"]


def train(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """Train to the end or to an agreed stop; collective. Returns the results, which rank 0 has printed."""
    try:
        trainer = Trainer(args, world)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    writer = MetricsWriter(args.run_dir / METRICS, trainer.done, world.main)
    unigram, parameters = trainer.data.unigram_loss(args.validation_samples), trainer.parameters
    if world.main:
        (args.run_dir / "plan.txt").write_text(trainer.optimizer.chained_optimizers[0].explain() + "\n")
    progress = Progress(args.steps, trainer.done, args.log_interval, world.main)
    progress.note(
        f"{args.model} of {parameters:,} parameters, TP {args.tp} x PP {args.pp} x EP {args.ep}, "
        f"{world.size} x {world.device}; unigram validation loss {unigram:.4f}; writing to {args.run_dir}"
    )
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
    progress.close()
    writer.close()
    results = {
        "final_val_loss": value,
        "unigram_val_loss": unigram,
        "tokens_per_second": trainer.tokens_per_second,
        "optimizer_seconds_share": trainer.optimizer_seconds / max(trainer.seconds, 1e-9),
        "steps": trainer.done,
        "world_size": world.size,
        "model": args.model,
        "parameters": parameters,
        "parallelism": {"tp": args.tp, "pp": args.pp, "ep": args.ep, "dp": trainer.data_size},
        "run_dir": str(args.run_dir),
    }
    if trainer.done < args.steps:
        progress.note(f"stopped after step {trainer.done}; continue with --resume --run-dir {args.run_dir}")
    elif world.main:
        plot_losses({f"{args.model} megatron": args.run_dir / METRICS}, args.run_dir / PLOT, unigram)
        (args.run_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps(results), flush=True)
    return results


def main() -> None:
    """Entry point."""
    args = parse_arguments()
    with open_world(args.device) as world:
        train(args, world)


if __name__ == "__main__":
    main()
