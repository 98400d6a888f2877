"""Megatron-LM's pretrain_gpt.py with distributed Muon: the same command line, in Megatron-LM's folder, but this file.

    torchrun --nproc_per_node 8 /path/to/launch/pretrain_gpt_muon.py --optimizer adam --use-distributed-optimizer ...

Nothing of Megatron-LM is edited: its training loop builds this project's optimizer where it would build AdamW.
--muon-* flags count where they mean the same here and are refused by name elsewhere. `--load` of a checkpoint that
Megatron's own Muon or AdamW saved (`torch_dist`, one tensor per parameter) takes its optimizer state over. A failure is
one line, of the rank that failed first; its traceback lies in the folder errors of --save.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launch.failure import JobFailure

SCRIPT = "pretrain_gpt.py"
FAILURE = JobFailure()


def make_optimizer(config: Any, model_chunks: Any, *args: Any, **keywords: Any) -> Any:
    """As `megatron.core.optimizer.get_megatron_optimizer`; collective over the world.

    Raises:
        SystemExit: a checkpoint format or a --muon-* flag that is not supported, by name.
    """
    from megatron.core import dist_checkpointing
    from megatron.training import get_args
    from megatron.training.checkpointing import checkpoint_exists, get_load_checkpoint_path_by_args

    from distributed_muon.integrations.megatron import get_distributed_muon_optimizer
    from distributed_muon.integrations.megatron_checkpoint import is_foreign
    from distributed_muon.integrations.megatron_options import muon_options

    given = get_args()
    FAILURE.store = dist.PrefixStore("launch", dist.distributed_c10d._get_default_store())
    FAILURE.folder = Path(given.save, "errors") if given.save else None
    # Ours loads at any parallelism, and Megatron-LM asks this flag whether it may.
    given.dist_ckpt_optim_fully_reshardable = True
    said = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in sys.argv if word.startswith("--muon-")}
    said = {{"muon_no_split_qkv": "muon_split_qkv"}.get(name, name) for name in said}
    try:
        options = muon_options(given, said)
        if checkpoint_exists(given.load) and not (given.finetune or given.no_load_optim):
            path = get_load_checkpoint_path_by_args(given)
            if dist_checkpointing.check_is_distributed_checkpoint(path) and is_foreign(path):
                options["take_over"] = path
        return get_distributed_muon_optimizer(config, model_chunks, *args, **keywords, **options)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def main() -> None:
    """Entry point."""
    with FAILURE.reported():
        if not os.path.isfile(SCRIPT):
            sys.exit(f"error: {SCRIPT} is not in {os.getcwd()}: start in the root folder of Megatron-LM")
        sys.path.insert(0, os.getcwd())
        from megatron.training import training

        training.get_megatron_optimizer = make_optimizer
        runpy.run_path(SCRIPT, run_name="__main__")


if __name__ == "__main__":
    main()
