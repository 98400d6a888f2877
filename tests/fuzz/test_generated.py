"""A slice of the generated plans and runs, the same ones every time, and what longer campaigns have found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.campaign import plan_campaign, pool, run_campaign
from tests.fuzz.plans import PlanCase, check_plan
from tests.fuzz.pool import Pool
from tests.fuzz.runs import RunCase
from tests.fuzz.weights import Weight

# A rank lacks a gradient, so its first reduction starts with the step; the other ones wait for it in their backward.
LATE_REDUCTION = RunCase(
    weights=(Weight((5, 16, 16)), Weight((3, 27, 16)), Weight((40, 20)), Weight((8, 4)), Weight(())),
    dtypes=("fp32", "fp32", "fp32", "bf16", "fp32"),
    world=3,
    optimizer={
        "layout": "aligned",
        "bucket_mb": 1e-5,
        "gradient_reduction": "reduce_scatter",
        "reduce_dtype": "bf16",
        "nonfinite": "skip",
        "replica_check_every": 1,
        "ns_form": "standard",
        "ns_dtype": "bf16",
    },
    muon={
        "lr": 0.02,
        "ns_coefficients": "quintic",
        "ns_steps": 5,
        "adjust_lr_fn": "original",
        "update_scale": 1.0,
    },
    adamw={"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8},
    missing=0.4,
    seed=1,
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    with pool() as ranks:
        yield ranks


def test_generated_plans() -> None:
    campaign = plan_campaign()
    campaign.run(seed=0, examples=150)
    assert campaign.examples >= 100


def test_a_bucket_of_empty_parameters() -> None:
    for cut in ("flat", "bucketed", "aligned"):
        check_plan(PlanCase((Weight((0, 3)),), dp=2, cut=cut, families=("fp32",)))


def test_generated_runs(ranks: Pool) -> None:
    campaign = run_campaign(ranks)
    campaign.run(seed=0, examples=60)
    assert campaign.examples >= 40


def test_the_check_of_replicas_waits_for_late_reductions(ranks: Pool) -> None:
    ranks.run(LATE_REDUCTION)
