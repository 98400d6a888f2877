"""Does Muon need fewer steps than AdamW, at AdamW's own learning rate? The report's claims at toy size.

    python -m perf.sample_efficiency [--steps 300] [--seeds 0 1] [--workers 2] [--json FILE] [--plot FILE]

For dense and mixture-of-experts models at three sizes: AdamW at several learning rates, then Muon at the best of
these (arXiv 2502.16982, section 2.2: no new tuning), once for as many steps and once for 0.65 of them, each with a
cosine schedule of its own length. Printed per model, means over seeds: the step of the long run at which Muon
passes AdamW's final validation loss, the short run's final loss beside it, and singular-value entropy of the
weights by group (figure 4); weight RMS with and without decay (figure 2), and update RMS by shape under both scale
rules (table 1).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distributed_muon import DistributedMuon, muon_param_groups
from launch.data import load_data
from launch.models import build_model, cast_parameters, update_expert_bias
from launch.schedule import cosine_schedule
from launch.validation import validation_loss
from launch.world import World
from perf.machine import describe_machine

SIZES = {
    "small": {"hidden_size": 64, "num_hidden_layers": 2},
    "medium": {"hidden_size": 96, "num_hidden_layers": 3},
    "large": {"hidden_size": 128, "num_hidden_layers": 4},
}
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SHORT = 0.65  # of the steps
BATCH, SEQUENCE, VALIDATE_EVERY, VALIDATION_SAMPLES = 16, 128, 10, 64


def sizes(kind: str, size: str) -> dict[str, int]:
    """The model's config: feed-forward 3 x hidden in all, experts half a hidden wide."""
    hidden = SIZES[size]["hidden_size"]
    common = {**SIZES[size], "num_attention_heads": 4, "max_position_embeddings": SEQUENCE}
    if kind == "dense":
        return {**common, "intermediate_size": 3 * hidden, "num_key_value_heads": 2, "head_dim": hidden // 4}
    latent = {"kv_lora_rank": hidden // 2, "qk_nope_head_dim": hidden // 8, "qk_rope_head_dim": 8}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": hidden // 2}
    return {**common, **latent, **experts, "v_head_dim": hidden // 8, "intermediate_size": 3 * hidden}


def train(run: dict[str, Any]) -> dict[str, Any]:
    """One run on one thread.

    Args:
        run: "kind", "size", "optimizer", "lr", "steps", "seed", and optionally "weight_decay", "adjust_lr_fn".

    Returns:
        `run` with "validation" [(step, loss)], "entropy" and "weight_rms" by group, "update_rms" by shape,
        "parameters" and "flops_per_step".
    """
    torch.set_num_threads(1)
    data = load_data([], SEQUENCE, seed=run["seed"])
    torch.manual_seed(run["seed"])
    model = build_model("dense" if run["kind"] == "dense" else "moonlight", vocab_size=data.vocab_size,
                        **sizes(run["kind"], run["size"]))  # fmt: skip
    cast_parameters(model, torch.bfloat16)
    if run["optimizer"] == "muon":
        groups = muon_param_groups(model)
    else:
        groups = [{"params": list(model.named_parameters()), "algorithm": "adamw"}]
    decay, adjust = run.get("weight_decay", 0.1), run.get("adjust_lr_fn", "match_rms_adamw")
    optimizer = DistributedMuon(groups, lr=run["lr"], weight_decay=decay, adjust_lr_fn=adjust)
    schedule = cosine_schedule(optimizer, run["lr"], run["steps"], warmup=10, final=0.1)
    world = World(0, 1, torch.device("cpu"))
    validation, rms_curve = [], []
    for step in range(run["steps"]):
        tokens, targets = data.batch(step, 0, 0, 1, size=BATCH, accumulation=1)
        model(tokens, targets).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        update_expert_bias(model, 1e-2)
        if (step + 1) % VALIDATE_EVERY == 0:
            validation.append((step + 1, validation_loss(model, data, world, VALIDATION_SAMPLES, BATCH)))
            rms_curve.append((step + 1, _weight_rms(optimizer)))
    by_shape: dict[str, list[float]] = defaultdict(list)
    shapes = {matrix.name: matrix.shape for matrix in optimizer.plan.layout.matrices}
    for name, value in optimizer.step_report().get("update_rms", {}).items():
        by_shape["x".join(map(str, shapes[name]))].append(value)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        **run,
        "validation": validation,
        "weight_rms_curve": rms_curve,
        "entropy": _entropy(model),
        "update_rms": {shape: statistics.mean(values) for shape, values in by_shape.items()},
        "parameters": parameters,
        # Forward and backward at 6 FLOPs per parameter and token, all experts counted; the optimizer apart.
        "model_flops_per_step": 6 * parameters * BATCH * SEQUENCE,
        "ns_flops_per_step": optimizer.plan.ns_flops_total,
    }


def _weight_rms(optimizer: DistributedMuon) -> float:
    """RMS of all hidden-matrix weights, from the masters."""
    matrices = [p.master for p in optimizer.sharded_parameters if p.param.ndim >= 2 and "embed" not in p.name]
    return math.sqrt(sum(float(m.square().sum()) for m in matrices) / sum(m.numel() for m in matrices))


def _entropy(model: nn.Module) -> dict[str, float]:
    """Mean singular-value entropy by weight group: H = -sum(q log q) / log(n), q = sigma^2 / sum sigma^2."""
    groups: dict[str, list[float]] = defaultdict(list)
    for name, param in model.named_parameters():
        if param.ndim < 2 or "embed" in name or "lm_head" in name:
            continue
        group = "experts" if "expert" in name else "attention" if "attn" in name else "dense mlp"
        for matrix in param.detach().float().reshape(-1, *param.shape[-2:]):
            squares = torch.linalg.svdvals(matrix).double().square()
            share = squares / squares.sum()
            groups[group].append(float(-(share * share.clamp(min=1e-30).log()).sum() / math.log(len(share))))
    return {group: statistics.mean(values) for group, values in groups.items()}


def steps_to(validation: list[tuple[int, float]], loss: float) -> float | None:
    """First step, interpolated, at which the validation loss is at most `loss`; None if never."""
    for (before, high), (after, low) in pairwise(validation):
        if low <= loss:
            return after if high <= loss else before + (after - before) * (high - loss) / (high - low)
    return None


def compare(adamw: list[dict[str, Any]], muon: list[dict[str, Any]], short: list[dict[str, Any]]) -> dict[str, Any]:
    """One model's row: runs of each kind by seed, in the same order."""
    finals = {name: [run["validation"][-1][1] for run in runs]
              for name, runs in (("adamw", adamw), ("muon", muon), ("short", short))}  # fmt: skip
    first = adamw[0]
    shares = [steps_to(run["validation"], target) for run, target in zip(muon, finals["adamw"], strict=True)]
    return {
        "kind": first["kind"],
        "size": first["size"],
        "parameters": first["parameters"],
        "lr": first["lr"],
        "final": finals,
        "share_of_steps": [share / first["steps"] if share else None for share in shares],
        "flops": {
            "adamw": first["steps"] * first["model_flops_per_step"],
            "short": short[0]["steps"] * (short[0]["model_flops_per_step"] + short[0]["ns_flops_per_step"]),
        },
        "entropy": {"adamw": _mean_entropy(adamw), "muon": _mean_entropy(muon)},
        "curves": {"adamw": first["validation"], "muon": muon[0]["validation"], "short": short[0]["validation"]},
    }


def _mean_entropy(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {group: statistics.mean(run["entropy"][group] for run in runs) for group in runs[0]["entropy"]}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Validation loss of AdamW's best and of Muon's two runs with the first seed, one panel per model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {"adamw": "AdamW", "muon": "Muon", "short": f"Muon, {SHORT} of the steps"}
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.5), sharex=True, layout="constrained")
    for axis, row in zip(axes.flat, rows, strict=True):
        for name, label in labels.items():
            axis.plot(*zip(*row["curves"][name], strict=True), label=label)
        final = row["curves"]["adamw"][-1][1]
        axis.axhline(final, color="0.7", linewidth=0.8)
        axis.set_ylim(final - 0.25, final + 1.0)
        axis.set_title(f"{row['kind']} {row['size']}, {row['parameters'] / 1e6:.2f} M, lr {row['lr']:g}")
        axis.set(xlabel="step", ylabel="validation loss")
    axes.flat[0].legend()
    figure.savefig(path, dpi=110)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table of the models."""
    header = f"{'model':13s} {'params':>9s} {'lr':>6s} {'AdamW':>7s} {'Muon':>7s} {'at 0.65':>7s}"
    print(f"{header} {'steps to AdamW':>15s}  entropy AdamW -> Muon")
    for row in rows:
        mean = {name: statistics.mean(values) for name, values in row["final"].items()}
        shares = " ".join(f"{share:.2f}" if share else "never" for share in row["share_of_steps"])
        entropy = ", ".join(
            f"{group} {row['entropy']['adamw'][group]:.3f} -> {value:.3f}"
            for group, value in row["entropy"]["muon"].items()
        )
        print(f"{row['kind'] + ' ' + row['size']:13s} {row['parameters']:9,d} {row['lr']:6g} {mean['adamw']:7.4f} "
              f"{mean['muon']:7.4f} {mean['short']:7.4f} {shares:>15s}  {entropy}")  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    models = [(kind, size) for kind in ("dense", "moe") for size in SIZES]

    def runs_of(kind: str, size: str, optimizer: str, lr: float, steps: int = args.steps) -> list[dict[str, Any]]:
        run = {"kind": kind, "size": size, "optimizer": optimizer, "lr": lr, "steps": steps}
        return [{**run, "seed": seed} for seed in args.seeds]

    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:

        def train_all(groups: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
            done = iter(list(pool.map(train, [run for group in groups for run in group])))
            return [[next(done) for _ in group] for group in groups]

        sweep = train_all([runs_of(*model, "adamw", lr) for model in models for lr in LEARNING_RATES])
        best = [
            min(
                (runs for runs in sweep if (runs[0]["kind"], runs[0]["size"]) == model),
                key=lambda runs: statistics.mean(run["validation"][-1][1] for run in runs),
            )
            for model in models
        ]
        lrs = [runs[0]["lr"] for runs in best]
        muon = [runs_of(*model, "muon", lr) for model, lr in zip(models, lrs, strict=True)]
        short = [[{**run, "steps": round(SHORT * args.steps)} for run in runs] for runs in muon]
        ablations = [[{**muon[0][0], "weight_decay": 0.0}, {**muon[0][0], "adjust_lr_fn": "original"}]]
        *trained, (no_decay, original) = train_all([*muon, *short, *ablations])
    muon, short = trained[: len(models)], trained[len(models) :]
    rows = [compare(*runs) for runs in zip(best, muon, short, strict=True)]
    print_rows(rows)
    print("AdamW's final loss by learning rate, mean over seeds:")
    for model in models:
        finals = ", ".join(
            f"{runs[0]['lr']:g} {statistics.mean(run['validation'][-1][1] for run in runs):.4f}"
            for runs in sweep
            if (runs[0]["kind"], runs[0]["size"]) == model
        )
        print(f"  {' '.join(model):13s} {finals}")
    decayed = muon[0][0]
    print("weight RMS of dense small at the end: with decay "
          f"{decayed['weight_rms_curve'][-1][1]:.4f}, without {no_decay['weight_rms_curve'][-1][1]:.4f}")  # fmt: skip
    for name, run in (("match_rms_adamw", decayed), ("original", original)):
        shapes = ", ".join(f"{shape} {value:.3f}" for shape, value in run["update_rms"].items())
        print(f"update RMS of dense small under {name}: {shapes}; final loss {run['validation'][-1][1]:.4f}")
    if args.json:
        sweep_rows = [{"kind": runs[0]["kind"], "size": runs[0]["size"], "lr": runs[0]["lr"],
                       "final": [run["validation"][-1][1] for run in runs]} for runs in sweep]  # fmt: skip
        result = {"machine": describe_machine(), "steps": args.steps, "seeds": args.seeds, "rows": rows,
                  "adamw_sweep": sweep_rows, "no_decay": no_decay, "original": original}  # fmt: skip
        args.json.write_text(json.dumps(result) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
