"""The numbers of every result as flat rows: what a CSV file holds, and what is compared between two runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from perf.bandwidth import algorithm_rate, overlap
from perf.report.newton_schulz import shape_name
from perf.sample_studies import read_results


class Measurement(NamedTuple):
    """One number.

    Args:
        row: of the tool's table, such as an optimizer or a collective. quantity: what was measured.
        unit: "s", "B", "B/s", or "" for counts, shares and ratios. value: in that unit.
    """

    row: str
    quantity: str
    unit: str
    value: float


Rows = Iterator[Measurement]
WARM_UP = 0.1  # of a training run's steps, left out of medians


def unit_of(quantity: str) -> str:
    """From the name, as this project writes names."""
    last = quantity.rsplit("/", 1)[-1]
    if last.endswith("bytes_per_second"):
        return "B/s"
    if last.endswith("per_second"):
        return "1/s"
    return "s" if last.endswith("seconds") else "B" if last.endswith("bytes") else ""


def measurements(kind: str, result: Any) -> list[Measurement]:
    """All numbers of a result of `perf.KIND`."""
    return list(_OF[kind](result))


def _picked(row: str, values: Mapping[str, Any], *keys: str) -> Rows:
    for key in keys:
        if values.get(key) is not None:
            yield Measurement(row, key, unit_of(key), values[key])


def _step(result: Mapping[str, Any]) -> Rows:
    for row in result["rows"]:
        yield from _picked(row["name"], row, "seconds", "state_bytes", "sent_bytes", "transient_bytes", "ns_calls")
    ours = result["rows"][0]
    for phase, seconds in ours["phases"].items():
        yield Measurement(ours["name"], f"{phase}/seconds", "s", seconds)
    for label, times in ours.get("communication", {}).items():
        yield from _collective(f"{ours['name']}, {label}", times)


def _collective(row: str, times: Mapping[str, Any]) -> Rows:
    yield from _picked(row, times, "calls", "bytes", "alone_seconds", "exposed_seconds", "hidden_seconds")
    yield Measurement(row, "overlap", "", overlap(times))


def _comm(result: Mapping[str, Any]) -> Rows:
    for name, contender in result["contenders"].items():
        yield from _picked(name, contender, "step_seconds", "traffic_over_adamw")
        for label, times in contender["collectives"].items():
            row, bus = f"{name}, {label}", times["bus_bytes_per_second"]
            yield from _picked(row, times, "bytes_measured")
            yield from _collective(row, times)
            yield Measurement(row, "bus_bytes_per_second", "B/s", bus)
            whole = algorithm_rate(label, bus, result["world"])
            yield from _picked(row, {"algorithm_bytes_per_second": whole}, "algorithm_bytes_per_second")


def _links(result: Mapping[str, Any]) -> Rows:
    yield from _picked("one rank", result, "matmul_flops", "memory_bytes_per_second")
    for kind, link in result["links"].items():
        bus = {**link, "bus_bytes_per_second": link["bytes_per_second"]}
        yield from _picked(kind, bus, "alpha_seconds", "bus_bytes_per_second", "delay")


def _benchmark(result: Mapping[str, Any]) -> Rows:
    yield from _links(result["links"])
    yield from _step(result["step"])
    for run in result["comm"]:
        for found in _comm(run):
            yield found._replace(row=f"{run['settings']['bucket_mb']:g} MiB, {found.row}")
    for run in result["checks"]:
        for row in run["rows"]:
            name = f"{run['settings']['bucket_mb']:g} MiB, {row['name']}"
            yield from _picked(name, row, "predicted_seconds", "measured_seconds", "ratio", "off")
    for row in result["megatron"]:
        name = f"Megatron TP {row['tp']} x PP {row['pp']}, {row['strategy']}"
        yield from _picked(name, row, "seconds", "optimizer_seconds", "tokens_per_second")


def _scale(result: Mapping[str, Any]) -> Rows:
    for row in result["curves"]:
        values = {**row, "memory_bytes": sum(row["memory_bytes"].values())}
        yield from _picked(f"{row['setup']}, {row['ranks']} ranks", values, "forward_backward_seconds",
                           "optimizer_seconds", "share_of_forward_backward", "memory_bytes")  # fmt: skip
    for row in result.get("bytes", ()):
        case = row["case"]
        name = f"{case['model']}, {case['ranks']} ranks, {case['strategy']}, {case['layout']}"
        yield from _picked(name, row, "over_adamw", "over_adamw_full_size", "ns_max_over_ideal")


def _timeline(result: Mapping[str, Any]) -> Rows:
    for row in result["rows"]:
        name = f"{row['setup']}, {row['ranks']} ranks"
        yield from _picked(name, row, "forward_backward_seconds", "added_seconds", "share")
        yield from _picked(name, row["counts"], "launches", "allocations", "waits")
        for label, times in row["communication"].items():
            yield from _collective(f"{name}, {label}", times)


def _newton_schulz(result: Mapping[str, Any]) -> Rows:
    for row in result["rows"]:
        for form, seconds in row["seconds"].items():
            yield Measurement(f"{shape_name(row)}, {form}", "seconds", "s", seconds)
        yield Measurement(shape_name(row), "speedup over torch", "", row["speedup"]["auto"])


def _overhead(result: Mapping[str, Any]) -> Rows:
    for name, rows in result["rows"].items():
        for part, seconds in rows["here"]["seconds"].items():
            yield Measurement(name, f"{part}/seconds", "s", seconds)
        yield from _picked(name, rows["here"], "calls_per_matrix", "c_calls_per_matrix")


def _deepspeed(result: Mapping[str, Any]) -> Rows:
    for peer, (ours, other) in result["pairs"].items():
        yield from _picked(f"ours, beside {peer}", ours, "seconds", "state_bytes")
        yield from _picked(peer, other, "seconds", "state_bytes")


def _fsdp2(result: Mapping[str, Any]) -> Rows:
    for row in result["rows"]:
        yield from _picked(
            row["name"], row, "seconds", "cpu_seconds", "sent_bytes", "state_bytes", "transient_bytes", "collectives"
        )
    for name, counts in result["traffic"].items():
        yield Measurement(f"traffic, {name}", "fsdp2/bytes", "B", counts["fsdp2"])
        yield Measurement(f"traffic, {name}", "exchange/bytes", "B", counts["exchange"])


def _megatron(result: Any) -> Rows:
    for one in result if isinstance(result, list) else [result]:
        for name, row in one["contenders"].items():
            most = {**row, "state_bytes": max(row["state_bytes"]), "sent_bytes": max(row["sent_bytes"])}
            yield from _picked(name, most, "seconds", "state_bytes", "sent_bytes")


def _samples(result: Mapping[str, Any]) -> Rows:
    for run, found in read_results(result).items():
        yield Measurement(run.name, "loss", "", found["curve"][-1][1])


def _run(result: Mapping[str, Any]) -> Rows:
    steps = [line for line in result["metrics"] if "loss" in line]
    for name in dict.fromkeys(key for line in steps for key in numbers(line) if key not in ("step", "loss")):
        values = [found[name] for line in steps[int(WARM_UP * len(steps)) :] if name in (found := numbers(line))]
        if values:
            yield Measurement("median of a step", name, unit_of(name), statistics.median(values))
    for name, lines in (("loss", steps), ("val_loss", [line for line in result["metrics"] if "val_loss" in line])):
        if lines:
            yield Measurement("at the end", name, "", lines[-1][name])
    yield Measurement("at the end", "steps", "", max((line["step"] for line in result["metrics"]), default=0))


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line of metrics, those of mappings inside as "outer/inner"."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[prefix + key] = value
    return found


_OF: dict[str, Callable[[Any], Rows]] = {
    "step": _step,
    "overhead": _overhead,
    "newton_schulz": _newton_schulz,
    "sample_efficiency": _samples,
    "comm": _comm,
    "benchmark": _benchmark,
    "two_hosts": _benchmark,
    "scale": _scale,
    "timeline": _timeline,
    "fsdp2_step": _fsdp2,
    "deepspeed_step": _deepspeed,
    "megatron_step": _megatron,
    "links": _links,
    "run": _run,
}
COLUMNS = ("file", "tool", "row", "quantity", "unit", "value")


def csv_rows(results: Mapping[str, Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """Rows under COLUMNS. Args: results: by kind, with `path` and `content`."""
    for kind, some in results.items():
        for result in some:
            for found in measurements(kind, result.content):
                yield (result.path.name, kind, *found)
