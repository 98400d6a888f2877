"""Rates of a collective as nccl-tests define them, and how much of it was hidden.

With n ranks, S bytes of the whole buffer and t seconds:

- algorithm bandwidth is S / t. S is what a rank ends with for an all-gather, starts with for a reduce-scatter or an
  all-to-all, and has before and after an all-reduce;
- bus bandwidth is the algorithm bandwidth times (n - 1) / n, for an all-reduce times 2 (n - 1) / n. It is what the
  slowest link carries in each direction, so it compares with the link's own rate whatever n is.

The bytes that `Collectives` counts as sent by a rank are S (n - 1) / n, or twice that for an all-reduce: the bus
bandwidth is these bytes over the seconds. For all-to-alls of unequal pieces it is that of the rank that is shown.
"""

from __future__ import annotations

from collections.abc import Mapping

# What `step_report()["communication"]` calls collectives that are not named after their kind.
_KIND = {"to_homes": "all_to_all", "from_homes": "all_to_all"}


def bus_factor(label: str, ranks: int) -> float | None:
    """Bus bandwidth over algorithm bandwidth; None for "team", which is collectives of several kinds."""
    kind = _KIND.get(label, label)
    factors = {"all_reduce": 2.0, "reduce_scatter": 1.0, "all_gather": 1.0, "all_to_all": 1.0}
    return factors[kind] * (ranks - 1) / ranks if kind in factors else None


def algorithm_rate(label: str, bus_bytes_per_second: float, ranks: int) -> float | None:
    """Algorithm bandwidth in bytes per second; None where the kinds are mixed."""
    factor = bus_factor(label, ranks)
    return bus_bytes_per_second / factor if factor else None


def overlap(times: Mapping[str, float]) -> float:
    """Share of a collective that computation covered, 0 to 1.

    Args:
        times: "hidden_seconds", and either "alone_seconds" (perf.comm: repeated with nothing else to do) or
            "exposed_seconds" (`step_report()`: of its time in flight).
    """
    whole = times.get("alone_seconds", times["hidden_seconds"] + times["exposed_seconds"])
    return min(1.0, times["hidden_seconds"] / whole) if whole else 0.0
