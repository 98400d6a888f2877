"""What a step did: counted, timed and measured, added up over the domains of an adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from distributed_muon.engine.step import ShardedStep


def local_report(engines: Sequence[ShardedStep], **facts: Any) -> dict[str, Any]:
    """What the last step, up to its `close()`, did on this rank; no collective.

    Returns:
        `facts`; "ns_calls" (matrices this rank orthogonalized); "bytes" (sent by this rank, by collective);
        "seconds" (by phase); "communication": per collective its "calls", "bytes", "exposed_seconds" that the step
        waited for it, and "hidden_seconds" that it was under way beside other work. Nothing before the first step.
    """
    engines = [engine for engine in engines if engine.times is not None]
    if not engines:
        return {}
    sent, seconds = Counter(), Counter()
    communication: dict[str, Counter[str]] = {}
    for engine in engines:
        sent.update(engine.counted["bytes"])
        seconds.update(engine.times.seconds())
        for label, counts in engine.times.communication().items():
            communication.setdefault(label, Counter()).update(counts)
    return {
        **facts,
        "ns_calls": sum(engine.counted["ns_calls"] for engine in engines),
        "bytes": dict(sent),
        "seconds": dict(seconds),
        "communication": {label: dict(counts) for label, counts in communication.items()},
    }


def step_report(engines: Sequence[ShardedStep], **facts: Any) -> dict[str, Any]:
    """`local_report` and, per matrix name, what is tracked; collective over every engine's domain.

    Returns:
        Beside `local_report`: "update_rms" (of the update at lr 1) and what else `Measures.choose` asked for.
    """
    report = local_report(engines, **facts)
    for engine in engines:
        for quantity, values in engine.measured().items():
            report.setdefault(quantity, {}).update(values)
    return report
