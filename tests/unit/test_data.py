"""The data: what is read, what is held out, and that a batch depends on its place in the run alone."""

import json

import numpy as np
import pytest
import torch

from launch.data import TokenData, TokenStream, load_data, standard_library_files


def counting_data(tokens=1000, length=10, seed=0):
    """Token t at place t, so that a batch tells where it comes from."""
    return TokenData([np.arange(tokens)], [np.arange(200)], tokens, length, seed)


def step_samples(data, step, world, accumulation, size):
    """First tokens of a whole step's samples, in the order of the ranks and microbatches."""
    starts = []
    for microbatch in range(accumulation):
        for rank in range(world):
            tokens, _ = data.batch(step, microbatch, rank, world, size=size, accumulation=accumulation)
            starts += tokens[:, 0].tolist()
    return starts


def test_batch_is_windows_and_the_tokens_after_them():
    tokens, targets = counting_data().batch(3, 0, 1, 2, size=4, accumulation=1)
    assert tokens.shape == targets.shape == (4, 10)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, tokens + 1)
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(10))


def test_a_batch_depends_on_its_place_alone():
    data = counting_data()
    later = data.batch(40, 1, 1, 2, size=2, accumulation=2)
    data.batch(0, 0, 0, 2, size=2, accumulation=2)
    again = counting_data().batch(40, 1, 1, 2, size=2, accumulation=2)
    assert torch.equal(later[0], again[0])
    other = counting_data(seed=1).batch(40, 1, 1, 2, size=2, accumulation=2)
    assert not torch.equal(later[0], other[0])


def test_one_times_eight_samples_are_four_times_two():
    data = counting_data()
    for step in (0, 5, 30):
        expected = step_samples(data, step, world=1, accumulation=1, size=8)
        for world, accumulation, size in ((4, 1, 2), (2, 2, 2), (1, 4, 2), (8, 1, 1), (1, 8, 1)):
            assert step_samples(data, step, world, accumulation, size) == expected


def test_an_epoch_shows_every_window_once_and_the_next_one_cuts_elsewhere():
    data = counting_data()
    windows = len(data.train)
    assert windows == 99
    first = [start for step in range(33) for start in step_samples(data, step, 3, 1, 1)]
    second = [start for step in range(33, 66) for start in step_samples(data, step, 3, 1, 1)]
    for epoch in (first, second):
        assert len({start // 10 for start in epoch}) == windows
        assert len({start % 10 for start in epoch}) == 1
        assert epoch != sorted(epoch)
    assert first[0] % 10 != second[0] % 10
    assert max(first + second) + 10 < 1000


def test_windows_do_not_cross_arrays():
    stream = TokenStream([np.arange(0, 35), np.arange(100, 108), np.arange(200, 240)], 10)
    assert len(stream) == 2 + 0 + 3
    starts = [int(stream.window(number, shift=9)[0]) for number in range(5)]
    assert starts == [9, 19, 209, 219, 229]
    assert all(np.array_equal(np.diff(stream.window(n, 9)), np.ones(10)) for n in range(5))
    with pytest.raises(ValueError, match="19 tokens hold no window of --sequence-length 10"):
        TokenStream([np.arange(19)], 10)


def test_validation_is_shared_without_overlap_and_spread_over_the_held_out_part():
    data = counting_data()
    parts = [list(data.validation_batches(6, rank, 4, 1)) for rank in range(4)]
    assert [len(part) for part in parts] == [2, 2, 1, 1]
    starts = sorted(int(tokens[0, 0]) for part in parts for tokens, _ in part)
    assert starts == [0, 30, 70, 100, 140, 180]
    everything = [tokens for tokens, _ in data.validation_batches(10_000, 0, 1, 8)]
    assert torch.cat(everything)[:, 0].tolist() == list(range(0, 190, 10))


def test_unigram_loss_is_the_cross_entropy_of_the_training_frequencies():
    train = np.array([0] * 59 + [1] * 19 + [2] * 19)  # with add-one: 60, 20, 20 of 100
    data = TokenData([train], [np.array([0, 1] * 11)], 3, 10)
    expected = -(np.log(0.6) + np.log(0.2)) / 2
    assert data.unigram_loss(100) == pytest.approx(expected, rel=1e-12)


def test_default_is_the_standard_library_without_tests():
    files = standard_library_files()
    assert files == sorted(files)
    names = {file.name for file in files}
    assert {"argparse.py", "typing.py"} < names
    assert not any(part in {"test", "tests", "site-packages"} for file in files for part in file.parts[-3:-1])
    data = load_data([], 64)
    assert data.vocab_size == 256
    held_out, train = (sum(map(len, part.arrays)) for part in (data.validation, data.train))
    assert held_out / (held_out + train) == pytest.approx(0.05, abs=1e-4)
    assert held_out + train == pytest.approx(sum(file.stat().st_size for file in files), rel=1e-3)
    again = load_data([], 64, seed=7)
    assert np.array_equal(again.validation.arrays[0], data.validation.arrays[0])  # --seed does not move it
    assert 2.5 < data.unigram_loss(64) < 3.6


def test_text_and_jsonl_become_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 50)
    lines = [json.dumps({"text": "x" * 50, "id": 1}), "", json.dumps({"text": "y" * 50})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    (tmp_path / "ignored.json").write_text("{}")
    data = load_data([tmp_path], 2)
    everything = np.concatenate([*data.train.arrays, *data.validation.arrays])
    assert np.bincount(everything).nonzero()[0].tolist() == [ord("x"), ord("y"), 0xA9, 0xC3]
    assert len(everything) == 200
    same = load_data([tmp_path / "a.txt", tmp_path / "b.jsonl"], 2)
    assert np.array_equal(same.train.arrays[0], data.train.arrays[0])


def test_tokenizer_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a b c " * 100)
    data = load_data([tmp_path / "text.txt"], 4, tokenizer=tmp_path / "tokenizer.json")
    assert data.vocab_size == 3
    assert data.train.arrays[0][:6].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("kind", ["bin16", "bin32", "npy"])
def test_token_files_stay_on_disk(tmp_path, kind):
    tokens = np.arange(70_000 if kind != "bin16" else 60_000, dtype=np.uint16 if kind == "bin16" else np.uint32)
    file = tmp_path / ("tokens.npy" if kind == "npy" else "tokens.bin")
    np.save(file, tokens) if kind == "npy" else tokens.tofile(file)
    data = load_data([file], 16, bin_dtype="uint32" if kind == "bin32" else "uint16")
    assert isinstance(data.train.arrays[0], np.memmap)
    assert data.vocab_size == len(tokens)
    assert np.array_equal(data.validation.arrays[0], tokens[round(len(tokens) * 0.95) :])
    batch, targets = data.batch(0, 0, 0, 1, size=2, accumulation=1)
    assert torch.equal(targets, batch + 1)
    assert (
        load_data([file], 16, bin_dtype="uint16" if kind == "bin16" else "uint32", vocab_size=99_999).vocab_size
        == 99_999
    )


def test_wrong_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="nothing: no such file or directory"):
        load_data([tmp_path / "nothing"], 4)
    with pytest.raises(ValueError, match="no file that ends in"):
        load_data([tmp_path], 4)
    (tmp_path / "x.parquet").write_text("")
    with pytest.raises(ValueError, match=r"x.parquet: unknown kind of file"):
        load_data([tmp_path / "x.parquet"], 4)
    np.save(tmp_path / "square.npy", np.zeros((2, 2), dtype=np.int64))
    with pytest.raises(ValueError, match=r"square.npy: int64 of shape \(2, 2\), not a 1-D array"):
        load_data([tmp_path / "square.npy"], 4)
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(ValueError, match="mixes token files"):
        load_data([tmp_path], 4)
    (tmp_path / "x.jsonl").write_text('{"content": "text"}\n')
    with pytest.raises(ValueError, match=r'x\.jsonl: line 1 has no "text" key'):
        load_data([tmp_path / "x.jsonl"], 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": \n', "line 3 is not JSON: Expecting value"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not JSON: 'utf-8' codec can't decode"),
        (b'{"text": "a"}\n["text"]\n', 'line 2 has no "text" key with a string'),
        (b'{"text": 3}\n', 'line 1 has no "text" key with a string'),
    ],
)
def test_a_broken_jsonl_is_named_with_its_line(tmp_path, content, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_data([file], 4)
    assert str(error.value).startswith(f"--data {file}: {message}")


def test_a_jsonl_may_have_line_separators_in_its_strings(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\u2028two\x85three' + "!" * 200 + '"}\r\n', encoding="utf-8")
    assert load_data([file], 4).train.arrays[0].size > 150


@pytest.mark.parametrize("name", ["a.bin", "a.npy"])
def test_a_broken_token_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"--data .*{name}: "):
        load_data([tmp_path / name], 4)


def test_a_missing_or_broken_tokenizer_is_named(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("some text " * 50)
    with pytest.raises(ValueError, match=r"--tokenizer .*nowhere\.json: no such file"):
        load_data([tmp_path / "a.txt"], 4, tokenizer=tmp_path / "nowhere.json")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--tokenizer .*t\.json: not a tokenizer\.json"):
        load_data([tmp_path / "a.txt"], 4, tokenizer=tmp_path / "t.json")
