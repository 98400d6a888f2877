"""Pretrain GPT or Moonlight from megatron-core's modules with distributed Muon, under any TP x PP x EP x DP.

    torchrun --standalone --nproc_per_node 8 -m launch.pretrain_megatron --tp 2 --pp 2 --config run.yaml

Every flag may also stand in the YAML file of --config, by its name; flags on the command line win. The last line
on stdout is a JSON object with the results.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor, nn

from distributed_muon.integrations.megatron import get_distributed_muon_optimizer
from launch import arguments
from launch.job import run_job
from launch.megatron_models import TRANSFORMER_ENGINE, build_chunks, transformer_config
from launch.schedule import warmup_cosine
from launch.trainer import Trainer
from launch.world import World

Batch = list[Tensor]


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, after the flags of the --config file."""
    parser = arguments.trainer_parser(__doc__)
    parser.add_argument(
        "--init",
        choices=("plain", "megatron"),
        default="plain",
        help="initial weights: the plain trainer's of this seed, built whole on every rank, or Megatron's own",
    )
    parallel = parser.add_argument_group("parallelism", "data parallelism takes the ranks that are left")
    parallel.add_argument("--tp", type=int, default=1, help="tensor-parallel size, with sequence parallelism")
    parallel.add_argument("--pp", type=int, default=1, help="pipeline stages")
    parallel.add_argument("--vpp", type=int, help="model chunks per stage (interleaved schedule)")
    parallel.add_argument("--ep", type=int, default=1, help="expert-parallel size")
    parallel.add_argument("--etp", type=int, help="tensor-parallel size of experts; that of --tp if not given")
    parallel.add_argument("--overlap", action="store_true", help="of gradient reduction and parameter gathering")
    parallel.add_argument("--bucket-mb", type=float, help="MiB of fp32 gradient per bucket, with --overlap")
    parallel.add_argument("--aligned", action="store_true", help="shard-aligned buffers (megatron-core 0.19 on)")
    arguments.add_muon_flags(parser).add_argument(
        "--strategy", choices=("auto", "home", "gather"), default="auto", help="where matrices are orthogonalized"
    )
    args = arguments.parse(parser, words)
    args.run_dir = args.run_dir or Path("runs") / f"{args.model}-{MegatronTrainer.kind}"
    return args


class MegatronTrainer(Trainer):
    """A run of `launch.loop.train` under Megatron-core."""

    kind = "megatron"

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        _check_arguments(args, world)
        super().__init__(args, world)
        self.title = f"TP {args.tp} x PP {args.pp} x EP {args.ep}"
        self.config = transformer_config(args)
        if world.main and self.config.multi_latent_attention and args.tp > 1 and not TRANSFORMER_ENGINE:
            # Its gather of the projection's parts has a backward that does not sum over the ranks' heads.
            print("note: without Transformer Engine, Megatron's MLA loses gradient of the rotary key under --tp > 1")
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
            **arguments.muon_options(args),
        )
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        if args.overlap:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        if self.begin is not None:
            with self.resuming(self.optimizer):
                self.go_on(self.run.load(self.run.verified(self._load)))

    @property
    def parameters(self) -> int:
        """Parameters of the model, tensor-parallel and tied copies counted once; collective."""
        counted = sum(p.master.numel() for p in self.optimizer.chained_optimizers[0].owned if not p.master.shared)
        return int(self.world.sum(counted)[0])

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
        tokens, targets = next(batches)
        length = self.args.sequence_length
        positions = torch.arange(length, device=tokens.device).expand(len(tokens), -1)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)

        def mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = losses.float().mean()
            return loss, {"loss": loss.detach().clone()}

        return model(tokens, positions, mask, labels=targets), mean

    def forward_backward(self) -> tuple[float, float]:
        """Megatron's schedule over the microbatches; losses are on the last pipeline stage only."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(self.microbatches, self.args.accumulation, forward_only=False)

    def update(self) -> dict[str, float]:
        """The optimizer step at the schedule's learning rate."""
        args = self.args
        lr = args.lr * warmup_cosine(self.done, args.steps, args.warmup, args.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        success, norm, _ = self.optimizer.step()
        if not success:
            if args.nonfinite == "skip":
                return {"lr": lr, "grad_norm": math.nan, "skipped": 1}
            bad = self.optimizer.chained_optimizers[0].nonfinite()
            raise FloatingPointError(f"gradient of parameter {bad[0]!r} has inf or nan ({len(bad)} parameters in all)")
        return {"lr": lr, "grad_norm": norm}

    def optimizer_seconds(self) -> dict[str, float]:
        """Of the Muon domains and AdamW; Megatron's own collectives are not among them."""
        return self.optimizer.chained_optimizers[0].step_report()["seconds"]

    def validate(self) -> float:
        """Validation loss now, over as many whole microbatches as the held-out samples fill; collective."""
        args = self.args
        batches = self.data.validation_batches(args.validation_samples, self.data_rank, self.data_size, args.batch_size)
        whole = [self.world.to_device(*batch) for batch in batches if len(batch[0]) == args.batch_size]
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
        return {**model, "optimizer": optimizer, **self.progress()}

    def save(self) -> None:
        """Checkpoint now, unless it is there; collective."""

        def write(path: Path) -> None:
            if self.world.main:
                path.mkdir(parents=True)
            self.world.barrier()
            for chunk in self.chunks:
                if self.args.overlap:
                    chunk.start_param_sync(force_sync=True)
            dist_checkpointing.save(self._state(is_loading=False), str(path))

        self.run.save(self.done, self.run.complete(write))

    def _load(self, path: Path) -> dict[str, Any]:
        state = dist_checkpointing.load(self._state(is_loading=True), str(path))
        for index, chunk in enumerate(self.chunks):
            chunk.module.load_state_dict(state[f"model{index}"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state

    # ---- records ---------------------------------------------------------------------------------------

    def explain(self) -> str:
        """Where every parameter of this rank went, and the plans."""
        return self.optimizer.chained_optimizers[0].explain()

    def results(self) -> dict[str, Any]:
        """The parallelism."""
        args = self.args
        return {
            "skipped_steps": self.skipped,
            "parallelism": {"tp": args.tp, "pp": args.pp, "ep": args.ep, "dp": self.data_size},
        }


def _check_arguments(args: argparse.Namespace, world: World) -> None:
    """Raises a ValueError for flags that cannot be together, and where there is no GPU."""
    try:
        torch.cuda.current_device()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"megatron-core wants a GPU ({str(error).splitlines()[0]}): without one, start -m "
            "tests.integrations.megatron_cpu launch.pretrain_megatron, which lets the CPU answer for it"
        ) from None
    for name in ("tp", "pp", "ep", "etp", "vpp"):
        size = getattr(args, name)
        if size is not None and size < 1:
            raise ValueError(f"--{name} {size}: must be at least 1")
    if world.size % (args.tp * args.pp):
        raise ValueError(f"{world.size} ranks are not a multiple of --tp {args.tp} x --pp {args.pp}")
    if args.vpp and args.pp == 1:
        raise ValueError(f"--vpp {args.vpp}: chunks of a stage need stages, so give --pp 2 or more")
    layers = arguments.model_config(args, 1).num_hidden_layers
    if layers % (args.pp * (args.vpp or 1)):
        chunks = f"--pp {args.pp}" + f" x --vpp {args.vpp}" * bool(args.vpp)
        raise ValueError(f"{layers} layers are not a multiple of {chunks}: change it or --num-hidden-layers")
    if args.vpp and args.accumulation % args.pp:
        raise ValueError(f"--accumulation {args.accumulation}: with --vpp it must be a multiple of --pp {args.pp}")
    if args.model == "dense" and (args.ep > 1 or args.etp):
        raise ValueError("--ep and --etp cut experts, and --model dense has none: leave them out")
    if args.bucket_mb is not None and not args.overlap:
        raise ValueError("--bucket-mb counts with --overlap, as Megatron has one bucket without: add it or drop this")
    if args.aligned and find_spec("megatron.core.optimizer.param_layout") is None:
        raise ValueError(
            f"--aligned: megatron-core {megatron.core.__version__} cannot lay buffers out: use 0.19 or later"
        )
    if args.background_saves:
        raise ValueError("--background-saves: Megatron writes its own files; the plain and FSDP2 trainers can")
    if args.save_hf is not None:
        raise ValueError("--save-hf: Megatron's modules are not written so; the plain and DeepSpeed trainers can")
    if args.init_from is not None and args.init != "plain":
        raise ValueError(f"--init {args.init} with --init-from: the checkpoint is loaded with --init plain")


def main() -> None:
    """Entry point."""
    run_job(MegatronTrainer, parse_arguments)


if __name__ == "__main__":
    main()
