"""perf.overhead: what its worker measures, how rounds are combined, and a checkout that does not work."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from perf import overhead, overhead_worker

TWO_ROUNDS = [
    {"seconds": {"step": 3e-3, "host": 2e-3}, "matrices": 4, "calls": 40, "c_calls": 8},
    {"seconds": {"step": 5e-3, "host": 4e-3}, "matrices": 4, "calls": 40, "c_calls": 8},
]


def test_rounds_become_medians_and_rates_per_matrix() -> None:
    row = overhead.combine(TWO_ROUNDS)
    assert row["seconds"] == {"step": 4e-3, "host": 3e-3} and row["fastest"]["host"] == 2e-3
    assert row["host_us_per_matrix"] == pytest.approx(750)
    assert (row["calls_per_matrix"], row["c_calls_per_matrix"]) == (10, 2)


def test_two_checkouts_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    slow = [{**run, "seconds": {key: 2 * value for key, value in run["seconds"].items()}} for run in TWO_ROUNDS]
    overhead.print_case("one-rank", {"here": overhead.combine(TWO_ROUNDS), "against": overhead.combine(slow)})
    assert "ratio    step 0.500, host 0.500, fastest host 0.500, Python calls 1.000" in capsys.readouterr().out


def test_calls_into_python_and_into_c_are_counted_apart() -> None:
    calls: Counter[str] = Counter()

    def double(number: int) -> int:
        return abs(number) * 2

    with overhead_worker.counted_calls(calls):
        for number in range(5):
            double(number)
    # Leaving the counter is one more: contextlib's __exit__, which resumes the generator.
    assert calls["call"] - 5 in (1, 2) and calls["c_call"] - 5 in (0, 1, 2)


def test_steps_and_construction_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead_worker, "MATRICES", 6)
    result = overhead_worker.steps_of_small_matrices(0, 1, 2, "")
    assert result["matrices"] == 6 and result["calls"] > 6
    seconds = result["seconds"]
    assert seconds["step"] > seconds["host"] > 0 and seconds["backward"] > 0 and seconds["orthogonalizing"] > 0
    assert overhead_worker.construction(1)["seconds"]["host"] > 0


def test_one_rank_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MODEL", "llama-3-8b"), ("RANKS", 8), ("SHRINK", 128)):
        monkeypatch.setattr(overhead_worker, name, value)
    result = overhead_worker.steps_of_one_rank_of_many(1)
    assert result["matrices"] == 224 and result["seconds"]["host"] > 0


def test_a_checkout_that_fails_is_shown(tmp_path: Path) -> None:
    package = tmp_path / "distributed_muon"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('broken on purpose')")
    with pytest.raises(RuntimeError, match=r"(?s)construction in .*broken on purpose"):
        overhead.run_case("construction", tmp_path)


def test_no_checkout_is_refused(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "perf.overhead", "--against", str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 2 and f"--against {tmp_path} is no checkout of this project" in ended.stderr
