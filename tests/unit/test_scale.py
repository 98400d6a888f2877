"""perf.scale: what it leaves out it says, and flags that cannot be right end it before anything is predicted."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distributed_muon.planning.model_shapes import NAMED_MODELS, model_shapes
from perf import scale
from perf.cluster import MACHINES
from perf.prediction import predict
from perf.workload import Setup, Training

LLAMA = Training("llama-3-8b", 0, tp=2, pp=2)


def test_ranks_that_the_sizes_do_not_divide_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    result = scale.predict_all(LLAMA, MACHINES["h100-ib400"], [6, 16, 32])
    assert [row["ranks"] for row in result["curves"]] == [16] * 6 + [32] * 6
    assert result["sensitivities"][0]["share"].keys() == {16, 32}
    by_setup = {row["setup"]: row["share_of_forward_backward"] for row in result["curves"] if row["ranks"] == 16}
    first = result["sensitivities"][0]
    assert first["change"] == "as predicted" and first["share"][16] == by_setup["Muon, home"]
    printed = capsys.readouterr().out
    assert "left out, for tp 2 x pp 2 with ep 1 does not divide them: 6" in printed
    assert "no expert parallelism" not in printed


def test_fsdp2_moves_layers_and_muon_adds_the_plans_exchange() -> None:
    shapes = [s for s in model_shapes(NAMED_MODELS["llama-3-8b"]) if s.algorithm != "frozen"]
    layers = [sum(s.numel for s in shapes if s.layer == layer) for layer in (None, *range(32))]
    training = Training("llama-3-8b", 64)
    (domain,) = training.stage(Setup("home", "fsdp2")).domains
    assert (domain.buckets, domain.last_buckets) == (tuple(layers), tuple(layers[:2]))
    assert domain.again_bytes == 2 * sum(layers[1:]) * 63 / 64
    muon, adamw = (predict(training, Setup(s, "fsdp2"), MACHINES["h100-ib400"]) for s in ("home", "adamw"))
    assert muon.sent_bytes - adamw.sent_bytes == max(domain.plan.exchange_bytes_by_rank)
    assert adamw.sent_bytes == (8 * sum(layers) - 2 * layers[0]) * 63 / 64
    # Every layer is gathered twice, in fewer calls.
    zero1 = predict(training, Setup("adamw"), MACHINES["h100-ib400"])
    assert 1.7 < adamw.communication["all_gather"] / zero1.communication["all_gather"] < 2.0
    # Where forward and backward are too short, they hide as much as they last.
    short = predict(replace(training, global_tokens=1, sequence=64), Setup("adamw", "fsdp2"), MACHINES["h100-ib400"])
    exposed, alone = (
        sum(seconds[kind] for kind in ("reduce_scatter", "all_gather"))
        for seconds in (short.exposed, short.communication)
    )
    assert exposed == pytest.approx(alone - short.forward_backward)


def test_no_number_of_ranks_that_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"tp 2 x pp 2 with ep 1 divides none of --ranks 6, 10"):
        scale.predict_all(LLAMA, MACHINES["h100-ib400"], [6, 10])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--mfu", "0"], "argument --mfu: 0 is not above 0 and at most 1"),
        (["--tp", "0"], "argument --tp: 0 is not 1 or more"),
        (["--links", "none.json"], "argument --links: none.json cannot be read: No such file"),
        (["--tp", "3", "--ranks", "64"], "error: tp 3 x pp 1 with ep 8 divides none of --ranks 64"),
        (["--check", "none.json"], "error: --check predicts from the rates of --links FILE"),
    ],
)
def test_impossible_flags(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["perf.scale", *words])
    with pytest.raises(SystemExit) as ended:
        scale.main()
    assert message in capsys.readouterr().err + str(ended.value)


def test_what_cannot_be_checked_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--check .*none\.json cannot be read: No such file"):
        scale.check_files({}, [tmp_path / "none.json"], None)
    (tmp_path / "old.json").write_text('{"world": 2}')
    with pytest.raises(ValueError, match=r"--check .*old\.json is no result of this perf\.comm \('settings'\)"):
        scale.check_files({}, [tmp_path / "old.json"], None)


def test_a_result_finds_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "made" / "here" / "scale.json"
    words = ["--model", "llama-3-8b", "--ranks", "8", "--json", str(target)]
    monkeypatch.setattr(sys, "argv", ["perf.scale", *words])
    scale.main()
    assert json.loads(target.read_text())["curves"][0]["ranks"] == 8
