"""Tests that run on every rank: all those of a file and world size share one spawn, each has its own verdict."""

from __future__ import annotations

import importlib
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta

from tests.spawn import run_ranks

# Seconds that ranks wait for each other after a test; more means that some are stuck inside it.
PATIENCE = 30
_registered: dict[tuple[str, int], list[str]] = defaultdict(list)
_verdicts: dict[tuple[str, int], dict[str, str] | str] = {}


def on_ranks(world: int, timeout: float = 120.0) -> Callable[[Callable[[int, int], None]], Callable[[], None]]:
    """Turn `test_x(rank, world)`, which asserts on every rank, into a test.

    Args:
        world: number of ranks. timeout: seconds for all tests of the file on as many ranks.
    """

    def decorate(function: Callable[[int, int], None]) -> Callable[[], None]:
        module, name = function.__module__, function.__name__
        _registered[module, world].append(name)

        def test() -> None:
            if (module, world) not in _verdicts:
                try:
                    _verdicts[module, world] = run_ranks(_run, world, module, timeout=timeout)[0]
                except AssertionError as error:  # a rank died or hung: all tests of this spawn are lost
                    _verdicts[module, world] = str(error)
            verdicts = _verdicts[module, world]
            failure = verdicts if isinstance(verdicts, str) else verdicts.get(name)
            assert not failure, failure

        test.__name__, test.__module__, test.__doc__ = name, module, function.__doc__
        test.on_ranks = function
        return test

    return decorate


def _run(rank: int, world: int, module: str) -> dict[str, str]:
    """Run every test of `module` for this world; the tracebacks of those that failed, by name, on rank 0."""
    import torch.distributed as dist

    functions = importlib.import_module(module)
    verdicts = dist.new_group(timeout=timedelta(seconds=PATIENCE))
    failures = {}
    for name in _registered[module, world]:
        failure = None
        try:
            getattr(functions, name).on_ranks(rank, world)
        except BaseException:  # pytest.raises fails with one that is no Exception
            failure = f"rank {rank} of {world}:\n{traceback.format_exc()}"
            if "Connection closed by peer" in failure:
                time.sleep(PATIENCE)  # another rank failed first, and run_ranks is about to say how
        reports = [None] * world
        try:
            dist.all_gather_object(reports, failure, group=verdicts)
        except RuntimeError:
            raise AssertionError(failure or f"{name}: another rank did not come to the end") from None
        if any(reports):
            failures[name] = next(report for report in reports if report)
    return failures
