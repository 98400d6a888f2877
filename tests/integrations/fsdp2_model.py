"""Models cut by FSDP2 over every kind of mesh, with gradients known to the bit, and their one-process twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from distributed_muon import Experts, muon_param_groups
from distributed_muon.integrations.fsdp2 import FullyShardedMuon
from tests.reference import Reference, make_params, rank_gradient

# Rows that do not divide, fewer rows than ranks, tall, wide, an expert stack, vectors.
SHAPES = {"a": (7, 5), "b": (33, 17), "c": (3, 40), "d": (1, 9), "experts": (6, 9, 5), "norm": (5,), "bias": (1,)}
# Even columns and rows, for tensor parallelism and FSDP over columns.
EVEN = {"up": (16, 12), "down": (12, 16), "odd": (7, 6), "experts": (4, 8, 6), "norm": (6,)}
OPTIONS = dict(lr=0.02, weight_decay=0.1, ns_form="standard")
ROOT = (6, 4)
Cut = Callable[["Model"], None]


class Layer(nn.Module):
    """Parameters whose gradients are given."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        for (name, _), param in zip(shapes.items(), make_params(list(shapes.values()), dtype, seed), strict=True):
            self.register_parameter(name, param)

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        """The sum of p * g over all parameters that have a gradient in `grads`."""
        total = torch.zeros(())
        for name, p in self.named_parameters(recurse=False):
            if name in grads:
                total = total + weighted(p, grads[name])
        for child in self.children():
            total = total + child(grads)
        return total


def weighted(p: Tensor, g: Tensor) -> Tensor:
    """The sum of p * g, whose gradient is g."""
    g = g.to(p.dtype)
    if not isinstance(p, DTensor):
        return (p * g).sum().float()
    return (p * distribute_tensor(g, p.device_mesh, p.placements)).sum().full_tensor().float()


class Model(nn.Module):
    """Two layers and a parameter of the root's own."""

    def __init__(
        self, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, layers: int = 2
    ) -> None:
        super().__init__()
        self.leaves = list(shapes)
        self.layers = nn.ModuleList(Layer(shapes, dtype, seed) for seed in range(layers))
        (self.root,) = make_params([ROOT], dtype, 7)

    def forward(self, grads: Sequence[dict[str, Tensor]], root: Tensor) -> Tensor:
        total = weighted(self.root, root)
        for layer, own in zip(self.layers, grads, strict=True):
            total = total + layer(own)
        return total

    def loss(self, step: int, rank: int, leave_out: Sequence[str] = ()) -> Tensor:
        """A loss whose gradients are small integers that depend on step and rank."""
        grads = []
        for number, layer in enumerate(self.layers):
            shapes = {name.split(".")[-1]: tuple(p.shape) for name, p in layer.named_parameters()}
            grads.append(
                {
                    leaf: rank_gradient(shapes[leaf], step, rank, 100 * number + i)
                    for i, leaf in enumerate(self.leaves)
                    if leaf not in leave_out
                }
            )
        return self(grads, rank_gradient(ROOT, step, rank, 999))


class Twin:
    """torch.optim.Muon and AdamW on whole copies of a model in one process; experts one by one."""

    def __init__(self, model: Model, **options) -> None:
        self._leaves, whole, pairs = model.leaves, {}, []
        for name, param in model.named_parameters():
            parts = param.detach().unbind() if param.ndim == 3 else [param.detach()]
            whole[name] = len(parts)
            vector = param.ndim < 2 or param.numel() == max(param.shape)
            pairs += [(nn.Parameter(part.clone()), "adamw" if vector else "muon") for part in parts]
        options = {"lr": 0.02, "weight_decay": 0.1, **options}
        self.reference = Reference(pairs, options, {"betas": (0.9, 0.95), "eps": 1e-8, **options})
        copies = iter(self.reference.params)
        self.whole = {name: [next(copies) for _ in range(count)] for name, count in whole.items()}

    def grads(self, step: int, ranks: Sequence[int]) -> dict[str, Tensor]:
        """The mean gradients over data-parallel `ranks`."""
        out = {}
        for name in self.whole:
            number = 999
            if name != "root":
                _, layer, leaf = name.split(".")
                number = 100 * int(layer) + self._leaves.index(leaf)
            own = [rank_gradient(tuple(self.value(name).shape), step, rank, number) for rank in ranks]
            out[name] = torch.stack(own).sum(0) / len(ranks)
        return out

    def value(self, name: str) -> Tensor:
        parts = self.whole[name]
        return torch.stack(list(parts)).detach() if len(parts) > 1 else parts[0].detach()

    def step(self, grads: dict[str, Tensor]) -> None:
        flat: list[Tensor | None] = []
        for name, parts in self.whole.items():
            grad = grads.get(name)
            flat += [None] * len(parts) if grad is None else (list(grad) if len(parts) > 1 else [grad])
        self.reference.step(flat)


def build(
    cut: Cut, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, **options
) -> tuple[Model, FullyShardedMuon, Twin]:
    """A cut model, its optimizer and its twin."""
    model = Model(shapes, dtype)
    twin = Twin(model)
    cut(model)
    groups = muon_param_groups(model, overrides={"*experts": Experts()})
    return model, FullyShardedMuon(groups, **{**OPTIONS, **options}), twin


def mesh_of(*shape: int, names: Sequence[str]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple(names))


def fsdp(mesh: DeviceMesh, **options) -> Cut:
    """Every layer by itself, then the root."""

    def cut(model: Model) -> None:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)

    return cut


def tensor_parallel(mesh: DeviceMesh, **places: int) -> Cut:
    """Columns or rows of the layers' parameters over the mesh's "tp", the rest replicated; then FSDP over "dp"."""

    def cut(model: Model) -> None:
        for layer in model.layers:
            for name, param in list(layer.named_parameters()):
                place = Shard(places[name]) if name in places else Replicate()
                setattr(layer, name, nn.Parameter(distribute_tensor(param.detach(), mesh["tp"], [place])))
        model.root = nn.Parameter(distribute_tensor(model.root.detach(), mesh["tp"], [Replicate()]))
        fsdp(mesh["dp"])(model)

    return cut


def expert_parallel(mesh: DeviceMesh, dp: DeviceMesh, dim: int | None = None) -> Cut:
    """Stacks over "ep", then FSDP over "efsdp" (over `dim`); everything else FSDP over `dp`."""

    def cut(model: Model) -> None:
        for layer in model.layers:
            stack = Layer({})
            stack.experts = nn.Parameter(distribute_tensor(layer.experts.detach(), mesh["ep"], [Shard(0)]))
            del layer.experts
            layer.stack = stack
            fully_shard(stack, mesh=mesh["efsdp"], shard_placement_fn=lambda p: None if dim is None else Shard(dim))
        fsdp(dp)(model)

    return cut


def train(model: Model, optimizer: FullyShardedMuon, twin: Twin, steps: Sequence[int], ranks: Sequence[int], rank: int):
    """Steps of both, compared after each; `ranks` hold the gradients, `rank` this one's."""
    for step in steps:
        model.loss(step, rank).backward()
        twin.step(twin.grads(step, ranks))
        optimizer.step()
        optimizer.zero_grad()
        compare(model, twin, f"step {step}")


def compare(model: nn.Module, twin: Twin, where: str, dtype: torch.dtype = torch.float32) -> None:
    """Every parameter is the twin's to the bit."""
    for name, param in model.named_parameters():
        ours, theirs = param.detach(), twin.value(name.replace("stack.", "")).to(dtype)
        ours = ours.full_tensor() if isinstance(ours, DTensor) else ours
        assert torch.isfinite(ours).all(), f"{where}: {name}"
        assert torch.equal(ours, theirs), f"{where}: {name} is {(ours - theirs).abs().max()} off"


def whole_state(model: nn.Module, optimizer: FullyShardedMuon) -> dict[str, Tensor]:
    """Everything of model and optimizer, gathered."""
    out = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
    for name, param in model.named_parameters():
        for key, value in optimizer.state[param].items():
            out[f"{name}.{key}"] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return out


def all_ns_calls(optimizer: FullyShardedMuon) -> int:
    """Matrices orthogonalized in the last step, over all ranks."""
    calls = torch.tensor(optimizer.local_report()["ns_calls"])
    dist.all_reduce(calls)
    return int(calls)
