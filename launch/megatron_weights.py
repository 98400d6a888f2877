"""The weights of the plain models, by their names, put into this rank's part of a megatron-core GPT.

Megatron fuses (q, k, v of a query group; gate and up), cuts by tensor parallelism, numbers experts and layers by rank,
pads the vocabulary, and rotates latent attention's dimensions in another order. One table says what each parameter is
made of; what it does not name is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

# Parameter of a layer -> weights of the plain layer, to be put one below the other. Norms stand alone in Megatron's own
# modules and inside of the linear layer that follows in Transformer Engine's.
_LAYER = {
    r"input_layernorm\.weight|self_attention\.linear_(?:qkv|q_proj)\.layer_norm_weight": ("input_layernorm",),
    r"pre_mlp_layernorm\.weight|mlp\.linear_fc1\.layer_norm_weight": ("post_attention_layernorm",),
    r"self_attention\.linear_qkv\.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    r"self_attention\.linear_proj\.weight": ("self_attn.o_proj",),
    r"self_attention\.linear_q_proj\.weight": ("self_attn.q_proj",),
    r"self_attention\.linear_q_down_proj\.weight": ("self_attn.q_a_proj",),
    r"self_attention\.q_layernorm\.weight|self_attention\.linear_q_up_proj\.layer_norm_weight": (
        "self_attn.q_a_layernorm",
    ),
    r"self_attention\.linear_q_up_proj\.weight": ("self_attn.q_b_proj",),
    r"self_attention\.linear_kv_down_proj\.weight": ("self_attn.kv_a_proj_with_mqa",),
    r"self_attention\.kv_layernorm\.weight": ("self_attn.kv_a_layernorm",),
    r"self_attention\.linear_kv_up_proj\.weight": ("self_attn.kv_b_proj",),
    r"mlp\.linear_fc1\.weight": ("mlp.gate_proj", "mlp.up_proj"),
    r"mlp\.linear_fc2\.weight": ("mlp.down_proj",),
    r"mlp\.router\.weight": ("mlp.gate",),
    r"mlp\.shared_experts\.linear_fc1\.weight": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    r"mlp\.shared_experts\.linear_fc2\.weight": ("mlp.shared_experts.down_proj",),
}
_OUTSIDE = {
    "embedding.word_embeddings.weight": "embed_tokens.weight",
    "decoder.final_layernorm.weight": "norm.weight",
    "output_layer.weight": "lm_head.weight",
}
# SequentialMLP's local_experts.E.linear_fc1.weight, TEGroupedMLP's linear_fc1.weightE.
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.)?linear_fc([12])\.weight(\d*)")


@torch.no_grad()
def load_plain_weights(model: GPTModel, weights: Mapping[str, Tensor]) -> None:
    """Fill the parameters of `model`, not yet wrapped, and the biases of its routers; no collective.

    Args:
        model: this rank's stage (or chunk of one); parallel_state must be initialized.
        weights: state dict of the plain model (`launch.models`) of the same sizes, whole; any dtype.

    Raises:
        ValueError: a parameter that the table does not name, weights of another shape, or a weight of these layers
            that no parameter takes, by name.
        KeyError: weights that are missing.
    """
    source = _Source(weights)
    numbers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    for name, param in model.named_parameters():
        param.copy_(_fit(name, param, _parts(name, numbers, model.config, source)))
    for name, buffer in model.named_buffers():
        if name.endswith("mlp.router.expert_bias"):
            _, layer = _layer_of(name, numbers)
            buffer.copy_(source[f"layers.{layer}.mlp.gate.e_score_correction_bias"])
    for layer in numbers.values():
        unused = sorted(name for name in weights if name.startswith(f"layers.{layer}.") and name not in source.used)
        if unused:
            raise ValueError(f"weights {unused[0]!r} have no place in the Megatron model: train with --init megatron")


class _Source:
    """Weights by name that remembers which were asked for."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights, self.used = weights, set[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.used.add(name)
        return self._weights[name]


def _layer_of(name: str, numbers: Mapping[str, int]) -> tuple[str, int]:
    """The prefix of a layer's parameter, and the number of the layer in the whole model."""
    prefix = next((prefix for prefix in numbers if name.startswith(prefix)), None)
    if prefix is None:
        raise ValueError(f"parameter {name!r} has no place in the plain model: train with --init megatron")
    return prefix, numbers[prefix]


def _parts(name: str, numbers: Mapping[str, int], config: TransformerConfig, weights: _Source) -> list[Tensor]:
    """The whole matrices that stand one below the other in a parameter, each cut alike by tensor parallelism."""
    if name in _OUTSIDE:
        return [weights[_OUTSIDE[name]]]
    prefix, layer = _layer_of(name, numbers)
    leaf, plain = name.removeprefix(prefix), f"layers.{layer}."
    expert = _EXPERT.fullmatch(leaf)
    if expert:
        return _expert_parts(int(expert[1] or expert[3]), expert[2] == "1", config, weights, f"{plain}mlp.experts.")
    sources = next((sources for pattern, sources in _LAYER.items() if re.fullmatch(pattern, leaf)), None)
    if sources is None:
        raise ValueError(f"parameter {name!r} has no place in the plain model: train with --init megatron")
    parts = [weights[f"{plain}{source}.weight"] for source in sources]
    if leaf.endswith("linear_qkv.weight"):
        return [_interleave(parts, config.num_query_groups)]
    if leaf.endswith(("linear_q_proj.weight", "linear_q_up_proj.weight")):
        return [_rotary_order(parts[0], config.num_attention_heads, config.qk_pos_emb_head_dim)]
    if leaf.endswith("linear_kv_down_proj.weight"):
        return [_rotary_order(parts[0], 1, config.qk_pos_emb_head_dim)]
    return parts


def _expert_parts(local: int, first: bool, config: TransformerConfig, weights: _Source, stack: str) -> list[Tensor]:
    """Gate and up, or down, of this rank's expert number `local`."""
    count = config.num_moe_experts // config.expert_model_parallel_size
    number = parallel_state.get_expert_model_parallel_rank() * count + local
    return [*weights[f"{stack}gate_up_proj"][number].chunk(2)] if first else [weights[f"{stack}down_proj"][number]]


def _interleave(qkv: list[Tensor], groups: int) -> Tensor:
    """q (heads * d, hidden), k and v (groups * d, hidden) -> per query group its queries, its key, its value."""
    return torch.cat([part.unflatten(0, (groups, -1)) for part in qkv], dim=1).flatten(0, 1)


def _rotary_order(weight: Tensor, heads: int, rotary: int) -> Tensor:
    """Row pairs (i, i + rotary / 2) of the last `rotary` rows of every head -> rows (2 i, 2 i + 1)."""
    by_head = weight.unflatten(0, (heads, -1))
    fixed, turned = by_head[:, :-rotary], by_head[:, -rotary:]
    turned = turned.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat((fixed, turned), dim=1).flatten(0, 1)


def _fit(name: str, param: Tensor, parts: list[Tensor]) -> Tensor:
    """This rank's cut of each part, put together; missing rows of a padded vocabulary are zero."""
    expert = ".experts." in f".{name}"
    size, rank = (
        (parallel_state.get_expert_tensor_parallel_world_size(), parallel_state.get_expert_tensor_parallel_rank())
        if expert
        else (parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank())
    )
    dim = getattr(param, "partition_dim", -1) if getattr(param, "tensor_model_parallel", False) else -1
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        missing = param.shape[0] * (size if dim == 0 else 1) - parts[0].shape[0]
        parts = [torch.cat((parts[0], parts[0].new_zeros(missing, parts[0].shape[1])))]
    if dim >= 0 and size > 1:
        parts = [part.chunk(size, dim)[rank] for part in parts]
    value = torch.cat(parts)
    if value.shape != param.shape:
        raise ValueError(
            f"parameter {name!r} has shape {tuple(param.shape)}, its part of the plain weights {tuple(value.shape)}: "
            "give both models the same sizes"
        )
    return value
