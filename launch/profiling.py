"""torch.profiler over chosen steps and ranks: one Chrome trace for all of them, and memory snapshots."""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.world import World

_PROCESSES = 1 << 20  # more than a kernel numbers: rank r's process p becomes r * _PROCESSES + p
_MEMORY_EVENTS = 200_000


def step_range(text: str) -> tuple[int, int]:
    """The value of --profile-steps, "A:B": the first and the last step, counted from 1."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r}: write FIRST:LAST, steps counted from 1")
    return int(first), int(last)


class Profiler:
    """Profiles some steps of a run; nothing where none are chosen. All ranks must have one.

    Args:
        world: all ranks. hosts: of each.
        steps: first and last step to profile, or None. ranks: that are profiled.
        folder: gets trace.json.gz, written by rank 0, and memory-rank-R.pickle of CUDA devices.

    Raises:
        ValueError: a rank that does not exist.
    """

    def __init__(
        self, world: World, hosts: Sequence[str], steps: tuple[int, int] | None, ranks: Sequence[int], folder: Path
    ) -> None:
        if wrong := [rank for rank in ranks if not 0 <= rank < world.size]:
            raise ValueError(f"--profile-ranks {wrong[0]}: this job has ranks 0 to {world.size - 1}")
        self._world, self._hosts, self._steps, self._ranks, self._folder = world, hosts, steps, ranks, folder
        self._profile: torch.profiler.profile | None = None
        self._clock = 0

    @contextmanager
    def step(self, number: int) -> Iterator[Path | None]:
        """Around step `number`; collective where profiling begins or ends.

        Yields:
            Where the trace will be, if this is the last profiled step; else None.
        """
        first, last = self._steps or (0, 0)
        if number == first:
            self._start()
        inside = self._profile is not None and first <= number <= last
        if inside:
            with torch.profiler.record_function(f"step {number}"):
                yield self._target if number == last else None
        else:
            yield self._target if number == last else None
        if number == last:
            self._stop()

    @property
    def _target(self) -> Path:
        return self._folder / "trace.json.gz"

    def _start(self) -> None:
        cuda = self._world.device.type == "cuda"
        if self._world.rank in self._ranks:
            activities = [torch.profiler.ProfilerActivity.CPU] + cuda * [torch.profiler.ProfilerActivity.CUDA]
            self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
            if cuda:
                torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
            self._profile.start()
        # All ranks leave a barrier at the same moment: what their clocks differ by then is taken out of the trace.
        self._world.barrier()
        self._clock = time.time_ns()

    def _stop(self) -> None:
        own = None
        if self._profile is not None:
            self._world.synchronize()
            self._profile.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._world.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-rank-{self._world.rank}.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "trace.json")
                self._profile.export_chrome_trace(str(file))
                own = gzip.compress(file.read_bytes(), 1)
            self._profile = None
        gathered: list[Any] = [None] * self._world.size
        if self._world.size > 1:
            dist.gather_object((self._clock, own), gathered if self._world.main else None)
        else:
            gathered = [(self._clock, own)]
        if self._world.main:
            traces = {
                rank: (clock - gathered[0][0], json.loads(gzip.decompress(packed)))
                for rank, (clock, packed) in enumerate(gathered)
                if packed is not None
            }
            self._folder.mkdir(parents=True, exist_ok=True)
            with gzip.open(self._target, "wt", encoding="utf-8", compresslevel=5) as file:
                json.dump(merge_traces(traces, self._hosts), file)


def merge_traces(traces: Mapping[int, tuple[int, Mapping[str, Any]]], hosts: Sequence[str]) -> dict[str, Any]:
    """One Chrome trace of several ranks' on the clock of rank 0.

    Args:
        traces: per rank, nanoseconds by which its clock is ahead, and what torch.profiler exported.
        hosts: of every rank.
    """
    begin = min((trace.get("baseTimeNanoseconds", 0) for _, trace in traces.values()), default=0)
    events: list[dict[str, Any]] = []
    for rank, (ahead, trace) in sorted(traces.items()):
        shift = (trace.get("baseTimeNanoseconds", 0) - begin - ahead) / 1e3  # microseconds
        events += (_event_of_rank(event, rank, shift, hosts[rank]) for event in trace["traceEvents"])
    some = next(iter(traces.values()))[1] if traces else {}
    kept = {key: some[key] for key in ("schemaVersion", "displayTimeUnit") if key in some}
    return {**kept, "baseTimeNanoseconds": begin, "traceEvents": events}


def _event_of_rank(event: Mapping[str, Any], rank: int, shift: float, host: str) -> dict[str, Any]:
    out = dict(event)
    pid = out.get("pid", 0)
    out["pid"] = rank * _PROCESSES + pid if isinstance(pid, int) else f"rank {rank} {pid}"
    if "id" in out:  # of an arrow between two events
        out["id"] = f"{rank}.{out['id']}"
    if out.get("ph") == "M":
        arguments = dict(out.get("args", {}))
        if out["name"] == "process_name":
            arguments["name"] = f"rank {rank} on {host}: {arguments['name']}"
        elif out["name"] == "process_labels":
            arguments["labels"] = f"rank {rank} {arguments['labels']}"
        elif out["name"] == "process_sort_index":
            arguments["sort_index"] = rank * _PROCESSES + int(arguments["sort_index"]) % _PROCESSES
        out["args"] = arguments
    elif "ts" in out:
        out["ts"] = out["ts"] + shift
    return out
