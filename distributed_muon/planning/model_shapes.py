"""Parameter shapes of published models from their config.json, without building the model.

Names and shapes are those of the Hugging Face checkpoints, every routed expert a parameter of its own.
Multi-token-prediction layers are left out, as in the published parameter totals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

Config = Mapping[str, Any]
_GATED = ("gate_proj", "up_proj", "down_proj")


class ParameterShape(NamedTuple):
    """One parameter of a model.

    Args:
        name, shape: as in the checkpoint.
        algorithm: "muon", "adamw", or "frozen" for what no optimizer trains (the aux-free router bias).
        role: what it is, in a few words.
        layer: decoder layer it belongs to, None for embedding, head and final norm.
        expert: it belongs to one routed expert, so that expert parallelism places it.
        tp_dim: dimension that Megatron-style tensor parallelism cuts, None where replicated.
    """

    name: str
    shape: tuple[int, ...]
    algorithm: str
    role: str
    layer: int | None = None
    expert: bool = False
    tp_dim: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


LayerShapes = Callable[[Config, int], Iterator[ParameterShape]]


def model_shapes(config: Config) -> list[ParameterShape]:
    """Every parameter of the model that a Hugging Face config.json describes, in forward order.

    Routing follows the Moonlight report (arXiv 2502.16982): hidden matrices and the router to Muon;
    embedding, head, norms and biases to AdamW.

    Args:
        config: the parsed config.json; `text_config` is used where a multimodal model nests it.

    Raises:
        ValueError: `model_type` is not one of SUPPORTED, or an entry the shapes need is missing.
    """
    config = config.get("text_config", config)
    kind = config.get("model_type")
    if kind not in _LAYERS:
        raise ValueError(f"model_type {kind!r} is not known: supported are {', '.join(SUPPORTED)}")
    try:
        return list(_model(config, _LAYERS[kind]))
    except KeyError as error:
        raise ValueError(f"config.json of model_type {kind!r} lacks the entry {error}") from None


def _model(config: Config, layer_shapes: LayerShapes) -> Iterator[ParameterShape]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield ParameterShape("model.embed_tokens.weight", (vocab, hidden), "adamw", "embedding", tp_dim=0)
    for layer in range(config["num_hidden_layers"]):
        for shape in layer_shapes(config, layer):
            yield shape._replace(name=f"model.layers.{layer}.{shape.name}", layer=layer)
    yield _norm("model.norm", hidden)
    if not config.get("tie_word_embeddings", False):
        yield ParameterShape("lm_head.weight", (vocab, hidden), "adamw", "head", tp_dim=0)


def _dense_layer(config: Config, layer: int) -> Iterator[ParameterShape]:
    """Llama, Qwen2, Qwen3."""
    yield from _grouped_query_attention(config)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    yield from _gated_mlp("mlp", hidden, ffn, bias=config.get("mlp_bias", False))
    yield from _layer_norms(config)


def _mixtral_layer(config: Config, layer: int) -> Iterator[ParameterShape]:
    yield from _grouped_query_attention(config)
    hidden, ffn, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    yield from _experts("block_sparse_moe", experts, hidden, ffn, names=("w1", "w3", "w2"))
    yield from _layer_norms(config)


def _qwen3_moe_layer(config: Config, layer: int) -> Iterator[ParameterShape]:
    yield from _grouped_query_attention(config)
    hidden = config["hidden_size"]
    sparse = (layer + 1) % config.get("decoder_sparse_step", 1) == 0
    if sparse and layer not in config.get("mlp_only_layers", ()):
        yield from _experts("mlp", config["num_experts"], hidden, config["moe_intermediate_size"])
    else:
        yield from _gated_mlp("mlp", hidden, config["intermediate_size"])
    yield from _layer_norms(config)


def _deepseek_layer(config: Config, layer: int) -> Iterator[ParameterShape]:
    """DeepSeek-V2 and V3, Moonlight, Kimi-K2: latent attention, shared experts, first layers dense."""
    yield from _latent_attention(config)
    hidden = config["hidden_size"]
    if layer >= config["first_k_dense_replace"] and layer % config.get("moe_layer_freq", 1) == 0:
        ffn, experts = config["moe_intermediate_size"], config["n_routed_experts"]
        yield from _experts("mlp", experts, hidden, ffn)
        default = "greedy" if config["model_type"] == "deepseek_v2" else "noaux_tc"
        if config.get("topk_method", default) == "noaux_tc":
            role = "aux-free router bias, set by the load"
            yield ParameterShape("mlp.gate.e_score_correction_bias", (experts,), "frozen", role)
        if config.get("n_shared_experts"):
            yield from _gated_mlp("mlp.shared_experts", hidden, ffn * config["n_shared_experts"])
    else:
        yield from _gated_mlp("mlp", hidden, config["intermediate_size"])
    yield from _layer_norms(config)


def _grouped_query_attention(config: Config) -> Iterator[ParameterShape]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    groups = config.get("num_key_value_heads") or heads
    qwen2 = config["model_type"] == "qwen2"
    input_bias = qwen2 or config.get("attention_bias", False)
    for name, count in (("q", heads), ("k", groups), ("v", groups)):
        rows = count * head_dim
        yield from _linear(f"self_attn.{name}_proj", rows, hidden, "attention", tp_dim=0, bias=input_bias)
    output_bias = input_bias and not qwen2
    yield from _linear("self_attn.o_proj", hidden, heads * head_dim, "attention", tp_dim=1, bias=output_bias)
    if config["model_type"] in ("qwen3", "qwen3_moe"):
        yield _norm("self_attn.q_norm", head_dim)
        yield _norm("self_attn.k_norm", head_dim)


def _latent_attention(config: Config) -> Iterator[ParameterShape]:
    """Multi-head latent attention; the down-projections are replicated over tensor parallelism."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rope, nope, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
    q_rank, kv_rank = config.get("q_lora_rank"), config["kv_lora_rank"]
    bias = config.get("attention_bias", False)
    q_rows = heads * (nope + rope)
    if q_rank is None:
        yield from _linear("self_attn.q_proj", q_rows, hidden, "attention", tp_dim=0)
    else:
        yield from _linear("self_attn.q_a_proj", q_rank, hidden, "attention", bias=bias)
        yield _norm("self_attn.q_a_layernorm", q_rank)
        yield from _linear("self_attn.q_b_proj", q_rows, q_rank, "attention", tp_dim=0)
    yield from _linear("self_attn.kv_a_proj_with_mqa", kv_rank + rope, hidden, "attention", bias=bias)
    yield _norm("self_attn.kv_a_layernorm", kv_rank)
    yield from _linear("self_attn.kv_b_proj", heads * (nope + value), kv_rank, "attention", tp_dim=0)
    yield from _linear("self_attn.o_proj", hidden, heads * value, "attention", tp_dim=1, bias=bias)


def _experts(
    prefix: str, count: int, hidden: int, ffn: int, names: tuple[str, str, str] = _GATED
) -> Iterator[ParameterShape]:
    """Router and routed experts."""
    yield from _linear(f"{prefix}.gate", count, hidden, "router")
    first = [s._replace(role="routed expert", expert=True) for s in _gated_mlp("", hidden, ffn, names=names)]
    for expert in range(count):
        for shape in first:
            yield shape._replace(name=f"{prefix}.experts.{expert}{shape.name}")


def _gated_mlp(
    prefix: str,
    hidden: int,
    ffn: int,
    names: tuple[str, str, str] = _GATED,
    bias: bool = False,
) -> Iterator[ParameterShape]:
    gate, up, down = names
    yield from _linear(f"{prefix}.{gate}", ffn, hidden, "feed-forward", tp_dim=0, bias=bias)
    yield from _linear(f"{prefix}.{up}", ffn, hidden, "feed-forward", tp_dim=0, bias=bias)
    yield from _linear(f"{prefix}.{down}", hidden, ffn, "feed-forward", tp_dim=1, bias=bias)


def _linear(
    name: str, rows: int, cols: int, role: str, tp_dim: int | None = None, bias: bool = False
) -> Iterator[ParameterShape]:
    yield ParameterShape(f"{name}.weight", (rows, cols), "muon", role, tp_dim=tp_dim)
    if bias:
        yield ParameterShape(f"{name}.bias", (rows,), "adamw", "bias", tp_dim=0 if tp_dim == 0 else None)


def _norm(name: str, size: int) -> ParameterShape:
    return ParameterShape(f"{name}.weight", (size,), "adamw", "norm")


def _layer_norms(config: Config) -> Iterator[ParameterShape]:
    yield _norm("input_layernorm", config["hidden_size"])
    yield _norm("post_attention_layernorm", config["hidden_size"])


_LAYERS: dict[str, LayerShapes] = {
    "llama": _dense_layer,
    "qwen2": _dense_layer,
    "qwen3": _dense_layer,
    "qwen3_moe": _qwen3_moe_layer,
    "mixtral": _mixtral_layer,
    "deepseek_v2": _deepseek_layer,
    "deepseek_v3": _deepseek_layer,
    "kimi_k2": _deepseek_layer,
}
SUPPORTED = tuple(_LAYERS)


def _config(entries: str, *values: Any, **more: Any) -> Config:
    return {**dict(zip(entries.split(), values, strict=True)), **more}


_COMMON = "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size "
_GROUPED = _COMMON + "num_key_value_heads"
_LATENT = _COMMON + "q_lora_rank first_k_dense_replace n_routed_experts moe_intermediate_size n_shared_experts"
_LATENT_DIMS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_QWEN3_MOE = {"head_dim": 128, "num_experts": 128, "moe_intermediate_size": 768}

# Name -> the config.json entries that set shapes, from the published checkpoints.
NAMED_MODELS: dict[str, Config] = {
    "moonlight-16b-a3b": _config(
        _LATENT, "deepseek_v3", 2048, 11264, 27, 16, 163840, None, 1, 64, 1408, 2, **_LATENT_DIMS
    ),
    "deepseek-v3": _config(_LATENT, "deepseek_v3", 7168, 18432, 61, 128, 129280, 1536, 3, 256, 2048, 1, **_LATENT_DIMS),
    "kimi-k2": _config(_LATENT, "kimi_k2", 7168, 18432, 61, 64, 163840, 1536, 1, 384, 2048, 1, **_LATENT_DIMS),
    "llama-3-8b": _config(_GROUPED, "llama", 4096, 14336, 32, 32, 128256, 8),
    "llama-3-70b": _config(_GROUPED, "llama", 8192, 28672, 80, 64, 128256, 8),
    "llama-3-405b": _config(_GROUPED, "llama", 16384, 53248, 126, 128, 128256, 8),
    "qwen3-8b": _config(_GROUPED, "qwen3", 4096, 12288, 36, 32, 151936, 8, head_dim=128),
    "qwen3-30b-a3b": _config(_GROUPED, "qwen3_moe", 2048, 6144, 48, 32, 151936, 4, **_QWEN3_MOE),
    "mixtral-8x7b": _config(_GROUPED, "mixtral", 4096, 14336, 32, 32, 32000, 8, num_local_experts=8),
}
