"""What every collective of a training step sends, takes and exposes, against ZeRO-1 AdamW in the same run.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m perf.comm [--json FILE] [--trace FILE]

Per collective, on rank 0, medians over steps:

  predicted  bytes this rank sends by the plan and the buckets
  measured   bytes it sent by the counters; a difference on any rank ends the run with an error
  alone      seconds of the same calls repeated one by one with nothing else to do
  exposed    seconds that the training step waited for them, late ranks included (`step_report()`)
  hidden     alone - exposed, where positive: what computation covered
  bus        bytes measured / seconds alone
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_muon import DistributedMuon, muon_param_groups
from distributed_muon.collectives import Collectives, Pending
from launch.models import MODELS, CausalLM, build_model, cast_parameters
from launch.world import World, open_world
from perf.links import timed
from perf.machine import describe_machine

# What `step_report()["communication"]` calls each collective, and what this page does.
LABELS = {
    "reduce_scatter": "reduce-scatter gradients",
    "all_reduce": "all-reduce agreement",
    "to_homes": "all-to-all to homes",
    "team": "teams",
    "from_homes": "all-to-all from homes",
    "all_gather": "all-gather parameters",
}
CONTENDERS = ("home", "gather", "adamw")
VOCABULARY, SEQUENCE = 256, 128


@dataclass(frozen=True)
class Call:
    """One collective that the optimizer issued: its label, and a function that does its like again."""

    label: str
    over: Collectives
    again: Callable[[], Pending]


class Recorder:
    """Notes every collective of one optimizer, so that it can be repeated alone, by wrapping its `Collectives`.

    Args:
        optimizer: observed from now on. device: of its parameters.

    Attributes:
        calls: since it was last cleared, in order.
    """

    def __init__(self, optimizer: DistributedMuon, device: torch.device) -> None:
        self._device = device
        self.calls: list[Call] = []
        self._wrap(optimizer.collectives)
        for team in optimizer._muon.teams.values():
            self._wrap(team, "team")

    def _wrap(self, observed: Collectives, label: str | None = None) -> None:
        fresh = Collectives(observed.group)  # repeats calls without being counted
        for kind in ("reduce_scatter", "all_gather", "all_to_all", "all_reduce"):
            setattr(observed, kind, self._noted(getattr(observed, kind), kind, label, fresh))

    def _noted(self, call: Callable[..., Any], kind: str, label: str | None, fresh: Collectives) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            if options.get("counted", True):
                # The name of an all-to-all is its last argument.
                name = label or (args[-1] if kind == "all_to_all" else kind)
                tensors = [(arg.numel(), arg.dtype) for arg in args if isinstance(arg, Tensor)]
                again = partial(self._repeat, getattr(fresh, kind), tensors, args[len(tensors) :], options)
                self.calls.append(Call(name, fresh, again))
            return call(*args, **options)

        return noted

    def _repeat(
        self,
        call: Callable[..., Any],
        tensors: Sequence[tuple[int, torch.dtype]],
        others: Sequence[Any],
        options: dict[str, Any],
    ) -> Pending:
        zeros = [torch.zeros(numel, dtype=dtype, device=self._device) for numel, dtype in tensors]
        result = call(*zeros, *others, **options)
        return result if isinstance(result, Pending) else Pending(())


def predicted_bytes(optimizer: DistributedMuon) -> dict[str, int]:
    """Bytes this rank sends in one step, by label, from the plan and the buckets alone."""
    plan, rank, size = optimizer.plan, optimizer.collectives.rank, optimizer.collectives.size
    out: Counter[str] = Counter(dict.fromkeys(LABELS, 0))
    for bucket in optimizer._buckets:
        out["reduce_scatter"] += bucket.spec.numel * 4 * (size - 1) // size
        out["all_gather"] += bucket.spec.numel * bucket.flat.element_size() * (size - 1) // size
    wire = plan.newton_schulz.element_bytes
    for wave in plan.schedule(rank):
        out["to_homes"] += sum(wave.gather.send_counts) * wire
        out["from_homes"] += sum(wave.scatter.send_counts) * wire
    # One fp64 norm and one presence flag per tensor; a flag per bucket, and two for wrong use.
    agreed = 8 * (2 * len(plan.layout.tensors) + len(optimizer._buckets) + 2)
    out["all_reduce"] = 2 * (agreed * (size - 1) // size)
    out["team"] = plan.team_bytes_by_rank[rank]
    return dict(out)


class Training:
    """A few steps of one small model with one optimizer, recorded.

    Args:
        name: "home", "gather" or "adamw". world: the ranks. args: the command line.
    """

    def __init__(self, name: str, world: World, args: argparse.Namespace) -> None:
        self.name, self._world = name, world
        torch.manual_seed(0)
        self._model = _model(args)
        cast_parameters(self._model, torch.bfloat16)
        self._model.to(world.device)
        if name == "adamw":
            groups = [{"params": list(self._model.named_parameters()), "algorithm": "adamw"}]
        else:
            groups = muon_param_groups(self._model)
        bucket_mb = None if args.layout == "flat" else args.bucket_mb
        strategy = "home" if name == "adamw" else name
        self.optimizer = DistributedMuon(groups, strategy=strategy, layout=args.layout, bucket_mb=bucket_mb)
        self.optimizer.track()
        self.optimizer.overlap_param_gather(self._model)
        self.recorder = Recorder(self.optimizer, world.device)
        generator = torch.Generator().manual_seed(world.rank)
        tokens = torch.randint(VOCABULARY, (args.batch_size, SEQUENCE + 1), generator=generator)
        self._tokens, self._targets = world.to_device(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def step(self) -> dict[str, Any]:
        """One training step; collective.

        Returns:
            The optimizer's report of this step with "step_seconds" of the whole of it. Parameter gathers that
            the forward waited for are those of the step before.
        """
        self._world.barrier()
        self.recorder.calls.clear()
        begin = time.perf_counter()
        self._model(self._tokens, self._targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._world.synchronize()
        return {"step_seconds": time.perf_counter() - begin, **self.optimizer.local_report()}

    def measure(self, steps: int) -> dict[str, Any]:
        """Medians over `steps` steps after one of warm-up; collective.

        Raises:
            RuntimeError: some rank sent other bytes than predicted.
        """
        self.step()
        reports = [self.step() for _ in range(steps)]
        predicted = predicted_bytes(self.optimizer)
        for report in reports:
            sent = {label: report["communication"].get(label, {}).get("bytes", 0) for label in LABELS}
            if any(_gathered(sent != predicted)):
                raise RuntimeError(f"{self.name}: bytes predicted {predicted}, rank {self._world.rank} sent {sent}")
        self.optimizer.wait_params()
        alone = self._alone(self.recorder.calls)
        rows = {
            label: self._row(label, reports, predicted[label], alone[label]) for label in LABELS if predicted[label]
        }
        phases = {key: statistics.median(r["seconds"].get(key, 0.0) for r in reports) for key in reports[-1]["seconds"]}
        return {
            "step_seconds": statistics.median(report["step_seconds"] for report in reports),
            "phases": phases,
            "collectives": rows,
            "sent_bytes_by_rank": _gathered(sum(predicted.values())),
        }

    def _row(self, label: str, reports: Sequence[dict[str, Any]], predicted: int, alone: float) -> dict[str, Any]:
        counts = [report["communication"][label] for report in reports]
        exposed = statistics.median(count["exposed_seconds"] for count in counts)
        return {
            "name": LABELS[label],
            "calls": counts[-1]["calls"],
            "bytes_predicted": predicted,
            "bytes_measured": counts[-1]["bytes"],
            "alone_seconds": alone,
            "exposed_seconds": exposed,
            "hidden_seconds": max(0.0, alone - exposed),
            "bus_bytes_per_second": counts[-1]["bytes"] / alone if alone else 0.0,
        }

    def _alone(self, calls: Sequence[Call], rounds: int = 3) -> dict[str, float]:
        """Seconds of the calls by label when repeated one by one; collective."""
        seconds: dict[str, float] = defaultdict(float)
        for call in calls:
            seconds[call.label] += statistics.median(
                timed(call.over, call.again, self._world.device) for _ in range(rounds)
            )
        return seconds

    def trace(self, path: Path) -> None:
        """One more step under torch.profiler, written by rank 0 as a Chrome trace; collective."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            self.step()
            self.optimizer.wait_params()  # a collective that outlives the profiler would crash it
        if self._world.main:
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))


def _model(args: argparse.Namespace) -> CausalLM:
    sizes: dict[str, object] = {"hidden_size": args.hidden_size, "num_hidden_layers": args.layers}
    sizes["intermediate_size"] = 3 * args.hidden_size
    return build_model(args.model, vocab_size=VOCABULARY, max_position_embeddings=SEQUENCE, **sizes)


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def print_report(name: str, result: dict[str, Any]) -> None:
    """The table of one optimizer."""
    print(f"\n{name}: {result['step_seconds'] * 1e3:.1f} ms per training step")
    print(f"  {'collective':26s} calls {'predicted':>12s} {'measured':>12s} {'alone':>9s} {'exposed':>9s} "
          f"{'hidden':>9s}      bus")  # fmt: skip
    for row in result["collectives"].values():
        times = " ".join(f"{row[f'{key}_seconds'] * 1e3:6.2f} ms" for key in ("alone", "exposed", "hidden"))
        counts = f"{row['calls']:5d} {row['bytes_predicted']:12,d} {row['bytes_measured']:12,d}"
        print(f"  {row['name']:26s} {counts} {times} "
              f"{row['bus_bytes_per_second'] / 1e9:6.3f} GB/s")  # fmt: skip


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="dense")
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4, help=f"samples of {SEQUENCE} tokens per rank")
    parser.add_argument("--layout", choices=("auto", "flat", "bucketed", "aligned"), default="bucketed")
    parser.add_argument("--bucket-mb", type=float, default=4.0, help="MiB of fp32 gradient per bucket")
    parser.add_argument("--steps", type=int, default=3, help="of which the median counts")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--trace", type=Path, default=Path("runs/comm_trace.json.gz"), help="Chrome trace of one step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here (rank 0)")
    return parser.parse_args(words)


def main() -> None:
    args = parse_arguments()
    with open_world(args.device) as world:
        if world.size == 1:
            raise SystemExit("error: one rank sends nothing: start with torchrun --nproc_per_node 2 or more")
        results = {}
        for name in CONTENDERS:
            training = Training(name, world, args)
            results[name] = training.measure(args.steps)
            if name == "home":
                training.trace(args.trace)
        if not world.main:
            return
        adamw = results["adamw"]["sent_bytes_by_rank"]
        print(f"{args.model}, {world.size} ranks, {dist.get_backend()}, layout {args.layout}, bf16 parameters")
        for name, result in results.items():
            result["traffic_over_adamw"] = sum(result["sent_bytes_by_rank"]) / sum(adamw)
            print_report(name, result)
        print("\ntraffic of all ranks over ZeRO-1 AdamW's: " +
              ", ".join(f"{name} {result['traffic_over_adamw']:.4f}" for name, result in results.items()))  # fmt: skip
        print(f"Chrome trace of a step of home: {args.trace}")
        if args.json:
            settings = {key: str(value) for key, value in vars(args).items() if key not in ("json", "trace")}
            command = f"torchrun --standalone --nproc_per_node {world.size} -m perf.comm {' '.join(sys.argv[1:])}"
            output = {"machine": describe_machine(command), "world": world.size, "backend": dist.get_backend(),
                      "settings": settings, "contenders": results}  # fmt: skip
            args.json.write_text(json.dumps(output, indent=1) + "\n")


if __name__ == "__main__":
    main()
