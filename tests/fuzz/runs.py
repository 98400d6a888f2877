"""Generated runs: DistributedMuon on one to three ranks against one process on the mean gradient, step by step."""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor, nn

from distributed_muon import DistributedMuon, GradScaler
from tests.fuzz.reference import OneProcess
from tests.fuzz.weights import Weight, weights

WORLD = 3  # ranks of a pool; smaller worlds are the first of them
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the norm of the updates, where other forms of Newton-Schulz round in another order.
NEAR = 0.2
SCALE = 2.0**8  # of the loss of fp16 parameters at the start: gradients of small integers stay exact


@dataclass(frozen=True)
class RunCase:
    """One run.

    Args:
        weights: parameters. dtypes: per weight. world: ranks. steps, microbatches: per step.
        optimizer: keywords of DistributedMuon. muon, adamw: options of the two groups.
        rates: factor on lr per step. clip: limit on the gradient's norm, or None.
        missing: chance that a parameter has no gradient in a microbatch on a rank. everywhere: or on all ranks.
        nonfinite: steps in which one rank's gradient has an inf.
        no_sync, overlap: whether these are used. reload: step before which a new optimizer takes over the state.
        seed: of all values.
    """

    weights: tuple[Weight, ...]
    dtypes: tuple[str, ...]
    world: int = 1
    steps: int = 2
    microbatches: int = 1
    optimizer: dict[str, Any] = field(default_factory=dict)
    muon: dict[str, Any] = field(default_factory=dict)
    adamw: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = (1.0,)
    clip: float | None = None
    missing: float = 0.0
    everywhere: float = 0.0
    nonfinite: tuple[int, ...] = ()
    no_sync: bool = True
    overlap: bool = False
    reload: int = 0
    seed: int = 0

    @property
    def ns_dtype(self) -> torch.dtype:
        return DTYPES[self.optimizer["ns_dtype"]]

    @property
    def exact(self) -> bool:
        """Whether every bit must be the reference's; other forms of Newton-Schulz round in another order."""
        return self.optimizer["ns_form"] == "standard" and self.ns_dtype == torch.bfloat16

    def lr(self, step: int) -> float:
        """The scheduled rate."""
        return self.muon["lr"] * self.rates[step % len(self.rates)]

    def gradients(self, step: int, rank: int) -> Iterator[list[Tensor | None]]:
        """Per microbatch, what the parameters get on a rank: integers, so that sums are exact in any order."""
        for microbatch in range(self.microbatches):
            place = ((self.seed * 64 + step) * 8 + microbatch) * 8
            shared = torch.Generator().manual_seed(place)
            none = [float(torch.rand((), generator=shared)) < self.everywhere for _ in self.weights]
            own = torch.Generator().manual_seed(place + 1 + rank)
            grads: list[Tensor | None] = []
            for weight, gone in zip(self.weights, none, strict=True):
                absent = float(torch.rand((), generator=own)) < self.missing
                grad = torch.randint(-8, 9, weight.shape, generator=own).float()
                grads.append(None if gone or absent else grad)
            yield grads

    def bad_rank(self, step: int) -> int | None:
        """The rank whose gradient of the first parameter that it has becomes inf in this step."""
        return (self.seed + step) % self.world if step in self.nonfinite else None


@st.composite
def muon_options(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a group of Muon's."""
    return {
        "lr": draw(st.sampled_from([1e-3, 0.02, 0.3])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "momentum": draw(st.sampled_from([0.0, 0.5, 0.95])),
        "nesterov": draw(st.booleans()),
        "ns_steps": draw(st.integers(1, 6)),
        "ns_coefficients": draw(st.sampled_from(["quintic", "you", "cans", (3.4445, -4.7750, 2.0315)])),
        "adjust_lr_fn": draw(st.sampled_from(["original", "match_rms_adamw", "spectral", "unit_rms_norm"])),
        "update_scale": draw(st.sampled_from([1.0, 0.5])),
    }


@st.composite
def run_cases(draw: st.DrawFn) -> RunCase:
    """Any run that the package promises to get right."""
    given = draw(weights(most=6))
    half = draw(st.sampled_from([False, False, True]))
    kinds = ["fp16"] if half else ["fp32", "bf16"]
    reduction = draw(st.sampled_from(["reduce_scatter", "reduce_scatter", "reduce_scatter", "none"]))
    if half:
        reduction = "reduce_scatter"
    layout = draw(st.sampled_from(["auto", "aligned", "bucketed", "flat"]))
    steps = draw(st.integers(1, 4))
    averaged = reduction == "none"
    muon = draw(muon_options())
    chances = st.sampled_from([0.0, 0.0, 0.2])
    bad = draw(st.sets(st.integers(0, steps - 1), max_size=1)) if not averaged else set()
    return RunCase(
        given,
        tuple(draw(st.sampled_from(kinds)) for _ in given),
        world=draw(st.integers(1, WORLD)),
        steps=steps,
        microbatches=1 if averaged else draw(st.integers(1, 3)),
        optimizer={
            "layout": layout,
            "bucket_mb": None if layout == "flat" else draw(st.sampled_from([None, 1e-5, 1e-3, 4e-3])),
            "gradient_reduction": reduction,
            "reduce_dtype": "fp32" if averaged else draw(st.sampled_from(["fp32", "bf16"])),
            "nonfinite": "skip",
            "replica_check_every": draw(st.sampled_from([0, 1, 2])),
            "strategy": draw(st.sampled_from(["auto", "home", "gather"])),
            "ns_form": draw(st.sampled_from(["standard", "standard", "gram", "auto"])),
            "ns_dtype": draw(st.sampled_from(["bf16", "bf16", "fp32"])),
            "zero_gradients": draw(st.sampled_from(["update", "skip"])),
        },
        muon=muon,
        adamw={
            "lr": muon["lr"],
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
            "betas": draw(st.sampled_from([(0.9, 0.95), (0.8, 0.999), (0.0, 0.5)])),
            "eps": draw(st.sampled_from([1e-8, 1e-6])),
        },
        rates=draw(st.sampled_from([(1.0,), (0.5, 1.0, 0.0), (1.0, 0.1)])),
        clip=draw(st.sampled_from([None, None, 1e9, 1.0])),
        missing=draw(chances),
        everywhere=draw(chances),
        nonfinite=tuple(bad),
        no_sync=draw(st.booleans()),
        overlap=draw(st.booleans()),
        reload=draw(st.sampled_from([0, 0, 1, 2])),
        seed=draw(st.integers(0, 999)),
    )


class Model(nn.Module):
    """A loss whose gradients are what it is given."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(params)

    def forward(self, grads: Sequence[Tensor | None]) -> Tensor | None:
        terms = [(p * g.to(p.dtype)).float().sum() for p, g in zip(self.held, grads, strict=True) if g is not None]
        return torch.stack(terms).sum() if terms else None


class Run:
    """This rank's part of one case.

    Args:
        group: of the case's ranks.
    """

    def __init__(self, case: RunCase, rank: int, group: dist.ProcessGroup | None) -> None:
        self.case, self.rank, self.group = case, rank, group
        generator = torch.Generator().manual_seed(case.seed)
        values = [torch.randn(w.shape, generator=generator) for w in case.weights]
        values = [v.to(DTYPES[d]) for v, d in zip(values, case.dtypes, strict=True)]
        self.params = [nn.Parameter(value.clone()) for value in values]
        self.reference = OneProcess(
            case.weights, [value.float() for value in values], case.muon, case.adamw, case.ns_dtype
        )
        self.scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=2) if "fp16" in case.dtypes else None
        self.moved = [0.0] * len(values)  # how far each parameter may differ, where not every bit is the same
        self.build()

    def build(self) -> None:
        """The model and its optimizer."""
        case = self.case
        groups = []
        for algorithm, options in (("muon", case.muon), ("adamw", case.adamw)):
            own = [i for i, weight in enumerate(case.weights) if (weight.rule is None) == (algorithm == "adamw")]
            rules = {case.weights[i].rule for i in own}
            for rule in sorted(rules, key=repr):
                named = [(str(i), self.params[i]) for i in own if case.weights[i].rule == rule]
                extra = {} if rule is None else {"matrices": rule}
                groups.append({"params": named, "algorithm": algorithm, **options, **extra})
        dtypes = {key: DTYPES[case.optimizer[key]] for key in ("reduce_dtype", "ns_dtype")}
        self.optimizer = DistributedMuon(groups, **{**case.optimizer, **dtypes}, process_group=self.group)
        self.model = Model(self.params)
        if case.overlap:
            self.optimizer.overlap_param_gather(self.model)

    def step(self, step: int) -> list[str]:
        """One optimizer step here and in one process; what differs."""
        case, optimizer = self.case, self.optimizer
        lr = case.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        everyone = [list(case.gradients(step, rank)) for rank in range(case.world)]
        mean = self.mean(everyone)
        if case.optimizer["gradient_reduction"] == "none":
            for param, grad in zip(self.params, mean, strict=True):
                param.grad = None if grad is None else grad.to(param.dtype)
            mean = [None if p.grad is None else p.grad.float() for p in self.params]
        else:
            self.backward(step, everyone[self.rank])
        bad = case.bad_rank(step)
        skipped = bad is not None and any(g is not None for grads in everyone[bad] for g in grads)
        factor, wrong = self.clip(mean, skipped)
        if self.scaler is None:
            optimizer.step()
            found = optimizer.local_report()["skipped"]
        else:
            before = self.scaler.get_scale()
            self.scaler.step(optimizer)
            self.scaler.update()
            found = self.scaler.get_scale() < before
        wrong += [f"skipped is {found}"] if found != skipped else []
        optimizer.zero_grad()
        if not skipped:
            self.reference.step([g if g is None or factor is None else g * factor for g in mean], lr)
            for number, (weight, grad) in enumerate(zip(case.weights, mean, strict=True)):
                if grad is not None and weight.rule is not None:
                    self.moved[number] += NEAR * lr * largest_update(weight, self.reference)
        optimizer.wait_params()
        return [f"step {step}: {line}" for line in (*wrong, *self.compare())]

    def mean(self, everyone: Sequence[Sequence[Sequence[Tensor | None]]]) -> list[Tensor | None]:
        """Per parameter the mean over the ranks of what its microbatches add up to; None where nobody has any."""
        out: list[Tensor | None] = []
        for number, weight in enumerate(self.case.weights):
            own = [micro[number] for batches in everyone for micro in batches if micro[number] is not None]
            out.append(torch.stack(own).sum(0).view(weight.shape) / self.case.world if own else None)
        return out

    def backward(self, step: int, batches: Sequence[Sequence[Tensor | None]]) -> None:
        """The microbatches of this rank, one of them with an inf where the case says so."""
        case, bad = self.case, self.case.bad_rank(step) == self.rank
        for number, grads in enumerate(batches):
            if bad and any(g is not None for g in grads):
                first = next(i for i, g in enumerate(grads) if g is not None)
                grads = [torch.full_like(g, math.inf) if i == first else g for i, g in enumerate(grads)]
                bad = False
            pause = case.no_sync and number + 1 < len(batches)
            with self.optimizer.no_sync() if pause else nullcontext():
                loss = self.model(grads)
                if loss is not None:
                    (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.scaler is not None and self.scaler._scale is None:
            self.scaler.scale(torch.ones(()))  # no loss on this rank yet, and it makes its scale with the first

    def clip(self, mean: Sequence[Tensor | None], skipped: bool) -> tuple[float | None, list[str]]:
        """Clip; the factor that one process takes (None leaves the gradient as it is), and what is wrong."""
        limit = self.case.clip
        if limit is None:
            return None, []
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = self.optimizer.clip_grad_norm_(limit)
        expected = math.sqrt(sum(float(grad.double().square().sum()) for grad in mean if grad is not None))
        if skipped:
            return None, [f"norm {norm} is finite"] if norm < math.inf else []
        factor = limit / (norm + 1e-6)
        wrong = [] if math.isclose(norm, expected, rel_tol=1e-12) else [f"norm {norm}, not {expected}"]
        return factor if factor < 1 else None, wrong

    def compare(self) -> Iterator[str]:
        """What of masters, moments and parameters is not that of one process."""
        for p in self.optimizer.sharded_parameters:
            number, whole = int(p.name), self.params[int(p.name)].detach()
            want, own = self.reference.values(number), slice(p.start, p.stop)
            if not self.same(number, p.master, want.view(-1)[own]):
                yield f"parameter {number}: its master is {self.distance}"
            for key, value in p.state.items():
                if key != "step" and not torch.equal(value, self.reference.state(number, key).view(-1)[own]):
                    yield f"parameter {number}: {key} differs"
            if not torch.equal(whole.view(-1)[own], p.master.to(whole.dtype)):
                yield f"parameter {number} is not its master"
            if not self.same(number, whole, want.to(whole.dtype)):
                yield f"parameter {number} is {self.distance}"

    def same(self, number: int, ours: Tensor, theirs: Tensor) -> bool:
        """Bit by bit, or for other forms of Newton-Schulz near enough that no wrong element could hide."""
        distance = float((ours.float() - theirs.float()).norm())
        allowed = 0.0
        if not self.case.exact and self.case.weights[number].rule is not None:
            # Of the norm of the updates: an update of another matrix would be 1.4 times it away.
            allowed = self.moved[number] + 1e-2 * float(theirs.float().norm()) * (ours.dtype != torch.float32) + 1e-6
        self.distance = f"{distance} away, and may be {allowed}"
        return distance <= allowed if allowed else torch.equal(ours, theirs)

    def reload(self) -> None:
        """Another optimizer over the same parameters, which goes on from the state of this one."""
        state = {key: value for key, value in self.optimizer.state_dict().items()}
        state["state"] = {
            name: {k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()}
            for name, own in state["state"].items()
        }
        self.build()
        self.optimizer.load_state_dict(state)


def run_case(rank: int, world: int, case: RunCase) -> str:
    """One case on a rank of the pool: what is wrong, or "" (for ranks outside of the case's world, too)."""
    group = groups_of(world)[case.world - 1]
    if rank >= case.world:
        return ""
    run = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = Run(case, rank, group)
            for step in range(case.steps):
                if step and step == case.reload:
                    run.reload()
                wrong = run.step(step)
                # What one rank finds wrong in its shards must end the case on all.
                everywhere: list[list[str]] = [[]] * case.world
                dist.all_gather_object(everywhere, wrong, group=group)
                if any(everywhere):
                    return "\n".join(wrong) or "another rank found something"
        return ""
    except Exception:
        return traceback.format_exc()
    finally:
        if run is not None:
            run.optimizer.close()


def largest_update(weight: Weight, reference: OneProcess) -> float:
    """About the norm of a parameter's update at rate 1."""
    return math.sqrt(sum((reference.ratio(*m.shape) ** 2) * min(m.shape) for m in weight.spec(0).matrices()))


@lru_cache(maxsize=1)
def groups_of(world: int) -> list[dist.ProcessGroup]:
    """Of the first one, two, ... ranks."""
    return [dist.new_group(list(range(size))) for size in range(1, world + 1)]
