"""What Megatron's training loop and RL frameworks ask of an optimizer beside steps, on real megatron-core jobs.

Run on the package of b0ca093 (megatron-core 0.16.1), item by item, all of these fail but those of `overrides` without
virtual stages, and of `formats` that nothing refuses. `moved`, `plain`, `metadata`, `mup`, `refusals` and `zeros` stop
there at an attribute or option that it has not.
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.integrations import megatron_cpu
from tests.integrations.megatron_job import Case, Job
from tests.integrations.test_megatron_checkpoint import STATES, checked, plain, sharded_model
from tests.spawn import run_ranks

pytestmark = [
    pytest.mark.skipif(not megatron_cpu.available(), reason="megatron-core is not installed"),
    *([pytest.mark.slow] if megatron_cpu.older() else []),
]

DENSE, BF16 = Case(), Case(dtype=torch.bfloat16)
FIRST_LAYER = "decoder.layers.0.mlp.linear_fc1.weight"
SPLITS = {"DP2": DENSE, "PP2": DENSE.but(pp=2), "PP2 virtual": DENSE.but(pp=2, vpp=2), "TP2": DENSE.but(tp=2)}


def run_protocol(rank: int, world: int, folder: str) -> dict[str, Any]:
    megatron_cpu.install()

    def run() -> dict[str, Any]:
        return {
            "groups": groups_that_differ_in_max_lr(),
            "decoupled": loaded_into(DENSE.but(config={"decoupled_lr": 3e-3})),
            "momentum": loaded_into(DENSE.but(optimizer={"momentum": 0.5}, config={"adam_beta2": 0.5})),
            "overrides": {name: where_the_first_layer_went(case) for name, case in SPLITS.items()},
            "expert": [m.name for m in expert_override().muon.members if m.reason.startswith("override")],
            "moved": {str(case.dtype): {how.__name__: moved(case, how) for how in WAYS} for case in (DENSE, BF16)},
            "plain": plain_state_dict(),
            "metadata": {name: saved_with(metadata, Path(folder) / name) for name, metadata in METADATA.items()},
            "config_overrides": config_overrides(),
            "mup": mup(),
            "formats": {name: checkpoint_format(**changes) for name, changes in FORMATS.items()},
            "refusals": {name: refusal(case) for name, case in REFUSED.items()},
            "calls": calls(),
            "scales": {name: scaled(config) for name, config in SCALES.items()},
            "zeros": {choice: without_gradients(choice) for choice in ("update", "skip")},
        }

    return checked(run)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(run_protocol, 2, str(tmp_path_factory.mktemp("protocol")), timeout=170)


# ---- what the ranks run ------------------------------------------------------------------------------------

METADATA: dict[str, dict[str, Any] | None] = {
    "none": None,
    "dp_reshardable": {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True},
    "fully_reshardable": {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
    },
    "singleton": {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": True},
    "fsdp_dtensor": {"distrib_optim_sharding_type": "fsdp_dtensor"},
}
REFUSED = {
    "pattern": DENSE.but(pp=2, optimizer={"overrides": {"*linear_fc9*": "adamw"}}),
    "eps": DENSE.but(pp=2, overrides={"*layers.0.mlp.linear_fc1*": {"eps": 1e-3}}),
    "key": DENSE.but(overrides={"*": {"nesterov": False}}),
    "optimizer": DENSE.but(overrides={"*linear_fc1*": {"optimizer": "lion"}}),
    "lr": DENSE.but(optimizer={"lr": 1.0}),
    "unknown": DENSE.but(optimizer={"momentums": 1.0}),
}


def refusal(case: Case) -> str:
    try:
        Job(case)
    except ValueError as error:
        return str(error)
    return "accepted"


def groups_that_differ_in_max_lr() -> dict[str, Any]:
    """Two groups that differ only in max_lr, and what they have after loading."""
    case = DENSE.but(overrides={"*linear_fc1*": {"max_lr": 1e-3}, "*linear_fc2*": {"max_lr": 5e-2}})
    saved = Job(case)
    saved.train(1)
    loaded = Job(case)
    loaded.optimizer.load_state_dict(copy.deepcopy(saved.optimizer.state_dict()))
    return {name: [group["max_lr"] for group in job.optimizer.param_groups]
            for name, job in (("saved", saved), ("loaded", loaded))}  # fmt: skip


def loaded_into(case: Case) -> dict[str, Any]:
    """The groups of a job with other options after it loaded the state of one with the usual ones; what was said."""
    saved, job, said = Job(DENSE), Job(case), io.StringIO()
    with contextlib.redirect_stdout(said):
        job.optimizer.load_state_dict(copy.deepcopy(saved.optimizer.state_dict()))
    keys = ("algorithm", "max_lr", "momentum", "betas")
    return {"said": said.getvalue(), "groups": [{k: g[k] for k in keys if k in g} for g in job.optimizer.param_groups]}


def where_the_first_layer_went(case: Case) -> list[str]:
    """Names of the parameters that an override of the first layer's fc1 took, over all ranks."""
    job = Job(case.but(optimizer={"overrides": {FIRST_LAYER: "adamw"}}))
    names = [m.name for m in job.muon.members if m.spec.rule is None and "fc1" in m.name]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, names)
    return sorted({name for names in everyone for name in names})


def expert_override() -> Job:
    return Job(Case(moe=True, ep=2, optimizer={"overrides": {"*layers.1.*local_experts.3.linear_fc1*": "adamw"}}))


def by_megatron(optimizer: Any, between: Callable[[], None]) -> None:
    optimizer.offload_to_cpu()
    between()
    optimizer.restore_from_cpu()


def by_storage(optimizer: Any, between: Callable[[], None]) -> None:
    """As some frameworks do: every tensor of a known name copied away, its storage emptied and filled again."""
    states = [s for child in optimizer.chained_optimizers for s in child.optimizer.state.values()]
    tensors = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq", "master_param") if key in state]
    copies = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)
    between()
    for tensor, values in zip(tensors, copies, strict=True):
        tensor.untyped_storage().resize_(values.nbytes)
        tensor.copy_(values)


def by_assignment(optimizer: Any, between: Callable[[], None]) -> None:
    """As verl does: a new tensor under each name of the state; here on the same device, so nothing is freed."""
    for child in optimizer.chained_optimizers:
        for state in child.optimizer.state.values():
            copies = {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq") if key in state}
            for key, values in copies.items():
                state[key].fill_(7.0)
                state[key] = values


WAYS = (by_megatron, by_storage, by_assignment)


def moved(case: Case, how: Callable[..., None]) -> dict[str, Any]:
    """Step, move the state away and back, step: bit-equal to an undisturbed run? And what it held meanwhile."""
    undisturbed, job = Job(case), Job(case)
    undisturbed.train(2)
    job.train(1)
    facts: dict[str, Any] = {"before": held(job)}

    def between() -> None:
        facts["meanwhile"] = held(job)
        try:
            job.optimizer.step()
        except RuntimeError as error:
            facts["step"] = str(error)

    how(job.optimizer, between)
    facts["after"] = held(job)
    job.train(1)
    same = [equal(undisturbed.masters(key), job.masters(key)) for key in STATES]
    facts["same"] = all(same) and equal(undisturbed.weights(), job.weights())
    return facts


def held(job: Job) -> int:
    """Bytes of the storages of moments, and of masters that are no parameters."""
    tensors = {}
    for owned in job.muon.owned:
        for tensor in (*owned.state.values(), *([owned.master] if owned.param.dtype != torch.float32 else [])):
            if tensor.ndim:
                storage = tensor.untyped_storage()
                tensors[storage._cdata] = storage.nbytes()
    return sum(tensors.values())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def plain_state_dict() -> dict[str, Any]:
    """state_dict() is complete: loaded into a new job, the next step is bit-equal; on another rank it is refused."""
    job = Job(BF16)
    job.train(2)
    state = copy.deepcopy(job.optimizer.state_dict())
    other = Job(BF16)
    with torch.no_grad():
        for (_, source), (_, target) in zip(job.named_parameters(), other.named_parameters(), strict=True):
            target.copy_(source)
    other.optimizer.load_state_dict(state)
    other.done = 2
    job.scheduler.step(0)
    other.scheduler.step(2)
    losses = [j.train(1)[0][0] for j in (job, other)]
    same = all(equal(job.masters(key), other.masters(key)) for key in STATES)
    wrong = {**state, "place": (1 - dist.get_rank(), 2)}
    errors = []
    for bad in (wrong, {key: value for key, value in state.items() if key != "state"}):
        try:
            other.optimizer.load_state_dict(bad)
        except ValueError as error:
            errors.append(str(error))
    return {"same": same and losses[0] == losses[1], "errors": errors}


def saved_with(metadata: dict[str, Any] | None, path: Path) -> str:
    """Whether a checkpoint with this metadata brings every bit back."""
    from megatron.core import dist_checkpointing

    job = Job(BF16)
    job.train(1)
    if dist.get_rank() == 0:
        path.mkdir()
    dist.barrier()
    try:
        model = sharded_model(job)
        state = job.optimizer.sharded_state_dict(model, metadata=metadata)
    except ValueError as error:
        return str(error)
    dist_checkpointing.save({**model, "optimizer": state}, str(path))
    other = Job(BF16)
    model = sharded_model(other)
    request = other.optimizer.sharded_state_dict(model, is_loading=True, metadata=metadata)
    loaded = dist_checkpointing.load({**model, "optimizer": request}, str(path))
    other.optimizer.load_state_dict(loaded["optimizer"])
    before, after = plain(job), plain(other)
    same = all((before[key][name] == after[key][name]).all() for key in STATES for name in before[key])
    return "equal" if same else "differs"


def config_overrides() -> dict[str, Any]:
    """Keys of config_overrides that are honoured: another algorithm, AdamW's eps."""
    overrides = {"*linear_fc1*": {"optimizer": "adam"}, "*embedding*": {"eps": 1e-3, "max_lr": 1e-3}}
    job = Job(DENSE.but(overrides=overrides))
    return {
        "fc1": {m.spec.rule is None for m in job.muon.members if "fc1" in m.name},
        "eps": sorted({(g["eps"], g["max_lr"]) for g in job.optimizer.param_groups if g["algorithm"] == "adamw"}),
    }


def mup() -> dict[str, list[tuple[float, float | None]]]:
    """(max_lr, eps) by kind of parameter under muP's overrides for a model twice as wide as its base."""
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer import OptimizerConfig, ParamKey
    from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

    if hasattr(megatron_optimizer, "get_mup_config_overrides"):
        config = OptimizerConfig(optimizer="adam", lr=1e-2, min_lr=0.0, adam_eps=0.1)
        ((key, values),) = megatron_optimizer.get_mup_config_overrides(config, 2.0).items()
    else:  # as 0.19 has them
        predicate = ParamWithNamePredicate("mup_hidden_and_output", lambda p, n: p.dim() > 1 and "embedding" not in n)
        key, values = ParamKey(with_name_predicate=predicate), {"max_lr": 5e-3, "min_lr": 0.0, "eps": 0.05}
    job = Job(DENSE.but(overrides={key: values}))
    group_of = {tensor: group for group in job.optimizer.param_groups for tensor in group["params"]}
    seen: dict[str, list[tuple[float, float | None]]] = {}
    for owned in job.muon.owned:
        group = group_of[owned.master]
        kind = group["algorithm"] if group["algorithm"] == "muon" else owned.name.split(".")[0]
        found = (group["max_lr"], None if kind == "muon" else group["eps"])
        seen.setdefault(kind, []).append(found)
    return {kind: sorted(set(found)) for kind, found in seen.items()}


LINE = {"save": "x", "load": None, "ckpt_format": "torch_dist", "no_save_optim": None, "no_load_optim": None}
FORMATS: dict[str, dict[str, Any]] = {
    "torch": {"ckpt_format": "torch", "dist_ckpt_optim_fully_reshardable": True},
    "dp_reshardable": {"dist_ckpt_optim_fully_reshardable": False},
    "fully_reshardable": {"dist_ckpt_optim_fully_reshardable": True},
    "nothing is saved": {"save": None, "ckpt_format": "torch", "dist_ckpt_optim_fully_reshardable": False},
}


def checkpoint_format(**changes: Any) -> str:
    """What construction says inside Megatron-LM's training loop with this command line."""
    arguments = SimpleNamespace(_GLOBAL_ARGS=SimpleNamespace(**{**LINE, **changes}))
    with mock.patch.dict(sys.modules, {"megatron.training.global_vars": arguments}):
        return refusal(DENSE)


SCALES: dict[str, dict[str, Any]] = {
    "usual": {},
    "spectral": {"muon_extra_scale_factor": 0.2},
    "half": {"muon_extra_scale_factor": 0.1},
    "unit": {"muon_scale_mode": "unit_rms_norm"},
    "momentum": {"muon_momentum": 0.5},
}


def scaled(config: dict[str, Any]) -> dict[str, float]:
    """How far each kind of hidden weight moves in two steps, without decay, under Muon options of Megatron's config."""
    job = Job(DENSE.but(config=config))
    for group in job.optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = job.weights()
    for step in range(2):
        job.set_gradients(step)
        job.optimizer.step()
    after = job.weights()
    names = {"linear_fc2": "decoder.layers.0.mlp.linear_fc2.weight"}
    names["linear_proj"] = "decoder.layers.0.self_attention.linear_proj.weight"
    return {kind: float((after[name] - before[name]).norm()) for kind, name in names.items()}


def calls() -> dict[str, Any]:
    job, out = Job(BF16), {}
    for name, call in {
        "save_parameter_state": lambda: job.optimizer.save_parameter_state("x"),
        "load_parameter_state": lambda: job.optimizer.load_parameter_state("x", update_legacy_format=False),
    }.items():
        try:
            call()
        except ValueError as error:
            out[name] = str(error)
    out["group"] = dist.get_process_group_ranks(job.muon.data_parallel_group)
    job.train(1)
    if hasattr(job.optimizer, "prepare_model_params_for_param_sync"):
        before = job.weights()
        job.optimizer.prepare_model_params_for_param_sync()
        job.chunks[0].start_param_sync(force_sync=True)
        assert equal(job.weights(), before)
    # What the training loop logs as the norm of the parameters it sums over marked masters, cut over the ranks.
    marked = [param.main_param for _, param in job.named_parameters() if param.main_param_sharded]
    square = sum((master.double().square().sum() for master in marked if master is not None), torch.zeros(()).double())
    dist.all_reduce(square)
    out["norms"] = (float(square), sum(float(master.double().square().sum()) for master in job.masters().values()))
    out["is_stub_optimizer"] = [job.optimizer.is_stub_optimizer, job.muon.is_stub_optimizer]
    return out


def without_gradients(choice: str) -> dict[str, dict[str, float]]:
    """How far parameters and their momentum move in a step after whose backward their gradient is zero.

    Of one parameter everything is zero, of another all but the very last element, which one rank holds.
    """
    job = Job(DENSE.but(optimizer={"zero_gradients": choice}))
    names = {"zero": "layers.1.mlp.linear_fc2", "last": "layers.2.mlp.linear_fc2", "vector": "final_layernorm"}
    params = {kind: p for kind, name in names.items() for n, p in job.named_parameters() if name in n}
    job.set_gradients(0)
    job.optimizer.step()
    before = [job.weights(), job.masters("momentum_buffer"), job.masters("exp_avg")]
    job.set_gradients(1)
    for kind, param in params.items():
        last = param.main_grad.view(-1)[-1].clone()
        param.main_grad.zero_()
        if kind == "last":
            param.main_grad.view(-1)[-1] = last
    job.optimizer.step()
    after = [job.weights(), job.masters("momentum_buffer"), job.masters("exp_avg")]
    return {
        kind: [max(float((new[n] - old[n]).abs().max()) for n in old if name in n)
               for old, new in zip(before, after, strict=True)]
        for kind, name in names.items()
    }  # fmt: skip


# ---- what is asserted ---------------------------------------------------------------------------------------


def test_groups_keep_their_own_learning_rates_on_load(seen: list[dict[str, Any]]) -> None:
    assert {1e-3, 5e-2} <= set(seen[0]["groups"]["saved"])
    assert seen[0]["groups"]["loaded"] == seen[0]["groups"]["saved"]


def test_a_group_that_the_checkpoint_lacks_keeps_this_runs_options(seen: list[dict[str, Any]]) -> None:
    loaded = seen[0]["decoupled"]
    assert [group["max_lr"] for group in loaded["groups"]].count(3e-3) == 1
    assert loaded["said"].startswith("the checkpoint has no parameter group with algorithm=adamw, ")
    assert "max_lr=0.003" in loaded["said"] and loaded["said"].count("\n") == 1
    assert seen[1]["decoupled"]["said"] == ""


def test_the_checkpoints_options_win_and_it_is_said(seen: list[dict[str, Any]]) -> None:
    loaded = seen[0]["momentum"]
    assert {g["momentum"] for g in loaded["groups"] if g["algorithm"] == "muon"} == {0.95}
    assert {g["betas"] for g in loaded["groups"] if g["algorithm"] == "adamw"} == {(0.9, 0.999)}
    assert (
        "momentum=0.95 of parameter group 0 (muon) is the checkpoint's; 0.5 of this run is not used" in loaded["said"]
    )
    assert "betas=(0.9, 0.999)" in loaded["said"]


@pytest.mark.parametrize("split", SPLITS)
def test_overrides_see_the_whole_models_names(split: str, seen: list[dict[str, Any]]) -> None:
    assert seen[0]["overrides"][split] == [FIRST_LAYER]


def test_overrides_count_experts_over_the_whole_model(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["expert"] == []
    assert seen[1]["expert"] == ["decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"]


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize("how", WAYS)
def test_state_that_was_moved_away_comes_back_bit_by_bit(
    how: Callable[..., None], dtype: str, seen: list[dict[str, Any]]
) -> None:
    for results in seen:
        facts = results["moved"][dtype][how.__name__]
        assert facts["same"]
        assert facts["after"] == facts["before"] > 0
        if how is not by_assignment:
            assert facts["meanwhile"] == 0
            assert "restore_from_cpu" in facts["step"]


def test_plain_state_dict_is_complete_for_its_rank(seen: list[dict[str, Any]]) -> None:
    for results in seen:
        assert results["plain"]["same"]
        assert "belongs to one rank" in results["plain"]["errors"][0]
        assert "no tensors" in results["plain"]["errors"][1]


@pytest.mark.parametrize("name", METADATA)
def test_every_metadata_is_saved_or_refused(name: str, seen: list[dict[str, Any]]) -> None:
    expected = "equal"
    if name == "fsdp_dtensor":
        expected = "the optimizer has no fsdp_dtensor checkpoint: use --ckpt-format torch_dist"
    assert [results["metadata"][name] for results in seen] == [expected] * 2


def test_config_overrides_are_honoured(seen: list[dict[str, Any]]) -> None:
    honoured = seen[0]["config_overrides"]
    assert honoured["fc1"] == {True}
    assert honoured["eps"] == [(1e-3, 1e-3), (0.1, 1e-2)]


def test_mup_is_for_the_matrices_of_adamw(seen: list[dict[str, Any]]) -> None:
    everywhere = {kind: found for results in seen for kind, found in results["mup"].items()}
    assert everywhere["muon"] == [(1e-2, None)]
    assert everywhere["output_layer"] == [(5e-3, 0.05)]
    assert everywhere["embedding"] == [(1e-2, 0.1)]


@pytest.mark.parametrize("name", FORMATS)
def test_checkpoints_that_could_not_be_saved_are_refused_at_the_start(name: str, seen: list[dict[str, Any]]) -> None:
    expected = {"torch": "--ckpt-format torch is not supported with distributed_muon: use torch_dist"}
    expected["dp_reshardable"] = "--dist-ckpt-optim-fully-reshardable is missing: "
    for results in seen:
        assert results["formats"][name].startswith(expected.get(name, "accepted"))


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "pattern": "overrides pattern '*linear_fc9*' matches no parameter: names are those of the whole model",
        "eps": "eps in config_overrides is AdamW's, and parameter 'decoder.layers.0.mlp.linear_fc1.weight' goes",
        "key": "nesterov in config_overrides is not supported: use max_lr",
        "optimizer": "optimizer='lion' in config_overrides is not supported: use 'adam' or 'muon'",
        "lr": "lr is given twice: leave it to the OptimizerConfig",
        "unknown": "momentums is no option of this optimizer: did you mean momentum?",
    }.items(),
)
def test_refused_on_every_rank_by_name(name: str, message: str, seen: list[dict[str, Any]]) -> None:
    for results in seen:
        said = results["refusals"][name]
        assert said.startswith(message) and "\n" not in said


def test_calls_of_the_training_loop(seen: list[dict[str, Any]]) -> None:
    made = seen[0]["calls"]
    for name in ("save_parameter_state", "load_parameter_state"):
        assert made[name] == "the optimizer has no torch-format checkpoint: use --ckpt-format torch_dist"
    assert made["group"] == [0, 1]
    assert made["norms"][0] == pytest.approx(made["norms"][1], rel=1e-6)
    assert made["is_stub_optimizer"] == [False, False]


def test_zero_gradients_on_all_ranks_are_no_step_where_asked(seen: list[dict[str, Any]]) -> None:
    update, skip = seen[0]["zeros"]["update"], seen[0]["zeros"]["skip"]
    assert update["zero"][0] > 1e-3 and update["vector"][0] > 1e-5
    assert skip["zero"] == [0.0] * 3 and skip["vector"] == [0.0] * 3
    assert skip["last"][0] > 1e-3 and skip["last"] == update["last"]


def test_muon_options_of_megatrons_config_are_honoured(seen: list[dict[str, Any]]) -> None:
    scales = seen[0]["scales"]
    assert scales["spectral"] == scales["usual"] != scales["momentum"]
    for kind, (rows, cols) in {"linear_fc2": (32, 64), "linear_proj": (32, 32)}.items():
        assert scales["half"][kind] == pytest.approx(scales["usual"][kind] / 2, rel=1e-4)
        ratio = (rows / cols) ** 0.5 / (0.2 * max(rows, cols) ** 0.5)
        assert scales["unit"][kind] == pytest.approx(scales["usual"][kind] * ratio, rel=1e-4)
