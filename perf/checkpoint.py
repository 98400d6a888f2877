"""Times checkpoints of a model of many parameters beside torch.distributed.checkpoint's, of the same shards.

    python -m perf.checkpoint [--parameters 100] [--ranks 2] [--rounds 5] [--json FILE]

Both write fp32 masters and momentum down to the disk: ours flat shards, checksums and an index, DCP the model (which it
shares out over the ranks) and the momentum's flat shards. "exposed" is how long `save(wait=False)` holds training up:
the call, and after a forward and backward what the step that follows would wait. "training" is a forward and backward
alone, "training beside a save" one that shares its cores with the copying and writing. Rounds alternate; files are read
back from the page cache. Medians over rounds, of the slowest rank.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from distributed_muon import DistributedMuon, checkpoint
from perf.options import at_least_one, output_file, write_json
from tests.spawn import run_ranks

SIDE = 1000  # of the matrices, each of a million parameters
TOKENS = 64  # of a microbatch


def measure(rank: int, world: int, millions: int, rounds: int, folder: str) -> dict[str, list[float]]:
    """Seconds of every round, of the slowest rank, by what was timed."""
    warnings.filterwarnings("ignore")
    model = nn.ParameterDict({f"w{i}": nn.Parameter(torch.randn(SIDE, SIDE)) for i in range(millions)})
    optimizer = DistributedMuon(list(model.named_parameters()))
    for p in optimizer.sharded_parameters:
        p.momentum.normal_()
    state = _dcp_state(model, optimizer)
    path, seconds = Path(folder), {}

    def timed(name: str, work: Callable[[], Any], clean: bool = False) -> Any:
        dist.barrier()
        begin = time.perf_counter()
        out = work()
        passed = torch.tensor([time.perf_counter() - begin])
        dist.all_reduce(passed, dist.ReduceOp.MAX)
        seconds.setdefault(name, []).append(passed.item())
        if clean and rank == 0:
            for old in path.iterdir():
                shutil.rmtree(old)
        return out

    for _ in range(rounds + 1):  # the first is not counted: buffers, groups, and files that are new
        timed("save", lambda: checkpoint.save(path / "ours", model, optimizer))
        timed("load", lambda: checkpoint.load(path / "ours", model, optimizer), clean=True)
        timed("dcp save", lambda: dcp.save(state, checkpoint_id=path / "dcp"))
        timed("dcp load", lambda: dcp.load(state, checkpoint_id=path / "dcp"), clean=True)
        timed("training", lambda: _forward_backward(model))
        begin = time.perf_counter()
        saving = timed("call", lambda: checkpoint.save(path / "ours", model, optimizer, wait=False))
        timed("training beside a save", lambda: _forward_backward(model))
        timed("wait of the step", optimizer._engine.settle)
        saving.wait()
        seconds.setdefault("in the background", []).append(time.perf_counter() - begin)
        timed("to the end", lambda: None, clean=True)
    del seconds["to the end"]
    seconds["exposed"] = [sum(both) for both in zip(seconds["call"], seconds["wait of the step"], strict=True)]
    return {name: values[1:] for name, values in seconds.items()}


def _forward_backward(model: nn.ParameterDict) -> None:
    """Of a microbatch; gradients are dropped without being reduced."""
    x = torch.ones(TOKENS, SIDE)
    for weight in model.values():
        x = F.linear(x, weight)
    torch.autograd.grad(x.sum(), list(model.values()))


def _dcp_state(model: nn.Module, optimizer: DistributedMuon) -> dict[str, Any]:
    """The same tensors for DCP: the model, and the momentum as one DTensor per bucket, cut as ours is."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, Any] = {"model": model.state_dict()}
    for number, bucket in enumerate(optimizer._buckets):
        momentum: Tensor = bucket.part.moments["momentum_buffer"] if bucket.part.shards else torch.empty(0)
        state[f"momentum.{number}"] = DTensor.from_local(momentum, mesh, [Shard(0)])
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=at_least_one, default=100, metavar="N", help="millions (%(default)s)")
    parser.add_argument("--ranks", type=at_least_one, default=2, metavar="N")
    parser.add_argument("--rounds", type=at_least_one, default=5, metavar="N")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    args = parser.parse_args()
    folder = tempfile.mkdtemp()
    try:
        rounds = run_ranks(measure, args.ranks, args.parameters, args.rounds, folder, timeout=800)[0]
    finally:
        shutil.rmtree(folder)
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    result = {
        "millions of parameters": args.parameters,
        "ranks": args.ranks,
        "rounds": args.rounds,
        "seconds": rounds,
        "median seconds": medians,
        "save over DCP's": medians["save"] / medians["dcp save"],
        "load over DCP's": medians["load"] / medians["dcp load"],
        "exposed share of a save": medians["exposed"] / medians["save"],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
    }
    for name, value in result.items():
        print(f"{name}: {value if not isinstance(value, float) else round(value, 3)}")
    write_json(args.json, result)


if __name__ == "__main__":
    main()
