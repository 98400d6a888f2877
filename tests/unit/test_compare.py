"""perf.report A B and --csv: two runs side by side, and every number as a row."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from perf.report import __main__ as command
from perf.report.assemble import SECTIONS, load
from perf.report.compare import open_run, pairs
from perf.report.measurements import Measurement, csv_rows, measurements, numbers, unit_of

RESULTS = Path(__file__).parents[2] / "perf" / "results"


def run_directory(folder: Path, seconds: float, optimizer: str) -> Path:
    folder.mkdir()
    lines = [{"step": step, "loss": 4.0 - step / 10, "seconds": seconds * step, "phases": {"update_seconds": 0.5},
              "straggling": True} for step in range(1, 21)]  # fmt: skip
    lines.append({"step": 20, "val_loss": 2.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "settings.json").write_text(json.dumps({"optimizer": optimizer, "steps": 20}))
    (folder / "versions.json").write_text(json.dumps({"versions": {"torch": "2"}, "command": "the same"}))
    return folder


def test_two_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = run_directory(tmp_path / "slow", 2.0, "adamw"), run_directory(tmp_path / "fast", 1.0, "muon")
    page, table = tmp_path / "page.html", tmp_path / "made" / "table.csv"
    words = ["perf.report", str(a), str(b), "--output", str(page), "--csv", str(table)]
    monkeypatch.setattr(sys, "argv", words)
    command.main()
    rows = {(row["row"], row["quantity"]): row for row in csv.DictReader(table.open())}
    # Steps 3 to 20 count, whose median is 11.5.
    seconds = rows["median of a step", "seconds"]
    assert [float(seconds[key]) for key in ("a", "b", "b_over_a")] == [23.0, 11.5, 0.5] and seconds["unit"] == "s"
    assert float(rows["at the end", "val_loss"]["b_over_a"]) == 1.0
    assert float(rows["median of a step", "phases/update_seconds"]["a"]) == 0.5
    assert not any("straggling" in quantity for _, quantity in rows)
    text = page.read_text()
    assert "<b>0.50x</b>" in text and 'class="good">0.500<' in text
    assert ">run settings optimizer<" in text and "run settings steps" not in text and "the same" not in text
    assert text.count("<svg") == 6  # loss, validation loss and seconds, for screens and for phones


def test_results_are_matched_by_kind_and_what_one_lacks_is_shown(tmp_path: Path) -> None:
    step = json.loads((RESULTS / "step.json").read_text())
    twice = json.loads(json.dumps(step))
    for row in twice["rows"]:
        row["seconds"] *= 2
    del twice["rows"][-1]
    for name, content in (("a", step), ("b", twice)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "step.json").write_text(json.dumps(content))
    found = {(pair.row, pair.quantity): pair for pair in pairs(*(open_run(tmp_path / name) for name in "ab"))}
    assert found[step["rows"][0]["name"], "seconds"].ratio == 2.0
    assert found[step["rows"][0]["name"], "state_bytes"].ratio == 1.0
    missing = found[step["rows"][-1]["name"], "seconds"]
    assert missing.a is not None and missing.b is None and missing.ratio is None


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no number in common: one holds step, the other scale"):
        pairs(open_run(RESULTS / "step.json"), open_run(RESULTS / "scale.json"))
    with pytest.raises(ValueError, match="is no run: give a trainer's --run-dir"):
        open_run(tmp_path / "nothing")
    (tmp_path / "step.json").write_text('{"rows": [{}]}')
    with pytest.raises(ValueError, match=r"step\.json is no result of this perf\.step"):
        pairs(open_run(tmp_path / "step.json"), open_run(RESULTS / "step.json"))


def test_one_run_alone_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["perf.report", str(RESULTS)])
    with pytest.raises(SystemExit):
        command.main()
    assert "1 RUN given: give two to compare" in capsys.readouterr().err


def test_every_kind_of_result_becomes_rows() -> None:
    results = load(RESULTS)
    assert {kind for kind in SECTIONS if kind not in ("benchmark", "overhead", "fsdp2_step")} <= set(results)
    rows = list(csv_rows(results))
    assert {row[1] for row in rows} == set(results)
    step = results["step"][0].content["rows"][0]
    assert ("step.json", "step", step["name"], "seconds", "s", step["seconds"]) in rows
    assert all(isinstance(row[-1], (int, float)) for row in rows)


def test_overhead_rows() -> None:
    seconds = {"step": 0.5, "host": 0.25}
    result = {"rows": {"one-rank": {"here": {"seconds": seconds, "calls_per_matrix": 3.0}, "against": {}}}}
    assert measurements("overhead", result) == [
        Measurement("one-rank", "step/seconds", "s", 0.5),
        Measurement("one-rank", "host/seconds", "s", 0.25),
        Measurement("one-rank", "calls_per_matrix", "", 3.0),
    ]


def test_names_tell_units() -> None:
    assert [unit_of(name) for name in ("phases/update_seconds", "sent_bytes", "bus_bytes_per_second", "ratio")] == [
        "s", "B", "B/s", "",
    ]  # fmt: skip
    assert numbers({"a": 1, "b": {"c": 2.5, "d": {"e": 3}}, "f": True, "g": "x"}) == {"a": 1, "b/c": 2.5, "b/d/e": 3}
