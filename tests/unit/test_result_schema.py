"""perf/results.schema.json describes what the tools write: every kept result fits, one that lacks a part does not."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from perf.report.assemble import SECTIONS, load
from tests.torchrun import ROOT

SCHEMA = json.loads((ROOT / "perf" / "results.schema.json").read_text(encoding="utf-8"))


def validate(kind: str, result: Any) -> None:
    """Raises jsonschema.ValidationError where the result is not as described."""
    jsonschema.validate(result, {**SCHEMA, "$ref": f"#/$defs/{kind}"}, jsonschema.Draft202012Validator)


def test_every_kind_is_described() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert set(SECTIONS) <= set(SCHEMA["$defs"])


@pytest.mark.parametrize("kind", SECTIONS)
def test_kept_results_fit(kind: str) -> None:
    for result in load(ROOT / "perf" / "results").get(kind, ()):
        validate(kind, result.content)


@pytest.mark.parametrize(
    "kind, change",
    [
        ("step", lambda result: result["rows"][0].pop("sent_bytes")),
        ("comm", lambda result: result["contenders"]["home"]["collectives"]["all_gather"].pop("alone_seconds")),
        ("timeline", lambda result: result["rows"][0]["communication"]["to_homes"].pop("exposed_seconds")),
        ("two_hosts", lambda result: result["checks"][0]["rows"][0].pop("off")),
        ("links", lambda result: result["links"]["all_gather"].update(alpha_seconds="1 ms")),
    ],
)
def test_what_lacks_a_part_does_not_fit(kind: str, change: Any) -> None:
    result = load(ROOT / "perf" / "results")[kind][0].content
    change(result)
    with pytest.raises(jsonschema.ValidationError):
        validate(kind, result)
