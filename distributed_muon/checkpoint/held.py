"""What one rank holds of every parameter, as a checkpoint's file and index have it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distributed_muon.checkpoint.places import Place, places
from distributed_muon.checkpoint.view import CheckpointView
from distributed_muon.engine.state import OwnedParameter


class OwnShard(NamedTuple):
    """A parameter of which this rank holds elements, and where these lie in the whole."""

    parameter: OwnedParameter
    place: Place

    @property
    def states(self) -> dict[str, Tensor]:
        """Everything that is saved of the shard, by name: fp32, (n,)."""
        p, part = self.parameter, self.parameter.part  # whose memory a framework may have replaced
        found = {"master": part.master, **{key: part.moments[key] for key in p.state if key in part.moments}}
        return {key: flat.narrow(0, p.offset, p.stop - p.start) for key, flat in found.items()}


def own_shards(view: CheckpointView) -> Iterator[OwnShard]:
    """All that this rank holds, replicas included; no collective."""
    for engine in view.engines:
        found = places(engine)
        for parameter in engine.parameters:
            if parameter.tensor in found:
                yield OwnShard(parameter, found[parameter.tensor])


@dataclass
class Held:
    """What a rank writes.

    Args:
        tensors: NAME.STATE -> CPU tensor. parts: parameter -> its patches. parameters: what the index says of each.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)


def hold(
    view: CheckpointView, copy_master: Callable[[Tensor], Tensor], copy_moment: Callable[[Tensor], Tensor]
) -> Held:
    """What this rank writes; no collective.

    Args:
        copy_master, copy_moment: bring a flat tensor to the CPU. They are given whole parts: few large tensors instead
            of many small ones.
    """
    held, host = Held(), {}
    for engine in view.engines:
        for part in engine.parts:
            host[id(part), "master"] = copy_master(part.master.detach())
            for key, tensor in part.moments.items():
                host[id(part), key] = copy_moment(tensor)
    for own in own_shards(view):
        p, place = own
        if not place.first or p.name in view.copies:
            continue
        states, algorithm = list(own.states), view.param_groups[p.group]["algorithm"]
        held.parts[p.name] = list(place.patches)
        held.parameters[p.name] = describe(place.shape, p.param.dtype, algorithm, p.group, states, p.state.get("step"))
        for key in states:
            flat = host[id(p.part), key].narrow(0, p.offset, p.stop - p.start)
            held.tensors[f"{p.name}.{key}"] = flat.view(place.shape) if _is_whole(flat, place) else flat
    return held


def describe(
    shape: Sequence[int], dtype: torch.dtype, algorithm: str, group: int, states: Sequence[str], step: Any
) -> dict[str, Any]:
    """What the index says of a parameter; `step` is None where its algorithm counts none."""
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "algorithm": algorithm,
        "group": group,
        "states": list(states),
        **({} if step is None else {"step": int(step)}),
    }


def _is_whole(flat: Tensor, place: Place) -> bool:
    (first, *more) = place.patches
    return not more and first.rows == 1 and flat.numel() == torch.Size(place.shape).numel()
