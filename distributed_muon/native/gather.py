"""Updated parameters on their way to every rank, now or under the next forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from distributed_muon.engine.collectives import Pending
from distributed_muon.engine.state import publish_all
from distributed_muon.engine.timing import StepTimer, named_range
from distributed_muon.native.buckets import FlatBucket


class ParameterGatherer:
    """All-gathers updated buckets, now or under the next forward.

    Args:
        buckets: all. params: by tensor number. timer: waits are added to its "all_gather_wait".

    Attributes:
        overlap: whether `attach()` was called, so that a step may return with gathers under way.
    """

    def __init__(self, buckets: Sequence[FlatBucket], params: Sequence[nn.Parameter], timer: StepTimer) -> None:
        self._buckets, self._params, self._timer = buckets, params, timer
        self._pending: dict[int, Pending] = {}
        self._left: list[int] = []
        self._hooks: list[RemovableHandle] = []
        self.overlap = False

    def start(self, indices: Sequence[int]) -> None:
        """Round masters into their buckets and start the all-gathers; collective over the DP group."""
        publish_all(self._buckets[index].part for index in indices)
        for index in indices:
            self._pending[index] = self._buckets[index].all_gather()

    def start_after(self, last_wave: Sequence[int], wave: int) -> None:
        """Start the buckets that are updated up to this wave, in the forward's order, which will want them so.

        Args:
            last_wave: per bucket, the wave that updates the last of it. wave: called with -1 (AdamW) first.
        """
        if wave < 0:
            self._left = list(range(len(self._buckets)))  # the first layers come last
        ready = []
        while self._left and last_wave[self._left[-1]] <= wave:
            ready.append(self._left.pop())
        self.start(ready)

    def wait(self, indices: Iterable[int] | None = None) -> None:
        """Wait for the buckets' all-gathers that are under way, all of them if None."""
        if not self._pending:
            return
        with self._timer("all_gather_wait"):
            for index in list(self._pending) if indices is None else indices:
                if index in self._pending:
                    with named_range(self._buckets[index].title):
                        self._pending.pop(index).wait()

    def attach(self, model: nn.Module) -> None:
        """Let every block of `model` wait for the parameters in it before its forward.

        A block is an entry of the outermost nn.ModuleList or nn.ModuleDict; what lies outside of blocks is waited for
        by the model's own forward. So a block may read its children's weights in any way, not only through their
        forwards (nn.MultiheadAttention and nn.TransformerEncoderLayer do). `model.state_dict()` waits for all.

        Raises:
            ValueError: a module was compiled already, and would not see the hooks.
        """
        for name, module in model.named_modules():
            if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
                raise ValueError(
                    f"module {name or 'model'!r} was compiled before overlap_param_gather(), so it would not wait for "
                    "its parameters: call overlap_param_gather() first, then torch.compile"
                )
        bucket_of = {id(self._params[t]): i for i, b in enumerate(self._buckets) for t in b.spec.tensors}
        wait = torch.compiler.disable(self.wait)  # here, for it imports the compiler
        for block, members in _blocks(model):
            needs = sorted({bucket_of[id(p)] for m in members for p in m.parameters(False) if id(p) in bucket_of})
            if needs:
                self._hooks.append(block.register_forward_pre_hook(lambda *_, needs=needs: wait(needs)))
        self._hooks.append(model.register_state_dict_pre_hook(lambda *_: self.wait()))
        self.overlap = True

    @property
    def under_way(self) -> bool:
        """Whether a collective was started and not waited for."""
        return bool(self._pending)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()


def _blocks(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Modules whose forward is entered before anything in them is used, each with all modules it stands for."""
    outside: list[nn.Module] = []
    blocks: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        outside.append(module)
        for child in module.children():
            entered = type(child).forward is not nn.Module.forward
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and entered:
                blocks.append(child)
            else:
                walk(child)

    walk(model)
    yield model, outside
    for block in blocks:
        yield block, list(block.modules())
