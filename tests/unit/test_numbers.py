"""Numbers that a file may say and nobody can compute with: refused as input, wherever they stand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.faults.mutations import LARGE
from tests.unit.test_report import make, write_bundle, write_run
from uwm_deploy.cli import cli
from uwm_deploy.errors import IntegrityError, RecipeError
from uwm_deploy.recipes.data_set import calibration_set_from_toml
from uwm_deploy.recipes.policy import policy_from_toml
from uwm_deploy.recipes.recipe import recipe_from_toml
from uwm_deploy.recipes.shipped import read_toml
from uwm_deploy.records.metrics import Flips, Proportion, SafetyReport

_DIGITS = (309, 400, 4300)


def _places(body: Any, kind: type) -> Iterator[tuple[Any, Any]]:
    for key, item in body.items() if isinstance(body, dict) else enumerate(body):
        if isinstance(item, dict | list):
            yield from _places(item, kind)
        elif type(item) is kind:
            yield body, key


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Text of a whole report."""
    return (write_run(make(), tmp_path_factory.mktemp("run")) / "verify/verify.json").read_text()


def _gate(text: str, folder: Path) -> tuple[int, str]:
    (folder / "verify.json").write_text(text)
    result = CliRunner().invoke(cli, ["gate", str(folder / "verify.json"), "--policy", "demo"])
    return result.exit_code, result.output


@pytest.mark.parametrize("kind", [int, float])
@pytest.mark.parametrize(
    "number", LARGE, ids=lambda number: f"{number:.3g}" if isinstance(number, float) else str(number)[:9]
)
def test_a_report_full_of_one_number_is_no_internal_error(
    number: float, kind: type, report: str, tmp_path: Path
) -> None:
    """In the place of every float, or of every whole number."""
    body = json.loads(report)
    for part, key in list(_places(body, kind)):
        if key != "schema_version":
            part[key] = number
    code, output = _gate(json.dumps(body), tmp_path)
    assert code in (2, 3, 5), output[-300:]
    assert "internal error" not in output


@pytest.mark.parametrize("digits", _DIGITS)
@pytest.mark.parametrize("kind", [int, float])
def test_a_number_of_many_digits_is_named(digits: int, kind: type, report: str, tmp_path: Path) -> None:
    """One place at a time, some of them; a manifest and a policy are read by the same code."""
    body = json.loads(report)
    for part, key in [place for place in _places(body, kind) if place[1] != "schema_version"][::150]:
        kept, part[key] = part[key], 10 ** (digits - 1)
        code, output = _gate(json.dumps(body), tmp_path)
        assert (code, "a number of at most 64 bits" in output, str(key) in output) == (5, True, True), (key, output)
        part[key] = kept


def _manifest(folder: Path, digits: int) -> None:
    from uwm_deploy.bundle.open import MANIFEST, open_bundle

    bundle = write_bundle(make(), folder / "bundle")
    body = json.loads((bundle / MANIFEST).read_text())
    body["files"][0]["size_bytes"] = 10 ** (digits - 1)
    (bundle / MANIFEST).write_text(json.dumps(body))
    open_bundle(bundle, allow_failed=True)


def _policy(_: Path, digits: int) -> None:
    text, where = read_toml("ci", "demo")
    assert "at_least = " in text
    head, _, tail = text.partition("at_least = ")
    policy_from_toml(f"{head}at_least = 1{'0' * (digits - 1)}\n{tail.partition(chr(10))[2]}", where=where)


@pytest.mark.parametrize("digits", _DIGITS)
@pytest.mark.parametrize(("read", "error"), [(_manifest, IntegrityError), (_policy, RecipeError)])
def test_every_reader_of_records_refuses_them(
    read: Callable[[Path, int], None], error: type[Exception], digits: int, tmp_path: Path
) -> None:
    """As what the file is: a manifest, or a policy."""
    with pytest.raises(error, match=r"a number of at most 64 bits"):
        read(tmp_path, digits)


_SHARE = {"value": 50.0, "n": 4, "low": 10.0, "high": 90.0}
_FLIPS = {"n": 4, "lost": 1, "gained": 1, "p_value": 1.0, "delta": 0.0, "delta_low": -1.0, "delta_high": 1.0}


@pytest.mark.parametrize(
    ("made", "changes"),
    [
        *((Proportion, _SHARE | change) for change in (
            {"value": 150.0}, {"low": -1.0}, {"high": 1e308}, {"n": 0}, {"n": -4}, {"ties": -1}, {"clusters": -1},
            {"value": float("nan")},
        )),
        *((Flips, _FLIPS | change) for change in (
            {"n": 0}, {"lost": -1}, {"gained": 4}, {"delta_high": 1e308}, {"delta": float("nan")}, {"clusters": -2},
        )),
    ],
)  # fmt: skip
def test_a_number_that_cannot_be_is_refused(made: type, changes: dict[str, Any]) -> None:
    """A share of 150%, of no items, or with more changes than items: the gate would compute with it."""
    with pytest.raises(IntegrityError, match="there is no such number"):
        made(**changes)
    assert made(**(_SHARE if made is Proportion else _FLIPS)).n == 4


def test_a_report_has_all_nine_metrics() -> None:
    """One that is renamed is missing where it is read."""
    nine = dict.fromkeys(("P_ts", "P_tu", "P_vs", "P_vu", "Txt_s", "Img_s", "PS", "PU", "GS"), Proportion(**_SHARE))
    SafetyReport(subject="x", preference=nine, per_concept={"a": nine}, retrieval={}, zero_shot={})
    SafetyReport(subject="x", preference={}, per_concept={}, retrieval={}, zero_shot={})
    for wrong in (nine | {"P_tux": nine["PS"]}, {k: v for k, v in nine.items() if k != "P_tu"}):
        for preference, concepts in ((wrong, {"a": nine}), (nine, {"a": wrong})):
            with pytest.raises(IntegrityError, match="not the nine"):
                SafetyReport(subject="x", preference=preference, per_concept=concepts, retrieval={}, zero_shot={})


@pytest.mark.parametrize("place", [("original", "preference"), ("edited", "preference"), ("edit_effect",)])
def test_a_report_measures_and_compares_two_models(place: tuple[str, ...], report: str, tmp_path: Path) -> None:
    """One metric under another name, or none at all: refused where the report is read."""
    for renamed in (True, False):
        body = json.loads(report)
        part = body[place[0]] if len(place) == 1 else body[place[0]][place[1]]
        kept = dict(part)
        part.clear()
        if renamed:
            part |= {f"{name}x" if name == "GS" else name: value for name, value in kept.items()}
        code, output = _gate(json.dumps(body), tmp_path)
        assert (code, "GS" in output) == (5, True), output[-300:]


@pytest.mark.parametrize("number", ["0x" + "f" * 5000, "9" * 5000, str(2**63), "0b" + "1" * 70])
@pytest.mark.parametrize(
    ("read", "kind", "name", "key"),
    [
        (policy_from_toml, "ci", "demo", "at_most"),
        (policy_from_toml, "ci", "demo", "format"),
        (recipe_from_toml, "export", "demo", "opset"),
        (calibration_set_from_toml, "calibration", "demo", "limit"),
    ],
)
def test_no_base_hides_a_number_of_many_digits(number: str, read: Any, kind: str, name: str, key: str) -> None:
    """TOML has base 16 and 2, for which Python has no limit until it prints the number."""
    text, where = read_toml(kind, name)
    changed = re.sub(rf"^({key} *=).*|\b({key} *=) *[-0-9.e]+", rf"\1\2 {number}", text, count=1, flags=re.MULTILINE)
    changed = changed if changed != text else f"{key} = {number}\n{text}"
    with pytest.raises(RecipeError, match=r"a number of at most 64 bits|a number has thousands of digits") as caught:
        read(changed, where=where)
    assert "sys." not in str(caught.value)
    assert len(str(caught.value)) < 300
