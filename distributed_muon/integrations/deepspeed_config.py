"""The block "distributed_muon" of a DeepSpeed config: what it means, what may not stand beside it, and a converter."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from distributed_muon.engine.options import Options, nearest
from distributed_muon.param_groups import muon_param_groups

CONFIG_BLOCK = "distributed_muon"

# Hugging Face refuses to train with an "auto" that nobody has filled in. This one stops a Trainer that has the block
# but does not build its optimizer from it, and would train AdamW without a word.
_GUARD = "create_optimizer"
# "auto" as Hugging Face's Trainer fills an "optimizer" block: our option, and its training arguments.
_AUTO = {
    _GUARD: (),
    "lr": ("learning_rate",),
    "weight_decay": ("weight_decay",),
    "betas": ("adam_beta1", "adam_beta2"),
    "adamw_eps": ("adam_epsilon",),
}
# Keys of DeepSpeed's "optimizer" block that have another name, or none, here.
_THEIR_KEYS = {
    "type": 'write the options themselves into the block, without "type" and "params"',
    "params": 'write the options themselves into the block, without "type" and "params"',
    "muon_lr": 'write "groups": {"muon": {"lr": ...}}',
    "adam_lr": 'write "groups": {"adamw": {"lr": ...}}',
    "ns_method": 'write "ns_form"',
    "torch_adam": "remove it",
}
# Their name -> ours; and options that AdamW here always has, or that choose an implementation.
_SAME = {
    "lr": "lr",
    "momentum": "momentum",
    "weight_decay": "weight_decay",
    "betas": "betas",
    "eps": "adamw_eps",
    "ns_method": "ns_form",
}
_NO_ZERO = ("zenflow", "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
_WITHOUT_MEANING = {"torch_adam": True, "adam_w_mode": True, "bias_correction": True, "amsgrad": False}


def read_block(config: Mapping[str, Any], arguments: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `PartitionedOptimizer` and of `muon_param_groups` that the block of a checked config holds.

    Args:
        config: DeepSpeed's; "auto" in the block is filled in, in place as Hugging Face does.
        arguments: its TrainingArguments, whose values these are.

    Raises:
        ValueError: an option that cannot be right, by its name in the block.
    """
    if CONFIG_BLOCK not in config:
        raise ValueError(f'{CONFIG_BLOCK}: the DeepSpeed config has no such block; add "{CONFIG_BLOCK}": {{"lr": ...}}')
    known = {field.name for field in dataclasses.fields(Options)} | {"groups", "missing_gradients", _GUARD}
    options = _read(CONFIG_BLOCK, config[CONFIG_BLOCK], known, arguments)
    options.pop(_GUARD, None)
    known = {name for name in inspect.signature(muon_param_groups).parameters if name != "model"}
    groups = _read(f"{CONFIG_BLOCK}.groups", options.pop("groups", {}), known, arguments)
    for name in ("muon", "adamw"):
        if name in groups:
            where, own = f"{CONFIG_BLOCK}.groups.{name}", {"algorithm": name}
            (group,) = Options().complete([own])
            groups[name] = _read(where, groups[name], set(group) - {"algorithm", "matrices"}, arguments)
    if "ns_dtype" in options:
        options["ns_dtype"] = getattr(torch, str(options["ns_dtype"]), options["ns_dtype"])
    return options, groups


def _read(where: str, block: Any, known: set[str], arguments: Any) -> dict[str, Any]:
    """One level of the block: known names, "auto" filled in, numbers that YAML or a user left as strings."""
    if not isinstance(block, Mapping):
        raise ValueError(f"{where}={block!r} must hold options by name, such as {{}}")
    out = {}
    for name, value in block.items():
        if name not in known:
            raise ValueError(f"{where}.{name} is unknown: {_THEIR_KEYS.get(name) or nearest(name, sorted(known))}")
        if value == "auto" and name not in ("ns_form", "strategy"):
            value = block[name] = _automatic(f"{where}.{name}", _AUTO.get(name), arguments)
        out[name] = _typed(f"{where}.{name}", value, getattr(Options, name, None))
    return out


def _typed(where: str, value: Any, default: Any) -> Any:
    """A value of the default's type, where that is a number or several: YAML reads 4e-3 as a string."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[str(value).lower()]
        if isinstance(default, (int, float)):
            return type(default)(value)
        if isinstance(default, tuple):
            return tuple(float(item) for item in value)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{where}={value!r} must be like {default!r}") from None
    return value


def _automatic(where: str, names: tuple[str, ...] | None, arguments: Any) -> Any:
    if names is None:
        raise ValueError(f'{where}="auto" has no meaning: leave it out for the default, or give a value')
    if names and arguments is None:
        raise ValueError(
            f'{where}="auto" is {" and ".join(names)} of Hugging Face\'s TrainingArguments: pass '
            "optimizer_from_config(model, trainer.args), or give a value"
        )
    values = [getattr(arguments, name) for name in names]
    return values[0] if len(values) == 1 else values


def check_config(config: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first option of a DeepSpeed config that `PartitionedOptimizer` refuses."""
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ValueError(f'zero_optimization={zero!r} is DeepSpeed\'s old form: write {{"stage": 1}}')
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        reason = "stage 1 gives the same training with less memory" if stage == 0 else "it is unknown"
        raise ValueError(f"zero_optimization.stage={stage}: {reason}; set it to 1, 2 or 3")
    if zero.get("cpu_offload") is not None:
        raise ValueError('zero_optimization.cpu_offload is an old form: write "offload_optimizer": {"device": "cpu"}')
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device", "none") not in ("none", "cpu"):
        raise ValueError(f'zero_optimization.offload_optimizer.device={offload["device"]}: only "cpu" is supported')
    if offload.get("device") == "cpu" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError("zero_force_ds_cpu_optimizer: DeepSpeed wants it false to offload an optimizer not its own")
    if (zero.get("offload_param") or {}).get("device", "none") != "none" or zero.get("cpu_offload_param"):
        raise ValueError(
            "zero_optimization.offload_param is not supported: offload the optimizer, or remove the option"
        )
    unsupported = {
        **{f"zero_optimization.{option}": zero.get(option) for option in _NO_ZERO},
        "zero_optimization.mics_shard_size": zero.get("mics_shard_size", -1) > 0,
        "zero_optimization.zero_hpz_partition_size": zero.get("zero_hpz_partition_size", 1) > 1,
        "zero_optimization.offload_optimizer.ratio": offload.get("ratio", 1.0) < 1,
        "zero_optimization.offload_optimizer.super_offload": offload.get("super_offload"),
        "tensor_parallel.autotp_size": (config.get("tensor_parallel") or {}).get("autotp_size", 0) > 1,
        "sequence_parallel_size": config.get("sequence_parallel_size", 1) > 1,
    }
    for key in ("bf16", "fp16"):
        option = f"{key}_master_weights_and_grads"
        unsupported[f"{key}.{option}"] = (config.get(key) or {}).get(option)
    for option, found in unsupported.items():
        if found:
            raise ValueError(f"{option} is not supported: remove the option")
    if zero.get("round_robin_gradients") and (config.get("checkpoint") or {}).get("load_universal"):
        raise ValueError(
            "zero_optimization.round_robin_gradients with checkpoint.load_universal: DeepSpeed would load masters and "
            "moments into wrong places; remove the first"
        )
    autocast = config.get("torch_autocast") or {}
    if autocast.get("enabled") and autocast.get("dtype") not in ("bfloat16", "torch.bfloat16", "bf16"):
        raise ValueError('torch_autocast.dtype: only "bfloat16" is supported; for float16 use fp16.enabled instead')
    if "optimizer" in config:
        raise ValueError(
            f'optimizer: DeepSpeed would build its own; move the options to the block "{CONFIG_BLOCK}", as `python -m '
            "distributed_muon deepspeed-config FILE` does"
        )
    if config.get("zero_allow_untested_optimizer") is not True:
        raise ValueError("zero_allow_untested_optimizer: DeepSpeed wants it true for an optimizer that is not its own")


def convert_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with DeepSpeed's own "optimizer" block as one with ours that means the same where it can.

    Their Muon's scale and defaults are written out; matrices of an Adam run get Muon at Adam's learning rate.

    Raises:
        ValueError: an optimizer, or an option of it or of the rest of the config, that has no equal here.
    """
    theirs = config.get("optimizer") or {}
    kind, params = str(theirs.get("type", "")).lower(), dict(theirs.get("params") or {})
    if kind not in ("muon", "adam", "adamw"):
        raise ValueError(f"optimizer.type={theirs.get('type')!r} cannot be converted: only Muon, Adam and AdamW can")
    block: dict[str, Any] = {_GUARD: "auto", "weight_decay": 0.0}
    if kind == "muon":
        block |= {"adamw_eps": 1e-10, "adjust_lr_fn": "original"}
    else:
        block |= {"lr": 1e-3, "betas": [0.9, 0.999]}
    rates = {"muon": 0.02, "adamw": 3e-4} if kind == "muon" and "lr" not in params else {}
    for name, value in params.items():
        if name in ("muon_lr", "adam_lr"):
            rates["muon" if name == "muon_lr" else "adamw"] = value
        elif name in _SAME:
            block[_SAME[name]] = value
        elif name != "torch_adam" and _WITHOUT_MEANING.get(name, value) != value:
            raise ValueError(f"optimizer.params.{name}={value!r} has no equal here: remove it")
        elif name not in _WITHOUT_MEANING:
            raise ValueError(f"optimizer.params.{name} is unknown: {nearest(name, [*_SAME, 'muon_lr', 'adam_lr'])}")
    if rates:
        block["groups"] = {algorithm: {"lr": rate} for algorithm, rate in rates.items()}
    rest = {key: value for key, value in config.items() if key != "optimizer"}
    out = {**rest, "zero_allow_untested_optimizer": True, CONFIG_BLOCK: block}
    check_config(out)
    return out
