"""The command line: the plan reproduces the design's scale table, the audit shows every parameter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from distributed_muon.__main__ import main
from distributed_muon.planning.model_shapes import NAMED_MODELS, model_shapes
from distributed_muon.planning.simulate import Job, simulate

TINY = {**NAMED_MODELS["moonlight-16b-a3b"], "num_hidden_layers": 4, "n_routed_experts": 8}
LLAMA = {**NAMED_MODELS["llama-3-8b"], "num_hidden_layers": 2}


def plan(capsys, *args: str) -> dict:
    assert main(["plan", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def tiny(tmp_path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


@pytest.mark.parametrize(("dp", "bound"), [(8, 1.02), (64, 1.02), (256, 1.06)])
def test_moonlight_homes_are_balanced_and_cheap(capsys, dp, bound):
    args = ("--model", "moonlight-16b-a3b", "--layout", "bucketed", "--strategy", "home", "--dp", str(dp))
    report = plan(capsys, *args)
    assert (report["matrices"], report["muon_parameters"]) == (5207, 15_288_893_440)
    assert report["parameters"] == 15_960_110_208 - 26 * 64  # without the biases that no optimizer trains
    assert 1.0 <= report["ns_max_over_ideal"] <= bound
    assert report["state_bytes_max"] <= 1.02 * report["state_bytes_ideal"]
    expected = 6 * report["parameters"] * (dp - 1) / dp
    assert report["adamw_bytes"] == pytest.approx(expected)
    # bf16 parameters, fp32 gradients; waves of 64 MiB, each with its matrices and two wires, and the stage.
    padded = report["gradient_bytes"] // 4
    assert report["parameters"] <= padded <= report["parameters"] + 1e5 and report["parameter_bytes"] == 2 * padded
    assert 6 * 2**26 < report["transient_bytes_max"] < 11 * 2**26
    parts = ("parameter_bytes", "gradient_bytes", "state_bytes_max", "transient_bytes_max")
    assert report["memory_bytes_max"] == sum(report[part] for part in parts)
    assert report["comm_over_adamw"] == pytest.approx(1 + report["exchange_bytes_max"] / expected)
    # Two bf16 all-to-alls of the shards, less what already lies at its home.
    assert 0 < report["exchange_bytes_max"] <= 4 * report["muon_parameters"] * 1.1 / dp
    if dp >= 64:
        assert report["comm_over_adamw"] <= 1.02
    ideal = (8 * 15_288_893_440 + 12 * (report["parameters"] - 15_288_893_440)) / dp
    assert report["state_bytes_ideal"] == pytest.approx(ideal)


def test_a_thousand_ranks_are_planned_in_seconds(capsys):
    assert plan(capsys, "--model", "moonlight-16b-a3b", "--dp", "1024")["plan_seconds"] < 5


@pytest.mark.parametrize(
    ("model", "low", "high"), [("moonlight-16b-a3b", 5.5, 6.5), ("llama-3-8b", 36, 44)]
)  # fmt: skip
def test_gathering_cut_buckets_repeats_newton_schulz(capsys, model, low, high):
    report = plan(capsys, "--model", model, "--dp", "64", "--strategy", "gather")
    assert low < report["ns_max_over_ideal"] < high
    assert report["strategy"] == {"all": "gather"}


def test_layouts_and_bucket_size_matter(capsys):
    """Gathering one flat buffer is nearly free of redundancy; smaller buckets are cut more often."""
    base = ("--model", "moonlight-16b-a3b", "--dp", "64", "--strategy", "gather")
    flat = plan(capsys, *base, "--layout", "flat")["ns_max_over_ideal"]
    small = plan(capsys, *base, "--bucket-mb", "80")["ns_max_over_ideal"]
    assert flat < 1.2
    assert small > 8


def test_rows_under_fsdp2_make_every_matrix_travel(capsys):
    """Each rank sends its rows to the homes, and as a home the updates back: 4 bytes x (N - 1) / N of an Nth."""
    report = plan(capsys, "--model", "llama-3-8b", "--layout", "fsdp2", "--strategy", "home", "--dp", "64")
    assert report["exchange_bytes_max"] == pytest.approx(4 * report["muon_parameters"] / 64 * 63 / 64, rel=0.05)
    root = 2 * 128256 * 4096 + 4096
    assert report["adamw_bytes"] == (8 * report["parameters"] - 2 * root) * 63 / 64
    assert report["state_bytes_max"] == report["state_bytes_ideal"]  # 64 ranks divide every dimension


def test_tensor_parallel_ranks_share_the_homes(capsys, tiny):
    whole = plan(capsys, "--hf-config", tiny, "--dp", "4", "--strategy", "home")
    cut = plan(capsys, "--hf-config", tiny, "--dp", "2", "--tp", "2", "--strategy", "home")
    assert set(cut["strategy"]) == {"dense", "experts"}
    # The same matrices on the same four ranks: the same Newton-Schulz work, however they are cut.
    mean = whole["ns_flops_max"] / whole["ns_max_over_ideal"]
    assert cut["ns_flops_max"] / cut["ns_max_over_ideal"] == pytest.approx(mean)
    assert cut["ns_max_over_ideal"] < 1.5


def test_tensor_parallelism_of_a_dense_model(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    report = plan(capsys, "--hf-config", str(path), "--dp", "2", "--tp", "4", "--strategy", "home")
    norms = 5 * 4096
    local = norms + (report["parameters"] - norms) // 4
    assert report["adamw_bytes"] == 6 * local / 2
    assert report["matrices"] == 14


def test_expert_parallelism_divides_experts_and_their_ranks(capsys, tiny):
    report = plan(capsys, "--hf-config", tiny, "--dp", "4", "--ep", "2", "--strategy", "home")
    experts = 3 * 8 * 3 * 1408 * 2048
    dense = report["parameters"] - experts
    assert report["adamw_bytes"] == pytest.approx(6 * dense * 3 / 4 + 6 * experts / 2 / 2)
    whole = plan(capsys, "--hf-config", tiny, "--dp", "4", "--strategy", "home")
    mean = whole["ns_flops_max"] / whole["ns_max_over_ideal"]
    assert report["ns_flops_max"] / report["ns_max_over_ideal"] == pytest.approx(mean)


def test_a_rank_carries_its_dense_and_its_expert_matrices():
    """Neighbouring ranks hold different experts, as in Megatron's rank order: ep inside expert data parallelism."""
    report = simulate(model_shapes({**TINY, "n_routed_experts": 4}), Job(dp=16, ep=4, strategy="home"))
    dense, experts = (domain.plan.ns_flops_by_rank for domain in report.domains)
    assert (len(dense), len(experts)) == (16, 4)
    assert report.ns_flops_max == max(dense[rank] + experts[rank // 4] for rank in range(16))


def test_the_stage_with_most_work_is_reported(capsys, tiny):
    """Layer 0 is dense, so of four stages of one layer any of the others is worst."""
    whole = plan(capsys, "--hf-config", tiny, "--dp", "2", "--strategy", "home")
    stage = plan(capsys, "--hf-config", tiny, "--dp", "2", "--pp", "4", "--strategy", "home")
    assert stage["stage"] in (1, 3)
    assert stage["ns_flops_max"] < whole["ns_flops_max"] / 2
    assert stage["matrices"] == whole["matrices"]


def test_plan_in_words(capsys, tiny):
    assert main(["plan", "--hf-config", tiny, "--dp", "4", "--ep", "2"]) == 0
    out = capsys.readouterr().out
    assert "experts parameters of stage 0" in out
    assert "ns_max_over_ideal" in out
    assert "1408 x 2048" in out


def test_planning_does_not_wait_for_torch() -> None:
    """What only counts shapes and ranks imports no torch, nor does the command that plans."""
    code = (
        "import sys; sys.modules['torch'] = None\n"  # any import of it raises
        "import pkgutil, importlib, distributed_muon.layout, distributed_muon.planning\n"
        "for room in (distributed_muon.layout, distributed_muon.planning):\n"
        "    for module in pkgutil.iter_modules(room.__path__, room.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "assert 'distributed_muon.layout.plan' in sys.modules and 'distributed_muon.planning.simulate' in sys.modules\n"
        "from distributed_muon.__main__ import main\n"
        "sys.exit(main(['plan', '--model', 'llama-3-8b', '--dp', '8', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["matrices"] == 224


def test_the_package_gives_what_it_names() -> None:
    import distributed_muon

    assert all(getattr(distributed_muon, name) for name in distributed_muon.__all__)
    with pytest.raises(AttributeError, match="'distributed_muon' has no attribute 'absent'"):
        distributed_muon.absent  # noqa: B018


def test_one_rank_has_no_traffic(capsys, tiny):
    report = plan(capsys, "--hf-config", tiny, "--dp", "1")
    assert (report["exchange_bytes_max"], report["comm_over_adamw"]) == (0, None)
    assert report["ns_max_over_ideal"] == 1.0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--dp", "4", "--ep", "3"], "ep 3 does not divide dp x tp = 4"),
        (["--dp", "12", "--ep", "3"], "ep 3 does not divide the 8 routed experts"),
        (["--dp", "4", "--tp", "5"], "tp 5 does not divide dimension 0 of model.layers.0.self_attn.q_proj.weight"),
        (["--dp", "4", "--pp", "9"], "pp 9 is more than the model's 4 layers"),
        (["--dp", "0"], "dp 0 is not a number of ranks"),
        (["--dp", "4", "--layout", "flat", "--bucket-mb", "40"], "bucket_mb 40.0 contradicts layout 'flat'"),
        (["--dp", "4", "--layout", "fsdp2", "--bucket-mb", "40"], "bucket_mb 40.0 contradicts layout 'fsdp2'"),
        (["--dp", "4", "--bucket-mb", "0"], "bucket_mb 0.0 is no size"),
    ],
)
def test_plan_errors_are_one_line(capsys, tiny, args, says):
    assert main(["plan", "--hf-config", tiny, *args]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_expert_parallelism_wants_experts():
    with pytest.raises(ValueError, match="ep 2 wants routed experts"):
        simulate(model_shapes(LLAMA), Job(dp=4, ep=2))


def build() -> nn.Module:
    """A factory for the audit."""
    assert torch.empty(1).device.type == "meta"
    return nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 16), nn.Linear(16, 50))


def build_fused() -> nn.Module:
    return nn.ModuleDict({"qkv": nn.Linear(8, 24), "hidden": nn.Linear(8, 8)})


def test_audit_of_a_factory(capsys):
    assert main(["audit", f"{__name__}:build"]) == 0
    lines = capsys.readouterr().out.splitlines()
    hidden = next(line for line in lines if "16 x 8" in line)
    assert hidden.split()[5:] == ["muon", "1", "x", "(16", "x", "8)", "0.800", "matrix", "(Linear)"]
    assert lines[-1] == "total: muon: 1 parameters, 1 matrices, 128 elements; adamw: 4 parameters, 1,266 elements"


def test_audit_of_an_undecided_model_fails(capsys):
    assert main(["audit", f"{__name__}:build_fused"]) == 1
    assert "overrides={name: QKV(...)}" in capsys.readouterr().out


def test_audit_of_a_config(capsys, tiny):
    assert main(["audit", "--hf-config", tiny, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    router = next(row for row in rows if row["name"] == "model.layers.1.mlp.gate.weight")
    assert router["matrices"] == [{"name": router["name"], "rows": 8, "cols": 2048}]
    assert (router["algorithm"], router["reason"]) == ("muon", "router")
    assert router["scales"] == [pytest.approx(0.2 * 2048**0.5)]
    assert main(["audit", "--hf-config", tiny]) == 0
    folded = capsys.readouterr().out
    assert any("experts.*.up_proj" in line and " 24 " in line for line in folded.splitlines())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["json"], "'json' is not MODULE:FACTORY"),
        (["json:absent"], "json has no callable 'absent'"),
        (["builtins:dict"], "returned a dict, not a torch.nn.Module"),
        (["--hf-config", "absent.json"], "absent.json"),
        ([f"{__name__}:build", "--adjust-lr-fn", "none"], "adjust_lr_fn 'none' is unknown: choose one of original"),
    ],
)
def test_audit_errors_are_one_line(capsys, args, says):
    assert main(["audit", *args]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
