"""Draws a training step of one rank of many: what every collective costs, and what of it the step waits for.

    python -m perf.timeline [--model moonlight-16b-a3b] [--ranks 64 256 1024] [--hardware h100-ib400] [--json FILE]

The real optimizer runs at full size on simulated time (`perf.simulated`), plain data parallel: the reduce-scatters of
its hooks under the backward of the last microbatch, its step, and its all-gathers under the forward of the next, whose
seconds are spread evenly over the layers. Collectives take what `perf.prediction` says. The rank is the one with the
most Newton-Schulz. Beside it ZeRO-1 AdamW: the same optimizer with every parameter under AdamW.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from distributed_muon import DistributedMuon
from distributed_muon.planning.model_shapes import NAMED_MODELS, ParameterShape, model_shapes
from distributed_muon.planning.simulate import DomainPlan
from launch.environment import describe_machine
from perf.cluster import MACHINES, Machine
from perf.options import at_least_one, output_file, write_json
from perf.overhead_worker import GivenGradients
from perf.prediction import place_of, predict
from perf.simulated import Clock, SimulatedDevice, SimulatedNetwork, Transfer, simulated_rank
from perf.waves import wave_seconds
from perf.workload import Setup, Training

RANKS = (64, 256, 1024)
# Which collectives share a communicator, by label.
QUEUES: dict[str, Callable[[str], Any]] = {
    "one": lambda label: None,
    "kinds": lambda label: label if label in ("reduce_scatter", "all_gather") else None,
}


class Groups(list):
    """Parameter groups that know the model's order, as those of `muon_param_groups` do."""

    order: dict[str, int]


class Block(nn.Module):
    """The parameters of one layer, or of what lies before or behind all; its forward takes time."""

    def __init__(self, params: Sequence[nn.Parameter], clock: Clock, forward_seconds: float) -> None:
        super().__init__()
        self.weights = nn.ParameterList(params)
        self._clock, self._forward_seconds = clock, forward_seconds

    def forward(self) -> None:
        self._clock.now += self._forward_seconds

    def backward(self) -> None:
        """Twice the forward, gradients coming one after the other."""
        params = list(self.weights)
        for param in reversed(params):
            self._clock.now += 2 * self._forward_seconds / len(params)
            GivenGradients.apply([torch.empty_like(param)], param).backward()


class Model(nn.Module):
    """A model of meta parameters, layer by layer.

    Args:
        shapes: of all parameters. forward_seconds: of one microbatch.
    """

    def __init__(self, shapes: Sequence[ParameterShape], clock: Clock, forward_seconds: float) -> None:
        super().__init__()
        by_layer: dict[Any, list[ParameterShape]] = {}
        for shape in (shape for shape in shapes if shape.algorithm != "frozen"):
            key = shape.layer if shape.layer is not None else ("before" if shape.role == "embedding" else "behind")
            by_layer.setdefault(key, []).append(shape)
        layers = sum(isinstance(key, int) for key in by_layer)
        self.named: dict[str, list[tuple[str, nn.Parameter]]] = {"muon": [], "adamw": []}
        self.blocks, self.order = nn.ModuleList(), {}
        for key, members in by_layer.items():
            params = [nn.Parameter(torch.empty(s.shape, dtype=torch.bfloat16, device="meta")) for s in members]
            for shape, param in zip(members, params, strict=True):
                self.named[shape.algorithm].append((shape.name, param))
                self.order[shape.name] = len(self.order)
            self.blocks.append(Block(params, clock, forward_seconds / layers if isinstance(key, int) else 0.0))

    def forward(self) -> None:
        for block in self.blocks:
            block()

    def groups(self, adamw: bool = False) -> Groups:
        """Of the optimizer, `adamw` with every parameter under AdamW."""
        named = {"adamw": self.named["muon"] + self.named["adamw"]} if adamw else self.named
        groups = Groups({"params": some, "algorithm": name} for name, some in named.items() if some)
        groups.order = self.order
        return groups


def collective_seconds(
    optimizer: DistributedMuon, training: Training, machine: Machine
) -> Callable[[str, int, int], tuple[float, float]]:
    """(latency, moving) of a collective: rings and trees by bytes, exchanges as long as their busiest rank takes."""
    domain = DomainPlan("all", optimizer.plan, 1, 0, 0.0, 0.0)
    place = place_of(domain, training, machine)
    waves = wave_seconds(optimizer.plan, machine, place.near_share)
    ways = {
        "to_homes": [seconds for seconds in waves.gather if seconds],
        "from_homes": [seconds for seconds in waves.scatter if seconds],
    }

    def seconds(label: str, number: int, sent: int) -> tuple[float, float]:
        if label in ways:
            way = ways[label]
            latency = machine.hardware.latency_seconds
            return latency, way[number % len(way)] - latency
        if label in ("reduce_scatter", "all_gather"):
            return place.ring_latency, place.ring_seconds(label, 1, sent) - place.ring_latency
        return place.tree_latency, 0.0

    return seconds


def draw(
    shapes: Sequence[ParameterShape],
    training: Training,
    machine: Machine,
    *,
    adamw: bool = False,
    queues: str = "one",
    **options: Any,
) -> tuple[dict[str, Any], list[Transfer]]:
    """One step in the middle of a training, whose gathers land under the next forward.

    Args:
        shapes: of the model; `training` tells how long its forward and backward take. adamw: every parameter under
            AdamW. queues: of QUEUES. options: of DistributedMuon.

    Returns:
        What is printed and kept of it, and its collectives.
    """
    microbatch = training.forward_backward_seconds(machine) / training.microbatches
    rank = 0
    while True:
        clock = Clock()
        network = SimulatedNetwork(clock, lambda label, number, sent: (0.0, 0.0), QUEUES[queues])
        with simulated_rank(rank, training.ranks, clock, network):
            model = Model(shapes, clock, microbatch / 3)
            optimizer = DistributedMuon(model.groups(adamw), strategy="home", **options)
            work = optimizer.plan.ns_flops_by_rank
            busiest = max(range(training.ranks), key=work.__getitem__)
            if rank == busiest or adamw:
                network.seconds = collective_seconds(optimizer, training, machine)
                row = _one_step(optimizer, model, machine, clock)
            optimizer.close()
        if rank == busiest or adamw:
            added = sum(row["seconds"].values()) - microbatch
            whole = training.forward_backward_seconds(machine)
            head = {"ranks": training.ranks, "rank": rank, "forward_backward_seconds": whole}
            return {**head, "added_seconds": added, "share": added / whole, **row}, clock.transfers
        rank = busiest


def _one_step(optimizer: DistributedMuon, model: Model, machine: Machine, clock: Clock) -> dict[str, Any]:
    optimizer.overlap_param_gather(model)
    optimizer.track()
    for _ in range(2):  # the second begins as every later one does
        clock.transfers.clear()
        marks = [clock.now]
        model()
        marks.append(clock.now)
        for block in reversed(model.blocks):
            block.backward()
        marks.append(clock.now)
        with SimulatedDevice(clock, machine) as device:
            optimizer.step()
        marks.append(clock.now)
        optimizer.zero_grad()
    report = optimizer.local_report()
    model()  # the next step's, which has the same gathers to wait for
    for transfer in clock.transfers:
        landed = report["communication"][transfer.label]
        landed["network_seconds"] = landed.get("network_seconds", 0.0) + transfer.ended - transfer.begun
    seconds = (after - before for before, after in pairwise(marks))
    return {
        "seconds": dict(zip(("forward", "backward", "step"), seconds, strict=True)),
        "phases": report["seconds"],
        "communication": report["communication"],
        "counts": device.totals(),
        "launches": dict(device.launches),
        "buckets": len(optimizer._buckets),
        "waves": len(optimizer.plan.waves),
    }


def rows(model: str, ranks: Sequence[int], machine: Machine) -> list[dict[str, Any]]:
    """Muon and ZeRO-1 AdamW at every number of ranks, printed as they are drawn."""
    shapes, found = model_shapes(NAMED_MODELS[model]), []
    for world in ranks:
        training = Training(model, world)
        for name, adamw in (("Muon", False), ("ZeRO-1 AdamW", True)):
            row = {"setup": name, **draw(shapes, training, machine, adamw=adamw)[0]}
            predicted = predict(training, Setup("adamw" if adamw else "home"), machine)
            row["perf.scale"] = {"seconds": predicted.optimizer_seconds, "exposed_seconds": dict(predicted.exposed)}
            found.append(row)
            print_row(row)
        muon, adamw_row = found[-2:]
        more = (muon["added_seconds"] - adamw_row["added_seconds"]) / muon["forward_backward_seconds"]
        print(f"{world:6d} Muon adds {more:.2%} of forward-backward to ZeRO-1 AdamW's step", flush=True)
    return found


def print_row(row: dict[str, Any]) -> None:
    """What is added, what is waited for, what runs unseen."""
    predicted, added = row["perf.scale"]["seconds"], row["added_seconds"]
    print(
        f"{row['ranks']:6d} {row['setup']:13s} {row['forward_backward_seconds']:6.2f} s  adds {added * 1e3:6.2f} ms = "
        f"{row['share']:.2%} (perf.scale {predicted * 1e3:.2f} ms, {predicted / added - 1:+.0%}); {row['buckets']} "
        f"buckets, {row['waves']} waves; of a step: {row['counts']}"
    )
    for label, landed in row["communication"].items():
        print(
            f"{'':21s}{label:14s} {landed['calls']:4d} calls {landed['bytes'] / 1e9:7.3f} GB "
            f"{landed['network_seconds'] * 1e3:8.2f} ms, of which exposed {landed['exposed_seconds'] * 1e3:6.2f}"
        )
    phases = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in row["phases"].items())
    print(f"{'':21s}ms by phase: {phases}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(NAMED_MODELS), default="moonlight-16b-a3b")
    parser.add_argument("--ranks", type=at_least_one, nargs="+", default=RANKS)
    parser.add_argument("--hardware", choices=sorted(MACHINES), default="h100-ib400")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    args = parser.parse_args()
    machine = describe_machine(f"python -m perf.timeline {' '.join(sys.argv[1:])}")
    print(f"simulated {args.hardware}, {machine['versions']}; not run on a GPU")
    write_json(args.json, {"machine": machine, "rows": rows(args.model, args.ranks, MACHINES[args.hardware])})


if __name__ == "__main__":
    main()
