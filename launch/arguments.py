"""Command-line flags that every trainer has, and the data and model that they describe."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from launch.data import TokenData, load_data
from launch.models import MODELS, CausalLM, add_size_flags, build_model, cast_parameters, sizes_from_flags

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What `make_model` reads."""
    parser.add_argument("--model", choices=MODELS, default="moonlight", help="architecture")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of parameters; masters are fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
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
    run.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --run-dir")
    run.add_argument("--steps", type=int, default=240, help="optimizer steps")
    run.add_argument("--batch-size", type=int, default=16, help="samples per rank and microbatch")
    run.add_argument("--accumulation", type=int, default=1, help="microbatches per step")
    run.add_argument("--seed", type=int, default=0, help="of the weights and the order of samples")
    run.add_argument("--checkpoint-interval", type=int, default=80, help="steps between checkpoints")
    run.add_argument("--keep-checkpoints", type=int, default=2, help="newest checkpoints to keep")
    run.add_argument("--validation-interval", type=int, default=40, help="steps between validations")
    run.add_argument("--validation-samples", type=int, default=128, help="held-out samples per validation")
    run.add_argument("--log-interval", type=int, default=10, help="steps between lines without a terminal")


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


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse, and refuse counts that no run can have."""
    args = parser.parse_args(arguments)
    counts = ("steps", "batch_size", "accumulation", "sequence_length", "validation_samples")
    for name in (*counts, "checkpoint_interval", "keep_checkpoints", "validation_interval", "log_interval"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    return args


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
    """The model that the command line asks for; the same weights on every rank."""
    sizes = {"max_position_embeddings": args.sequence_length, **sizes_from_flags(args)}
    torch.manual_seed(args.seed)
    model = build_model(args.model, vocab_size=vocab_size, **sizes)
    cast_parameters(model, DTYPES[args.dtype])
    return model.to(device)
