"""What a resumed run does in another way than before, in one line: an option that changes must not do so unseen."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.arguments import model_config
from launch.models import MODELS

# How a job is started and watched, which changes nothing that it computes; "deepspeed" repeats what other flags say.
_NO_MATTER = {"config", "set", "resume", "run_dir", "stop_file", "stop_code", "exit_after", "log_to", "log_interval"}
_NO_MATTER |= {"timeout", "profile_steps", "profile_ranks", "peak_tflops", "save_hf", "local_rank", "deepspeed"}
# Set by the schedule at every step, whatever a checkpoint says.
_SCHEDULED = {"lr"}


def as_settings(args: Namespace, world_size: int) -> dict[str, Any]:
    """The flags as settings.json has them; paths and the like become text."""
    return json.loads(json.dumps({**vars(args), "world_size": world_size}, default=str))


def read_settings(file: Path) -> dict[str, Any]:
    """What an earlier job in this directory was started with; empty where that cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_sizes(before: Mapping[str, Any], args: Namespace) -> None:
    """Raise a ValueError that names the first size in which the model is another one than the earlier job's."""
    if before.get("model") not in MODELS:
        return
    models = [{"model": named.model, **vars(model_config(named, 1))} for named in (Namespace(**before), args)]
    for name, value in models[1].items():
        earlier = models[0].get(name)
        if isinstance(value, (int, float, str)) and value != earlier and name != "max_position_embeddings":
            raise ValueError(
                f"{_flag(name)} is {value}, in the run that is resumed {earlier}: give the same, or another --run-dir"
            )


def group_options(args: Namespace, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The options of parameter groups that are also flags."""
    known = vars(args).keys() - _SCHEDULED
    return [{key: group[key] for key in sorted(known & group.keys())} for group in groups]


def kept_options(given: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By flag, what the checkpoint says of an option against the flag.

    Args:
        given, loaded: `group_options` before and after a checkpoint was loaded.
    """
    return {
        key: f"{after[key]} ({before[key]} was given)"
        for before, after in zip(given, loaded, strict=True)
        for key in before
        if key in after and after[key] != before[key]
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any], kept: Mapping[str, str]) -> str | None:
    """The line, or None where nothing differs.

    Args:
        before, now: settings of the earlier job and of this one. kept: of `kept_options`.
    """
    changed = [
        f"{_flag(key)} {before[key]} -> {value}"
        for key, value in now.items()
        if key in before and before[key] != value and key not in _NO_MATTER and key not in kept
    ]
    stays = [f"{_flag(key)} {words}" for key, words in kept.items()]
    parts = [f"changed {', '.join(changed)}"] * bool(changed)
    parts += [f"kept from the checkpoint {', '.join(stays)}"] * bool(stays)
    return f"note: resumed with other options: {'; '.join(parts)}" if parts else None


def _flag(key: str) -> str:
    return "ranks" if key == "world_size" else f"--{key.replace('_', '-')}"
