"""Generated tests for as long as you like: `make fuzz`, or

    python -m tests.fuzz --plans 10000 --runs 300 --seed 0
    python -m tests.fuzz --minutes 120

The smallest case that fails is printed as a constructor to paste into a test, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import traceback

import hypothesis
import torch

from tests.fuzz.campaign import Campaign, plan_campaign, pool, run_campaign

# Per round of a campaign by time; each round has a seed of its own.
PLANS, RUNS = 2000, 100


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=0, help="plans to check")
    parser.add_argument("--runs", type=int, default=0, help="runs to check")
    parser.add_argument("--minutes", type=float, help="go on with both, round after round, for so long")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the next have the next ones")
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, hypothesis {hypothesis.__version__}, Python {platform.python_version()}",
        flush=True,
    )
    until = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    plans, failed, seed = plan_campaign(), False, args.seed
    with pool() as ranks:
        runs = run_campaign(ranks)
        while True:
            for name, campaign, count in (
                ("plans", plans, PLANS if until else args.plans),
                ("runs", runs, RUNS if until else args.runs),
            ):
                if count:
                    failed |= not _round(name, campaign, seed, count)
            seed += 1
            if until is None or time.monotonic() > until:
                return int(failed)


def _round(name: str, campaign: Campaign, seed: int, count: int) -> bool:
    """One round; whether all went well."""
    try:
        campaign.run(seed, count)
        verdict = "no fault"
    except Exception as error:
        traceback.print_exception(error, limit=-1)
        print("\n".join(getattr(error, "__notes__", ())), file=sys.stderr)
        verdict = "FAULT, see above"
    kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(campaign.kinds.items()))
    print(f"seed {seed}: {campaign.examples} {name} in {campaign.seconds:.0f} s: {verdict} ({kinds})", flush=True)
    return verdict == "no fault"


if __name__ == "__main__":
    sys.exit(main())
