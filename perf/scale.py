"""Predicts a training step from 8 to 16,384 ranks, and checks predicted bytes by running the real optimizer.

    python -m perf.scale [--model moonlight-16b-a3b] [--hardware h100-ib400 | --links FILE] [--json FILE]
    python -m perf.scale --check-bytes      # also one rank of up to 1,024, on torch's fake process group
    python -m perf.scale --links links.json --check comm.json    # instead, predicts the steps that perf.comm measured

`perf.prediction` says what is assumed, and `perf.check` what a check takes from measurements; every input is printed.
"Share" is what the optimizer adds to a step, hidden communication excluded, over forward-backward.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distributed_muon.layout.cost_model import NewtonSchulzCost
from distributed_muon.planning.model_shapes import NAMED_MODELS
from launch.environment import describe_machine
from perf import prediction
from perf.check import check, print_checks
from perf.cluster import MACHINES, Machine, fitted_machine
from perf.fake_world import CASES, format_outcomes, run_case
from perf.options import at_least_one, json_file, output_file, share, write_json
from perf.prediction import predict
from perf.workload import ACTIVE_EXPERTS, Setup, Training

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
HEADLINE_RANKS = (64, 256, 1024)
SETUPS = {
    "Muon, home": Setup("home"),
    "Muon, gather": Setup("gather"),
    "Muon, gather, flat buffer": Setup("gather", "flat"),
    "ZeRO-1 AdamW": Setup("adamw"),
    "FSDP2, Muon, home": Setup("home", "fsdp2"),
    "FSDP2, AdamW": Setup("adamw", "fsdp2"),
}

Change = Callable[[Training, Setup, Machine], tuple[Training, Setup, Machine]]


def _links(factor: float) -> Change:
    def change(training: Training, setup: Setup, machine: Machine) -> tuple[Training, Setup, Machine]:
        slower = replace(machine.hardware, link_bytes_per_second=machine.hardware.link_bytes_per_second * factor)
        return training, setup, replace(machine, hardware=slower)

    return change


def _matmul(factor: float) -> Change:
    def change(training: Training, setup: Setup, machine: Machine) -> tuple[Training, Setup, Machine]:
        slower = replace(machine.hardware, matmul_flops=machine.hardware.matmul_flops * factor)
        return training, setup, replace(machine, hardware=slower)

    return change


def _latency(factor: float) -> Change:
    def change(training: Training, setup: Setup, machine: Machine) -> tuple[Training, Setup, Machine]:
        slower = replace(machine.hardware, latency_seconds=machine.hardware.latency_seconds * factor)
        times = {"hop_seconds": machine.hop_seconds * factor, "message_seconds": machine.message_seconds * factor}
        return training, setup, replace(machine, hardware=slower, **times)

    return change


def _setup(**options: Any) -> Change:
    return lambda training, setup, machine: (training, replace(setup, **options), machine)


def _training(**options: Any) -> Change:
    return lambda training, setup, machine: (replace(training, **options), setup, machine)


def _chain(*changes: Change) -> Change:
    def change(training: Training, setup: Setup, machine: Machine) -> tuple[Training, Setup, Machine]:
        for one in changes:
            training, setup, machine = one(training, setup, machine)
        return training, setup, machine

    return change


CHANGES: dict[str, Change] = {
    "as predicted": _chain(),
    "ZeRO-1 AdamW instead": _setup(strategy="adamw"),
    "half the bandwidth between nodes": _links(0.5),
    "four times the latencies": _latency(4),
    "half the Newton-Schulz rate": _matmul(0.5),
    "gather instead of home": _setup(strategy="gather"),
    "standard form only": _setup(newton_schulz=NewtonSchulzCost(form="standard")),
    "10 Newton-Schulz steps": _setup(newton_schulz=NewtonSchulzCost(steps=10)),
    "fp32 wire and Newton-Schulz (TF32)": _chain(_setup(newton_schulz=NewtonSchulzCost(element_bytes=4)), _matmul(0.5)),
    "buckets of 25 MiB": _setup(bucket_mb=25.0),
    "one flat buffer (nothing to overlap)": _setup(layout="flat"),
    "no overlap of reduce-scatter and all-gather": _setup(overlap=False),
    "a quarter of the batch (a sequence a rank at least)": lambda t, s, m: (
        replace(t, global_tokens=t.global_tokens // 4),
        s,
        m,
    ),
    "forward-backward at 1.5 times the MFU": lambda t, s, m: (replace(t, mfu=t.mfu * 1.5), s, m),
    "no expert parallelism": _training(ep=1),
}


def divided(training: Training, ranks: Sequence[int]) -> tuple[list[int], list[int]]:
    """The numbers of ranks that the parallel sizes divide, and the others."""
    group = training.tp * training.pp
    fitting = [world for world in ranks if world % group == 0 and (world // training.pp) % training.ep == 0]
    return fitting, [world for world in ranks if world not in fitting]


def curves(training: Training, machine: Machine, ranks: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Predictions of every setup at every number of ranks."""
    for world in ranks:
        for name, setup in SETUPS.items():
            result = predict(replace(training, ranks=world), setup, machine)
            yield {"setup": name, "ranks": world, **result.to_json()}


def sensitivities(training: Training, machine: Machine, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """The share at some numbers of ranks after each single change for the worse (or the better)."""
    changes = {name: change for name, change in CHANGES.items() if training.ep > 1 or name != "no expert parallelism"}
    shares: dict[str, dict[int, float]] = {name: {} for name in changes}
    for world in ranks:  # outermost: most changes leave the plan alone, and the last plans are kept
        for name, change in changes.items():
            shares[name][world] = predict(*change(replace(training, ranks=world), Setup(), machine)).share
    return [{"change": name, "share": share} for name, share in shares.items()]


def assumptions(training: Training, machine: Machine) -> dict[str, Any]:
    """Every input of the prediction, for people."""
    hardware_entries = {f"hardware.{key}": value for key, value in asdict(machine.hardware).items()}
    apart = ("hardware", "links", "newton_schulz")
    machine_entries = {key: value for key, value in asdict(machine).items() if key not in apart}
    inputs = {key: value for key, value in asdict(training).items() if key != "ranks"}
    return {
        **inputs,
        "flops_per_token": training.flops_per_token(),
        **hardware_entries,
        **machine_entries,
        "wire": "fp32 reduce-scatter, bf16 all-gather, bf16 all-to-all",
        "bucket": "40 to 64 million elements, a quarter of a million per data-parallel rank if more",
    }


def print_inputs(inputs: Mapping[str, Any]) -> None:
    """Every input, what is assumed, and the head of the curves."""
    print("inputs:")
    for key, value in inputs.items():
        print(f"  {key:34s} {value:,.6g}" if isinstance(value, float) else f"  {key:34s} {value}")
    print("\nassumed (perf/prediction.py):" + (prediction.__doc__ or "").split("What is assumed:")[1].rstrip())
    print(f"\n{'ranks':>6s} {'setup':26s} {'fwd-bwd':>9s} {'optimizer':>10s} {'share':>7s} {'comm alone':>11s} "
          f"{'sent':>9s} {'memory':>9s} {'NS work':>8s}   exposed ms by part", flush=True)  # fmt: skip


def print_curve(row: Mapping[str, Any]) -> None:
    """One prediction; at once, for the largest take a while."""
    parts = ", ".join(f"{part} {seconds * 1e3:.2f}" for part, seconds in row["exposed_seconds"].items())
    print(f"{row['ranks']:6d} {row['setup']:26s} {row['forward_backward_seconds']:7.2f} s "
          f"{row['optimizer_seconds'] * 1e3:7.1f} ms {row['share_of_forward_backward']:7.2%} "
          f"{sum(row['communication_seconds'].values()) * 1e3:8.1f} ms {row['sent_bytes'] / 1e9:6.2f} GB "
          f"{sum(row['memory_bytes'].values()) / 1e9:6.2f} GB {row['ns_max_over_ideal'] or 0:7.2f}x   "
          f"{parts}", flush=True)  # fmt: skip


def predict_all(training: Training, machine: Machine, ranks: Sequence[int]) -> dict[str, Any]:
    """Everything about one model on one machine, printed as it is found.

    Raises:
        ValueError: the parallel sizes divide none of `ranks`, or not the model.
    """
    fitting, others = divided(training, ranks)
    sizes = f"tp {training.tp} x pp {training.pp} with ep {training.ep}"
    if not fitting:
        raise ValueError(f"{sizes} divides none of --ranks {', '.join(map(str, ranks))}")
    inputs = assumptions(training, machine)
    print_inputs(inputs)
    rows = []
    for row in curves(training, machine, fitting):
        print_curve(row)
        rows.append(row)
    if others:
        print(f"left out, for {sizes} does not divide them: {', '.join(map(str, others))}")
    few = [world for world in HEADLINE_RANKS if world in fitting] or fitting[:3]
    print(f"\nwhat would make it worse: share of forward-backward, Muon home, at {', '.join(map(str, few))} ranks",
          flush=True)  # fmt: skip
    changed = sensitivities(training, machine, few)
    for row in changed:
        print(f"  {row['change']:50s} " + " ".join(f"{share:8.2%}" for share in row["share"].values()))
    return {"assumptions": inputs, "curves": rows, "sensitivities": changed}


def check_files(fitted: dict[str, Any] | None, paths: Sequence[Path], output: Path | None) -> None:
    """Predict what each result of perf.comm in `paths` measured; print, and write to `output`.

    Raises:
        ValueError: a file that cannot be checked, by name.
    """
    if fitted is None:
        raise ValueError("--check predicts from the rates of --links FILE: measure them with perf.links on these ranks")
    checks = []
    for path in paths:
        try:
            measured = json.loads(path.read_text())
            checks.append({"settings": measured["settings"], "rows": check(fitted, measured)})
        except OSError as error:
            raise ValueError(f"--check {path} cannot be read: {error.strerror}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"--check {path} is no result of this perf.comm ({error})") from None
        print(f"{path.name}, {measured['world']} ranks")
        print_checks(checks[-1]["rows"])
    write_json(
        output, {"machine": describe_machine(f"python -m perf.scale {' '.join(sys.argv[1:])}"), "checks": checks}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(NAMED_MODELS), default="moonlight-16b-a3b")
    machine_source = parser.add_mutually_exclusive_group()
    machine_source.add_argument("--hardware", choices=sorted(MACHINES), default="h100-ib400")
    machine_source.add_argument("--links", type=json_file, metavar="FILE", help="rates from perf.links --json")
    parser.add_argument("--tp", type=at_least_one, default=1)
    parser.add_argument("--pp", type=at_least_one, default=1)
    parser.add_argument("--ep", type=at_least_one, help="default: 8 for models with experts")
    parser.add_argument(
        "--global-tokens", type=at_least_one, default=Training.global_tokens, help="per step, over all ranks"
    )
    parser.add_argument("--sequence", type=at_least_one, default=Training.sequence)
    parser.add_argument("--mfu", type=share, default=Training.mfu, help="of forward and backward, assumed")
    parser.add_argument("--ranks", type=at_least_one, nargs="+", default=RANKS)
    parser.add_argument(
        "--check", type=Path, nargs="+", metavar="FILE", help="results of perf.comm --json on the ranks of --links"
    )
    parser.add_argument("--check-bytes", action="store_true", help="run the real optimizer on the fake process group")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    args = parser.parse_args()
    experts = args.model in ACTIVE_EXPERTS
    ep = args.ep or (8 if experts else 1)
    training = Training(args.model, 0, args.tp, args.pp, ep, args.global_tokens, args.sequence, args.mfu)
    try:
        if args.check:
            check_files(args.links, args.check, args.json)
            return
        machine = fitted_machine(args.links) if args.links else MACHINES[args.hardware]
        command = f"python -m perf.scale {' '.join(sys.argv[1:])}"
        result: dict[str, Any] = {
            "machine": describe_machine(command),
            **predict_all(training, machine, args.ranks),
        }
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if args.check_bytes:
        outcomes = [run_case(case) for case in CASES]
        print("\n" + format_outcomes(outcomes))
        result["bytes"] = [outcome.to_json() for outcome in outcomes]
    write_json(args.json, result)
    if not all(row["within_bounds"] for row in result.get("bytes", ())):
        raise SystemExit("error: traffic over ZeRO-1 AdamW's is outside its bounds in a row above")


if __name__ == "__main__":
    main()
