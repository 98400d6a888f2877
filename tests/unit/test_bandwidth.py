"""Algorithm and bus bandwidth as nccl-tests define them, from the bytes that are counted; overlap."""

from __future__ import annotations

import pytest
import torch

from distributed_muon.engine.collectives import Collectives
from perf.bandwidth import algorithm_rate, bus_factor, overlap
from perf.fake_world import fake_rank


@pytest.mark.parametrize("kind", ["reduce_scatter", "all_gather", "all_to_all", "all_reduce"])
def test_counted_bytes_are_the_bus_bytes_of_nccl_tests(kind: str) -> None:
    """nccl-tests: busbw = S / t x (n - 1) / n, for an all-reduce twice that; S is the whole buffer."""
    ranks, share = 8, 40
    with fake_rank(3, ranks):
        collectives = Collectives()
        whole, own, counts = torch.ones(ranks * share), torch.ones(share), [share] * ranks
        if kind == "reduce_scatter":
            collectives.reduce_scatter(own, whole)
        elif kind == "all_gather":
            collectives.all_gather(whole)
        elif kind == "all_to_all":
            collectives.all_to_all(torch.empty_like(whole), whole, counts, counts)
        else:
            collectives.all_reduce(whole)
        sent = collectives.sent_bytes[kind]
    size = whole.nbytes
    assert sent == size * bus_factor(kind, ranks) == size * (2 if kind == "all_reduce" else 1) * 7 / 8
    # In 2 ms.
    assert algorithm_rate(kind, sent / 2e-3, ranks) == pytest.approx(size / 2e-3)


def test_the_way_to_homes_is_an_all_to_all_and_teams_mix() -> None:
    assert bus_factor("to_homes", 4) == bus_factor("from_homes", 4) == 0.75
    assert bus_factor("team", 4) is None and algorithm_rate("team", 1e9, 4) is None


def test_overlap() -> None:
    assert overlap({"alone_seconds": 4.0, "exposed_seconds": 1.0, "hidden_seconds": 3.0}) == 0.75
    assert overlap({"exposed_seconds": 1.0, "hidden_seconds": 3.0}) == 0.75
    # A late rank makes the wait longer than the collective: nothing was hidden.
    assert overlap({"alone_seconds": 1.0, "exposed_seconds": 5.0, "hidden_seconds": 0.0}) == 0
    assert overlap({"exposed_seconds": 0.0, "hidden_seconds": 0.0}) == 0
