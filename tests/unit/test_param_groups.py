"""Routing: every parameter of real module zoos goes where the Moonlight report sends it, and says why."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from distributed_muon.layout.matrices import QKV, Conv, Experts, Split, Whole
from distributed_muon.param_groups import audit, format_audit, muon_param_groups


class RMSNormGated(nn.Module):
    """A norm of unknown type with a matrix inside, found by its class name."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8, 8))


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 8))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(4))


class StackedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 2 * 6, 8))
        self.down_proj = nn.Parameter(torch.zeros(4, 8, 6))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.gated = RMSNormGated()
        self.wo = nn.Linear(8, 8)
        self.output = nn.Linear(8, 8, bias=False)  # a hidden layer, whatever its name
        self.gate_up_proj = nn.Linear(8, 12, bias=False)
        self.gate = Router()
        self.experts = StackedExperts()
        self.shared_gate = nn.Linear(8, 1, bias=False)


class Transformer(nn.Module):
    def __init__(self, vocabulary: int = 50) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, 8)
        self.positions = nn.Embedding(8, 8)
        self.pos_embed = nn.Parameter(torch.zeros(5, 8))
        self.layers = nn.ModuleList([Block()])
        self.to_logits = nn.Linear(8, vocabulary, bias=False)


def routed(model: nn.Module, **options) -> dict[str, tuple]:
    """name -> (algorithm, rule) as the groups have it."""
    found = {}
    for group in muon_param_groups(model, **options):
        for name, _ in group["params"]:
            found[name] = (group["algorithm"], group.get("matrices"))
    return found


def reasons(model: nn.Module, **options) -> dict[str, str]:
    return {row.name: row.reason for row in audit(model, **options)}


def test_transformer_is_routed_as_the_report_routes_it():
    adamw, muon = ("adamw", None), ("muon", None)
    halves = Split((6, 6), names=("gate", "up"))
    block = {
        "norm.weight": adamw,
        "gated.gain": adamw,
        "wo.weight": muon,
        "wo.bias": adamw,
        "output.weight": muon,
        "gate_up_proj.weight": ("muon", halves),
        "gate.weight": muon,
        "gate.e_score_correction_bias": adamw,
        "experts.gate_up_proj": ("muon", Experts(halves)),
        "experts.down_proj": ("muon", Experts()),
        "shared_gate.weight": adamw,
    }
    assert routed(Transformer()) == {
        "tokens.weight": adamw,
        "positions.weight": adamw,
        "pos_embed": adamw,
        "to_logits.weight": adamw,
        **{f"layers.0.{name}": where for name, where in block.items()},
    }


def test_hidden_layers_as_wide_as_the_vocabulary_are_no_heads():
    found = routed(Transformer(vocabulary=8))
    assert found["layers.0.output.weight"] == ("muon", None)
    assert found["to_logits.weight"] == ("adamw", None)


def test_groups_hold_named_pairs_and_one_rule_each():
    model = Transformer()
    groups = muon_param_groups(model, muon={"lr": 0.1}, adamw={"lr": 0.2}, vector_weight_decay=0.0)
    muon = [group for group in groups if group["algorithm"] == "muon"]
    assert len({group.get("matrices") for group in muon}) == len(muon) == 4
    assert all(group["lr"] == (0.1 if group["algorithm"] == "muon" else 0.2) for group in groups)
    vectors = [group for group in groups if group.get("weight_decay") == 0.0]
    assert [name for group in vectors for name, _ in group["params"]] == [
        "layers.0.norm.weight",
        "layers.0.wo.bias",
        "layers.0.gate.e_score_correction_bias",
        "layers.0.shared_gate.weight",
    ]
    params = dict(model.named_parameters())
    pairs = [pair for group in groups for pair in group["params"]]
    assert sorted(name for name, _ in pairs) == sorted(params)
    assert all(param is params[name] for name, param in pairs)
    torch.optim.SGD(groups, lr=0.1)  # torch's own named form


def test_module_types():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 64, 3),
            "depthwise": nn.Conv1d(8, 8, 3, groups=8),
            "attention": nn.MultiheadAttention(8, 2),
            "lstm": nn.LSTM(8, 8),
            "batch": nn.BatchNorm2d(8),
        }
    )
    found = routed(model)
    assert found["conv.weight"] == ("muon", Conv())
    assert found["attention.in_proj_weight"] == ("muon", Split((8, 8, 8), names=("q", "k", "v")))
    assert found["attention.out_proj.weight"] == ("muon", None)
    others = {name for name, where in found.items() if where == ("adamw", None)}
    assert {"depthwise.weight", "lstm.weight_hh_l0", "lstm.weight_ih_l0", "batch.weight"} <= others
    assert "LSTM" in reasons(model)["lstm.weight_hh_l0"]


@pytest.mark.parametrize("name", ["wte", "embed_tokens", "ln_f", "final_norm"])
def test_modules_of_unknown_type_by_name(name):
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(9, 8))

    model = nn.ModuleDict({name: Custom(), "hidden": nn.Linear(8, 8)})
    assert routed(model)[f"{name}.weight"] == ("adamw", None)


@pytest.mark.parametrize("name", ["lm_head", "output", "output_layer", "classifier"])
def test_head_by_name_without_an_embedding(name):
    """The last pipeline stage has a head and no embedding to compare it with."""
    model = nn.ModuleDict({"hidden": nn.Linear(8, 8), name: nn.Linear(8, 9)})
    assert routed(model)[f"{name}.weight"] == ("adamw", None)
    assert routed(model)["hidden.weight"] == ("muon", None)


def test_tied_head_follows_its_embedding():
    model = Transformer()
    model.to_logits.weight = model.tokens.weight
    assert "to_logits.weight" not in routed(model)
    assert routed(model)["tokens.weight"] == ("adamw", None)
    assert reasons(model)["tokens.weight"] == "embedding (Embedding), tied to to_logits.weight"


def test_tied_weight_goes_to_adamw_if_any_use_is_an_embedding():
    layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 9, bias=False), "down": nn.Linear(9, 8, bias=False)})])
    tokens = nn.Embedding(9, 8)
    tokens.weight = layers[0]["up"].weight
    model = nn.ModuleDict({"layers": layers, "tokens": tokens})
    assert routed(model) == {"layers.0.up.weight": ("adamw", None), "layers.0.down.weight": ("muon", None)}


def test_frozen_parameters_are_rows_but_not_in_groups():
    model = Transformer()
    model.layers[0].wo.weight.requires_grad_(False)
    assert "layers.0.wo.weight" not in routed(model)
    row = next(row for row in audit(model) if row.name == "layers.0.wo.weight")
    assert (row.algorithm, row.matrices) == ("frozen", ())


def test_overrides_have_the_last_word():
    model = Transformer()
    model.layers[0].wo.weight.use_muon = False
    assert routed(model)["layers.0.wo.weight"] == ("adamw", None)
    overrides = {"*.wo.*t": "muon", "layers.*.experts.*": "adamw", "*.down_proj": Experts(Split((4, 4)))}
    found = routed(model, overrides=overrides)
    assert found["layers.0.wo.weight"] == ("muon", None)
    assert found["layers.0.experts.gate_up_proj"] == ("adamw", None)
    assert found["layers.0.experts.down_proj"] == ("muon", Experts(Split((4, 4))))
    kept = routed(model, overrides={"*.gate_up_proj": "muon"})
    assert kept["layers.0.experts.gate_up_proj"] == ("muon", Experts(Split((6, 6), names=("gate", "up"))))


def test_modules_declare_rules_for_themselves_and_their_children():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 16, bias=False)

        def matrix_rules(self) -> dict:
            return {"qkv.weight": QKV(heads=2, groups=1, head_dim=4)}

    model = nn.ModuleDict({"attention": Attention()})
    assert routed(model) == {"attention.qkv.weight": ("muon", QKV(heads=2, groups=1, head_dim=4))}
    rows = audit(model)
    assert [(m.rows, m.cols) for m in rows[0].matrices] == [(8, 8), (4, 8), (4, 8)]
    model["attention"].qkv = nn.Linear(8, 20, bias=False)
    with pytest.raises(ValueError, match=r"attention\.qkv\.weight.*does not add up to 20 rows"):
        muon_param_groups(model)


def bmm_experts() -> nn.Module:
    experts = StackedExperts()
    experts.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 12))  # columns may be interleaved: nobody can tell
    experts.down_proj = nn.Parameter(torch.zeros(4, 6, 8))
    return experts


@pytest.mark.parametrize(
    ("module", "name", "says"),
    [
        (nn.Linear(8, 24), "qkv_proj", "fused query, key and value"),
        (nn.Linear(8, 24), "query_key_value", "fused query, key and value"),
        (bmm_experts(), "experts", "fused gate and up"),
        (nn.Bilinear(8, 8, 8), "mix", "no known stack"),
    ],
)
def test_what_cannot_be_told_is_an_error_and_a_row(module, name, says):
    model = nn.ModuleDict({"hidden": nn.Linear(8, 8), name: module})
    with pytest.raises(ValueError, match=f"{name}.*{says}.*overrides"):
        muon_param_groups(model)
    assert [row.algorithm for row in audit(model)].count("undecided") == 1
    assert routed(model, overrides={f"{name}.*": "adamw"})["hidden.weight"] == ("muon", None)


def test_no_matrix_at_all_is_an_error():
    with pytest.raises(ValueError, match=r"no parameter for Muon.*overrides"):
        muon_param_groups(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"*.absent": "adamw"}, "absent.*matches no parameter"),
        ({"*.wo.weight": "sgd"}, "'sgd'.*'muon', 'adamw' or a rule"),
        ({"*.wo.weight": Conv()}, r"layers\.0\.wo\.weight.*not a convolution"),
        ({"*.wo.bias": "muon"}, r"layers\.0\.wo\.bias.*1-D"),
    ],
)
def test_wrong_overrides(overrides, says):
    with pytest.raises(ValueError, match=says) as error:
        muon_param_groups(Transformer(), overrides=overrides)
    assert "\n" not in str(error.value)


def test_wrong_declaration():
    model = nn.Linear(8, 8)
    model.matrix_rules = lambda: {"wieght": Whole()}
    with pytest.raises(ValueError, match=r"matrix_rules.*'wieght'"):
        muon_param_groups(model)


def marked(param: nn.Parameter, mark: str) -> nn.Parameter:
    setattr(param, mark, True)
    return param


@pytest.mark.parametrize(
    ("param", "says"),
    [
        (marked(nn.Parameter(torch.zeros(64)), "_is_flat_param"), "FSDP1 or ZeRO-3.*unwrapped model"),
        (nn.Parameter(torch.zeros(0)), "FSDP1 or ZeRO-3.*unwrapped model"),
    ],
)
def test_sharded_parameters_name_the_supported_route(param, says):
    model = nn.Linear(8, 8)
    model.weight = param
    with pytest.raises(ValueError, match=f"'weight'.*{says}") as error:
        muon_param_groups(model)
    assert "\n" not in str(error.value)


def test_fsdp_wrapper_is_named():
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(8, 8)

    with pytest.raises(ValueError, match=r"FullyShardedDataParallel.*plain model"):
        muon_param_groups(FullyShardedDataParallel())


@pytest.mark.parametrize(
    ("shape", "original", "match_rms"),
    [
        ((64, 3, 3), math.sqrt(64 / 27), 0.2 * math.sqrt(64)),  # 1.540
        ((64, 64, 3), 1.0, 0.2 * math.sqrt(576)),
        ((128, 3, 1), math.sqrt(128 / 3), 0.2 * math.sqrt(128)),
    ],
)
def test_scale_of_a_convolution_is_that_of_its_flattening(shape, original, match_rms):
    out, inputs, kernel = shape
    model = nn.Conv2d(inputs, out, kernel, bias=False)
    assert audit(model, adjust_lr_fn="original")[0].scales == (pytest.approx(original),)
    assert audit(model)[0].scales == (pytest.approx(match_rms),)
    assert audit(model)[0].matrices[0][1:3] == (out, inputs * kernel * kernel)


def test_audit_table():
    model = Transformer()
    model.layers.append(Block())
    lines = format_audit(audit(model)).splitlines()
    cells = {line.split("  ")[0]: [cell for cell in line.split("  ") if cell] for line in lines[:-2]}
    assert lines[0].split() == ["parameter", "count", "shape", "algorithm", "matrices", "scale", "reason"]
    fused = [" ".join(cell.split()) for cell in cells["layers.*.experts.gate_up_proj"]]
    assert fused[1:6] == ["2", "4 x 12 x 8", "muon", "8 x (6 x 8)", f"{0.2 * 8**0.5:.3f}"]
    assert lines[-1] == (
        "total: muon: 12 parameters, 34 matrices, 1,664 elements; adamw: 14 parameters, 1,088 elements"
    )


def test_weight_norm_asks_the_module_it_parametrizes():
    """Row 46: the weights lie in a list inside of the module, whose type would say nothing."""
    model = nn.Module()
    model.tokens = weight_norm(nn.Embedding(10, 4))
    model.proj = weight_norm(nn.Linear(4, 6))
    decided = {row.name: (row.algorithm, row.reason) for row in audit(model)}
    assert decided["tokens.parametrizations.weight.original1"] == ("adamw", "embedding (ParametrizedEmbedding)")
    assert decided["proj.parametrizations.weight.original1"] == ("muon", "matrix (ParametrizedLinear)")
    assert decided["proj.parametrizations.weight.original0"] == ("adamw", "vector")
