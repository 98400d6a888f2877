"""Python's cyclic collector pauses while an optimizer is built, and is then as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from distributed_muon import DistributedMuon


@pytest.fixture(params=[True, False], ids=["on", "off"])
def collector(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = gc.isenabled()
    (gc.enable if request.param else gc.disable)()
    yield request.param
    (gc.enable if before else gc.disable)()


def test_the_collector_pauses_in_the_constructor_and_is_left_as_it_was(
    collector: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[bool] = []
    build = torch.optim.Optimizer.__init__

    def noting(*args: Any) -> None:
        inside.append(gc.isenabled())
        build(*args)

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", noting)
    DistributedMuon([nn.Parameter(torch.randn(4, 4))]).close()
    assert inside == [False]
    assert gc.isenabled() == collector
    with pytest.raises(ValueError, match="no option"):
        DistributedMuon([nn.Parameter(torch.randn(4, 4))], learning_rate=1.0)
    assert gc.isenabled() == collector
