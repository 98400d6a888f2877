"""What every collective of a training step sends, takes and exposes, against ZeRO-1 AdamW in the same run.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m perf.comm [--json FILE] [--trace FILE]

Per collective, on rank 0, medians over steps:

  predicted  bytes this rank sends by the plan and the buckets
  measured   bytes it sent by the counters; a difference on any rank ends the run with an error
  alone      seconds of the same calls repeated one by one with nothing else to do
  exposed    seconds that the training step waited for them, late ranks included
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_muon import DistributedMuon, muon_param_groups
from distributed_muon.collectives import Collectives, Pending
from distributed_muon.diagnostics import PhaseTimer
from distributed_muon.plan import Transfer
from launch.models import MODELS, CausalLM, build_model, cast_parameters
from launch.world import World, open_world
from perf.links import timed
from perf.machine import describe_machine

REDUCE_SCATTER, ALL_GATHER = "reduce-scatter gradients", "all-gather parameters"
TO_HOMES, FROM_HOMES = "all-to-all to homes", "all-to-all from homes"
AGREEMENT, TEAMS = "all-reduce agreement", "teams"
# Each label and the name its bytes are counted under; those of teams are counted apart.
LABELS = {
    REDUCE_SCATTER: "reduce_scatter",
    AGREEMENT: "all_reduce",
    TO_HOMES: "all_to_all",
    TEAMS: "teams",
    FROM_HOMES: "all_to_all",
    ALL_GATHER: "all_gather",
}
CONTENDERS = ("home", "gather", "adamw")
VOCABULARY, SEQUENCE = 256, 128


@dataclass(frozen=True)
class Call:
    """One collective that the optimizer issued: what it sent, and a function that issues its like again."""

    label: str
    sent_bytes: int
    over: Collectives
    again: Callable[[], Pending]


class Recorder:
    """Notes every collective of one optimizer and how long it is waited for, by wrapping its `Collectives`.

    Args:
        optimizer: observed from now on. device: of its parameters.

    Attributes:
        calls: of the current step, in order.
    """

    def __init__(self, optimizer: DistributedMuon, device: torch.device) -> None:
        self._device, self._timer = device, PhaseTimer(device)
        self._optimizer = optimizer
        self._wrap(optimizer.collectives, REDUCE_SCATTER, ALL_GATHER, AGREEMENT)
        for team in optimizer._muon.teams.values():
            self._wrap(team, TEAMS, TEAMS, TEAMS)
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the calls and waits so far."""
        self.calls: list[Call] = []
        self._shipments = shipment_order(self._optimizer)
        self._timer.reset()

    def exposed(self) -> dict[str, float]:
        """Seconds waited since `begin_step()`, by label."""
        return self._timer.seconds()

    def _wrap(self, observed: Collectives, reduce_label: str, gather_label: str, all_reduce_label: str) -> None:
        reduce_scatter, all_gather = observed.reduce_scatter, observed.all_gather
        all_to_all, all_reduce = observed.all_to_all, observed.all_reduce
        fresh = Collectives(observed.group)  # repeats calls without being counted

        def note(label: str, kind: str, before: int, again: Callable[[], Pending]) -> None:
            self.calls.append(Call(label, observed.sent_bytes[kind] - before, fresh, again))

        def watched(pending: Pending, label: str) -> Pending:
            def wait() -> None:
                with self._timer(label):
                    pending.wait()

            return Pending((), finish=wait)

        def noted_reduce_scatter(output: Tensor, input: Tensor) -> Pending:
            before = observed.sent_bytes["reduce_scatter"]
            pending = reduce_scatter(output, input)
            again = self._repeat(fresh.reduce_scatter, input.dtype, output.numel(), input.numel())
            note(reduce_label, "reduce_scatter", before, again)
            return watched(pending, reduce_label)

        def noted_all_gather(output: Tensor) -> Pending:
            before = observed.sent_bytes["all_gather"]
            pending = all_gather(output)
            again = self._repeat(fresh.all_gather, output.dtype, output.numel())
            note(gather_label, "all_gather", before, again)
            return watched(pending, gather_label)

        def noted_all_to_all(
            output: Tensor, input: Tensor, recv_counts: Sequence[int], send_counts: Sequence[int]
        ) -> Pending:
            label, transfer = next(self._shipments)
            if (tuple(recv_counts), tuple(send_counts)) != (transfer.recv_counts, transfer.send_counts):
                raise RuntimeError(f"an {label} did not follow the plan's order of waves: fix shipment_order()")
            before = observed.sent_bytes["all_to_all"]
            pending = all_to_all(output, input, recv_counts, send_counts)
            again = self._repeat(fresh.all_to_all, input.dtype, output.numel(), input.numel(), recv_counts, send_counts)
            note(label, "all_to_all", before, again)
            return watched(pending, label)

        def noted_all_reduce(tensor: Tensor, *, maximum: bool = False, counted: bool = True) -> Tensor:
            if not counted:
                return all_reduce(tensor, maximum=maximum, counted=False)
            before = observed.sent_bytes["all_reduce"]
            with self._timer(all_reduce_label):
                all_reduce(tensor, maximum=maximum)
            again = self._repeat(lambda like: (fresh.all_reduce(like), Pending(()))[1], tensor.dtype, tensor.numel())
            note(all_reduce_label, "all_reduce", before, again)
            return tensor

        observed.reduce_scatter, observed.all_gather = noted_reduce_scatter, noted_all_gather
        observed.all_to_all, observed.all_reduce = noted_all_to_all, noted_all_reduce

    def _repeat(self, start: Callable[..., Pending], dtype: torch.dtype, *sizes: Any) -> Callable[[], Pending]:
        """Calls `start` with zeros of each integer size, and other arguments as they are."""

        def again() -> Pending:
            made = (torch.zeros(s, dtype=dtype, device=self._device) if isinstance(s, int) else s for s in sizes)
            return start(*made)

        return again


def shipment_order(optimizer: DistributedMuon) -> Iterator[tuple[str, Transfer]]:
    """The all-to-alls of one step in the order `ShardedMuon.step` issues them, those of idle waves left out."""
    waves = optimizer.plan.schedule(optimizer.collectives.rank)
    order = [(TO_HOMES, wave.gather) for wave in waves[:1]]
    for number, wave in enumerate(waves):
        order += [(TO_HOMES, following.gather) for following in waves[number + 1 : number + 2]]
        order.append((FROM_HOMES, wave.scatter))
    return iter([(label, transfer) for label, transfer in order if not transfer.idle])


def predicted_bytes(optimizer: DistributedMuon) -> dict[str, int]:
    """Bytes this rank sends in one step, by label, from the plan and the buckets alone."""
    plan, rank, size = optimizer.plan, optimizer.collectives.rank, optimizer.collectives.size
    out: Counter[str] = Counter(dict.fromkeys(LABELS, 0))
    for bucket in optimizer._buckets:
        out[REDUCE_SCATTER] += bucket.spec.numel * 4 * (size - 1) // size
        out[ALL_GATHER] += bucket.spec.numel * bucket.flat.element_size() * (size - 1) // size
    wire = plan.newton_schulz.element_bytes
    for wave in plan.schedule(rank):
        out[TO_HOMES] += sum(wave.gather.send_counts) * wire
        out[FROM_HOMES] += sum(wave.scatter.send_counts) * wire
    # One fp64 norm and one presence flag per tensor; a flag per bucket, and two for wrong use.
    agreed = 8 * (2 * len(plan.layout.tensors) + len(optimizer._buckets) + 2)
    out[AGREEMENT] = 2 * (agreed * (size - 1) // size)
    out[TEAMS] = plan.team_bytes_by_rank[rank]
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
            "seconds" of the whole step; "exposed", "sent", "calls" by label; "phases" of the optimizer.
        """
        self._world.barrier()
        self.recorder.begin_step()
        begin = time.perf_counter()
        self._model(self._tokens, self._targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._world.synchronize()
        seconds = time.perf_counter() - begin
        sent: Counter[str] = Counter()
        for call in self.recorder.calls:
            sent[call.label] += call.sent_bytes
        calls = Counter(call.label for call in self.recorder.calls)
        phases = self.optimizer.step_report()["seconds"]
        return {"seconds": seconds, "exposed": self.recorder.exposed(), "sent": sent, "calls": calls, "phases": phases}

    def measure(self, steps: int) -> dict[str, Any]:
        """Medians over `steps` steps after one of warm-up; collective.

        Raises:
            RuntimeError: some rank sent other bytes than predicted.
        """
        self.step()
        reports = [self.step() for _ in range(steps)]
        predicted = predicted_bytes(self.optimizer)
        for report in reports:
            sent = {label: report["sent"][label] for label in LABELS}
            wrong = [label for label in LABELS if sent[label] != predicted[label]]
            if any(_gathered(wrong)):
                raise RuntimeError(f"{self.name}: bytes predicted {predicted}, rank {self._world.rank} sent {sent}")
        self.optimizer.wait_params()
        alone = self._alone(self.recorder.calls)
        rows = {
            label: self._row(label, reports, predicted[label], alone[label]) for label in LABELS if predicted[label]
        }
        phases = {key: statistics.median(r["phases"].get(key, 0.0) for r in reports) for key in reports[-1]["phases"]}
        return {
            "step_seconds": statistics.median(report["seconds"] for report in reports),
            "phases": phases,
            "collectives": rows,
            "sent_bytes_by_rank": _gathered(sum(predicted.values())),
        }

    def _row(self, label: str, reports: Sequence[dict[str, Any]], predicted: int, alone: float) -> dict[str, Any]:
        exposed = statistics.median(report["exposed"].get(label, 0.0) for report in reports)
        measured = reports[-1]["sent"][label]
        return {
            "calls": reports[-1]["calls"][label],
            "bytes_predicted": predicted,
            "bytes_measured": measured,
            "alone_seconds": alone,
            "exposed_seconds": exposed,
            "hidden_seconds": max(0.0, alone - exposed),
            "bus_bytes_per_second": measured / alone if alone else 0.0,
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
    for label, row in result["collectives"].items():
        times = " ".join(f"{row[f'{key}_seconds'] * 1e3:6.2f} ms" for key in ("alone", "exposed", "hidden"))
        print(f"  {label:26s} {row['calls']:5d} {row['bytes_predicted']:12,d} {row['bytes_measured']:12,d} {times} "
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
