"""The sharded step: Muon on matrices, AdamW on the rest, for every integration.

Algorithm 1 of the Moonlight report (arXiv 2502.16982, section 2.3), with one home per matrix. Each rank owns slices
g, m, p of the gradients, momenta and masters; G is a rank's whole gradient, G' and U are whole matrices:

    g  = reduce_scatter(G, dp)                the adapter, before `step`
    g' = momentum(g, m, mu)                   `step`, on whole flat shards
    G' = gather(g', dp)                       `_wave`, up to its first yield: slices travel to the matrix's home
    U  = newton_schulz(G')                    `_wave`, up to its second yield: at the home
    p  = p*(1 - lr*wd) - lr*scale*U[slice]    `step` decays whole flat shards, `_wave` adds what came back
    P  = all_gather(p, dp)                    the adapter, after `step` or after a wave
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from distributed_muon.engine.agreement import Agreement, check_same_everywhere
from distributed_muon.engine.binding import Batch, Binding, BoundWave, ShardGradients
from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.measure import Measures
from distributed_muon.engine.newton_schulz import orthogonalize_stacks
from distributed_muon.engine.options import Options, describe_group
from distributed_muon.engine.state import Member, OwnedParameter, Part, own_parameters
from distributed_muon.engine.team import orthogonalize_block
from distributed_muon.engine.timing import StepTimer, Times
from distributed_muon.engine.update import adamw_update, advance_momentum, apply_update, decay, pack_momentum
from distributed_muon.engine.workspace import Workspace
from distributed_muon.kernels.table import KernelTable
from distributed_muon.layout.cost_model import NewtonSchulzCost, hardware_of
from distributed_muon.layout.memory import slot_elements
from distributed_muon.layout.pieces import Layout, Shard
from distributed_muon.layout.plan import Plan, make_plan

# Bindings kept: a model whose unused experts change from step to step comes back to few sets of active tensors.
_MOST_BINDINGS = 4


class ShardedStep:
    """One rank's part of a step over one rank domain.

    An adapter says which tensors there are (here) and who holds which elements (`attach`), points every part at this
    rank's mean gradient, calls `step`, and takes the updated masters from the parts.

    Args:
        members: the domain's parameters in forward order, alike on all its ranks.
        param_groups: complete groups (`Options.complete`); read in every step.
        options: of the whole optimizer. collectives: over the domain.
        device: of the exchange and Newton-Schulz; parts may lie elsewhere, on the host.
        also: further lines that must be equal on all ranks.

    Attributes:
        parameters: one record per member, after `attach`. parts: this rank's memory. plan: homes and waves.
        timer: of phases and collectives. measures: what is measured per matrix.
        ns_calls: matrices this rank orthogonalized since the last `close`.
        times, counted: what `close` took.
        settle: waits until nobody reads the moments any more; whoever changes them, or hands them out, calls it first.

    Raises:
        RuntimeError: ranks disagree about names, shapes, dtypes or options. Construction is collective.
    """

    def __init__(
        self,
        members: Sequence[Member],
        param_groups: Sequence[Mapping[str, Any]],
        options: Options,
        collectives: Collectives,
        device: torch.device,
        also: Sequence[str] = (),
    ) -> None:
        self.members, self.param_groups, self.options = members, param_groups, options
        self.collectives, self.device = collectives, device
        self.timer = collectives.timer = StepTimer(device)
        self.kernels = KernelTable.load(options.ns_table, device, options.ns_dtype)
        lines = [f"options {options}", f"kernel table {self.kernels.source}"]
        lines += [*(f"group {i} {describe_group(g)}" for i, g in enumerate(param_groups))]
        each = (f"parameter {m.spec}, {m.param.dtype}, group {m.group}" for m in members)
        check_same_everywhere(collectives, chain(lines, each, also))
        collectives.warm_up(device)
        self.ns_calls, self.measures = 0, Measures()
        self.times: Times | None = None
        self.counted: dict[str, Any] = {}
        self.settle: Callable[[], None] = lambda: None

    def attach(
        self,
        shards: Sequence[Sequence[Shard]],
        parts: Sequence[Part],
        tp_ranks: Sequence[int] | None = None,
        busy: Sequence[int] = (),
    ) -> None:
        """Plan over the domain and allocate moments; collective over the domain.

        Args:
            shards: per domain rank, what it holds; this rank's are those of `parts`, in their order.
            parts: this rank's memory. tp_ranks: per domain rank, its tensor-parallel rank; None without.
            busy: FLOPs that plans of other domains gave to each rank, to be balanced against.
        """
        options, self.parts = self.options, list(parts)
        muon = [group["ns_steps"] for group in self.param_groups if group["algorithm"] == "muon"]
        self.plan: Plan = make_plan(
            Layout.build([member.spec for member in self.members], shards, tp_ranks),
            options.strategy,
            NewtonSchulzCost(max(muon, default=5), options.ns_form, options.ns_dtype.itemsize),
            # Sharing a matrix changes the order of sums, which "standard" promises not to.
            teams=options.ns_form == "auto",
            hardware=hardware_of(self.device.type),
            busy=busy,
        )
        algorithms = [self.param_groups[member.group]["algorithm"] for member in self.members]
        place = self.parts[0].master.device if self.parts else self.device
        self.parameters: list[OwnedParameter] = own_parameters(self.members, algorithms, parts, place)
        self._schedule = self.plan.schedule(self.collectives.rank)
        sizes = slot_elements(self.plan)[:, self.collectives.rank].tolist()
        self._workspace = Workspace(sizes, options.ns_dtype, self.device)
        teams = list(dict.fromkeys(self.plan.teams.values()))
        self.teams = self.collectives.subgroups(teams, "team") if teams else {}
        self._gradients = ShardGradients(self.parts)
        self.rebind()

    # ---- one step --------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, active: Sequence[bool] | None = None, after_wave: Callable[[int], None] = lambda wave: None) -> None:
        """One step of every active tensor from the parts' gradients, which are not written; collective.

        Args:
            active: per tensor, whether it has a gradient on any rank, alike on all ranks; the others keep their
                state. None: all, or with zero_gradients="skip" those whose gradient is not zero everywhere.
            after_wave: called with the number of each wave whose masters are up to date, and before them with -1
                once AdamW's are; all when the last wave's results are on their way. What it sends must not get ahead
                of the exchange: collectives of a communicator run in the order in which they were started.
        """
        if active is None:
            active = self.nonzero() if self.options.zero_gradients == "skip" else [True] * len(self.members)
        bound = self._bind(tuple(active))
        self.measures.clear()
        self.settle()
        with self._workspace:
            with self.timer("momentum"):
                for run in bound.flat:
                    group = self.param_groups[run.group]
                    advance_momentum(run.moments["momentum_buffer"], run.grads, group["momentum"])
                    decay(run.masters, float(group["lr"]), group["weight_decay"])
            flights: deque[tuple[int, Iterator[None]]] = deque()
            done = deque([-1])
            for number, wave in enumerate([*bound.waves, None, None]):
                if wave is not None:  # send this wave's slices,
                    flights.append((number, self._wave(wave)))
                    next(flights[-1][1])
                if number == 0:
                    self._adamw(bound)  # under the way of the first ones
                if 1 <= number <= len(bound.waves):  # meanwhile orthogonalize the wave before,
                    next(flights[number - flights[0][0] - 1][1])
                if number >= 2:  # and finish the one whose results have travelled under that
                    finished, flight = flights.popleft()
                    next(flight, None)
                    done.append(finished)
                while number >= len(bound.waves) and done:
                    after_wave(done.popleft())

    def _wave(self, wave: BoundWave) -> Iterator[None]:
        with self.timer("momentum", wave.title):
            for views in wave.packed:
                group = self.param_groups[views.group]
                momenta, options = views.moments["momentum_buffer"], (group["momentum"], group["nesterov"])
                for some in views.chunks:
                    pack_momentum(views.grads[some], momenta[some], views.others[some], *options, views.staged[some])
            _copy(*wave.copies)
        wave.to_homes.start()
        yield
        with self.timer("gather_wait", wave.title):
            wave.to_homes.wait()
        with self.timer("newton_schulz", wave.title):
            _copy(*wave.unpacked)
            for batch in wave.batches:
                self._orthogonalize(batch)
        with self.timer("scatter_pack", wave.title):
            _copy(*wave.returned)
        wave.from_homes.start()
        yield
        with self.timer("scatter_wait", wave.title):
            wave.from_homes.wait()
        with self.timer("update", wave.title):
            for ratio, views in wave.updates:
                lr = float(self.param_groups[views.group]["lr"])
                for some in views.chunks:
                    apply_update(views.masters[some], views.others[some], lr, ratio, views.staged[some])

    def _orthogonalize(self, batch: Batch) -> None:
        """Newton-Schulz of stacks, or of this rank's block of one matrix, in place."""
        logical = [self.plan.layout.matrices[stack.matrices[0]].logical_shape for stack in batch.stacks]
        if batch.team:
            team, ((block,),) = self.teams[batch.team], [stack.whole for stack in batch.stacks]
            tall, options = logical[0][0] > logical[0][1], {"dtype": self.options.ns_dtype, "eps": batch.eps}
            block.copy_(orthogonalize_block(block, tall, team, coefficients=batch.table, **options))
            self.ns_calls += team.rank == 0
        else:
            options = {"form": self.options.ns_form, "eps": batch.eps, "kernels": self.kernels}
            stacks, scratch = [stack.whole for stack in batch.stacks], self._workspace.scratch
            orthogonalize_stacks(stacks, batch.memory, batch.table, scratch=scratch, **options)
            self.ns_calls += sum(map(len, stacks))
        for stack, shape in zip(batch.stacks, logical, strict=True):
            self.measures.take(stack.matrices, stack.whole, shape, stack.ratio)

    def _adamw(self, bound: Binding) -> None:
        with self.timer("adamw"):
            for run in bound.adamw:
                group = self.param_groups[run.group]
                adamw_update(
                    run.masters,
                    run.grads,
                    run.moments["exp_avg"],
                    run.moments["exp_avg_sq"],
                    run.steps,
                    lr=float(group["lr"]),
                    # Schedulers that cycle momentum write it into every group; AdamW's is its first beta.
                    betas=(group.get("momentum", group["betas"][0]), group["betas"][1]),
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                )
            if bound.adamw_steps:  # of every rank, whether it owns any of the parameter or not
                torch._foreach_add_(bound.adamw_steps, 1)

    # ---- binding ---------------------------------------------------------------------------------------

    def rebind(self) -> None:
        """Make all views anew: shards, moments, step counters or options that shape the iteration have changed."""
        self._bindings: dict[Any, Binding] = {}
        self._current: Binding | None = None

    def release_gradients(self) -> None:
        """Hold no view of the parts' gradients, so that a framework that makes them anew can free the old ones."""
        self._gradients.release()
        for bound in self._bindings.values():
            bound.release_gradients()

    def _bind(self, active: tuple[bool, ...]) -> Binding:
        shaping = tuple(
            tuple(map(repr, (g["ns_coefficients"], g["ns_steps"], g["eps"], g["adjust_lr_fn"], g["update_scale"])))
            for g in self.param_groups
            if g["algorithm"] == "muon"
        )
        key = (active, shaping)
        if key not in self._bindings:
            if len(self._bindings) == _MOST_BINDINGS:
                self._bindings.pop(next(iter(self._bindings)))
            place = (self.parts, self.parameters, self.param_groups)
            with self._workspace:
                self._bindings[key] = Binding(
                    self.plan, self._schedule, *place, active, self._workspace, self.collectives
                )
        bound = self._bindings[key]
        if bound is not self._current:
            bound.bind_runs()
            self._current = bound
        bound.look_up_gradients()
        return bound

    # ---- agreement and report --------------------------------------------------------------------------

    def agree(
        self, has_gradient: Sequence[bool], flags: Sequence[bool] = (), signal: Tensor | None = None
    ) -> Agreement:
        """One view of this step's gradients on all ranks; one all-reduce over the domain.

        Args:
            has_gradient: per tensor, on this rank. flags: anything that must lead to one decision.
            signal: () bool on the device, one flag more that the host need not know before the others'.

        Raises:
            RuntimeError: options of parameter groups, such as a scheduled lr, differ between ranks.
        """
        with self.timer("agreement"):
            options = [f"group {i} {describe_group(group)}" for i, group in enumerate(self.param_groups)]
            agreement = Agreement.reach(
                self.collectives, self._gradients.views(), has_gradient, flags, options, self.device, signal
            )
        if not agreement.same_options:
            check_same_everywhere(self.collectives, options)
        return agreement

    def nonfinite(self) -> list[str]:
        """Names of the parameters whose gradient has an inf or nan on any rank; collective over the domain."""
        bad = self._anywhere([~p.grad.isfinite().all() for p in self.parameters])
        return [p.name for p, found in zip(self.parameters, bad, strict=True) if found]

    def nonzero(self) -> list[bool]:
        """Per tensor, whether any rank's slice of its gradient has an element other than 0; one all-reduce.

        For frameworks that turn missing gradients into zeros: what is zero everywhere was frozen or not used, and
        stepping it would move it on at full size, since Newton-Schulz restores the size of a decaying momentum.
        """
        # Sums of sizes: one kernel for all on a GPU, and no square of a small number becomes 0.
        return self._anywhere([total != 0 for total in torch._foreach_norm([p.grad for p in self.parameters], 1)])

    def _anywhere(self, flags: Sequence[Tensor]) -> list[bool]:
        mine = torch.stack(list(flags)).to(self.device, torch.float32)
        return [count > 0 for count in self.collectives.all_reduce(mine).tolist()]

    def close(self) -> None:
        """End a step: what was counted and timed since the last call is what `engine.report` tells."""
        self.times = self.timer.take()
        self.counted = {"ns_calls": self.ns_calls, "bytes": dict(self.collectives.sent_bytes)}
        self.ns_calls = 0
        self.collectives.sent_bytes.clear()

    def measured(self) -> dict[str, dict[str, float]]:
        """What the last step measured, by matrix name; collective over the domain, not counted."""
        return self.measures.by_name(self.collectives, self.plan, self.device)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
