"""DeepSpeed's checkpoints: exact on the same ranks, whole at other world sizes, and those of its own Muon."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.integrations.deepspeed_case import Chosen, Run, zero_config
from tests.spawn import run_ranks

pytestmark = [
    pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed: see the README"),
    pytest.mark.timeout(300),
]
SECONDS = 240

BF16 = {"bf16": {"enabled": True}}
BF16_OPTIMIZER = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
CASES = {
    "fp32": zero_config(1),
    "bf16-stage-2": zero_config(2, **BF16, zero={"parameter_alignment": True}),
    "bf16-optimizer": zero_config(1, **BF16_OPTIMIZER),
    "stage-3": zero_config(3, zero={"sub_group_size": 100, "stage3_param_persistence_threshold": 0}, **BF16),
}
UNIVERSAL = {"checkpoint": {"load_universal": True}}


def train(run: Run, steps: range) -> None:
    """Equal gradients on every rank, multiples of 3: their mean is exact on one, two and three ranks."""
    for step in steps:
        run.train_step(step, rank=0, factor=3)


def state_of(run: Run) -> dict[str, list[Tensor]]:
    """Whole masters and moments, which do not depend on the number of ranks."""
    masters = run.masters()
    first, second = run.moment(), run.moment("exp_avg_sq")
    return {"masters": [m.detach() for m in masters], "exp_avg": first, "exp_avg_sq": second}


def assert_equal(ours: dict[str, list[Tensor]], theirs: dict[str, list[Tensor]], where: str) -> None:
    for key, values in theirs.items():
        assert all(map(torch.equal, ours[key], values)), f"{where}: {key} differs"


def assert_resumes(run: Run, saved: dict[str, dict[str, list[Tensor]]], where: str) -> None:
    """The state is the saved one, the next steps are those of the run that went on, and no copy is left."""
    assert_equal(state_of(run), saved["at save"], where)
    assert [group["step"] for group in run.optimizer.param_groups] == [2, 2, 2], where
    train(run, range(2, 4))
    assert_equal(state_of(run), saved["at end"], where)
    for partition in run.optimizer._partitions.values():
        if run.optimizer.param_groups[partition.group]["algorithm"] == "muon":
            assert run.optimizer.state[partition.flat]["exp_avg_sq"].untyped_storage().nbytes() == 4, where


def save_and_resume(rank: int, world: int, folder: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    others = {
        "round-robin": zero_config(2, zero={"round_robin_gradients": True}),
        "elastic": zero_config(1, zero={"elastic_checkpoint": True}),
    }
    for name, config in {**CASES, **others}.items():
        run = Run(config)
        train(run, range(2))
        run.engine.save_checkpoint(folder / name, tag="two-steps")
        saved = {"at save": state_of(run)}
        assert all(m.abs().max() > 0 for m in saved["at save"]["exp_avg"])
        dist.barrier()
        # DeepSpeed's script takes BF16_Optimizer's checkpoints for none of ZeRO.
        masters = get_fp32_state_dict_from_zero_checkpoint(folder / name, tag="two-steps") if name == "stage-3" else {}
        for (parameter, _), master in zip(run.model.named_parameters(), saved["at save"]["masters"], strict=True):
            assert not masters or torch.equal(masters[parameter], master), f"{name}: {parameter} by zero_to_fp32"
        train(run, range(2, 4))
        saved["at end"] = state_of(run)
        if rank == 0:
            torch.save(saved, folder / f"{name}.pt")
        again = Run(config)
        again.engine.load_checkpoint(folder / name)
        assert_resumes(again, saved, name)
        if name != "elastic":
            again.engine.load_checkpoint(folder / name)  # over an optimizer that has stepped
            assert_resumes(again, saved, f"{name}, again")


def load_universal(rank: int, world: int, folder: Path) -> None:
    for name, config in CASES.items():
        saved = torch.load(folder / f"{name}.pt")
        run = Run({**config, **UNIVERSAL})
        run.engine.load_checkpoint(folder / f"{name}-universal", tag="two-steps")
        assert_resumes(run, saved, f"{name} on {world}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints of two ranks after two steps, and converted ones."""
    path = tmp_path_factory.mktemp("deepspeed")
    run_ranks(save_and_resume, 2, path, timeout=SECONDS)
    for name in CASES:
        convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        folders = ["--input_folder", path / name / "two-steps", "--output_folder", path / f"{name}-universal/two-steps"]
        subprocess.run([*map(str, [*convert, *folders])], check=True, capture_output=True, timeout=100)
    return path


def test_resume_on_the_same_ranks_is_exact(folder: Path) -> None:
    assert (folder / "fp32.pt").exists()


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_converted_checkpoints_keep_all_state_at_any_world_size(folder: Path, world: int) -> None:
    run_ranks(load_universal, world, folder, timeout=SECONDS)


def adopt_momentum(rank: int, world: int, folder: Path) -> None:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    torch._dynamo.config.disable = True  # DeepSpeed's Muon compiles one kernel per shape, for a minute
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    own = {"type": "Muon", "params": {"lr": 0.01, "momentum": 0.95, "torch_adam": True}}
    cases = {
        "fp32": zero_config(1),
        "fp32-stage-2": zero_config(2, zero={"parameter_alignment": True}),
        "bf16-stage-2": zero_config(2, **BF16),
        "bf16-optimizer": zero_config(1, **BF16_OPTIMIZER),
        "fp16": zero_config(1, fp16={"enabled": True, "initial_scale_power": 4}),
    }
    with mock.patch.object(type(get_accelerator()), "is_fp16_supported", lambda self: True):
        for name, config in cases.items():
            model = Chosen(plain=True)
            engine, *_ = deepspeed.initialize(
                model=model, model_parameters=list(model.parameters()), config={**config, "optimizer": own}
            )
            momenta = [torch.zeros_like(p, dtype=torch.float32) for p in model.matrices]
            # DeepSpeed's Muon in fp16 would multiply matrices in fp16 here: too slow without a GPU.
            for step in range(0 if name == "fp16" else 2):
                grads = model.gradients(step, 0, rank)
                engine.backward(engine(grads))
                engine.step()
                both = [(a + b) / 2 for a, b in zip(*(model.gradients(step, 0, r) for r in (0, 1)), strict=True)]
                torch._foreach_lerp_(momenta, both[: len(momenta)], 0.05)
            engine.save_checkpoint(folder / f"own-{name}", tag="t")
            for param in model.parameters():
                del param.use_muon
            run = Run(config, plain=True)
            if name == "fp16":
                state = run.optimizer.state_dict()
                state["state"][0] = {"momentum_buffer": torch.zeros(7)}
                state["param_groups"][0]["use_muon"] = True
                with pytest.raises(ValueError, match="loss scale"):
                    run.optimizer.load_state_dict(state)
                continue
            run.engine.load_checkpoint(folder / f"own-{name}")
            tolerance = 2**-6 if name == "bf16-stage-2" else 1e-6
            for ours, theirs in zip(run.moment(), momenta, strict=False):
                assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance), name
            assert [group["step"] for group in run.optimizer.param_groups][-1] == 2, name
            assert run.optimizer.param_groups[0]["lr"] == 0.02, name
            assert all(map(torch.equal, run.model.parameters(), model.parameters())), name
            if name == "fp32":  # as if DeepSpeed had laid another order of parameters over ours
                right = run.flats[0].detach().clone()
                run.flats[0].data[7 * rank] += 1
                with pytest.raises(ValueError, match="the loaded masters are not those"):
                    run.train_step(2, rank)
                run.flats[0].data.copy_(right)
            run.train_step(2, rank)
    dist.barrier()


def test_a_run_of_deepspeeds_own_muon_goes_on_with_its_momentum(tmp_path: Path) -> None:
    run_ranks(adopt_momentum, 2, tmp_path, timeout=SECONDS)
