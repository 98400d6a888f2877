"""Generated runs of the engine alone, over shards that no adapter here would cut: TP, HSDP, runs in any order."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor

from tests.dense import tp_slice
from tests.fuzz.plans import BUCKETED, CUTS, PlanCase
from tests.fuzz.reference import OneProcess
from tests.fuzz.runs import DTYPES, NEAR, WORLD, groups_of, largest_update, muon_options
from tests.fuzz.weights import weights
from tests.shards import sharded_step, step_on

# Data-parallel ranks, tensor-parallel ranks, HSDP's copies.
_WORLDS = [(1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 2, 1), (1, 3, 1), (1, 1, 2), (1, 1, 3)]


@dataclass(frozen=True)
class EngineCase:
    """One run.

    Args:
        plan: parameters, ranks and cut, strategy and waves. muon: options of the group. ns_form, ns_dtype,
            zero_gradients: of the engine. zeros: chance that a parameter's gradient is zero in a step.
    """

    plan: PlanCase
    steps: int = 2
    muon: dict[str, Any] = field(default_factory=dict)
    ns_form: str = "standard"
    ns_dtype: str = "bf16"
    zero_gradients: str = "update"
    zeros: float = 0.0
    seed: int = 0

    def gradients(self, step: int) -> list[Tensor]:
        """The mean gradients of one step, whole."""
        generator = torch.Generator().manual_seed(self.seed * 64 + step)
        zero = [float(torch.rand((), generator=generator)) < self.zeros for _ in self.plan.weights]
        grads = [torch.randint(-8, 9, w.shape, generator=generator).float() for w in self.plan.weights]
        return [grad * (not gone) for grad, gone in zip(grads, zero, strict=True)]


@st.composite
def engine_cases(draw: st.DrawFn) -> EngineCase:
    """Any run of up to three ranks."""
    dp, tp, copies = draw(st.sampled_from(_WORLDS))
    given = draw(weights(tp, most=5))
    cut = draw(st.sampled_from([cut for cut in CUTS if cut not in BUCKETED or cut == "aligned"]))
    wave_bytes = draw(st.one_of(st.integers(1, 4000), st.just(1 << 26)))
    strategy = draw(st.sampled_from(["auto", "home", "gather"]))
    plan = PlanCase(
        given, dp, tp, copies, cut, 400, ("fp32",) * len(given), draw(st.integers(0, 99)), strategy, wave_bytes
    )
    return EngineCase(
        plan,
        steps=draw(st.integers(1, 3)),
        muon=draw(muon_options()),
        ns_form=draw(st.sampled_from(["standard", "standard", "gram", "auto"])),
        ns_dtype=draw(st.sampled_from(["bf16", "fp32"])),
        zero_gradients=draw(st.sampled_from(["update", "skip"])),
        zeros=draw(st.sampled_from([0.0, 0.3])),
        seed=draw(st.integers(0, 999)),
    )


def run_engine(rank: int, world: int, case: EngineCase) -> str:
    """One case on a rank of the pool: what is wrong, or "" (for ranks outside of the case's world, too)."""
    plan = case.plan
    group = groups_of(world)[plan.world - 1]
    if rank >= plan.world:
        return ""
    try:
        return _run(rank, case, group)
    except Exception:
        return traceback.format_exc()


def _run(rank: int, case: EngineCase, group: dist.ProcessGroup | None) -> str:
    plan = case.plan
    generator = torch.Generator().manual_seed(case.seed)
    whole = [torch.randn(weight.shape, generator=generator) for weight in plan.weights]

    def local(tensors: list[Tensor]) -> list[Tensor]:
        own = [(t, *weight[1:], plan.tp, rank % plan.tp) for t, weight in zip(tensors, plan.weights, strict=True)]
        return [tp_slice(*arguments) for arguments in own]

    specs = [weight.spec(number, plan.tp) for number, weight in enumerate(plan.weights)]
    options = {**case.muon, "strategy": plan.strategy, "ns_form": case.ns_form, "ns_dtype": DTYPES[case.ns_dtype]}
    options["zero_gradients"] = case.zero_gradients
    engine = sharded_step(
        specs, plan.shards(), local(whole), options, tp_ranks=plan.tp_ranks(), wave_bytes=plan.wave_bytes, group=group
    )
    reference = OneProcess(plan.weights, whole, case.muon, {"lr": 0.0}, DTYPES[case.ns_dtype])
    exact = case.ns_form == "standard" and case.ns_dtype == "bf16"
    moved = [0.0] * len(whole)
    for step in range(case.steps):
        grads = case.gradients(step)
        step_on(engine, local(grads))
        skip = [case.zero_gradients == "skip" and not grad.any() for grad in grads]
        # AdamW's groups stay at rate 0, in the reference as here.
        reference.step(
            [None if gone or w.rule is None else g for g, gone, w in zip(grads, skip, plan.weights, strict=True)],
            case.muon["lr"],
        )
        wrong = []
        wanted = local([reference.values(number) for number in range(len(whole))])
        momenta = local([reference.state(number, "momentum_buffer") for number in range(len(whole))])
        for p in engine.parameters:
            muon = plan.weights[p.tensor].rule is not None
            if muon:
                moved[p.tensor] += NEAR * case.muon["lr"] * largest_update(plan.weights[p.tensor], reference)
                if not torch.equal(p.momentum, momenta[p.tensor].reshape(-1)[p.start : p.stop]):
                    wrong.append(f"step {step}: momentum of {p.name} differs")
            want = wanted[p.tensor].reshape(-1)[p.start : p.stop]
            distance = float((p.master - want).norm())
            if distance > (0.0 if exact or not muon else moved[p.tensor] + 1e-6):
                wrong.append(f"step {step}: {p.name} is {distance} away")
        everywhere: list[list[str]] = [[]] * plan.world
        dist.all_gather_object(everywhere, wrong, group=group)
        if any(everywhere):
            return "\n".join(wrong) or "another rank found something"
    return ""


assert max(dp * tp * copies for dp, tp, copies in _WORLDS) <= WORLD
