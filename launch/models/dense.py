"""Llama-style dense transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from launch.models.layers import Block, CausalLM, RopeScaling, Rotary, SwiGLU


@dataclass
class DenseConfig:
    """Sizes of a dense model, named as in a Hugging Face config.json; the default is a toy for two cores."""

    vocab_size: int = 256
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 768
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    rope_scaling: RopeScaling | None = None


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245): `heads / kv_heads` queries share a key and value."""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)
        self.rotary = Rotary(self.head_dim, config.max_position_embeddings, config.rope_theta, config.rope_scaling)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        # -1: tensor parallelism leaves a part of the heads.
        q = self.q_proj(x).view(batch, time, -1, self.head_dim).transpose(1, 2)  # (b, heads, t, d)
        k = self.k_proj(x).view(batch, time, -1, self.head_dim).transpose(1, 2)  # (b, kv, t, d)
        v = self.v_proj(x).view(batch, time, -1, self.head_dim).transpose(1, 2)  # (b, kv, t, d)
        out = F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, time, -1))  # (b, t, hidden)


class Dense(CausalLM):
    """The dense model of a `DenseConfig`."""

    def __init__(self, config: DenseConfig) -> None:
        hidden, eps = config.hidden_size, config.rms_norm_eps
        super().__init__(
            config.vocab_size,
            hidden,
            eps,
            [
                Block(hidden, eps, Attention(config), SwiGLU(hidden, config.intermediate_size))
                for _ in range(config.num_hidden_layers)
            ],
            config.max_position_embeddings,
            config.tie_word_embeddings,
            config.initializer_range,
        )
        self.config = config
