"""A small model whose gradients are chosen, a DeepSpeed engine around it, and its one-process twin."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_muon.integrations.deepspeed import PartitionedOptimizer
from distributed_muon.layout.matrices import Experts
from distributed_muon.param_groups import whole_shape
from tests.reference import ADAMW_SHAPES, MUON_SHAPES, make_params, rank_gradient

os.environ["DS_ACCELERATOR"] = "cpu"

STACK = (3, 10, 6)  # three experts
LR, STACK_LR, DECAY = 0.02, 0.01, 0.1
MATRICES = len(MUON_SHAPES) + STACK[0]


class Chosen(nn.Module):
    """The loss is the sum of every parameter times a given tensor, which thereby is its gradient.

    Args:
        plain: without expert stack and AdamW matrix, so that DeepSpeed's own Muon forms the same groups.
    """

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(make_params(MUON_SHAPES))
        if not plain:
            self.experts = nn.ParameterList(make_params([STACK], seed=2))
        self.vectors = nn.ParameterList(make_params([s for s in ADAMW_SHAPES if len(s) == 1 or not plain], seed=1))

    def forward(self, grads: Sequence[Tensor]) -> Tensor:
        return sum((p.float() * g).sum() for p, g in zip(self.parameters(), grads, strict=True))

    def groups(self) -> list[dict[str, Any]]:
        """Two Muon groups and one for AdamW, each with a learning rate or decay of its own."""
        named: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, param in self.named_parameters():
            named.setdefault(name.split(".")[0], []).append((name, param))
        options = {
            "matrices": {"algorithm": "muon"},
            "experts": {"algorithm": "muon", "matrices": Experts(), "lr": STACK_LR},
            "vectors": {"algorithm": "adamw", "weight_decay": 0.01},
        }
        return [{"params": params, **options[kind]} for kind, params in named.items()]

    def gradients(self, step: int, microbatch: int, rank: int) -> list[Tensor]:
        """Small integers: exact in every dtype, and sums over two ranks are exact."""
        count = 16 * step + microbatch
        return [rank_gradient(whole_shape(p), count, rank, i) for i, p in enumerate(self.parameters())]


class Twin:
    """torch.optim.Muon and AdamW in one process, on fp32 copies of a run's parameters.

    Args:
        scale: on every learning rate; other than 1 it makes a control that must not match.
    """

    def __init__(self, run: Run, scale: float = 1.0) -> None:
        self.params = [p.clone() for p in run.values()]
        count, self._scale = len(MUON_SHAPES), scale
        groups = [{"params": self.params[:count]}, {"params": list(self.params[count])}]
        self.optimizers = [
            torch.optim.Muon(groups, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(self.params[count + 1 :], weight_decay=0.01, betas=(0.9, 0.95)),
        ]

    def step(self, grads: Sequence[Tensor], lrs: Sequence[float] = (LR, STACK_LR, LR)) -> None:
        """One step with these gradients, in the model's order, and learning rates, by group."""
        count = len(MUON_SHAPES)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, lr, part in zip(groups, lrs, (grads[:count], grads[count], grads[count + 1 :]), strict=True):
            group["lr"] = lr * self._scale
            for p, g in zip(group["params"], part, strict=True):
                p.grad = g.clone()
        for optimizer in self.optimizers:
            optimizer.step()

    def distance(self, masters: Sequence[Tensor]) -> float:
        """Largest difference from whole masters, in the model's order."""
        return max(float((a - b).abs().max()) for a, b in zip(masters, self.params, strict=True))


class Recorder(PartitionedOptimizer):
    """Keeps the flat gradients that DeepSpeed hands in, and checks that a step does not write them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.grads: dict[Tensor, Tensor] = {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        seen = [(flat, flat.grad) for group in self.param_groups for flat in group["params"]]
        self.grads.update({flat: grad.clone() for flat, grad in seen if grad is not None})
        super().step(closure)
        assert all(torch.equal(self.grads[flat], grad) for flat, grad in seen), "the gradient was written"


class Run:
    """A DeepSpeed engine over `Chosen`, and what a test needs around it.

    Args:
        config: DeepSpeed's. plain: as in `Chosen`. lr_scheduler: as in deepspeed.initialize.
        zero_init: build the model under zero.Init. options: of the optimizer.
    """

    sharded = False  # stage 3

    def __init__(
        self,
        config: dict[str, Any],
        plain: bool = False,
        lr_scheduler: Any = None,
        zero_init: bool = False,
        **options: Any,
    ) -> None:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        with deepspeed.zero.Init(config_dict_or_path=config) if zero_init else nullcontext():
            self.config, self.model = config, Chosen(plain)
        self.optimizer = Recorder(
            self.model.groups(), **{"lr": LR, "weight_decay": DECAY, "ns_form": "standard", **options}
        )
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=config, lr_scheduler=lr_scheduler
        )
        self.sharded = config["zero_optimization"]["stage"] == 3
        if self.sharded:  # the root's forward uses parameters of its children
            for param in self.model.parameters():
                deepspeed.zero.register_external_parameter(self.model, param)

    def train_step(self, step: int, rank: int, spoil: bool = False, factor: int = 1) -> None:
        """All microbatches of one step; `spoil` puts an inf into the first gradient, `factor` multiplies all."""
        for microbatch in range(self.config.get("gradient_accumulation_steps", 1)):
            grads = [g * factor for g in self.model.gradients(step, microbatch, rank)]
            if spoil:
                grads[0][0, 0] = float("inf")
            self.engine.backward(self.engine(grads))
            self.engine.step()

    def expected_gradients(self, step: int, world: int) -> list[Tensor]:
        """What reduction and clipping must yield, in fp32."""
        parts = [
            self.model.gradients(step, microbatch, rank)
            for rank in range(world)
            for microbatch in range(self.config.get("gradient_accumulation_steps", 1))
        ]
        mean = [torch.stack(same).sum(0) / len(parts) for same in zip(*parts, strict=True)]
        norm = torch.stack([g.double().norm() for g in mean]).norm().item()
        clip = self.config["gradient_clipping"]
        return [g * min(1.0, clip / (norm + 1e-6)) for g in mean] if clip else mean

    def gather(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Whole tensors in the model's order, from every rank's flat partition of every group.

        Places come from DeepSpeed's own lists, not from the adapter.
        """
        wrapper, found = self.engine.optimizer, {}
        for group, flat in enumerate(flats):
            if self.sharded:
                world = dist.get_world_size()
                whole = [torch.empty_like(flat) for _ in range(world)]
                dist.all_gather(whole, flat.detach().contiguous())
                at = 0
                for param in wrapper.fp16_groups[group]:
                    size = -(-param.ds_numel // world)
                    pieces = torch.cat([part[at : at + size] for part in whole])
                    found[param], at = pieces[: param.ds_numel].view(param.ds_shape), at + size
                continue
            process_group = wrapper.real_dp_process_group[group]
            whole = [torch.empty_like(flat) for _ in range(dist.get_world_size(process_group))]
            dist.all_gather(whole, flat.detach().contiguous(), group=process_group)
            if hasattr(wrapper, "round_robin_bit16_groups"):
                params, offsets = wrapper.round_robin_bit16_groups[group], wrapper.round_robin_bit16_offsets[group]
            else:
                params = wrapper.bf16_groups[group]
                offsets = accumulate((p.numel() for p in params[:-1]), initial=0)
            for param, offset in zip(params, offsets, strict=True):
                found[param] = torch.cat(whole)[offset : offset + param.numel()].view(param.shape)
        return [found[param] for param in self.engine.module.parameters()]

    @property
    def flats(self) -> list[Tensor]:
        """This rank's masters, by group, or by sub-group of stage 3."""
        if self.sharded:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [group["params"][0] for group in self.optimizer.param_groups]

    def masters(self) -> list[Tensor]:
        """Whole masters, in the model's order."""
        return self.gather(self.flats)

    def values(self) -> list[Tensor]:
        """Whole parameters in fp32, in the model's order."""
        import deepspeed

        params = list(self.model.parameters())
        with deepspeed.zero.GatheredParameters(params) if self.sharded else nullcontext():
            return [p.detach().float().clone() for p in params]

    def reduced(self) -> list[Tensor]:
        """Whole gradients as the last step got them, in the model's order."""
        return self.gather([self.optimizer.grads[flat] for flat in self.flats])

    def moment(self, key: str = "exp_avg") -> list[Tensor]:
        """Whole moments, in the model's order."""
        return self.gather([self.optimizer.state[flat][key] for flat in self.flats])

    def snapshot(self) -> list[Tensor]:
        """Copies of all that a step may change on this rank, as bytes: stage 3 never writes its padding."""
        moments = [value for flat in self.flats for value in self.optimizer.state[flat].values()]
        return [t.detach().clone().view(-1).view(torch.uint8) for t in (*self.flats, *moments, *self.values())]


def zero_config(stage: int = 1, **options: Any) -> dict[str, Any]:
    """A DeepSpeed config; keyword "zero" holds more options of zero_optimization."""
    zero = options.pop("zero", {})
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **zero},
        **options,
    }
