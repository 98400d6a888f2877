"""One training run at toy size: its description, and what it measured.

A `Run` says everything that decides the numbers, so equal runs have equal results and a kept result is found again by
its `Run`. What is trained: the trainers' models in fp32 with Newton-Schulz in bf16, 20 tokens per parameter (embedding
and head not counted), 512 tokens a step, 2.5 % of the steps warmup, then a cosine to a tenth of the peak rate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from distributed_muon import DistributedMuon, muon_param_groups
from distributed_muon.layout.matrices import Whole
from launch.data import BYTE_VOCAB, load_data
from launch.models import CausalLM, build_model, huggingface, update_expert_bias
from launch.schedule import warmup_cosine
from launch.validation import validation_loss
from launch.world import World

SIZES = {"small": (64, 2), "medium": (96, 3), "large": (128, 4)}  # hidden size, layers
BATCH, SEQUENCE, TOKENS_PER_PARAMETER, WARMUP, FINAL_LR = 4, 128, 20, 0.025, 0.1
POINTS, VALIDATION_SAMPLES = 50, 64  # validations of a run, and their samples
EXPERT_BIAS_RATE = 1e-2
REPORT_RMS = 0.2  # of an update of hidden matrices, over the learning rate (arXiv 2502.16982, section 2.2)


@dataclass(frozen=True)
class Run:
    """What decides a run's numbers.

    Args:
        kind, size: "dense" or "moe", and a key of SIZES.
        optimizer: of hidden matrices, "muon" or "adamw"; the others have AdamW.
        lr: peak learning rate of all parameters.
        share: of the steps that 20 tokens per parameter make.
        weight_decay: of matrices; norms have none.
        update_rms: what Muon's updates are scaled to have, over the learning rate.
        scale: the side of a matrix that decides its scale: "max", the longer one, or "hidden", the model's hidden size.
        adamw: pattern of names that stay with AdamW under Muon; "" is none.
        fused_qkv: query, key and value of an attention are one matrix.
        start: the run whose weights this one fine-tunes, on other data.
    """

    kind: str = "dense"
    size: str = "small"
    optimizer: str = "muon"
    lr: float = 2e-3
    seed: int = 0
    share: float = 1.0
    weight_decay: float = 0.1
    update_rms: float = REPORT_RMS
    scale: str = "max"
    adamw: str = ""
    fused_qkv: bool = False
    start: Run | None = None

    @classmethod
    def read(cls, values: dict[str, Any]) -> Run:
        """The run that `asdict` made `values` of."""
        return cls(**{**values, "start": values["start"] and cls.read(values["start"])})

    @property
    def name(self) -> str:
        """A file name: what is not the default, after the parts that every run has."""
        words = [self.kind, self.size, self.optimizer, f"lr{self.lr:g}", f"seed{self.seed}"]
        defaults = asdict(Run())
        for key, value in asdict(self).items():
            if key not in ("kind", "size", "optimizer", "lr", "seed", "start") and value != defaults[key]:
                words.append(f"{key}{value}".replace("*", ""))
        return "-".join(words + (["after", self.start.optimizer] if self.start else []))

    @property
    def parameters(self) -> int:
        """All but embedding and head."""
        return _parameters(self.kind, self.size)

    @property
    def steps(self) -> int:
        return round(self.share * TOKENS_PER_PARAMETER * self.parameters / (BATCH * SEQUENCE))

    @property
    def flops(self) -> float:
        """Of the model over the run: 6 per parameter and token, all experts counted; the optimizer's apart."""
        return 6.0 * self.parameters * self.steps * BATCH * SEQUENCE


@cache
def _parameters(kind: str, size: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for name, p in build(Run(kind, size)).named_parameters() if not _outer(name))


def build(run: Run) -> CausalLM:
    """The model at its start; feed-forward 3 x hidden wide, experts half a hidden."""
    hidden, layers = SIZES[run.size]
    sizes = {"vocab_size": BYTE_VOCAB, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4,
             "max_position_embeddings": SEQUENCE, "intermediate_size": 3 * hidden}  # fmt: skip
    if run.kind == "dense":
        model = build_model("dense", **sizes, num_key_value_heads=2, head_dim=hidden // 4)
    else:
        model = build_model(
            "moonlight", **sizes, kv_lora_rank=hidden // 2, qk_nope_head_dim=hidden // 8, qk_rope_head_dim=8,
            v_head_dim=hidden // 8, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=hidden // 2,
        )  # fmt: skip
    if run.fused_qkv:
        for layer in model.layers:
            fuse_qkv(layer.self_attn)
    return model


class Rows(nn.Module):
    """A linear layer whose weight is some rows of another layer's."""

    def __init__(self, whole: nn.Linear, start: int, rows: int) -> None:
        super().__init__()
        self._whole = (whole,)  # in a tuple, so that its weight is registered only once
        self._start, self._rows = start, rows

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._whole[0].weight.narrow(0, self._start, self._rows))


def fuse_qkv(attention: nn.Module) -> None:
    """Make query, key and value rows of one parameter `qkv.weight`, with the same values; in place."""
    names = ("q_proj", "k_proj", "v_proj")
    weights = [getattr(attention, name).weight for name in names]
    attention.qkv = nn.Linear(weights[0].shape[1], sum(map(len, weights)), bias=False)
    attention.qkv.weight = nn.Parameter(torch.cat([weight.detach() for weight in weights]))
    start = 0
    for name, weight in zip(names, weights, strict=True):
        setattr(attention, name, Rows(attention.qkv, start, len(weight)))
        start += len(weight)


def make_optimizer(run: Run, model: CausalLM) -> DistributedMuon:
    """The run's optimizer; as in the trainers, norms do not decay under either."""
    overrides: dict[str, Any] = {run.adamw: "adamw"} if run.adamw else {}
    if run.fused_qkv:
        overrides["*.qkv.weight"] = Whole()
    groups = muon_param_groups(model, overrides=overrides, vector_weight_decay=0.0)
    if run.optimizer == "adamw":
        groups = [{**group, "algorithm": "adamw", "matrices": None} for group in groups]
    elif run.update_rms != REPORT_RMS or run.scale != "max":
        groups = [one for group in groups for one in _rescaled(run, group)]
    return DistributedMuon(groups, lr=run.lr, weight_decay=run.weight_decay)


def _rescaled(run: Run, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parameters of a Muon group with rates that give the run's update RMS; lr x decay stays what it was."""
    if group["algorithm"] != "muon":
        yield group
        return
    for name, param in group["params"]:
        factor = run.update_rms / REPORT_RMS
        if run.scale == "hidden":
            factor *= math.sqrt(SIZES[run.size][0] / max(param.shape[-2:]))
        rates = {"lr": run.lr * factor, "weight_decay": run.weight_decay / factor}
        yield {"algorithm": "muon", "params": [(name, param)], **rates}


def train(run: Run, weights: Path, compiled: bool = False) -> dict[str, Any]:
    """Do a run on one thread.

    Args:
        run: what to do.
        weights: folder with a Hugging Face checkpoint per run, for fine-tuning; this run's is added.
        compiled: use torch.compile, which needs a C++ compiler and rounds differently.

    Returns:
        "run" as a dictionary; "curve", rows of (step, validation loss, RMS of hidden weights, RMS of their change in
        that step over the learning rate); "entropy" and "weight_rms" by matrix; "newton_schulz_flops" of the whole run.
    """
    torch.set_num_threads(1)
    data = load_data(finetuning_data() if run.start else [], SEQUENCE, seed=run.seed)
    torch.manual_seed(run.seed)
    model = build(run)
    if run.start is not None:
        if not (weights / run.start.name).exists():
            train(run.start, weights, compiled)
        huggingface.load_weights(model, weights / run.start.name)
    optimizer = make_optimizer(run, model)
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, run.steps, round(WARMUP * run.steps), FINAL_LR))
    forward = torch.compile(model) if compiled else model
    world, curve, every = World(0, 1, torch.device("cpu")), [], run.steps / POINTS
    for step in range(run.steps):
        forward(*data.batch(step, 0, 0, 1, size=BATCH, accumulation=1)).backward()
        optimizer.clip_grad_norm_(1.0)
        validates = (step + 1) // every > step // every or step + 1 == run.steps
        before = [matrix.detach().clone() for matrix in _hidden(model)] if validates else []
        optimizer.step()
        if validates:
            factor = schedule.get_last_lr()[0] / optimizer.param_groups[0]["initial_lr"]
            moved = [matrix.detach() - old for matrix, old in zip(_hidden(model), before, strict=True)]
            loss = validation_loss(forward, data, world, VALIDATION_SAMPLES, BATCH)
            curve.append((step + 1, loss, _rms(_hidden(model)), _rms(moved) / (factor * run.lr)))
        optimizer.zero_grad()
        schedule.step()
        update_expert_bias(model, EXPERT_BIAS_RATE)
    if not run.fused_qkv and not (weights / run.name).exists():  # whose names no other model has
        huggingface.save(model, weights / run.name)
    return {
        "run": asdict(run),
        "curve": curve,
        "entropy": {name: entropy(matrix) for name, matrix in hidden_matrices(model)},
        "weight_rms": {name: _rms([matrix]) for name, matrix in hidden_matrices(model)},
        "newton_schulz_flops": optimizer.plan.ns_flops_total * run.steps,
    }


def finetuning_data() -> list[Path]:
    """Text that pretraining has not seen, of the same kind: the source of torch.nn."""
    return [Path(nn.__file__).parent]


def _hidden(model: nn.Module) -> list[Tensor]:
    return [param for name, param in model.named_parameters() if param.ndim >= 2 and not _outer(name)]


def _outer(name: str) -> bool:
    return "embed" in name or "lm_head" in name


def _rms(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().square().sum()) for t in tensors) / sum(t.numel() for t in tensors))


def entropy(matrix: Tensor) -> float:
    """Of the singular values: H = -sum(q log q) / log(n), q = sigma^2 / sum sigma^2."""
    squares = torch.linalg.svdvals(matrix.double()).square()
    share = (squares / squares.sum()).clamp(min=1e-30)
    return float(-(share * share.log()).sum() / math.log(len(share)))


def hidden_matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every matrix that is orthogonalized by itself, with a name: experts, and gate and up of each, apart."""
    for name, param in model.named_parameters():
        if param.ndim < 2 or _outer(name):
            continue
        for expert, matrix in enumerate(param.detach().unbind(0) if param.ndim == 3 else [param.detach()]):
            parts = {"gate": 0, "up": 1} if "gate_up" in name else {"": 0}
            for (part, _), block in zip(parts.items(), matrix.chunk(len(parts)), strict=True):
                tags = [str(expert)] * (param.ndim == 3) + [part] * bool(part)
                yield (f"{name}[{','.join(tags)}]" if tags else name), block


def weight_group(name: str) -> str:
    """Which row of the entropy table a matrix of `hidden_matrices` belongs to."""
    if "self_attn" in name:
        return "attention"
    if name.endswith("mlp.gate.weight"):
        return "router"
    if "shared_experts" in name:
        return "shared expert"
    if "experts." in name:
        return "experts, " + ("gate" if name.endswith("gate]") else "up" if name.endswith("up]") else "down")
    return "dense feed-forward"


def group_means(values: dict[str, float]) -> dict[str, float]:
    """Mean by `weight_group` of values by matrix."""
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in values.items():
        groups[weight_group(name)].append(value)
    return {group: sum(some) / len(some) for group, some in groups.items()}
