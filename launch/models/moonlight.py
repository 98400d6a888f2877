"""Moonlight-style mixture of experts (DeepSeek-V3 small): latent attention, sigmoid router, shared experts.

Architecture: DeepSeek-V2 (arXiv 2405.04434, section 2.1: multi-head latent attention), DeepSeek-V3
(arXiv 2412.19437, section 2.1.2: sigmoid routing, balance without an auxiliary loss), by default sized down
as Moonlight (arXiv 2502.16982) sizes it: no query compression, no expert groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distributed_muon.layout.matrices import Experts, MatrixRule, Split
from launch.models.layers import Block, CausalLM, RopeScaling, Rotary, SwiGLU


@dataclass
class MoonlightConfig:
    """Sizes of a Moonlight model, named as in its config.json; the default is a toy for two cores."""

    vocab_size: int = 256
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 48
    qk_rope_head_dim: int = 16
    v_head_dim: int = 64
    intermediate_size: int = 768
    first_k_dense_replace: int = 1
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 256
    routed_scaling_factor: float = 1.0
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    q_lora_rank: int = 0  # 0: queries are not compressed
    n_group: int = 1
    topk_group: int = 1
    rope_scaling: RopeScaling | None = None


class LatentAttention(nn.Module):
    """Multi-head latent attention: keys and values of all heads come from one small latent per token.

    A head's query and key have a part without position (qk_nope) and a rotary part (qk_rope); the rotary
    key is one for all heads.
    """

    def __init__(self, config: MoonlightConfig) -> None:
        super().__init__()
        heads, self.latent = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        if self.value > self.nope + self.rope:
            raise ValueError(
                f"v_head_dim={self.value} exceeds qk_nope_head_dim + qk_rope_head_dim={self.nope + self.rope}"
            )
        hidden = config.hidden_size
        width = heads * (self.nope + self.rope)
        if config.q_lora_rank:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(config.q_lora_rank, width, bias=False)
        else:
            self.q_proj = nn.Linear(hidden, width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=False)
        # The published model leaves this norm at its default, whatever rms_norm_eps says.
        self.kv_a_layernorm = nn.RMSNorm(self.latent, eps=1e-6)
        self.kv_b_proj = nn.Linear(self.latent, heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(heads * self.value, hidden, bias=False)
        # Where tensor parallelism sums the gradients that the heads of several ranks give to the one rotary key.
        self.shared_key = nn.Identity()
        self.compressed = config.q_lora_rank > 0
        self.rotary = Rotary(self.rope, config.max_position_embeddings, config.rope_theta, config.rope_scaling)
        scale = (self.nope + self.rope) ** -0.5
        self.softmax_scale = scale if config.rope_scaling is None else scale * config.rope_scaling.softmax

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.compressed else self.q_proj(x)
        # -1: tensor parallelism leaves a part of the heads.
        q = q.view(batch, time, -1, self.nope + self.rope).transpose(1, 2)  # (b, heads, t, nope + rope)
        q_nope, q_rope = q.split((self.nope, self.rope), dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.latent, self.rope), dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(batch, time, -1, self.nope + self.value).transpose(1, 2)
        k_nope, v = kv.split((self.nope, self.value), dim=-1)  # (b, heads, t, nope), (b, heads, t, value)
        k_rope = self.rotary(self.shared_key(k_rope).unsqueeze(1)).expand(-1, q.shape[1], -1, -1)  # (b, heads, t, rope)
        q = torch.cat((q_nope, self.rotary(q_rope)), dim=-1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        # The fused attention kernels want values as wide as the keys; zero columns do not change the rest.
        v = F.pad(v, (0, self.nope + self.rope - self.value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)[..., : self.value]
        return self.o_proj(out.transpose(1, 2).reshape(batch, time, -1))  # (b, t, hidden)


class Router(nn.Linear):
    """Chooses each token's experts by sigmoid score plus a bias that only balances the load.

    The bias has no gradient: `update_expert_bias` moves it, outside of the optimizer.
    """

    def __init__(self, config: MoonlightConfig) -> None:
        super().__init__(config.hidden_size, config.n_routed_experts, bias=False)
        self.top_k, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        if not 0 < self.top_k <= config.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok={self.top_k} is not within n_routed_experts={config.n_routed_experts}"
            )
        self.groups, self.top_groups = config.n_group, config.topk_group
        if config.n_routed_experts % self.groups or not 0 < self.top_groups <= self.groups:
            raise ValueError(
                f"n_group={self.groups} and topk_group={self.top_groups} do not divide "
                f"n_routed_experts={config.n_routed_experts}"
            )
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))  # fp32
        # Tokens per expert since the last bias update; not persistent, for checkpoints lie between steps.
        load = torch.zeros(config.n_routed_experts, dtype=torch.int64)
        self.register_buffer("load", load, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and weights of each token.

        Args:
            x: (tokens, hidden).

        Returns:
            (tokens, top_k) int64 expert numbers, and their (tokens, top_k) fp32 weights, which add up to
            routed_scaling_factor.
        """
        scores = F.linear(x.float(), self.weight.float()).sigmoid()  # (tokens, experts)
        ranked = scores + self.e_score_correction_bias
        if self.groups > 1:
            grouped = ranked.unflatten(-1, (self.groups, -1))  # (tokens, groups, experts of a group)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
            open_groups = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
            ranked = grouped.masked_fill(~open_groups.unsqueeze(-1), float("-inf")).flatten(-2)
        chosen = ranked.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        return chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale


class ExpertStack(nn.Module):
    """The routed experts of a layer, stacked: SwiGLU number e is gate_up_proj[e] and down_proj[e]."""

    def __init__(self, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.intermediate_size = intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))

    def matrix_rules(self) -> dict[str, MatrixRule]:
        """How Muon is to divide the stacks: each expert's gate, up and down are matrices of their own."""
        halves = Split((self.intermediate_size, self.intermediate_size), names=("gate", "up"))
        return {"gate_up_proj": Experts(inner=halves), "down_proj": Experts()}

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """Apply expert e to its run of rows.

        Args:
            x: (rows, hidden), sorted by expert.
            counts: rows of each expert, in order.

        Returns:
            (rows, hidden).
        """
        # unbind, not an index per expert: its backward builds the gradient stack once instead of E times.
        gate_up, down = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
        out = []
        for rows, expert_gate_up, expert_down in zip(x.split(counts), gate_up, down, strict=True):
            gate, up = F.linear(rows, expert_gate_up).chunk(2, dim=-1)  # (rows of e, intermediate) each
            out.append(F.linear(F.silu(gate) * up, expert_down))
        return torch.cat(out)


class MixtureOfExperts(nn.Module):
    """Each token passes its top-k routed experts and all shared experts."""

    def __init__(self, config: MoonlightConfig) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config)
        self.experts = ExpertStack(config.n_routed_experts, hidden, ffn)
        self.shared_experts = SwiGLU(hidden, ffn * config.n_shared_experts) if config.n_shared_experts else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)  # (tokens, hidden)
        chosen, weights = self.gate(flat)  # (tokens, top_k) each
        load = torch.bincount(chosen.flatten(), minlength=self.gate.out_features)
        if self.training:
            self.gate.load += load
        # Copies, then permutations: their gradients add up in a fixed order, so that a rerun is bit-exact.
        copies = flat.unsqueeze(1).expand(-1, self.gate.top_k, -1).flatten(0, 1)  # (tokens * top_k, hidden)
        order = chosen.flatten().argsort(stable=True)  # the copies sorted by expert
        rows = self.experts(copies.index_select(0, order), load.tolist())
        routed = torch.empty_like(rows).index_copy(0, order, rows).unflatten(0, chosen.shape)
        out = (weights.unsqueeze(1).to(x.dtype) @ routed).squeeze(1)  # (tokens, hidden)
        if self.shared_experts is not None:
            out = out + self.shared_experts(flat)
        return out.view_as(x)


class Moonlight(CausalLM):
    """The mixture-of-experts model of a `MoonlightConfig`; the first layers stay dense."""

    def __init__(self, config: MoonlightConfig) -> None:
        hidden, eps = config.hidden_size, config.rms_norm_eps
        blocks = []
        for layer in range(config.num_hidden_layers):
            dense = layer < config.first_k_dense_replace
            mlp = SwiGLU(hidden, config.intermediate_size) if dense else MixtureOfExperts(config)
            blocks.append(Block(hidden, eps, LatentAttention(config), mlp))
        super().__init__(
            config.vocab_size,
            hidden,
            eps,
            blocks,
            config.max_position_embeddings,
            config.tie_word_embeddings,
            config.initializer_range,
        )
        self.config = config


@torch.no_grad()
def update_expert_bias(model: nn.Module, rate: float, group: dist.ProcessGroup | None = None) -> float | None:
    """Move each router's bias by `rate` towards the mean load, then start counting anew.

    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): raise the bias of underloaded experts, lower that of
    overloaded ones. Call once per optimizer step. Collective over `group` where the model has routers.

    Args:
        model: any model; one without routers is left alone.
        rate: size of the step, DeepSeek-V3's "bias update speed" gamma.
        group: the data-parallel ranks, the default group if None.

    Returns:
        The largest load of an expert over the mean load, the worst of all layers; None without routers.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:
        return None
    load = torch.stack([router.load for router in routers])  # (layers, experts) int64
    if dist.is_initialized():
        dist.all_reduce(load, group=group)
    mean = load.double().mean(dim=1, keepdim=True)
    for router, step in zip(routers, (mean - load).sign() * rate, strict=True):
        router.e_score_correction_bias += step.to(router.e_score_correction_bias.dtype)
        router.load.zero_()
    return float((load / mean.clamp(min=1)).max())
