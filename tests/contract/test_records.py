"""Records survive JSON, and nothing else is accepted as one."""

from __future__ import annotations

import json

import pytest

from uwm_deploy.errors import IntegrityError
from uwm_deploy.records.codec import json_from_record, record_from_json, record_from_plain
from uwm_deploy.records.data import CalibrationRecord, LeftOut
from uwm_deploy.records.edit import EditStep
from uwm_deploy.records.metrics import Flips
from uwm_deploy.records.verdict import Check, Result

RECORD = CalibrationRecord(
    name="demo",
    split="test",
    n=2,
    ids_digest="sha256:0",
    content_digest="sha256:1",
    concepts={"fire": 2},
    left_out=(LeftOut(id="a", reason="broken"),),
)


def test_round_trip() -> None:
    """A record read back equals the one written."""
    assert record_from_json(CalibrationRecord, json_from_record(RECORD), where="x") == RECORD
    check = Check(
        name="a", subject="b", result=Result.PASS, measured=1.0, limit=None, direction="at_least", detail="", n=3
    )
    assert record_from_json(Check, json_from_record(check), where="x") == check


def test_nan_is_never_written() -> None:
    """A NaN in a report is an error, not a number."""
    flips = Flips(n=1, lost=0, gained=0, p_value=float("nan"), delta=0.0, delta_low=0.0, delta_high=0.0)
    with pytest.raises(IntegrityError, match="NaN"):
        json_from_record(flips)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "unknown fields"),
        ({"n": None}, "should be"),
        ({"n": True}, "should be a whole number, is true"),
        ({"n": 1.5}, "should be a whole number, is 1.5"),
        ({"schema_version": 99}, "schema version"),
        ({"record": "Verdict"}, "not a CalibrationRecord"),
        ({"concepts": [1]}, "an object"),
        ({"left_out": [{"id": "a"}]}, "missing fields"),
    ],
)
def test_a_changed_file_is_refused(change: dict[str, object], message: str) -> None:
    """Unknown, missing or wrongly typed fields and other schemas are integrity errors that name the place."""
    body = json.loads(json_from_record(RECORD)) | change
    with pytest.raises(IntegrityError, match=message):
        record_from_json(CalibrationRecord, json.dumps(body), where="file.json")


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ({"placement": "weights"}, r"x\.axis: unknown fields \[\], missing fields \['fitted_on', 'n_pairs'\]"),
        ({"placement": "bias", "fitted_on": "", "n_pairs": {}}, r"x\.axis\.placement should be one of"),
        ([], "x.axis should be"),
    ],
)
def test_a_field_that_may_be_empty_says_what_is_wrong_in_it(axis: object, message: str) -> None:
    """A record that may also be missing is as strict, and as exact, as one that may not."""
    assert record_from_plain(EditStep, {"method": "uwm", "axis": None}, where="x").axis is None
    with pytest.raises(IntegrityError, match=message):
        record_from_plain(EditStep, {"method": "safety-axis", "axis": axis}, where="x")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000])
def test_anything_else_is_refused(text: str) -> None:
    """Broken JSON, NaN, doubled keys and deep nesting never get through."""
    with pytest.raises(IntegrityError):
        record_from_json(CalibrationRecord, text, where="file.json")
