"""Checkpoints that load on any number of ranks, and are whole or not there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from distributed_muon import DistributedMuon, checkpoint
from distributed_muon.checkpoint import Index, saving
from tests.checks import on_ranks
from tests.distributed.sharded_model import DTYPES, SHAPES, assert_same, build, everything, train


@contextmanager
def shared_folder(rank: int) -> Iterator[Path]:
    """One temporary folder for all ranks."""
    name = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(name)
    yield Path(name[0])
    dist.barrier()
    if rank == 0:
        shutil.rmtree(name[0])


@on_ranks(5)
def test_saved_on_four_ranks_loads_on_any_number(rank: int, world: int) -> None:
    """Rows 23 and 25: 1, 2, 3 and 5 ranks and other layouts hold the same bits, and train alike."""
    sizes = (4, 1, 2, 3, 5)
    ranks_of = {size: dist.new_group(list(range(size))) for size in sizes}
    with shared_folder(rank) as folder:
        for dtype in DTYPES:
            path = folder / str(dtype)
            target = after = rates = None
            for size in sizes:
                options = {} if size in (4, 5) else dict(layout="aligned", bucket_mb=None, strategy="gather")
                if rank < size:
                    model, optimizer = build(dtype, seed=0 if size == 4 else 5, group=ranks_of[size], **options)
                    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
                    if size == 4:
                        assert any(p.start == p.stop for p in optimizer.sharded_parameters)
                        train(model, optimizer, range(3), rank=0, scheduler=scheduler)
                        extra = {"step": 3, "scheduler": scheduler.state_dict(), "seen": [0, 1, 2]}
                        checkpoint.save(path, model, optimizer, extra)
                    else:
                        extra = checkpoint.load(path, model, optimizer)
                        scheduler.load_state_dict(extra["scheduler"])
                        assert extra["step"] == 3 and extra["seen"] == [0, 1, 2]
                    now = everything(model, optimizer)
                    target = target or now
                    assert_same(now, target, f"{dtype} on {size} ranks")
                    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
                    rates = rates or groups
                    assert groups == rates
                    # Equal gradients on all ranks: their mean is the same on any number of them.
                    train(model, optimizer, range(3, 5), rank=0, scheduler=scheduler)
                    now = everything(model, optimizer)
                    after = after or now
                    for key in after:
                        torch.testing.assert_close(
                            now[key], after[key], rtol=2e-2, atol=2e-3, msg=lambda m, k=key: f"{k} {m}"
                        )
                dist.barrier()


@on_ranks(5)
def test_keys_do_not_depend_on_the_number_of_ranks(rank: int, world: int) -> None:
    """Row 23: the files of 1 and 4 ranks describe the same tensors."""
    groups = {size: dist.new_group(list(range(size))) for size in (1, 4)}
    with shared_folder(rank) as folder:
        for size, group in groups.items():
            if rank < size:
                checkpoint.save(folder / str(size), *build(torch.bfloat16, group=group))
            dist.barrier()
        indices = [Index.parse(Index.read_text(folder / str(size)), folder) for size in groups]
        assert indices[0].parameters == indices[1].parameters
        for name, shape in SHAPES.items():
            moments = ["exp_avg", "exp_avg_sq"] if name.startswith("a") else ["momentum_buffer"]
            about = indices[0].parameters[name]
            assert (about["shape"], about["dtype"], about["states"]) == (list(shape), "bfloat16", ["master", *moments])
        with safe_open(folder / "1" / "rank-00000.safetensors", "pt") as file:  # whole ones keep their shape
            assert file.get_slice("m0.master").get_shape() == list(SHAPES["m0"])
        assert indices[0].model == ["steps"]


@on_ranks(5)
def test_an_interrupted_save_leaves_the_old_checkpoint(rank: int, world: int) -> None:
    """The new one appears whole or not at all, also when one rank dies while writing; the next save works."""
    with shared_folder(rank) as folder:
        path = folder / "latest"
        model, optimizer = build()
        train(model, optimizer, range(1), rank)
        checkpoint.save(path, model, optimizer, {"step": 1})
        old = everything(model, optimizer)
        train(model, optimizer, range(1, 2), rank)
        original = saving.write_file

        def broken(*args) -> dict:
            original(*args)
            if rank == 1:
                raise OSError("disk full")
            return original(*args)

        with mock.patch.object(saving, "write_file", broken), pytest.raises(OSError, match="rank 1: disk full"):
            checkpoint.save(path, model, optimizer, {"step": 2})
        new = everything(model, optimizer)
        assert checkpoint.load(path, model, optimizer) == {"step": 1}
        assert_same(everything(model, optimizer), old)
        train(model, optimizer, range(1, 2), rank)
        assert_same(everything(model, optimizer), new)
        checkpoint.save(path, model, optimizer, {"step": 2})
        assert checkpoint.load(path, model, optimizer) == {"step": 2}
        dist.barrier()
        assert [entry.name for entry in folder.iterdir()] == ["latest"], "nothing else is left behind"


@on_ranks(5)
def test_a_save_killed_between_its_two_renames_is_not_lost(rank: int, world: int) -> None:
    """At no moment is there no complete checkpoint: dying right after the old one moved aside must be recoverable."""
    with shared_folder(rank) as folder:
        path = folder / "latest"
        model, optimizer = build()
        checkpoint.save(path, model, optimizer, {"step": 1})
        original = Path.rename

        def dies(self: Path, target: Path) -> Path:
            if self.name.endswith(".unfinished"):
                raise RuntimeError("killed")
            return original(self, target)

        with mock.patch.object(Path, "rename", dies), pytest.raises(RuntimeError, match="rank 0: killed"):
            checkpoint.save(path, model, optimizer, {"step": 2})
        assert not path.exists()
        dist.barrier()
        assert checkpoint.load(path, model, optimizer) == {"step": 1}


@on_ranks(5)
def test_loading_rebuilds_parameters_from_the_masters(rank: int, world: int) -> None:
    """Row 7: the masters are the truth, on every rank, whatever the model holds when it loads."""
    with shared_folder(rank) as folder:
        model, optimizer = build(torch.bfloat16)
        train(model, optimizer, range(2), rank)
        target = everything(model, optimizer)
        checkpoint.save(folder / "latest", model, optimizer)
        again, restored = build(torch.bfloat16, seed=5)
        for p in again.parameters():
            p.data.fill_(7.0)
        checkpoint.load(folder / "latest", again, restored)
        assert_same(everything(again, restored), target)


@on_ranks(5)
def test_weights_written_before_a_save_are_in_it(rank: int, world: int) -> None:
    """Row 42: such as a pretrained model's, which no step has seen yet."""
    with shared_folder(rank) as folder:
        model, optimizer = build(torch.bfloat16)
        with torch.no_grad():
            model.m0.copy_(torch.full_like(model.m0, 3.0))
        checkpoint.save(folder / "latest", model, optimizer)
        again, restored = build(torch.bfloat16, seed=5)
        checkpoint.load(folder / "latest", again, restored)
        assert torch.equal(again.m0, model.m0) and torch.equal(again.m0, torch.full_like(again.m0, 3.0))


@on_ranks(5)
def test_what_is_no_checkpoint_or_another_model_is_refused(rank: int, world: int) -> None:
    with shared_folder(rank) as folder:
        model, optimizer = build()
        with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
            checkpoint.load(folder / "missing", model, optimizer)
        checkpoint.save(folder / "good", model, optimizer)
        other = nn.Linear(4, 6, bias=False)
        with pytest.raises(ValueError, match=r"holds other parameters: 'weight' is not among them"):
            checkpoint.load(folder / "good", other, DistributedMuon([{"params": list(other.named_parameters())}]))


def test_checkpoint_without_torch_distributed(tmp_path: Path) -> None:
    """Row 34: one process; a tensor learning rate comes back as a number."""
    for lr in (0.02, torch.tensor(0.02)):
        model, optimizer = build(torch.bfloat16)
        optimizer.param_groups[1]["lr"] = lr
        train(model, optimizer, range(2), 0)
        checkpoint.save(tmp_path / "one", model, optimizer, {"step": 2})
        again, restored = build(torch.bfloat16, seed=5)
        assert checkpoint.load(tmp_path / "one", again, restored) == {"step": 2}
        assert float(restored.param_groups[1]["lr"]) == pytest.approx(0.02)
        assert_same(everything(again, restored), everything(model, optimizer))
