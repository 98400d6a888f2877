"""What Megatron's modules, marks and flags declare; the modules here have the same class names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from distributed_muon.integrations.megatron_params import MarkedParameter, TensorParallel, read_parameters
from distributed_muon.layout.matrices import Split, Whole

H = 16


class Linear(nn.Module):
    """A ColumnParallelLinear or RowParallelLinear as the adapter sees it: weight and marks."""

    def __init__(self, rows: int, cols: int, dim: int | None = None, stride: int = 1, **marks: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, cols))
        if dim is not None:
            marks |= {"tensor_model_parallel": True, "partition_dim": dim, "partition_stride": stride}
        for name, value in marks.items():
            setattr(self.weight, name, value)


class Attention(nn.Module):
    pass


class SelfAttention(Attention):
    def __init__(self, rows: int, **config: Any) -> None:
        super().__init__()
        sizes = {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 4}
        self.config = SimpleNamespace(**sizes, **config)
        self.linear_qkv = Linear(rows, H, 0)
        self.linear_proj = Linear(H, 8, 1)


class CrossAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.linear_q, self.linear_kv = Linear(8, H, 0), Linear(8, H, 0)


class MLASelfAttention(Attention):
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        sizes = {"num_attention_heads": 4, "qk_head_dim": 4, "v_head_dim": 1}
        self.config = SimpleNamespace(q_lora_rank=6, kv_lora_rank=5, qk_pos_emb_head_dim=2, **sizes)
        if fused:
            self.linear_qkv_down_proj = Linear(13, H)
        else:
            self.linear_q_down_proj, self.linear_kv_down_proj = Linear(6, H), Linear(7, H)
        self.linear_q_up_proj, self.linear_kv_up_proj = Linear(12, 6, 0), Linear(10, 5, 0)


class MLP(nn.Module):
    def __init__(self, gated: bool = True, expert: bool = False, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(gated_linear_unit=gated, **config)
        marks = {"allreduce": False} if expert else {}
        self.linear_fc1 = Linear(12, H, 0, 2 if gated else 1, **marks)
        self.linear_fc2 = Linear(H, 6, 1, **marks)


class SharedExpertMLP(MLP):
    pass


class TEGroupedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_local_experts, self.config = 2, SimpleNamespace(gated_linear_unit=True)
        self.linear_fc1, self.linear_fc2 = nn.Module(), nn.Module()
        for expert in range(2):
            for module, shape in ((self.linear_fc1, (12, H)), (self.linear_fc2, (H, 6))):
                param = nn.Parameter(torch.zeros(shape))
                param.allreduce = False
                module.register_parameter(f"weight{expert}", param)


class GroupedMLP(nn.Module):
    """Two experts of hidden 16 and ffn 12, stored (in, out); under TP each rank holds half of every ffn."""

    def __init__(self, tp: int = 1) -> None:
        super().__init__()
        self.num_local_experts, self.config = 2, SimpleNamespace(gated_linear_unit=True, hidden_size=H)
        self.weight1 = nn.Parameter(torch.zeros(H, 2 * 24 // tp))
        self.weight2 = nn.Parameter(torch.zeros(2 * 12 // tp, H))
        for dim, param in ((1, self.weight1), (0, self.weight2)):
            param.allreduce, param.tensor_model_parallel, param.partition_dim = False, True, dim


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, H))


class TopKRouter(Router):
    pass


class MambaMixer(nn.Module):
    def __init__(self, tagged: bool) -> None:
        super().__init__()
        self.in_proj, self.out_proj = Linear(20, H, 0), Linear(H, 8, 1)
        self.conv1d = nn.Conv1d(8, 8, 3, groups=8)
        if tagged:
            self.in_proj.weight.use_muon = False


class VocabParallelEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32, H))


def read(module: nn.Module, tp: int = 1, expert_tp: int | None = None, **overrides: Any) -> dict[str, MarkedParameter]:
    sizes = TensorParallel(tp, tp if expert_tp is None else expert_tp)
    found = read_parameters([nn.ModuleDict({"module": module})], sizes, overrides)
    return {member.name: member for member in found}


def shapes(member: MarkedParameter) -> list[tuple[int, int]]:
    return [matrix.shape for matrix in member.spec.matrices()]


def blocks(member: MarkedParameter, tp_rank: int) -> list[tuple[int, ...]]:
    return [tuple(block) for block in member.spec.rectangles(tp_rank)]


def test_linear_qkv_is_query_key_and_value_over_all_groups() -> None:
    found = read(SelfAttention(32))
    assert shapes(found["linear_qkv.weight"]) == [(16, H), (8, H), (8, H)]
    assert shapes(found["linear_proj.weight"]) == [(H, 8)]
    gated = read(SelfAttention(48, attention_output_gate=True))
    assert shapes(gated["linear_qkv.weight"]) == [(16, H), (16, H), (8, H), (8, H)]


def test_tensor_parallelism_cuts_linear_qkv_by_group() -> None:
    found = read(SelfAttention(16), tp=2)
    assert shapes(found["linear_qkv.weight"]) == [(16, H), (8, H), (8, H)]
    # Rank 1 holds the second group: rows 8 on of the query, 4 on of key and value.
    assert blocks(found["linear_qkv.weight"], 1) == [
        (0, 0, 0, 8, 0, 8, H),
        (1, 8, 0, 4, 0, 4, H),
        (2, 12, 0, 4, 0, 4, H),
    ]
    assert shapes(found["linear_proj.weight"]) == [(H, 16)]


def test_more_tensor_parallel_ranks_than_query_groups() -> None:
    found = read(SelfAttention(8), tp=4)["linear_qkv.weight"]
    assert shapes(found) == [(16, H), (8, H), (8, H)]
    # Rank 0 holds the first group's queries, rank 1 its key and value.
    assert blocks(found, 0) == [(0, 0, 0, 0, 0, 8, H)]
    assert blocks(found, 1) == [(1, 0, 0, 0, 0, 4, H), (2, 4, 0, 0, 0, 4, H)]


def test_every_head_is_a_matrix_where_asked() -> None:
    found = read(SelfAttention(16), tp=2, **{"*linear_qkv*": "per_head"})["linear_qkv.weight"]
    names = [matrix.name.partition("[")[2] for matrix in found.spec.matrices()]
    assert names == ["q0]", "q1]", "k0]", "v0]", "q2]", "q3]", "k1]", "v1]"]
    assert shapes(found) == [(4, H)] * 8
    gated = read(SelfAttention(48, attention_output_gate=True), **{"*linear_qkv*": "per_head"})["linear_qkv.weight"]
    assert [m.name.partition("[")[2] for m in gated.spec.matrices()][:6] == [
        "q0]",
        "q1]",
        "gate0]",
        "gate1]",
        "k0]",
        "v0]",
    ]
    latent = read(MLASelfAttention(), tp=2, **{"*_up_proj*": "per_head"})
    assert shapes(latent["linear_q_up_proj.weight"]) == [(6, 6)] * 4
    assert shapes(latent["linear_kv_up_proj.weight"]) == [(4, 5), (1, 5)] * 4
    with pytest.raises(ValueError, match=r"'per_head', but parameter 'linear_proj\.weight' has no attention heads"):
        read(SelfAttention(32), **{"*linear_proj*": "per_head"})


def test_gated_fc1_is_de_strided() -> None:
    found = read(MLP(), tp=2)
    fc1 = found["linear_fc1.weight"]
    assert shapes(fc1) == [(12, H), (12, H)]
    # Rank 1 holds the second halves of gate and up.
    assert blocks(fc1, 1) == [(0, 0, 0, 6, 0, 6, H), (1, 6, 0, 6, 0, 6, H)]
    assert shapes(read(MLP(gated=False))["linear_fc1.weight"]) == [(12, H)]


def test_latent_attention() -> None:
    found = read(MLASelfAttention(), tp=2)
    assert {name: shapes(member) for name, member in found.items()} == {
        "linear_q_down_proj.weight": [(6, H)],
        "linear_kv_down_proj.weight": [(7, H)],
        "linear_q_up_proj.weight": [(24, 6)],
        "linear_kv_up_proj.weight": [(20, 5)],
    }
    assert found["linear_kv_down_proj.weight"].replicated and not found["linear_q_up_proj.weight"].replicated
    fused = read(MLASelfAttention(fused=True))
    assert shapes(fused["linear_qkv_down_proj.weight"]) == [(6, H), (7, H)]


def test_sequential_experts_use_the_expert_group() -> None:
    # ETP 1 within TP 2: marked tensor_model_parallel, but whole.
    found = read(MLP(expert=True), tp=2, expert_tp=1)
    assert shapes(found["linear_fc1.weight"]) == [(6, H), (6, H)]
    assert found["linear_fc1.weight"].expert and found["linear_fc1.weight"].replicated
    cut = read(MLP(expert=True), tp=1, expert_tp=2)
    assert shapes(cut["linear_fc1.weight"]) == [(12, H), (12, H)]


def test_transformer_engine_experts() -> None:
    found = read(TEGroupedMLP(), tp=2)
    for expert in range(2):
        assert shapes(found[f"linear_fc1.weight{expert}"]) == [(12, H), (12, H)]
        assert shapes(found[f"linear_fc2.weight{expert}"]) == [(H, 12)]


def test_grouped_experts_are_apart() -> None:
    for tp in (1, 2):
        found = read(GroupedMLP(tp), tp=tp)
        assert shapes(found["weight1"]) == [(H, 12)] * 4  # gate and up of two experts
        assert shapes(found["weight2"]) == [(12, H)] * 2
    # Rank 1, second expert: its half of the gate begins at column 6 of matrix 2, of the up at column 6 of 3.
    assert blocks(found["weight1"], 1)[-2:] == [(2, 16, 0, 0, 6, H, 6), (3, 16, 6, 0, 6, H, 6)]
    with pytest.raises(ValueError, match="'weight1' is stored transposed"):
        read_parameters([GroupedMLP()], TensorParallel(1, 1), {}, "original")


def test_router_and_what_adamw_gets() -> None:
    model = nn.ModuleDict({"router": TopKRouter(), "embedding": VocabParallelEmbedding(), "norm": nn.LayerNorm(H)})
    found = read(model, tp=2)
    assert shapes(found["router.weight"]) == [(4, H)] and found["router.weight"].replicated
    reasons = {name: member.reason for name, member in found.items() if member.spec.rule is None}
    assert reasons == {
        "embedding.weight": "embedding or output layer",
        "norm.weight": "vector",
        "norm.bias": "vector",
    }
    output = Linear(32, H, 0, is_embedding_or_output_parameter=True)
    assert read(output)["weight"].spec.rule is None


def test_mamba_inputs_are_honoured_as_tagged_and_refused_untagged() -> None:
    found = read(MambaMixer(tagged=True))
    assert found["in_proj.weight"].reason == "use_muon is False"
    assert found["conv1d.weight"].spec.rule is None and shapes(found["out_proj.weight"]) == [(H, 8)]
    with pytest.raises(ValueError, match=r"'in_proj\.weight' of shape \(20, 16\) in Linear .*overrides="):
        read(MambaMixer(tagged=False))
    rule = Split((8, 8, 4))
    found = read(MambaMixer(tagged=False), **{"in_proj*": rule})
    assert shapes(found["in_proj.weight"]) == [(8, H), (8, H), (4, H)]


@pytest.mark.parametrize(
    ("module", "tp", "message"),
    [
        (CrossAttention(), 1, r"'linear_kv\.weight'"),
        (SharedExpertMLP(moe_shared_expert_glu_interleave_size=4), 1, "moe_shared_expert_glu_interleave_size"),
        (nn.ModuleDict({"linear_fc9": Linear(8, H)}), 1, r"'linear_fc9\.weight'"),
        (
            nn.ModuleDict({"experts": nn.ModuleDict({"local_experts": nn.ModuleList([MLP()])})}),
            2,
            r"fc1\.weight'.*expert_tensor",
        ),
    ],
)
def test_unsupported_parameters_are_refused_by_name(module: nn.Module, tp: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(module, tp, expert_tp=1)


def test_expert_interleaving_is_refused() -> None:
    experts = nn.ModuleDict({"experts": nn.ModuleList([MLP(expert=True, moe_mlp_glu_interleave_size=4)])})
    with pytest.raises(ValueError, match=r"experts\.0\.linear_fc1: moe_mlp_glu_interleave_size"):
        read(experts)


def test_overrides_say_the_last_word() -> None:
    found = read(MLP(), **{"*": "adamw", "linear_fc2*": "muon"})
    assert found["linear_fc1.weight"].spec.rule is None
    assert found["linear_fc2.weight"].spec.rule == Whole()
    with pytest.raises(ValueError, match=r"overrides\['\*'\] is 'sgd'"):
        read(MLP(), **{"*": "sgd"})


def test_names_of_several_chunks_and_shared_parameters() -> None:
    chunk, other = nn.ModuleDict({"module": MLP()}), nn.ModuleDict({"module": MLP()})
    found = read_parameters([chunk, chunk], TensorParallel(1, 1), {})
    assert [member.name for member in found] == ["linear_fc1.weight", "linear_fc2.weight"]
    names = [member.name for member in read_parameters([chunk, other], TensorParallel(1, 1), {})]
    assert names == ["linear_fc1.weight", "linear_fc2.weight", "model1.linear_fc1.weight", "model1.linear_fc2.weight"]


def test_flags_of_megatrons_muon_mean_the_same_or_are_refused() -> None:
    from distributed_muon.integrations.megatron_options import muon_options

    def read(**said: Any) -> dict[str, Any]:
        usual = {"muon_scale_mode": "spectral", "muon_extra_scale_factor": 1.0}
        return muon_options(SimpleNamespace(**{**usual, **said}), said)

    assert read() == {}
    assert read(muon_momentum=0.9, muon_num_ns_steps=7) == {"momentum": 0.9, "ns_steps": 7}
    assert read(muon_nesterov=True) == read(muon_use_nesterov=True) == {"nesterov": True}
    assert read(muon_extra_scale_factor=0.2) == {"update_scale": 0.2, "adjust_lr_fn": "spectral"}
    assert read(muon_scale_mode="shape_scaling") == {"update_scale": 1.0, "adjust_lr_fn": "original"}
    assert read(muon_scale_mode="unit_rms_norm") == {"update_scale": 1.0, "adjust_lr_fn": "unit_rms_norm"}
    assert read(muon_coefficient_type="simple") == {"ns_coefficients": "quintic"}
    assert read(muon_fp32_matmul_prec="highest") == {"ns_dtype": torch.float32}
    assert read(muon_tp_mode="duplicated", muon_scalar_optimizer="adam", muon_split_qkv=True) == {}
    table = read(muon_coefficient_type="quintic")["ns_coefficients"]
    assert table[0] == table[5] == (4.0848, -6.8946, 2.9270)
    for name, value, advice in (
        ("muon_tp_mode", "blockwise", "whole matrices"),
        ("muon_scalar_optimizer", "lion", "use 'adam'"),
        ("muon_split_qkv", False, "overrides="),
        ("muon_coefficient_type", "aol", "ns_coefficients"),
        ("muon_fp32_matmul_prec", "high", "use 'medium' or 'highest'"),
    ):
        with pytest.raises(ValueError, match=f"{name}={value!r} is not supported.*{advice}"):
            read(**{name: value})
