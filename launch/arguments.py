"""Command-line flags that every trainer has, and the data and model that they describe."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from launch.data import TokenData, load_data
from launch.failure import speaks_for_node, tell_torchrun
from launch.models import (
    MODELS,
    CausalLM,
    DenseConfig,
    MoonlightConfig,
    add_size_flags,
    build_model,
    cast_parameters,
    sizes_from_flags,
)
from launch.models.huggingface import load_weights, read_config
from launch.profiling import step_range
from launch.trackers import TRACKERS, check_installed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Parser(argparse.ArgumentParser):
    """Errors are one line per node, which torchrun repeats at the end."""

    def error(self, message: str) -> NoReturn:
        tell_torchrun(f"error: {message}")
        self.exit(2, f"error: {message}\n" if speaks_for_node() else None)


def trainer_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that every trainer has: model, data, run and schedule.

    Args:
        description: the trainer's docstring, of which the first line is shown.
    """
    parser = Parser(description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_model_flags(parser)
    add_data_flags(parser)
    add_run_flags(parser)
    add_schedule_flags(parser)
    add_profile_flags(parser)
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What `make_model` reads."""
    parser.add_argument("--model", choices=MODELS, default="moonlight", help="architecture")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of parameters; masters are fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    parser.add_argument(
        "--init-from",
        type=Path,
        metavar="FOLDER",
        help="a Hugging Face checkpoint (Llama, DeepSeek-V3) to start from; it decides --model and the sizes",
    )
    add_size_flags(parser)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """What `make_data` reads."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="text, .jsonl or token files, or directories; empty: the Python standard library's source",
    )
    data.add_argument("--tokenizer", metavar="FILE", help="a Hugging Face tokenizer.json; without it, bytes")
    data.add_argument("--bin-dtype", choices=("uint16", "uint32"), default="uint16", help="tokens of .bin files")
    data.add_argument("--vocab-size", type=int, help="of token files; without it, all of them are scanned")
    data.add_argument("--sequence-length", type=int, default=256, help="tokens per sample")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Length of the run, its directory, and how often it does what."""
    run = parser.add_argument_group("run")
    run.add_argument("--run-dir", type=Path, help="metrics, plot and checkpoints; without it, below runs/")
    run.add_argument(
        "--resume",
        nargs="?",
        const="always",
        choices=("always", "auto"),
        help="continue from the newest checkpoint in --run-dir; auto: start anew where there is none",
    )
    run.add_argument("--steps", type=int, default=240, help="optimizer steps")
    run.add_argument("--batch-size", type=int, default=16, help="samples per rank and microbatch")
    run.add_argument("--accumulation", type=int, default=1, help="microbatches per step")
    run.add_argument("--seed", type=int, default=0, help="of the weights and the order of samples")
    run.add_argument("--checkpoint-interval", type=int, default=80, help="steps between checkpoints")
    run.add_argument("--keep-checkpoints", type=int, default=2, help="newest checkpoints to keep")
    run.add_argument(
        "--background-saves",
        action="store_true",
        help="go on training while a checkpoint is written (plain, FSDP2); takes host memory for a copy of the state",
    )
    run.add_argument(
        "--save-hf", type=Path, metavar="FOLDER", help="where to write the trained model as a Hugging Face checkpoint"
    )
    run.add_argument(
        "--exit-after", type=float, metavar="MINUTES", help="stop with a checkpoint, for a job that is to be continued"
    )
    run.add_argument(
        "--stop-file", type=Path, metavar="FILE", help="written when the run stops before its last step, for schedulers"
    )
    run.add_argument(
        "--stop-code",
        type=int,
        default=0,
        metavar="CODE",
        help="exit code of a run that stops before its last step; not 0: torchrun starts the ranks that are left again",
    )
    run.add_argument(
        "--timeout",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="end the job where a step, validation or save takes longer, and name the rank it waits for; 0: never",
    )
    run.add_argument(
        "--nonfinite",
        choices=("raise", "skip"),
        default="raise",
        help="what an inf or nan in a gradient does: end the job, or let the step be skipped and counted",
    )
    run.add_argument("--validation-interval", type=int, default=40, help="steps between validations")
    run.add_argument("--validation-samples", type=int, default=128, help="held-out samples per validation")
    run.add_argument("--log-interval", type=int, default=10, help="steps between lines without a terminal")
    run.add_argument(
        "--log-to",
        nargs="*",
        choices=TRACKERS,
        default=["tensorboard"],
        help="where metrics go beside metrics.jsonl; no name: nowhere. WANDB_PROJECT and MLFLOW_TRACKING_URI say where",
    )


def add_profile_flags(parser: argparse.ArgumentParser) -> None:
    """What `launch.profiling` and MFU need."""
    profile = parser.add_argument_group("profile")
    profile.add_argument(
        "--profile-steps", type=step_range, metavar="FIRST:LAST", help="trace these steps into RUN_DIR/profile"
    )
    profile.add_argument("--profile-ranks", type=int, nargs="+", default=[0], metavar="RANK", help="that are traced")
    profile.add_argument(
        "--peak-tflops", type=float, help="of one device, for MFU; without it, by the GPU's name where it is known"
    )


def add_schedule_flags(parser: argparse.ArgumentParser) -> None:
    """Learning rate over the run, and what else AdamW and Muon share."""
    schedule = parser.add_argument_group("schedule")
    schedule.add_argument("--lr", type=float, default=4e-3, help="peak learning rate of all parameters")
    schedule.add_argument("--warmup", type=int, default=20, help="steps of linear warmup")
    schedule.add_argument("--final-lr", type=float, default=0.1, help="end of the cosine, relative to --lr")
    schedule.add_argument("--weight-decay", type=float, default=0.1, help="decoupled")
    schedule.add_argument("--clip", type=float, default=1.0, help="limit on the global gradient norm")
    # DeepSeek-V3's 1e-3 balances over thousands of steps; the default run has a few hundred.
    schedule.add_argument("--expert-bias-rate", type=float, default=1e-2, help="step of the router biases")


def add_muon_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What `muon_options` reads; returns the group, for more of them."""
    muon = parser.add_argument_group("muon")
    muon.add_argument("--momentum", type=float, default=0.95)
    muon.add_argument("--ns-steps", type=int, default=5, help="Newton-Schulz steps")
    muon.add_argument("--ns-coefficients", default="quintic", help="coefficient table")
    muon.add_argument("--ns-form", choices=("auto", "standard", "gram"), default="auto")
    muon.add_argument("--ns-table", metavar="FILE", help="kernels of this device, by perf.newton_schulz --tune")
    muon.add_argument("--ns-dtype", choices=DTYPES, default="bf16", help="of Newton-Schulz and what travels for it")
    return muon


def muon_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of Muon optimizers."""
    names = ("momentum", "ns_steps", "ns_coefficients", "ns_form", "ns_table", "strategy")
    return {**{name: getattr(args, name) for name in names}, "ns_dtype": DTYPES[args.ns_dtype]}


def parse(parser: argparse.ArgumentParser, words: list[str] | None = None) -> argparse.Namespace:
    """Parse --config FILE, then --set, then the other flags, later ones winning; refuse counts that no run can have.

    Args:
        parser: gets the flags --config and --set here. words: the command line; sys.argv's if None.
    """
    shared = parser.add_argument_group("config", "one YAML file serves every trainer")
    shared.add_argument("--config", type=Path, metavar="FILE", help="YAML with flags by name")
    shared.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of --config")
    words = sys.argv[1:] if words is None else list(words)
    early = parser.parse_known_args(words)[0]
    try:
        settings = {} if early.config is None else yaml.safe_load(early.config.read_text(encoding="utf-8")) or {}
        for item in early.set:
            key, equals, value = item.partition("=")
            if not equals:
                raise ValueError(f"--set {item}: write KEY=VALUE")
            settings[key] = yaml.safe_load(value)
        words = [*_flags(parser, settings), *words]
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        parser.error(f"--config {early.config}: {error}")
    args = parser.parse_args(words)
    counts = ("steps", "batch_size", "accumulation", "sequence_length", "validation_samples")
    for name in (*counts, "checkpoint_interval", "keep_checkpoints", "validation_interval", "log_interval"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.init_from is not None:
        given = sizes_from_flags(args)
        if given:
            parser.error(f"--{next(iter(given)).replace('_', '-')} with --init-from: the checkpoint decides the sizes")
        try:
            args.model, sizes = read_config(args.init_from)
        except ValueError as error:
            parser.error(f"--init-from: {error}")
        vars(args).update({name: size for name, size in sizes.items() if name != "vocab_size"})
    check_installed(args.log_to)
    return args


def _flags(parser: argparse.ArgumentParser, settings: Mapping[str, Any]) -> Iterator[str]:
    """A mapping of flag names to values as command-line words."""
    known = {name for action in parser._actions for name in action.option_strings}
    for key, value in settings.items():
        flag, negative = (f"--{prefix}{key.replace('_', '-')}" for prefix in ("", "no-"))
        if flag not in known:
            raise ValueError(f"{key!r} is no flag of this trainer: see --help")
        if value is None or (value is False and negative not in known):
            continue
        yield negative if value is False else flag
        if not isinstance(value, bool):
            yield from map(str, value) if isinstance(value, list) else (str(value),)


def make_data(args: argparse.Namespace) -> TokenData:
    """The data that the command line asks for."""
    return load_data(
        args.data,
        args.sequence_length,
        seed=args.seed,
        tokenizer=args.tokenizer,
        bin_dtype=args.bin_dtype,
        vocab_size=args.vocab_size,
    )


def make_model(args: argparse.Namespace, vocab_size: int, device: torch.device) -> CausalLM:
    """The model that the command line asks for; the same weights on every rank.

    Args:
        args: with the flags of `add_model_flags`. vocab_size: of the data. device: of the model.

    Raises:
        ValueError: a size that cannot be right, or a checkpoint that does not fit the data or is damaged.
    """
    sizes = _sizes(args, vocab_size)
    if args.init_from is not None:
        sizes |= read_config(args.init_from, data_vocab_size=vocab_size)[1]
    torch.manual_seed(args.seed)
    model = build_model(args.model, **sizes)
    cast_parameters(model, DTYPES[args.dtype])
    if args.init_from is not None:
        skipped = load_weights(model, args.init_from)
        if skipped and os.environ.get("RANK", "0") == "0":
            print(f"note: {skipped} tensors of multi-token prediction in {args.init_from} are not trained")
    return model.to(device)


def model_config(args: argparse.Namespace, vocab_size: int) -> DenseConfig | MoonlightConfig:
    """The sizes of the model that the command line asks for.

    Args:
        vocab_size: of the data.
    """
    return MODELS[args.model][0](**_sizes(args, vocab_size))


def _sizes(args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    return {"max_position_embeddings": args.sequence_length, "vocab_size": vocab_size, **sizes_from_flags(args)}
