"""Checkpoints in one process: places, faults of files, what is refused, the background, the command line."""

from __future__ import annotations

import copy
import json
import os
import resource
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distributed_muon import DistributedMuon, Experts, Split, checkpoint, muon_param_groups
from distributed_muon.__main__ import main
from distributed_muon.checkpoint import DamagedCheckpoint, background, saving
from distributed_muon.checkpoint.places import Patch, _places, copy_elements, whole_shape
from distributed_muon.layout.matrices import TensorSpec
from distributed_muon.layout.pieces import Layout, Shard
from launch.run_dir import RunDirectory
from launch.world import World
from tests.distributed.sharded_model import Model, assert_same, build, copies_held_back, everything, train

Run = tuple[Model, DistributedMuon]


def held(spec: TensorSpec, cuts: list[int], tp_rank: int, rank: int) -> tuple[Patch, ...]:
    """What `rank` holds of one tensor whose TP slices are cut at `cuts` over data-parallel ranks."""
    spans = list(zip([0, *cuts], [*cuts, spec.numel], strict=True))
    shards = [[Shard(0, *span)] for _ in range(spec.tp_size) for span in spans]
    layout = Layout.build([spec], shards, [tp for tp in range(spec.tp_size) for _ in spans])
    where = tp_rank * len(spans) + rank
    engine = SimpleNamespace(plan=SimpleNamespace(layout=layout), collectives=SimpleNamespace(rank=where))
    return _places(engine)[0].patches


@pytest.mark.parametrize(
    ("shape", "rule", "dim", "stride"),
    [
        ((9, 4), None, 0, 1),
        ((6, 5), Split((8, 4)), 0, 2),
        ((5, 6), None, 1, 2),
        ((2, 4, 6), Experts(), 1, 2),
        ((8,), None, 0, 2),
    ],
)
def test_any_cut_is_put_together_and_taken_apart_again(shape, rule, dim, stride) -> None:
    """Against torch's own chunk and cat: interleaved tensor-parallel parts, cut inside rows by other ranks."""
    spec = TensorSpec("w", shape, rule, dim, 2, stride)
    whole = torch.arange(float(torch.Size(whole_shape(spec)).numel())).view(whole_shape(spec))
    axis = dim + max(0, len(shape) - 2)
    slices = [torch.cat([part.chunk(2, axis)[tp] for part in whole.chunk(stride, axis)], axis) for tp in (0, 1)]
    sources = []
    for tp, local in enumerate(slices):
        for rank, shard in enumerate(local.reshape(-1).tensor_split([3, 7])):
            sources.append((shard.clone(), held(spec, [3, 7], tp, rank)))
            parts = [p.in_whole(whole.view(-1), 0).reshape(-1) for p in sources[-1][1]]
            assert sorted(torch.cat(parts).tolist()) == sorted(shard.tolist())
    for cuts in ([], [5], [1, 2, 6]):
        for tp, local in enumerate(slices):
            for rank, expected in enumerate(local.reshape(-1).tensor_split(cuts)):
                target = torch.full_like(expected, -1.0)
                copy_elements(sources, target, held(spec, cuts, tp, rank))
                assert torch.equal(target, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A whole checkpoint of one process."""
    folder = tmp_path_factory.mktemp("saved") / "one"
    model, optimizer = build(torch.bfloat16)
    train(model, optimizer, range(2), 0)
    checkpoint.save(folder, model, optimizer, {"step": 2})
    return folder, (model, optimizer)


def copied(folder: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


FAULTS = {
    "is missing": lambda path: path.unlink(),
    "has 100 of": lambda path: os.truncate(path, 100),
    "belongs to another save": lambda path: save_file({"a": torch.zeros(3)}, path, {"save_id": "of another step"}),
    "has another checksum": lambda path: flip(path, 0.9),
}


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "model.safetensors"])
@pytest.mark.parametrize("words", FAULTS)
def test_a_damaged_file_is_named_and_nothing_is_changed(file: str, words: str, saved, tmp_path: Path, capsys) -> None:
    folder = copied(saved[0], tmp_path / "one")
    FAULTS[words](folder / file)
    model, optimizer = build(torch.bfloat16, seed=5)
    before = everything(model, optimizer)
    with pytest.raises(DamagedCheckpoint, match=f"is damaged: {file} {words}"):
        checkpoint.load(folder, model, optimizer)
    assert_same(everything(model, optimizer), before)
    assert main(["checkpoint", "verify", str(folder)]) == 1
    assert f"{file} {words}" in capsys.readouterr().out


@pytest.mark.parametrize("place", [0.0, 0.3, 0.62, 1.0])
def test_a_flipped_bit_of_the_index_is_noticed(place: float, saved, tmp_path: Path) -> None:
    folder = copied(saved[0], tmp_path / "one")
    flip(folder / "index.json", place)
    with pytest.raises(DamagedCheckpoint, match=r"index.json is not what was saved"):
        checkpoint.load(folder, *build(torch.bfloat16))
    (folder / "index.json").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"index.json is missing"):
        checkpoint.load(folder, *build(torch.bfloat16))


def test_a_run_directory_goes_back_to_the_newest_whole_checkpoint(saved, tmp_path: Path, capsys) -> None:
    run = RunDirectory(tmp_path, World(0, 1, torch.device("cpu")), keep=3)
    for step in (1, 2, 3):
        copied(saved[0], run.checkpoint(step))
    (tmp_path / "checkpoints" / "step-best1").mkdir()  # a stray folder
    for step in (2, 3):
        flip(run.checkpoint(step) / "rank-00000.safetensors", 0.5)
    seen = []

    def read(path: Path) -> int:
        seen.append(path.name)
        return checkpoint.load(path, *build(torch.bfloat16))["step"]

    assert run.load(read) == 2 and seen == ["step-00000003", "step-00000002", "step-00000001"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "rank-00000.safetensors has another checksum" in lines[0]
    assert [step for step, _ in run.checkpoints()] == [1]
    assert (tmp_path / "checkpoints" / "step-00000003.damaged").is_dir()


def test_a_full_disk_leaves_the_older_checkpoint_and_no_rubbish(tmp_path: Path) -> None:
    model, optimizer = build()
    checkpoint.save(tmp_path / "one", model, optimizer, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match=r"one was not saved, an older one .*rank-00000.safetensors.*File too large"):
            checkpoint.save(tmp_path / "one", model, optimizer, {"step": 2})
        background = checkpoint.save(tmp_path / "two", model, optimizer, wait=False)
        with pytest.raises(OSError, match="File too large"):
            background.wait()
        checkpoint.save(tmp_path / "two", model, optimizer, wait=False)
        with pytest.raises(OSError, match="File too large"):  # nobody asked: the next save tells
            checkpoint.save(tmp_path / "two", model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert checkpoint.load(tmp_path / "one", model, optimizer) == {"step": 1}


def test_a_failed_rename_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    model, optimizer = build()
    checkpoint.save(tmp_path / "one", model, optimizer, {"step": 1})
    with (
        mock.patch.object(Path, "rename", side_effect=OSError("read-only file system")),
        pytest.raises(OSError, match="was not saved, an older one there is as it was: read-only file system"),
    ):
        checkpoint.save(tmp_path / "one", model, optimizer, {"step": 2})
    assert checkpoint.load(tmp_path / "one", model, optimizer) == {"step": 1}


def test_a_save_in_the_background_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    """Steps go on meanwhile; the next save waits; both are whole."""
    model, optimizer = build(torch.bfloat16)
    train(model, optimizer, range(1), 0)
    gate, entered, original = threading.Event(), threading.Event(), saving.write_file

    def slow(*args) -> dict:
        entered.set()
        assert gate.wait(30)
        return original(*args)

    with mock.patch.object(saving, "write_file", slow):
        target = everything(model, optimizer)
        first = checkpoint.save(tmp_path / "one", model, optimizer, {"step": 1}, wait=False)
        assert entered.wait(30) and not first.done and not (tmp_path / "one").exists()
        train(model, optimizer, range(1, 2), 0)
        threading.Timer(0.2, gate.set).start()
        checkpoint.save(tmp_path / "two", model, optimizer, {"step": 2}, wait=False).wait()
    assert first.done
    for name, step in (("two", 2), ("one", 1)):
        assert checkpoint.load(tmp_path / name, model, optimizer) == {"step": step}
    assert_same(everything(model, optimizer), target)


def test_a_save_that_cannot_copy_leaves_steps_free(tmp_path: Path) -> None:
    model, optimizer = build()
    checkpoint.save(tmp_path / "one", model, optimizer, wait=False).wait()
    with mock.patch.object(background, "_copy", side_effect=MemoryError("no room")), pytest.raises(MemoryError):
        checkpoint.save(tmp_path / "two", model, optimizer, wait=False)
    train(model, optimizer, range(1), 0)
    checkpoint.save(tmp_path / "two", model, optimizer, {"step": 1}, wait=False).wait()
    assert checkpoint.load(tmp_path / "two", model, optimizer) == {"step": 1}


@pytest.mark.parametrize("change", ["step", "load_state_dict", "state_dict"])
def test_who_changes_moments_waits_until_a_save_has_copied_them(change: str, tmp_path: Path) -> None:
    model, optimizer = build()
    train(model, optimizer, range(1), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        earlier = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(1, 2), 0)
    target = everything(model, optimizer)
    with copies_held_back() as gate:
        save = checkpoint.save(tmp_path / "one", model, optimizer, {}, wait=False)
        threading.Timer(0.2, gate.set).start()
        if change == "step":
            train(model, optimizer, range(2, 3), 0)
        elif change == "load_state_dict":
            optimizer.load_state_dict(earlier)
        else:
            for state in optimizer.state_dict()["state"].values():
                (state.get("momentum_buffer", state.get("exp_avg"))).zero_()
        assert gate.is_set()
        save.wait()
    checkpoint.load(tmp_path / "one", model, optimizer)
    assert_same(everything(model, optimizer), target)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"a": [1, {"b": torch.zeros(2)}]}, r"extra\['a'\]\[1\]\['b'\] is a Tensor: a checkpoint holds JSON"),
        ({"milestones": {30: 1}}, r"extra\['milestones'\] has the key 30"),
        ({"a": b"x"}, r"extra\['a'\] is a bytes"),
    ],
)
def test_extra_that_json_would_change_is_refused(extra: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        checkpoint.save(tmp_path / "one", *build(), extra)
    assert not list(tmp_path.iterdir())


def test_files_are_as_the_umask_says_and_hold_no_pickle(saved, tmp_path: Path) -> None:
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            checkpoint.save(tmp_path / str(umask), *saved[1])
        finally:
            os.umask(before)
        files = list((tmp_path / str(umask)).iterdir())
        assert {file.name for file in files} == {"index.json", "model.safetensors", "rank-00000.safetensors"}
        assert {file.stat().st_mode & 0o777 for file in files} == {mode}
    json.loads((saved[0] / "index.json").read_text())


def test_another_algorithm_or_shape_is_refused_unless_asked_for(saved, tmp_path: Path, capsys) -> None:
    folder, (_, optimizer) = saved
    other = Model(torch.bfloat16, 5)
    named = dict(other.named_parameters())
    groups = [
        {"params": [(n, named[n]) for n in ("m0", "m1", "m2", "m3")]},
        {"params": [("experts", other.experts)], "matrices": Experts()},
        {"params": [(n, named[n]) for n in ("a0", "a1", "a2")], "algorithm": "adamw"},
    ]
    groups[0]["params"].append(groups[2]["params"].pop(1))  # a1 is a matrix for Muon now
    changed = DistributedMuon(groups)
    with pytest.raises(ValueError, match=r"parameter 'a1' is for muon, in .* for adamw; strict=False"):
        checkpoint.load(folder, other, changed)
    checkpoint.load(folder, other, changed, strict=False)
    assert "1 shards of state were not in" in capsys.readouterr().out
    records = {p.name: p for p in changed.sharded_parameters}
    mine = {p.name: p for p in optimizer.sharded_parameters}
    assert torch.equal(records["a1"].master, mine["a1"].master) and not records["a1"].momentum.any()
    assert torch.equal(records["m0"].momentum, mine["m0"].momentum)
    small = nn.Linear(5, 17, bias=False)
    with pytest.raises(ValueError, match=r"parameter 'm0' has shape \(17, 5\), in .* \(33, 17\)"):
        checkpoint.load(folder, None, DistributedMuon([("m0", small.weight)]))
    with pytest.raises(ValueError, match=r"holds other parameters: 'm1' is not one of this run"):
        checkpoint.load(folder, None, DistributedMuon([("m0", nn.Parameter(torch.zeros(33, 17)))]))


def test_names_are_mapped_and_foreign_optimizers_refused(saved) -> None:
    model = Model(torch.bfloat16, 5)
    named = [(f"module.{name}", param) for name, param in model.named_parameters()]
    groups = [{"params": named[:4]}, {"params": named[4:5], "matrices": Experts()}]
    optimizer = DistributedMuon([*groups, {"params": named[5:], "algorithm": "adamw"}])
    checkpoint.load(saved[0], model, optimizer, names=lambda name: name.removeprefix("module."))
    for ours, theirs in zip(optimizer.sharded_parameters, saved[1][1].sharded_parameters, strict=True):
        assert torch.equal(ours.master, theirs.master) and torch.equal(ours.momentum, theirs.momentum)
    with pytest.raises(TypeError, match="SGD is no optimizer of distributed_muon"):
        checkpoint.save(saved[0], model, torch.optim.SGD(model.parameters()))


# ---- the command line -----------------------------------------------------------------------------------


def test_inspect_and_verify(saved, capsys) -> None:
    assert main(["checkpoint", "verify", str(saved[0])]) == 0
    assert main(["checkpoint", "inspect", "--parameters", str(saved[0])]) == 0
    out = capsys.readouterr().out
    assert f"{saved[0]}: whole, 2 files" in out
    assert "saved by 1 ranks of plain after 2 steps" in out
    assert "experts  (3, 6, 5)  bfloat16  group 1  master, momentum_buffer" in out
    assert "a0  (3,)  bfloat16  group 2  master, exp_avg, exp_avg_sq, step 2" in out
    assert main(["checkpoint", "verify", "missing"]) == 2


class SummedMuon(torch.optim.Muon):
    """Keeps momentum as a sum, m = momentum * m + g, as Keller Jordan's first Muon did."""

    def state_dict(self) -> dict:
        state = super().state_dict()
        for number, own in state["state"].items():
            state["state"][number] = {"momentum_buffer": own["momentum_buffer"] / (1 - 0.95)}
        return state


@pytest.mark.parametrize(("kind", "muon"), [("torch-muon", torch.optim.Muon), ("keller", SummedMuon)])
def test_other_optimizers_states_go_on_here(kind: str, muon: type, tmp_path: Path, capsys) -> None:
    """Converted and loaded, the next step is the one that torch.optim would have taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4))
    named = list(model.named_parameters())
    hidden = [(n, p) for n, p in named if p.ndim == 2]
    options = dict(lr=0.02, weight_decay=0.1)
    rest = [(n, p) for n, p in named if p.ndim == 1]
    optimizers = [
        muon(hidden, adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), **options),
    ]
    for step in range(3):
        if step == 2:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            torch.save(state, tmp_path / "theirs.pt")
        model(torch.randn(5, 6)).square().sum().backward()
        grads = [p.grad.clone() for _, p in named]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    words = ["checkpoint", "convert", str(tmp_path / "theirs.pt"), str(tmp_path / "ours"), "--from", kind]
    assert main(words) == 2
    assert "reading one runs whatever code is in it: add --trust" in capsys.readouterr().err
    assert main([*words, "--trust"]) == 0
    ours = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4))
    optimizer = DistributedMuon(muon_param_groups(ours), ns_form="standard", **options)
    checkpoint.load(tmp_path / "ours", ours, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.02
    for param, grad in zip(ours.parameters(), grads, strict=True):
        param.grad = grad
    optimizer.step()
    tolerance = 0.0 if kind == "torch-muon" else 1e-3  # bf16 Newton-Schulz of a momentum that was scaled twice
    for mine, (_, theirs) in zip(ours.parameters(), named, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=0)
