"""The simulated clock, and the optimizer on it: what a step launches, waits for, and in which order it sends."""

from __future__ import annotations

import pytest
import torch

from distributed_muon import DistributedMuon
from distributed_muon.planning.model_shapes import ParameterShape
from perf.cluster import MACHINES
from perf.launches import LaunchCounter
from perf.simulated import Clock, SimulatedNetwork, simulated_rank
from perf.timeline import Model, draw
from perf.workload import Training

H100 = MACHINES["h100-ib400"]


def test_one_communicator_is_a_queue_and_two_share_the_links() -> None:
    clock = Clock()
    first, second = clock.start("a", "x", 1.0, 4.0), clock.start("a", "x", 1.0, 2.0)
    assert not clock.done(first)
    clock.now = 5.0
    assert clock.done(first) and not clock.done(second)
    clock.wait(second)
    assert clock.now == second.ended == 8.0
    both = clock.start("a", "x", 0.0, 3.0), clock.start("b", "x", 1.0, 1.0)
    clock.wait(both[1])  # one second of latency beside the other's bytes, then half of the links for two
    assert clock.now == 11.0 and both[0].ended is None
    clock.wait(both[0])
    assert clock.now == 12.0


def test_launches_are_those_of_cuda() -> None:
    runs = [torch.zeros(8) for _ in range(100)]
    with LaunchCounter() as counted:
        torch._foreach_add_(runs, runs)  # two lists: 64 tensors a launch
        torch._foreach_copy_(runs, [run.bfloat16() for run in runs])
        torch._foreach_add_(runs, [run.bfloat16() for run in runs])  # other dtypes: a kernel per tensor
        torch._foreach_mul_([torch.zeros(4, 8)[:, :3], runs[0]], 2.0)  # not dense: likewise
        runs[0].narrow(0, 1, 3).add_(1).sum().item()
    assert counted.launches["_foreach_add_"] == 2 + 100
    assert counted.launches["_foreach_copy_"] == 2
    assert counted.launches["_foreach_mul_"] == 2
    assert counted.launches["_to_copy"] == counted.allocations["_to_copy"] == 200
    assert counted.launches["add_"] == counted.launches["sum"] == 1 and "narrow" not in counted.launches
    assert counted.totals()["waits"] == counted.waits["_local_scalar_dense"] == 1


def shapes(layers: int, side: int) -> list[ParameterShape]:
    """An embedding, and per layer two tall matrices, two wide ones, and a vector."""
    found = [ParameterShape("embedding", (8 * side, side), "adamw", "embedding")]
    for layer in range(layers):
        for number, shape in enumerate([(2 * side, side)] * 2 + [(side, 2 * side)] * 2):
            found.append(ParameterShape(f"{layer}.{number}", shape, "muon", "mlp", layer))
        found.append(ParameterShape(f"{layer}.norm", (side,), "adamw", "norm", layer))
    return found


def counted(layers: int) -> LaunchCounter:
    """A step of rank 0 of 4, where one bucket, one wave and one batch of each shape hold everything."""
    clock = Clock()
    network = SimulatedNetwork(clock, lambda label, number, sent: (0.0, 1e-6))
    with simulated_rank(0, 4, clock, network):
        model = Model(shapes(layers, 32), clock, 1e-3)
        optimizer = DistributedMuon(model.groups(), strategy="home")
        assert len(optimizer.plan.waves) == 1
        for _ in range(2):
            for block in reversed(model.blocks):
                block.backward()
            with LaunchCounter() as counter:
                optimizer.step()
            optimizer.zero_grad()
        optimizer.close()
    return counter


def test_a_step_launches_by_waves_and_shapes_and_waits_once() -> None:
    """Four times the matrices: some launches more, of lists that one kernel does not hold, but not four times."""
    counters = counted(8), counted(32)
    few, many = (counter.totals() for counter in counters)
    assert few["waits"] == many["waits"] == 1, "the host waits for the agreement and for nothing else"
    assert many["ops"] <= few["ops"] + 2
    assert many["launches"] <= 1.15 * few["launches"]
    assert few["launches"] < 60 and few["allocations"] < 30
    matmuls = [sum(counter.launches[name] for name in ("bmm", "baddbmm")) for counter in counters]
    assert matmuls == [15, 15], "tall and wide ones share five steps of three"


@pytest.mark.parametrize("adamw", [False, True])
def test_no_gather_gets_ahead_of_the_exchange(adamw: bool) -> None:
    training = Training("moonlight-16b-a3b", 64)
    row, transfers = draw(shapes(24, 2048), training, H100, adamw=adamw)
    assert row["counts"]["waits"] == 1
    gathers = [t for t in transfers if t.label == "all_gather"]
    exchanges = [t for t in transfers if t.label in ("to_homes", "from_homes")]
    assert len(gathers) == row["buckets"] > 4
    assert bool(exchanges) is not adamw
    if exchanges:
        assert max(t.begun for t in exchanges) <= min(t.begun for t in gathers)
    # Gathers run in the order of the forward, so that it waits for the first ones at most.
    assert row["communication"]["all_gather"]["exposed_seconds"] < 0.5 * sum(t.ended - t.begun for t in gathers)
