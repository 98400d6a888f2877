"""What every collective of a training step sends, takes and exposes, against ZeRO-1 AdamW in the same run.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m perf.comm [--json FILE] [--trace FILE]

Per collective, on rank 0, medians over steps:

  predicted  bytes this rank sends by the plan and the buckets
  measured   bytes it sent by the counters; a difference on any rank ends the run with an error
  alone      seconds of the same calls repeated one by one with nothing else to do
  exposed    seconds that the training step waited for them, late ranks included (`step_report()`); the JSON has
             beside it the least of all ranks, which is what the ranks that came last waited
  hidden     alone - exposed, where positive: what computation covered
  overlap    hidden / alone
  algbw      as nccl-tests define it (`perf.bandwidth`): bytes of the whole buffer / seconds alone
  busbw      likewise: bytes measured / seconds alone

Steps follow each other as in training, so the gathers that a step leaves under way are waited for in the next. A step
ends when its own computation does; the slowest rank's median counts. For `perf.scale --check`, which predicts these
steps, the slowest rank's seconds of the computation by itself are measured too: forward and backward without a
collective, and Newton-Schulz of each shape in stacks as large as a home's.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_muon import DistributedMuon, muon_param_groups
from distributed_muon.engine.collectives import Collectives, Pending
from distributed_muon.engine.newton_schulz import orthogonalize
from distributed_muon.layout.plan import Plan
from launch.environment import describe_machine
from launch.models import MODELS, CausalLM, build_model, cast_parameters
from launch.world import World, open_world
from perf.bandwidth import algorithm_rate, overlap
from perf.links import run_seconds, started_as, timed
from perf.options import at_least_one, output_file, positive, write_json

# What `step_report()["communication"]` calls each collective, and what this page does.
LABELS = {
    "reduce_scatter": "reduce-scatter gradients",
    "all_reduce": "all-reduce agreement",
    "to_homes": "all-to-all to homes",
    "team": "teams",
    "from_homes": "all-to-all from homes",
    "all_gather": "all-gather parameters",
}
STRATEGIES = ("home", "gather")
VOCABULARY, SEQUENCE = 256, 128


@dataclass(frozen=True)
class Call:
    """One collective that the optimizer issued: its label, and a function that prepares its like."""

    label: str
    over: Collectives
    prepare: Callable[[], Callable[[], Pending]]


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
        for team in optimizer._engine.teams.values():
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
                prepare = partial(self._prepare, getattr(fresh, kind), tensors, args[len(tensors) :], options)
                self.calls.append(Call(name, fresh, prepare))
            return call(*args, **options)

        return noted

    def _prepare(
        self,
        call: Callable[..., Any],
        tensors: Sequence[tuple[int, torch.dtype]],
        others: Sequence[Any],
        options: dict[str, Any],
    ) -> Callable[[], Pending]:
        # Written, so that fetching pages is not timed.
        ones = [torch.ones(numel, dtype=dtype, device=self._device) for numel, dtype in tensors]

        def again() -> Pending:
            result = call(*ones, *others, **options)
            return result if isinstance(result, Pending) else Pending(())

        return again


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
    # fp64: the norm, two of the options' hash, a flag per tensor and per bucket, one for what cannot be followed, and
    # one for what was written into parameters.
    agreed = 8 * (4 + len(plan.layout.tensors) + len(optimizer._buckets) + 1)
    out["all_reduce"] = 2 * (agreed * (size - 1) // size)
    out["team"] = plan.team_bytes_by_rank[rank]
    return dict(out)


class Training:
    """A few steps of one small model with one optimizer, recorded.

    Args:
        name: a strategy of DistributedMuon, or "adamw". world: the ranks. args: the command line.
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
            The optimizer's report of this step, with "end": when it was over on this rank. Parameter gathers that
            the forward waited for are those of the step before.
        """
        self.recorder.calls.clear()
        self._model(self._tokens, self._targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._synchronize()
        return {"end": time.perf_counter(), **self.optimizer.local_report()}

    def _synchronize(self) -> None:
        # Not the device: gathers under way on NCCL's stream belong to the next step.
        if self._world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def measure(self, steps: int) -> dict[str, Any]:
        """Medians over `steps` steps after two of warm-up; collective.

        Raises:
            RuntimeError: some rank sent other bytes than predicted.
        """
        self._world.barrier()
        self.step()
        end = self.step()["end"]
        reports = []
        for _ in range(steps):
            report = self.step()
            reports.append({**report, "step_seconds": report["end"] - end})
            end = report["end"]
        self.optimizer.wait_params()
        predicted = predicted_bytes(self.optimizer)
        for report in reports:
            sent = {label: report["communication"].get(label, {}).get("bytes", 0) for label in LABELS}
            if any(self._world.gather(sent != predicted)):
                raise RuntimeError(f"{self.name}: bytes predicted {predicted}, rank {self._world.rank} sent {sent}")
        alone = self._alone(self.recorder.calls)
        used = [label for label in LABELS if predicted[label]]
        exposed = {
            label: statistics.median(report["communication"][label]["exposed_seconds"] for report in reports)
            for label in used
        }
        by_rank = self._world.gather(exposed)
        rows = {label: self._row(label, reports[-1], predicted[label], alone[label], exposed[label]) for label in used}
        for label, row in rows.items():
            row["exposed_seconds_least"] = min(seconds[label] for seconds in by_rank if label in seconds)
        phases = {key: statistics.median(r["seconds"].get(key, 0.0) for r in reports) for key in reports[-1]["seconds"]}
        return {
            "step_seconds": self._slowest(report["step_seconds"] for report in reports),
            "phases": phases,
            "collectives": rows,
            "sent_bytes_by_rank": self._world.gather(sum(predicted.values())),
            "computation": self._computation(steps),
            "plan": plan_digest(self.optimizer.plan),
        }

    def _slowest(self, seconds: Iterable[float]) -> float:
        """The largest of the ranks' medians; collective."""
        return max(self._world.gather(statistics.median(seconds)))

    def _computation(self, rounds: int) -> dict[str, Any]:
        """Seconds of the slowest rank while every rank computes and none communicates; collective."""

        def forward_backward() -> None:
            with self.optimizer.no_sync():
                self._model(self._tokens, self._targets).backward()
            self.optimizer.zero_grad()

        def timed_alone(call: Callable[[], Any]) -> float:
            self._world.barrier()
            return self._slowest(run_seconds(call, self._world.device, rounds))

        newton_schulz = {}
        for (rows, cols), count in self._largest_stacks().items():
            stack = torch.randn(count, rows, cols, device=self._world.device).bfloat16()
            call = partial(orthogonalize, stack, out=stack)
            newton_schulz[f"{rows}x{cols}"] = timed_alone(call) / count
        return {"forward_backward_seconds": timed_alone(forward_backward), "newton_schulz_seconds": newton_schulz}

    def _largest_stacks(self) -> dict[tuple[int, int], int]:
        """Per shape of a whole matrix, the most that any home orthogonalizes in one go; collective."""
        plan, largest = self.optimizer.plan, Counter[tuple[int, int]]()
        own = [stack for wave in plan.schedule(self.optimizer.collectives.rank) for stack in wave.stacks]
        for sizes in self._world.gather([(plan.layout.matrices[stack[0]].shape, len(stack)) for stack in own]):
            for shape, count in sizes:
                largest[shape] = max(largest[shape], count)
        return dict(largest)

    def _row(self, label: str, report: dict[str, Any], predicted: int, alone: float, exposed: float) -> dict[str, Any]:
        counts = report["communication"][label]
        return {
            "name": LABELS[label],
            "calls": counts["calls"],
            "bytes_predicted": predicted,
            "bytes_measured": counts["bytes"],
            "alone_seconds": alone,
            "exposed_seconds": exposed,
            "hidden_seconds": max(0.0, alone - exposed),
            "bus_bytes_per_second": counts["bytes"] / alone if alone else 0.0,
        }

    def _alone(self, calls: Sequence[Call], rounds: int = 3) -> dict[str, float]:
        """Seconds of the calls by label when repeated one by one; collective."""
        seconds: dict[str, float] = defaultdict(float)
        for call in calls:
            seconds[call.label] += statistics.mean(
                timed(call.over, call.prepare(), self._world.device) for _ in range(rounds)
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


def plan_digest(plan: Plan) -> str:
    """Equal for equal homes, waves and traffic."""
    content = (plan.homes, plan.waves, plan.exchange_bytes_by_rank, plan.team_bytes_by_rank)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def print_report(name: str, result: dict[str, Any], ranks: int) -> None:
    """The table of one optimizer."""
    print(f"\n{name}: {result['step_seconds'] * 1e3:.1f} ms per training step")
    print(f"  {'collective':26s} calls {'predicted':>12s} {'measured':>12s} {'alone':>9s} {'exposed':>9s} "
          f"{'hidden':>9s} overlap  algbw GB/s  busbw GB/s")  # fmt: skip
    for label, row in result["collectives"].items():
        whole = algorithm_rate(label, row["bus_bytes_per_second"], ranks)
        times = " ".join(f"{row[f'{key}_seconds'] * 1e3:6.2f} ms" for key in ("alone", "exposed", "hidden"))
        counts = f"{row['calls']:5d} {row['bytes_predicted']:12,d} {row['bytes_measured']:12,d}"
        print(f"  {row['name']:26s} {counts} {times} {overlap(row):7.0%} "
              f"{whole / 1e9 if whole else float('nan'):11.3f} "
              f"{row['bus_bytes_per_second'] / 1e9:11.3f}")  # fmt: skip


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="dense")
    parser.add_argument("--hidden-size", type=at_least_one, default=384)
    parser.add_argument("--layers", type=at_least_one, default=4)
    parser.add_argument("--batch-size", type=at_least_one, default=4, help=f"samples of {SEQUENCE} tokens per rank")
    parser.add_argument("--layout", choices=("auto", "flat", "bucketed", "aligned"), default="bucketed")
    parser.add_argument("--bucket-mb", type=positive, default=4.0, help="MiB of fp32 gradient per bucket")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES, help="beside AdamW's")
    parser.add_argument("--steps", type=at_least_one, default=3, help="of which the median counts")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--trace", type=output_file, default=Path("runs/comm_trace.json.gz"), help="Chrome trace of one step"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the result here (rank 0)")
    return parser.parse_args(words)


def main() -> None:
    args = parse_arguments()
    with open_world(args.device) as world:
        if world.size == 1:
            raise SystemExit("error: one rank sends nothing: start with torchrun --nproc_per_node 2 or more")
        results = {}
        for name in (*args.strategies, "adamw"):
            training = Training(name, world, args)
            results[name] = training.measure(args.steps)
            if name == args.strategies[0]:
                training.trace(args.trace)
        if not world.main:
            return
        adamw = results["adamw"]["sent_bytes_by_rank"]
        print(f"{args.model}, {world.size} ranks, {dist.get_backend()}, layout {args.layout}, bf16 parameters")
        for name, result in results.items():
            result["traffic_over_adamw"] = sum(result["sent_bytes_by_rank"]) / sum(adamw)
            print_report(name, result, world.size)
        print("\ntraffic of all ranks over ZeRO-1 AdamW's: " +
              ", ".join(f"{name} {result['traffic_over_adamw']:.4f}" for name, result in results.items()))  # fmt: skip
        print(f"Chrome trace of a step of {args.strategies[0]}: {args.trace}")
        settings = {key: value for key, value in vars(args).items() if key not in ("json", "trace")}
        output = {"machine": describe_machine(started_as("perf.comm")), "world": world.size,
                      "backend": dist.get_backend(), "device": world.device.type, "settings": settings,
                      "contenders": results}  # fmt: skip
        write_json(args.json, output)


if __name__ == "__main__":
    main()
