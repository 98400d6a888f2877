"""Pretrain a language model with distributed Muon or ZeRO-1 AdamW, in plain PyTorch.

    torchrun --standalone --nproc_per_node 2 -m launch.pretrain --model moonlight
    python -m launch.pretrain --model dense --optimizer adamw      # one process

The last line on stdout is a JSON object with the results.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from distributed_muon import DistributedMuon, muon_param_groups
from launch import arguments
from launch.job import run_job
from launch.models import CausalLM
from launch.own_loop import OwnLoopTrainer
from launch.world import World


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; every default together is the job of `make train`."""
    parser = arguments.trainer_parser(__doc__)
    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="for hidden matrices")
    arguments.add_muon_flags(parser).add_argument(
        "--strategy", choices=("auto", "home", "gather"), default="auto", help="where matrices are orthogonalized"
    )
    optimizer.add_argument("--layout", choices=("auto", "flat", "bucketed", "aligned"), default="auto")
    optimizer.add_argument("--bucket-mb", type=float, help="MiB of fp32 gradient per bucket")
    optimizer.add_argument(
        "--overlap-param-gather", action="store_true", help="all-gather parameters under the next forward"
    )
    args = arguments.parse(parser, words)
    args.run_dir = args.run_dir or Path("runs") / f"{args.model}-{args.optimizer}"
    return args


def make_optimizer(args: argparse.Namespace, model: CausalLM) -> DistributedMuon:
    """Muon for hidden matrices and AdamW for the rest, or AdamW for everything; ZeRO-1 either way."""
    if args.optimizer == "muon":
        groups = muon_param_groups(model, vector_weight_decay=0.0)
    else:
        matrices, vectors = ([(n, p) for n, p in model.named_parameters() if (p.ndim > 1) == b] for b in (True, False))
        groups = [
            {"params": matrices, "algorithm": "adamw"},
            {"params": vectors, "algorithm": "adamw", "weight_decay": 0.0},
        ]
    optimizer = DistributedMuon(
        groups,
        lr=args.lr,
        weight_decay=args.weight_decay,
        **arguments.muon_options(args),
        layout=args.layout,
        bucket_mb=args.bucket_mb,
        nonfinite=args.nonfinite,
    )
    if args.overlap_param_gather:
        optimizer.overlap_param_gather(model)
    return optimizer


class PlainTrainer(OwnLoopTrainer):
    """A run of `launch.loop.train` in plain PyTorch."""

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        super().__init__(args, world)
        self.kind = self.title = args.optimizer
        self.model = arguments.make_model(args, self.data.vocab_size, world.device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.optimizer = make_optimizer(args, self.model)
        self.start_or_resume()

    def reducing(self, reduces: bool) -> AbstractContextManager[Any]:
        """The optimizer's own reduce-scatters."""
        return nullcontext() if reduces else self.optimizer.no_sync()

    def export(self, folder: Path) -> None:
        """The model as a Hugging Face checkpoint; collective."""
        self.optimizer.wait_params()
        super().export(folder)

    def explain(self) -> str:
        """Homes and waves of the matrices."""
        return self.optimizer.plan.explain()

    def results(self) -> dict[str, Any]:
        """The chosen optimizer."""
        return {"optimizer": self.args.optimizer, "skipped_steps": self.skipped}


def main() -> None:
    """Entry point."""
    run_job(PlainTrainer, parse_arguments)


if __name__ == "__main__":
    main()
