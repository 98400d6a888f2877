"""A small real Megatron-core job for tests: build it under any parallelism, train it, gather its weights."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

OPTIONS = {"ns_dtype": torch.float32, "strategy": "home"}  # "auto" may orthogonalize such small matrices twice
HIDDEN, LAYERS, VOCAB, LENGTH, SAMPLES, LR = 32, 4, 128, 8, 2, 1e-2


@dataclass(frozen=True)
class Case:
    """Parallelism and options of one job; the data-parallel size follows from the world size.

    Args:
        distributed: use_distributed_optimizer, which Megatron's own Muon does without.
        layer_wise: DDP buffers as Megatron's LayerWiseDistributedOptimizer wants them.
        batches: microbatches of one step over all data-parallel ranks.
        optimizer: keyword arguments of get_distributed_muon_optimizer, beside OPTIONS. config: of OptimizerConfig.
        overrides: name pattern (or ParamKey) -> ParamGroupOverride, beside Megatron's standard config_overrides.
        model: of TransformerConfig.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    cp: int = 1
    vpp: int | None = None
    moe: bool = False
    mla: bool = False
    gate: bool = False
    tied: bool = False
    dtype: torch.dtype = torch.float32
    overlap: bool = False
    bucket: int | None = None
    aligned: bool = False
    distributed: bool = True
    layer_wise: bool = False
    batches: int = 4
    optimizer: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    overrides: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)


class Job:
    """A built case: chunks wrapped in DDP, the optimizer and its scheduler.

    Args:
        case: what to build. make_optimizer: (config, chunks) -> optimizer; ours by default.
    """

    def __init__(self, case: Case, make_optimizer: Callable[..., Any] | None = None) -> None:
        from megatron.core import parallel_state as ps
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig, ParamKey, get_standard_config_overrides
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        self.case, self.ps = case, ps
        ps.destroy_model_parallel()
        ps.initialize_model_parallel(
            case.tp,
            case.pp,
            context_parallel_size=case.cp,
            expert_model_parallel_size=case.ep,
            expert_tensor_parallel_size=case.etp,
            virtual_pipeline_model_parallel_size=case.vpp,
        )
        model_parallel_cuda_manual_seed(123)
        self.config = _model_config(case)
        chunks = [_build_chunk(case, self.config, stage) for stage in (range(case.vpp) if case.vpp else [None])]
        fill({name: param.detach() for name, param in _named(chunks)}, chunks)
        if case.dtype != torch.float32:
            from megatron.core.transformer.module import Float16Module

            chunks = [Float16Module(self.config, chunk) for chunk in chunks]
        self.chunks = [self._wrap(chunk) for chunk in chunks]
        # A large adam_eps: below it AdamW turns the rounding noise of tiny gradients into whole steps.
        options = {"lr": LR, "min_lr": 0.0, "weight_decay": 0.1, "clip_grad": 1.0, "log_num_zeros_in_grad": True}
        options["adam_eps"] = 0.1
        self.optimizer_config = OptimizerConfig(
            bf16=case.dtype == torch.bfloat16,
            fp16=case.dtype == torch.float16,
            params_dtype=case.dtype,
            use_distributed_optimizer=case.distributed and not case.layer_wise,
            overlap_param_gather=case.overlap,
            **{**options, **case.config},
        )
        if make_optimizer is None:
            from distributed_muon.integrations.megatron import get_distributed_muon_optimizer

            options = {**OPTIONS, **case.optimizer}
            if case.overrides:
                named = (ParamKey(name=key) if isinstance(key, str) else key for key in case.overrides)
                keys = dict(zip(named, case.overrides.values(), strict=True))
                options["config_overrides"] = {**get_standard_config_overrides(self.optimizer_config), **keys}
            make_optimizer = partial(get_distributed_muon_optimizer, **options)
        self.optimizer = make_optimizer(self.optimizer_config, self.chunks)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, 0.0, LR, 0.0, 0, 100, "cosine", 0.1, 0.1, 100, "constant"
        )
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        if case.overlap:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.done = self.ns_calls = 0

    @property
    def muon(self) -> Any:
        """Our optimizer inside the ChainedOptimizer."""
        return self.optimizer.chained_optimizers[0]

    def _wrap(self, chunk: nn.Module) -> nn.Module:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        case, keywords = self.case, {}
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=case.overlap or case.bucket is not None,
            overlap_param_gather=case.overlap,
            use_distributed_optimizer=case.distributed,
            bucket_size=case.bucket,
        )
        if case.aligned:
            from distributed_muon.integrations.megatron import shard_aligned_param_layout

            dense = dist.get_world_size(self.ps.get_data_parallel_group(with_context_parallel=True))
            expert = dist.get_world_size(self.ps.get_expert_data_parallel_group())
            keywords["full_param_layout"] = shard_aligned_param_layout(chunk, ddp_config, dense, expert, case.bucket)
        if case.layer_wise:
            from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer as LayerWise
            from megatron.core.optimizer.layer_wise_optimizer import tag_params_for_buffer_routing

            tag_params_for_buffer_routing([chunk])
            size = dist.get_world_size(self.ps.get_data_parallel_group(with_context_parallel=True))
            params = list(chunk.parameters())
            expert = dist.get_world_size(self.ps.get_expert_data_parallel_group())
            sizes = (params, case.bucket, size, ddp_config, expert)
            keywords["full_param_layout"] = LayerWise.compute_full_param_layout(*sizes)
        return DistributedDataParallel(self.config, ddp_config, chunk, **keywords)

    def forward_backward(self) -> float:
        """One step's microbatches; the mean loss on the last pipeline stage, else 0."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        data_rank, data_size = self.ps.get_data_parallel_rank(), self.ps.get_data_parallel_world_size()
        count = self.case.batches // data_size

        def batches() -> Iterator[Tensor]:
            for microbatch in range(count):
                yield make_batch(self.done, microbatch * data_size + data_rank)

        several = len(self.chunks) > 1
        report = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[batches() for _ in self.chunks] if several else batches(),
            model=self.chunks if several else self.chunks[0],
            num_microbatches=count,
            seq_length=LENGTH,
            micro_batch_size=SAMPLES,
            forward_only=False,
        )
        self.done += 1
        return sum(float(entry["loss"]) for entry in report) / count if report else 0.0

    def step(self) -> tuple[float, float, float]:
        """(loss summed over the last stage's ranks and averaged, gradient norm, zeros) of one training step."""
        loss = torch.tensor([self.forward_backward()])
        ok, norm, zeros = self.optimizer.step()
        assert ok
        self.scheduler.step(1)
        dist.all_reduce(loss)
        return float(loss) / (dist.get_world_size() // self.case.pp), norm, zeros

    def train(self, steps: int) -> list[tuple[float, float, float]]:
        return [self.step() for _ in range(steps)]

    def weights(self) -> dict[str, Tensor]:
        """Whole weights by global name, on every rank, from this job's parameters."""
        for chunk in self.chunks:
            if self.case.overlap:
                chunk.start_param_sync(force_sync=True)
        return gather({name: param.detach() for name, param in self.named_parameters()}, self.chunks)

    def masters(self, key: str = "master") -> dict[str, Tensor]:
        """Whole fp32 masters (or a moment) by global name, from every rank's shards."""
        local = {name: torch.zeros(param.shape) for name, param in self.named_parameters()}
        names = {param: name for name, param in self.named_parameters()}
        for owned in self.muon.owned:
            values = owned.master if key == "master" else owned.state.get(key)
            if values is not None:
                local[names[owned.param]].view(-1)[owned.start : owned.stop] = values
        for name, param in self.named_parameters():
            expert = not getattr(param, "allreduce", True)
            dense = self.ps.get_data_parallel_group(with_context_parallel=True)
            dist.all_reduce(local[name], group=self.ps.get_expert_data_parallel_group() if expert else dense)
        return gather(local, self.chunks)

    def set_gradients(self, seed: int) -> None:
        """The same whole mean gradients under every parallelism, as if they had been reduced."""
        fill({name: param.main_grad for name, param in self.named_parameters()}, self.chunks, f"gradient {seed} ")

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return _named(self.chunks)


def make_batch(step: int, number: int) -> Tensor:
    """Tokens (SAMPLES, LENGTH + 1) of one microbatch."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randint(0, VOCAB, (SAMPLES, LENGTH + 1), generator=generator)


def _forward_step(batches: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
    tokens = next(batches)
    positions = torch.arange(LENGTH).expand(SAMPLES, -1)
    mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), 1)
    losses = model(tokens[:, :-1].contiguous(), positions, mask, labels=tokens[:, 1:].contiguous())

    def mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = losses.float().mean()
        return loss, {"loss": loss.detach().clone()}

    return losses, mean


def _model_config(case: Case) -> Any:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    options: dict[str, Any] = {}
    if case.vpp:  # two stages exchange several messages at once, which one batch would mix up
        options.update(overlap_p2p_comm=True, batch_p2p_comm=False)
    if case.moe:
        options.update(
            num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=48, moe_token_dispatcher_type="alltoall"
        )
        options.update(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=1e-2)
        options.update(moe_shared_expert_intermediate_size=40)
    if case.gate:
        options.update(attention_output_gate=True)
    if case.mla:
        options.update(q_lora_rank=24, kv_lora_rank=16, qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=8)
        options.update(multi_latent_attention=True, rope_type="rope", num_query_groups=4)
    else:
        options.update(num_query_groups=2, kv_channels=8)
    plain: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "tensor_model_parallel_size": case.tp,
        "pipeline_model_parallel_size": case.pp,
        "virtual_pipeline_model_parallel_size": case.vpp,
        "expert_model_parallel_size": case.ep,
        "expert_tensor_parallel_size": case.etp,
        "context_parallel_size": case.cp,
        "sequence_parallel": (case.moe or case.mla) and case.tp > 1,
        "bf16": case.dtype == torch.bfloat16,
        "fp16": case.dtype == torch.float16,
        "params_dtype": case.dtype,
        "pipeline_dtype": case.dtype,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "normalization": "RMSNorm",
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    return (MLATransformerConfig if case.mla else TransformerConfig)(**{**plain, **options, **case.model})


def _build_chunk(case: Case, config: Any, stage: int | None) -> nn.Module:
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization="RMSNorm", multi_latent_attention=case.mla
    )
    return GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        pre_process=ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=case.tied,
        position_embedding_type="rope",
        vp_stage=stage,
    )


# ---- whole weights, read and written without the adapter's code ------------------------------------------


def _named(chunks: list[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """(global name, parameter): layers and experts numbered over the whole model, tied copies as one."""
    from megatron.core import parallel_state as ps

    for chunk in chunks:
        layers = {}
        for prefix, module in chunk.named_modules():
            if hasattr(module, "layer_number") and re.search(r"layers\.\d+$", prefix):
                layers[prefix] = module.layer_number - 1
        for name, param in chunk.named_parameters():
            prefix = re.match(r".*?layers\.\d+", name)
            if prefix:
                name = re.sub(r"layers\.\d+", f"layers.{layers[prefix.group()]}", name, count=1)
            expert = re.search(r"local_experts\.(\d+)", name)
            if expert:
                offset = ps.get_expert_model_parallel_rank() * (4 // ps.get_expert_model_parallel_world_size())
                name = name.replace(expert.group(), f"local_experts.{offset + int(expert.group(1))}")
            while name.startswith("module."):
                name = name.removeprefix("module.")
            if name == "output_layer.weight" and getattr(param, "shared_embedding", False):
                name = "embedding.word_embeddings.weight"
            yield name, param


def _cut(name: str, param: nn.Parameter) -> tuple[Any, int, int]:
    """(group, dimension, interleaved parts) of the tensor-parallel cut of a parameter."""
    from megatron.core import parallel_state as ps

    expert = "local_experts" in name
    group = ps.get_expert_tensor_parallel_group() if expert else ps.get_tensor_model_parallel_group()
    marked = getattr(param, "tensor_model_parallel", False)
    return (group if marked else None), getattr(param, "partition_dim", 0), 2 if "linear_fc1" in name else 1


def _join(parts: list[Tensor], dim: int, stride: int) -> Tensor:
    """The whole of tensor-parallel parts, each of `stride` interleaved pieces."""
    pieces = [part.chunk(stride, dim) for part in parts]
    return torch.cat([torch.cat([piece[i] for piece in pieces], dim) for i in range(stride)], dim)


def gather(local: dict[str, Tensor], chunks: list[nn.Module]) -> dict[str, Tensor]:
    """Whole tensors by name on every rank, from parts that are laid out like the parameters."""
    whole = {}
    for name, param in _named(chunks):
        group, dim, stride = _cut(name, param)
        parts = [local[name].contiguous()]
        if group is not None and dist.get_world_size(group) > 1:
            parts = [torch.empty_like(parts[0]) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, local[name].contiguous(), group=group)
        whole[name] = _join(parts, dim, stride).cpu().clone()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, whole)
    merged: dict[str, Tensor] = {}
    for part in everyone:
        for name, value in part.items():
            assert name not in merged or torch.equal(merged[name], value), f"{name} differs between its copies"
            merged[name] = value
    return merged


@torch.no_grad()
def fill(local: dict[str, Tensor], chunks: list[nn.Module], seed: str = "") -> None:
    """Write this rank's part of the same whole tensors under every parallelism, random by seed and name."""
    for name, param in _named(chunks):
        group, dim, stride = _cut(name, param)
        size = dist.get_world_size(group) if group is not None else 1
        shape = list(param.shape)
        if size > 1:
            shape[dim] *= size
        generator = torch.Generator().manual_seed(zlib.crc32((seed + name).encode()))
        whole = torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1) + (len(shape) == 1)
        if size > 1:
            rank = dist.get_rank(group)
            whole = torch.cat([part.chunk(size, dim)[rank] for part in whole.chunk(stride, dim)], dim)
        local[name].copy_(whole)
