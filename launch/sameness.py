"""Settings and data that must be the same on every rank, compared when a run starts."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from launch.data import TokenData
from launch.world import World

# Paths may differ where every node has a copy of its own (the data itself is compared); the launcher sets the rest.
_MAY_DIFFER = {"data", "tokenizer", "local_rank", "config"}
_BLOCK = 1 << 16  # tokens read at a time
_BLOCKS = 4096  # read at most, spread over all arrays


def check_same(world: World, args: Namespace, data: TokenData) -> None:
    """Refuse ranks that were started with other settings or other data; collective.

    Raises:
        ValueError: on every rank, naming the setting, its values and the ranks.
    """
    own = {f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items() if name not in _MAY_DIFFER}
    lines = differences(world.gather(own | {"data": digest(data)}))
    if lines:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise ValueError(f"the ranks differ: {lines[0]}{more}: start every node with the same flags and data")


def differences(facts: Sequence[Mapping[str, str]]) -> list[str]:
    """One line per fact that differs from the majority.

    Args:
        facts: of every rank, by name.
    """
    lines = []
    for name in sorted({name for own in facts for name in own}):
        values = [own.get(name, "unset") for own in facts]
        usual = Counter(values).most_common(1)[0][0]
        for value in dict.fromkeys(value for value in values if value != usual):
            ranks = [rank for rank, other in enumerate(values) if other == value]
            lines.append(f"{name} is {value} on {spans(ranks)}, {usual} on the others")
    return lines


def spans(ranks: Sequence[int]) -> str:
    """Ranks as people write them: "rank 3", "ranks 0-3, 6"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
    return f"rank {words}" if len(ranks) == 1 else f"ranks {words}"


def digest(data: TokenData) -> str:
    """Number of tokens and a hash: of all of them, or of blocks spread evenly over arrays of many million."""
    code, tokens = hashlib.blake2b(digest_size=6), 0
    arrays = [*data.train.arrays, *data.validation.arrays]
    most = max(1, _BLOCKS // len(arrays))
    for array in arrays:
        tokens += len(array)
        code.update(f"{array.dtype} {len(array)}".encode())
        blocks = -(-len(array) // _BLOCK)
        for block in np.linspace(0, max(0, blocks - 1), min(blocks, most)).astype(int):
            code.update(np.ascontiguousarray(array[block * _BLOCK : (block + 1) * _BLOCK]).tobytes())
    return f"{tokens} tokens of digest {code.hexdigest()}"
