"""Checkpoint folders of Hugging Face: against transformers' own models, hand-made ones, and what is refused."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distributed_muon import DistributedMuon, muon_param_groups
from distributed_muon.planning.model_shapes import NAMED_MODELS, model_shapes
from launch.models import build_model, cast_parameters, huggingface

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DEEPSEEK = {
    **LLAMA,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.446,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50_000.0,
}
# moonshotai/Moonlight-16B-A3B's config.json, but for the remote code and the tokens that it names.
MOONLIGHT_16B = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
KINDS = ["llama", "llama-tied", "deepseek"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


def theirs(transformers, kind, **more):
    """A random model of transformers whose every weight, norms and router biases included, differs."""
    if kind == "deepseek":
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**DEEPSEEK | more))
    else:
        sizes = LLAMA | {"tie_word_embeddings": kind == "llama-tied"} | more
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    for name, tensor in model.state_dict().items():
        torch.nn.init.normal_(tensor, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model.eval()


def ours(kind, dtype=torch.float32):
    """A random model of this project."""
    if kind == "deepseek":
        fixed = {"q_lora_rank", "num_nextn_predict_layers", "num_key_value_heads"}
        model = build_model("moonlight", **{key: value for key, value in DEEPSEEK.items() if key not in fixed})
    else:
        model = build_model("dense", **LLAMA, head_dim=8, tie_word_embeddings=kind == "llama-tied")
    for name, tensor in model.state_dict().items():
        torch.nn.init.normal_(tensor, mean=1.0 if "norm" in name else 0.0, std=0.2)
    cast_parameters(model, dtype)
    return model


def load(folder, dtype=torch.float32):
    name, sizes = huggingface.read_config(folder)
    model = build_model(name, **sizes)
    cast_parameters(model, dtype)
    huggingface.load_weights(model, folder)
    return model


def tensors(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same_files(first, second):
    first, second = tensors(first), tensors(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors")


# As Llama-3.1 and DeepSeek-V3, but with original lengths of which a few tokens are much.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
VARIANTS = {
    "llama-wide-heads": {"head_dim": 12},
    "llama-3.1": {"rope_parameters": {**LLAMA3, "rope_theta": 100.0, "original_max_position_embeddings": 16}},
    "deepseek-halves": {"rope_interleave": False},
    "deepseek-queries": {"q_lora_rank": 24},
    "deepseek-groups": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    "deepseek-yarn": {"rope_parameters": {**YARN, "rope_theta": 100.0, "original_max_position_embeddings": 16}},
    "deepseek-yarn-half": {
        "rope_parameters": {**YARN, "mscale": 0.5, "rope_theta": 9.0, "original_max_position_embeddings": 300}
    },
}


@pytest.mark.parametrize("kind", [*KINDS, *VARIANTS])
def test_logits_equal_transformers_after_loading(transformers, tmp_path, kind):
    more = VARIANTS.get(kind, {})
    reference = theirs(transformers, kind if kind in KINDS else kind.split("-")[0], **more)
    reference.save_pretrained(tmp_path / "model")
    tokens = torch.randint(0, 40, (2, 24))
    model = load(tmp_path / "model")
    with torch.no_grad():
        expected = reference(tokens).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    if kind == "deepseek-halves":
        return  # written with pairs side by side, whatever it was
    huggingface.save(model, tmp_path / "again")
    assert_same_files(tmp_path / "model", tmp_path / "again")
    assert huggingface.read_config(tmp_path / "again") == huggingface.read_config(tmp_path / "model")
    if "rope_parameters" in more:
        assert model.config.rope_scaling.factor == more["rope_parameters"]["factor"]


def test_bf16_is_off_by_rounding_and_by_the_experts_of_a_few_tokens(transformers, tmp_path):
    """Scores that tie within bf16's rounding choose other experts: transformers is as far from its own fp32."""
    errors = {"ours": 0.0, "theirs": 0.0}
    for seed in range(3):
        torch.manual_seed(seed)
        reference = theirs(transformers, "deepseek")
        for name, tensor in reference.state_dict().items():
            if "norm" not in name:
                tensor.mul_(0.1 if "lm_head" not in name else 0.6)
        folder = tmp_path / str(seed)
        reference.bfloat16().save_pretrained(folder)
        options = {"experts_implementation": "eager"}
        exact, rounded = (
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
            for dtype in (torch.float32, torch.bfloat16)
        )
        model, chosen = load(folder, torch.bfloat16), {"ours": [], "theirs": []}
        for ours_layer, their_layer in zip(model.layers[1:], rounded.model.layers[1:], strict=True):
            ours_layer.mlp.gate.register_forward_hook(lambda m, i, out, c=chosen: c["ours"].append(out[0]))
            their_layer.mlp.gate.register_forward_hook(lambda m, i, out, c=chosen: c["theirs"].append(out[2]))
        tokens = torch.randint(0, 40, (4, 48))
        with torch.no_grad():
            expected, found, other = exact(tokens).logits, model(tokens).float(), rounded(tokens).logits.float()
        pairs = zip(chosen["ours"], chosen["theirs"], strict=True)
        same = torch.stack([(a.sort().values == b.sort().values).all(-1) for a, b in pairs]).all(0).view(4, 48)
        same = same.cumprod(1).bool()  # later tokens see an earlier one's difference
        assert same.float().mean() > 0.7
        assert (found - other)[same].abs().max() < 0.04 * expected.std()
        errors["ours"] += float((found - expected).square().mean())
        errors["theirs"] += float((other - expected).square().mean())
    assert errors["ours"] < 2 * errors["theirs"]  # whose token tips over is chance


def test_multi_token_prediction_in_a_file_is_left_out_and_counted(tmp_path):
    huggingface.save(ours("deepseek"), tmp_path / "model")
    edit_config(tmp_path / "model", num_nextn_predict_layers=1)
    model = load(tmp_path / "model")
    assert huggingface.load_weights(model, tmp_path / "model") == 0  # transformers' default, and no such weights
    extra = {"model.layers.3.eh_proj.weight": torch.ones(2), "model.layers.3.norm.weight": torch.ones(2)}
    edit_weights(tmp_path / "model", lambda values: values.update(extra))
    assert huggingface.load_weights(model, tmp_path / "model") == 2
    edit_config(tmp_path / "model", num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"has unexpected tensor 'model\.layers\.3\.eh_proj"):
        huggingface.load_weights(model, tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_transformers_loads_what_is_saved(transformers, tmp_path, kind, shard_bytes):
    model, folder = ours(kind), tmp_path / "model"
    huggingface.save(model, folder, shard_bytes=shard_bytes)
    assert (folder / "model.safetensors.index.json").exists() == (shard_bytes == 20_000)
    reference, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert reference.dtype == torch.float32
    assert reference.config.eos_token_id is None
    tokens = torch.randint(0, 40, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(reference.eval()(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_wrote_is_written_again_bit_for_bit(transformers, tmp_path, kind):
    theirs(transformers, kind).save_pretrained(tmp_path / "first", max_shard_size="20KB")
    assert len(list((tmp_path / "first").glob("*.safetensors"))) > 2
    huggingface.save(load(tmp_path / "first"), tmp_path / "second")
    assert_same_files(tmp_path / "first", tmp_path / "second")
    assert huggingface.read_config(tmp_path / "first") == huggingface.read_config(tmp_path / "second")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_folder_survives_loading_a_step_without_learning_rate_and_saving(tmp_path, kind, dtype):
    huggingface.save(ours(kind, dtype), tmp_path / "first")
    model = load(tmp_path / "first", dtype)
    options = {"lr": 0.0, "weight_decay": 0.1}
    optimizer = DistributedMuon(muon_param_groups(model, muon=options, adamw=options))
    model(torch.randint(0, 40, (2, 12)), torch.randint(0, 40, (2, 12))).backward()
    optimizer.step()
    huggingface.save(model, tmp_path / "second")
    assert_same_files(tmp_path / "first", tmp_path / "second")
    first = tensors(tmp_path / "first")
    assert {value.dtype for name, value in first.items() if "bias" not in name} == {dtype}
    assert {value.dtype for name, value in first.items() if "bias" in name} <= {torch.float32}
    assert json.loads((tmp_path / "first" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def test_layout_of_the_files_by_hand(tmp_path):
    model = ours("deepseek")
    huggingface.save(model, tmp_path / "model", dtype=torch.bfloat16)
    files = tensors(tmp_path / "model")
    attention, moe = model.layers[1].self_attn, model.layers[1].mlp
    # Head 2 of 4: rows 40 to 59, of which the last 8 rotate; the pairs lie side by side in the file.
    ours_q, file_q = attention.q_proj.weight.bfloat16(), files["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(file_q[40:52], ours_q[40:52])
    for pair in range(4):
        assert torch.equal(file_q[52 + 2 * pair], ours_q[52 + pair])
        assert torch.equal(file_q[52 + 2 * pair + 1], ours_q[52 + 4 + pair])
    file_kv = files["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"]
    assert torch.equal(file_kv[17], attention.kv_a_proj_with_mqa.weight.bfloat16()[20])
    for name, expected in {
        "experts.3.gate_proj.weight": moe.experts.gate_up_proj[3, :20],
        "experts.3.up_proj.weight": moe.experts.gate_up_proj[3, 20:],
        "experts.3.down_proj.weight": moe.experts.down_proj[3],
        "shared_experts.up_proj.weight": moe.shared_experts.up_proj.weight,
        "gate.weight": moe.gate.weight,
    }.items():
        assert torch.equal(files[f"model.layers.1.mlp.{name}"], expected.bfloat16())
    bias = files["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32 and torch.equal(bias, moe.gate.e_score_correction_bias)
    assert model.embed_tokens.weight.dtype == torch.float32  # the model itself is left as it was


def test_loading_keeps_buffers_and_ties_and_rounds_to_the_parameters_dtype(tmp_path):
    source = ours("deepseek")
    huggingface.save(source, tmp_path / "model")
    model = load(tmp_path / "model", torch.bfloat16)
    gate = model.layers[2].mlp.gate
    assert gate.weight.dtype == torch.bfloat16
    assert torch.equal(gate.weight, source.layers[2].mlp.gate.weight.bfloat16())
    assert torch.equal(gate.e_score_correction_bias, source.layers[2].mlp.gate.e_score_correction_bias)
    assert gate.load.sum() == 0
    huggingface.save(ours("llama-tied"), tmp_path / "tied")
    assert "lm_head.weight" not in tensors(tmp_path / "tied")
    tied = load(tmp_path / "tied")
    assert tied.lm_head.weight is tied.embed_tokens.weight


def test_shards_stay_below_the_limit_and_an_old_inverse_frequency_is_ignored(tmp_path):
    model, folder = ours("llama"), tmp_path / "model"
    huggingface.save(model, folder, shard_bytes=7000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files][:1] == [f"model-00001-of-{len(files):05}.safetensors"]
    assert index["weight_map"].keys() == tensors(folder).keys()
    for file in files:
        with safe_open(file, "pt") as reader:
            sizes = [reader.get_tensor(name).nbytes for name in reader.keys()]  # noqa: SIM118
            assert all(index["weight_map"][name] == file.name for name in reader.keys())  # noqa: SIM118
            assert reader.metadata() == {"format": "pt"}
        assert sum(sizes) <= 7000
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    huggingface.save(model, tmp_path / "old")
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_weights(tmp_path / "old", lambda values: values.update(derived))
    for loaded in (load(folder), load(tmp_path / "old")):
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_killed_save_leaves_no_folder_and_a_full_folder_is_kept(tmp_path, monkeypatch):
    model, folder = ours("llama"), tmp_path / "model"
    folder.mkdir()  # an empty one may be there
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(huggingface, "_write_json", None)  # stands for a kill after the weights are written
        huggingface.save(model, folder)
    assert not list(folder.iterdir())
    huggingface.save(model, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match="model exists already: name another folder"):
        huggingface.save(model, folder)
    with pytest.raises(ValueError, match=r"config\.json exists already"):
        huggingface.check_target(folder / "config.json")


def test_published_moonlight_maps_fully(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MOONLIGHT_16B))
    name, sizes = huggingface.read_config(tmp_path, data_vocab_size=163_840)
    assert (name, sizes["rope_theta"], sizes["routed_scaling_factor"]) == ("moonlight", 50_000.0, 2.446)
    with torch.device("meta"):
        model = build_model(name, **sizes)
    shapes = {shape.name: shape.shape for shape in model_shapes(NAMED_MODELS["moonlight-16b-a3b"])}
    table = huggingface._table(model, interleaved=True)
    assert {name: tuple(part.view.shape) for name, part in table.items()} == shapes
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert trained + 26 * 64 == sum(part.view.numel() for part in table.values())
    assert trained == 15_960_108_544
    permuted = [name for name, part in table.items() if part.rows is not None]
    assert len(permuted) == 2 * 27
    assert all(table[name].rows.sort().values.equal(torch.arange(len(table[name].view))) for name in permuted)


def test_older_and_newer_configs_mean_the_same(tmp_path):
    base = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"} | {"model_type": "llama"}
    found = []
    for more in (
        {"rope_theta": 5e5, "rope_scaling": None, "rms_norm_eps": 1e-6},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "head_dim": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}, "architectures": ["LlamaForCausalLM"]},
    ):
        (tmp_path / "config.json").write_text(json.dumps(base | more))
        found.append(huggingface.read_config(tmp_path))
    assert found[0] == found[1] == found[2]
    name, sizes = found[0]
    expected = {"rope_theta": 5e5, "head_dim": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "vocab_size": 40}
    assert name == "dense" and expected.items() <= sizes.items()
    (tmp_path / "config.json").write_text(json.dumps(base))
    assert huggingface.read_config(tmp_path)[1]["rope_theta"] == 10_000.0
    moonlight = MOONLIGHT_16B | {"architectures": ["MoonlightForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(moonlight))
    assert huggingface.read_config(tmp_path)[0] == "moonlight"


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type is 'gpt2', but only llama, deepseek_v3"),
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, "architectures names 'LlamaForTokenClass"),
        ("llama", {"hidden_size": None}, "lacks 'hidden_size', a size of model 'dense'"),
        ("llama", {"attention_bias": True}, "attention_bias is True, but model 'dense' can only do False"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', but model 'dense' can only do 'silu'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "lacks 'original_max_position_embeddings'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling has rope_type 'linear', but"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "truncate": False}}, "rope_parameters has 'truncate'"),
        ("llama", {"rope_parameters": {"factor": 2.0}}, "rope_parameters has 'factor'"),
        ("deepseek", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("deepseek", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("deepseek", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek", {"num_key_value_heads": 2}, "num_key_value_heads is 2, but model 'moonlight' can only do 4"),
    ],
)
def test_what_the_models_cannot_do_is_refused_by_key(tmp_path, kind, changes, message):
    huggingface.save(ours(kind), tmp_path / "model")
    edit_config(tmp_path / "model", **changes)
    with pytest.raises(ValueError) as error:
        huggingface.read_config(tmp_path / "model")
    assert message in str(error.value) and "config.json" in str(error.value) and "\n" not in str(error.value)


def test_vocabulary_and_unreadable_configs_are_refused(tmp_path):
    huggingface.save(ours("llama"), tmp_path / "model")
    assert huggingface.read_config(tmp_path / "model", data_vocab_size=40)[1]["vocab_size"] == 40
    with pytest.raises(ValueError, match="vocab_size=40 is less than the data's 41"):
        huggingface.read_config(tmp_path / "model", data_vocab_size=41)
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        huggingface.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        huggingface.read_config(tmp_path)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    model, folder, number = ours("deepseek"), tmp_path, iter(range(99))

    def refused(change, message, into=model):
        path = folder / str(next(number))
        huggingface.save(model, path)
        change(path)
        with pytest.raises(ValueError, match=message) as error:
            huggingface.load_weights(into, path)
        assert "\n" not in str(error.value)

    norm, expert = "model.norm.weight", "model.layers.2.mlp.experts.3.up_proj.weight"
    refused(lambda p: edit_weights(p, lambda w: w.pop(norm)), f"lacks tensor '{norm}': its config")
    refused(lambda p: edit_weights(p, lambda w: [w.pop(norm), w.pop(expert)]), f"lacks tensor '{expert}' and 1 more")
    refused(lambda p: edit_weights(p, lambda w: w.update(extra=torch.ones(1))), "has unexpected tensor 'extra'")
    refused(lambda p: edit_weights(p, lambda w: w.update({norm: torch.ones(31)})), rf"'{norm}' has shape \(31,\)")
    refused(lambda p: edit_weights(p, lambda w: w.update({norm: w[norm].to(torch.int8)})), f"'{norm}' is torch.int8")
    refused(lambda p: edit_weights(p, lambda w: w.update({norm: torch.ones(1, 32)})), r"shape \(1, 32\)")
    refused(lambda p: (p / "model.safetensors").unlink(), "neither model.safetensors nor model.safetensors.index")
    refused(lambda p: os.truncate(p / "model.safetensors", 9000), "model.safetensors is damaged")
    refused(lambda p: None, "a checkpoint of model 'moonlight', not of 'dense'", into=ours("llama"))
    refused(lambda p: edit_config(p, rope_theta=1e4), "rope_theta is 10000.0, but the model was built with 50000.0")
    path = folder / "sharded"
    huggingface.save(model, path, shard_bytes=20_000)
    edit_config(path, max_position_embeddings=99)
    huggingface.load_weights(model, path)  # any length will do
    first, second, *_ = sorted(path.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=f"{second.name} is damaged or not what the index says"):
        huggingface.load_weights(model, path)
    second.unlink()
    with pytest.raises(ValueError, match=f"index.json names {second.name}, which is missing"):
        huggingface.load_weights(model, path)
