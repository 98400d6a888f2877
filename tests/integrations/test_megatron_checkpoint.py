"""Checkpoints of real megatron-core jobs: saved under one parallelism, loaded under others."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from tests.integrations import megatron_cpu
from tests.integrations.megatron_job import Case, Job
from tests.spawn import run_ranks

pytestmark = [
    pytest.mark.skipif(not megatron_cpu.available(), reason="megatron-core is not installed"),
    *([pytest.mark.slow] if megatron_cpu.older() else []),
]

WIDE = Case(model={"num_query_groups": 4})
MOE = Case(moe=True, model={"num_query_groups": 4})
STATES = ("master", "momentum_buffer", "exp_avg", "exp_avg_sq")
OVERLAP = MOE.but(pp=2, ep=2, overlap=True, bucket=3000)
# saved as: (case, {loaded as: case})
RESHARDINGS = {
    "TP2xDP2": (
        WIDE.but(tp=2),
        {
            "TP2xDP2": WIDE.but(tp=2),
            "PP2xDP2": WIDE.but(pp=2),
            "DP4": WIDE,
            "TP4": WIDE.but(tp=4),
        },
    ),
    "TP2xEP2xETP1": (
        MOE.but(tp=2, ep=2, etp=1),
        {"EP4": MOE.but(ep=4), "PP2xEP2 overlap": OVERLAP},
    ),
}


def sharded_model(job: Job) -> dict[str, Any]:
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": False}
    names = ["model"] if len(job.chunks) == 1 else [f"model{index}" for index in range(len(job.chunks))]
    states = (chunk.module.sharded_state_dict(metadata=metadata) for chunk in job.chunks)
    return dict(zip(names, states, strict=True))


def save(job: Job, path: Path) -> None:
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        path.mkdir()
    dist.barrier()
    model = sharded_model(job)
    dist_checkpointing.save({**model, "optimizer": job.optimizer.sharded_state_dict(model)}, str(path))


def load(job: Job, path: Path) -> None:
    from megatron.core import dist_checkpointing

    model = sharded_model(job)
    request = {**model, "optimizer": job.optimizer.sharded_state_dict(model, is_loading=True)}
    state = dist_checkpointing.load(request, str(path))
    for name, chunk in zip(model, job.chunks, strict=True):
        chunk.module.load_state_dict(state[name])
    job.optimizer.load_state_dict(state["optimizer"])


def checked(function: Any) -> Any:
    """Run on a rank; the helper processes of dist_checkpointing are allowed, and end with it whatever happens."""
    multiprocessing.current_process()._config["daemon"] = False
    try:
        return function()
    finally:
        for child in psutil.Process(os.getpid()).children(recursive=True):
            child.kill()


def plain(job: Job) -> dict[str, dict[str, np.ndarray]]:
    return {key: {name: value.numpy() for name, value in job.masters(key).items()} for key in STATES}


def resharding(rank: int, world: int, folder: str) -> dict[str, Any]:
    megatron_cpu.install()
    return checked(lambda: {name: reshard(name, Path(folder)) for name in RESHARDINGS})


def reshard(name: str, folder: Path) -> dict[str, Any]:
    saved_as, loaded_as = RESHARDINGS[name]
    job = Job(saved_as)
    job.train(2)
    save(job, folder / name)
    state = plain(job)
    results = {"losses": [entry[0] for entry in job.train(5)], "loaded": {}}
    results["weights"] = {key: value.numpy() for key, value in job.weights().items()}
    for other, case in loaded_as.items():
        job = Job(case)
        load(job, folder / name)
        job.done = 2
        job.scheduler.step(2)
        after = plain(job)
        same = all(np.array_equal(state[key][n], after[key][n]) for key in STATES for n in state[key])
        losses = [entry[0] for entry in job.train(5)]
        weights = {key: value.numpy() for key, value in job.weights().items()}
        gap = max(float(np.abs(weights[key] - value).max()) for key, value in results["weights"].items())
        results["loaded"][other] = {"same": same, "losses": losses, "gap": gap, "steps": job.muon.steps}
    del results["weights"]
    return results


@pytest.fixture(scope="module")
def reshardings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(resharding, 4, str(tmp_path_factory.mktemp("resharding")), timeout=170)[0]


@pytest.mark.parametrize(("name", "other"), [(n, o) for n, (_, others) in RESHARDINGS.items() for o in others])
def test_next_losses_are_equal_after_resharding(name: str, other: str, reshardings: dict[str, Any]) -> None:
    saved, loaded = reshardings[name], reshardings[name]["loaded"][other]
    assert loaded["same"], "masters and moments must be bit-equal"
    assert loaded["steps"] == 7
    assert loaded["losses"] == pytest.approx(saved["losses"], rel=2e-6)
    print(f"{name} -> {other}: largest difference of a weight after 5 more steps {loaded['gap']:.1e}")
    assert loaded["gap"] <= 1e-6


def foreign(rank: int, world: int, folder: str) -> dict[str, Any]:
    megatron_cpu.install()
    from megatron.core import __version__

    def run() -> dict[str, Any]:
        results = {"adamw": take_over("adam", Path(folder)), "state": state_from_the_start()}
        if not __version__.startswith("0.16"):  # whose Muon does not fit a current emerging-optimizers
            results["muon"] = take_over("muon", Path(folder))
        return results

    return checked(run)


def take_over(name: str, folder: Path) -> dict[str, Any]:
    """Train with Megatron's own optimizer on DP2, load its checkpoint into ours on TP2; what was kept."""
    from megatron.core import dist_checkpointing
    from megatron.core.optimizer import get_megatron_optimizer

    from distributed_muon.integrations.megatron_checkpoint import load_megatron_checkpoint

    case = Case(dtype=torch.bfloat16)
    theirs = Job(case.but(distributed=False, config={"optimizer": name}), get_megatron_optimizer)
    theirs.train(2)
    if dist.get_rank() == 0:
        (folder / name).mkdir()
    dist.barrier()
    model = sharded_model(theirs)
    metadata = {"chained_optim_avoid_prefix": True}
    state = theirs.optimizer.sharded_state_dict(model, metadata=metadata)
    dist_checkpointing.save({**model, "optimizer": state}, str(folder / name))
    expected = their_state(theirs)
    ours = Job(case.but(tp=2))
    model = sharded_model(ours)
    loaded = dist_checkpointing.load(model, str(folder / name))
    ours.chunks[0].module.load_state_dict(loaded["model"])
    said = load_megatron_checkpoint(str(folder / name), ours.optimizer, sharded_model(ours))
    got = plain(ours)
    as_usual = Job(case.but(tp=2, optimizer={"take_over": str(folder / name)}))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        load(as_usual, folder / name)
    usual = plain(as_usual)
    same = all(np.array_equal(got[key][n], usual[key][n]) for key in STATES for n in got[key])
    save(as_usual, folder / f"{name} of ours")
    again = Job(case.but(tp=2, optimizer={"take_over": str(folder / f"{name} of ours")}))
    try:
        load(again, folder / f"{name} of ours")
        refused = "accepted"
    except ValueError as error:
        refused = str(error)
    kept = {
        key: [n for n, value in values.items() if np.array_equal(value, got[key][n])]
        for key, values in expected.items()
    }
    wanted = {key: list(values) for key, values in expected.items()}
    ok = ours.train(1)[0][0] < 10
    zero = all(not value.any() for value in got["momentum_buffer"].values())
    return {
        "kept": kept,
        "wanted": wanted,
        "said": said,
        "trains": ok,
        "momentum is zero": zero,
        "step": ours.muon.steps,
        "same in the usual path": same and as_usual.muon.steps == ours.muon.steps - 1,
        "printed": printed.getvalue(),
        "ours": refused,
    }


def their_state(job: Job) -> dict[str, dict[str, np.ndarray]]:
    """Masters and moments of Megatron's own optimizers by global parameter name."""
    names = {param: name for name, param in job.named_parameters()}
    of_main = {param.main_param: name for param, name in names.items()}
    found: dict[str, dict[str, np.ndarray]] = {"master": {n: m.numpy().copy() for m, n in of_main.items()}}
    for child in job.optimizer.chained_optimizers:
        for main, state in child.optimizer.state.items():
            for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
                if key in state and (key != "exp_avg" or "exp_avg_sq" in state):
                    found.setdefault(key, {})[of_main[main]] = state[key].numpy().copy()
    return found


def state_from_the_start() -> dict[str, Any]:
    """State exists at construction with the same keys as later; reading it changes nothing."""
    job = Job(Case(dtype=torch.bfloat16))
    before = plain(job)
    keys = state_keys(job)
    again = plain(job)
    unchanged = all(np.array_equal(before[key][name], again[key][name]) for key in STATES for name in before[key])
    job.train(1)
    dtypes = {str(t.dtype) for owned in job.muon.owned for t in (owned.master, *owned.state.values())}
    return {"same keys": keys == state_keys(job), "unchanged": unchanged, "dtypes": dtypes, "count": len(keys)}


def state_keys(job: Job) -> set[str]:
    saved = job.optimizer.sharded_state_dict(sharded_model(job))
    local = {f"{name}.{key}" for name, state in saved["param_state"].items() for key in state}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, local)
    return set().union(*everyone)


@pytest.fixture(scope="module")
def taken_over(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(foreign, 2, str(tmp_path_factory.mktemp("foreign")), timeout=150)[0]


def test_adamw_checkpoint_keeps_masters_and_starts_momentum_at_zero(taken_over: dict[str, Any]) -> None:
    result = taken_over["adamw"]
    print(result["said"])
    assert result["kept"]["master"] == result["wanted"]["master"]
    hidden = [name for name in result["wanted"]["exp_avg"] if name not in result["kept"]["exp_avg"]]
    assert len(hidden) == 16  # 4 layers of qkv, proj, fc1, fc2: Muon's now
    assert result["momentum is zero"] and result["trains"] and result["step"] == 3
    assert "momentum_buffer of 0/" in result["said"]


def test_usual_load_path_takes_a_foreign_checkpoint_over(taken_over: dict[str, Any]) -> None:
    for name in {"adamw", "muon"} & set(taken_over):
        result = taken_over[name]
        assert result["same in the usual path"]
        assert result["printed"].strip() == result["said"]
        assert "is a checkpoint of distributed_muon: load it as it is" in result["ours"]


def test_megatrons_muon_checkpoint_keeps_momentum(taken_over: dict[str, Any]) -> None:
    if "muon" not in taken_over:
        pytest.skip("this megatron-core's own Muon does not run here")
    result = taken_over["muon"]
    print(result["said"])
    for key in STATES:
        assert result["kept"][key] == result["wanted"][key]
        assert result["wanted"][key]
    assert not result["momentum is zero"] and result["trains"]


def test_state_exists_from_construction(taken_over: dict[str, Any]) -> None:
    seen = taken_over["state"]
    assert seen["same keys"] and seen["unchanged"]
    assert seen["dtypes"] == {"torch.float32"}
    assert seen["count"] == 16 * 2 + 11 * 3  # momentum and master; two moments and master
