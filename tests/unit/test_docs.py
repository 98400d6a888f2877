"""The first Python block of the README and of each manual runs as it stands; what they name exists."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.torchrun import ROOT, job

MANUALS = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
NEEDS = {"deepspeed.md": ["deepspeed"], "huggingface.md": ["accelerate", "transformers"], "megatron.md": ["megatron"]}
# Megatron needs a GPU: the tests' shim answers for it, and imports what follows as a module.
SHIM = {"megatron.md": ["tests.integrations.megatron_cpu"]}
ALONE = {"costs.md"}  # plans without ranks


def first_snippet(path: Path) -> str:
    """The first Python block of a manual; "" where it has none."""
    found = re.search(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


@pytest.mark.timeout(300)  # DeepSpeed compiles an operator the first time
@pytest.mark.parametrize("manual", ["README.md", *MANUALS])
def test_the_first_snippet_runs(manual: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [name for name in NEEDS.get(manual, []) if not find_spec(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed: see docs/{manual}")
    snippet = first_snippet(ROOT / manual if manual == "README.md" else ROOT / "docs" / manual)
    if not snippet:
        pytest.skip(f"{manual} shows commands only")
    (tmp_path / "snippet.py").write_text(snippet + '\nprint("ran to its end")\n')
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    ranks = 1 if manual in ALONE else 2
    launcher = ("torchrun", "--standalone", "--nproc_per_node", str(ranks), "-m")
    with job([*SHIM.get(manual, []), "snippet"], launcher) as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert out.count("ran to its end") == ranks


def test_a_readme_is_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}" for name in MANUALS)])
def test_links_and_files_that_are_named_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    linked = [(ROOT / page).parent / link for link in re.findall(r"\]\(((?!http)[^)#]+)", text)]
    named = [ROOT / name for name in re.findall(r"`((?:perf|launch|tests|distributed_muon|docs)/[\w./]+\.\w+)`", text)]
    assert not [str(path.relative_to(ROOT)) for path in (*linked, *named) if not path.exists()]
