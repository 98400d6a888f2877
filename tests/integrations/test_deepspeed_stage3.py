"""ZeRO stage 3 against one process: every matrix is cut over all ranks and travels; sub-groups, dtypes, checkpoints."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_muon import muon_param_groups
from distributed_muon.integrations.deepspeed import PartitionedOptimizer
from tests.checks import on_ranks
from tests.integrations.deepspeed_case import MATRICES, STACK, Run, zero_config
from tests.integrations.test_deepspeed import ACCUMULATE, BF16, check, check_fp16
from tests.reference import rank_gradient

pytestmark = [
    pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed: see the README"),
    pytest.mark.timeout(300),
]
SECONDS = 240
# Parameters that DeepSpeed would keep whole between steps, and sub-groups of a few tensors.
CUT = {"stage3_param_persistence_threshold": 0}
SUB_GROUPS = {**CUT, "sub_group_size": 100}


@on_ranks(2, timeout=SECONDS)
def test_two_ranks(rank: int, world: int) -> None:
    check(zero_config(3), rank, world)
    check(zero_config(3, zero=CUT), rank, world, zero_init=True)
    check(zero_config(3, zero=SUB_GROUPS, **ACCUMULATE), rank, world)
    check(zero_config(3, zero=SUB_GROUPS, **BF16), rank, world, zero_init=True)


@on_ranks(3, timeout=SECONDS)
def test_three_ranks(rank: int, world: int) -> None:
    check(zero_config(3, zero=CUT, **ACCUMULATE), rank, world, zero_init=True)
    check(zero_config(3, zero=SUB_GROUPS, **BF16), rank, world)


@on_ranks(4, timeout=SECONDS)
def test_four_ranks(rank: int, world: int) -> None:
    check(zero_config(3, zero=SUB_GROUPS), rank, world, zero_init=True)
    check(zero_config(3, zero=CUT), rank, world)


@on_ranks(2, timeout=SECONDS)
def test_a_skipped_fp16_step_changes_nothing(rank: int, world: int) -> None:
    check_fp16(rank, zero_config(3, zero=SUB_GROUPS))


@on_ranks(2, timeout=SECONDS)
def test_every_matrix_travels_as_predicted(rank: int, world: int) -> None:
    run = Run(zero_config(3, zero=SUB_GROUPS), strategy="home")
    run.train_step(0, rank)
    report, plans = run.optimizer.step_report(), run.optimizer.plans
    assert len(plans) > 2, "several sub-groups in a group"
    assert report["bytes"]["all_to_all"] == sum(plan.exchange_bytes_by_rank[rank] for plan in plans.values())
    # A stack of three is cut in its middle one; all other matrices are cut in two.
    numel = sum(m.numel for plan in plans.values() for m in plan.layout.matrices) - 2 * STACK[1] * STACK[2]
    sent = torch.tensor(report["bytes"]["all_to_all"])
    dist.all_reduce(sent)
    # The half that lies with the other rank goes to the home and back, in bf16; odd halves differ by one element.
    assert abs(sent - 2 * numel) <= 4 * MATRICES, (int(sent), numel)


class Product(nn.Linear):
    """Its loss is the weight times a given tensor, which thereby is the gradient: small integers, so sums are exact."""

    def __init__(self) -> None:
        super().__init__(12, 12, bias=False)

    def forward(self, grad: Tensor) -> Tensor:
        return (self.weight * grad).sum()


class Tied(nn.Module):
    """A matrix used twice, a frozen one, and a head that forward may leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.again, self.leave, self.frozen = (Product() for _ in range(4))
        self.again.weight = self.enter.weight
        self.frozen.requires_grad_(False)

    def forward(self, step: int, rank: int, leave: bool) -> Tensor:
        first, second, third = (rank_gradient((12, 12), step, rank, i) for i in range(3))
        loss = self.enter(first) + self.again(second) + self.frozen(third)
        return loss + self.leave(third) if leave else loss


# By step, which of its two microbatches use the head.
USED = ((True, True), (False, False), (False, True), (True, False), (False, False))


@on_ranks(2, timeout=SECONDS)
def test_tied_frozen_and_unused_parameters(rank: int, world: int) -> None:
    import deepspeed

    for stage in (3, 2):
        for missing in ("skip", "zero"):
            model, twin = Tied(), Tied()
            reference = torch.optim.Muon(
                [twin.enter.weight, twin.leave.weight], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
            )
            ours = PartitionedOptimizer(
                muon_param_groups(model), lr=0.02, ns_form="standard", missing_gradients=missing
            )
            config = zero_config(stage, zero=CUT, gradient_accumulation_steps=2)
            engine, *_ = deepspeed.initialize(model=model, optimizer=ours, config=config)
            if (stage, missing) == (3, "zero"):  # DeepSpeed's gradient is not zero there, but the last one again
                engine.backward(engine(0, rank, True))
                engine.step()
                engine.backward(engine(1, rank, True))
                with pytest.raises(ValueError, match=r'missing_gradients="zero".*stage 3'):
                    engine.step()
                continue
            for step, used in enumerate(USED):  # alike on all ranks: DeepSpeed wants it so
                for number, leave in enumerate(used):
                    batch = 2 * step + number
                    engine.backward(engine(batch, rank, leave))
                    engine.step()
                    (sum(twin(batch, other, leave) for other in range(world)) / (2 * world)).backward()
                if missing == "zero" and twin.leave.weight.grad is None:
                    twin.leave.weight.grad = torch.zeros(12, 12)
                grads = [p.grad for p in (twin.enter.weight, twin.leave.weight) if p.grad is not None]
                norm = torch.nn.utils.get_total_norm(grads)
                assert float(engine.get_global_grad_norm()) == pytest.approx(float(norm), rel=1e-5), (stage, step)
                reference.step()
                reference.zero_grad()
            params = [model.enter.weight, model.leave.weight, model.frozen.weight]
            with deepspeed.zero.GatheredParameters(params) if stage == 3 else nullcontext():
                for name, mine, theirs in zip(
                    ("enter", "leave", "frozen"),
                    params,
                    (twin.enter.weight, twin.leave.weight, twin.frozen.weight),
                    strict=True,
                ):
                    error = float((mine - theirs).abs().max())
                    assert error <= 1e-6, f"stage {stage}, {missing}, {name}: {error}"
            engine.destroy()
