"""Hugging Face checkpoint folders, config.json and *.safetensors, as the start and the end of a training run.

`Dense` is stored as a LlamaForCausalLM and `Moonlight` as a DeepseekV3ForCausalLM. Tensor names are the same on
both sides but for the prefix "model."; the layout differs in two places, which `_table`
describes for loading and saving alike:

- routed experts are tensors of their own in the files and stacks in the model;
- DeepSeek-V3 files keep the two rotary dimensions of a pair side by side (2i, 2i + 1), the model keeps them
  half a head apart (i, i + dim/2), so the rows of the projections that end in rotary dimensions are reordered.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from launch.models import MODELS, CausalLM, MoonlightConfig
from launch.models.layers import RopeScaling

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ROUTER_BIAS = ".e_score_correction_bias"
_DERIVED = ".rotary_emb.inv_freq"  # in older files; follows from rope_theta
_MAY_DIFFER = {"max_position_embeddings", "initializer_range"}  # what trained weights do not depend on


@dataclass(frozen=True)
class Family:
    """What a Hugging Face `model_type` says about one of our models.

    Args:
        model: its name in `MODELS`.
        architectures: accepted class names, the first one is written.
        fixed: entries of config.json with the only value that our model can do.
        defaults: what transformers takes for entries that a config.json leaves out.
    """

    model: str
    architectures: tuple[str, ...]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]


_FIXED = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
_DEFAULTS = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False}
_ROPE = {  # entries of each kind of scaling
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"},
}
_UNWRITTEN = {"quantization_config": None, "partial_rotary_factor": 1.0}  # checked like `fixed`, but not written
_FAMILIES = {
    "llama": Family(
        "dense",
        ("LlamaForCausalLM",),
        _FIXED | {"mlp_bias": False},
        _DEFAULTS | {"max_position_embeddings": 2048},
    ),
    "deepseek_v3": Family(
        "moonlight",
        ("DeepseekV3ForCausalLM", "MoonlightForCausalLM"),
        _FIXED | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "moe_layer_freq": 1},
        _DEFAULTS | {"max_position_embeddings": 4096, "n_group": 8, "topk_group": 4, "q_lora_rank": 1536},
    ),
}


def read_config(folder: Path, data_vocab_size: int | None = None) -> tuple[str, dict[str, object]]:
    """Our model's name and sizes, for `build_model`, of the checkpoint in `folder`.

    Args:
        folder: holds config.json.
        data_vocab_size: token ids in the data lie below it; None: not checked.

    Returns:
        "dense" or "moonlight", and every field of that model's config.

    Raises:
        ValueError: config.json is unreadable, lacks a size, asks for something that the model cannot do, or
            has fewer tokens than the data.
    """
    path = folder / CONFIG
    entries = _read_entries(path)
    family = _family(path, entries)
    entries = {**family.defaults, **entries}
    theta, scaling = _rope(path, entries)
    sizes = {**entries, "rope_theta": theta, "rope_scaling": scaling}
    heads = entries.get("num_attention_heads")
    sizes.setdefault("num_key_value_heads", heads)
    if heads and "hidden_size" in entries:
        sizes.setdefault("head_dim", entries["hidden_size"] // heads)
    names = [field.name for field in fields(MODELS[family.model][0])]
    for name in names:
        if name not in sizes:
            raise ValueError(f"{path} lacks {name!r}, a size of model {family.model!r}: add it")
    fixed = family.fixed | _UNWRITTEN
    if family.model == "moonlight":
        fixed |= {"num_key_value_heads": heads}
    for key, value in fixed.items():
        if (found := entries.get(key, value)) != value:
            raise ValueError(f"{path}: {key} is {found!r}, but model {family.model!r} can only do {value!r}")
    if data_vocab_size is not None and data_vocab_size > sizes["vocab_size"]:
        raise ValueError(
            f"{path}: vocab_size={sizes['vocab_size']} is less than the data's {data_vocab_size}: "
            "tokenize the data with the checkpoint's tokenizer"
        )
    return family.model, {name: sizes[name] for name in names}


def load_weights(model: CausalLM, folder: Path) -> int:
    """Fill `model` with the weights in `folder`, one tensor at a time; not collective, every rank reads.

    Args:
        model: built with the sizes of `read_config`, on any device, before an optimizer makes masters of its
            parameters. Values are rounded where the files have more bits than the parameters; the routers'
            biases keep fp32.
        folder: config.json with model.safetensors, or with shards and model.safetensors.index.json.

    Returns:
        How many tensors of multi-token prediction were left out, for which there is no place in the models.

    Raises:
        ValueError: the folder is of another model, or a tensor is missing, unexpected, of another shape or
            not a plain float. Earlier tensors have been filled then.
    """
    name, sizes = read_config(folder)
    family = _family_of(model)
    if family.model != name:
        raise ValueError(f"{folder} is a checkpoint of model {name!r}, not of {family.model!r}")
    for key in (field.name for field in fields(model.config)):
        value = getattr(model.config, key)
        if key not in _MAY_DIFFER and sizes[key] != value:
            raise ValueError(f"{folder / CONFIG}: {key} is {sizes[key]!r}, but the model was built with {value!r}")
    entries = _read_entries(folder / CONFIG)
    table = _table(model, entries.get("rope_interleave", True))
    files = _files(folder)
    found = {tensor for tensors in files.values() for tensor in tensors if not tensor.endswith(_DERIVED)}
    extra = range(len(model.layers), len(model.layers) + entries.get("num_nextn_predict_layers", 0))
    skipped = {tensor for tensor in found for layer in extra if tensor.startswith(f"model.layers.{layer}.")}
    found -= skipped
    _refuse(folder, "lacks", table.keys() - found)
    _refuse(folder, "has unexpected", found - table.keys())
    for file, tensors in files.items():
        try:
            with safe_open(file, "pt") as reader:
                for tensor in table.keys() & tensors:
                    _fill(table[tensor], reader.get_tensor(tensor), f"{file}: tensor {tensor!r}")
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or not what the index says: {error}") from None
    return len(skipped)


def save(model: CausalLM, folder: Path, dtype: torch.dtype | None = None, shard_bytes: int = 5 * 10**9) -> None:
    """Write `model` as a folder that transformers' `AutoModelForCausalLM.from_pretrained` loads.

    The folder appears only when it is complete. Not collective: call it on one rank, when no parameter is
    still being gathered. At most one shard is copied at a time. The tokenizer's files are the caller's to add.

    Args:
        model: on any device, left as it is.
        folder: must not exist yet, or be empty.
        dtype: of the parameters in the files; each one's own if None. The routers' biases stay fp32.
        shard_bytes: limit on a file, unless one tensor alone exceeds it; more than one file get an index.

    Raises:
        ValueError: `folder` holds something already.
    """
    check_target(folder)
    folder = folder.resolve()
    table = _table(model, interleaved=True)
    shards = _shards({name: part.bytes(_file_dtype(name, dtype)) for name, part in table.items()}, shard_bytes)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    weight_map, total = {}, 0
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: table[name].copy(_file_dtype(name, dtype)) for name in names}
        save_file(tensors, unfinished / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _write_json(unfinished / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(unfinished / CONFIG, _config(model, dtype or model.embed_tokens.weight.dtype))
    unfinished.rename(folder)


def check_target(folder: Path) -> None:
    """Refuse a folder that `save` will not write to; worth a call before a long run.

    Raises:
        ValueError: it holds something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: name another folder for the checkpoint, or remove it")


class Part(NamedTuple):
    """The place in the model of one tensor of the files.

    Args:
        view: memory of the model. rows: row i of the file is row rows[i] of `view`; None: the same order.
    """

    view: Tensor
    rows: Tensor | None = None

    def bytes(self, dtype: torch.dtype | None) -> int:
        return self.view.numel() * (dtype or self.view.dtype).itemsize

    def copy(self, dtype: torch.dtype | None) -> Tensor:
        """A copy on the CPU with the rows in the file's order."""
        ordered = self.view if self.rows is None else self.view.index_select(0, self.rows.to(self.view.device))
        return ordered.to("cpu", dtype or self.view.dtype, copy=True, memory_format=torch.contiguous_format)

    def fill(self, value: Tensor) -> None:
        """Write a tensor of the files into the model."""
        value = value.to(self.view)
        if self.rows is None:
            self.view.copy_(value)
        else:
            self.view.index_copy_(0, self.rows.to(self.view.device), value)


def _table(model: CausalLM, interleaved: bool) -> dict[str, Part]:
    """Every tensor of the files by name; what loading and saving agree on.

    Args:
        interleaved: the files of a `Moonlight` keep rotary pairs side by side.
    """
    table, config = {}, model.config
    reordered: dict[str, Tensor] = {}
    if interleaved and isinstance(config, MoonlightConfig):
        rope = config.qk_rope_head_dim
        queries = "q_b_proj.weight" if config.q_lora_rank else "q_proj.weight"
        reordered = {
            queries: _interleaved_rows(config.num_attention_heads, config.qk_nope_head_dim, rope),
            "kv_a_proj_with_mqa.weight": _interleaved_rows(1, config.kv_lora_rank, rope),
        }
    for ours, tensor in model.state_dict().items():
        name = ours if ours.startswith("lm_head.") else f"model.{ours}"
        module, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            for expert, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                table[f"{module}.{expert}.gate_proj.weight"] = Part(gate)
                table[f"{module}.{expert}.up_proj.weight"] = Part(up)
        elif leaf == "down_proj":
            for expert, down in enumerate(tensor):
                table[f"{module}.{expert}.down_proj.weight"] = Part(down)
        elif not (name == "lm_head.weight" and config.tie_word_embeddings):
            table[name] = Part(tensor, reordered.get(name.partition(".self_attn.")[2]))
    return table


def _interleaved_rows(heads: int, plain: int, rope: int) -> Tensor:
    """Our row of each row in the file, for heads of `plain` rows without position and `rope` rotary ones."""
    pairs = torch.arange(rope).view(2, rope // 2).T.flatten()  # 0, rope/2, 1, rope/2 + 1, ...
    head = torch.cat((torch.arange(plain), plain + pairs))  # (plain + rope,)
    return (torch.arange(heads).unsqueeze(1) * (plain + rope) + head).flatten()


def _fill(part: Part, value: Tensor, where: str) -> None:
    if value.shape != part.view.shape:
        raise ValueError(f"{where} has shape {tuple(value.shape)}, but the model's is {tuple(part.view.shape)}")
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{where} is {value.dtype}: only fp32, bf16 and fp16 can be loaded, dequantize it first")
    part.fill(value)


def _refuse(folder: Path, problem: str, tensors: Collection[str]) -> None:
    if tensors:
        more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        raise ValueError(f"{folder} {problem} tensor {min(tensors)!r}{more}: its config.json describes other weights")


def _files(folder: Path) -> dict[Path, list[str]]:
    """The names of the tensors in each weight file."""
    if (single := folder / WEIGHTS).exists():
        try:
            with safe_open(single, "pt") as reader:
                return {single: list(reader.keys())}
        except SafetensorError as error:
            raise ValueError(f"{single} is damaged: {error}") from None
    if not (folder / INDEX).exists():
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}: convert its weights to safetensors")
    files: dict[Path, list[str]] = {}
    for name, file in _read_json(folder / INDEX).get("weight_map", {}).items():
        files.setdefault(folder / file, []).append(name)
    for file in files:
        if not file.exists():
            raise ValueError(f"{folder / INDEX} names {file.name}, which is missing: complete the folder")
    return files


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Consecutive names in files of at most `limit` bytes, or of one tensor where it is larger."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _file_dtype(name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    return None if name.endswith(_ROUTER_BIAS) else dtype


def _config(model: CausalLM, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of `model`; the inverse of `read_config`."""
    family = _family_of(model)
    (model_type,) = (key for key, value in _FAMILIES.items() if value is family)
    config = {
        "architectures": [family.architectures[0]],
        "model_type": model_type,
        "torch_dtype": str(dtype).removeprefix("torch."),
        # Left out, transformers would fill in special tokens of a vocabulary that is not this one.
        "bos_token_id": None,
        "eos_token_id": None,
        **family.fixed,
        **asdict(model.config),
    }
    if family.model == "moonlight":
        config |= {"num_key_value_heads": model.config.num_attention_heads, "rope_interleave": True}
        config |= {"q_lora_rank": model.config.q_lora_rank or None, "num_nextn_predict_layers": 0}
    if (scaling := model.config.rope_scaling) is not None:
        written = {key: value for key, value in asdict(scaling).items() if key in _ROPE[scaling.rope_type]}
        config["rope_scaling"] = {"rope_type": scaling.rope_type, **written}
    return config


def _family(path: Path, entries: Mapping[str, Any]) -> Family:
    kind = entries.get("model_type")
    if kind not in _FAMILIES:
        raise ValueError(f"{path}: model_type is {kind!r}, but only {', '.join(_FAMILIES)} can be loaded")
    family = _FAMILIES[kind]
    for name in entries.get("architectures", ()):
        if name not in family.architectures:
            raise ValueError(f"{path}: architectures names {name!r}, not one of {', '.join(family.architectures)}")
    return family


def _family_of(model: CausalLM) -> Family:
    return next(family for family in _FAMILIES.values() if isinstance(model, MODELS[family.model][1]))


def _rope(path: Path, entries: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base of the wavelengths and their scaling, from transformers 5's `rope_parameters` or the older entries."""
    theta, scaling = entries.get("rope_theta", 10_000.0), None
    for key in ("rope_scaling", "rope_parameters"):
        rope = {name: value for name, value in entries.get(key, {}).items() if value is not None}
        theta = rope.pop("rope_theta", theta)
        old, new = rope.pop("type", "default"), rope.pop("rope_type", "default")
        kind = old if new == "default" else new
        if (partial := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
            raise ValueError(f"{path}: {key} has partial_rotary_factor {partial!r}, but the models can only do 1.0")
        if kind not in ("default", *_ROPE):
            raise ValueError(f"{path}: {key} has rope_type {kind!r}, but the models can only do {', '.join(_ROPE)}")
        if kind == "default":
            if rope:
                raise ValueError(f"{path}: {key} has {min(rope)!r}, but its rope_type scales nothing: name one")
            continue
        needed, known = {"factor", "original_max_position_embeddings"}, _ROPE[kind]
        if unknown := rope.keys() - known:
            raise ValueError(f"{path}: {key} has {min(unknown)!r}, which the models cannot do")
        if missing := needed - rope.keys():
            raise ValueError(f"{path}: {key} lacks {min(missing)!r}: add it")
        scaling = RopeScaling(rope_type=kind, **rope)
    return theta, scaling


def _read_entries(path: Path) -> dict[str, Any]:
    """A config.json, in which null means the same as no entry, but for queries: they are not compressed then."""
    entries = _read_json(path)
    if entries.get("q_lora_rank", 0) is None:
        entries["q_lora_rank"] = 0
    return {key: value for key, value in entries.items() if value is not None}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
