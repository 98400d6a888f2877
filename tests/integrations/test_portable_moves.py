"""One training state handed from framework to framework through checkpoints, a step at learning rate 0 in each."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_muon import DistributedMuon, checkpoint
from tests.distributed.sharded_model import everything
from tests.integrations import megatron_cpu
from tests.integrations.deepspeed_case import zero_config
from tests.spawn import run_ranks

# Of the Megatron model of megatron_job.py: loading refuses others.
LAYER = {
    "input_layernorm.weight": (32,),
    "self_attention.linear_proj.weight": (32, 32),
    "self_attention.linear_qkv.weight": (96, 32),
    "pre_mlp_layernorm.weight": (32,),
    "mlp.linear_fc1.weight": (128, 32),
    "mlp.linear_fc2.weight": (32, 64),
}
SHAPES: dict[str, tuple[int, ...]] = {
    "embedding.word_embeddings.weight": (128, 32),
    **{f"decoder.layers.{i}.{name}": shape for i in range(4) for name, shape in LAYER.items()},
    "decoder.final_layernorm.weight": (32,),
    "output_layer.weight": (128, 32),
}
LR, TRAINED = 0.02, 2  # steps of the first run, at this rate


class Model(nn.Module):
    """Parameters of these names, whose gradients are given."""

    def __init__(self, seed: str = "", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            module: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, nn.Parameter(random(seed, name, shape).to(dtype)))

    def forward(self, grads: Sequence[Tensor]) -> Tensor:
        return sum((p.float() * g).sum() for p, g in zip(self.parameters(), grads, strict=True))

    def groups(self) -> list[dict[str, Any]]:
        named = {kind: [] for kind in ("muon", "adamw")}
        for name, param in self.named_parameters():
            named["muon" if "linear" in name else "adamw"].append((name, param))
        return [{"params": params, "algorithm": kind} for kind, params in named.items()]


def random(seed: str, name: str, shape: Sequence[int]) -> Tensor:
    """The values that megatron_job.fill gives a parameter."""
    generator = torch.Generator().manual_seed(zlib.crc32((seed + name).encode()))
    return torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1) + (len(shape) == 1)


def gradients(step: int) -> list[Tensor]:
    """Small integers, whose mean over ranks is exact in every dtype."""
    return [(8 * random(f"gradient {step} ", name, shape)).round() for name, shape in SHAPES.items()]


class Plain:
    """The model under plain PyTorch."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.model = Model("other ", dtype)
        self.optimizer = DistributedMuon(self.model.groups(), lr=LR, **options)

    def step(self, step: int) -> None:
        self.model(gradients(step)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self) -> dict[str, Tensor]:
        return {name: p.detach().float() for name, p in self.model.named_parameters()}

    def at_rate_zero(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.step(step)


class DeepSpeed(Plain):
    """The model under DeepSpeed."""

    def __init__(self, stage: int, **options: Any) -> None:
        import deepspeed

        from distributed_muon.integrations.deepspeed import PartitionedOptimizer

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        zero = {"sub_group_size": 10_000, "stage3_param_persistence_threshold": 100} if stage == 3 else {}
        self.model, self.stage = Model("other "), stage
        self.optimizer = PartitionedOptimizer(self.model.groups(), lr=LR)
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=zero_config(stage, zero=zero, **options)
        )
        if stage == 3:
            for param in self.model.parameters():
                deepspeed.zero.register_external_parameter(self.model, param)

    def step(self, step: int) -> None:
        self.engine.backward(self.engine(gradients(step)))
        self.engine.step()

    def values(self) -> dict[str, Tensor]:
        import deepspeed

        params = dict(self.model.named_parameters())
        with deepspeed.zero.GatheredParameters(list(params.values()), enabled=self.stage == 3):
            return {name: p.detach().float().clone() for name, p in params.items()}


class Sharded(Plain):
    """The model under FSDP2, and cut by columns as well."""

    def __init__(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard, distribute_tensor

        from distributed_muon.integrations.fsdp2 import FullyShardedMuon

        self.model = Model("other ")
        mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
        for module in list(self.model.modules()):
            for leaf, param in list(module.named_parameters(recurse=False)):
                if param.ndim == 2:  # columns over tp
                    cut = distribute_tensor(param.detach(), mesh["tp"], [Shard(1)])
                    setattr(module, leaf, nn.Parameter(cut))
                else:
                    setattr(module, leaf, nn.Parameter(distribute_tensor(param.detach(), mesh["tp"])))
        fully_shard(self.model, mesh=mesh["dp"])
        self.optimizer = FullyShardedMuon(self.model.groups(), lr=LR)

    def step(self, step: int) -> None:
        from torch.distributed.tensor import distribute_tensor

        for p, g in zip(self.model.parameters(), gradients(step), strict=True):
            p.grad = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self) -> dict[str, Tensor]:
        return {name: p.detach().full_tensor() for name, p in self.model.named_parameters()}


class Megatron(Plain):
    """The model of these names under Megatron-core."""

    ready = False

    def __init__(self, **parallelism: Any) -> None:
        if not Megatron.ready:  # after DeepSpeed, which the shim would confuse
            megatron_cpu.install()
            Megatron.ready = True
        from tests.integrations.megatron_job import Case, Job, fill

        self.job = Job(Case(model={"num_query_groups": 4}, config={"clip_grad": 0.0}, **parallelism))
        self.optimizer = self.job.muon
        self.model = None
        fill({n: p.detach() for n, p in self.job.named_parameters()}, self.job.chunks, "other ")

    def step(self, step: int) -> None:
        self.job.set_gradients(step)
        for _, param in self.job.named_parameters():
            param.main_grad.mul_(8).round_()
        assert self.job.optimizer.step()[0]

    def values(self) -> dict[str, Tensor]:
        return self.job.weights()


def hand_over(rank: int, world: int, folder: Path) -> int:
    os.environ["DS_ACCELERATOR"] = "cpu"
    first = Plain()
    for step in range(TRAINED):
        first.step(step)
    checkpoint.save(folder / "0", first.model, first.optimizer)
    chain: list[Any] = [Sharded]
    if find_spec("deepspeed"):
        chain += [lambda: DeepSpeed(1), lambda: DeepSpeed(2), lambda: DeepSpeed(3, bf16={"enabled": True})]
    if megatron_cpu.available():
        chain += [lambda: Megatron(tp=2), lambda: Megatron(tp=2, pp=2), lambda: Megatron(pp=2, vpp=2)]
    chain += [lambda: Plain(torch.bfloat16, layout="flat"), Plain]
    for number, make in enumerate(chain):
        first.at_rate_zero(TRAINED + number)
        run = make()
        checkpoint.load(folder / str(number), None, run.optimizer)
        masters = everything(first.model, first.optimizer)
        for name, value in run.values().items():
            dtype = run.model.get_parameter(name).dtype if run.model is not None else torch.float32
            follows = torch.equal(value, masters[f"{name}.master"].view(value.shape).to(dtype).float())
            assert follows, f"{type(run).__name__} {number}: {name} does not follow from its master"
        run.at_rate_zero(TRAINED + number)
        checkpoint.save(folder / str(number + 1), None, run.optimizer)
    after, expected = everything(run.model, run.optimizer), everything(first.model, first.optimizer)
    assert after.keys() == expected.keys()
    for key in expected:
        assert torch.equal(after[key], expected[key]), f"{key} differs"
    assert after["output_layer.weight.step"] == TRAINED + len(chain)
    assert after["decoder.layers.0.mlp.linear_fc1.weight.momentum_buffer"].abs().max() > 0
    return len(chain)


@pytest.mark.timeout(400)
def test_a_state_that_moves_through_every_framework_keeps_its_bits(tmp_path: Path) -> None:
    """Masters, momenta, moments and counters are those of a plain run that took the same steps."""
    assert run_ranks(hand_over, 4, tmp_path, timeout=300)[0] >= 3
