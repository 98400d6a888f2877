"""What every model here is made of: rotary embedding, SwiGLU, and the language model around its blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """How a trained model was stretched to longer sequences; fields named as in a Hugging Face config.json.

    Args:
        rope_type: "llama3" (Llama 3.1) or "yarn" (arXiv 2309.00071, as DeepSeek-V3 uses it).
        factor: longer by this. original_max_position_embeddings: longest sequence before.
        low_freq_factor, high_freq_factor: of "llama3". beta_fast, beta_slow, mscale, mscale_all_dim: of "yarn".
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def scale(self, frequency: Tensor, theta: float) -> Tensor:
        """The stretched frequencies (dim / 2,): low ones divided by `factor`, high ones kept, a ramp between."""
        if self.rope_type == "llama3":
            turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        else:
            low, high = (
                self._dimension_with(turns, 2 * len(frequency), theta) for turns in (self.beta_fast, self.beta_slow)
            )
            low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * len(frequency) - 1)
            kept = 1 - (torch.arange(len(frequency)) - low) / max(high - low, 0.001)
        kept = kept.clamp(0, 1)
        return frequency * kept + frequency / self.factor * (1 - kept)

    def _dimension_with(self, turns: float, dim: int, theta: float) -> float:
        """The dimension that turns so often over the original length."""
        return dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    @property
    def length(self) -> float:
        """Factor on rotated queries and keys."""
        if self.rope_type != "yarn":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def softmax(self) -> float:
        """Factor on the logits of latent attention."""
        return self._magnitude(self.mscale_all_dim) ** 2 if self.rope_type == "yarn" and self.mscale_all_dim else 1.0

    def _magnitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


class Rotary(nn.Module):
    """Rotary position embedding (RoPE, arXiv 2104.09864), rotating dimension i with i + dim/2 as Llama does.

    Args:
        dim: rotated dimensions of a head, even.
        max_positions: longest sequence.
        theta: base of the wavelengths.
        scaling: of a model for longer sequences than it began with.
    """

    def __init__(self, dim: int, max_positions: int, theta: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"the rotary dimension {dim} is odd: choose an even head size")
        frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        length = 1.0
        if scaling is not None:
            frequency, length = scaling.scale(frequency, theta), scaling.length
        angle = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos() * length, persistent=False)  # (max_positions, dim), fp32
        self.register_buffer("sin", angle.sin() * length, persistent=False)  # (max_positions, dim), fp32

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x (batch, heads, time, dim); same shape and dtype."""
        time = x.shape[-2]
        cos, sin = self.cos[:time].to(x.dtype), self.sin[:time].to(x.dtype)
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), dim=-1) * sin


class SwiGLU(nn.Module):
    """Gated feed-forward layer down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, hidden_size: int, eps: float, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden_size, eps=eps)
        self.self_attn = attention
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps=eps)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalLM(nn.Module):
    """Embedding, blocks, final norm and head; the part that the model families share.

    Args:
        vocab_size, hidden_size, eps: sizes, and the epsilon of the norms.
        blocks: the transformer blocks, first to last.
        max_positions: longest sequence that forward() accepts.
        tied: the head reuses the embedding's weight.
        init_std: standard deviation of every matrix at the start; the projections that write into the
            residual stream get init_std / sqrt(2 * blocks) (GPT-2's rule).
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        eps: float,
        blocks: Iterable[Block],
        max_positions: int,
        tied: bool,
        init_std: float,
    ) -> None:
        super().__init__()
        self.max_positions = max_positions
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                writes_residual = ".o_proj" in name or ".down_proj" in name
                scale = (2 * len(self.layers)) ** -0.5 if writes_residual else 1.0
                nn.init.normal_(parameter, std=init_std * scale)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Next-token logits, or their mean cross-entropy.

        Args:
            tokens: (batch, time) int64.
            targets: (batch, time) int64, the token after each of `tokens`.

        Returns:
            (batch, time, vocab) logits in the parameters' dtype; with `targets` the fp32 scalar mean loss
            in nats per token.
        """
        if tokens.shape[1] > self.max_positions:
            raise ValueError(f"{tokens.shape[1]} tokens exceed max_position_embeddings={self.max_positions}")
        x = self.embed_tokens(tokens)  # (batch, time, hidden)
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast every parameter in place; buffers (rotary tables, router biases) keep fp32.

    Args:
        model: any module; call before the optimizer sees its parameters.
        dtype: the new dtype. Tied parameters stay tied.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
