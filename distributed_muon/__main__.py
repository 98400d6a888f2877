"""`python -m distributed_muon plan|audit|checkpoint|deepspeed-config`: costs, who gets Muon, checkpoints, configs."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distributed_muon.layout.matrices import Whole
from distributed_muon.layout.plan import STRATEGIES
from distributed_muon.planning import simulate as simulation
from distributed_muon.planning.model_shapes import NAMED_MODELS, SUPPORTED, ParameterShape, model_shapes
from distributed_muon.planning.simulate import LAYOUTS, Job, StageReport, simulate

if TYPE_CHECKING:
    from torch import nn

_HF_CONFIG = f"a Hugging Face config.json; model_type one of {', '.join(SUPPORTED)}"


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
    check.add_argument(
        "--adjust-lr-fn",
        default="match_rms_adamw",
        metavar="NAME",
        help="scale rule shown: match_rms_adamw or original",
    )
    check.add_argument("--json", action="store_true", help="one JSON list of rows, not folded")
    check.set_defaults(run=_audit)

    convert = commands.add_parser("deepspeed-config", help="print a DeepSpeed config with our block for its optimizer")
    convert.add_argument("file", type=Path, metavar="FILE", help='JSON with an "optimizer" block: Muon, Adam or AdamW')
    convert.set_defaults(run=_convert)

    checkpoint = commands.add_parser("checkpoint", help="inspect, verify and convert checkpoints", add_help=False)
    checkpoint.add_argument("words", nargs=argparse.REMAINDER)
    checkpoint.set_defaults(run=_checkpoint)

    plan = commands.add_parser(
        "plan",
        help="plan a model at any scale, without ranks",
        epilog=simulation.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = plan.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", choices=sorted(NAMED_MODELS), metavar="NAME", help=", ".join(sorted(NAMED_MODELS)))
    source.add_argument("--hf-config", type=Path, metavar="FILE", help=_HF_CONFIG)
    plan.add_argument("--dp", type=int, required=True, metavar="N", help="data-parallel ranks")
    ranks = {
        "tp": "tensor-parallel ranks",
        "pp": "pipeline stages",
        "ep": "expert-parallel ranks, a divisor of dp x tp",
    }
    for size, meaning in ranks.items():
        plan.add_argument(f"--{size}", type=int, default=getattr(Job, size), metavar="N", help=meaning)
    cuts, homes = "how optimizer shards are cut", "where matrices are orthogonalized"
    plan.add_argument("--layout", choices=LAYOUTS, default=Job.layout, help=f"{cuts} (%(default)s)")
    plan.add_argument("--strategy", choices=STRATEGIES, default=Job.strategy, help=f"{homes} (%(default)s)")
    plan.add_argument(
        "--bucket-mb", type=float, metavar="F",
        help="MiB of fp32 gradient per bucket (40 to 64 million elements, dp / 4 million if more)",
    )  # fmt: skip
    plan.add_argument("--json", action="store_true", help="one JSON object")
    plan.set_defaults(run=_plan)
    return parser


def _checkpoint(args: argparse.Namespace) -> int:
    from distributed_muon.checkpoint.commands import main as run  # torch, which plan needs not wait for

    return run(args.words)


def _convert(args: argparse.Namespace) -> int:
    from distributed_muon.integrations.deepspeed_config import convert_config

    print(json.dumps(convert_config(json.loads(args.file.read_text(encoding="utf-8"))), indent=2))
    return 0


def _audit(args: argparse.Namespace) -> int:
    from distributed_muon.param_groups import audit, audit_row, format_audit  # torch, which plan needs not wait for

    scale = {"adjust_lr_fn": args.adjust_lr_fn}
    if args.hf_config:
        shapes = _load_shapes(args.hf_config)
        rules = {"muon": Whole()}
        rows = [audit_row(s.name, s.shape, s.algorithm, rules.get(s.algorithm), s.role, **scale) for s in shapes]
    else:
        rows = audit(_build_model(args.factory), **scale)
    if args.json:
        matrices = [[{"name": m.name, "rows": m.rows, "cols": m.cols} for m in row.matrices] for row in rows]
        found = zip(rows, matrices, strict=True)
        print(json.dumps([{**dataclasses.asdict(row), "matrices": parts} for row, parts in found]))
    else:
        print(format_audit(rows))
    return int(any(row.algorithm == "undecided" for row in rows))


def _build_model(target: str) -> nn.Module:
    """The model of "package.module:factory", on the meta device."""
    import torch

    module_name, separator, factory_name = target.partition(":")
    if not separator:
        raise ValueError(f"{target!r} is not MODULE:FACTORY, such as my_package.models:build")
    sys.path.insert(0, "")  # modules of the working directory, as with python -m
    factory = getattr(importlib.import_module(module_name), factory_name, None)
    if not callable(factory):
        raise ValueError(f"{module_name} has no callable {factory_name!r}")
    with torch.device("meta"):
        model = factory()
    if not isinstance(model, torch.nn.Module):
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
    width = max(map(len, summary))
    print("\n".join(f"{key:{width}}  {_cell(value)}" for key, value in summary.items()))
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
        **{field.name: getattr(report, field.name) for field in dataclasses.fields(report) if field.name != "domains"},
        "comm_over_adamw": report.comm_over_adamw,
    }


if __name__ == "__main__":
    sys.exit(main())
