"""What a step asks of a device: kernel launches, allocations, and waits of the host; counted without the device.

A dispatch mode sees every operation of torch; what CUDA would do for it is known from its arguments: a view launches
nothing, `_foreach_...` one kernel per so many tensors where all are dense and of one dtype, else one per tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Tensors that one launch of multi-tensor apply takes, by the number of lists (ATen/native/cuda/MultiTensorApply.cuh).
_TENSORS_A_LAUNCH = (110, 64, 48, 36, 30)
_WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
_NO_KERNEL = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "set_", "detach",
              "_record_function_enter_new", "_record_function_exit")  # fmt: skip


class LaunchCounter(TorchDispatchMode):
    """Counts inside `with`.

    Attributes:
        ops: calls by operation, views left out. launches: kernels by operation, as CUDA would run it.
        allocations: new storages by operation. waits: of the host for a value, by what asked for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.allocations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._patches = ExitStack()

    def __enter__(self) -> LaunchCounter:
        # On a CPU tensor it reads the memory without an operation.
        self._patches.enter_context(mock.patch.object(Tensor, "tolist", self._waiting("tolist", Tensor.tolist)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        made = {t.untyped_storage()._cdata for t in tensors_in(result) if t.numel()} - before
        self.allocations[name] += len(made)
        if name in _WAITS:
            self.waits[name] += 1
        elif not func.is_view and name not in _NO_KERNEL:
            self.ops[name] += 1
            self.launches[name] += (kernels := _launches(name, args))
            self.launched(name, kernels, args, result)
        return result

    def launched(self, name: str, kernels: int, args: Any, result: Any) -> None:
        """For those that want to know more than the numbers."""

    def totals(self) -> dict[str, int]:
        """Sums of the four."""
        kinds = ("ops", "launches", "allocations", "waits")
        return {kind: sum(getattr(self, kind).values()) for kind in kinds}

    def _waiting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(*args: Any) -> Any:
            self.waits[name] += 1
            return method(*args)

        return waiting


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _launches(name: str, args: Sequence[Any]) -> int:
    if not name.startswith(("_foreach", "_fused")):
        return 1
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
    count = len(lists[0])
    dtypes = [{t.dtype for t in some} for some in lists]
    # A copy may change the dtype, nothing else may.
    one_dtype = all(len(found) == 1 for found in dtypes) and (name == "_foreach_copy_" or len(set.union(*dtypes)) == 1)
    alike = all(len({(t.shape, t.stride()) for t in same}) == 1 for same in zip(*lists, strict=True))
    dense = all(t.is_contiguous() for some in lists for t in some)
    if not (one_dtype and alike and dense) and name.startswith("_foreach"):
        return count
    depth = len(lists) + (not name.endswith("_"))
    return -(-count // _TENSORS_A_LAUNCH[depth - 1])
