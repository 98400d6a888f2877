"""Bytes that a call allocates beyond what is there already, at its peak."""

from __future__ import annotations

from collections.abc import Callable

import torch


def transient_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Highest sum of bytes that `call` allocated and had not yet freed, on this rank's device.

    Args:
        call: run once. device: "cuda" asks the caching allocator; "cpu" replays the profiler's memory events.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak
