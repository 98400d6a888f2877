"""A DistributedMuon as a checkpoint sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distributed_muon.checkpoint.view import CheckpointView

if TYPE_CHECKING:
    from distributed_muon.optimizer import DistributedMuon


def checkpoint_view(optimizer: DistributedMuon) -> CheckpointView:
    """The optimizer between two steps; no collective."""
    optimizer.wait_params()
    engine, linked = optimizer._engine, optimizer._linked
    # Values written into parameters since the last step belong to the checkpoint, unless loaded masters lead.
    problem = None if linked.behind else linked.follow()

    def restored(steps: int) -> None:
        optimizer._steps = steps
        optimizer._saved.forget()
        engine.rebind()
        linked.behind = True  # the masters lead, whatever the model holds
        linked.gather()

    place = ("plain", [engine], optimizer.collectives, optimizer.param_groups, optimizer._steps)
    return CheckpointView(*place, restored, steady=True, problem=problem)
