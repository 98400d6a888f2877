"""Predicts the training steps that `perf.comm` measured, with what `perf.links` fitted on the same ranks.

Measured and taken as given: forward and backward without a collective, Newton-Schulz of one matrix of each shape,
memory bandwidth, and the fitted collectives. Predicted from the plan: which rank orthogonalizes what, how many
bytes each collective sends in how many calls, what hides under what, and so the step. The optimizer is built anew on
torch's fake process group, so that its plan is the measured run's; their digests are compared.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from distributed_muon.planning.simulate import DomainPlan
from launch.world import World
from perf import comm
from perf.cluster import fitted_machine
from perf.fake_world import fake_rank
from perf.links import fitted_links
from perf.prediction import Prediction, predict
from perf.workload import MeasuredTraining, Setup

# Of a prediction's parts: what perf.comm calls the same collectives, or phases.
COLLECTIVES = {
    "reduce_scatter": ("reduce_scatter",),
    "agreement": ("all_reduce",),
    "exchange": ("to_homes", "from_homes", "team"),
    "all_gather": ("all_gather",),
}
PHASES = {"newton_schulz": ("newton_schulz",), "elementwise": ("momentum", "update", "adamw", "scatter_pack")}
PARTS = (*PHASES, *COLLECTIVES, "delayed")
MOST_OFF = 0.25  # of a measured step, for a prediction to be called right


def within(row: Mapping[str, Any]) -> bool:
    """Whether a row of `check` predicts the step and its parts, so that errors do not cancel."""
    return abs(row["ratio"] - 1) <= MOST_OFF and row["off"] <= MOST_OFF


def check(fitted: Mapping[str, Any], measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Predict every contender of a run of perf.comm.

    Args:
        fitted: the JSON object of perf.links. measured: that of perf.comm, on as many ranks.

    Returns:
        Per contender "name", "predicted_seconds" and "measured_seconds" of a step, "ratio" of the two,
        "forward_backward_seconds", "parts": per part of `Prediction.exposed` its predicted and measured seconds,
        "worst": the part furthest off, and "off": the sum of the parts' distances over the measured step, which tells a
        right prediction from errors that cancel. Measured are a collective's exposed seconds on the rank that waited
        least, and rank 0's phases; "delayed" is what is left of the measured step: computation delayed by collectives
        beside it, late ranks, and the host's own work.

    Raises:
        ValueError: the two do not belong together, or the plan is not the measured one.
    """
    if fitted["world"] != measured["world"]:
        raise ValueError(
            f"--links is of {fitted['world']} ranks and --check of {measured['world']}: measure both alike"
        )
    rows = []
    for name, contender in measured["contenders"].items():
        machine = replace(fitted_machine(fitted), links=fitted_links(fitted), newton_schulz=_by_shape(contender))
        prediction = predict(measured_training(measured, name), _setup(measured["settings"], name), machine)
        rows.append({"name": name, **compare(prediction, contender)})
    return rows


def measured_training(measured: Mapping[str, Any], name: str) -> MeasuredTraining:
    """The step of one contender: its plan and buckets built anew, its forward and backward as measured.

    Raises:
        ValueError: the plan is not the measured run's.
    """
    world, contender = measured["world"], measured["contenders"][name]
    cuda = measured["device"] == "cuda" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    with fake_rank(0, world):
        optimizer = comm.Training(name, World(0, world, device), Namespace(**measured["settings"])).optimizer
        sent = comm.predicted_bytes(optimizer)
    if comm.plan_digest(optimizer.plan) != contender["plan"]:
        raise ValueError(f"{name}: the plan built here is not the measured one: use the version and device of that run")
    states = [value for p in optimizer.sharded_parameters for value in (p.master, *p.state.values())]
    state_bytes = sum(value.nbytes for value in states)
    ring_bytes = sent["reduce_scatter"] + sent["all_gather"]
    tensors = optimizer.plan.layout.tensors
    buckets = tuple(bucket.flat.numel() for bucket in optimizer._buckets)
    algorithms = [tensors[bucket.spec.tensors[0]].rule is None for bucket in optimizer._buckets]
    last = dict(zip(algorithms, buckets, strict=True))
    domain = DomainPlan("all", optimizer.plan, 1, state_bytes, state_bytes, ring_bytes, buckets, tuple(last.values()))
    seconds = contender["computation"]["forward_backward_seconds"]
    return MeasuredTraining(world, domain, seconds)


def compare(prediction: Prediction, contender: Mapping[str, Any]) -> dict[str, Any]:
    """One row of `check`."""
    collectives, phases = contender["collectives"], contender["phases"]
    parts = {}
    for part, seconds in prediction.exposed.items():
        if part in COLLECTIVES:
            found = [collectives[label]["exposed_seconds_least"] for label in COLLECTIVES[part] if label in collectives]
        else:
            found = [phases.get(phase, 0.0) for phase in PHASES.get(part, ())]
        parts[part] = {"predicted": seconds, "measured": sum(found)}
    measured = contender["step_seconds"]
    accounted = prediction.forward_backward + sum(part["measured"] for part in parts.values())
    parts["delayed"]["measured"] = measured - accounted
    distances = {name: abs(part["predicted"] - part["measured"]) for name, part in parts.items()}
    predicted = prediction.forward_backward + prediction.optimizer_seconds
    return {
        "predicted_seconds": predicted,
        "measured_seconds": measured,
        "ratio": predicted / measured,
        "forward_backward_seconds": prediction.forward_backward,
        "parts": parts,
        "worst": max(distances, key=distances.__getitem__),
        "off": sum(distances.values()) / measured,
    }


def print_checks(rows: list[dict[str, Any]]) -> None:
    """The table of one run of perf.comm."""
    print(f"{'':8s} {'predicted':>10s} {'measured':>10s} {'ratio':>6s} {'off':>6s} {'fwd-bwd':>8s}   exposed ms, "
          f"predicted / measured: {', '.join(PARTS)}")  # fmt: skip
    for row in rows:
        cells = [f"{p['predicted'] * 1e3:7.1f} /{p['measured'] * 1e3:7.1f}" if (p := row["parts"].get(part)) else
                 f"{'-':>16s}" for part in PARTS]  # fmt: skip
        print(f"{row['name']:8s} {row['predicted_seconds']:8.3f} s {row['measured_seconds']:8.3f} s "
              f"{row['ratio']:6.2f} {row['off']:6.0%} {row['forward_backward_seconds']:6.3f} s   "
              f"{'  '.join(cells)}")  # fmt: skip
        if not within(row):
            worst = row["parts"][row["worst"]]
            print(f"  {row['name']} is not predicted within {MOST_OFF:.0%} of the step: furthest off is "
                  f"{row['worst']}, {worst['predicted'] * 1e3:.1f} ms predicted and "
                  f"{worst['measured'] * 1e3:.1f} measured")  # fmt: skip


def _setup(settings: Mapping[str, Any], name: str) -> Setup:
    layout = settings["layout"]
    return Setup(name, layout, None if layout == "flat" else settings["bucket_mb"])


def _by_shape(contender: Mapping[str, Any]) -> dict[tuple[int, int], float]:
    """Measured seconds of Newton-Schulz by (rows, cols)."""
    found = {}
    for shape, seconds in contender["computation"]["newton_schulz_seconds"].items():
        rows, cols = map(int, shape.split("x"))
        found[rows, cols] = seconds
    return found
