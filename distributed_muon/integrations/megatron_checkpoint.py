"""Optimizer state in the form of Megatron's sharded state dicts, that loads at any TP x PP x EP x DP.

State of a parameter is saved like the parameter: the rank that owns most of it brings the rest in from the other
data-parallel ranks and writes the whole (tensor-parallel) part under `distributed_muon.<state>.<model key>`. A
loading rank asks for the parameters of which it owns something and keeps its own elements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor, nn

from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.state import OwnedParameter
from distributed_muon.integrations.megatron_layout import Domain
from distributed_muon.layout.pieces import Shard

MASTER = "fp32_param"
_PREFIX = "distributed_muon"
# What makes a saved group that of this run: all that Megatron goes by (fewer in 0.16), but experts may be dense there.
_IDENTITY = ("algorithm", *sorted({*ParamGroupOverride.__annotations__, "optimizer", "lr_mult", "is_decoupled_lr"}))
_SCHEDULED = ("lr", "weight_decay")

Sharded = ShardedTensor | ShardedTensorFactory


def saved_state(parameter: OwnedParameter) -> dict[str, Tensor]:
    """fp32 1-D state of a parameter that a checkpoint holds; its master only where that is not the parameter."""
    named = {MASTER if key == "master" else key: value for key, value in parameter.saved.items()}
    named.pop("step", None)
    return named


def export_shards(
    domain: Domain, model_sharded_state_dict: Mapping[str, Any], is_loading: bool
) -> dict[str, dict[str, Sharded]]:
    """{parameter name: {state: sharded tensor}} of what this rank writes, or asks for.

    Collective over the data-parallel group unless loading.

    Args:
        model_sharded_state_dict: holds every parameter itself as data (Megatron's sharded_state_dict does).

    Raises:
        ValueError: it lacks a parameter.
    """
    by_param = _by_parameter(model_sharded_state_dict)
    owners, data_rank = _owners(domain), domain.ranks.data_rank
    whole: dict[str, dict[int, Tensor]] = {}
    if not is_loading:
        for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", MASTER):
            whole[key] = _gather_to_owners(domain, key, owners)
    held = {tensor for tensors in whole.values() for tensor in tensors}
    tensors: dict[str, dict[str, Sharded]] = {}
    for parameter in domain.owned if is_loading else [domain.engine.parameters[tensor] for tensor in sorted(held)]:
        if parameter.param not in by_param:
            raise ValueError(
                f"the model's sharded state dict lacks parameter {parameter.name!r}: pass that of every chunk"
            )
        like = by_param[parameter.param]
        copy = 0 if owners[parameter.tensor] == data_rank else 1 + data_rank
        tensors[parameter.name] = {
            key: _like(
                like, f"{_PREFIX}.{key}", whole[key][parameter.tensor] if whole else _empty(parameter.param), copy
            )
            for key in saved_state(parameter)
        }
    return tensors


def import_shards(
    owned: Sequence[OwnedParameter], loaded: Mapping[str, Mapping[str, Tensor]], step: int, partial: bool = False
) -> None:
    """Copy this rank's elements out of whole parameters' state.

    Args:
        step: AdamW's. partial: let state that was not loaded start from zero, and masters from the parameters.
    """
    for parameter in owned:
        values = loaded.get(parameter.name, {})
        for key, target in saved_state(parameter).items():
            if key in values:
                target.copy_(values[key].reshape(-1)[parameter.start : parameter.stop])
            elif not partial:
                raise ValueError(f"the checkpoint has no {key} of parameter {parameter.name!r}")
            elif key == MASTER:
                target.copy_(parameter.values)
            else:
                target.zero_()
        if "step" in parameter.state:
            parameter.state["step"].fill_(step if not partial or "exp_avg" in values else 0)


def export_own(owned: Sequence[OwnedParameter]) -> dict[str, dict[str, Any]]:
    """The state of this rank's elements by parameter name; references to live tensors."""
    return {parameter.name: {"shard": (parameter.start, parameter.stop), **parameter.saved} for parameter in owned}


def import_own(owned: Sequence[OwnedParameter], saved: Mapping[str, Any], place: tuple[int, int]) -> None:
    """Copy what `export_own` returned back, bit by bit.

    Raises:
        ValueError: it belongs to another rank, world size or cut of the buffers; nothing was changed.
    """
    mine = {name: (state["shard"], set(state)) for name, state in export_own(owned).items()}
    theirs = {name: (tuple(state["shard"]), set(state)) for name, state in saved["state"].items()}
    if tuple(saved["place"]) != place or mine != theirs:
        raise ValueError(
            "state_dict() belongs to one rank of one parallelism, and this is another: save sharded_state_dict()"
        )
    for parameter in owned:
        for key, value in parameter.saved.items():
            value.copy_(saved["state"][parameter.name][key])


def import_groups(param_groups: Sequence[dict[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[str]:
    """Restore the options of every group from the saved one of its identity.

    Returns:
        A line for every option of this run that gives way, and for every group that the checkpoint does not have and
        that keeps this run's options.
    """
    said = []
    for number, group in enumerate(param_groups):
        alike = [other for other in saved if all(other.get(key) == group.get(key) for key in _IDENTITY)]
        if not alike:
            known = ", ".join(f"{key}={group[key]}" for key in _IDENTITY if group.get(key) is not None)
            said.append(f"the checkpoint has no parameter group with {known}: group {number} keeps this run's options")
            continue
        same = max(alike, key=lambda other: sum(other.get(key) == value for key, value in group.items()))
        kept = {key: value for key, value in same.items() if key != "is_expert_parallel"}
        said += [
            f"{key}={value} of parameter group {number} ({group['algorithm']}) is the checkpoint's; {group[key]} of "
            "this run is not used"
            for key, value in kept.items()
            if key in group and key not in _SCHEDULED and group[key] != value
        ]
        group.update(kept)
    return said


def load_megatron_checkpoint(path: str, optimizer: Any, model_sharded_state_dict: Mapping[str, Any]) -> str:
    """Take over the optimizer state of a checkpoint that Megatron's own Muon or AdamW wrote in torch_dist format.

    Momentum, AdamW's moments and masters are kept where the checkpoint has them; Muon momentum that it lacks (it
    was AdamW's matrix) starts at zero, masters that it lacks from the model's parameters. Load the model first.
    Collective over the world.

    Args:
        path: the checkpoint's directory. optimizer: from `get_distributed_muon_optimizer`.
        model_sharded_state_dict: of the model chunks.

    Returns:
        One line that says how many parameters kept what, on this rank.

    Raises:
        ValueError: the checkpoint holds no state of this rank's parameters in a known form.
    """
    child = optimizer.chained_optimizers[0]
    child.take_over = path
    request = child.sharded_state_dict(model_sharded_state_dict, is_loading=True)
    loaded = dist_checkpointing.load({"param_state": request["param_state"]}, path, validate_access_integrity=False)
    return child.take_state(loaded["param_state"], dist_checkpointing.load_common_state_dict(path))


def is_foreign(path: str) -> bool:
    """Whether a torch_dist checkpoint has an optimizer's state, but not ours."""
    keys = dist_checkpointing.load_tensors_metadata(path)
    ours = any(key.startswith(f"{_PREFIX}.") for key in keys)
    return not ours and any("optimizer." in key for key in keys)


def foreign_request(path: str, request: Mapping[str, Mapping[str, Sharded]]) -> dict[str, dict[str, Sharded]]:
    """What of a request the checkpoint of another optimizer has, under its keys; collective over the world.

    Raises:
        ValueError: the checkpoint is our own, or holds no state per parameter.
    """
    saved = set(dist_checkpointing.load_tensors_metadata(path))
    if any(key.startswith(f"{_PREFIX}.") for key in saved):
        raise ValueError(f"{path} is a checkpoint of distributed_muon: load it as it is, without take_over")
    found = {
        name: {key: at for key, sharded in state.items() if (at := _in_checkpoint(sharded, saved)) is not None}
        for name, state in request.items()
    }
    if not any(Collectives(None).gather_objects(any(found.values()))):
        raise ValueError(f"{path} holds no optimizer state per parameter: save it with a fully reshardable format")
    return found


def import_foreign(owned: Sequence[OwnedParameter], loaded: Mapping[str, Any], common: Any) -> tuple[int, str]:
    """Copy what another optimizer's checkpoint had; the step, and a line that says what was kept.

    Args:
        loaded: by parameter, of a `foreign_request`. common: what the checkpoint holds beside tensors.
    """
    step = _find_step(common)
    import_shards(owned, loaded, step, partial=True)
    kept = Counter(key for parameter in owned for key in loaded.get(parameter.name, ()))
    wanted = Counter(key for parameter in owned for key in saved_state(parameter))
    told = ", ".join(f"{key} of {kept[key]}/{count}" for key, count in sorted(wanted.items()))
    return step, (
        f"{told} parameters; what was missing starts at zero (masters: at the parameters); options are this run's"
    )


def _in_checkpoint(sharded: Sharded, saved: set[str]) -> Sharded | None:
    """The request under the key that the checkpoint has for it: chained optimizers and masters have several."""
    theirs = f"optimizer.state.{sharded.key.removeprefix(_PREFIX + '.')}"
    for head in ("", *(f"chained_{index}." for index in range(4))):
        for key in (theirs, theirs.replace(f".{MASTER}.", ".param.")):
            candidate = replace(sharded, key=head + key)
            if all(tensor.key in saved for tensor in _built(candidate)):
                return candidate
    return None


def _built(sharded: Sharded) -> list[ShardedTensor]:
    built = sharded.build() if isinstance(sharded, ShardedTensorFactory) else sharded
    return list(nested_values(built)) if isinstance(built, (dict, list)) else [built]


def _find_step(state: Any) -> int:
    """The largest AdamW step anywhere in a checkpoint's common state."""
    if isinstance(state, dict):
        own = [int(value) for key, value in state.items() if key in ("step", "common_step") and _is_number(value)]
        return max([*own, *(_find_step(value) for value in state.values())], default=0)
    return max((_find_step(value) for value in state), default=0) if isinstance(state, list) else 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def _by_parameter(model_sharded_state_dict: Mapping[str, Any]) -> dict[nn.Parameter, Sharded]:
    values = nested_values(model_sharded_state_dict)
    return {
        value.data: value for value in values if isinstance(value, Sharded) and isinstance(value.data, nn.Parameter)
    }


def _like(like: Sharded, prefix: str, data: Tensor, copy: int) -> Sharded:
    """The model's sharded tensor with other data; `copy` replaces the data-parallel place in the replica id."""
    fields: dict[str, Any] = {
        "key": f"{prefix}.{like.key}",
        "data": data.view(like.data.shape),
        "replica_id": (*like.replica_id[:-1], copy),
    }
    if isinstance(like, ShardedTensor):
        fields["dtype"] = data.dtype
    return replace(like, **fields)


def _empty(param: Tensor) -> Tensor:
    return torch.empty(param.shape, dtype=torch.float32, device=param.device)


def _owners(domain: Domain) -> list[int]:
    """Per parameter, the data-parallel rank that holds most of it."""
    held: list[dict[int, int]] = [{} for _ in domain.members]
    for rank, shards in enumerate(domain.cut):
        for shard in shards:
            held[shard.tensor][rank] = held[shard.tensor].get(rank, 0) + shard.stop - shard.start
    return [max(ranks, key=lambda rank: (ranks[rank], -rank)) for ranks in held]


def _gather_to_owners(domain: Domain, key: str, owners: Sequence[int]) -> dict[int, Tensor]:
    """The whole local state of the parameters this rank owns most of; collective over the data-parallel group."""
    parameters, data_rank = domain.engine.parameters, domain.ranks.data_rank
    states = [saved_state(parameter) for parameter in parameters]
    wanted = [key in state for state in states]
    ranks = range(len(domain.cut))
    sends = [[s for s in domain.cut[data_rank] if wanted[s.tensor] and owners[s.tensor] == peer] for peer in ranks]
    recvs = [[s for s in domain.cut[peer] if wanted[s.tensor] and owners[s.tensor] == data_rank] for peer in ranks]
    device = domain.engine.device
    sent = torch.cat([torch.empty(0, device=device), *(states[s.tensor][key] for shards in sends for s in shards)])
    received = torch.empty(sum(map(_count, recvs)), device=device)
    Collectives(domain.ranks.data_parallel).all_to_all(
        received, sent, list(map(_count, recvs)), list(map(_count, sends))
    ).wait()
    whole: dict[int, Tensor] = {}
    arrived = [shard for shards in recvs for shard in shards]
    for shard, values in zip(arrived, received.split([s.stop - s.start for s in arrived]), strict=True):
        flat = whole.setdefault(shard.tensor, _empty(parameters[shard.tensor].param).view(-1))
        flat[shard.start : shard.stop] = values
    return whole


def _count(shards: Sequence[Shard]) -> int:
    return sum(shard.stop - shard.start for shard in shards)
