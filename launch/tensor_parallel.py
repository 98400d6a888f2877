"""Tensor parallelism of the trainers' own models, in torch's terms: `parallelize_module` with a style per module.

Attention is cut by heads, SwiGLU by columns, embedding and head by the vocabulary, and a stack of experts into whole
experts. Norms, routers and latent down-projections are copied: every rank computes the same there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.func import functional_call

from launch.models import CausalLM
from launch.models.layers import SwiGLU
from launch.models.moonlight import ExpertStack

_COLUMNS = ("q_proj", "q_b_proj", "kv_b_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ROWS = ("o_proj", "down_proj")


class Copied(ParallelStyle):
    """A module that computes with its own shard of its parameters as plain tensors; here all of them, on every rank.

    The parameters are DTensors even where they are copies, so that FSDP2 and the optimizer know them for copies and
    count them once. Gradients of copies are equal, because the inputs and the gradients of the outputs are.
    """

    placement: Shard | Replicate = Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            shard = distribute_tensor(parameter.detach(), device_mesh, [self.placement])
            module.register_parameter(name, nn.Parameter(shard, parameter.requires_grad))
        compute = module.forward

        def forward(*inputs: Any) -> Any:
            held = module.named_parameters(recurse=False)
            local = {name: p.to_local() for name, p in held if isinstance(p, DTensor)}
            if local:  # the module again, with plain tensors for parameters
                return functional_call(module, local, inputs)
            return self.compute(compute, device_mesh, *inputs)

        module.forward = forward
        return module

    def compute(self, forward: Callable[..., Any], mesh: DeviceMesh, *inputs: Any) -> Any:
        """The module's own `forward`, on plain tensors."""
        return forward(*inputs)


class WholeExperts(Copied):
    """An ExpertStack of which every rank holds whole experts and computes their rows; the results are summed."""

    placement = Shard(0)

    def compute(self, forward: Callable[..., Any], mesh: DeviceMesh, *inputs: Any) -> Tensor:
        """The rows of this rank's experts, then all rows."""
        x, counts = inputs
        held = len(counts) // mesh.size()
        first = mesh.get_local_rank() * held
        own = counts[first : first + held]
        before, mine = sum(counts[:first]), sum(own)
        x = _sum_gradient(x, mesh)
        out = F.pad(forward(x[before : before + mine], own), (0, 0, before, len(x) - before - mine))
        return (
            DTensor.from_local(out, mesh, [Partial()], run_check=False)
            .redistribute(placements=[Replicate()])
            .to_local()
        )


class Shared(ParallelStyle):
    """An nn.Identity for what all ranks have and each uses for heads of its own."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_hook(lambda module, inputs, output: _sum_gradient(output, device_mesh))
        return module


def _sum_gradient(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """`x`, equal on all ranks, whose gradient is the sum of what they bring."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def parallelize(model: CausalLM, mesh: DeviceMesh) -> None:
    """Cut a freshly built model over a 1-D mesh, in place; before `fully_shard`. Collective over the mesh.

    Raises:
        ValueError: the ranks do not divide heads, experts or columns; the message names the size.
    """
    _check_sizes(model, mesh.size())
    tied = model.lm_head.weight is model.embed_tokens.weight
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        leaf = name.split(".")[-1]
        if isinstance(module, ExpertStack):
            plan[name] = WholeExperts()
        elif leaf == "shared_key":
            plan[name] = Shared()
        elif leaf in _COLUMNS:
            plan[name] = ColwiseParallel()
        elif leaf in _ROWS:
            plan[name] = RowwiseParallel()
        elif any(True for _ in module.parameters(recurse=False)):
            plan[name] = Copied()
    plan["embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, plan)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight


def _check_sizes(model: CausalLM, size: int) -> None:
    config = model.config
    sizes = {name: getattr(config, name, 0) for name in ("num_attention_heads", "num_key_value_heads")}
    sizes |= {f"{name} columns": m.gate_proj.out_features for name, m in model.named_modules() if isinstance(m, SwiGLU)}
    if any(isinstance(module, ExpertStack) for module in model.modules()):
        sizes["n_routed_experts"] = config.n_routed_experts
    for name, value in sizes.items():
        if value % size:
            raise ValueError(f"--tp {size} does not divide {name}={value}")
