"""Every row of the tables of faults in docs/many_nodes.md and docs/faults.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("manual", "least"), [("many_nodes.md", 25), ("faults.md", 25)])
def test_every_fault_of_the_manual_has_its_test(manual: str, least: int) -> None:
    text = (ROOT / "docs" / manual).read_text()
    rows = [line.split(" | ") for line in text.partition("| fault |")[2].splitlines()[2:] if line.startswith("| ")]
    assert len(rows) >= least
    last = ""
    for fault, *_, named in rows:
        named = named.strip(" |")
        last = last if named == "the same" else named
        for name, fragment in re.findall(r"(test_\w+\.py)(?:: (\w+))?", last):
            (file,) = (ROOT / "tests").rglob(name)
            assert re.search(rf"def test_\w*{fragment}", file.read_text()), (fault, name, fragment)
        assert "test_" in last, fault
