"""The step of one rank domain of a Megatron job: Muon and AdamW on the shards that this rank owns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_muon.engine.agreement import check_same_everywhere
from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.sharded_muon import ShardedMuon
from distributed_muon.engine.timing import StepTimer
from distributed_muon.engine.update import adamw_update
from distributed_muon.integrations.megatron_layout import Domain, read_buffers
from distributed_muon.integrations.megatron_params import MarkedParameter
from distributed_muon.layout.cost_model import NewtonSchulzCost, hardware_of
from distributed_muon.layout.plan import make_plan

MOMENTS = {"muon": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


@dataclass(frozen=True, eq=False)
class MasterShard:
    """Flat elements [start, stop) of a parameter, owned by this rank.

    Args:
        member: the parameter. tensor: its number in the domain. start, stop: the elements.
        master: fp32 1-D; part of the parameter itself where that is fp32. Megatron's norm, clipping and counting
            read its `.grad` and the marks it carries.
        state: fp32 1-D moments, and for AdamW a 0-d "step".
    """

    member: MarkedParameter
    tensor: int
    start: int
    stop: int
    master: Tensor
    state: dict[str, Tensor]

    @property
    def own(self) -> Tensor:
        """The elements in the DDP parameter buffer, in the parameter's dtype; 1-D view."""
        return self.member.param.data.view(-1)[self.start : self.stop]

    @property
    def aliased(self) -> bool:
        """Whether the master is the parameter's own memory."""
        return self.member.param.dtype == torch.float32

    def take_gradient(self) -> None:
        """Let `master.grad` be the reduced mean gradient in fp32: a view of the DDP buffer where that is fp32."""
        self.master.grad = self.member.param.main_grad.view(-1)[self.start : self.stop].float()

    def adopt(self, values: Tensor) -> None:
        """Follow values written into the parameter; a master that rounds to its value keeps its precision."""
        if not self.aliased:
            kept = self.master.to(values.dtype) == values
            self.master.copy_(torch.where(kept, self.master, values.float()))


class DomainStep:
    """One rank's part of the dense or of the expert parameters.

    Args:
        members: the parameters of the domain in registration order, the same on all its ranks.
        groups: per member, the index of its parameter group. param_groups: the groups.
        buffers: the DDP buffers that hold them. domain: the ranks.
        ns_form, ns_dtype, strategy: as `DistributedMuon`. busy: FLOPs that the plans of other domains gave to
            global ranks, to be balanced against.

    Attributes:
        shards: what this rank owns. cut: every data-parallel rank's shards.
        plan, muon, collectives, timer: of the core.
        ns_flops: Newton-Schulz FLOPs per step by global rank.
    """

    def __init__(
        self,
        members: Sequence[MarkedParameter],
        groups: Sequence[int],
        param_groups: Sequence[Mapping[str, Any]],
        buffers: Sequence[Any],
        domain: Domain,
        *,
        ns_form: str,
        ns_dtype: torch.dtype,
        strategy: str,
        busy: Mapping[int, int],
    ) -> None:
        self.members, self._groups, self.domain = members, groups, domain
        self.collectives = Collectives(domain.group)
        check_same_everywhere(
            self.collectives,
            [f"parameter {m.spec}, {m.param.dtype}, group {g}" for m, g in zip(members, groups, strict=True)],
        )
        self.device = buffers[0].grad_data.device
        self.collectives.warm_up(self.device)
        self.timer = StepTimer(self.device)
        layout, self.cut = read_buffers(buffers, members, domain)
        steps = max((group["ns_steps"] for group in param_groups if group["algorithm"] == "muon"), default=5)
        ranks = dist.get_process_group_ranks(domain.group)
        # Sharing a matrix among ranks changes the order of sums, which "standard" promises not to.
        self.plan = make_plan(
            layout,
            strategy,
            NewtonSchulzCost(steps, ns_form, ns_dtype.itemsize),
            teams=ns_form == "auto",
            hardware=hardware_of(self.device.type),
            busy=[busy.get(rank, 0) for rank in ranks],
        )
        self.ns_flops = dict(zip(ranks, self.plan.ns_flops_by_rank, strict=True))
        data_rank, tensor_rank = domain.coordinates[self.collectives.rank]
        self.shards = self._allocate(data_rank, tensor_rank, [param_groups[g]["algorithm"] for g in groups])
        nothing = torch.empty(0, device=self.device)
        self.muon = ShardedMuon(
            self.plan,
            self.collectives,
            [shard.master for shard in self.shards],
            [shard.state.get("momentum_buffer", nothing) for shard in self.shards],
            device=self.device,
            ns_dtype=ns_dtype,
            ns_form=ns_form,
            timer=self.timer,
        )
        self._versions = self._parameter_versions()

    def _allocate(self, data_rank: int, tensor_rank: int, algorithms: Sequence[str]) -> list[MasterShard]:
        """Masters and zero moments of this rank's shards, each kind in one allocation."""
        for member in self.members:
            if member.param.dtype != torch.float32:  # what Megatron's parameter norm reads
                member.param.main_param, member.param.main_param_sharded = None, True
        owned = self.cut[data_rank]
        kinds = ["master" * (self.members[s.tensor].param.dtype != torch.float32) for s in owned]
        wanted = [(*MOMENTS[algorithms[s.tensor]], *filter(None, [kind])) for s, kind in zip(owned, kinds, strict=True)]
        pools: dict[str, Tensor] = {}
        for name in {name for names in wanted for name in names}:
            total = sum(s.stop - s.start for s, names in zip(owned, wanted, strict=True) if name in names)
            pools[name] = torch.zeros(total, dtype=torch.float32, device=self.device)
        shards = []
        for shard, names in zip(owned, wanted, strict=True):
            state = {}
            for name in names:
                state[name], pools[name] = pools[name].tensor_split([shard.stop - shard.start])
            member = self.members[shard.tensor]
            own = member.param.data.view(-1)[shard.start : shard.stop]
            master = state.pop("master", own)
            if master is not own:
                master.copy_(own)
            if algorithms[shard.tensor] == "adamw":
                state["step"] = torch.zeros(())
            _mark(master, member, counted=tensor_rank == 0 or not member.replicated)
            shards.append(MasterShard(member, shard.tensor, shard.start, shard.stop, master, state))
        return shards

    def step(self, param_groups: Sequence[Mapping[str, Any]]) -> None:
        """One step from `master.grad` into the parameter buffer's own slices; collective over the domain."""
        self._adopt_outside_writes()
        with self.timer("adamw"):
            for index, group in enumerate(param_groups):
                shards = [shard for shard in self.shards if self._groups[shard.tensor] == index]
                if group["algorithm"] == "adamw" and shards:
                    adamw_update(
                        [shard.master for shard in shards],
                        [shard.master.grad for shard in shards],
                        *([shard.state[key] for shard in shards] for key in ("exp_avg", "exp_avg_sq", "step")),
                        lr=float(group["lr"]),
                        betas=group["adamw_betas"],
                        eps=group["adamw_eps"],
                        weight_decay=group["weight_decay"],
                    )
        by_tensor = [param_groups[group] for group in self._groups]
        self.muon.step([shard.master.grad for shard in self.shards], by_tensor, [True] * len(self.members))
        self.write_parameters()

    def write_parameters(self) -> None:
        """Round the masters into this rank's slices of the parameter buffer."""
        copied = [shard for shard in self.shards if not shard.aliased]
        if copied:
            torch._foreach_copy_([shard.own for shard in copied], [shard.master for shard in copied])

    def _adopt_outside_writes(self) -> None:
        """Let masters follow parameters that others wrote since the last step, such as a loaded model."""
        versions = self._parameter_versions()
        for shard in self.shards:
            if versions[shard.tensor] != self._versions[shard.tensor]:
                shard.adopt(shard.own)
        self._versions = versions

    def _parameter_versions(self) -> list[int]:
        return [member.param._version for member in self.members]


def _mark(master: Tensor, member: MarkedParameter, *, counted: bool) -> None:
    """Tell Megatron's norm and zero counting, which go by attributes, whether these elements count.

    Counted elements are marked as a tensor-parallel cut and the others as shared: right for any TP, ETP and EP,
    where Megatron's own marks are read against one of the groups.
    """
    param = member.param
    master.shared = getattr(param, "shared", False) or not counted
    master.tensor_model_parallel = counted
    for name in ("allreduce", "grad_norm_group"):
        if hasattr(param, name):
            setattr(master, name, getattr(param, name))
    if param.dtype != torch.float32:
        param.main_param = master
