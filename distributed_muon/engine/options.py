"""Every option of the optimizer once: its default, its meaning, and the check that refuses what cannot be right."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distributed_muon.engine.coefficients import coefficient_table
from distributed_muon.engine.update import ADJUST_LR_FNS
from distributed_muon.layout.matrices import TensorSpec, Whole
from distributed_muon.layout.plan import STRATEGIES

ALGORITHMS = ("muon", "adamw")
_WHOLE = Whole()
# What every group has, and what each algorithm reads beside that. AdamW's carry torch.optim.AdamW's names.
_OF_EVERY_GROUP = ("algorithm", "lr", "weight_decay")
_OF_ALGORITHM = {
    "muon": ("matrices", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn", "update_scale"),
    "adamw": ("betas", "eps"),
}


@dataclass(frozen=True)
class Options:
    """Options that every integration takes, by keyword.

    The first block may differ by parameter group and, but for the shape of the Newton-Schulz iteration, between
    steps. Names and meaning are torch.optim.Muon's.

    Args:
        lr, weight_decay: of Muon and AdamW groups; decay is decoupled, p * (1 - lr * weight_decay).
        momentum, nesterov: of Muon; an exponential moving average, m = momentum * m + (1 - momentum) * g.
        ns_coefficients: (a, b, c), one triple per step, or a table's name (`coefficients.COEFFICIENTS`).
        eps: of Newton-Schulz; guards the zero matrix only, for inputs are scaled first.
        ns_steps: iterations of Newton-Schulz.
        adjust_lr_fn: factor on a matrix's rate, "match_rms_adamw" (0.2 * sqrt(max(rows, cols)), which lets
            AdamW's learning rate carry over), "original" (sqrt(max(1, rows / cols))), "spectral"
            (sqrt(max(rows, cols))) or "unit_rms_norm" (sqrt(rows / cols)).
        update_scale: one more factor on every update of Muon, not on the decay.
        betas, adamw_eps: of AdamW groups, which hold them as "betas" and "eps" like torch.optim.AdamW's.
        ns_form: "standard" is bit-identical to torch.optim.Muon on CPUs; "gram"; "auto", the faster by shape. "gram" is
            for long matrices, to which "auto" gives it: with the tables "polar_express" and "cans", bf16's rounding can
            make it blow up a small square matrix that is nearly singular.
        ns_table: file of `python -m perf.newton_schulz --tune`, which names the kernels of "gram" and "auto" for the
            device at hand; read at construction. None: the table shipped (`kernels.table`).
        ns_dtype: of Newton-Schulz and of what travels for it: torch.bfloat16 or torch.float32.
        strategy: "home", "gather" or "auto" (`layout.plan.make_plan`).
        zero_gradients: what a gradient of zeros on all ranks means where a framework turns missing gradients into
            zeros: "update" (momentum decays and goes on moving the parameter, at full size under Muon) or "skip" (as
            torch.optim treats a missing gradient: no step, no decay, no change of state; one more all-reduce).

    Raises:
        ValueError: an option that cannot be right; the message names it.
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: Any = "quintic"
    eps: float = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: str = "match_rms_adamw"
    update_scale: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    adamw_eps: float = 1e-8
    ns_form: str = "auto"
    ns_table: str | None = None
    ns_dtype: torch.dtype = torch.bfloat16
    strategy: str = "auto"
    zero_gradients: str = "update"

    def __post_init__(self) -> None:
        check_choice("ns_form", self.ns_form, ("auto", "standard", "gram"))
        check_choice("ns_dtype", self.ns_dtype, (torch.bfloat16, torch.float32))
        check_choice("strategy", self.strategy, STRATEGIES)
        check_choice("zero_gradients", self.zero_gradients, ("update", "skip"))

    @staticmethod
    def of(given: Mapping[str, Any]) -> Options:
        """Options from keywords; raises a ValueError that names an unknown one and the nearest known."""
        known = [field.name for field in dataclasses.fields(Options)]
        for name in given:
            if name not in known:
                raise ValueError(f"{name} is no option of this optimizer: {nearest(name, known)}")
        return Options(**given)

    def complete(self, groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The parameter groups with every option of their algorithm; what a group has itself wins.

        Raises:
            ValueError: an option that cannot be right or that the group's algorithm does not read.
        """
        out = []
        for index, group in enumerate(groups):
            algorithm = group.get("algorithm", "muon")
            check_choice("algorithm", algorithm, ALGORITHMS)
            whole: dict[str, Any] = {}
            for name in (*_OF_EVERY_GROUP, *_OF_ALGORITHM[algorithm]):
                own = "adamw_eps" if (algorithm, name) == ("adamw", "eps") else name
                whole[name] = getattr(self, own, {"algorithm": algorithm}.get(name))
            whole.update(group)
            check_group(index, whole)
            out.append(whole)
        return out


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameters, (name, parameter) pairs or groups, as torch.optim takes them, as groups."""
    if isinstance(params, Tensor):
        raise TypeError("params is one tensor: give an iterable of parameters, of (name, parameter) pairs, or groups")
    items = list(params)
    return [dict(i) for i in items] if not items or isinstance(items[0], Mapping) else [{"params": items}]


def nearest(name: str, known: Sequence[str]) -> str:
    """The way out for an unknown name."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(known)}"


def check_choice(option: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise a ValueError naming the option unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{option}={value!r} is unknown: choose one of {', '.join(map(str, allowed))}")


def check_group(index: int, group: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first option of a complete parameter group that cannot be right."""
    algorithm, where = group["algorithm"], f"of parameter group {index}"
    other = "adamw" if algorithm == "muon" else "muon"
    for option in _OF_ALGORITHM[other]:
        if group.get(option) is not None and option not in _OF_ALGORITHM[algorithm]:
            raise ValueError(f"{option}={group[option]} {where}: {algorithm} groups take no {option}, leave it out")
    for option in ("lr", "weight_decay", "momentum", "eps", "update_scale"):
        if option in group and not float(group[option]) >= 0:
            raise ValueError(f"{option}={group[option]} {where} must be >= 0")
    if algorithm == "adamw":
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas={group['betas']} {where} must be two numbers in [0, 1)")
        return
    if not group["momentum"] < 1:
        raise ValueError(f"momentum={group['momentum']} {where} must be below 1")
    check_choice("adjust_lr_fn", group["adjust_lr_fn"], ADJUST_LR_FNS)
    coefficient_table(group["ns_coefficients"], group["ns_steps"])


def parameter_names(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The names of every group's parameters, "group.position" where they were given without.

    Raises:
        ValueError: two parameters have the same name.
    """
    out = [
        list(group.get("param_names") or (f"{index}.{i}" for i in range(len(group["params"]))))
        for index, group in enumerate(groups)
    ]
    flat = [name for names in out for name in names]
    if len(set(flat)) < len(flat):
        raise ValueError("parameter names are not unique: pass the (name, tensor) pairs of one model")
    return out


def tensor_spec(
    name: str, param: nn.Parameter, group: Mapping[str, Any], shape: Sequence[int] | None = None
) -> TensorSpec:
    """The planner's view of one whole parameter, by its global shape; a ValueError names it where it is unsupported.

    Args:
        shape: of the whole parameter, where `param` is a placeholder; None: its own.
    """
    shape = tuple(param.shape if shape is None else shape)
    if param.is_meta:
        raise ValueError(f"parameter {name!r} is on the meta device: load or initialize the model first")
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"parameter {name!r} is {param.dtype}: float32, bfloat16 and float16 are supported")
    if 0 in shape:
        raise ValueError(f"parameter {name!r} is empty: leave it out, or pass the model before a wrapper shards it")
    if not param.requires_grad:
        raise ValueError(f"parameter {name!r} is frozen: leave it out of the parameter groups")
    if group["algorithm"] == "adamw":
        return TensorSpec(name, shape)
    if len(shape) < 2:
        raise ValueError(
            f"parameter {name!r} of shape {shape} is no matrix: give its group algorithm='adamw', use "
            "muon_param_groups(model), or construct the optimizer before a wrapper flattens the model"
        )
    spec = TensorSpec(name, shape, group["matrices"] or _WHOLE)
    spec.matrices()
    return spec


def describe_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options without its parameters, equal on ranks that will take the same decisions."""
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}
