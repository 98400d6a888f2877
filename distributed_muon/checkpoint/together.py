"""Work that may fail on one rank and then fails on all, with one message."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from distributed_muon.engine.collectives import Collectives

T = TypeVar("T")
# What an error means to the caller of save or load, wherever it was raised.
_KINDS = (FileNotFoundError, OSError, ValueError)


def on_all(collectives: Collectives, do: Callable[[], T], otherwise: str = "") -> T:
    """What `do` returns on this rank, once it has returned on all; collective.

    Args:
        otherwise: what its failure means; stands before the error of the first rank that failed.

    Raises:
        Exception: on every rank, where `do` raised on any: of the same class, if that is a ValueError or an OSError.
    """
    value = error = None
    try:
        value = do()
    except Exception as found:
        error = found
    everyone = collectives.gather_objects(None if error is None else (_kind(error), _words(error)))
    failed = [(rank, problem) for rank, problem in enumerate(everyone) if problem is not None]
    if failed:
        rank, (kind, words) = failed[0]
        place = f"rank {rank}: " if otherwise and collectives.size > 1 else ""
        raise kind(f"{otherwise}{place}{words}") from error
    return value


def _kind(error: Exception) -> type[Exception]:
    if type(error).__module__.startswith("distributed_muon."):
        return type(error)
    return next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
