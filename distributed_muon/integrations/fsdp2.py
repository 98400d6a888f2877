"""Muon for FSDP2 and DTensor: parameters stay the sharded ones of `fully_shard` and `parallelize_module`.

FSDP2 reduces gradients into the shards and gathers parameters from them. What is left is a layout to read
(fsdp2_layout.py), this rank's shards to follow from step to step (fsdp2_shards.py), and the engine's step on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from distributed_muon.checkpoint.view import CheckpointView
from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.options import Options, as_groups, check_choice, parameter_names, tensor_spec
from distributed_muon.engine.report import local_report, step_report
from distributed_muon.engine.state import Member, Part
from distributed_muon.engine.step import ShardedStep
from distributed_muon.integrations.fsdp2_layout import read_shards
from distributed_muon.integrations.fsdp2_shards import Domain, LocalShard, flat_shard, pair_up
from distributed_muon.layout.plan import Plan


class FullyShardedMuon(torch.optim.Optimizer):
    """Muon on hidden matrices and AdamW on the rest, over parameters that are DTensors.

    Construct it after `fully_shard` (and `parallelize_module`), which replace every Parameter, with groups from
    `muon_param_groups(model)`. Every matrix is orthogonalized on one rank of its mesh, replicas included.
    Construction, `step`, `clip_grad_norm_` and `step_report` are collective over `process_group`; `state_dict` and
    `load_state_dict` are not. State exists from construction, as DTensors placed like their parameter ("master"
    for bfloat16 parameters, whose fp32 masters are kept here), so torch.distributed.checkpoint saves it and loads it
    on other meshes.

    Where all parameters are plain still, as Accelerate wants it, which shards them in `prepare()` and puts the shards
    into the groups, construction waits until state is asked for or a step taken.

    `p.grad` is what is stepped: clipping and unscaling write into it, as torch's own do, and so may others.

    Args:
        params: parameters or groups, as torch.optim takes them, best from `muon_param_groups(model)`: only then is it
            noticed that the model has other parameters now, or still uses gathered ones.
        lr: learning rate, of Muon and AdamW groups.
        process_group: ranks that take part in one model: norms are over all of them, and they skip steps together.
            None is the default group.
        nonfinite: "raise" FloatingPointError on a gradient with inf or nan, or "skip" that step; the state is
            untouched either way.
        options: every other option of `engine.options.Options`.

    Raises:
        ValueError: an option or parameter that cannot be right; the message names it.
        RuntimeError: ranks disagree about names, shapes, placements or options.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = Options.lr,
        *,
        process_group: dist.ProcessGroup | None = None,
        nonfinite: str = "raise",
        **options: Any,
    ) -> None:
        self._options = Options.of({"lr": lr, **options})
        check_choice("nonfinite", nonfinite, ("raise", "skip"))
        self._sealed, self._process_group, self._nonfinite = False, process_group, nonfinite
        # The model's order, where it keeps its parameters, and a weak reference to it.
        self._order, self._places = getattr(params, "order", {}), getattr(params, "places", {})
        self._model = getattr(params, "model", lambda: None)
        self._domains: list[Domain] = []
        self._facts: dict[str, Any] = {}
        super().__init__(self._options.complete(as_groups(params)), {})
        self._sealed = True
        if any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            self._attach()

    def _attach(self) -> None:
        """Plan and make state, once; collective over the process group."""
        if self._domains:
            return
        members = _members(self.param_groups, self._order)
        self.collectives = Collectives(self._process_group)
        everyone = dist.get_process_group_ranks(self.collectives.group)
        by_ranks: dict[tuple[int, ...], list[Member]] = {}
        for member in members:
            ranks = sorted(everyone.index(rank) for rank in member.param.device_mesh.mesh.flatten().tolist())
            by_ranks.setdefault(tuple(ranks), []).append(member)
        teams = {ranks for own in self.collectives.gather_objects(list(by_ranks)) for ranks in own}
        apart = self.collectives.subgroups(sorted(teams - {tuple(range(len(everyone)))}))
        for ranks in sorted(by_ranks):
            domain = self._domain(by_ranks[ranks], apart.get(ranks, self.collectives))
            self._domains.append(domain)
            self._state.update({shard.record.param: shard.state for shard in domain.shards})
        alone = len(self._domains) == 1 and self._domains[0].engine.collectives.size == self.collectives.size
        self._several = not all(self.collectives.gather_objects(alone))

    def _domain(self, members: list[Member], collectives: Collectives) -> Domain:
        """The engine and shards of parameters whose meshes have the ranks of `collectives`; collective over them."""
        order = dist.get_process_group_ranks(collectives.group)
        specs, columns = zip(
            *(read_shards(member.spec, member.param, order, tensor) for tensor, member in enumerate(members)),
            strict=True,
        )
        members = [member._replace(spec=spec) for member, spec in zip(members, specs, strict=True)]
        parts, device = [], members[0].param.to_local().device
        with torch.no_grad():
            for member, column in zip(members, columns, strict=True):
                shard = column[collectives.rank]
                parts.append(Part.over([shard], [0], flat_shard(member.param, member.spec.name)) if shard else None)
        places = [f"{m.spec.name} at {m.param.placements} of {m.param.device_mesh.mesh.tolist()}" for m in members]
        engine = ShardedStep(members, self.param_groups, self._options, collectives, device, also=places)
        # The load that domains before this one put on each of its ranks.
        own = sum(d.engine.plan.ns_flops_by_rank[d.engine.collectives.rank] for d in self._domains)
        engine.attach(
            [[column[rank] for column in columns if column[rank]] for rank in range(len(order))],
            [part for part in parts if part is not None],
            busy=collectives.gather_objects(own),
        )
        return Domain(engine, [LocalShard(*pair) for pair in zip(engine.parameters, parts, strict=True)])

    @property
    def state(self) -> dict[Any, dict[str, Tensor]]:
        """State by parameter, made when first asked for after parameters were sharded."""
        if not self._domains and self._sealed and isinstance(self.param_groups[0]["params"][0], DTensor):
            self._attach()
        for domain in self._domains:
            domain.engine.settle()
        return self._state

    @state.setter
    def state(self, value: dict[Any, dict[str, Tensor]]) -> None:
        self._state = value

    @property
    def plans(self) -> list[Plan]:
        """The plan of every rank domain this rank is in."""
        return [domain.engine.plan for domain in self._domains]

    # ---- one step ------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step from the parameters' reduced gradients; collective over the process group.

        Args:
            closure: recomputes the loss with gradients enabled, as in torch.optim.

        Returns:
            The closure's loss, or None.

        Raises:
            FloatingPointError: a gradient has an inf or nan (with nonfinite="raise"); no state changed.
            RuntimeError: the model has other parameters than at construction; no state changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._attach()
        strangers = self._replaced()
        for domain in self._domains:
            domain.follow(self.state)
        view = self._agree(bool(strangers))
        if view.strangers:
            raise RuntimeError(
                f"parameter {(strangers or ['of another rank'])[0]!r} is no longer the model's, which load_state_dict("
                "assign=True), fully_shard and the like replace: build the optimizer anew after them"
            )
        if view.nonfinite and self._nonfinite == "raise":
            self._refuse_nonfinite()
        for domain, present in zip(self._domains, view.present, strict=True):
            if not view.nonfinite:
                domain.engine.step(present)
                domain.publish()
            domain.release_gradients()
            domain.engine.close()
        self._facts = {"grad_norm": view.norm, "skipped": view.nonfinite}
        return loss

    def _replaced(self) -> list[str]:
        """Names of parameters the model does not use any more; gathered ones it still uses are resharded."""

        def elsewhere() -> list[str]:
            out = []
            for domain in self._domains:
                for record in (shard.record for shard in domain.shards if shard.record.name in self._places):
                    kept, leaf = self._places[record.name]
                    if kept.get(leaf) is not record.param:
                        out.append(record.name)
            return out

        # After a forward without backward the root keeps gathered weights: the next forward would use those.
        model = self._model()
        if model is not None and elsewhere():
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return elsewhere()

    def _agree(self, strangers: bool = False) -> _View:
        """One view of all gradients on every rank: an all-reduce per domain, one more where there are several."""
        self._attach()
        for domain in self._domains:
            domain.take_gradients()
        found = [domain.agree(strangers) for domain in self._domains]
        square, strangers = sum(a.square for a in found), any(a.flags[0] for a in found)
        if self._several:
            leads = [d.engine.collectives.rank == 0 for d in self._domains]
            own = sum(a.square for a, lead in zip(found, leads, strict=True) if lead)
            device = self._domains[0].engine.device
            wide = torch.float32 if device.type == "mps" else torch.float64
            total = self.collectives.all_reduce(torch.tensor([own, strangers], dtype=wide, device=device)).tolist()
            square, strangers = total[0], total[1] > 0
        return _View(square, strangers, [a.present for a in found])

    def _refuse_nonfinite(self) -> None:
        names = [name for domain in self._domains for name in domain.engine.nonfinite()]
        for domain in self._domains:
            domain.release_gradients()
        raise FloatingPointError(
            f"gradient of parameter {(names or ['of another rank'])[0]!r} has inf or nan ({len(names)} in all "
            'here): the step was not taken and no state changed; pass nonfinite="skip" to skip such steps'
        )

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scale the gradients so that their global 2-norm, each element counted once, is at most `max_norm`.

        Collective over the process group; other than torch's, it takes parameters on different meshes.

        Returns:
            The global norm before; inf or nan where a gradient is, and then nothing is scaled.
        """
        if not max_norm >= 0:
            raise ValueError(f"max_norm={max_norm} must be >= 0")
        norm = self._agree().norm
        factor = max_norm / (norm + 1e-6)  # torch.nn.utils.clip_grad_norm_'s
        if factor < 1 and norm < float("inf"):
            self._scale_gradients(factor)
        return norm

    @torch.no_grad()
    def unscale_gradients(self, inv_scale: float) -> bool:
        """Multiply the gradients by `inv_scale`; `distributed_muon.GradScaler` calls it. Collective over the group.

        Returns:
            Whether any rank's gradient has an inf or nan.
        """
        nonfinite = self._agree().nonfinite
        self._scale_gradients(inv_scale)
        return nonfinite

    def _scale_gradients(self, factor: float) -> None:
        grads = [p.grad.to_local() for group in self.param_groups for p in group["params"] if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)
        for domain in self._domains:
            domain.release_gradients()

    # ---- report --------------------------------------------------------------------------------------

    def step_report(self) -> dict[str, Any]:
        """What the last step did, as `DistributedMuon.step_report` has it; collective over the process group.

        FSDP2's own traffic is not counted.
        """
        return step_report([domain.engine for domain in self._domains], **self._facts)

    def local_report(self) -> dict[str, Any]:
        """`step_report()` without what is measured per matrix; no collective."""
        return local_report([domain.engine for domain in self._domains], **self._facts)

    def track(self, *names: str) -> None:
        """Choose what every step measures per matrix: any of "update_rms" (the default) and "orthogonality"."""
        for domain in self._domains:
            domain.engine.measures.choose(*names)

    # ---- state ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy a state dict of the same parameters and placements into the state; no collective.

        torch.distributed.checkpoint.state_dict.set_optimizer_state_dict calls it with what it loaded for this mesh.
        Options of the groups are restored as well. Load the model too: where its values are not the rounded masters,
        the masters follow it.

        Raises:
            ValueError: the state is of other parameters, or placed otherwise; nothing was changed.
        """
        saved_groups, saved_state = state_dict["param_groups"], state_dict["state"]
        counts = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in saved_groups] != counts:
            raise ValueError("the saved state has other parameter groups: build the groups of the earlier run")
        names = parameter_names(self.param_groups)
        pairs: list[tuple[Tensor, Tensor]] = []
        for group, own, saved in zip(self.param_groups, names, saved_groups, strict=True):
            for name, param, key in zip(own, group["params"], saved["params"], strict=True):
                pairs += pair_up(name, self.state.get(param, {}), saved_state.get(key, {}))
        for mine, theirs in pairs:
            mine.copy_(theirs)
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})
        for domain in self._domains:
            domain.engine.rebind()
            for shard in domain.shards:
                shard.version = None

    @torch.no_grad()
    def checkpoint_view(self) -> CheckpointView:
        """What `checkpoint.save` and `load` work on; collective where no step was taken after sharding yet."""
        self._attach()
        strangers = self._replaced()
        for domain in self._domains:
            domain.follow(self.state)

        def restored(steps: int) -> None:
            for domain in self._domains:
                domain.publish()
                domain.engine.rebind()

        engines = [domain.engine for domain in self._domains]
        problem = (
            f"parameter {strangers[0]!r} is no longer the model's: build the optimizer anew" if strangers else None
        )
        steps = max((int(p.state["step"]) for e in engines for p in e.parameters if "step" in p.state), default=0)
        place = ("fsdp2", engines, self.collectives, self.param_groups, steps)
        return CheckpointView(*place, restored, steady=True, problem=problem)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor adds groups: homes are fixed there."""
        if getattr(self, "_sealed", False):
            raise RuntimeError("add_param_group() after construction: homes are fixed; build a new optimizer")
        super().add_param_group(param_group)


@dataclass
class _View:
    """What all ranks know of this step: the norm's square, whether a parameter was replaced, gradients by domain."""

    square: float
    strangers: bool
    present: list[list[bool]]

    @property
    def norm(self) -> float:
        return self.square**0.5

    @property
    def nonfinite(self) -> bool:
        return not self.square < float("inf")


def _members(groups: Sequence[Mapping[str, Any]], order: Mapping[str, int]) -> list[Member]:
    """Every parameter, in the model's order where that is known."""
    names, members = parameter_names(groups), []
    for index, group in enumerate(groups):
        for name, param in zip(names[index], group["params"], strict=True):
            if not isinstance(param, DTensor):
                raise ValueError(
                    f"parameter {name!r} is no DTensor: leave it out of ignored_params, build the optimizer after "
                    "fully_shard, and call model.reshard() if a forward left it gathered"
                )
            if param.dtype == torch.float16:
                raise ValueError(
                    f"parameter {name!r} is float16: keep the model in float32 and give fully_shard "
                    "MixedPrecisionPolicy(param_dtype=torch.float16)"
                )
            members.append(Member(tensor_spec(name, param, group), param, index))
    return sorted(members, key=lambda member: order.get(member.spec.name, 0))
