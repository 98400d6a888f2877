"""The trainers' models built from megatron-core's own modules: GPT for "dense", MLA and experts for "moonlight"."""

from __future__ import annotations

import argparse
import math
from dataclasses import fields, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import nn

from launch import arguments
from launch.megatron_weights import load_plain_weights
from launch.models import MODELS, DenseConfig, MoonlightConfig, sizes_from_flags

try:
    import transformer_engine  # noqa: F401

    TRANSFORMER_ENGINE = True
except ImportError:
    TRANSFORMER_ENGINE = False

_LATENT_EPS = 1e-6  # of the norm of MLA's latent, which the published models leave at this whatever the others have
_LLAMA3 = (8192, 1.0, 4.0)  # length before, low and high factor: fixed in Megatron
_VOCAB_MULTIPLE = 128  # rows of the embedding, so that any TP size divides them and checkpoints fit all


def transformer_config(args: argparse.Namespace) -> TransformerConfig:
    """Megatron's config of the model and the parallelism that the command line asks for.

    Raises:
        ValueError: a size that the model does not have, or a parallelism that Megatron refuses.
    """
    sizes = _sizes(args)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    options: dict[str, Any] = {
        "num_layers": sizes.num_hidden_layers,
        "hidden_size": sizes.hidden_size,
        "num_attention_heads": sizes.num_attention_heads,
        "ffn_hidden_size": sizes.intermediate_size,
        "init_method_std": sizes.initializer_range,
        "layernorm_epsilon": sizes.rms_norm_eps,
        "tensor_model_parallel_size": args.tp,
        "pipeline_model_parallel_size": args.pp,
        "virtual_pipeline_model_parallel_size": args.vpp,
        "expert_model_parallel_size": args.ep,
        "expert_tensor_parallel_size": args.etp,
        "sequence_parallel": args.tp > 1,
        "bf16": args.dtype == "bf16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Fusions that need Apex or kernels of their own; Transformer Engine brings its own.
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    if args.vpp:
        options |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if isinstance(sizes, MoonlightConfig):
        return MLATransformerConfig(**options, **_moonlight(sizes, args))
    options |= {"num_query_groups": sizes.num_key_value_heads, "kv_channels": sizes.head_dim}
    return TransformerConfig(**options)


def _sizes(args: argparse.Namespace) -> DenseConfig | MoonlightConfig:
    config_class, given = MODELS[args.model][0], sizes_from_flags(args)
    unknown = sorted(set(given) - {field.name for field in fields(config_class)})
    if unknown:
        raise ValueError(f"model {args.model!r} has no size {unknown[0]!r}: drop it or choose another model")
    return config_class(**given)


def _moonlight(sizes: MoonlightConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Latent attention, sigmoid routing balanced by biases, shared experts."""
    return {
        "multi_latent_attention": True,
        "q_lora_rank": sizes.q_lora_rank or None,
        **_groups(sizes),
        "kv_lora_rank": sizes.kv_lora_rank,
        "qk_head_dim": sizes.qk_nope_head_dim,
        "qk_pos_emb_head_dim": sizes.qk_rope_head_dim,
        "v_head_dim": sizes.v_head_dim,
        "rope_type": "rope",
        "rotary_base": sizes.rope_theta,
        "num_moe_experts": sizes.n_routed_experts,
        "moe_layer_freq": [int(layer >= sizes.first_k_dense_replace) for layer in range(sizes.num_hidden_layers)],
        "moe_ffn_hidden_size": sizes.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": sizes.n_shared_experts * sizes.moe_intermediate_size,
        "moe_router_topk": sizes.num_experts_per_tok,
        "moe_router_topk_scaling_factor": sizes.routed_scaling_factor,
        "moe_router_score_function": "sigmoid",
        "moe_router_load_balancing_type": "none",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": args.expert_bias_rate,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": TRANSFORMER_ENGINE,
    }


def _groups(sizes: MoonlightConfig) -> dict[str, Any]:
    """Megatron's options for a router that chooses groups of experts first."""
    if sizes.n_group == 1:
        return {}
    return {"moe_router_num_groups": sizes.n_group, "moe_router_group_topk": sizes.topk_group}


def _rope_scaling(sizes: DenseConfig | MoonlightConfig) -> dict[str, Any]:
    """Megatron's options for a model that was stretched to longer sequences.

    Raises:
        ValueError: Megatron has no such scaling.
    """
    scaling = sizes.rope_scaling
    if scaling is None:
        return {}
    given = (scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor)
    if isinstance(sizes, MoonlightConfig) or scaling.rope_type != "llama3" or given != _LLAMA3:
        raise ValueError(
            f"--init-from: Megatron's modules cannot scale positions as {scaling.rope_type!r} of this checkpoint; "
            "the plain and DeepSpeed trainers can"
        )
    return {"rope_scaling": True, "rope_scaling_factor": scaling.factor}


def build_chunks(args: argparse.Namespace, config: TransformerConfig, vocab_size: int) -> list[nn.Module]:
    """This rank's model chunks, wrapped in DDP; parallel_state must be initialized.

    With --init plain they start from the weights of the plain trainer's model of the same seed, or of --init-from.

    Args:
        args: of the Megatron trainer. config: from `transformer_config`. vocab_size: of the data.
    """
    stages = range(args.vpp) if args.vpp else [None]
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=args.overlap,
        overlap_param_gather=args.overlap,
        bucket_size=None if args.bucket_mb is None else round(args.bucket_mb * 2**18),
    )
    weights = None
    if args.init == "plain":
        weights = arguments.make_model(args, vocab_size, torch.device("cpu")).state_dict()
        vocab_size = len(weights["embed_tokens.weight"])  # a checkpoint's may be larger than the data's
    models = [_gpt(args, config, vocab_size, stage) for stage in stages]
    if weights is not None:
        for model in models:
            load_plain_weights(model, weights)
    return [_wrap(args, config, replace(ddp_config), model) for model in models]


def _gpt(args: argparse.Namespace, config: TransformerConfig, vocab_size: int, stage: int | None) -> GPTModel:
    sizes = _sizes(args)
    spec = get_gpt_decoder_block_spec(config, TRANSFORMER_ENGINE, normalization="RMSNorm", vp_stage=stage)
    model = GPTModel(
        config,
        spec,
        vocab_size=math.ceil(vocab_size / _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE,
        max_sequence_length=args.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=sizes.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=round(sizes.rope_theta),
        **_rope_scaling(sizes),
        vp_stage=stage,
    )
    if config.multi_latent_attention:
        for layer in model.decoder.layers:
            # Megatron's "qk_layernorm" would norm a query that is not compressed, too.
            layer.self_attention.kv_layernorm = _latent_norm(config, config.kv_lora_rank)
            if config.q_lora_rank is not None:
                layer.self_attention.q_layernorm = _latent_norm(config, config.q_lora_rank)
    return model


def _latent_norm(config: TransformerConfig, size: int) -> nn.RMSNorm:
    norm = nn.RMSNorm(size, eps=_LATENT_EPS, dtype=config.params_dtype)
    norm.weight.sequence_parallel = config.sequence_parallel
    return norm


def _wrap(
    args: argparse.Namespace, config: TransformerConfig, ddp_config: DistributedDataParallelConfig, gpt: GPTModel
) -> nn.Module:
    model: nn.Module = gpt.to(torch.cuda.current_device())
    if config.bf16:
        model = Float16Module(config, model)
    keywords = {}
    if args.aligned:
        from distributed_muon.integrations.megatron import shard_aligned_param_layout

        dense = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        expert = parallel_state.get_expert_data_parallel_world_size()
        size = ddp_config.bucket_size or max(40_000_000, 1_000_000 * dense)
        size = size if args.overlap else None
        keywords["full_param_layout"] = shard_aligned_param_layout(model, ddp_config, dense, expert, size)
    return DistributedDataParallel(config, ddp_config, model, **keywords)
