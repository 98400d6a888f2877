"""Pretrain the models of launch.pretrain under FSDP2 with distributed Muon.

    torchrun --standalone --nproc_per_node 2 -m launch.pretrain_fsdp2 --model moonlight
    torchrun --standalone --nproc_per_node 4 -m launch.pretrain_fsdp2 --replicate 2
    torchrun --standalone --nproc_per_node 4 -m launch.pretrain_fsdp2 --tp 2

Parameters and their masters are float32 and sharded; --dtype is what FSDP2 gathers and computes in. The last line on
stdout is a JSON object with the results.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from distributed_muon import muon_param_groups
from distributed_muon.integrations.fsdp2 import FullyShardedMuon
from launch import arguments
from launch.job import run_job
from launch.models import CausalLM, huggingface
from launch.own_loop import OwnLoopTrainer
from launch.tensor_parallel import parallelize
from launch.validation import validation_loss
from launch.world import World


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = arguments.trainer_parser(__doc__)
    parser.add_argument(
        "--replicate", type=int, default=1, help="copies of the shards: HSDP over so many groups of ranks"
    )
    parser.add_argument(
        "--tp", type=int, default=1, help="tensor-parallel size: neighbouring ranks that share heads, columns, experts"
    )
    arguments.add_muon_flags(parser).add_argument(
        "--strategy", choices=("auto", "home", "gather"), default="auto", help="where matrices are orthogonalized"
    )
    args = arguments.parse(parser, words)
    args.run_dir = args.run_dir or Path("runs") / f"{args.model}-{FullyShardedTrainer.kind}"
    return args


def shard(model: CausalLM, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Every block is a group of its own; embedding, norm and head are the root's."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


class FullyShardedTrainer(OwnLoopTrainer):
    """A run of `launch.loop.train` under FSDP2."""

    kind = "fsdp2"

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        if args.replicate < 1 or args.tp < 1 or world.size % (args.replicate * args.tp):
            raise ValueError(f"--replicate {args.replicate} x --tp {args.tp} does not divide the {world.size} ranks")
        super().__init__(args, world)
        self.data_rank, self.data_size = world.rank // args.tp, world.size // args.tp
        self.model = self._whole_model(world.device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        sizes = {"replicate": args.replicate, "shard": self.data_size // args.replicate, "tp": args.tp}
        axes = [axis for axis, size in sizes.items() if size > 1 or axis == "shard"]
        mesh = init_device_mesh(world.device.type, [sizes[axis] for axis in axes], mesh_dim_names=axes)
        if args.tp > 1:
            parallelize(self.model, mesh["tp"])
        shard(self.model, mesh[tuple(axis for axis in axes if axis != "tp")], arguments.DTYPES[args.dtype])
        self.title = f"FSDP2 {' x '.join(f'{axis} {sizes[axis]}' for axis in axes)}"
        groups = muon_param_groups(self.model, vector_weight_decay=0.0)
        options = {"weight_decay": args.weight_decay, **arguments.muon_options(args), "nonfinite": args.nonfinite}
        self.optimizer = FullyShardedMuon(groups, lr=args.lr, **options)
        self.start_or_resume()

    def _whole_model(self, device: torch.device) -> CausalLM:
        args = argparse.Namespace(**{**vars(self.args), "dtype": "fp32"})
        return arguments.make_model(args, self.data.vocab_size, device)

    def reducing(self, reduces: bool) -> AbstractContextManager[Any]:
        """FSDP2's reduce-scatters."""
        self.model.set_requires_gradient_sync(reduces)
        return nullcontext()

    def validate(self) -> float:
        """Validation loss over as many batches on every rank, which FSDP2 needs; collective."""
        share = self.data_rank, self.data_size
        samples = min(self.args.validation_samples, len(self.data.validation)) // self.data_size * self.data_size
        return validation_loss(
            self.model, self.data, self.world, samples or self.data_size, self.args.batch_size, share
        )

    def export(self, folder: Path) -> None:
        """The model as a Hugging Face checkpoint; collective."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.model, options=options)
        if self.world.main:
            whole = self._whole_model(torch.device("cpu"))
            whole.load_state_dict(state)
            huggingface.save(whole, folder, arguments.DTYPES[self.args.dtype])
        self.world.barrier()

    def explain(self) -> str:
        """Homes and waves of the matrices."""
        return "\n".join(plan.explain() for plan in self.optimizer.plans)

    def results(self) -> dict[str, Any]:
        """How the ranks are arranged."""
        sizes = {"tp": self.args.tp, "replicate": self.args.replicate, "dp": self.data_size}
        return {"parallelism": sizes, "skipped_steps": self.skipped}


def main() -> None:
    """Entry point."""
    run_job(FullyShardedTrainer, parse_arguments)


if __name__ == "__main__":
    main()
