"""The block "distributed_muon" of a DeepSpeed config: what it describes, and what it may not stand beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONFIG_BLOCK = "distributed_muon"


def check_config(config: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first option of a DeepSpeed config that `PartitionedOptimizer` refuses."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (1, 2):
        reason = {
            0: "without partitions there is nothing to save: stage 1 gives the same training with less memory",
            3: "it cuts every parameter over the ranks, which is not supported",
        }.get(stage, "it is unknown")
        raise ValueError(f"zero_optimization.stage={stage}: {reason}; set it to 1 or 2")
    for option in ("offload_optimizer", "offload_param"):
        if (zero.get(option) or {}).get("device", "none") != "none":
            raise ValueError(f"zero_optimization.{option}: states stay on the device of the model; remove the option")
    if zero.get("zenflow"):
        raise ValueError("zero_optimization.zenflow is not supported: remove the option")
    if (config.get("tensor_parallel") or {}).get("autotp_size", 0) > 1:
        raise ValueError("tensor_parallel.autotp_size: matrices cut by AutoTP are not supported; remove the option")
    if zero.get("round_robin_gradients") and (config.get("checkpoint") or {}).get("load_universal"):
        raise ValueError(
            "zero_optimization.round_robin_gradients with checkpoint.load_universal: DeepSpeed would load masters and "
            "moments into wrong places; remove the first"
        )
    autocast = config.get("torch_autocast") or {}
    if autocast.get("enabled") and autocast.get("dtype") not in ("bfloat16", "torch.bfloat16", "bf16"):
        raise ValueError('torch_autocast.dtype: only "bfloat16" is supported; for float16 use fp16.enabled instead')
    if "optimizer" in config:
        raise ValueError(f'optimizer: DeepSpeed would build its own; move the options to the block "{CONFIG_BLOCK}"')
    if not config.get("zero_allow_untested_optimizer"):
        raise ValueError("zero_allow_untested_optimizer: DeepSpeed wants it true for an optimizer that is not its own")
