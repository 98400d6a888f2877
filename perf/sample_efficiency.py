"""Does Muon need fewer steps than AdamW, at AdamW's own learning rate? The report's claims at toy size.

    python -m perf.sample_efficiency [--steps 300] [--seeds 0 1] [--workers 2] [--runs FILE] [--json FILE] [--plot FILE]

For dense and mixture-of-experts models at three sizes: AdamW at several learning rates, then Muon at the best of
these (arXiv 2502.16982, section 2.2: no new tuning) and at small multiples of it, each for as many steps; then Muon
at its own best for 0.65 of the steps, with a cosine schedule of that length. Printed per model, means over seeds:
final validation losses; the step at which Muon passes AdamW's final loss, by seed; the RMS of the change of hidden
weights in a step over the learning rate, which the scale rule takes to be 0.2 for AdamW; singular-value entropy of
the weights by group (figure 4); weight RMS with and without decay (figure 2), and update RMS by shape under both
scale rules (table 1).
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
from torch import Tensor, nn

from distributed_muon import DistributedMuon, muon_param_groups
from launch.data import load_data
from launch.environment import describe_machine
from launch.models import build_model, cast_parameters, update_expert_bias
from launch.schedule import cosine_schedule
from launch.validation import validation_loss
from launch.world import World

SIZES = {
    "small": {"hidden_size": 64, "num_hidden_layers": 2},
    "medium": {"hidden_size": 96, "num_hidden_layers": 3},
    "large": {"hidden_size": 128, "num_hidden_layers": 4},
}
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
MULTIPLES = (1, 2, 4, 8)  # of AdamW's best, that Muon is tried at
SHORT = 0.65  # of the steps
Runs = list[dict[str, Any]]  # of one model, optimizer and learning rate, by seed
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
        `run` with "validation" [(step, loss)], "weight_rms_curve", "entropy" by group, "update_rms" by shape (of
        the last step, as the optimizer reports it), "update_over_lr" (measured on the weights, median over the
        run), "parameters" and FLOPs per step.
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
    validation, rms_curve, moved = [], [], []
    for step in range(run["steps"]):
        tokens, targets = data.batch(step, 0, 0, 1, size=BATCH, accumulation=1)
        model(tokens, targets).backward()
        optimizer.clip_grad_norm_(1.0)
        validates = (step + 1) % VALIDATE_EVERY == 0
        before = [m.clone() for m in _hidden(optimizer)] if validates else []
        optimizer.step()
        if validates:
            changes = [after - m for after, m in zip(_hidden(optimizer), before, strict=True)]
            moved.append(_rms(changes) / schedule.get_last_lr()[0])
        optimizer.zero_grad()
        schedule.step()
        update_expert_bias(model, 1e-2)
        if validates:
            validation.append((step + 1, validation_loss(model, data, world, VALIDATION_SAMPLES, BATCH)))
            rms_curve.append((step + 1, _rms(_hidden(optimizer))))
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
        "update_over_lr": statistics.median(moved),
        "parameters": parameters,
        # Forward and backward at 6 FLOPs per parameter and token, all experts counted; the optimizer apart.
        "model_flops_per_step": 6 * parameters * BATCH * SEQUENCE,
        "ns_flops_per_step": optimizer.plan.ns_flops_total,
    }


def _hidden(optimizer: DistributedMuon) -> list[Tensor]:
    """The masters of all hidden matrices, whatever moves them."""
    return [p.master for p in optimizer.sharded_parameters if p.param.ndim >= 2 and not _outer(p.name)]


def _outer(name: str) -> bool:
    return "embed" in name or "lm_head" in name


def _rms(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors) / sum(t.numel() for t in tensors))


def _entropy(model: nn.Module) -> dict[str, float]:
    """Mean singular-value entropy by weight group: H = -sum(q log q) / log(n), q = sigma^2 / sum sigma^2."""
    groups: dict[str, list[float]] = defaultdict(list)
    for name, param in model.named_parameters():
        if param.ndim < 2 or _outer(name):
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


def compare(adamw: Runs, muon: Runs, tuned: Runs, short: Runs) -> dict[str, Any]:
    """One model's row: runs of each kind by seed, in the same order."""
    kinds = {"adamw": adamw, "muon": muon, "tuned": tuned, "short": short}
    finals = {name: [_final(run) for run in runs] for name, runs in kinds.items()}

    def shares(runs: Runs) -> list[float | None]:
        reached = [steps_to(run["validation"], target) for run, target in zip(runs, finals["adamw"], strict=True)]
        return [step / adamw[0]["steps"] if step else None for step in reached]

    first = adamw[0]
    return {
        "kind": first["kind"],
        "size": first["size"],
        "parameters": first["parameters"],
        "lr": first["lr"],
        "tuned_lr": tuned[0]["lr"],
        "final": finals,
        "share_of_steps": shares(muon),
        "tuned_share_of_steps": shares(tuned),
        "flops": {
            "adamw": first["steps"] * first["model_flops_per_step"],
            "short": short[0]["steps"] * (short[0]["model_flops_per_step"] + short[0]["ns_flops_per_step"]),
        },
        "update_over_lr": {name: _mean(runs, "update_over_lr") for name, runs in (("adamw", adamw), ("muon", muon))},
        "entropy": {"adamw": _mean_entropy(adamw), "muon": _mean_entropy(muon)},
        "curves": {name: runs[0]["validation"] for name, runs in kinds.items()},
    }


def _final(run: dict[str, Any]) -> float:
    return run["validation"][-1][1]


def _mean(runs: Runs, key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def _mean_final(runs: Runs) -> float:
    return statistics.mean(map(_final, runs))


def _mean_entropy(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {group: statistics.mean(run["entropy"][group] for run in runs) for group in runs[0]["entropy"]}


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The tables of the models."""
    print(f"{'':13s} {'':>9s} {'AdamW':>15s} {'Muon, same lr':>21s} {'Muon, own lr':>28s} {f'in {SHORT}':>8s} "
          "  change of weights / lr")  # fmt: skip
    print(f"{'model':13s} {'params':>9s} {'lr':>7s} {'loss':>7s} {'loss':>9s} {'steps':>11s} {'lr':>8s} {'loss':>7s} "
          f"{'steps':>11s} {'loss':>8s}   AdamW, Muon")  # fmt: skip
    for row in rows:
        mean = {name: statistics.mean(values) for name, values in row["final"].items()}
        same, own = (
            " ".join(f"{share:.2f}" if share else "never" for share in row[key])
            for key in ("share_of_steps", "tuned_share_of_steps")
        )
        moved = row["update_over_lr"]
        print(f"{row['kind'] + ' ' + row['size']:13s} {row['parameters']:9,d} {row['lr']:7g} {mean['adamw']:7.4f} "
              f"{mean['muon']:9.4f} {same:>11s} {row['tuned_lr']:8g} {mean['tuned']:7.4f} {own:>11s} "
              f"{mean['short']:8.4f}   {moved['adamw']:.3f}, {moved['muon']:.3f}")  # fmt: skip
    print("singular-value entropy of the weights, AdamW -> Muon at the same learning rate:")
    for row in rows:
        entropy = ", ".join(
            f"{group} {row['entropy']['adamw'][group]:.3f} -> {value:.3f}"
            for group, value in row["entropy"]["muon"].items()
        )
        print(f"  {row['kind'] + ' ' + row['size']:13s} {entropy}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--runs", type=Path, help="JSON lines of finished runs, which are not repeated")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    models = [(kind, size) for kind in ("dense", "moe") for size in SIZES]

    def runs_of(kind: str, size: str, optimizer: str, lr: float, steps: int = args.steps) -> Runs:
        run = {"kind": kind, "size": size, "optimizer": optimizer, "lr": lr, "steps": steps}
        return [{**run, "seed": seed} for seed in args.seeds]

    def best_of(groups: list[Runs]) -> Runs:
        return min(groups, key=_mean_final)

    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:

        def train_all(groups: list[Runs]) -> list[Runs]:
            done = iter(train_or_read([run for group in groups for run in group], args.runs, pool))
            return [[next(done) for _ in group] for group in groups]

        def sweep(optimizer: str, lrs: list[tuple[float, ...]]) -> list[list[Runs]]:
            """Per model, its runs at each of its learning rates."""
            pairs = [(model, lr) for model, rates in zip(models, lrs, strict=True) for lr in rates]
            tried = iter(train_all([runs_of(*model, optimizer, lr) for model, lr in pairs]))
            return [[next(tried) for _ in rates] for rates in lrs]

        adamw_sweep = sweep("adamw", [LEARNING_RATES] * len(models))
        adamw = [best_of(groups) for groups in adamw_sweep]
        muon_sweep = sweep("muon", [tuple(factor * runs[0]["lr"] for factor in MULTIPLES) for runs in adamw])
        tuned = [best_of(groups) for groups in muon_sweep]
        steps = int(SHORT * args.steps) // VALIDATE_EVERY * VALIDATE_EVERY
        short = [runs_of(*model, "muon", runs[0]["lr"], steps) for model, runs in zip(models, tuned, strict=True)]
        first = runs_of(*models[0], "muon", adamw[0][0]["lr"])[0]
        ablations = [{**first, "weight_decay": 0.0}, {**first, "adjust_lr_fn": "original"}]
        *short, (no_decay, original) = train_all([*short, ablations])
    muon = [groups[MULTIPLES.index(1)] for groups in muon_sweep]
    rows = [compare(*runs) for runs in zip(adamw, muon, tuned, short, strict=True)]
    print_rows(rows)
    print("final loss by learning rate, mean over seeds:")
    for model, *sweeps in zip(models, adamw_sweep, muon_sweep, strict=True):
        for name, groups in zip(("AdamW", "Muon"), sweeps, strict=True):
            finals = ", ".join(f"{runs[0]['lr']:g} {_mean_final(runs):.4f}" for runs in groups)
            print(f"  {' '.join(model):13s} {name:5s} {finals}")
    decayed = muon[0][0]
    print("weight RMS of dense small at the end: with decay "
          f"{decayed['weight_rms_curve'][-1][1]:.4f}, without {no_decay['weight_rms_curve'][-1][1]:.4f}")  # fmt: skip
    for name, run in (("match_rms_adamw", decayed), ("original", original)):
        shapes = ", ".join(f"{shape} {value:.3f}" for shape, value in run["update_rms"].items())
        print(f"update RMS of dense small under {name}: {shapes}; final loss {_final(run):.4f}")
    if args.json:
        swept = [
            {key: runs[0][key] for key in ("kind", "size", "optimizer", "lr")}
            | {"final": [_final(run) for run in runs]}
            for sweeps in (adamw_sweep, muon_sweep)
            for groups in sweeps
            for runs in groups
        ]
        result = {"machine": describe_machine(), "steps": args.steps, "seeds": args.seeds, "rows": rows,
                  "sweep": swept, "no_decay": no_decay, "original": original}  # fmt: skip
        args.json.write_text(json.dumps(result) + "\n")
    if args.plot:
        from perf.report.sample_efficiency import loss_panels  # matplotlib, which the measurement does not need

        loss_panels(rows).savefig(args.plot, dpi=110)


def train_or_read(runs: Runs, file: Path | None, pool: ProcessPoolExecutor) -> Runs:
    """`train` of every run, in order; those that `file` has are read from it, and the others added to it."""
    lines = file.read_text().splitlines() if file is not None and file.exists() else []
    known = [json.loads(line) for line in lines]

    def find(run: dict[str, Any]) -> dict[str, Any] | None:
        options = {"weight_decay": None, "adjust_lr_fn": None, **run}
        return next((old for old in known if all(old.get(key) == value for key, value in options.items())), None)

    futures = [None if find(run) else pool.submit(train, run) for run in runs]
    done = []
    for run, future in zip(runs, futures, strict=True):
        done.append(future.result() if future is not None else find(run))
        if future is not None and file is not None:
            with file.open("a") as sink:
                sink.write(json.dumps(done[-1]) + "\n")
    return done


if __name__ == "__main__":
    main()
