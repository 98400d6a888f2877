"""FLOPs that a model needs for a token, and what devices reach at most: the two sides of MFU."""

from __future__ import annotations

from launch.models import DenseConfig, MoonlightConfig

# Dense bf16 TFLOP/s as the makers state them; the first name that is part of the device's counts.
_PEAKS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "MI300X": 1307.4,
}


def peak_tflops(device_name: str | None) -> float | None:
    """Dense bf16 TFLOP/s of a device by its name; None where it is not known."""
    return next((peak for name, peak in _PEAKS.items() if name in (device_name or "")), None)


def training_flops(config: DenseConfig | MoonlightConfig, length: int) -> int:
    """FLOPs (multiply and add counted apart) of forward and backward for one token of a sample of `length`.

    Three times the forward pass, recomputation not counted. As in PaLM's definition of MFU (arXiv 2204.02311,
    appendix B), attention counts as if it were not causal, and of a mixture of experts only the chosen ones count.
    """
    matmul = _moonlight(config, length) if isinstance(config, MoonlightConfig) else _dense(config, length)
    return 3 * 2 * (matmul + config.hidden_size * config.vocab_size)


def _dense(config: DenseConfig, length: int) -> int:
    """Multiplications per token of all blocks."""
    queries = config.num_attention_heads * config.head_dim
    projections = config.hidden_size * 2 * (queries + config.num_key_value_heads * config.head_dim)
    attention = 2 * length * queries
    return config.num_hidden_layers * (projections + attention + 3 * config.hidden_size * config.intermediate_size)


def _moonlight(config: MoonlightConfig, length: int) -> int:
    """Multiplications per token of all blocks."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    compressed = config.q_lora_rank
    query = compressed * (hidden + heads * key) if compressed else hidden * heads * key
    latent = hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    latent += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention = length * heads * (key + config.v_head_dim)
    block = query + latent + attention + heads * config.v_head_dim * hidden
    dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    experts = config.num_experts_per_tok + config.n_shared_experts
    routed = hidden * config.n_routed_experts + 3 * hidden * config.moe_intermediate_size * experts
    return (
        config.num_hidden_layers * block
        + dense * 3 * hidden * config.intermediate_size
        + (config.num_hidden_layers - dense) * routed
    )
