"""Shapes of published models: matrix counts and parameter totals as their authors and checkpoints state them."""

from __future__ import annotations

import pytest

from distributed_muon.planning.model_shapes import NAMED_MODELS, model_shapes

QWEN2_HALF_B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
DEEPSEEK_V2 = {
    **NAMED_MODELS["deepseek-v3"],
    "model_type": "deepseek_v2",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "num_hidden_layers": 60,
    "first_k_dense_replace": 1,
    "n_routed_experts": 160,
    "moe_intermediate_size": 1536,
    "n_shared_experts": 2,
    "vocab_size": 102400,
}
DEEPSEEK_V2_LITE = {
    **NAMED_MODELS["moonlight-16b-a3b"],
    "model_type": "deepseek_v2",
    "intermediate_size": 10944,
    "vocab_size": 102400,
}


def counts(config) -> tuple[int, int]:
    """(Muon matrices, all parameters)."""
    shapes = model_shapes(config)
    return sum(s.algorithm == "muon" for s in shapes), sum(s.numel for s in shapes)


@pytest.mark.parametrize(
    ("name", "matrices", "parameters"),
    [
        ("moonlight-16b-a3b", 5207, 15_960_110_208),
        ("deepseek-v3", 45_090, 671_026_419_200),
        ("kimi-k2", 69_668, 1_026_408_232_448),
        ("llama-3-8b", 224, 8_030_261_248),
        ("llama-3-70b", 560, 70_553_706_496),
        ("llama-3-405b", 882, 405_853_388_800),
        ("qwen3-8b", 252, 8_190_735_360),
        ("qwen3-30b-a3b", 18_672, 30_532_122_624),
        ("mixtral-8x7b", 928, 46_702_792_704),
    ],
)
def test_named_models(name, matrices, parameters):
    assert counts(NAMED_MODELS[name]) == (matrices, parameters)


def test_every_named_model_is_pinned():
    assert len(NAMED_MODELS) == 9


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (QWEN2_HALF_B, 494_032_768),
        (DEEPSEEK_V2, 235_741_434_880),
        (DEEPSEEK_V2_LITE, 15_706_484_224),
        ({"text_config": NAMED_MODELS["kimi-k2"], "model_type": "kimi_k25"}, 1_026_408_232_448),
    ],
)
def test_published_totals_of_other_configs(config, parameters):
    assert counts(config)[1] == parameters


def test_moonlight_matrices():
    """The matrices of the report's model, 15.29 B parameters without embeddings."""
    shapes = model_shapes(NAMED_MODELS["moonlight-16b-a3b"])
    muon = [s for s in shapes if s.algorithm == "muon"]
    assert sum(s.numel for s in muon) == 15_288_893_440
    layer = {s.name.removeprefix("model.layers.26."): s for s in muon if s.layer == 26}
    expected = {
        "self_attn.q_proj.weight": (3072, 2048),
        "self_attn.kv_a_proj_with_mqa.weight": (576, 2048),
        "self_attn.kv_b_proj.weight": (4096, 512),
        "self_attn.o_proj.weight": (2048, 2048),
        "mlp.gate.weight": (64, 2048),
        "mlp.experts.63.gate_proj.weight": (1408, 2048),
        "mlp.experts.63.up_proj.weight": (1408, 2048),
        "mlp.experts.63.down_proj.weight": (2048, 1408),
        "mlp.shared_experts.gate_proj.weight": (2816, 2048),
        "mlp.shared_experts.up_proj.weight": (2816, 2048),
        "mlp.shared_experts.down_proj.weight": (2048, 2816),
    }
    assert {name: layer[name].shape for name in expected} == expected
    assert sum(s.expert for s in layer.values()) == 3 * 64
    assert [s.shape for s in muon if s.layer == 0][-3:] == [(11264, 2048), (11264, 2048), (2048, 11264)]


def test_what_adamw_gets_and_what_nobody_trains():
    shapes = model_shapes(NAMED_MODELS["moonlight-16b-a3b"])
    adamw = {s.name for s in shapes if s.algorithm == "adamw"}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= adamw
    assert "model.layers.3.self_attn.kv_a_layernorm.weight" in adamw
    frozen = [s for s in shapes if s.algorithm == "frozen"]
    assert [s.name for s in frozen] == [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in range(1, 27)]
    assert "lm_head.weight" not in {s.name for s in model_shapes(QWEN2_HALF_B)}  # tied


def test_tensor_parallel_dimensions():
    """Column-parallel rows, row-parallel columns; router, norms and latent down-projections whole."""
    dims = {s.name: s.tp_dim for s in model_shapes(NAMED_MODELS["deepseek-v3"]) if s.layer in (None, 60)}
    prefix = "model.layers.60."
    assert dims["model.embed_tokens.weight"] == dims["lm_head.weight"] == 0
    layer = {name.removeprefix(prefix): dim for name, dim in dims.items() if name.startswith(prefix)}
    cut = {name: dim for name, dim in layer.items() if dim is not None and ".experts." not in name}
    assert cut == {
        "self_attn.q_b_proj.weight": 0,
        "self_attn.kv_b_proj.weight": 0,
        "self_attn.o_proj.weight": 1,
        "mlp.shared_experts.gate_proj.weight": 0,
        "mlp.shared_experts.up_proj.weight": 0,
        "mlp.shared_experts.down_proj.weight": 1,
    }
    qwen2 = {s.name: s.tp_dim for s in model_shapes(QWEN2_HALF_B)}
    assert qwen2["model.layers.0.self_attn.k_proj.bias"] == 0


def test_layers_that_skip_the_experts():
    config = {**NAMED_MODELS["qwen3-30b-a3b"], "num_hidden_layers": 4, "mlp_only_layers": [1], "decoder_sparse_step": 2}
    assert {s.layer for s in model_shapes(config) if s.expert} == {3}
    config = {**NAMED_MODELS["moonlight-16b-a3b"], "num_hidden_layers": 5, "moe_layer_freq": 2}
    assert {s.layer for s in model_shapes(config) if s.expert} == {2, 4}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'.*llama.*mixtral"),
        ({"model_type": "llama", "vocab_size": 8}, "'llama' lacks the entry 'hidden_size'"),
    ],
)
def test_unknown_configs(config, says):
    with pytest.raises(ValueError, match=says):
        model_shapes(config)
