"""perf.comm and perf.links on two ranks: every collective accounted for, predicted and traced."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import pytest
import torch

from distributed_muon.engine.collectives import Collectives
from launch.world import World
from perf import comm, links
from perf.comm import Training
from tests.checks import on_ranks

WORDS = ["--hidden-size", "64", "--layers", "2", "--batch-size", "1", "--bucket-mb", "0.1"]


def training(name: str, rank: int, world: int) -> Training:
    return Training(name, World(rank, world, torch.device("cpu")), comm.parse_arguments(WORDS))


@on_ranks(2)
def test_every_collective_is_predicted_and_recorded(rank: int, world: int) -> None:
    home = training("home", rank, world)
    result = home.measure(1)
    rows = result["collectives"]
    assert list(rows) == ["reduce_scatter", "all_reduce", "to_homes", "from_homes", "all_gather"]
    buckets = len(home.optimizer._buckets)
    assert rows["reduce_scatter"]["calls"] == rows["all_gather"]["calls"] == buckets > 2
    # bf16 parameters gather half of what fp32 gradients scatter; both halve what the ranks hold.
    assert rows["reduce_scatter"]["bytes_measured"] == 2 * rows["all_gather"]["bytes_measured"]
    counted = home.optimizer.step_report()["bytes"]
    assert counted["all_to_all"] == rows["to_homes"]["bytes_measured"] + rows["from_homes"]["bytes_measured"]
    assert sum(counted.values()) == sum(row["bytes_measured"] for row in rows.values())
    assert all(row["bytes_measured"] == row["bytes_predicted"] > 0 for row in rows.values())
    assert all(row["alone_seconds"] > 0 and row["exposed_seconds"] >= 0 for row in rows.values())
    assert all(row["exposed_seconds"] >= row["exposed_seconds_least"] for row in rows.values())
    computation = result["computation"]
    shapes = {"x".join(map(str, matrix.shape)) for matrix in home.optimizer.plan.layout.matrices}
    assert set(computation["newton_schulz_seconds"]) == shapes
    assert 0 < computation["forward_backward_seconds"] < 10
    # The same on all ranks: the slowest rank's.
    everywhere = home._world.gather((result["step_seconds"], computation, result["plan"]))
    assert everywhere[0] == everywhere[1]


@on_ranks(2)
def test_measuring_computation_alone_changes_nothing_and_sends_nothing(rank: int, world: int) -> None:
    home = training("home", rank, world)
    home.step()
    home.optimizer.wait_params()
    before = [p.master.clone() for p in home.optimizer.sharded_parameters]
    home.recorder.calls.clear()
    home._computation(1)
    assert not home.recorder.calls
    assert all(torch.equal(a, p.master) for a, p in zip(before, home.optimizer.sharded_parameters, strict=True))
    assert all(parameter.grad is None for parameter in home._model.parameters())


@on_ranks(2)
def test_gather_sends_nothing_back_and_adamw_nothing_at_all(rank: int, world: int) -> None:
    gather, adamw = training("gather", rank, world).measure(1), training("adamw", rank, world).measure(1)
    assert "from_homes" not in gather["collectives"] and "to_homes" in gather["collectives"]
    assert list(adamw["collectives"]) == ["reduce_scatter", "all_reduce", "all_gather"]
    assert sum(gather["sent_bytes_by_rank"]) > sum(adamw["sent_bytes_by_rank"])


@on_ranks(2)
def test_a_step_that_sends_other_bytes_is_an_error(rank: int, world: int) -> None:
    home = training("home", rank, world)
    right = comm.predicted_bytes
    comm.predicted_bytes = lambda optimizer: {
        **right(optimizer),
        "all_gather": 7 if rank == 1 else right(optimizer)["all_gather"],
    }
    try:
        with pytest.raises(RuntimeError, match="bytes predicted"):  # on both ranks, though one is wrong
            home.measure(1)
    finally:
        comm.predicted_bytes = right


@on_ranks(2)
def test_trace_shows_the_phases(rank: int, world: int) -> None:
    home = training("home", rank, world)
    home.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json.gz")
        home.trace(path)
        if rank == 0:
            events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
            names = {event.get("name") for event in events}
            names = {str(name).partition(":")[0] for name in names}  # behind it stands of which wave or bucket
            assert {"newton_schulz", "reduce_scatter_wait", "all_gather_wait", "gather_wait"} <= names


@on_ranks(2)
def test_links_count_what_they_send(rank: int, world: int) -> None:
    for kind in links.KINDS:
        sent, seconds = links.measure(Collectives(), kind, 40_000, 2, torch.device("cpu"))
        assert sent == 40_000
        assert 0 < seconds < 10
        delay = links.measure_delay(Collectives(), kind, (sent, seconds), 1, torch.device("cpu"))
        assert 0 <= delay < 1000
