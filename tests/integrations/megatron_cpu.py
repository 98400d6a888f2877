"""Lets megatron-core run on CPUs and gloo, for tests: what it asks of CUDA is answered by the CPU.

`install()` before any model is built. As a program it runs a trainer under the shim:
`torchrun --nproc_per_node 2 -m tests.integrations.megatron_cpu launch.pretrain_megatron FLAGS`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import runpy
import sys
import typing
import warnings
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
import typing_extensions
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def available() -> bool:
    """Whether megatron-core is installed here."""
    return importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.core") is not None


def older() -> bool:
    """Whether this is the older of the two versions, where long tests of what both do alike are slow ones."""
    return available() and version("megatron-core") < "0.19"


class CudaMeansCpu(TorchFunctionMode):
    """Redirects device="cuda", .cuda() and .to("cuda") to the CPU, and lets CPU tensors claim a CUDA type."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and _is_cuda(device):
            kwargs["device"] = CPU
        name = getattr(func, "__name__", "")
        if name == "cuda":
            return args[0]
        if name == "to":
            args = (args[0], *(CPU if isinstance(a, (str, torch.device)) and _is_cuda(a) else a for a in args[1:]))
        if name == "type" and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)  # Megatron compares these strings
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, int) or str(device).startswith("cuda")


class _Stream:
    """A stream or event that has always finished."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def record_event(self, *args: Any) -> _Stream:
        return _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


@contextlib.contextmanager
def _on_stream(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _patch_torch() -> None:
    cuda = torch.cuda
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = _Stream
    cuda.stream = _on_stream
    cuda.current_device = lambda: CPU
    cuda.synchronize = cuda.empty_cache = lambda *args, **kwargs: None
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.get_device_capability = lambda *args, **kwargs: (8, 0)
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: None
    all_to_all = torch.distributed.all_to_all_single

    def all_to_all_with_lists(
        output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **keywords: Any
    ) -> Any:
        # Only CUDA split sizes are turned into lists by the MoE dispatcher.
        sizes = [s.tolist() if torch.is_tensor(s) else s for s in (output_split_sizes, input_split_sizes)]
        return all_to_all(output, input, *sizes, **keywords)

    torch.distributed.all_to_all_single = all_to_all_with_lists


def _patch_megatron() -> None:
    import megatron.core.models.backends as backends
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.multi_latent_attention as latent_attention

    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    if not hasattr(moe_utils, "te_general_gemm"):  # left undefined without Transformer Engine
        moe_utils.te_general_gemm = None
    backends.LocalSpecProvider.layer_norm = lambda self, *args, **kwargs: _Norm
    latent_attention.HAVE_TE = False  # 0.16 says True without it
    backends.LocalSpecProvider.core_attention = lambda self: _CausalAttention
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core"):
            for norm in ("WrappedTorchNorm", "LayerNormImpl", "LNImpl"):
                if hasattr(module, norm):
                    setattr(module, norm, _Norm)


class _Norm(torch.nn.RMSNorm):
    """RMSNorm with sequence parallelism's mark, which Megatron's wrapper of torch's refuses."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **keywords: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class _CausalAttention(torch.nn.Module):
    """Causal attention for heads of any size; Megatron's own without Transformer Engine refuses MLA's."""

    def __init__(self, config: Any, *args: Any, softmax_scale: float | None = None, **keywords: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: Any, key: Any, value: Any, *args: Any, **keywords: Any) -> Any:
        """query (length, batch, heads, size), key and value with fewer heads -> (length, batch, heads * size)."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        return out.permute(2, 0, 1, 3).flatten(2)


def _patch_for_megatron_lm() -> None:
    """What Megatron-LM's own training loop asks of CUDA, beside what megatron.core does."""
    import torch._dynamo

    torch._dynamo.config.disable = True  # it would compile for the device that is not there
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda.set_device = cuda.manual_seed_all = cuda.reset_peak_memory_stats = lambda *args, **kwargs: None
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *args, **kwargs: 0
    cuda.memory_reserved = cuda.max_memory_reserved = lambda *args, **kwargs: 0
    cuda.memory_stats = lambda *args, **kwargs: defaultdict(int)
    cuda.get_device_properties = lambda *args, **kwargs: SimpleNamespace(major=8, minor=0, total_memory=1)
    for kind in ("Float", "Double", "Int", "Long", "Byte"):
        setattr(cuda, f"{kind}Tensor", getattr(torch, f"{kind}Tensor"))


def install() -> None:
    """Put the shim in place for the rest of this process."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not hasattr(typing, "override"):  # Python 3.11; emerging-optimizers imports it from typing
        typing.override = typing_extensions.override
    import logging

    logging.disable(logging.WARNING)
    _patch_torch()
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.models.gpt.gpt_model
    import megatron.core.optimizer  # noqa: F401

    _patch_megatron()
    CudaMeansCpu().__enter__()


if __name__ == "__main__":
    install()
    module = sys.argv[1]
    # Megatron-LM's training loop wants a GPU; other programs ask whether there is one, and do without.
    if module in ("launch.pretrain_gpt_muon", "pretrain_gpt"):
        _patch_for_megatron_lm()
    sys.argv = [module, *sys.argv[2:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
