"""`python -m distributed_muon checkpoint inspect|verify|convert`: what the command line does with checkpoints."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from distributed_muon.checkpoint.index import DamagedCheckpoint, Index
from distributed_muon.checkpoint.loading import verify_files


def main(words: Sequence[str]) -> int:
    """Run the words after "checkpoint"; returns the exit status."""
    args = _parser().parse_args(words)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m distributed_muon checkpoint", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    inspect = actions.add_parser("inspect", help="print what a checkpoint holds")
    inspect.add_argument("--parameters", action="store_true", help="one line for each parameter")
    inspect.set_defaults(run=_inspect)
    verify = actions.add_parser("verify", help="read every byte of checkpoints; status 1 where one is damaged")
    verify.set_defaults(run=_verify)
    convert = actions.add_parser(
        "convert", help="write a checkpoint of this package from another optimizer's torch.save file"
    )
    for action in (inspect, verify):
        action.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="that checkpoint.save wrote")
    convert.add_argument("source", type=Path, metavar="FILE", help="a torch.save file")
    convert.add_argument("target", type=Path, metavar="FOLDER", help="to be written")
    convert.add_argument(
        "--from", dest="kind", choices=("torch-muon", "keller"), required=True,
        help="torch.optim.Muon's state dicts (momentum is an average), or Keller Jordan's Muon's (momentum is a sum)",
    )  # fmt: skip
    convert.add_argument(
        "--trust", action="store_true", help="unpickle FILE, which runs whatever code it holds: only files of your own"
    )
    convert.set_defaults(run=_convert)
    return parser


def _inspect(args: argparse.Namespace) -> int:
    for folder in args.folders:
        index = Index.read(folder)
        numel = Counter()
        for about in index.parameters.values():
            numel[about["algorithm"]] += torch.Size(about["shape"]).numel()
        size = sum(entry["bytes"] for entry in index.files.values())
        print(f"{folder}: saved by {index.ranks} ranks of {index.framework} after {index.steps} steps, {size:,} bytes")
        print(f"  versions  {', '.join(f'{name} {version}' for name, version in index.versions.items())}")
        for algorithm, count in sorted(numel.items()):
            print(f"  {algorithm:8}  {count:,} elements")
        for number, group in enumerate(index.groups):
            print(f"  group {number}   {', '.join(f'{key}={value}' for key, value in group.items())}")
        print(f"  model     {len(index.model)} other tensors")
        print(f"  extra     {', '.join(index.extra) or 'nothing'}")
        for name, about in index.parameters.items() if args.parameters else ():
            states = ", ".join([*about["states"], *([f"step {about['step']}"] if "step" in about else [])])
            print(f"  {name}  {tuple(about['shape'])}  {about['dtype']}  group {about['group']}  {states}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    damaged = 0
    for folder in args.folders:
        try:
            index = Index.read(folder)
            verify_files(folder, index, index.files)
            print(f"{folder}: whole, {len(index.files)} files")
        except DamagedCheckpoint as error:
            damaged = 1
            print(error)
    return damaged


def _convert(args: argparse.Namespace) -> int:
    from distributed_muon.checkpoint.convert import convert

    if args.target.exists():
        raise ValueError(f"{args.target} exists already: name another folder")
    print(convert(args.source, args.target, args.kind, args.trust))
    return 0
