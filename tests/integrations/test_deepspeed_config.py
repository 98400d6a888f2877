"""The block "distributed_muon" of a DeepSpeed config: read, refused in its own words, and written by the converter."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from torch import nn

from distributed_muon.__main__ import main
from distributed_muon.integrations.deepspeed import check_config, optimizer_from_config
from distributed_muon.integrations.deepspeed_config import convert_config
from tests.integrations.deepspeed_case import zero_config


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


BAD_CONFIGS = [
    ({"zero_optimization": True}, r'zero_optimization=True is .*write \{"stage": 1\}'),
    ({"zero_optimization": {}}, r"zero_optimization\.stage=0"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size is not supported"),
    ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, r"bf16\.bf16_master_weights_and_grads"),
    ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, r"fp16\.fp16_master_weights_and_grads"),
    ({"zero_optimization": {"stage": 4}}, r"zero_optimization\.stage=4"),
    ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "zero_force_ds_cpu_optimizer"),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        r'offload_optimizer\.device=nvme.*"cpu"',
    ),
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, r"cpu_offload is an old form: write .offload_optimizer"),
    ({"zero_optimization": {"stage": 3, "cpu_offload_param": True}}, "offload_param is not supported"),
    (
        {
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}},
            "zero_force_ds_cpu_optimizer": False,
        },
        r"offload_optimizer\.super_offload",
    ),
    ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
    (
        {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
        "zero_quantized_nontrainable_weights",
    ),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size"),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size"),
    ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients"),
    (
        {
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            "zero_force_ds_cpu_optimizer": False,
        },
        r"offload_optimizer\.ratio",
    ),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "nvme"}}}, "offload_param"),
    ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow"),
    (
        {
            "zero_optimization": {"stage": 1, "round_robin_gradients": True},
            "checkpoint": {"load_universal": True},
        },
        "round_robin_gradients",
    ),
    ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size"),
    ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast"),
    ({"optimizer": {"type": "Muon", "params": {"lr": 0.1}}}, "optimizer"),
    ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer"),
    ({"zero_allow_untested_optimizer": "true"}, "zero_allow_untested_optimizer"),
]


@pytest.mark.parametrize(("change", "named"), BAD_CONFIGS)
def test_configs_are_refused_by_the_name_of_the_option(change, named) -> None:
    check_config(zero_config(1))
    with pytest.raises(ValueError, match=named) as error:
        check_config({**zero_config(1), **change})
    assert "\n" not in str(error.value)


def test_optimizer_from_a_config_file(tmp_path) -> None:
    block = {"lr": 0.5, "ns_dtype": "float32", "groups": {"overrides": {"0.weight": "adamw"}, "adamw": {"lr": 0.1}}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({**zero_config(2), "distributed_muon": block}))
    muon, adamw = optimizer_from_config(model(), str(file)).param_groups
    assert (muon["param_names"], muon["lr"]) == (["1.weight"], 0.5)
    assert (adamw["param_names"], adamw["lr"]) == (["0.weight", "0.bias", "1.bias"], 0.1)
    with pytest.raises(ValueError, match="distributed_muon"):
        optimizer_from_config(model(), zero_config(2))
    with pytest.raises(ValueError, match="ns_dtype"):
        optimizer_from_config(model(), {**zero_config(2), "distributed_muon": {"ns_dtype": "int8"}})


def block_config(**block) -> dict:
    return zero_config(2, distributed_muon=block)


def test_numbers_that_yaml_leaves_as_strings_are_numbers() -> None:
    block = {
        "lr": "4e-3",
        "ns_steps": "3",
        "nesterov": "False",
        "betas": ["0.8", 0.9],
        "groups": {"adamw": {"lr": "1e-4"}},
    }
    muon, adamw = optimizer_from_config(model(), block_config(**block)).param_groups
    assert (muon["lr"], muon["ns_steps"], muon["nesterov"]) == (4e-3, 3, False)
    assert (adamw["lr"], adamw["betas"]) == (1e-4, (0.8, 0.9))


BAD_BLOCKS = [
    ({"lr": "fast"}, r"distributed_muon\.lr='fast' must be like 0\.001"),
    ({"lr": None}, r"distributed_muon\.lr=None must be like"),
    ({"betas": 0.9}, r"distributed_muon\.betas=0\.9 must be like \(0\.9, 0\.95\)"),
    ({"nesterov": "maybe"}, r"distributed_muon\.nesterov='maybe' must be like True"),
    ({"momentun": 0.9}, r"distributed_muon\.momentun is unknown: did you mean momentum\?"),
    ({"adamw_betas": [0.9, 0.99]}, r"distributed_muon\.adamw_betas is unknown"),
    ({"type": "Muon", "params": {"lr": 0.1}}, r"distributed_muon\.type .*options themselves into the block"),
    ({"muon_lr": 0.1}, r'distributed_muon\.muon_lr .*"groups": \{"muon": \{"lr"'),
    ({"adam_lr": 0.1}, r'distributed_muon\.adam_lr .*"groups": \{"adamw": \{"lr"'),
    ({"groups": {"muon": {"betas": [0.9, 0.95]}}}, r"distributed_muon\.groups\.muon\.betas is unknown"),
    ({"groups": {"vector_decay": 0.0}}, r"distributed_muon\.groups\.vector_decay .*vector_weight_decay"),
    ({"groups": ["muon"]}, r"distributed_muon\.groups=\['muon'\] must hold options"),
    ({"lr": "auto"}, r'distributed_muon\.lr="auto" is learning_rate of .*trainer\.args'),
    ({"momentum": "auto"}, r'distributed_muon\.momentum="auto" has no meaning'),
    ({"momentum": 1.5}, "momentum=1.5"),
]


@pytest.mark.parametrize(("block", "named"), BAD_BLOCKS)
def test_blocks_are_refused_in_their_own_words(block, named) -> None:
    with pytest.raises(ValueError, match=named) as error:
        optimizer_from_config(model(), block_config(**block))
    assert "\n" not in str(error.value)


def test_auto_is_what_hugging_face_means_by_it() -> None:
    block = {"lr": "auto", "weight_decay": "auto", "betas": "auto", "adamw_eps": "auto", "ns_form": "auto"}
    config = block_config(create_optimizer="auto", **block)
    values = {"learning_rate": 0.3, "weight_decay": 0.2, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6}
    arguments = SimpleNamespace(hf_deepspeed_config=SimpleNamespace(config=config), **values)
    muon, adamw = optimizer_from_config(model(), arguments).param_groups
    assert (muon["lr"], muon["weight_decay"]) == (0.3, 0.2)
    assert (adamw["lr"], adamw["betas"], adamw["eps"]) == (0.3, (0.8, 0.99), 1e-6)
    assert config["distributed_muon"]["lr"] == 0.3


@pytest.mark.skipif(
    not (find_spec("accelerate") and find_spec("deepspeed")), reason="accelerate and deepspeed are not installed"
)
def test_a_trainer_that_does_not_build_the_optimizer_is_stopped() -> None:
    from accelerate import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(hf_ds_config=block_config(create_optimizer="auto", lr=0.1))
    with pytest.raises(ValueError, match=r"distributed_muon\.create_optimizer"):
        plugin.deepspeed_config_process(must_match=False)  # as Accelerate does before deepspeed.initialize
    optimizer_from_config(model(), plugin.deepspeed_config)
    plugin.deepspeed_config_process(must_match=False)


def test_converted_configs_train_what_the_optimizer_block_said(tmp_path, capsys) -> None:
    params = {
        "muon_lr": 0.02,
        "lr": "3e-4",
        "betas": [0.8, 0.9],
        "momentum": 0.9,
        "ns_method": "gram",
        "torch_adam": False,
    }
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Muon", "params": params}}))
    assert main(["deepspeed-config", str(file)]) == 0
    muon, adamw = optimizer_from_config(model(), json.loads(capsys.readouterr().out)).param_groups
    assert (muon["lr"], muon["momentum"], muon["weight_decay"]) == (0.02, 0.9, 0.0)
    assert muon["adjust_lr_fn"] == "original"  # the scale of DeepSpeed's Muon
    assert (adamw["lr"], adamw["betas"], adamw["eps"]) == (3e-4, (0.8, 0.9), 1e-10)
    adam = convert_config({**zero_config(1), "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-6}}})
    muon, adamw = optimizer_from_config(model(), adam).param_groups
    assert (muon["lr"], muon["adjust_lr_fn"]) == (1e-3, "match_rms_adamw")
    assert (adamw["betas"], adamw["eps"]) == ((0.9, 0.999), 1e-6)


# A row of the manual's table each: what their "optimizer.params" says, and what our groups then have.
ROWS = [
    ({"lr": 0.1}, "muon", "lr", 0.1),
    ({"lr": 0.1}, "adamw", "lr", 0.1),
    ({}, "muon", "lr", 0.02),  # their Muon's own defaults
    ({}, "adamw", "lr", 3e-4),
    ({"momentum": 0.8}, "muon", "momentum", 0.8),
    ({"lr": 0.1}, "muon", "weight_decay", 0.0),
    ({"weight_decay": 0.3}, "muon", "weight_decay", 0.3),
    ({"betas": [0.8, 0.9]}, "adamw", "betas", (0.8, 0.9)),
    ({"muon_lr": 0.5, "lr": 0.1}, "muon", "lr", 0.5),
    ({"adam_lr": 0.5, "lr": 0.1}, "adamw", "lr", 0.5),
    ({"eps": 1e-3}, "adamw", "eps", 1e-3),
    ({"eps": 1e-3}, "muon", "eps", 1e-7),
    ({"lr": 0.1}, "muon", "adjust_lr_fn", "original"),
    ({"torch_adam": True, "adam_w_mode": True, "bias_correction": True}, "muon", "lr", 0.02),
]


@pytest.mark.parametrize(("params", "algorithm", "option", "value"), ROWS)
def test_every_row_of_the_table_of_keys(params, algorithm, option, value) -> None:
    theirs = {**zero_config(1, zero={"save_muon_momentum_buffer_in_memory": True}), "optimizer": {"type": "Muon"}}
    theirs["optimizer"]["params"] = params
    groups = {g["algorithm"]: g for g in optimizer_from_config(model(), convert_config(theirs)).param_groups}
    assert groups[algorithm][option] == value


@pytest.mark.parametrize("method", ["gram", "standard"])
def test_their_form_of_newton_schulz_is_ours(method) -> None:
    theirs = {**zero_config(1), "optimizer": {"type": "Muon", "params": {"ns_method": method}}}
    assert optimizer_from_config(model(), convert_config(theirs))._options.ns_form == method


@pytest.mark.parametrize(
    ("optimizer", "named"),
    [
        ({"type": "Lamb"}, r"optimizer\.type='Lamb' cannot be converted"),
        (
            {"type": "Muon", "params": {"momentun": 0.9}},
            r"optimizer\.params\.momentun is unknown: did you mean momentum",
        ),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, r"optimizer\.params\.adam_w_mode=False has no equal"),
    ],
)
def test_what_has_no_equal_is_not_converted(optimizer, named, tmp_path, capsys) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({**zero_config(1), "optimizer": optimizer}))
    assert main(["deepspeed-config", str(file)]) == 2
    assert re.search(named, capsys.readouterr().err)
