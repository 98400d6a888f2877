"""What a checkpoint asks of an optimizer, whichever framework it steps in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.state import OwnedParameter
from distributed_muon.engine.step import ShardedStep


@dataclass(frozen=True, eq=False)
class CheckpointView:
    """An optimizer between two steps; `optimizer.checkpoint_view()` makes it, on all ranks.

    Args:
        framework: "plain", "fsdp2", "deepspeed" or "megatron". engines: attached; all state lies in their parts.
        collectives: over all ranks that hold some of the model.
        param_groups: with the options that are saved and restored. steps: that the optimizer took.
        restored: called with the steps of the checkpoint once masters and moments were written in place; lets the
            parameters follow from them. Collective.
        copies: parameters that repeat another's values (an embedding tied over pipeline stages) -> the other's name.
        private: keys of a group that are the framework's own business.
        steady: whether all that changes or moves the moments calls `ShardedStep.settle` first.
        problem: why this rank's state cannot be saved or loaded now, in words.
    """

    framework: str
    engines: Sequence[ShardedStep]
    collectives: Collectives
    param_groups: Sequence[dict[str, Any]]
    steps: int
    restored: Callable[[int], None]
    copies: Mapping[str, str] = field(default_factory=dict)
    private: Sequence[str] = ()
    steady: bool = False
    problem: str | None = None

    @property
    def parameters(self) -> list[OwnedParameter]:
        """One record per parameter of this rank's domains, also where it owns nothing of it."""
        return [parameter for engine in self.engines for parameter in engine.parameters]

    def options(self, number: int) -> dict[str, Any]:
        """The options of one group that are saved and restored."""
        left_out = {"params", "param_names", "matrices", *self.private}
        return {key: value for key, value in self.param_groups[number].items() if key not in left_out}


def view_of(optimizer: Any) -> CheckpointView:
    """The view of an optimizer of this package, also inside the wrappers of Megatron, DeepSpeed and Accelerate.

    Raises:
        TypeError: there is none inside.
    """
    inner = optimizer
    while not hasattr(inner, "checkpoint_view"):
        chained = getattr(inner, "chained_optimizers", None)
        inner = chained[0] if chained else getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"{type(optimizer).__name__} is no optimizer of distributed_muon: save its state as its framework does"
            )
    return inner.checkpoint_view()
