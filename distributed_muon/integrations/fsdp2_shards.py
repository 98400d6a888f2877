"""This rank's shards of FSDP2's parameters, followed from step to step.

FSDP2 gives new gradients in every backward, and a program may load parameters, move them or their state, or write into
them: addresses are read anew in every step, and what moved is taken over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distributed_muon.engine.agreement import Agreement
from distributed_muon.engine.state import OwnedParameter, Part
from distributed_muon.engine.step import ShardedStep


class LocalShard:
    """This rank's elements of one parameter, followed wherever the program puts them.

    Attributes:
        record: of the engine. part: their memory; None where this rank holds none.
        state: the moments (and masters of its own) as DTensors over the engine's memory.
        version: of the parameter when masters and parameter last agreed; None where they may not.
    """

    def __init__(self, record: OwnedParameter, part: Part | None) -> None:
        self.record, self.part = record, part
        self.state = {key: self._distributed(value) if value.ndim else value for key, value in record.saved.items()}
        self._known = dict(self.state)
        self.version = self.versions() if part is not None else None

    def versions(self) -> tuple[int, int]:
        """What tells that somebody wrote into the parameter: as a DTensor, or into its local tensor."""
        return self.record.param._version, self.record.param.to_local()._version

    def _distributed(self, flat: Tensor) -> DTensor:
        param = self.record.param
        local = flat.view(param.to_local().shape)
        where = (param.device_mesh, param.placements)
        return DTensor.from_local(local, *where, run_check=False, shape=param.shape, stride=param.stride())

    def follow(self, state: Mapping[str, Tensor]) -> bool:
        """Take over memory that moved and values that others wrote; whether memory moved."""
        if self.part is None:
            return False
        part, moved = self.part, False
        values = flat_shard(self.record.param, self.record.name)
        if values.dtype != part.values.dtype or values.device != part.values.device:
            raise ValueError(
                f"parameter {self.record.name!r} became {values.dtype} on {values.device}: build the optimizer then"
            )
        if values.data_ptr() != part.values.data_ptr():
            part.master, part.values = (values if not part.has_copies else part.master), values
            moved, self.version = True, None
        for key, tensor in state.items():
            if tensor is not self._known[key]:  # such as a state that was offloaded and brought back
                self._known[key], moved = tensor, True
                flat = tensor.to_local().view(-1) if isinstance(tensor, DTensor) else tensor
                if key == "master":
                    part.master = flat
                else:
                    self.record.state[key] = flat
                    part.moments.update({key: flat} if flat.ndim else {})
        if part.has_copies and self.version != self.versions():
            part.adopt()
            self.version = self.versions()
        return moved

    def take_gradient(self, none: Tensor) -> None:
        """Point the part at the parameter's gradient, at `none` (zeros) where it has none."""
        grad = self.record.param.grad
        if grad is None:
            self.part.grad = none.narrow(0, 0, self.part.master.numel())
            return
        if grad.placements != self.record.param.placements:
            grad = grad.redistribute(placements=self.record.param.placements)
        self.part.grad = grad.to_local().reshape(-1).float()


@dataclass
class Domain:
    """The parameters whose meshes have the same ranks."""

    engine: ShardedStep
    shards: list[LocalShard]

    def follow(self, state: Mapping[Any, Mapping[str, Tensor]]) -> None:
        """Take over what the program did to parameters and state since the last step."""
        if any([shard.follow(state[shard.record.param]) for shard in self.shards]):
            self.engine.rebind()

    def take_gradients(self) -> None:
        """Point the parts at this step's gradients."""
        held = [shard for shard in self.shards if shard.part is not None]
        missing = [shard.part.master.numel() for shard in held if shard.record.param.grad is None]
        none = torch.zeros(max(missing, default=0), device=self.engine.device)
        for shard in held:
            shard.take_gradient(none)

    def release_gradients(self) -> None:
        """Hold none of the gradients, which FSDP2 allocates anew in every backward."""
        self.engine.release_gradients()
        for shard in self.shards:
            if shard.part is not None:
                shard.part.grad = None

    def agree(self, flag: bool) -> Agreement:
        """The engine's agreement over the domain."""
        return self.engine.agree([shard.record.param.grad is not None for shard in self.shards], [flag])

    def publish(self) -> None:
        """Round masters into parameters that are not fp32."""
        copies = [shard for shard in self.shards if shard.part is not None and shard.part.has_copies]
        if copies:
            torch._foreach_copy_([s.part.values for s in copies], [s.part.master for s in copies])
        for shard in copies:
            shard.version = shard.versions()


def flat_shard(param: nn.Parameter, name: str) -> Tensor:
    """This rank's elements, 1-D, without a copy."""
    local = param.to_local()
    if not local.is_contiguous():
        raise ValueError(f"parameter {name!r} has a local tensor that is not contiguous: distribute a contiguous one")
    return local.view(-1)


def pair_up(name: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Local tensors of the state and what is to be copied into them."""
    if set(mine) != set(theirs):
        raise ValueError(f"the saved state of parameter {name!r} has {sorted(theirs)}, this optimizer {sorted(mine)}")
    out = []
    for key, value in mine.items():
        saved = theirs[key]
        if isinstance(value, DTensor):
            if not isinstance(saved, DTensor) or (saved.placements, saved.device_mesh) != (
                value.placements,
                value.device_mesh,
            ):
                raise ValueError(
                    f"the saved {key} of parameter {name!r} is not placed like it: load with "
                    "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
                )
            value, saved = value.to_local(), saved.to_local()
        out.append((value, saved))
    return out
