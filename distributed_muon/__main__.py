"""`python -m distributed_muon plan|audit|deepspeed-config`: what a job costs, who gets Muon, and a config converted."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from distributed_muon.engine.update import ADJUST_LR_FNS
from distributed_muon.layout.matrices import Whole
from distributed_muon.layout.plan import STRATEGIES
from distributed_muon.param_groups import AuditRow, audit, audit_row, format_audit, format_table
from distributed_muon.planning.model_shapes import NAMED_MODELS, SUPPORTED, ParameterShape, model_shapes
from distributed_muon.planning.simulate import LAYOUTS, Job, StageReport, simulate

_HF_CONFIG = f"a Hugging Face config.json; model_type one of {', '.join(SUPPORTED)}"
_PLAN_EPILOG = """\
assumed, as in a Megatron-style job:
  pipeline stages hold contiguous layers, as evenly as they divide; every stage is planned, and the one
    whose busiest rank does the most Newton-Schulz is reported
  tensor parallelism cuts attention and feed-forward matrices; router and latent down-projections are whole
  routed experts are not cut by tensor parallelism; with --ep or --tp above 1 they have a rank domain of
    their own, dp x tp / ep ranks, on the same ranks as the dense parameters
  Muon and AdamW parameters have buckets of their own
  adamw_bytes is what ZeRO-1 AdamW sends: fp32 reduce-scatter and bf16 all-gather, 6 bytes x (N - 1) / N
    per parameter

JSON bytes and FLOPs are per rank and step, matrices and parameters of the whole model (parameters: all that
are trained, muon_parameters of them with Muon).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (1 where the audit leaves a parameter undecided)."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"{parser.prog} {args.command}: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m distributed_muon", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    check = commands.add_parser("audit", help="print each parameter's algorithm, matrices, scale and reason")
    source = check.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "factory", nargs="?", metavar="MODULE:FACTORY", help="called on the meta device, without arguments"
    )
    source.add_argument("--hf-config", type=Path, metavar="FILE", help=_HF_CONFIG)
    check.add_argument("--adjust-lr-fn", choices=ADJUST_LR_FNS, default="match_rms_adamw", help="scale rule shown")
    check.add_argument("--json", action="store_true", help="one JSON list of rows, not folded")
    check.set_defaults(run=_audit)

    convert = commands.add_parser("deepspeed-config", help="print a DeepSpeed config with our block for its optimizer")
    convert.add_argument("file", type=Path, metavar="FILE", help='JSON with an "optimizer" block: Muon, Adam or AdamW')
    convert.set_defaults(run=_convert)

    plan = commands.add_parser(
        "plan",
        help="plan a model at any scale, without ranks",
        epilog=_PLAN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = plan.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", choices=sorted(NAMED_MODELS), metavar="NAME", help=", ".join(sorted(NAMED_MODELS)))
    source.add_argument("--hf-config", type=Path, metavar="FILE", help=_HF_CONFIG)
    plan.add_argument("--dp", type=int, required=True, metavar="N", help="data-parallel ranks")
    plan.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks")
    plan.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline stages")
    plan.add_argument("--ep", type=int, default=1, metavar="N", help="expert-parallel ranks, a divisor of dp x tp")
    plan.add_argument("--layout", choices=LAYOUTS, default="bucketed", help="how optimizer shards are cut (bucketed)")
    plan.add_argument("--strategy", choices=STRATEGIES, default="auto", help="where matrices are orthogonalized (auto)")
    plan.add_argument(
        "--bucket-mb", type=float, metavar="F",
        help="MiB of fp32 gradient per bucket (Megatron's rule: 40 million elements, dp million if more)",
    )  # fmt: skip
    plan.add_argument("--json", action="store_true", help="one JSON object")
    plan.set_defaults(run=_plan)
    return parser


def _convert(args: argparse.Namespace) -> int:
    from distributed_muon.integrations.deepspeed_config import convert_config

    print(json.dumps(convert_config(json.loads(args.file.read_text(encoding="utf-8"))), indent=2))
    return 0


def _audit(args: argparse.Namespace) -> int:
    if args.hf_config:
        rows = [_shape_row(shape, args.adjust_lr_fn) for shape in _load_shapes(args.hf_config)]
    else:
        rows = audit(_build_model(args.factory), adjust_lr_fn=args.adjust_lr_fn)
    if args.json:
        print(json.dumps([_row_json(row) for row in rows]))
    else:
        print(format_audit(rows))
    return int(any(row.algorithm == "undecided" for row in rows))


def _shape_row(shape: ParameterShape, adjust_lr_fn: str) -> AuditRow:
    rule = Whole() if shape.algorithm == "muon" else None
    return audit_row(shape.name, shape.shape, shape.algorithm, rule, shape.role, adjust_lr_fn=adjust_lr_fn)


def _row_json(row: AuditRow) -> dict:
    matrices = [{"name": matrix.name, "rows": matrix.rows, "cols": matrix.cols} for matrix in row.matrices]
    return {**dataclasses.asdict(row), "matrices": matrices}


def _build_model(target: str) -> nn.Module:
    """The model of "package.module:factory", on the meta device."""
    module_name, separator, factory_name = target.partition(":")
    if not separator:
        raise ValueError(f"{target!r} is not MODULE:FACTORY, such as my_package.models:build")
    sys.path.insert(0, "")  # modules of the working directory, as with python -m
    factory = getattr(importlib.import_module(module_name), factory_name, None)
    if not callable(factory):
        raise ValueError(f"{module_name} has no callable {factory_name!r}")
    with torch.device("meta"):
        model = factory()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{target} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _load_shapes(path: Path) -> list[ParameterShape]:
    return model_shapes(json.loads(path.read_text(encoding="utf-8")))


def _plan(args: argparse.Namespace) -> int:
    shapes = model_shapes(NAMED_MODELS[args.model]) if args.model else _load_shapes(args.hf_config)
    job = Job(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Job)})
    report = simulate(shapes, job)
    summary = _summary(args.model or str(args.hf_config), shapes, job, report)
    if args.json:
        print(json.dumps(summary))
        return 0
    for domain in report.domains:
        print(f"{domain.name} parameters of stage {report.stage}:")
        print(domain.plan.explain(), end="\n\n")
    print(format_table([(key, _cell(value)) for key, value in summary.items()]))
    return 0


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:,.4f}" if value < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _summary(model: str, shapes: Sequence[ParameterShape], job: Job, report: StageReport) -> dict:
    muon = [shape.numel for shape in shapes if shape.algorithm == "muon"]
    return {
        "model": model,
        **dataclasses.asdict(job),
        "strategy": {domain.name: domain.plan.strategy for domain in report.domains},
        "matrices": len(muon),
        "muon_parameters": sum(muon),
        "parameters": sum(shape.numel for shape in shapes if shape.algorithm != "frozen"),
        "stage": report.stage,
        "ns_flops_max": report.ns_flops_max,
        "ns_max_over_ideal": report.ns_max_over_ideal,
        "state_bytes_max": report.state_bytes_max,
        "state_bytes_ideal": report.state_bytes_ideal,
        "exchange_bytes_max": report.exchange_bytes_max,
        "adamw_bytes": report.adamw_bytes,
        "comm_over_adamw": report.comm_over_adamw,
        "plan_seconds": report.plan_seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
