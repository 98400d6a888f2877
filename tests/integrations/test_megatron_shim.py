"""What launch.pretrain_gpt_muon says when a job under Megatron-LM's training loop fails; a stand-in has its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations import megatron_cpu
from tests.torchrun import ROOT, TORCHRUN

pytestmark = [
    pytest.mark.skipif(not megatron_cpu.available(), reason="megatron-core is not installed"),
    *([pytest.mark.slow] if megatron_cpu.older() else []),
]

# What the shim asks of Megatron-LM. megatron.core is the real one: "megatron" is a namespace.
STAND_IN = {
    "megatron/training/__init__.py": """
from types import SimpleNamespace
args = SimpleNamespace(load=None, save="saved", finetune=False, no_load_optim=False, muon_tp_mode="blockwise")
def get_args():
    return args
""",
    "megatron/training/checkpointing.py": """
checkpoint_exists = get_load_checkpoint_path_by_args = lambda path: False
""",
    "megatron/training/training.py": "get_megatron_optimizer = None\n",
    "pretrain_gpt.py": """
import sys
import torch.distributed as dist
from megatron.training import training
dist.init_process_group("gloo")
if "--late" in sys.argv:
    try:
        training.get_megatron_optimizer(None, [])
    except SystemExit:
        pass
    if dist.get_rank() == 1:
        raise ValueError("checkpoint of another model\\nand more")
    dist.barrier()
training.get_megatron_optimizer(None, [])
""",
}


def failed(folder: Path, *words: str) -> list[str]:
    """The error lines of a job of two ranks that has to fail, without torchrun's own report."""
    for name, text in STAND_IN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    torchrun = str(Path(sys.executable).with_name(TORCHRUN[0]))
    command = [torchrun, *TORCHRUN[1:], "tests.integrations.megatron_cpu", "launch.pretrain_gpt_muon", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    ranks = done.stderr.partition("Traceback (most recent call last)")[0]
    return [line for line in ranks.splitlines() if line.startswith(("error", "Traceback"))]


def test_a_flag_that_is_not_supported_is_one_line_for_all_ranks(tmp_path: Path) -> None:
    lines = failed(tmp_path, "--muon-tp-mode", "blockwise")
    assert len(lines) == 1 and lines[0].startswith("error: muon_tp_mode='blockwise' is not supported"), lines


def test_a_failure_of_one_rank_is_one_line_and_its_traceback_a_file(tmp_path: Path) -> None:
    lines = failed(tmp_path, "--muon-tp-mode", "blockwise", "--late")
    assert len(lines) == 1 and lines[0].startswith("error: rank 1 on "), lines
    assert "ValueError: checkpoint of another model (traceback: saved/errors/rank-1.txt)" in lines[0]
    assert "and more" in (tmp_path / "saved" / "errors" / "rank-1.txt").read_text()


def test_another_folder_than_megatron_lms_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch.pretrain_gpt_muon import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main()
    said = f"error: pretrain_gpt.py is not in {tmp_path}: start in the root folder of Megatron-LM\n"
    assert capsys.readouterr().err == said
