"""One optimizer step of a Megatron-core job: ours against megatron-core's own Muon, in the same run.

    OMP_NUM_THREADS=1 python -m perf.megatron_step [--ranks 4] [--tp 2] [--ep 1] [--rounds 7] [--json FILE]

Needs megatron-core 0.19 with emerging-optimizers. Runs on gloo through the tests' CPU shim. Every contender has
the same model, parallelism and gradients; they take turns within a round. A step is gradient reduction, norm and
clipping, Newton-Schulz, update and parameter gathering; bytes are counted at torch.distributed, by what leaves a
rank in a ring. First, with matched settings, the direction of every matrix's update is compared with both of
Megatron's tensor-parallel modes: "duplicated", which is the same arithmetic, and "blockwise", which orthogonalizes
every rank's slice by itself. With --ep above 1 the model is a mixture of four experts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from launch.environment import describe_machine
from perf.options import at_least_one, output_file, write_json
from perf.wire import WireCounter
from tests.integrations import megatron_cpu
from tests.integrations.megatron_job import Case, Job
from tests.spawn import run_ranks

MODEL = {"hidden_size": 256, "ffn_hidden_size": 704, "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 32}
# Megatron names Keller Jordan's table "simple"; scale 0.2 sqrt(max) and plain momentum on both sides.
THEIRS = {
    "optimizer": "muon",
    "muon_momentum": 0.95,
    "muon_nesterov": True,
    "muon_coefficient_type": "simple",
    "muon_extra_scale_factor": 0.2,
    "muon_tp_mode": "duplicated",
    "muon_fp32_matmul_prec": "highest",
}


EXPERTS = {"moe_ffn_hidden_size": 352, "moe_shared_expert_intermediate_size": 352}


def base_case(tp: int, ep: int) -> Case:
    """The job that all contenders train."""
    return Case(tp=tp, ep=ep, etp=1 if ep > 1 else None, moe=ep > 1, model={**MODEL, **(EXPERTS if ep > 1 else {})})


def contenders(base: Case) -> dict[str, Callable[[], Job]]:
    """Builders by name."""
    from megatron.core.optimizer import get_megatron_optimizer

    def ours(ns_dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[], Job]:
        muon = {"ns_dtype": ns_dtype, "ns_form": "standard"}
        return lambda: Job(base.but(dtype=torch.bfloat16, optimizer=muon, **options))

    def theirs(mode: str = "duplicated", **options: Any) -> Callable[[], Job]:
        layer_wise = {"use_layer_wise_distributed_optimizer": options.get("layer_wise", False)}
        case = base.but(dtype=torch.bfloat16, config={**THEIRS, **layer_wise, "muon_tp_mode": mode}, **options)
        return lambda: Job(case, get_megatron_optimizer)

    found = {
        "distributed_muon": ours(),
        "distributed_muon, aligned layout": ours(aligned=True),
        "distributed_muon, bf16 Newton-Schulz": ours(torch.bfloat16),
    }
    for mode in modes(base):
        found[f"Megatron Muon {mode}"] = theirs(mode, distributed=False)
        found[f"Megatron Muon {mode}, LayerWise"] = theirs(mode, layer_wise=True)
    return found


def modes(base: Case) -> tuple[str, ...]:
    """Megatron's tensor-parallel modes that differ."""
    return ("duplicated", "blockwise") if base.tp > 1 else ("duplicated",)


def directions(base: Case, mode: str = "duplicated") -> dict[str, float]:
    """Smallest cosine between ours and theirs over every matrix's update, in fp32, for three steps."""
    from distributed_muon.layout.matrices import Whole

    config = {"weight_decay": 0.0, "clip_grad": 0.0}
    # Megatron does not divide gate and up: so here ours does not, either.
    muon = {"overrides": {"*linear_fc1.weight": Whole()}}
    ours = Job(base.but(config=config, optimizer=muon))
    from megatron.core.optimizer import get_megatron_optimizer

    settings = {**config, **THEIRS, "muon_tp_mode": mode}
    theirs = Job(base.but(config=settings, distributed=False), get_megatron_optimizer)
    smallest: dict[str, float] = {}
    before = {"ours": ours.weights(), "theirs": theirs.weights()}
    for step in range(3):
        after = {}
        for name, job in (("ours", ours), ("theirs", theirs)):
            job.set_gradients(step)
            job.optimizer.step()
            after[name] = job.weights()
        for key, start in before["ours"].items():
            if start.ndim == 2 and "embedding" not in key and "output_layer" not in key:
                moves = [(after[side][key] - before[side][key]).double().flatten() for side in ("ours", "theirs")]
                kind = key.rsplit(".", 2)[-2]
                cosine = float(torch.cosine_similarity(*moves, dim=0))
                smallest[kind] = min(smallest.get(kind, 1.0), cosine)
                smallest["length ratio"] = float(moves[0].norm() / moves[1].norm())
        before = after
    return smallest


def state_bytes(optimizer: Any) -> int:
    """Bytes of masters and state of an optimizer and its children; masters that are the parameter are not counted."""
    children = getattr(optimizer, "chained_optimizers", None)
    if children is not None:
        return sum(map(state_bytes, children))
    inner = optimizer.optimizer
    params = [param for group in inner.param_groups for param in group["params"]]
    held = sum(param.nbytes for param in params if param.dtype == torch.float32)
    return held + sum(
        value.nbytes
        for state in inner.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and value.ndim and key != "master_param"
    )


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    dist.barrier()
    start = time.perf_counter()
    yield
    dist.barrier()
    seconds.append(time.perf_counter() - start)


def measure(rank: int, world: int, tp: int, ep: int, rounds: int) -> dict[str, Any]:
    megatron_cpu.install()
    counter = WireCounter()
    counter.__enter__()  # for the life of the process
    base = base_case(tp, ep)
    result: dict[str, Any] = {"cosine": {mode: directions(base, mode) for mode in modes(base)}, "contenders": {}}
    jobs = {name: build() for name, build in contenders(base).items()}
    steps: dict[str, list[float]] = {name: [] for name in jobs}
    sent: dict[str, dict[str, int]] = {}
    for number in range(rounds + 2):
        for name, job in jobs.items():
            job.set_gradients(number)
            counter.on = number == 1  # the first two rounds warm up and count, the others are timed
            with timed(steps[name]):
                for chunk in job.chunks:
                    chunk.finish_grad_sync()
                job.optimizer.step()
            if counter.on:
                counter.on, sent[name] = False, dict(counter.sent)
                counter.sent.clear()
    for name, job in jobs.items():
        held: list[Any] = [None] * world
        dist.all_gather_object(held, (state_bytes(job.optimizer), sum(sent[name].values())))
        result["contenders"][name] = {
            "seconds": statistics.median(steps[name][2:]),
            "fastest": min(steps[name][2:]),
            "state_bytes": [state for state, _ in held],
            "sent_bytes": [count for _, count in held],
            "sent_by": sent[name],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=at_least_one, default=4)
    parser.add_argument("--tp", type=at_least_one, default=2)
    parser.add_argument("--ep", type=at_least_one, default=1)
    parser.add_argument("--rounds", type=at_least_one, default=7)
    parser.add_argument("--json", type=output_file, help="also write the result there")
    args = parser.parse_args()
    result = run_ranks(measure, args.ranks, args.tp, args.ep, args.rounds, timeout=500)[0]
    command = f"python -m perf.megatron_step --ranks {args.ranks} --tp {args.tp} --ep {args.ep} --rounds {args.rounds}"
    result["machine"] = describe_machine(command)
    machine = result["machine"]
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['versions']}, {machine['date']}")
    print(f"TP {args.tp} x DP {args.ranks // args.tp}, EP {args.ep}, on gloo, 4 layers of {MODEL}")
    print("bf16 parameters, fp32 Newton-Schulz where not said")
    print("smallest cosine between our update and Megatron's, over layers and three steps:")
    for mode, cosine in result["cosine"].items():
        print(f"  {mode}: " + ", ".join(f"{kind} {value:.6f}" for kind, value in cosine.items()))
    columns = ("s per step", "fastest", "state MB, max rank", "mean", "sent MB, max rank", "mean")
    print(" " * 38 + "".join(f"{column:>{max(10, len(column) + 2)}}" for column in columns))
    for name, row in result["contenders"].items():
        values = [row["seconds"], row["fastest"]]
        for key in ("state_bytes", "sent_bytes"):
            values += [max(row[key]) / 1e6, statistics.mean(row[key]) / 1e6]
        cells = zip(columns, values, strict=True)
        print(f"{name:38}" + "".join(f"{value:{max(10, len(column) + 2)}.4f}" for column, value in cells))
    write_json(args.json, result)


if __name__ == "__main__":
    main()
