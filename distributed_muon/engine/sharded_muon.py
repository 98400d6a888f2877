"""Muon over any layout: momentum on shards, whole matrices only at their homes, updates back on shards.

    for each wave:   momentum on the pieces this rank holds
                     pieces -> homes (bf16)                       while the wave before is orthogonalized
                     Newton-Schulz, batched by shape
                     orthogonalized pieces -> holders             while the wave after is orthogonalized
                     decay and step on the master pieces

The adapters (native buckets, Megatron, DeepSpeed) only bring a plan and the flat shards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distributed_muon.engine.coefficients import coefficient_table
from distributed_muon.engine.collectives import Collectives
from distributed_muon.engine.exchange import Shipment, held_view, matrix_view
from distributed_muon.engine.newton_schulz import orthogonalize
from distributed_muon.engine.team import orthogonalize_block
from distributed_muon.engine.timing import StepTimer
from distributed_muon.engine.update import apply_update, lr_ratio, momentum_update
from distributed_muon.layout.plan import Plan, Transfer, Wave


@dataclass
class _WaveInFlight:
    """What one wave needs between its phases."""

    wave: Wave
    stacks: list[Tensor]  # (matrices, rows, cols) at their home: the gathered input, then the output
    homes: dict[int, Tensor]  # matrix -> its (rows, cols) of `stacks`; or block
    gather: Shipment
    scatter: Shipment | None = None


class ShardedMuon:
    """One rank's part of Muon over a plan.

    Args:
        plan: over the rank domain of `collectives`; the same on every rank.
        collectives: of that domain.
        masters: fp32 1-D, one per shard of this rank in the plan's layout; updated in place.
        momenta: fp32 1-D, same shapes; momentum of the exponential-moving-average form.
        device: of all tensors. ns_dtype: of Newton-Schulz and of the wire. ns_form: "auto", "standard" or "gram".
        timer: phases and collectives are added to it; `collectives` gets it.

    Attributes:
        ns_calls: matrices this rank orthogonalized since construction.
        track: which of {"update_rms", "orthogonality"} to measure at the homes in each step.
        measured: per tracked name, {matrix: 0-d fp32 square} of the last step, for this rank's homes; the
            squares of a team's blocks add up.
    """

    def __init__(
        self,
        plan: Plan,
        collectives: Collectives,
        masters: Sequence[Tensor],
        momenta: Sequence[Tensor],
        *,
        device: torch.device,
        ns_dtype: torch.dtype,
        ns_form: str,
        timer: StepTimer,
    ) -> None:
        self.plan, self.masters, self.momenta = plan, masters, momenta
        self._device = device
        self._collectives, self._dtype, self._form, self._timer = collectives, ns_dtype, ns_form, timer
        collectives.timer = timer
        self._schedule = plan.schedule(collectives.rank)
        self._tensor_of = plan.layout.tensor_of_matrix
        self.teams = {ranks: collectives.subgroup(ranks, "team") for ranks in self._own_teams()}
        self.ns_calls = 0
        self.track = {"update_rms"}
        self.measured: dict[str, dict[int, Tensor]] = {}

    def step(
        self,
        grads: Sequence[Tensor],
        groups: Sequence[Mapping[str, Any]],
        active: Sequence[bool],
        after_wave: Callable[[int], None] = lambda wave: None,
    ) -> None:
        """One Muon step on every shard; collective over the plan's domain.

        Args:
            grads: fp32 1-D mean gradients, one per shard; not written.
            groups: per tensor of the layout, its options: lr, weight_decay, momentum, nesterov,
                ns_coefficients, ns_steps, eps, adjust_lr_fn (torch.optim.Muon's meaning).
            active: per tensor, whether any rank had a gradient; the others keep momentum and parameter.
            after_wave: called with the number of each wave whose masters are up to date.
        """
        self.measured = {name: {} for name in self.track}
        flights: dict[int, _WaveInFlight] = {}
        for number in range(len(self._schedule)):
            if number == 0:
                flights[0] = self._start_gather(0, grads, groups, active)
            if number + 1 < len(self._schedule):
                flights[number + 1] = self._start_gather(number + 1, grads, groups, active)
            self._orthogonalize(flights[number], groups, active)
            if number:
                self._finish(flights.pop(number - 1), groups, active)
                after_wave(number - 1)
        if flights:
            number, flight = flights.popitem()
            self._finish(flight, groups, active)
            after_wave(number)

    def _start_gather(
        self,
        number: int,
        grads: Sequence[Tensor],
        groups: Sequence[Mapping[str, Any]],
        active: Sequence[bool],
    ) -> _WaveInFlight:
        wave = self._schedule[number]
        with self._timer("momentum"):
            stacks, homes = [], {}
            for stack in wave.stacks:
                rows, cols = self.plan.layout.matrices[stack[0]].shape
                stacks.append(torch.empty(len(stack), rows, cols, dtype=self._dtype, device=self._device))
                homes.update(zip(stack, stacks[-1], strict=True))
            for block in wave.blocks:
                shape = self.plan.layout.matrices[block].shape
                homes[block] = torch.empty(shape, dtype=self._dtype, device=self._device)
            flight = _WaveInFlight(wave, stacks, homes, self._shipment(wave.gather, "to_homes"))
            slots: dict[Any, list[Tensor]] = defaultdict(list)
            for piece, slot in zip(wave.gather.send, flight.gather.outgoing, strict=True):
                slots[piece].append(slot)
            for piece in wave.held:
                if piece.replica == 0 and piece.matrix in homes:
                    slots[piece].append(matrix_view(homes[piece.matrix], piece))
            by_rule: dict[tuple[float, bool], list[Any]] = defaultdict(list)
            for piece in wave.held:
                tensor = self._tensor_of[piece.matrix]
                if active[tensor]:
                    by_rule[groups[tensor]["momentum"], groups[tensor]["nesterov"]].append(piece)
            for (mu, nesterov), pieces in by_rule.items():
                held_grads = [held_view(grads[p.shard], p) for p in pieces]
                held_momenta = [held_view(self.momenta[p.shard], p) for p in pieces]
                updates = momentum_update(held_grads, held_momenta, mu, nesterov)
                pairs = [(slot, update) for p, update in zip(pieces, updates, strict=True) for slot in slots[p]]
                if pairs:
                    torch._foreach_copy_([slot for slot, _ in pairs], [update for _, update in pairs])
        flight.gather.start()
        return flight

    def _orthogonalize(
        self, flight: _WaveInFlight, groups: Sequence[Mapping[str, Any]], active: Sequence[bool]
    ) -> None:
        """Newton-Schulz on the gathered matrices of a wave, then start sending the results back."""
        with self._timer("gather_wait"):
            flight.gather.wait()
        with self._timer("newton_schulz"):
            if flight.gather.incoming:
                targets = [matrix_view(flight.homes[p.matrix], p) for p in flight.wave.gather.recv]
                torch._foreach_copy_(targets, flight.gather.incoming)
            for stack, whole in zip(flight.wave.stacks, flight.stacks, strict=True):
                by_options = self._by_options(stack, groups, active)
                for options, matrices in by_options.items():
                    if len(matrices) == len(stack):
                        self._orthogonalize_stack(whole, matrices, *options)
                        continue
                    part = torch.stack([flight.homes[matrix] for matrix in matrices])
                    self._orthogonalize_stack(part, matrices, *options)
                    flight.homes.update(zip(matrices, part, strict=True))
            for block in flight.wave.blocks:
                for options in self._by_options([block], groups, active):
                    self._orthogonalize_block(flight.homes, block, *options)
        with self._timer("scatter_pack"):
            flight.scatter = self._shipment(flight.wave.scatter, "from_homes")
            if flight.scatter.outgoing:
                sources = [matrix_view(flight.homes[p.matrix], p) for p in flight.wave.scatter.send]
                torch._foreach_copy_(flight.scatter.outgoing, sources)
        flight.scatter.start()

    def _shipment(self, transfer: Transfer, label: str) -> Shipment:
        return Shipment(transfer, self._collectives, self._dtype, self._device, label)

    def _orthogonalize_stack(self, stack: Tensor, matrices: list[int], table: Any, eps: float, adjust: str) -> None:
        """Newton-Schulz of (matrices, rows, cols) in place."""
        options = {"coefficients": table, "steps": len(table), "form": self._form, "dtype": self._dtype, "eps": eps}
        orthogonalize(stack, **options, out=stack)
        self.ns_calls += len(matrices)
        self._measure(matrices, stack, adjust)

    def _orthogonalize_block(self, homes: dict[int, Tensor], block: int, table: Any, eps: float, adjust: str) -> None:
        rows, cols = self.plan.layout.matrices[block].logical_shape
        team = self.teams[self.plan.teams[block]]
        options = {"coefficients": table, "dtype": self._dtype, "eps": eps}
        homes[block] = orthogonalize_block(homes[block], rows > cols, team, **options)
        self.ns_calls += team.rank == 0
        self._measure([block], homes[block].unsqueeze(0), adjust)

    def _own_teams(self) -> list[tuple[int, ...]]:
        """The distinct teams this rank is in, in the order of their first matrix, which all members share."""
        teams = self.plan.teams
        return list(dict.fromkeys(teams[block] for wave in self._schedule for block in wave.blocks))

    def _measure(self, matrices: list[int], output: Tensor, adjust: str) -> None:
        """Note what `track` asks for of (matrices, rows, cols) outputs of one shape."""
        shape = self.plan.layout.matrices[matrices[0]].logical_shape
        if "update_rms" in self.track:
            scale = lr_ratio(*shape, adjust) ** 2 / (shape[0] * shape[1])
            squares = torch.linalg.vector_norm(output, dim=(1, 2), dtype=torch.float32).square() * scale
            self.measured["update_rms"].update(zip(matrices, squares, strict=True))
        if "orthogonality" in self.track and shape == output.shape[1:]:
            wide = output.float() if shape[0] <= shape[1] else output.float().mT
            gram = wide @ wide.mT
            gram.diagonal(dim1=1, dim2=2).sub_(1)
            squares = torch.linalg.matrix_norm(gram).square() / gram.shape[-1]
            self.measured["orthogonality"].update(zip(matrices, squares, strict=True))

    def _finish(self, flight: _WaveInFlight, groups: Sequence[Mapping[str, Any]], active: Sequence[bool]) -> None:
        """Decay and step on the pieces this rank holds."""
        assert flight.scatter is not None
        with self._timer("scatter_wait"):
            flight.scatter.wait()
        with self._timer("update"):
            arrived = dict(zip(flight.wave.scatter.recv, flight.scatter.incoming, strict=True))
            by_rule: dict[tuple[float, float], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
            for piece in flight.wave.held:
                tensor = self._tensor_of[piece.matrix]
                if not active[tensor]:
                    continue
                group = groups[tensor]
                lr = float(group["lr"])
                matrix = self.plan.layout.matrices[piece.matrix]
                step = lr * lr_ratio(*matrix.logical_shape, group["adjust_lr_fn"])
                masters, updates = by_rule[1 - lr * group["weight_decay"], step]
                masters.append(held_view(self.masters[piece.shard], piece))
                at_home = piece.matrix in flight.homes
                updates.append(matrix_view(flight.homes[piece.matrix], piece) if at_home else arrived[piece])
            for (decay, step), (masters, updates) in by_rule.items():
                apply_update(masters, updates, decay, step)

    def _by_options(
        self, stack: Sequence[int], groups: Sequence[Mapping[str, Any]], active: Sequence[bool]
    ) -> dict[tuple[Any, float, str], list[int]]:
        """Active matrices of one shape that share Newton-Schulz options."""
        out: dict[tuple[Any, float, str], list[int]] = defaultdict(list)
        for matrix in stack:
            tensor = self._tensor_of[matrix]
            if active[tensor]:
                group = groups[tensor]
                table = coefficient_table(group["ns_coefficients"], group["ns_steps"])
                out[table, group["eps"], group["adjust_lr_fn"]].append(matrix)
        return out
