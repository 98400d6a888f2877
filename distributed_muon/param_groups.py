"""Which parameters Muon updates, which AdamW updates, and why.

One decision per parameter, taken in this order, a later word beating an earlier one:

1. what the module declares (`matrix_rules()`), else the module's type, else the parameter's name;
2. `param.use_muon = False`;
3. the caller's `overrides`.

`muon_param_groups` turns the decisions into optimizer groups and `audit` into a table, so that the table
always shows what the optimizer does.
"""

from __future__ import annotations

import math
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from distributed_muon.engine.update import lr_ratio
from distributed_muon.layout.matrices import Conv, Experts, Matrix, MatrixRule, Split, TensorSpec, Whole

Override = str | MatrixRule  # "muon", "adamw", or a rule of distributed_muon.layout.matrices

# A head is a Linear by type, so only its place tells: by these names, outside the numbered layers ("output"
# and "head" mean other things inside them), or anywhere for the names no hidden layer has.
_HEAD_NAMES = {"head", "output", "output_layer", "embed_out", "unembed", "classifier", "score"}
_HEAD_NAMES_ANYWHERE = {"lm_head", "shared_head"}
_EMBEDDING_NAMES = re.compile(r"embed|^(wte|wpe)$")
_NORM_NAMES = re.compile(r"norm$|^(ln|norm)(_|\d|$)")
_NORM_CLASS = re.compile(r"Norm(?!al)(?!.*Linear)")  # not NormalizedX, not a norm fused with its Linear
_FUSED_QKV = re.compile(r"qkv|query_key_value|^c_attn$", re.IGNORECASE)
_FUSED_GATE_UP = re.compile(r"gate_?up", re.IGNORECASE)
# torch.nn.utils.parametrize (weight_norm, orthogonal) keeps what makes up a module's weight in a list inside of it.
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.(\w+)\..+$")


class Decision(NamedTuple):
    """Where a parameter goes; `algorithm` is "muon", "adamw", "frozen" or, to be overridden, "undecided"."""

    algorithm: str
    rule: MatrixRule | None
    reason: str


@dataclass(frozen=True)
class AuditRow:
    """One parameter of the audit table.

    Args:
        name: parameter name (the first one if it is tied). shape: its shape.
        algorithm: "muon", "adamw", "frozen", or "undecided" where an override has to say.
        matrices: the matrices Newton-Schulz is applied to; empty unless algorithm is "muon".
        scales: for each matrix, the factor on the learning rate (`adjust_lr_fn`).
        reason: what decided.
    """

    name: str
    shape: tuple[int, ...]
    algorithm: str
    matrices: tuple[Matrix, ...]
    scales: tuple[float, ...]
    reason: str

    @property
    def numel(self) -> int:
        return TensorSpec(self.name, self.shape).numel


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups that know in which order the model registers their parameters.

    Args:
        groups: as torch.optim takes them. model: of the parameters.
        names: of the model's parameters, in order, so that buckets follow the backward.

    Attributes:
        order: parameter name -> its number in the model.
        places: parameter name -> (the dictionary its module keeps it in, the name there), to notice a parameter that
            was replaced. model: weak reference.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], model: nn.Module, names: Iterable[str]) -> None:
        super().__init__(groups)
        self.order = {name: position for position, name in enumerate(names)}
        self.places: dict[str, tuple[dict[str, Any], str]] = {}
        for name in self.order:
            module, _, leaf = name.rpartition(".")
            self.places[name] = (model.get_submodule(module)._parameters, leaf)
        self.model = weakref.ref(model)


def muon_param_groups(
    model: nn.Module,
    *,
    overrides: Mapping[str, Override] | None = None,
    muon: Mapping[str, Any] | None = None,
    adamw: Mapping[str, Any] | None = None,
    vector_weight_decay: float | None = None,
) -> ParamGroups:
    """Parameter groups for `DistributedMuon`: hidden matrices to Muon, everything else to AdamW.

    Args:
        model: the model, on any device; after fully_shard for `integrations.fsdp2`. Frozen parameters are left out;
            tied ones appear once, under their first name.
        overrides: fnmatch pattern of parameter names -> "muon", "adamw" or a matrices rule; where several
            match, the last one counts.
        muon: options for every Muon group (lr, weight_decay, ...).
        adamw: options for every AdamW group.
        vector_weight_decay: weight decay of vectors (biases, norms), which get a group of their own; None
            treats them like other AdamW parameters.

    Returns:
        Groups with "params" as (name, parameter) pairs, "algorithm", and for Muon groups whose parameters
        are not one plain matrix each, the rule under "matrices" (one group per distinct rule).

    Raises:
        ValueError: no parameter goes to Muon; a parameter is flattened; an override matches
            nothing or does not fit; a fused parameter whose parts cannot be told.
    """
    names: list[str] = []
    muon_groups: dict[MatrixRule, dict[str, Any]] = {}
    adamw_groups: dict[bool, dict[str, Any]] = {}
    for name, param, decision in _decide(model, overrides or {}):
        if decision.algorithm == "undecided":
            raise ValueError(f"parameter {name!r}: {decision.reason}")
        if decision.algorithm == "frozen":
            continue
        if decision.rule is not None:
            declared = {} if decision.rule == Whole() else {"matrices": decision.rule}
            group = muon_groups.setdefault(
                decision.rule, {"params": [], "algorithm": "muon", **declared, **(muon or {})}
            )
        else:
            apart = vector_weight_decay is not None and _is_vector(param)
            decay = {"weight_decay": vector_weight_decay} if apart else {}
            group = adamw_groups.setdefault(apart, {"params": [], "algorithm": "adamw", **(adamw or {}), **decay})
        group["params"].append((name, param))
        names.append(name)
    if not muon_groups:
        raise ValueError(
            "model has no parameter for Muon: every one is a vector, an embedding, a head or frozen; "
            "see `python -m distributed_muon audit`, then say what is a matrix with overrides={pattern: 'muon'}"
        )
    return ParamGroups([*muon_groups.values(), *adamw_groups.values()], model, names)


def audit(
    model: nn.Module,
    *,
    overrides: Mapping[str, Override] | None = None,
    adjust_lr_fn: str = "match_rms_adamw",
) -> list[AuditRow]:
    """The decisions behind `muon_param_groups(model, overrides=overrides)`, one row per parameter.

    Args:
        model: the model; torch.device("meta") is enough.
        overrides: as in `muon_param_groups`.
        adjust_lr_fn: the scale rule shown, "match_rms_adamw" or "original".

    Raises:
        ValueError: as `muon_param_groups`, but undecided parameters and a model without Muon matrices are
            rows to read, not errors.
    """
    return [
        audit_row(name, whole_shape(param), *decision, adjust_lr_fn=adjust_lr_fn)
        for name, param, decision in _decide(model, overrides or {})
    ]


def audit_row(
    name: str, shape: tuple[int, ...], algorithm: str, rule: MatrixRule | None, reason: str, *, adjust_lr_fn: str
) -> AuditRow:
    """The audit row of one parameter of `shape` under `rule` (None unless algorithm is "muon")."""
    matrices = tuple(TensorSpec(name, shape, rule).matrices())
    scales = tuple(lr_ratio(m.rows, m.cols, adjust_lr_fn) for m in matrices)
    return AuditRow(name, shape, algorithm, matrices, scales, reason)


def format_audit(rows: list[AuditRow]) -> str:
    """The audit as an aligned text table, equal rows of numbered layers and experts folded, totals last."""
    folded: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        kinds = Counter((m.rows, m.cols, scale) for m, scale in zip(row.matrices, row.scales, strict=True))
        cells = (
            re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name),
            " x ".join(map(str, row.shape)) or "scalar",
            row.algorithm,
            " + ".join(f"{count} x ({rows} x {cols})" for (rows, cols, _), count in kinds.items()) or "-",
            " ".join(f"{scale:.3f}" for _, _, scale in kinds) or "-",
            row.reason,
        )
        folded[cells] += 1
    header = ("parameter", "count", "shape", "algorithm", "matrices", "scale", "reason")
    table = [header, *((cells[0], str(count), *cells[1:]) for cells, count in folded.items())]
    return "\n".join([format_table(table), "", _totals(rows)])


def format_table(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells as left-aligned columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _totals(rows: list[AuditRow]) -> str:
    parts = []
    for algorithm in ("muon", "adamw", "frozen", "undecided"):
        chosen = [row for row in rows if row.algorithm == algorithm]
        if not chosen and algorithm in ("frozen", "undecided"):
            continue
        matrices = f", {sum(len(row.matrices) for row in chosen)} matrices" if algorithm == "muon" else ""
        elements = sum(row.numel for row in chosen)
        parts.append(f"{algorithm}: {len(chosen)} parameters{matrices}, {elements:,} elements")
    return "total: " + "; ".join(parts)


def _decide(model: nn.Module, overrides: Mapping[str, Override]) -> Iterator[tuple[str, nn.Parameter, Decision]]:
    """(first name, parameter, decision) of every distinct parameter, in registration order."""
    _refuse_wrappers(model)
    places: dict[int, list[tuple[str, nn.Module]]] = {}
    params: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, param in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            parametrized = _PARAMETRIZED.search(name)
            owner = model.get_submodule(name[: parametrized.start()]) if parametrized else module
            _refuse_sharded(name, param)
            params[id(param)] = param
            places.setdefault(id(param), []).append((name, owner))
    declared = _declared_rules(model)
    for pattern in overrides:
        if not any(fnmatchcase(name, pattern) for owners in places.values() for name, _ in owners):
            raise ValueError(f"overrides pattern {pattern!r} matches no parameter of the model")
    vocabulary = _vocabulary_size(model)
    for key, param in params.items():
        names = [name for name, _ in places[key]]
        found = [_by_place(name, module, param, declared, vocabulary) for name, module in places[key]]
        decision = _merge_tied(found, names)
        if getattr(param, "use_muon", None) is False:
            decision = Decision("adamw", None, "use_muon is False")
        for pattern, value in overrides.items():
            if any(fnmatchcase(name, pattern) for name in names):
                decision = _asked(names[0], param, value, decision, f"override {pattern!r}")
        if not param.requires_grad:
            decision = Decision("frozen", None, "requires_grad is False")
        # Raises where the rule does not fit the shape.
        TensorSpec(names[0], whole_shape(param), decision.rule).matrices()
        yield names[0], param, decision


def _merge_tied(found: list[Decision], names: list[str]) -> Decision:
    """One decision for a parameter with several names: AdamW if any use of it is an AdamW one."""
    decision = next((d for d in found if d.algorithm == "adamw"), found[0])
    if len(names) > 1:
        return decision._replace(reason=f"{decision.reason}, tied to {', '.join(names[1:])}")
    return decision


def _by_place(
    name: str, module: nn.Module, param: Tensor, declared: Mapping[str, Override], vocabulary: int | None
) -> Decision:
    """The decision from where the parameter sits: declaration, module type, name."""
    if name in declared:
        return _asked(name, param, declared[name], None, "declared by matrix_rules()")
    if _is_vector(param):
        return Decision("adamw", None, "vector")
    plain = _PARAMETRIZED.sub(r"\1\2", name)
    return _by_type(plain, module, param, vocabulary) or _by_name(plain, module, param)


def _by_type(name: str, module: nn.Module, param: Tensor, vocabulary: int | None) -> Decision | None:
    """The decision the module's type allows; None where the type says nothing."""
    kind = type(module).__name__
    classes = [cls.__name__ for cls in type(module).__mro__]
    path = name.split(".")[:-1]
    if any("Embedding" in cls for cls in classes):
        return Decision("adamw", None, f"embedding ({kind})")
    if any(_NORM_CLASS.search(cls) for cls in classes):
        return Decision("adamw", None, f"norm ({kind})")
    if isinstance(module, nn.RNNBase):
        return Decision("adamw", None, f"recurrent gates ({kind})")
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1:
            return Decision("adamw", None, f"grouped convolution, not one matrix ({kind})")
        return Decision("muon", Conv(), f"convolution ({kind})")
    if isinstance(module, nn.MultiheadAttention) and name.endswith("in_proj_weight"):
        sizes = (module.embed_dim,) * 3
        return Decision("muon", Split(sizes, names=("q", "k", "v")), f"query, key and value apart ({kind})")
    if isinstance(module, nn.Linear) and module.out_features == vocabulary and not _in_numbered_layer(path):
        return Decision("adamw", None, "head: as many outputs as the vocabulary")
    return None


def _by_name(name: str, module: nn.Module, param: Tensor) -> Decision:
    """The decision for a matrix of a Linear or of a module of unknown type."""
    *path, leaf = name.split(".")
    kind = type(module).__name__
    own = [*path[-1:], leaf]  # the module's own name and the parameter's
    if _HEAD_NAMES_ANYWHERE.intersection([*path, leaf]):
        return Decision("adamw", None, "head by name")
    if _HEAD_NAMES.intersection(own) and not _in_numbered_layer(path):
        return Decision("adamw", None, "head by name")
    if not isinstance(module, nn.Linear):
        if any(_EMBEDDING_NAMES.search(part) for part in own):
            return Decision("adamw", None, "embedding by name")
        if any(_NORM_NAMES.search(part) for part in own):
            return Decision("adamw", None, "norm by name")
    if any(_FUSED_QKV.search(part) for part in own):
        return _undecided("looks like fused query, key and value: say how with overrides={name: QKV(...)}")
    if any(_FUSED_GATE_UP.search(part) for part in own):
        return _fused_gate_up(module, param)
    shape = whole_shape(param)
    if len(shape) == 2:
        return Decision("muon", Whole(), f"matrix ({kind})")
    if len(shape) == 3 and ("expert" in kind.lower() or any("expert" in part for part in own)):
        return Decision("muon", Experts(), f"expert stack ({kind})")
    return _undecided(f"{shape} is no known stack: say what it is with overrides={{name: ...}}")


def _fused_gate_up(module: nn.Module, param: Tensor) -> Decision:
    """Gate and up apart, where they are the two halves of the rows.

    A stack stored (experts, in, 2 x ffn) is left undecided: some models interleave its columns.
    """
    shape = whole_shape(param)
    rows = shape[-2]
    halves = Split((rows // 2, rows // 2), names=("gate", "up"))
    if len(shape) == 2 and isinstance(module, nn.Linear) and rows % 2 == 0:
        return Decision("muon", halves, "gate and up apart")
    down = getattr(module, "down_proj", None)
    if len(shape) == 3 and isinstance(down, Tensor) and whole_shape(down)[1:] == (shape[2], rows // 2):
        return Decision("muon", Experts(halves), "expert stack, gate and up apart")
    return _undecided("looks like fused gate and up: say how with overrides={name: Split(...)}")


def _undecided(reason: str) -> Decision:
    return Decision("undecided", None, reason)


def _asked(name: str, param: Tensor, value: Override, before: Decision | None, reason: str) -> Decision:
    """The decision someone asked for in words or as a rule."""
    if isinstance(value, MatrixRule):
        return Decision("muon", value, reason)
    if value == "adamw":
        return Decision("adamw", None, reason)
    if value != "muon":
        raise ValueError(f"{reason} of {name!r} is {value!r}: use 'muon', 'adamw' or a rule such as QKV(...)")
    if before is not None and before.rule is not None:
        return before._replace(reason=reason)
    if len(whole_shape(param)) != 2:
        raise ValueError(
            f"{reason}: {name!r} is {len(whole_shape(param))}-D: name its rule, such as Experts(), not 'muon'"
        )
    return Decision("muon", Whole(), reason)


def _declared_rules(model: nn.Module) -> dict[str, Override]:
    """Full parameter name -> what the innermost module's matrix_rules() declares for it."""
    declared: dict[str, Override] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not callable(getattr(module, "matrix_rules", None)):
            continue
        own = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        for leaf, rule in module.matrix_rules().items():
            if leaf not in own:
                owner = prefix or "the model"
                raise ValueError(f"matrix_rules() of {owner} names {leaf!r}, not a parameter of it")
            declared[f"{prefix}.{leaf}" if prefix else leaf] = rule
    return declared


def _vocabulary_size(model: nn.Module) -> int | None:
    """Rows of the largest embedding (smaller ones are positions or token types)."""
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return max(sizes, default=None)


def _in_numbered_layer(path: list[str]) -> bool:
    return any(part.isdigit() for part in path[:-1])


def _is_vector(param: Tensor) -> bool:
    """A parameter with at most one extent above 1, for which Newton-Schulz would only normalize."""
    shape = whole_shape(param)
    return len(shape) < 2 or math.prod(shape) == max(shape)


def whole_shape(param: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter; DeepSpeed's zero.Init leaves an empty placeholder that knows it."""
    return tuple(getattr(param, "ds_shape", param.shape))


def _refuse_wrappers(model: nn.Module) -> None:
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            "model is wrapped in FullyShardedDataParallel, which flattens matrices: pass the plain model; "
            "DistributedMuon shards optimizer state itself"
        )


def _refuse_sharded(name: str, param: Tensor) -> None:
    # torch marks FSDP1's flat parameters.
    if hasattr(param, "_is_flat_param") or 0 in whole_shape(param):
        raise ValueError(
            f"parameter {name!r} is a flattened or empty placeholder of FSDP1 or ZeRO-3: pass the unwrapped "
            "model (ZeRO-1 or DDP); DistributedMuon wants whole tensors on every rank"
        )
