"""Training under stock DeepSpeed against one process, over ZeRO stages, dtypes and options."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.checks import on_ranks
from tests.integrations.deepspeed_case import LR, MATRICES, STACK_LR, Recorder, Run, Twin, zero_config

pytestmark = [
    pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed: see the README"),
    pytest.mark.timeout(300),
]
SECONDS = 240  # the first engine on a machine builds an extension of DeepSpeed

STEPS = 4
BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
ALIGNED = {"parameter_alignment": True}
ROUND_ROBIN = {"round_robin_gradients": True}
PER_OWNER = {"use_multi_rank_bucket_allreduce": False}
ACCUMULATE = {"gradient_accumulation_steps": 3, "gradient_clipping": 1.0}


def check(config: dict[str, Any], rank: int, world: int, **options: Any) -> None:
    """A few steps; masters must follow the twin and not the control, at one Newton-Schulz run per matrix."""
    run = Run(config, **options)
    twin, control = Twin(run), Twin(run, scale=1.01)
    calls = torch.tensor(0)
    for step in range(STEPS):
        lrs = [group["lr"] for group in run.optimizer.param_groups]
        run.train_step(step, rank)
        where = f"{config}, step {step}"
        reduced = run.reduced()
        for ours, theirs in zip(reduced, run.expected_gradients(step, world), strict=True):
            error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
            assert error <= (2**-6 if "bf16" in config else 1e-6), f"{where}: gradients are off by {error}"
        # Newton-Schulz in bf16 magnifies a last-bit difference of the mean, so the twin gets the same one.
        for other in (twin, control):
            other.step(reduced, lrs)
        masters = run.masters()
        assert twin.distance(masters) <= 1e-6, f"{where}: {twin.distance(masters)}"
        assert control.distance(masters) > 1e-5, f"{where}: the comparison is blind"
        dtype = next(run.model.parameters()).dtype
        for value, master in zip(run.values(), masters, strict=True):
            assert torch.equal(value, master.to(dtype).float()), f"{where}: parameters do not follow the masters"
        calls += run.optimizer.step_report()["ns_calls"]
    dist.all_reduce(calls)
    assert calls == MATRICES * STEPS, f"{config}: {calls} Newton-Schulz runs"
    run.engine.destroy()


@on_ranks(2, timeout=SECONDS)
def test_stages_and_layouts(rank: int, world: int) -> None:
    check(zero_config(1), rank, world)
    check(zero_config(1, zero=ROUND_ROBIN), rank, world)
    check(zero_config(1, zero=ALIGNED), rank, world)
    check(zero_config(2), rank, world)
    check(zero_config(2, zero={**ALIGNED, **ROUND_ROBIN, **PER_OWNER, "overlap_comm": True}), rank, world)
    check(zero_config(2, zero={"reduce_scatter": False, "contiguous_gradients": False}), rank, world)


@on_ranks(2, timeout=SECONDS)
def test_accumulation_and_clipping_of_raw_gradients(rank: int, world: int) -> None:
    check(zero_config(1, **ACCUMULATE), rank, world)
    check(zero_config(2, **ACCUMULATE), rank, world)


@on_ranks(2, timeout=SECONDS)
def test_bf16_on_the_masters(rank: int, world: int) -> None:
    check(zero_config(1, **BF16), rank, world)
    check(zero_config(2, **BF16, **ACCUMULATE), rank, world)
    check(zero_config(2, **BF16, **FP32_SUMS, zero=ROUND_ROBIN), rank, world)


@on_ranks(2, timeout=SECONDS)
def test_bf16_optimizer_steps_all_groups_at_once(rank: int, world: int) -> None:
    run = Run(zero_config(1, **BF16, **FP32_SUMS))
    assert type(run.engine.optimizer).__name__ == "BF16_Optimizer"
    check(zero_config(1, **BF16, **FP32_SUMS), rank, world)
    check(zero_config(1, **BF16, **FP32_SUMS, **ACCUMULATE), rank, world)


@on_ranks(2, timeout=SECONDS)
def test_torch_autocast_in_bf16(rank: int, world: int) -> None:
    from deepspeed.runtime import torch_autocast

    config = zero_config(1, torch_autocast={"enabled": True, "dtype": "bfloat16"})
    try:
        check(config, rank, world)
    finally:
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False


def check_uneven(rank: int, world: int) -> None:
    check(zero_config(1), rank, world)
    check(zero_config(2, zero={**ALIGNED, **ROUND_ROBIN, **PER_OWNER}), rank, world)
    check(zero_config(2, **ACCUMULATE), rank, world)
    check(zero_config(1, **BF16), rank, world)
    check(zero_config(1, **BF16, **FP32_SUMS, **ACCUMULATE), rank, world)


@on_ranks(3, timeout=SECONDS)
def test_three_ranks(rank: int, world: int) -> None:
    check_uneven(rank, world)


@pytest.mark.slow
@on_ranks(5, timeout=SECONDS)
def test_five_ranks(rank: int, world: int) -> None:
    check_uneven(rank, world)


def check_fp16(rank: int, config: dict[str, Any]) -> None:
    """Steps with dynamic loss scaling, two of which overflow on one rank."""
    from deepspeed.accelerator import get_accelerator

    fp16 = {"enabled": True, "initial_scale_power": 6, "hysteresis": 1}
    with mock.patch.object(type(get_accelerator()), "is_fp16_supported", lambda self: True):
        run = Run({**config, "fp16": fp16})
        twin, control = Twin(run), Twin(run, scale=1.01)
        for step in range(5):
            if step in (1, 3):
                before, scale = run.snapshot(), run.engine.optimizer.loss_scale
                counts = [group["step"] for group in run.optimizer.param_groups]
                run.train_step(step, rank, spoil=rank == 1)
                assert all(map(torch.equal, before, run.snapshot())), f"{config}: a skipped step changed state"
                assert counts == [group["step"] for group in run.optimizer.param_groups]
                assert run.engine.optimizer.loss_scale == scale / 2
            run.train_step(step, rank)
            for other in (twin, control):
                other.step(run.reduced())
            assert twin.distance(run.masters()) <= 1e-6, f"{config}, step {step}"
            assert control.distance(run.masters()) > 1e-5
        assert run.engine.skipped_steps == 2
        assert all(map(torch.equal, run.reduced(), run.expected_gradients(4, dist.get_world_size())))
        run.engine.destroy()


@on_ranks(2, timeout=SECONDS)
def test_a_skipped_fp16_step_changes_nothing(rank: int, world: int) -> None:
    for stage in (1, 2):
        check_fp16(rank, zero_config(stage))


@on_ranks(2, timeout=SECONDS)
def test_schedulers_scale_every_group_from_the_next_step(rank: int, world: int) -> None:
    factors = [1.0, 0.5, 0.25, 2.0, 1.0]

    def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[step])

    run = Run(zero_config(1), lr_scheduler=scheduler)
    for step, factor in enumerate(factors[:3]):
        assert [group["lr"] for group in run.optimizer.param_groups] == [LR * factor, STACK_LR * factor, LR * factor]
        run.train_step(step, rank)
    check(zero_config(1), rank, world, lr_scheduler=scheduler)
    warmup = {"warmup_min_lr": 0.001, "warmup_max_lr": 0.03, "warmup_num_steps": 4, "warmup_type": "linear"}
    check(zero_config(2, scheduler={"type": "WarmupLR", "params": warmup}), rank, world)
    run = Run(zero_config(1, scheduler={"type": "WarmupLR", "params": warmup}))
    seen = []
    for step in range(4):
        run.train_step(step, rank)
        seen.append(run.optimizer.param_groups[0]["lr"])
    assert seen == sorted(set(seen))


@on_ranks(2, timeout=SECONDS)
def test_one_cycle_cycles_the_momentum_of_muon_too(rank: int, world: int) -> None:
    cycle = {"cycle_min_lr": 0.001, "cycle_max_lr": 0.03, "cycle_first_step_size": 4, "decay_lr_rate": 0.0}
    run = Run(zero_config(1, scheduler={"type": "OneCycle", "params": {**cycle, "cycle_momentum": True}}))
    expected: list[Tensor] = [torch.zeros_like(p) for p in run.model.parameters()][:9]
    seen = []
    for step in range(3):
        run.train_step(step, rank)
        seen.append(run.optimizer.param_groups[0]["momentum"])
        torch._foreach_lerp_(expected, run.reduced()[:9], 1 - seen[-1])
    assert len(set(seen)) == 3, seen
    assert all(map(torch.equal, run.moment()[:9], expected))


@on_ranks(2, timeout=SECONDS)
def test_state_is_one_momentum_and_visible_to_deepspeed(rank: int, world: int) -> None:
    from deepspeed.utils import safe_get_full_optimizer_state

    run = Run(zero_config(1))
    expected: list[Tensor] = [torch.zeros_like(p) for p in run.model.parameters()]
    for step in range(2):
        run.train_step(step, rank)
        torch._foreach_lerp_(expected[:9], run.reduced()[:9], 1 - 0.95)
    for param, ours, theirs in zip(run.model.parameters(), run.moment()[:9], expected[:9], strict=False):
        assert torch.equal(ours, theirs)
        assert torch.equal(safe_get_full_optimizer_state(param, "exp_avg"), theirs)
    moments = [value for flat in run.flats for value in run.optimizer.state[flat].values()]
    assert [value.numel() for value in moments] == [flat.numel() for flat in run.flats for _ in range(2)]
    stored = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in moments}
    *muon, adamw = (flat.numel() for flat in run.flats)
    assert sum(stored.values()) <= 4 * (sum(muon) + 2 * adamw) + 16


@on_ranks(2, timeout=SECONDS)
def test_report_counts_the_exchange_that_the_plans_predict(rank: int, world: int) -> None:
    run = Run(zero_config(1), strategy="home")
    run.train_step(0, rank)
    report = run.optimizer.step_report()
    plans = run.optimizer.plans
    assert set(plans) == {0, 1}
    agreement = 4 * len(list(run.model.parameters()))  # one flag per parameter, of which half is sent twice
    exchange = sum(plan.exchange_bytes_by_rank[rank] for plan in plans.values())
    assert report["bytes"] == {"all_to_all": exchange, "all_reduce": agreement}
    assert len(report["update_rms"]) == MATRICES
    assert all(0.1 < rms < 0.3 for rms in report["update_rms"].values())
    assert run.optimizer.step_report()["ns_calls"] == 0


class Mixture(nn.Module):
    """A DeepSpeed MoE layer between two matrices."""

    def __init__(self, ep_size: int) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        torch.manual_seed(0)
        expert = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12))
        self.enter, self.leave = nn.Linear(10, 12), nn.Linear(12, 6)
        self.moe = MoE(12, expert, num_experts=4, ep_size=ep_size, capacity_factor=4.0, use_rts=False)

    def forward(self, x: Tensor) -> Tensor:
        y, balance, _ = self.moe(self.enter(x))
        return self.leave(y).square().mean() + balance


@on_ranks(2, timeout=SECONDS)
def test_expert_parallel_groups_have_a_layout_of_their_own(rank: int, world: int) -> None:
    import deepspeed

    from distributed_muon import muon_param_groups

    for ep_size in (1, 2):
        for stage in (1, 2):
            model = Mixture(ep_size)
            run = Run.__new__(Run)
            run.model, run.config = model, zero_config(stage)
            run.optimizer = Recorder(muon_param_groups(model), lr=LR, ns_form="standard", weight_decay=0.0)
            run.engine, *_ = deepspeed.initialize(model=model, optimizer=run.optimizer, config=run.config)
            names = [name for name, p in model.named_parameters() if p.ndim == 2]
            copies = [p.detach().clone() for p in model.parameters() if p.ndim == 2]
            twin = torch.optim.Muon(copies, lr=LR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            for step in range(2):
                x = torch.randn(8, 10, generator=torch.Generator().manual_seed(10 * step + rank))
                run.engine.backward(run.engine(x))
                run.engine.step()
                grads = [g for g in run.reduced() if g.ndim == 2]
                for copy, grad in zip(copies, grads, strict=True):
                    copy.grad = grad
                twin.step()
            masters = [m for m in run.masters() if m.ndim == 2]
            assert sum("expert" in name for name in names) == 8 // ep_size
            for name, ours, theirs in zip(names, masters, copies, strict=True):
                assert torch.allclose(ours, theirs, rtol=0, atol=1e-6), f"ep_size {ep_size}, stage {stage}: {name}"
            worlds = {i: plan.layout.world for i, plan in run.optimizer.plans.items()}
            assert worlds == {0: 2, 1: 2 // ep_size}
            run.engine.destroy()
