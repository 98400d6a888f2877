"""Optimizer state that leaves the device and comes back, as reinforcement-learning loops ask between two trainings.

Memory is given back by emptying storages and later filled again in place, so masters, moments and every view that a
step works on stay the tensors that they are.
"""

from __future__ import annotations

from torch import Tensor

from distributed_muon.engine.state import Part

_NAMES = {"momentum_buffer": "exp_avg"}  # frameworks that move Adam's state look for its names


class PartState(dict):
    """A part's tensors as entries exp_avg, exp_avg_sq and (masters that are copies) master_param.

    These are the names by which Megatron, verl and slime move state. `state["exp_avg"] = state["exp_avg"].to("cpu")`
    keeps the copy and empties the tensor on the device; an assignment from the device brings values back. Masters
    move with exp_avg, for those who assign only know Adam's moments.
    """

    def __init__(self, part: Part) -> None:
        self._own = {_NAMES.get(key, key): moment for key, moment in part.moments.items()}
        if part.has_copies:
            self._own["master_param"] = part.master
        super().__init__(self._own)

    def __setitem__(self, key: str, value: Tensor) -> None:
        moved = {key, "master_param"} & set(self._own) if key == "exp_avg" else {key}
        for name in moved:
            given = value if name == key else None
            self._leave(name, given) if value.device != self._own[name].device else self._return(name, given)

    @property
    def away(self) -> bool:
        """Whether a tensor has no memory on the device."""
        return any(_is_empty(own) for own in self._own.values())

    def offload(self) -> None:
        """Copy every tensor to the CPU and give its memory back."""
        for name in self._own:
            self._leave(name)

    def restore(self) -> None:
        """Bring back what `offload` took."""
        for name in self._own:
            self._return(name)

    def _leave(self, name: str, copy: Tensor | None = None) -> None:
        own = self._own[name]
        if not _is_empty(own):
            super().__setitem__(name, own.to("cpu", copy=True) if copy is None else copy)
            own.untyped_storage().resize_(0)

    def _return(self, name: str, values: Tensor | None = None) -> None:
        own, values = self._own[name], self[name] if values is None else values
        if values is not own:
            own.untyped_storage().resize_(own.nbytes)
            own.copy_(values)
            super().__setitem__(name, own)


def _is_empty(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == 0
