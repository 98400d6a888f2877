"""Many generated cases of one kind under a seed, counted by what they were."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Verbosity, settings
from hypothesis.strategies import SearchStrategy

from tests.fuzz.engines import EngineCase, engine_cases, run_engine
from tests.fuzz.plans import PlanCase, check_plan, plan_cases
from tests.fuzz.pool import Pool
from tests.fuzz.runs import WORLD, RunCase, run_case, run_cases

Case = PlanCase | RunCase | EngineCase


def run_either(rank: int, world: int, case: RunCase | EngineCase) -> str:
    """A run of either kind, on a rank of a pool."""
    return run_case(rank, world, case) if isinstance(case, RunCase) else run_engine(rank, world, case)


class Campaign:
    """Draws cases and checks each.

    Args:
        cases: where they come from. check: raises AssertionError on a fault.

    Attributes:
        examples: cases checked. seconds: that took. kinds: how many cases had which property.
    """

    def __init__(self, cases: SearchStrategy[Any], check: Callable[[Any], Any]) -> None:
        self._cases, self._check = cases, check
        self.examples, self.seconds, self.kinds = 0, 0.0, Counter[str]()

    def run(self, seed: int, examples: int) -> None:
        """Check so many cases, the same for the same seed; the smallest failing one is printed as a constructor."""

        def check(case: Case) -> None:
            self._check(case)
            self.examples += 1
            self.kinds.update(kinds_of(case))

        calm = settings(
            max_examples=examples,
            deadline=None,
            database=None,
            verbosity=Verbosity.normal,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        begin = time.monotonic()
        try:
            hypothesis.seed(seed)(calm(hypothesis.given(self._cases)(check)))()
        finally:
            self.seconds += time.monotonic() - begin


def plan_campaign() -> Campaign:
    """Plans, in this process."""
    return Campaign(plan_cases(), check_plan)


def run_campaign(pool: Pool) -> Campaign:
    """Runs of DistributedMuon and of the engine alone, half and half, on the ranks of a pool."""
    return Campaign(run_cases() | engine_cases(), pool.run)


def pool() -> Pool:
    """Ranks for `run_campaign`."""
    return Pool(run_either, WORLD)


def kinds_of(case: Case) -> list[str]:
    """What is worth counting of a case."""
    if isinstance(case, PlanCase):
        return [
            f"ranks {case.world}",
            f"cut {case.cut}",
            case.strategy,
            *_if(case.tp > 1, "TP"),
            *_if(case.copies > 1, "HSDP"),
        ]
    if isinstance(case, EngineCase):
        plan = case.plan
        kinds = ["engine alone", f"ranks {plan.world}", *_if(plan.tp > 1, "TP"), *_if(plan.copies > 1, "HSDP")]
        return kinds + _if(case.zero_gradients == "skip", "zero gradients skipped")
    options = case.optimizer
    return [
        "DistributedMuon",
        f"ranks {case.world}",
        *sorted(set(case.dtypes)),
        *_if(options["reduce_dtype"] == "bf16", "bf16 reduction"),
        *_if(options["gradient_reduction"] == "none", "averaged outside"),
        *_if(case.microbatches > 1, "accumulation"),
        *_if(case.clip is not None, "clip"),
        *_if(case.overlap, "overlapped gather"),
        *_if(bool(case.nonfinite), "inf"),
        *_if(0 < case.reload < case.steps, "reload"),
        *_if(case.missing + case.everywhere > 0, "missing gradients"),
    ]


def _if(there: bool, kind: str) -> list[str]:
    return [kind] if there else []
