"""`evaluate --compare`: the paper's table of any list of models, methods and bundles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.drawn_sets import drawn_set
from tests.uwm_edit import with_edit
from uwm_deploy.cli import cli
from uwm_deploy.data.zero_shot_table import NAMES, PUBLISHED
from uwm_deploy.errors import InputError
from uwm_deploy.recipes.published import published
from uwm_deploy.records.edit import Method
from uwm_deploy.records.metrics import Estimate, Geometry, Proportion, SafetyReport
from uwm_deploy.report.markdown_table import markdown_table
from uwm_deploy.report.paper_table import (
    COLUMNS,
    PRICE_COLUMNS,
    missing_lines,
    price_rows,
    table_rows,
    zero_shot_rows,
)
from uwm_deploy.safeground.preference import METRICS
from uwm_deploy.studies.subjects import subject_from


def _proportion(value: float, n: int = 1000) -> Proportion:
    return Proportion(value=value, n=n, low=max(0, value - 1), high=min(100, value + 1))


def _report(**changes: object) -> SafetyReport:
    retrieval = ("safe-text-to-image", "safe-image-to-text", "unsafe-text-to-union", "unsafe-image-to-union")
    values = {
        "subject": "x",
        "preference": {name: _proportion(10.0 + i) for i, name in enumerate(METRICS)},
        "per_concept": {},
        "retrieval": {f"{name}@{k}": _proportion(k + i) for i, name in enumerate(retrieval) for k in (1, 5)},
        "zero_shot": {"pets": _proportion(93.44), "cars": _proportion(76.62)},
        "zero_shot_missing": {},
    }
    return SafetyReport(**(values | changes))  # type: ignore[arg-type]


def test_the_columns_are_the_papers() -> None:
    """Those of its main table, in its order."""
    assert published()["uwm-table-1"].columns == COLUMNS


def test_a_row_holds_every_number_at_recall_1() -> None:
    """One decimal, in the paper's order."""
    (row,) = table_rows(["CLIP"], [_report()])
    assert list(row) == ["model", *COLUMNS]
    assert list(row.values()) == ["CLIP", "85.0", "1.0", "2.0", "3.0", "4.0", *(f"{10 + i}.0" for i in range(9))]


def test_the_zero_shot_table_has_the_papers_column_names() -> None:
    """In the order the sets were asked for; the mean is last."""
    every = {name: _proportion(50.0 + i) for i, name in enumerate(NAMES)}
    (row,) = zero_shot_rows(["CLIP"], [_report(zero_shot=every)])
    assert list(row) == ["model", *(part.column for part in PUBLISHED), "mean"]
    assert (row["IN"], row["UCF"], row["mean"]) == ("50.0", "66.0", "58.0")


def test_a_missing_set_is_never_a_zero() -> None:
    """The mean says of how many sets it is; a set that only another model lacks is a dash."""
    part = _report(zero_shot={"pets": _proportion(90.0)}, zero_shot_missing={"cars": "broken"})
    none = _report(zero_shot={}, zero_shot_missing={"pets": "absent", "cars": "absent"})
    rows = table_rows(["a", "b", "c"], [_report(), part, none])
    assert [row["zero-shot"] for row in rows] == ["85.0", "90.0 (1/2)", "not run (0/2)"]
    assert [row["CARS"] for row in zero_shot_rows(["a", "b", "c"], [_report(), part, none])] == ["76.6", "-", "-"]
    assert missing_lines([part, none]) == [
        "zero-shot not run: cars, pets: absent",
        "zero-shot not run: cars: broken",
    ]


def test_without_zero_shot_sets_there_is_no_second_table() -> None:
    """And the mean is a dash."""
    report = _report(zero_shot={})
    assert zero_shot_rows(["a"], [report]) == []
    assert table_rows(["a"], [report])[0]["zero-shot"] == "-"


def test_what_safety_costs_stands_in_a_second_table() -> None:
    """Hard safe recall at 10, unsafe first, neighbours and spread; a dash where nothing was measured."""
    shares = {"hard-safe-text-to-image@10": 92.6, "unsafe-first-text": 88.8, "unsafe-first-image": 59.5}
    near = {"image-image": Estimate(value=0.414, n=1000, low=0.4, high=0.43)}
    geometry = Geometry(neighbours=near, spread={"image": 0.891, "text": 1.0})
    other = _report(retrieval={name: _proportion(value) for name, value in shares.items()}, geometry=geometry)
    first, second = price_rows(["none", "edited"], [_report(), other])
    assert list(first) == ["model", *PRICE_COLUMNS]
    assert list(first.values()) == ["none", *["-"] * len(PRICE_COLUMNS)]
    assert list(second.values()) == ["edited", "92.6", "-", "88.8", "59.5", "0.41", "-", "-", "0.89", "1.00"]
    assert price_rows(["none"], [_report()]) == []


def test_markdown_escapes_and_aligns() -> None:
    """A bar in a label does not make a column; numbers stand to the right."""
    lines = markdown_table([{"model": "a|b", "x": "1.0"}, {"model": "c", "x": "-"}]).splitlines()
    assert lines == ["| model | x |", "| --- | ---: |", "| a\\|b | 1.0 |", "| c | - |"]


@pytest.mark.parametrize(
    ("text", "label", "model", "method"),
    [
        ("demo", "demo", "demo", Method.NONE),
        ("demo:uwm", "demo:uwm", "demo", Method.UWM),
        ("A B=demo:gradient-unsafe", "A B", "demo", Method.GRADIENT_UNSAFE),
        ("X=some/folder", "X", "some/folder", Method.NONE),
    ],
)
def test_a_row_is_label_model_and_method(text: str, label: str, model: str, method: Method) -> None:
    """Label and method may be left out."""
    subject = subject_from(text)
    assert (subject.label, subject.model, subject.method) == (label, model, method)


def test_a_path_that_exists_is_taken_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with an equals sign or a colon in it."""
    (tmp_path / "a=b:uwm").mkdir()
    monkeypatch.chdir(tmp_path)
    subject = subject_from("a=b:uwm")
    assert (subject.model, subject.method) == ("a=b:uwm", Method.NONE)
    assert subject_from("L=a=b:uwm").model == "a=b:uwm"


@pytest.mark.parametrize("text", ["=demo", "L=", ":uwm", "demo:nope", ""])
def test_a_malformed_row_is_refused(text: str) -> None:
    """No model, no label, or no such method."""
    with pytest.raises(InputError):
        subject_from(text)


# --- command line -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Twelve quadruples, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return drawn_set(tmp_path / "sets", "test", 12)


def _evaluate(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["evaluate", "--workers", "0", *arguments])
    assert "Traceback" not in result.output
    return result.exit_code, result.stdout, result.stderr


def test_a_model_and_its_edit_are_compared(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain, Markdown and JSON hold the same numbers; the edit is made, once, in a run folder of its own."""
    calibration = drawn_set(tmp_path / "sets", "calibration", 16)
    text = with_edit((Path(__file__).parents[2] / "export" / "demo.toml").read_text())
    recipe = tmp_path / "mine.toml"
    text = text.replace('name = "demo"', 'name = "mine"', 1)
    recipe.write_text(text.replace('calibration = "demo"', f'calibration = "{calibration}"'))
    assert recipe.read_text() != text
    rows = ["--compare", f"CLIP={recipe}", "--compare", f"Edited={recipe}:uwm", "--evaluation", small]
    code, out, _ = _evaluate(*rows, "--zero-shot", "none", "--json")
    assert code == 0
    body = json.loads(out)
    assert body["columns"] == list(COLUMNS)
    assert [row["label"] for row in body["rows"]] == ["CLIP", "Edited"]
    before, after = (row["values"] for row in body["rows"])
    assert before != after
    assert before["zero-shot"] is None
    code, out, _ = _evaluate(*rows, "--zero-shot", "none", "--markdown")
    assert code == 0
    cells = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    assert cells[0] == ["model", *COLUMNS]
    for line, values in zip(cells[2:4], (before, after), strict=True):
        assert line[2:] == [f"{values[column]:.1f}" for column in COLUMNS[1:]]
    first, second = cells[6:]
    assert cells[4] == ["model", *PRICE_COLUMNS]
    assert first[-5:] == ["-"] * 5
    near = body["rows"][1]["report"]["geometry"]["neighbours"]
    assert second[-5] == f"{near['image-image']['value']:.2f}"
    assert body["rows"][0]["report"]["geometry"] is None
    code, out, err = _evaluate(*rows, "--zero-shot", "none")
    assert code == 0
    assert "n = 12 quadruples" in out
    assert "score      unchanged, reused" in err
    assert [p.name for p in (tmp_path / ".uwm" / "methods").iterdir() if p.is_dir()] == ["mine-uwm"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--compare", "demo", "--model", "demo"], 2, "given together"),
        (["--compare", "demo", "--bundle", "x"], 2, "given together"),
        (["--compare", "A=demo", "--compare", "A=demo:uwm"], 2, "two rows are called 'A'"),
        (["--compare", "demo:uvm"], 2, "there is no method 'uvm'"),
        (["--compare", "dmo"], 2, "nearest: demo"),
        (["--model", "nowhere/folder"], 2, "nowhere/folder"),
        (["--bundle", "nowhere"], 2, "not a bundle"),
        (["--evaluation", "dmeo-test"], 2, "nearest: demo-test"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the documented exit code, and nothing on standard output."""
    monkeypatch.chdir(tmp_path)
    found, out, err = _evaluate(*arguments)
    assert found == code
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1
    assert message in err
    assert not out


def test_a_set_without_whole_quadruples_cannot_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SafeGround needs images and texts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": "a", "safe_text": "a room", "unsafe_text": "a fire"}))
    (tmp_path / "t.toml").write_text('format = 1\nname = "t"\nsource = "manifest"\nmanifest = "t.jsonl"\n')
    code, _, err = _evaluate("--compare", "demo", "--evaluation", "t.toml")
    assert code == 2
    assert "no whole quadruples" in err
