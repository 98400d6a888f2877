"""Optimizer state in the form of Megatron's sharded state dicts, that loads at any TP x PP x EP x DP.

State of a parameter is saved like the parameter: the rank that owns most of it brings the rest in from the other
data-parallel ranks and writes the whole (tensor-parallel) part under `distributed_muon.<state>.<model key>`. A
loading rank asks for the parameters of which it owns something and keeps its own elements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from distributed_muon.engine.collectives import Collectives
from distributed_muon.integrations.megatron_domain import MOMENTS, DomainStep, MasterShard
from distributed_muon.integrations.megatron_params import MarkedParameter

MASTER = "fp32_param"
_PREFIX = "distributed_muon"
_GROUP_KEYS = ("algorithm", "wd_mult", "lr_mult", "is_decoupled_lr")

Sharded = ShardedTensor | ShardedTensorFactory


def saved_keys(member: MarkedParameter) -> tuple[str, ...]:
    """State of a parameter that a checkpoint holds; its master only where that is not the parameter."""
    moments = MOMENTS["adamw" if member.spec.rule is None else "muon"]
    return moments if member.param.dtype == torch.float32 else (*moments, MASTER)


def export_shards(
    part: DomainStep, model_sharded_state_dict: Mapping[str, Any], is_loading: bool, prefix: str = _PREFIX
) -> dict[str, dict[str, Sharded]]:
    """{parameter name: {state: sharded tensor}} of what this rank writes, or asks for.

    Collective over the data-parallel group unless loading.

    Args:
        model_sharded_state_dict: holds every parameter itself as data (Megatron's sharded_state_dict does).

    Raises:
        ValueError: it lacks a parameter.
    """
    by_param = _by_parameter(model_sharded_state_dict)
    owners = _owners(part)
    data_rank = part.domain.coordinates[part.collectives.rank][0]
    whole: dict[str, dict[int, Tensor]] = {}
    if not is_loading:
        for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", MASTER):
            whole[key] = _gather_to_owners(part, key, owners, data_rank)
        wanted = sorted({tensor for tensors in whole.values() for tensor in tensors})
    else:
        wanted = [shard.tensor for shard in part.shards]
    tensors: dict[str, dict[str, Sharded]] = {}
    for tensor in wanted:
        member = part.members[tensor]
        if member.param not in by_param:
            raise ValueError(
                f"the model's sharded state dict lacks parameter {member.name!r}: pass that of every chunk"
            )
        like = by_param[member.param]
        copy = 0 if owners[tensor] == data_rank else 1 + data_rank
        tensors[member.name] = {
            key: _like(like, f"{prefix}.{key}", whole[key][tensor] if whole else _empty(member.param), copy)
            for key in saved_keys(member)
        }
    return tensors


def import_shards(
    shards: Sequence[MasterShard], loaded: Mapping[str, Mapping[str, Tensor]], step: int, partial: bool = False
) -> None:
    """Copy this rank's elements out of whole parameters' state.

    Args:
        step: AdamW's. partial: let state that was not loaded start from zero, and masters from the parameters.
    """
    for shard in shards:
        values = loaded.get(shard.member.name, {})
        for key in saved_keys(shard.member):
            target = shard.master if key == MASTER else shard.state[key]
            if key in values:
                target.copy_(values[key].reshape(-1)[shard.start : shard.stop])
            elif not partial:
                raise ValueError(f"the checkpoint has no {key} of parameter {shard.member.name!r}")
            elif key == MASTER:
                target.copy_(shard.own)
            else:
                target.zero_()
        if "step" in shard.state:
            shard.state["step"].fill_(step if not partial or "exp_avg" in values else 0)


def import_groups(param_groups: Sequence[dict[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Restore the options of every group from the saved one of its kind; experts may be dense after resharding."""
    for group in param_groups:
        kind = [group[key] for key in _GROUP_KEYS]
        alike = [other for other in saved if [other[key] for key in _GROUP_KEYS] == kind]
        if not alike:
            raise ValueError(f"the saved state has no parameter group with {dict(zip(_GROUP_KEYS, kind, strict=True))}")
        same = next((o for o in alike if o["is_expert_parallel"] == group["is_expert_parallel"]), alike[0])
        group.update({key: value for key, value in same.items() if key != "is_expert_parallel"})


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
    saved = set(dist_checkpointing.load_tensors_metadata(path))
    request: dict[str, dict[str, Sharded]] = {}
    for part in child.parts:
        for name, state in export_shards(part, model_sharded_state_dict, True, prefix="optimizer.state").items():
            found = {key: _in_checkpoint(sharded, saved) for key, sharded in state.items()}
            request[name] = {key: sharded for key, sharded in found.items() if sharded is not None}
    kept = Counter(key for state in request.values() for key in state)
    if not any(Collectives(None).gather_objects(sum(kept.values()))):
        raise ValueError(f"{path} holds no optimizer state per parameter: save it with a fully reshardable format")
    loaded = dist_checkpointing.load(request, path, validate_access_integrity=False)
    step = _find_step(dist_checkpointing.load_common_state_dict(path))
    with torch.no_grad():
        import_shards(child.shards, loaded, step, partial=True)
        for part in child.parts:
            part.write_parameters()
    child.steps = step
    wanted = Counter(key for name in request for key in saved_keys(_member(child, name)))
    told = ", ".join(f"{key} of {kept[key]}/{count}" for key, count in sorted(wanted.items()))
    return f"kept from {path}: {told} parameters; what was missing starts at zero (masters: at the parameters)"


def _member(child: Any, name: str) -> MarkedParameter:
    return next(member for member in child.members if member.name == name)


def _in_checkpoint(sharded: Sharded, saved: set[str]) -> Sharded | None:
    """The request under the key that the checkpoint has for it: chained optimizers and masters have several."""
    for head in ("", *(f"chained_{index}." for index in range(4))):
        for key in (sharded.key, sharded.key.replace(f".{MASTER}.", ".param.")):
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


def _owners(part: DomainStep) -> list[int]:
    """Per parameter, the data-parallel rank that holds most of it."""
    held: list[dict[int, int]] = [{} for _ in part.members]
    for rank, shards in enumerate(part.cut):
        for shard in shards:
            held[shard.tensor][rank] = held[shard.tensor].get(rank, 0) + shard.stop - shard.start
    return [max(ranks, key=lambda rank: (ranks[rank], -rank)) for ranks in held]


def _gather_to_owners(part: DomainStep, key: str, owners: Sequence[int], data_rank: int) -> dict[int, Tensor]:
    """The whole local state of the parameters this rank owns; collective over the data-parallel group."""
    wanted = [key in saved_keys(member) for member in part.members]
    mine = {shard.tensor: shard.master if key == MASTER else shard.state.get(key) for shard in part.shards}
    sends = [[s for s in part.cut[data_rank] if wanted[s.tensor] and owners[s.tensor] == peer] for peer in _ranks(part)]
    recvs = [[s for s in part.cut[peer] if wanted[s.tensor] and owners[s.tensor] == data_rank] for peer in _ranks(part)]
    outgoing = [mine[shard.tensor] for shards in sends for shard in shards]
    sent = torch.cat(outgoing) if outgoing else torch.empty(0, device=part.device)
    received = torch.empty(sum(_count(shards) for shards in recvs), device=part.device)
    Collectives(part.domain.data_parallel).all_to_all(
        received, sent, [_count(shards) for shards in recvs], [_count(shards) for shards in sends]
    ).wait()
    whole: dict[int, Tensor] = {}
    at = 0
    for shard in (shard for shards in recvs for shard in shards):
        param = part.members[shard.tensor].param
        flat = whole.setdefault(shard.tensor, _empty(param).view(-1))
        flat[shard.start : shard.stop] = received[at : at + shard.stop - shard.start]
        at += shard.stop - shard.start
    return whole


def _ranks(part: DomainStep) -> Iterator[int]:
    return iter(range(len(part.cut)))


def _count(shards: Sequence[Any]) -> int:
    return sum(shard.stop - shard.start for shard in shards)
