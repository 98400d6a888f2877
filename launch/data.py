"""Token data: read text or token files, hold out a validation part, cut batches that any rank can recompute.

A batch is a pure function of (seed, step, microbatch, rank, world size): the samples of a step are
numbered through, and a sample's number alone decides its tokens. So a resumed run sees exactly the
batches it would have seen, and 8 samples are the same 8 on one rank as on four.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BYTE_VOCAB = 256
HELD_OUT = 0.05  # part of the tokens that validation keeps
_TEXT, _JSONL, _RAW, _NUMPY = (".txt", ".text", ".md", ".py"), (".jsonl",), (".bin",), (".npy",)
_SHUFFLE_SEED = 0  # of the documents before the split: the held-out part must not move with --seed


class TokenStream:
    """Windows of `length` tokens (and the target after the last) over a list of token arrays.

    Args:
        arrays: 1-D integer arrays or memmaps; a window never crosses from one to the next.
        length: tokens per window.
    """

    def __init__(self, arrays: Sequence[np.ndarray], length: int) -> None:
        self.arrays, self.length = arrays, length
        # One window fewer than fits, so that every epoch may shift the cuts by up to length - 1 tokens.
        windows = [max(0, len(array) // length - 1) for array in arrays]
        self._starts = np.concatenate(([0], np.cumsum(windows)))
        if not len(self):
            tokens = sum(len(array) for array in arrays)
            raise ValueError(f"{tokens} tokens hold no window of --sequence-length {length}: give more --data")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def window(self, number: int, shift: int = 0) -> np.ndarray:
        """Window `number` of len(self), `shift` < length tokens later; (length + 1,) int64."""
        index = int(np.searchsorted(self._starts, number, side="right")) - 1
        start = (number - int(self._starts[index])) * self.length + shift
        return self.arrays[index][start : start + self.length + 1].astype(np.int64)


class TokenData:
    """Training batches and validation windows.

    Args:
        train, validation: 1-D token arrays.
        vocab_size: more than the largest token.
        length: tokens per sample.
        seed: order of the training samples.
    """

    def __init__(
        self,
        train: Sequence[np.ndarray],
        validation: Sequence[np.ndarray],
        vocab_size: int,
        length: int,
        seed: int = 0,
    ) -> None:
        self.vocab_size, self.length, self.seed = vocab_size, length, seed
        self.train, self.validation = TokenStream(train, length), TokenStream(validation, length)
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> tuple[np.ndarray, int]:
        """Order of the windows in an epoch, and the shift of their cuts."""
        generator = np.random.default_rng((self.seed, epoch))
        return generator.permutation(len(self.train)), int(generator.integers(self.length))

    def batch(
        self, step: int, microbatch: int, rank: int, world: int, *, size: int, accumulation: int
    ) -> tuple[Tensor, Tensor]:
        """One rank's microbatch.

        Args:
            step, microbatch, rank, world: which one; microbatch < accumulation, rank < world.
            size: samples per rank and microbatch.
            accumulation: microbatches per step.

        Returns:
            Tokens (size, length) int64, and the targets, the tokens one further on. The same samples make
            up a step however world * accumulation * size factors.
        """
        first = ((step * accumulation + microbatch) * world + rank) * size
        windows = []
        for sample in range(first, first + size):
            epoch, place = divmod(sample, len(self.train))
            order, shift = self._epoch(epoch)
            windows.append(self.train.window(int(order[place]), shift))
        return _tokens_and_targets(windows)

    def validation_batches(self, samples: int, rank: int, world: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of `samples` windows spread evenly over the held-out part (all, if fewer)."""
        stream = self.validation
        chosen = np.linspace(0, len(stream) - 1, min(samples, len(stream))).astype(int)[rank::world]
        for start in range(0, len(chosen), size):
            yield _tokens_and_targets([stream.window(int(number)) for number in chosen[start : start + size]])

    def unigram_loss(self, samples: int) -> float:
        """Cross-entropy, in nats per token, of the training part's token frequencies on the held-out part.

        Args:
            samples: as in `validation_batches`, so that the two losses are over the same targets.
        """
        counts = np.ones(self.vocab_size)  # add-one smoothing
        for array in self.train.arrays:
            for start in range(0, len(array), 1 << 24):  # a memmap need not fit into memory
                counts += np.bincount(array[start : start + (1 << 24)], minlength=self.vocab_size)
        nats = -np.log(counts / counts.sum())
        targets = [target for _, target in self.validation_batches(samples, 0, 1, 64)]
        return float(nats[torch.cat(targets).numpy()].mean())


def load_data(
    paths: Sequence[str | Path],
    length: int,
    *,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    bin_dtype: str = "uint16",
    vocab_size: int | None = None,
) -> TokenData:
    """Read the training data; every rank reads the same.

    Args:
        paths: files, or directories that are searched for them: text (.txt .text .md .py), .jsonl with a
            "text" key, token arrays (.npy, or raw .bin), which stay on disk. Empty: the source text of the
            running Python's standard library.
        length: tokens per sample.
        seed: order of the training samples.
        tokenizer: a tokenizer.json of Hugging Face's tokenizers for text and .jsonl; None: bytes as tokens.
        bin_dtype: type of the tokens in .bin files.
        vocab_size: of token files; None: one more than the largest token, for which all of them are read.

    Raises:
        ValueError: no file, unknown kind of file, text and token files mixed, or too little data.
    """
    files = _find_files([Path(path) for path in paths]) if paths else standard_library_files()
    token_files = [file for file in files if file.suffix in _RAW + _NUMPY]
    if token_files and len(token_files) < len(files):
        raise ValueError("--data mixes token files (.bin .npy) with text: give one kind")
    if token_files:
        arrays = [_token_array(file, bin_dtype) for file in token_files]
        if vocab_size is not None and vocab_size < 1:
            raise ValueError(f"--vocab-size {vocab_size}: must be at least 1")
        vocab = vocab_size or 1 + max(int(array.max()) for array in arrays)
        cuts = [round(len(array) * (1 - HELD_OUT)) for array in arrays]
        train = [array[:cut] for array, cut in zip(arrays, cuts, strict=True)]
        validation = [array[cut:] for array, cut in zip(arrays, cuts, strict=True)]
    else:
        tokens, vocab = _encode([text for file in files for text in _texts(file)], tokenizer)
        cut = round(len(tokens) * (1 - HELD_OUT))
        train, validation = [tokens[:cut]], [tokens[cut:]]
    return TokenData(train, validation, vocab, length, seed)


def standard_library_files() -> list[Path]:
    """The sorted .py files of the running Python's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    return [file for file in _walk(root, skipped) if file.suffix == ".py"]


def _walk(root: Path, skipped: set[str]) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - skipped)
        found += [Path(folder, name) for name in names]
    return sorted(found)


def _find_files(paths: list[Path]) -> list[Path]:
    kinds = _TEXT + _JSONL + _RAW + _NUMPY
    files = []
    for path in paths:
        if path.is_dir():
            files += [file for file in _walk(path, set()) if file.suffix in kinds]
        elif not path.exists():
            raise ValueError(f"--data {path}: no such file or directory")
        elif path.suffix not in kinds:
            raise ValueError(f"--data {path}: unknown kind of file, not one of {' '.join(kinds)}")
        else:
            files.append(path)
    if not files:
        raise ValueError(f"--data {paths[0]}: no file that ends in {' '.join(kinds)}")
    return files


def _texts(file: Path) -> Iterator[str]:
    if file.suffix not in _JSONL:
        yield file.read_text(encoding="utf-8", errors="replace")
        return
    # Bytes end lines at \n only; a decoder would fail somewhere in a block of lines.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"--data {file}: line {number} is not JSON: {error}") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f'--data {file}: line {number} has no "text" key with a string')
            yield record["text"]


def _encode(texts: list[str], tokenizer: str | Path | None) -> tuple[np.ndarray, int]:
    """The documents in shuffled order, one after the other, as tokens; and the vocabulary's size."""
    shuffled = [texts[i] for i in np.random.default_rng(_SHUFFLE_SEED).permutation(len(texts))]
    if tokenizer is None:
        return np.frombuffer("".join(shuffled).encode(), dtype=np.uint8), BYTE_VOCAB
    from tokenizers import Tokenizer

    if not Path(tokenizer).is_file():
        raise ValueError(f"--tokenizer {tokenizer}: no such file: give a tokenizer.json")
    try:
        encoder = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises no narrower type
        raise ValueError(f"--tokenizer {tokenizer}: not a tokenizer.json of Hugging Face's: {error}") from None
    ids = [np.array(document.ids, dtype=np.uint32) for document in encoder.encode_batch(shuffled)]
    return np.concatenate(ids), encoder.get_vocab_size()


def _token_array(file: Path, bin_dtype: str) -> np.ndarray:
    try:
        if file.suffix in _RAW:
            return np.memmap(file, dtype=bin_dtype, mode="r")
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--data {file}: {error}") from None
    if array.ndim != 1 or array.dtype.kind not in "ui":
        raise ValueError(f"--data {file}: {array.dtype} of shape {array.shape}, not a 1-D array of token numbers")
    return array


def _tokens_and_targets(windows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    stacked = torch.from_numpy(np.stack(windows))  # (samples, length + 1)
    return stacked[:, :-1].contiguous(), stacked[:, 1:].contiguous()
