"""The models to train, by name, and their size flags."""

from __future__ import annotations

import argparse
from dataclasses import fields

from launch.models.dense import Dense, DenseConfig
from launch.models.layers import CausalLM, cast_parameters
from launch.models.moonlight import Moonlight, MoonlightConfig, update_expert_bias

__all__ = [
    "MODELS",
    "CausalLM",
    "Dense",
    "DenseConfig",
    "Moonlight",
    "MoonlightConfig",
    "add_size_flags",
    "build_model",
    "cast_parameters",
    "sizes_from_flags",
    "update_expert_bias",
]

MODELS = {"dense": (DenseConfig, Dense), "moonlight": (MoonlightConfig, Moonlight)}
_NOT_A_FLAG = {"vocab_size", "rope_scaling"}  # the data, and a checkpoint, decide


def build_model(name: str, **sizes: object) -> CausalLM:
    """A freshly initialised model; seed torch before, so that every rank gets the same weights.

    Args:
        name: "dense" or "moonlight".
        **sizes: fields of the model's config that differ from its default.

    Raises:
        ValueError: unknown model, or a size that this model does not have.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown: choose from {', '.join(MODELS)}")
    config_class, model_class = MODELS[name]
    unknown = sorted(set(sizes) - {field.name for field in fields(config_class)})
    if unknown:
        raise ValueError(f"model {name!r} has no size {unknown[0]!r}: drop it or choose another model")
    return model_class(config_class(**sizes))


def add_size_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field of the models' configs, `hidden_size` as --hidden-size."""
    group = parser.add_argument_group("model sizes", "the model's own default where not given")
    owners: dict[str, list[str]] = {}
    defaults: dict[str, object] = {}
    for name, (config_class, _) in MODELS.items():
        for field in fields(config_class):
            if field.name not in _NOT_A_FLAG:
                owners.setdefault(field.name, []).append(name)
                defaults[field.name] = field.default
    for name, models in owners.items():
        flag, default = "--" + name.replace("_", "-"), defaults[name]
        text = ", ".join(models)
        if isinstance(default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(flag, type=type(default), default=None, help=text)


def sizes_from_flags(arguments: argparse.Namespace) -> dict[str, object]:
    """The sizes that were given on the command line, for `build_model`."""
    names = {field.name for config_class, _ in MODELS.values() for field in fields(config_class)} - {"vocab_size"}
    return {name: value for name in sorted(names) if (value := getattr(arguments, name, None)) is not None}
