"""Which runs answer which claim of the Moonlight report (arXiv 2502.16982), and the tables of what they say.

Everything here is a pure function of the results that are known, so finished runs can be drawn at any time and a run
is asked for only when the runs that its learning rate depends on are there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from perf.sample_runs import FINAL_LR, Run, group_means

SHORT = 0.52  # of AdamW's steps: the report's share of AdamW's FLOPs for the same loss
RATES = (1e-3, 2e-3, 4e-3)  # that AdamW is tried at first
UPDATE_RMS = (0.05, 0.1, 0.2, 0.4, 0.8)
Known = Mapping[Run, dict[str, Any]]  # what `train` returned


class Model(NamedTuple):
    """One model, and the seeds it is trained with."""

    kind: str
    size: str
    seeds: tuple[int, ...]

    def runs(self, optimizer: str, lr: float, **options: Any) -> list[Run]:
        """One run per seed."""
        return [Run(self.kind, self.size, optimizer, lr, seed, **options) for seed in self.seeds]

    def __str__(self) -> str:
        return f"{self.kind} {self.size}"


MODELS = {
    "small": Model("dense", "small", (0, 1, 2)),
    "medium": Model("dense", "medium", (0, 1)),
    "moe": Model("moe", "small", (0, 1)),
    "large": Model("dense", "large", (0,)),
}
STUDIES = ("rms", "scale", "qkv", "router", "finetuning", "decay")
PARTS = ("small", "medium", "moe", *STUDIES, "large")


@dataclass(frozen=True)
class Study:
    """Variants of one run side by side: label -> runs by seed, the one to compare with first."""

    title: str
    note: str
    variants: dict[str, list[Run]]


class Table(NamedTuple):
    """A table to print or to show."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: list[list[str]]


def wanted(parts: tuple[str, ...], known: Known) -> list[Run]:
    """The runs that `parts` still need and that can start now, the most important first."""
    runs: list[Run] = []
    for part in PARTS:
        if part in parts:
            runs += _model_runs(MODELS[part], known) if part in MODELS else _study_runs(part, known)
    return [run for run in dict.fromkeys(runs) if run not in known]


def _model_runs(model: Model, known: Known) -> list[Run]:
    rates, best = bracket(model, known)
    if best is None:
        return [run for lr in rates for run in model.runs("adamw", lr)]
    return [*model.runs("muon", best), *model.runs("muon", best, share=SHORT)]


def read_results(content: dict[str, Any]) -> dict[Run, dict[str, Any]]:
    """The results in a file of `perf.sample_efficiency` by their run."""
    return {Run.read(result["run"]): result for result in content["runs"]}


def _study_runs(name: str, known: Known) -> list[Run]:
    model = _model_of(name)
    _, best = bracket(model, known)
    if best is None:
        return _model_runs(model, known)
    return [run for runs in study(name, best).variants.values() for run in runs]


def _model_of(name: str) -> Model:
    return MODELS["moe" if name == "router" else "small"]


def bracket(model: Model, known: Known) -> tuple[list[float], float | None]:
    """AdamW's learning rates so far, and the best of them once both neighbours are known to be worse."""
    rates = list(RATES)
    while all(run in known for lr in rates for run in model.runs("adamw", lr)):
        best = min(rates, key=lambda lr: mean_final(model.runs("adamw", lr), known))
        if best == rates[0]:
            rates.insert(0, best / 2)
        elif best == rates[-1]:
            rates.append(best * 2)
        else:
            return rates, best
    return rates, None


def study(name: str, lr: float) -> Study:
    """One of STUDIES at AdamW's best rate `lr` of its model."""
    model = _model_of(name)
    muon = model.runs("muon", lr)

    def changed(**options: Any) -> list[Run]:
        return [replace(run, **options) for run in muon]

    if name == "rms":
        others = {f"{rms:g}": changed(update_rms=rms) for rms in UPDATE_RMS if rms != Run.update_rms}
        return Study(
            "Update RMS (the report's table 8)", "Hidden rates scaled, lr x decay kept.", {"0.2": muon, **others}
        )
    if name == "scale":
        variants = {"sqrt(max(rows, columns))": muon, "sqrt(hidden)": changed(scale="hidden")}
        return Study("Scale rule (table 1)", "0.2 times the root of what decides the update's scale.", variants)
    if name == "qkv":
        variants = {"three matrices": muon, "one matrix": changed(fused_qkv=True)}
        return Study("Query, key and value", "Orthogonalized apart, or together as one fused parameter.", variants)
    if name == "router":
        variants = {
            "Muon for both": muon,
            "router under AdamW": changed(adamw="*.mlp.gate.weight"),
            "experts under AdamW": changed(adamw="*.experts.*"),
        }
        return Study("Router and experts of the MoE", "Which of them Muon moves.", variants)
    if name == "finetuning":
        return Study(
            "Fine-tuning (table 6)",
            "A quarter of the pretraining's tokens and of its peak rate on other source text; loss on that text.",
            {
                f"{names[before]} -> {names[after]}": [
                    Run(model.kind, model.size, after, lr / 4, seed, 0.25, start=start)
                    for seed, start in zip(model.seeds, model.runs(before, lr), strict=True)
                ]
                for names in [{"adamw": "AdamW", "muon": "Muon"}]
                for before, after in (("adamw", "adamw"), ("adamw", "muon"), ("muon", "adamw"), ("muon", "muon"))
            },
        )
    assert name == "decay", name
    long = replace(muon[0], share=5.0)
    variants = {
        "Muon, decay 0.1": [long],
        "Muon, no decay": [replace(long, weight_decay=0.0)],
        "AdamW, decay 0.1": [replace(long, optimizer="adamw")],
    }
    return Study("Weight decay (figure 2)", "Five times the tokens, one seed.", variants)


def study_if_known(name: str, known: Known) -> Study | None:
    """One of STUDIES, None before all its runs are known."""
    _, lr = bracket(_model_of(name), known)
    if lr is None:
        return None
    one = study(name, lr)
    return one if all(run in known for runs in one.variants.values() for run in runs) else None


# ---- what the runs say -------------------------------------------------------------------------------


def final(run: Run, known: Known) -> float:
    """Validation loss at the end."""
    return known[run]["curve"][-1][1]


def mean_final(runs: list[Run], known: Known) -> float:
    return statistics.mean(final(run, known) for run in runs)


def steps_to(curve: list[list[float]], loss: float) -> float | None:
    """First step, interpolated, at which the validation loss is at most `loss`; None if never."""
    for (before, high, *_), (after, low, *_) in pairwise(curve):
        if low <= loss:
            return after if high <= loss else before + (after - before) * (high - loss) / (high - low)
    return None


@dataclass(frozen=True)
class Comparison:
    """What one model says about Muon at AdamW's best rate; lists are by seed."""

    model: Model
    rates: list[float]
    lr: float
    adamw: list[Run]
    muon: list[Run]
    short: list[Run]
    shares: list[float | None]  # of AdamW's steps at which Muon passes AdamW's final loss
    margins: list[float]  # loss of Muon's short schedule minus AdamW's of the full one


def compare(model: Model, known: Known) -> Comparison | None:
    """The comparison of one model, None before all its runs are known."""
    rates, lr = bracket(model, known)
    if lr is None:
        return None
    adamw, muon, short = model.runs("adamw", lr), model.runs("muon", lr), model.runs("muon", lr, share=SHORT)
    if not all(run in known for run in muon + short):
        return None
    reached = [steps_to(known[new]["curve"], final(old, known)) for new, old in zip(muon, adamw, strict=True)]
    shares = [step and step / run.steps for step, run in zip(reached, adamw, strict=True)]
    margins = [final(new, known) - final(old, known) for new, old in zip(short, adamw, strict=True)]
    return Comparison(model, rates, lr, adamw, muon, short, shares, margins)


def comparisons(known: Known) -> list[Comparison]:
    """Of all models whose runs are there."""
    return [found for model in MODELS.values() if (found := compare(model, known)) is not None]


def power_law(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of loss = a * compute^b, least squares of the logarithms."""
    slope, intercept = statistics.linear_regression(*zip(*((math.log(x), math.log(y)) for x, y in points), strict=True))
    return math.exp(intercept), slope


def compute_points(known: Known) -> dict[str, list[tuple[float, float]]]:
    """(FLOPs of the model, mean final loss) of each dense size, by optimizer."""
    dense = [found for found in comparisons(known) if found.model.kind == "dense"]
    return {
        name: [(runs[0].flops, mean_final(runs, known)) for runs in (getattr(found, name) for found in dense)]
        for name in ("adamw", "muon")
    }


def compute_share(points: dict[str, list[tuple[float, float]]]) -> list[float]:
    """At each size, Muon's compute over AdamW's for AdamW's loss by the two fits; needs two sizes."""
    (a, b), (c, d) = power_law(points["adamw"]), power_law(points["muon"])
    return [(a * flops**b / c) ** (1 / d) / flops for flops, _ in points["adamw"]]


def tables(known: Known) -> list[Table]:
    """Everything that is complete; parts whose runs are missing are left out."""
    found = comparisons(known)
    out = [_steps_table(found, known), _rates_table(known), *_entropy_tables(found, known)]
    out += [_study_table(one, known) for name in STUDIES if (one := study_if_known(name, known)) is not None]
    return [table for table in out if table.rows]


def _steps_table(found: list[Comparison], known: Known) -> Table:
    rows = []
    for one in found:
        shares = [share for share in one.shares if share]
        newton_schulz = known[one.muon[0]]["newton_schulz_flops"] / one.muon[0].flops
        rows.append(
            [str(one.model), f"{one.muon[0].parameters:,}", f"{one.muon[0].steps:,}", f"{len(one.adamw)}",
             f"{one.lr:g} of {one.rates[0]:g} to {one.rates[-1]:g}", f"{mean_final(one.adamw, known):.4f}",
             f"{mean_final(one.muon, known):.4f}",
             f"{statistics.mean(shares):.2f}" if len(shares) == len(one.shares) else "-",
             " ".join(f"{share:.2f}" if share else "never" for share in one.shares),
             f"{mean_final(one.short, known):.4f}", f"{statistics.mean(one.margins):+.4f}",
             " ".join(f"{margin:+.4f}" for margin in one.margins),
             f"{newton_schulz:.2f}"]
        )  # fmt: skip
    header = (
        "model", "parameters", "steps", "seeds", "AdamW's best rate", "AdamW", "Muon", "share of steps", "by seed",
        f"Muon in {SHORT:g}", "minus AdamW", "by seed", "NS FLOPs / model's",
    )  # fmt: skip
    note = (
        "Final validation loss, mean over seeds. Share of steps: where Muon, at AdamW's best rate and for as many "
        f"steps, passes AdamW's final loss. Muon in {SHORT:g}: with a schedule of its own over so many of the steps."
    )
    points = compute_points(known)
    if len(points["adamw"]) > 1:
        shares = ", ".join(f"{share:.2f}" for share in compute_share(points))
        note += f" Muon's compute over AdamW's for equal loss, by fits through the dense sizes, at each size: {shares}."
    return Table("Steps to AdamW's loss at AdamW's rate", note, header, rows)


def _rates_table(known: Known) -> Table:
    rows = []
    for model in MODELS.values():
        rates = [lr for lr in bracket(model, known)[0] if all(run in known for run in model.runs("adamw", lr))]
        for lr in rates:
            runs = model.runs("adamw", lr)
            losses = " ".join(f"{final(run, known):.4f}" for run in runs)
            rows.append([str(model), f"{lr:g}", f"{mean_final(runs, known):.4f}", losses])
    return Table("AdamW's learning rates", "Final validation loss.", ("model", "rate", "mean", "by seed"), rows)


def _entropy_tables(found: list[Comparison], known: Known) -> Iterator[Table]:
    rows, total = [], [0, 0]
    for one in found:
        by_seed = [(known[old], known[new]) for old, new in zip(one.adamw, one.muon, strict=True)]
        higher = [new["entropy"][name] > value for old, new in by_seed for name, value in old["entropy"].items()]
        total = [total[0] + sum(higher), total[1] + len(higher)]
        means = [[group_means(result["entropy"]) for result in results] for results in zip(*by_seed, strict=True)]
        for group in means[0][0]:
            adamw, muon = (statistics.mean(mean[group] for mean in seeds) for seeds in means)
            rows.append([str(one.model), group, f"{adamw:.3f}", f"{muon:.3f}"])
    note = f"Mean over matrices and seeds. Muon's is higher in {total[0]} of {total[1]} matrices."
    yield Table("Singular-value entropy of the weights", note, ("model", "weights", "AdamW", "Muon"), rows)


def _study_table(one: Study, known: Known) -> Table:
    rows = []
    base = next(iter(one.variants.values()))
    for label, runs in one.variants.items():
        margins = [final(run, known) - final(other, known) for run, other in zip(runs, base, strict=True)]
        attention, feed_forward = (_rms_of(part, runs, known) for part in ("attention", "dense feed-forward"))
        weights, updates = zip(*(known[run]["curve"][-1][2:] for run in runs), strict=True)
        moved = [
            FINAL_LR * run.lr * update / weight for run, weight, update in zip(runs, weights, updates, strict=True)
        ]
        rows.append(
            [label, f"{mean_final(runs, known):.4f}",
             "" if runs is base else f"{statistics.mean(margins):+.4f}",
             "" if runs is base else " ".join(f"{margin:+.4f}" for margin in margins),
             f"{attention:.4f}", f"{feed_forward:.4f}", f"{statistics.mean(updates):.3f}",
             f"{statistics.mean(moved):.1e}"]
        )  # fmt: skip
    header = ("", "loss", "minus the first", "by seed", "attention RMS", "feed-forward RMS", "change / rate",
              "change / weight")  # fmt: skip
    return Table(one.title, one.note, header, rows)


def _rms_of(group: str, runs: list[Run], known: Known) -> float:
    """Mean RMS at the end of the matrices of a weight group."""
    return statistics.mean(group_means(known[run]["weight_rms"])[group] for run in runs)
