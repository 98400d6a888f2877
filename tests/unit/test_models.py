"""The models: each layer against a plain loop, the routing of experts, and what the optimizer is told."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F

from distributed_muon.layout.matrices import TensorSpec
from distributed_muon.param_groups import muon_param_groups
from launch.models import (
    DenseConfig,
    MoonlightConfig,
    add_size_flags,
    build_model,
    cast_parameters,
    sizes_from_flags,
    update_expert_bias,
)
from launch.models.dense import Attention
from launch.models.layers import Rotary
from launch.models.moonlight import ExpertStack, LatentAttention, MixtureOfExperts

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TINY_DENSE = {**TINY, "num_key_value_heads": 2, "head_dim": 8}
TINY_MOONLIGHT = {
    **TINY,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "routed_scaling_factor": 1.5,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(name, **sizes):
    return build_model(name, **({**TINY_DENSE, **sizes} if name == "dense" else {**TINY_MOONLIGHT, **sizes}))


def causal_attention(q, k, v):
    """One head in plain words: q, k (time, dim), v (time, value)."""
    scores = q @ k.T / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    return scores.softmax(-1) @ v


def test_rotary_keeps_norms_and_depends_on_distance_only():
    rotary = Rotary(8, 64, 10_000.0)
    q, k = torch.randn(8), torch.randn(8)
    rotated_q, rotated_k = (rotary(x.expand(1, 1, 64, 8))[0, 0] for x in (q, k))
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(64))
    products = rotated_q @ rotated_k.T  # (position of q, position of k)
    torch.testing.assert_close(products[5, 2], products[60, 57], rtol=1e-4, atol=1e-5)
    assert abs(products[5, 2] - products[5, 4]) > 1e-3
    # Dimension i turns with dimension i + 4, by `position` radians for i = 0.
    torch.testing.assert_close(rotated_q[3, 0], q[0] * math.cos(3) - q[4] * math.sin(3))


def test_dense_attention_is_grouped_query_attention():
    config = DenseConfig(**TINY_DENSE)
    layer = Attention(config)
    x = torch.randn(1, 7, 32)
    q, k, v = layer.q_proj(x)[0], layer.k_proj(x)[0], layer.v_proj(x)[0]
    heads = []
    for head in range(4):
        group = head // 2  # two query heads share a key and value
        query = layer.rotary(q[:, head * 8 : head * 8 + 8][None, None])[0, 0]
        key = layer.rotary(k[:, group * 8 : group * 8 + 8][None, None])[0, 0]
        heads.append(causal_attention(query, key, v[:, group * 8 : group * 8 + 8]))
    torch.testing.assert_close(layer(x)[0], layer.o_proj(torch.cat(heads, -1)), rtol=1e-4, atol=1e-6)


def test_latent_attention_shares_one_rotary_key_and_pads_no_value():
    config = MoonlightConfig(**TINY_MOONLIGHT)
    layer = LatentAttention(config)
    x = torch.randn(1, 7, 32)
    q, a = layer.q_proj(x)[0], layer.kv_a_proj_with_mqa(x)[0]
    latent, shared_key = a[:, :16], layer.rotary(a[:, 16:][None, None])[0, 0]
    kv = layer.kv_b_proj(layer.kv_a_layernorm(latent))
    heads = []
    for head in range(4):
        query, key_value = q[:, head * 12 : head * 12 + 12], kv[:, head * 18 : head * 18 + 18]
        query = torch.cat((query[:, :8], layer.rotary(query[:, 8:][None, None])[0, 0]), -1)
        key = torch.cat((key_value[:, :8], shared_key), -1)
        heads.append(causal_attention(query, key, key_value[:, 8:]))
    torch.testing.assert_close(layer(x)[0], layer.o_proj(torch.cat(heads, -1)), rtol=1e-4, atol=1e-6)


def moe_layer():
    layer = MixtureOfExperts(MoonlightConfig(**TINY_MOONLIGHT))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return layer


def test_mixture_of_experts_equals_a_loop_over_tokens():
    layer, x = moe_layer(), torch.randn(2, 5, 32)
    layer.gate.e_score_correction_bias[3] = 0.2
    out = layer(x)
    for token, result in zip(x.flatten(0, 1), out.flatten(0, 1), strict=True):
        scores = (layer.gate.weight @ token).sigmoid()
        chosen = (scores + layer.gate.e_score_correction_bias).argsort(descending=True)[:2]
        expected = layer.shared_experts(token)
        for expert in chosen:
            gate, up = (layer.experts.gate_up_proj[expert] @ token).split(20)
            value = layer.experts.down_proj[expert] @ (F.silu(gate) * up)
            expected = expected + 1.5 * scores[expert] / scores[chosen].sum() * value
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_experts_without_tokens_get_a_zero_gradient():
    layer = moe_layer()
    layer.gate.e_score_correction_bias[:2] = 100.0  # every token goes to experts 0 and 1
    layer(torch.randn(2, 5, 32)).square().sum().backward()
    used = layer.experts.gate_up_proj.grad.flatten(1).norm(dim=1) > 0
    assert used.tolist() == [True, True, False, False, False, False]
    assert layer.gate.weight.grad.norm() > 0


def test_expert_bias_follows_the_load_outside_of_the_optimizer():
    layer = moe_layer()
    assert layer.gate.load.dtype == torch.int64  # exact beyond 2^24 tokens
    assert not layer.gate.e_score_correction_bias.requires_grad
    layer.gate.load.copy_(torch.tensor([9, 3, 0, 4, 4, 4]))  # mean 4
    assert update_expert_bias(layer, 0.25) == 9 / 4
    assert layer.gate.e_score_correction_bias.tolist() == [-0.25, 0.25, 0.25, 0, 0, 0]
    assert layer.gate.load.sum() == 0
    layer(torch.randn(2, 5, 32))
    layer(torch.randn(2, 5, 32))
    assert layer.gate.load.sum() == 2 * 10 * 2  # every microbatch counts, top_k times
    layer.eval()(torch.randn(2, 5, 32))
    assert layer.gate.load.sum() == 40
    assert update_expert_bias(tiny("dense"), 0.25) is None


@pytest.mark.parametrize("name", ["dense", "moonlight"])
def test_loss_is_causal_next_token_cross_entropy(name):
    model = tiny(name)
    tokens, targets = torch.randint(0, 256, (2, 2, 12))
    logits = model(tokens)
    assert logits.shape == (2, 12, 256)
    loss = model(tokens, targets)
    log_probability = logits.log_softmax(-1).gather(-1, targets[..., None])
    torch.testing.assert_close(loss, -log_probability.mean())
    assert abs(loss.item() - math.log(256)) < 0.05  # knows nothing yet
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 256
    torch.testing.assert_close(model(changed)[:, :8], logits[:, :8])
    assert (model(changed)[:, 8] - logits[:, 8]).abs().max() > 1e-3
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["dense", "moonlight"])
def test_muon_gets_hidden_matrices_one_expert_at_a_time(name):
    model = tiny(name)
    algorithm, matrices = {}, {}
    for group in muon_param_groups(model):
        for full_name, parameter in group["params"]:
            algorithm[full_name] = group["algorithm"]
            rule = group.get("matrices")
            if rule is not None:
                spec = TensorSpec(full_name, tuple(parameter.shape), rule)
                matrices[full_name] = [(m.rows, m.cols) for m in spec.matrices()]
    adamw = {name for name, choice in algorithm.items() if choice == "adamw"}
    assert {"embed_tokens.weight", "lm_head.weight"} < adamw
    assert all(model.get_parameter(n).dim() == 1 for n in adamw - {"embed_tokens.weight", "lm_head.weight"})
    assert set(algorithm) == {name for name, _ in model.named_parameters()}
    if name == "moonlight":
        assert algorithm["layers.1.mlp.gate.weight"] == "muon"
        assert matrices == {
            "layers.1.mlp.experts.gate_up_proj": [(20, 32)] * 12,
            "layers.1.mlp.experts.down_proj": [(32, 20)] * 6,
        }


@pytest.mark.parametrize("name", ["dense", "moonlight"])
def test_blocks_add_to_the_residual_stream(name):
    block = tiny(name).layers[1]
    x = torch.randn(2, 5, 32)
    silent = [parameter for name, parameter in block.named_parameters() if "o_proj" in name or "down_proj" in name]
    for parameter in silent:
        torch.nn.init.zeros_(parameter)
    assert torch.equal(block(x), x)
    torch.nn.init.normal_(block.self_attn.o_proj.weight)
    torch.testing.assert_close(block(x), x + block.self_attn(block.input_layernorm(x)))


def test_first_layer_is_dense_and_no_shared_experts_is_possible():
    model = tiny("moonlight", num_hidden_layers=3, first_k_dense_replace=2, n_shared_experts=0)
    assert [isinstance(layer.mlp, MixtureOfExperts) for layer in model.layers] == [False, False, True]
    assert model.layers[2].mlp.shared_experts is None
    assert model(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()


def test_cast_keeps_buffers_in_fp32_and_tied_weights_tied():
    model = tiny("moonlight", tie_word_embeddings=True)
    cast_parameters(model, torch.bfloat16)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}
    tokens = torch.randint(0, 256, (2, 12))
    loss = model(tokens, tokens)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, tiny_like(model)(tokens, tokens), rtol=0.02, atol=0.02)


def tiny_like(model):
    """The fp32 twin of a bf16 model."""
    twin = tiny("moonlight", tie_word_embeddings=True)
    twin.load_state_dict(model.state_dict())
    return twin


def test_initial_weights_depend_on_the_seed_alone():
    first = tiny("moonlight").state_dict()
    torch.manual_seed(0)
    second = tiny("moonlight").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["layers.0.self_attn.q_proj.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert first["layers.0.self_attn.o_proj.weight"].std().item() == pytest.approx(0.01, rel=0.1)
    assert "layers.1.mlp.gate.e_score_correction_bias" in first  # or a resumed run routes differently


def test_expert_stack_applies_each_expert_to_its_rows():
    stack = ExpertStack(3, 8, 4)
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter)
    rows = torch.randn(5, 8)
    whole = stack(rows, [2, 0, 3])
    torch.testing.assert_close(whole[:2], stack(rows[:2], [2, 0, 0]))
    torch.testing.assert_close(whole[2:], stack(rows[2:], [0, 0, 3]))


def test_size_flags_reach_the_model_and_wrong_ones_are_named():
    parser = argparse.ArgumentParser()
    add_size_flags(parser)
    words = ["--hidden-size", "64", "--tie-word-embeddings", "--num-key-value-heads", "2"]
    sizes = sizes_from_flags(parser.parse_args(words))
    assert sizes == {"hidden_size": 64, "tie_word_embeddings": True, "num_key_value_heads": 2}
    assert build_model("dense", **sizes).embed_tokens.weight.shape == (256, 64)
    with pytest.raises(ValueError, match="'moonlight' has no size 'num_key_value_heads'"):
        build_model("moonlight", **sizes)
    with pytest.raises(ValueError, match="'gpt' is unknown: choose from dense, moonlight"):
        build_model("gpt")
    with pytest.raises(ValueError, match="num_attention_heads=4 is not a multiple of num_key_value_heads=3"):
        tiny("dense", num_key_value_heads=3)
    with pytest.raises(ValueError, match="v_head_dim=16 exceeds"):
        tiny("moonlight", v_head_dim=16)
    with pytest.raises(ValueError, match="num_experts_per_tok=9 is not within n_routed_experts=6"):
        tiny("moonlight", num_experts_per_tok=9)
    with pytest.raises(ValueError, match="12 tokens exceed max_position_embeddings=8"):
        tiny("dense", max_position_embeddings=8)(torch.zeros(1, 12, dtype=torch.int64))
