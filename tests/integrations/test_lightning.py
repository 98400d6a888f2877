"""Lightning's Trainer and Fabric on two ranks: equal to torch's optimizers under DDP, saved whole."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lightning")

from tests.torchrun import TORCHRUN, run_to_end


@pytest.mark.timeout(200)
def test_equal_to_torch_under_ddp_and_after_a_resume(tmp_path: Path) -> None:
    """Six steps with accumulation 2 and clipping under "ddp" and "auto"; bit-equal when resumed after the third."""
    kinds = ("-reference:ddp", ":ddp", ":auto", "-saved:ddp", "-resumed:ddp")
    cases = [f"{who}{kind}" for who in ("trainer", "fabric") for kind in kinds]
    found, _ = run_to_end(["tests.integrations.lightning_job", "--folder", tmp_path, *cases], TORCHRUN)
    for who in ("trainer", "fabric"):
        reference, ours, auto, saved, resumed = (found[f"{who}{kind}"] for kind in kinds)
        assert len(reference["losses"]) == 12
        assert ours["losses"] == pytest.approx(reference["losses"], abs=1e-6)
        assert auto["digest"] == ours["digest"] == resumed["digest"] and ours["same"]
        assert saved["losses"] + resumed["losses"] == ours["losses"]
