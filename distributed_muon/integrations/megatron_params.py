"""Megatron-core's modules and parameter marks, read as matrices: which parameter divides how, cut by which TP rank.

The module around a parameter says what it is (linear_qkv of a SelfAttention, linear_fc1 of a gated MLP, an expert
stack); the marks on it say how tensor parallelism cut it. Modules are told by class name, so that one table serves
every release. A matrix that no entry declares is refused by name, for a fused one would train wrongly in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from distributed_muon.engine.collectives import Collectives
from distributed_muon.layout.matrices import QKV, Experts, MatrixRule, Split, TensorSpec, Whole

Override = str | MatrixRule  # "muon", "per_head", "adamw", or a rule of distributed_muon.layout.matrices


class TensorParallel(NamedTuple):
    """Sizes of the tensor-parallel groups that cut dense and expert parameters."""

    dense: int
    expert: int


@dataclass(frozen=True)
class MarkedParameter:
    """A parameter, and what its module and marks say of it.

    Args:
        name: without wrappers, with layers and experts numbered over the whole model, whatever PP, VPP and EP are.
        param: the model's parameter.
        spec: its matrices and TP cut; without a rule it goes to AdamW.
        expert: reduced over the expert-data-parallel group (allreduce=False).
        replicated: every TP rank holds all of it.
        reason: what decided.
    """

    name: str
    param: nn.Parameter
    spec: TensorSpec
    expert: bool
    replicated: bool
    reason: str


class Declared(NamedTuple):
    """What a module declares of one of its matrices.

    Args:
        rule: how it divides; a function of the whole parameter's rows where that matters.
        tp_dim: dimension (of the 2-D view) that tensor parallelism cuts; None to read the mark.
        stride: interleaved parts per TP rank.
        view: shape to see the flat elements in, where it is not the parameter's own.
        transposed: stored (in, out).
        per_head: makes the rule by which every attention head has matrices of its own.
    """

    rule: MatrixRule | Callable[[int], MatrixRule]
    tp_dim: int | None = None
    stride: int = 1
    view: tuple[int, ...] | None = None
    transposed: bool = False
    per_head: Callable[[], MatrixRule] | None = None


def read_parameters(
    model_chunks: Sequence[nn.Module],
    tensor_parallel: TensorParallel,
    overrides: Mapping[str, Override],
    adjust_lr_fn: str = "match_rms_adamw",
    chosen: Mapping[nn.Parameter, str] | None = None,
) -> list[MarkedParameter]:
    """Every trainable parameter of the chunks once, in registration order.

    Args:
        model_chunks: DDP-wrapped model chunks of this rank.
        tensor_parallel: sizes of the TP groups.
        overrides: fnmatch pattern of (global) names -> "muon", "per_head", "adamw" or a rule; the last match counts.
        adjust_lr_fn: the scale rule, to refuse matrices it cannot be applied to.
        chosen: "muon" or "adamw" by parameter, where `config_overrides` says it; `overrides` win.

    Raises:
        ValueError: a matrix that nothing declares, or a cut that is not supported, by name.
    """
    found: dict[nn.Parameter, MarkedParameter] = {}
    taken: set[str] = set()
    for index, chunk in enumerate(model_chunks):
        declared, numbers = _declarations(chunk), _global_numbers(chunk)
        for wrapped, param in chunk.named_parameters():
            if param.requires_grad and param not in found:
                module = chunk.get_submodule(wrapped.rpartition(".")[0])
                name = unwrapped(_renumbered(wrapped, numbers))
                name = f"model{index}.{name}" if name in taken else name
                taken.add(name)
                asked = {name: chosen[param]} if chosen and param in chosen else {}
                asked |= {pattern: rule for pattern, rule in overrides.items() if fnmatchcase(name, pattern)}
                beside = declared.get(getattr(module, "weight", None))  # a bias is cut as its weight is
                stride = beside.stride if beside else 1
                found[param] = _read(name, param, module, declared.get(param), tensor_parallel, asked, stride)
                by_side = adjust_lr_fn in ("original", "unit_rms_norm")
                if by_side and param in declared and declared[param].transposed:
                    raise ValueError(
                        f"parameter {name!r} is stored transposed, so adjust_lr_fn={adjust_lr_fn!r} would see "
                        "rows as columns: use adjust_lr_fn='match_rms_adamw' or TEGroupedMLP/SequentialMLP"
                    )
    return list(found.values())


def check_overrides(overrides: Mapping[str, Override], members: Sequence[MarkedParameter], world: Collectives) -> None:
    """Raise a ValueError on every rank for a pattern that matches no parameter of any; collective over `world`."""
    mine = {pattern: any(fnmatchcase(member.name, pattern) for member in members) for pattern in overrides}
    everyone = world.gather_objects(mine)
    for pattern in dict.fromkeys(pattern for found in everyone for pattern in found):
        if not any(found.get(pattern) for found in everyone):
            raise ValueError(
                f"overrides pattern {pattern!r} matches no parameter: names are those of the whole model, such as "
                "'decoder.layers.0.mlp.linear_fc1.weight'; explain() prints them"
            )


def unwrapped(name: str) -> str:
    """The name below DDP and Float16Module."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _global_numbers(chunk: nn.Module) -> dict[str, int]:
    """Number in the whole model of every layer, and of the first expert of every MoE layer, by the module's name."""
    numbers = {}
    for prefix, module in chunk.named_modules():
        if getattr(module, "local_expert_indices", None):
            numbers[f"{prefix}.experts"] = module.local_expert_indices[0]
        elif isinstance(getattr(module, "layer_number", None), int):
            numbers[prefix] = module.layer_number - 1  # Megatron counts from 1
    return numbers


def _renumbered(name: str, numbers: Mapping[str, int]) -> str:
    experts = re.match(r".*\.experts(?=\.)", name)
    if experts and experts[0] in numbers:  # local_experts.<number>.linear_fc1.weight, or linear_fc1.weight<number>
        first = numbers[experts[0]]
        tail = re.sub(
            r"(?<=^\.local_experts\.)\d+|(?<=\.weight)\d+$|(?<=\.bias)\d+$",
            lambda local: str(int(local[0]) + first),
            name[experts.end() :],
        )
        name = experts[0] + tail
    layer = re.match(r"(.*?\blayers\.)\d+(?=\.)", name)
    if layer and layer[0] in numbers:
        name = f"{layer[1]}{numbers[layer[0]]}{name[layer.end() :]}"
    return name


def _read(
    name: str,
    param: nn.Parameter,
    module: nn.Module,
    declared: Declared | None,
    tensor_parallel: TensorParallel,
    asked: Mapping[str, Override],
    stride: int,
) -> MarkedParameter:
    expert = not getattr(param, "allreduce", True)
    size = tensor_parallel.expert if expert else tensor_parallel.dense
    in_experts = ".experts." in f".{name}"
    if in_experts and not expert and tensor_parallel.expert != tensor_parallel.dense:
        raise ValueError(
            f"parameter {name!r} belongs to experts of another tensor-parallel size but is reduced like a dense one: "
            "use expert_model_parallel_size > 1 or an equal expert_tensor_parallel_size"
        )
    if getattr(param, "is_gtp_weight_remat", False):
        raise ValueError(f"parameter {name!r} is sharded by GTP weight rematerialization: set its size to 1")
    marked_dim = getattr(param, "partition_dim", -1) if getattr(param, "tensor_model_parallel", False) else -1
    cut = size > 1 and bool(getattr(param, "tensor_model_parallel", False))
    rule, declared, reason = _decide(name, param, module, declared, stride, asked)
    shape = declared.view or tuple(param.shape)
    if declared.tp_dim is not None and size > 1:
        marked_dim, cut = declared.tp_dim, True
    stride = declared.stride
    if rule is None:  # the cut still says which elements of the whole parameter these are
        tp = {"tp_dim": marked_dim, "tp_size": size, "tp_stride": stride} if cut and marked_dim in (0, 1) else {}
        return MarkedParameter(name, param, TensorSpec(name, shape, **tp), expert, not cut, reason)
    if cut and marked_dim not in (0, 1):
        raise ValueError(
            f"parameter {name!r} is cut by tensor parallelism along no known dimension: mark partition_dim"
        )
    if cut and getattr(param, "partition_stride", 1) not in (1, stride):
        raise ValueError(
            f"parameter {name!r} has partition_stride {param.partition_stride}, which its rule does not expect: "
            f"give overrides={{{name!r}: 'adamw'}}"
        )
    tp = {"tp_dim": marked_dim, "tp_size": size, "tp_stride": stride} if cut else {}
    if callable(rule):
        rule = rule((shape[0] if len(shape) == 2 else shape[-1]) * (size if cut else 1))
    spec = TensorSpec(name, shape, rule, **tp)
    spec.matrices()
    return MarkedParameter(name, param, spec, expert, not cut, reason)


def _decide(
    name: str, param: Tensor, module: nn.Module, declared: Declared | None, stride: int, asked: Mapping[str, Override]
) -> tuple[MatrixRule | Callable[[int], MatrixRule] | None, Declared, str]:
    """Rule (None: AdamW), declaration to read the cut by, and reason."""
    plain = declared or Declared(Whole(), stride=stride)
    if asked:
        pattern, value = list(asked.items())[-1]
        if value == "adamw":
            return None, plain, f"override {pattern!r}"
        if value == "muon":
            return plain.rule, plain, f"override {pattern!r}"
        if value == "per_head":
            if plain.per_head is None:
                raise ValueError(f"overrides[{pattern!r}] is 'per_head', but parameter {name!r} has no attention heads")
            return plain.per_head(), plain, f"override {pattern!r}"
        if isinstance(value, MatrixRule):
            stride = getattr(param, "partition_stride", 1)
            return value, plain._replace(rule=value, stride=stride), f"override {pattern!r}"
        raise ValueError(
            f"overrides[{pattern!r}] is {value!r}: use 'muon', 'per_head', 'adamw' or a rule such as QKV(...)"
        )
    if getattr(param, "use_muon", None) is False:
        return None, plain, "use_muon is False"
    if param.ndim < 2 or param.numel() == max(param.shape):
        return None, plain, "vector"
    kinds = {cls.__name__ for cls in type(module).__mro__}
    if getattr(param, "is_embedding_or_output_parameter", False) or any("Embedding" in kind for kind in kinds):
        return None, plain, "embedding or output layer"
    if any(kind.startswith("Conv") for kind in kinds) or name.rpartition(".")[2].startswith("conv"):
        return None, plain, "depthwise convolution"
    if declared is None:
        raise ValueError(
            f"parameter {name!r} of shape {tuple(param.shape)} in {type(module).__name__} is no matrix that is known "
            f"here: give overrides={{{name!r}: 'adamw'}}, 'muon' or a rule such as Split(...)"
        )
    return declared.rule, declared, "declared by its module"


def _declarations(chunk: nn.Module) -> dict[nn.Parameter, Declared]:
    """What the modules of a chunk declare, by parameter."""
    found: dict[nn.Parameter, Declared] = {}
    for prefix, module in chunk.named_modules():
        for leaf, declared in _declared_by(module, unwrapped(prefix)):
            param: Any = module
            for part in leaf.split("."):
                param = getattr(param, part, None)
            if isinstance(param, nn.Parameter):
                found[param] = declared
    return found


_WHOLE = Declared(Whole())


def _declared_by(module: nn.Module, name: str) -> Iterator[tuple[str, Declared]]:
    """(parameter below the module, declaration) for the classes that Megatron builds its layers from."""
    kinds = {cls.__name__ for cls in type(module).__mro__}
    config = getattr(module, "config", None)
    if "Attention" in kinds:
        yield "linear_proj.weight", _WHOLE
    if "SelfAttention" in kinds:
        gate = bool(getattr(config, "attention_output_gate", False))
        sizes = (config.num_attention_heads, config.num_query_groups, config.kv_channels)
        yield "linear_qkv.weight", Declared(QKV(*sizes, gate=gate), per_head=lambda: _qkv_heads(*sizes, gate))
    if "CrossAttention" in kinds:
        yield "linear_q.weight", _WHOLE
    if "MLASelfAttention" in kinds:
        yield from (("linear_q_down_proj.weight", _WHOLE), ("linear_kv_down_proj.weight", _WHOLE))
        query = Declared(Whole(), per_head=lambda: _heads(config, q=config.qk_head_dim + config.qk_pos_emb_head_dim))
        key_value = Declared(Whole(), per_head=lambda: _heads(config, k=config.qk_head_dim, v=config.v_head_dim))
        yield from (("linear_q_proj.weight", query), ("linear_q_up_proj.weight", query))
        yield "linear_kv_up_proj.weight", key_value
        if getattr(module, "linear_qkv_down_proj", None) is not None:
            latent = config.kv_lora_rank + config.qk_pos_emb_head_dim
            rule = Split((config.q_lora_rank, latent), names=("q", "kv"))
            yield "linear_qkv_down_proj.weight", Declared(rule)
    if "MLP" in kinds or kinds & {"TEGroupedMLP", "GroupedMLP"}:
        yield from _declared_by_mlp(module, kinds, config, name)
    if "Router" in kinds:
        yield "weight", _WHOLE
    if "MultiTokenPredictionLayer" in kinds:
        yield "eh_proj.weight", _WHOLE
    if kinds & {"MambaMixer", "GatedDeltaNet"}:
        yield "out_proj.weight", _WHOLE


def _declared_by_mlp(module: nn.Module, kinds: set[str], config: Any, name: str) -> Iterator[tuple[str, Declared]]:
    gated = config.gated_linear_unit
    shared = "SharedExpertMLP" in kinds
    interleave = "moe_shared_expert_glu_interleave_size" if shared else "moe_mlp_glu_interleave_size"
    if gated and getattr(config, interleave, None) and (shared or "experts" in name):
        raise ValueError(f"parameter {name}.linear_fc1: {interleave} interleaves gate and up: set it to None")
    first = Declared(_halves, stride=2) if gated else _WHOLE
    if "GroupedMLP" in kinds:  # stacks of (in, out) matrices, seen as experts x in x out
        experts, hidden = module.num_local_experts, config.hidden_size
        wide = module.weight1.numel() // (experts * hidden)
        inner = (lambda width: Experts(Split((width // 2,) * 2, dim=1, names=("gate", "up")))) if gated else Experts()
        yield "weight1", Declared(inner, 1, 2 if gated else 1, (experts, hidden, wide), transposed=True)
        narrow = module.weight2.numel() // (experts * hidden)
        yield "weight2", Declared(Experts(), 0, 1, (experts, narrow, hidden), transposed=True)
    elif "TEGroupedMLP" in kinds:  # one parameter per expert; the marks are missing where the dispatcher cuts
        for expert in range(module.num_local_experts):
            yield f"linear_fc1.weight{expert}", first._replace(tp_dim=0)
            yield f"linear_fc2.weight{expert}", _WHOLE._replace(tp_dim=1)
    else:
        yield "linear_fc1.weight", first
        yield "linear_fc2.weight", _WHOLE


def _halves(rows: int) -> Split:
    return Split((rows // 2, rows // 2), names=("gate", "up"))


def _qkv_heads(heads: int, groups: int, size: int, gate: bool) -> Split:
    """Every query (, gate), key and value head of linear_qkv, which stores them group by group."""
    share, names = heads // groups, []
    for group in range(groups):
        for kind in ("q", "gate") if gate else ("q",):
            names += [f"{kind}{head}" for head in range(group * share, (group + 1) * share)]
        names += [f"k{group}", f"v{group}"]
    return Split((size,) * len(names), names=tuple(names))


def _heads(config: Any, **sizes: int) -> Split:
    """Heads stored one after the other, each of parts of these sizes."""
    names = [f"{part}{head}" for head in range(config.num_attention_heads) for part in sizes]
    return Split(tuple(sizes.values()) * config.num_attention_heads, names=tuple(names))
