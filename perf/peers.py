"""What people use today, as contenders of `perf.step`: from each rank's own gradients to whole updated parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard

from distributed_muon import DistributedMuon
from distributed_muon.engine.collectives import all_gather_single, reduce_scatter_single

Shapes = Sequence[tuple[int, int]]


@dataclass
class Contender:
    """One optimizer under test.

    Args:
        name: for tables. params: whole parameters on every rank, with this rank's gradients in p.grad.
        step: goes from there to whole updated parameters. state_bytes: of this rank, asked after a step.
        ns_calls: matrices this rank orthogonalized in the last step.
        report: `DistributedMuon.local_report`, or nothing.
    """

    name: str
    params: list[nn.Parameter]
    step: Callable[[], object]
    state_bytes: Callable[[], int]
    ns_calls: Callable[[], int]
    report: Callable[[], dict[str, Any]] = dict


def contenders(shapes: Shapes, device: torch.device, peers: bool = True) -> Iterator[Contender]:
    """All that run here: ours, torch's, and what is installed of muon-fsdp2 and dtensor-muon.

    Args:
        shapes: of the matrices. peers: whether to bring others' optimizers.
    """
    yield _ours("DistributedMuon home", shapes, device, "muon", "home")
    yield _ours("DistributedMuon gather", shapes, device, "muon", "gather")
    yield _ours("DistributedMuon AdamW", shapes, device, "adamw", "home")
    if not peers:
        return
    yield _replicated_muon(shapes, device)
    yield _zero_redundancy(shapes, device)
    if all(rows % dist.get_world_size() == 0 for rows, _ in shapes):  # muon-fsdp2 wants equal shards
        for build in (_muon_fsdp2, _dtensor_muon):
            try:
                yield build(shapes, device)
            except ImportError as error:
                if dist.get_rank() == 0:
                    print(f"left out: {error.name} is not installed (pip install '.[peers]')")


def _params(shapes: Shapes, device: torch.device) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(device)) for shape in shapes]


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in tensors)


def _ours(name: str, shapes: Shapes, device: torch.device, algorithm: str, strategy: str) -> Contender:
    params = _params(shapes, device)
    optimizer = DistributedMuon([{"params": params, "algorithm": algorithm}], lr=1e-3, strategy=strategy)
    optimizer.track()
    calls = lambda: optimizer.local_report()["ns_calls"]  # noqa: E731
    held = partial(_optimizer_bytes, optimizer)
    return Contender(name, params, optimizer.step, held, calls, optimizer.local_report)


def _average(params: Sequence[nn.Parameter]) -> None:
    """Flat all-reduce of all gradients, as a hand-written data-parallel loop does it."""
    flat = torch.cat([p.grad.reshape(-1) for p in params])
    dist.all_reduce(flat)
    flat.div_(dist.get_world_size())
    for param, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        param.grad = part.view(param.shape)


def _replicated_muon(shapes: Shapes, device: torch.device) -> Contender:
    params = _params(shapes, device)
    optimizer = torch.optim.Muon(params, lr=1e-3, adjust_lr_fn="match_rms_adamw")

    def step() -> None:
        _average(params)
        optimizer.step()

    held = partial(_optimizer_bytes, optimizer)
    return Contender("all-reduce + torch.optim.Muon", params, step, held, lambda: len(params))


def _zero_redundancy(shapes: Shapes, device: torch.device) -> Contender:
    params = _params(shapes, device)
    optimizer = ZeroRedundancyOptimizer(params, torch.optim.AdamW, lr=1e-3, foreach=True)

    def step() -> None:
        _average(params)
        optimizer.step()

    held = partial(_optimizer_bytes, optimizer.optim)
    return Contender("ZeroRedundancyOptimizer(AdamW)", params, step, held, lambda: 0)


class _RowShards:
    """Whole parameters and their DTensor twins cut by rows, as FSDP2 keeps them between backward and forward.

    One reduce-scatter brings the mean gradients to the shards, one all-gather the shards to the parameters.
    """

    def __init__(self, params: Sequence[nn.Parameter], device: torch.device) -> None:
        self._params, self._size = params, dist.get_world_size()
        self._mesh = init_device_mesh(device.type, (self._size,))
        rank = dist.get_rank()
        shards = [param.detach().view(self._size, -1, param.shape[1])[rank].clone() for param in params]
        self.shards = [nn.Parameter(self._distributed(shard)) for shard in shards]

    def _distributed(self, shard: Tensor) -> DTensor:
        return DTensor.from_local(shard, self._mesh, [Shard(0)])

    def reduce(self) -> None:
        flat = torch.cat([param.grad.reshape(self._size, -1) for param in self._params], dim=1).view(-1)
        own = flat.new_empty(flat.numel() // self._size)
        reduce_scatter_single(own, flat)
        own.div_(self._size)
        parts = own.split([param.numel() // self._size for param in self._params])
        for shard, part in zip(self.shards, parts, strict=True):
            shard.grad = self._distributed(part.view(shard.to_local().shape))

    def gather(self) -> None:
        own = torch.cat([shard.to_local().reshape(-1) for shard in self.shards]).detach()
        flat = own.new_empty(own.numel() * self._size)
        all_gather_single(flat, own)
        parts = flat.view(self._size, -1).split([param.numel() // self._size for param in self._params], dim=1)
        with torch.no_grad():
            for param, part in zip(self._params, parts, strict=True):
                param.copy_(part.reshape(param.shape))


def _sharded(
    name: str, params: list[nn.Parameter], shards: _RowShards, optimizer: torch.optim.Optimizer, calls: int
) -> Contender:
    def step() -> None:
        shards.reduce()
        optimizer.step()
        shards.gather()

    return Contender(name, params, step, partial(_optimizer_bytes, optimizer), lambda: calls)


def _muon_fsdp2(shapes: Shapes, device: torch.device) -> Contender:
    import muon_fsdp2

    params = _params(shapes, device)
    shards = _RowShards(params, device)
    optimizer = muon_fsdp2.Muon([{"params": shards.shards, "lr": 1e-3, "weight_decay": 0.1, "use_muon": True}])
    mine = len(range(dist.get_rank(), len(params), dist.get_world_size()))  # matrix i goes to rank i % size
    return _sharded("muon-fsdp2", params, shards, optimizer, mine)


def _dtensor_muon(shapes: Shapes, device: torch.device) -> Contender:
    import dtensor_muon.optim.optim as module

    if device.type == "cpu":  # its Triton kernel needs a GPU
        module.zeropower = partial(module.zeropower, use_triton=False)
    params = _params(shapes, device)
    shards = _RowShards(params, device)
    optimizer = module.Muon(shards.shards, lr=1e-3, orthogonalization_strategy="newton_schulz")
    return _sharded("dtensor-muon", params, shards, optimizer, len(params))
