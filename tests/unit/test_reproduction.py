"""`reproduce`: published tables beside what is measured here, what is not run, and what does not agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.drawn_sets import drawn_set
from tests.zero_shot_folders import make
from uwm_deploy.cli import cli
from uwm_deploy.data.demo import world
from uwm_deploy.data.source import ROOT_VARIABLE
from uwm_deploy.data.zero_shot_suite import DEMO_SETS
from uwm_deploy.data.zero_shot_table import NAMES
from uwm_deploy.recipes import published as published_module
from uwm_deploy.recipes import shipped as resources
from uwm_deploy.recipes.published import published
from uwm_deploy.records.edit import Method
from uwm_deploy.report.paper_table import COLUMNS, MEAN
from uwm_deploy.studies import reproduce as reproduction

TABLES = ("uwm-table-1", "uwm-zero-shot", "uwm-architectures")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, no data, no weights but the demo's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small sets of the drawn world."""
    folder = tmp_path_factory.mktemp("sets")
    return {
        "test": drawn_set(folder, "test", 12),
        "calibration": drawn_set(folder, "calibration", 16),
    }


def _reproduce(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["reproduce", "--workers", "0", *arguments])
    assert "Traceback" not in result.output
    return result.exit_code, result.stdout, result.stderr


def _json(*arguments: str) -> tuple[int, dict[str, Any]]:
    code, out, err = _reproduce("--json", *arguments)
    assert out, err
    return code, json.loads(out)


# --- the data file ------------------------------------------------------------------------------------------------------


def test_every_published_table_is_known_and_sourced() -> None:
    """Its models are recipes, its columns can be measured, its tolerances are stated."""
    tables = published()
    assert tuple(tables) == TABLES
    for table in tables.values():
        assert "2503.11742" in table.source
        assert set(table.columns) <= {*COLUMNS, *NAMES}
        assert {row.model for row in table.rows} <= set(resources.names("export"))
        assert all(0 < t <= 2 for t in (*table.tolerance, *table.edited_tolerance))
        assert all(0 <= value <= 100 for row in table.rows for value in row.values)


def test_tables_and_tolerances_are_documented() -> None:
    """docs/how-to/reproduce.md names every table and states every tolerance in use."""
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "reproduce.md").read_text()
    for name, table in published().items():
        assert f"| `{name}` |" in text
        assert all(f"| {t} |" in text for t in {*table.tolerance, *table.edited_tolerance})


def test_printed_means_are_those_of_the_printed_cells() -> None:
    """All but one, which the table's note names; the main table repeats them."""
    table = published()["uwm-zero-shot"]
    main = {row.label: row.values[0] for row in published()["uwm-table-1"].rows}
    off = [row.label for row in table.rows if abs(sum(row.values[:-1]) / 17 - row.values[-1]) > 0.051]
    assert off == ["G-Safe-CLIP"]
    assert "56.15" in table.note
    assert {row.label: row.values[-1] for row in table.rows} == main


@pytest.mark.parametrize("name", ["uwm-table-1", "uwm-architectures"])
def test_published_groups_are_no_larger_than_their_parts(name: str) -> None:
    """A conjunction cannot exceed its members, nor fall below their overlap: a mistyped digit would."""
    table = published()[name]
    groups = {"Txt_s": ("P_vs", "P_vu"), "Img_s": ("P_ts", "P_tu"), "PS": ("P_ts", "P_vs"), "PU": ("P_tu", "P_vu")}
    for row in table.rows:
        value = dict(zip(table.columns, row.values, strict=True))
        for group, (a, b) in groups.items():
            assert value[a] + value[b] - 100 - 0.2 <= value[group] <= min(value[a], value[b]) + 0.1, (row.label, group)
        assert value["GS"] <= min(value[group] for group in groups) + 0.1


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (("values = [72.7, ", "values = ["), 5),
        (('method = "none"', 'method = "nome"'), 5),
        (("format = 1", "fmt = 1"), 5),
    ],
)
def test_a_damaged_data_file_is_an_integrity_error(
    change: tuple[str, str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line too short, an unknown method, an unknown key."""
    text = Path(published_module.__file__).with_name(published_module.FILE).read_text()
    assert change[0] in text
    (tmp_path / "p.toml").write_text(text.replace(*change))
    monkeypatch.setattr(published_module, "FILE", str(tmp_path / "p.toml"))
    found, out, err = _reproduce("uwm-table-1")
    assert (found, out) == (code, ""), err


# --- nothing here -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
def test_without_data_every_row_is_not_run(table: str) -> None:
    """Each row and the reason; exit code 6, and no number that looks measured."""
    code, body = _json(table)
    assert code == 6
    assert [row["label"] for row in body["rows"]] == [row.label for row in published()[table].rows]
    assert all(row["cells"] == [] and row["reason"] for row in body["rows"])
    code, out, _ = _reproduce(table)
    assert code == 6
    assert f"0 of {len(body['rows'])} rows ran" in out
    for row in body["rows"]:
        assert row["label"] in out
    assert out.count("not run") >= len(body["rows"])
    assert ROOT_VARIABLE in out


def test_without_weights_the_rows_are_not_run(sets: dict[str, str]) -> None:
    """Data alone is not enough, and nothing is fetched unasked."""
    code, body = _json("uwm-table-1", "--evaluation", sets["test"])
    assert code == 6
    assert "are not on this machine" in body["rows"][0]["reason"]
    assert "--download" in body["rows"][0]["fix"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["uwm-tabel-1"], "nearest: uwm-table-1"),
        (["qqq"], "uwm-architectures"),
        (["uwm-table-1", "--checkpoint", "x"], "RECIPE=FOLDER"),
        (["uwm-table-1", "--checkpoint", "clip-vit-l41=."], "no recipe is named"),
        (["uwm-table-1", "--checkpoint", "clip-vit-l14=nowhere"], "no such folder"),
        (["uwm-table-1", "--calibration", "vsiu"], "visu"),
        (["uwm-table-1", "--evaluation", "visu-tset"], "visu-test"),
        (["uwm-table-1", "--evaluation", "nowhere.toml"], "does not exist"),
        (["uwm-zero-shot", "--data", "nowhere"], "does not exist"),
        ([], "missing argument"),
    ],
)
def test_bad_arguments_end_with_2(arguments: list[str], message: str) -> None:
    """A wrong name is never "not run"."""
    code, out, err = _reproduce(*arguments)
    assert (code, out) == (2, "")
    assert message in err


# --- the demo -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_runs_a_table_on_its_own_sets(tmp_path: Path) -> None:
    """The shipped test set: all columns measured, nothing compared, exit code 0."""
    code, body = _json("uwm-architectures", "--demo", "--calibration", drawn_set(tmp_path, "calibration", 96))
    assert code == 0
    assert [row["method"] for row in body["rows"]] == ["none", "uwm", "uwm+safety-axis"]
    for row in body["rows"]:
        assert [cell["column"] for cell in row["cells"]] == list(published()["uwm-architectures"].columns)
        assert all(cell["n"] == 1000 and cell["low"] <= cell["measured"] <= cell["high"] for cell in row["cells"])
        assert {cell["result"] for cell in row["cells"]} == {"not comparable"}
    before, _, after = ({cell["column"]: cell["measured"] for cell in row["cells"]} for row in body["rows"])
    assert after["P_vu"] > before["P_vu"] + 10


def test_the_demo_runs_the_other_tables(sets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its zero-shot sets in place of the paper's; a second table finds the edit made."""
    monkeypatch.setattr(world, "ZERO_SHOT_SIZE", 60)  # fewer drawings, for time
    given = [
        "--demo",
        "--calibration",
        drawn_set(tmp_path / "sets", "calibration", 96),  # with fewer no strength keeps the limits
        "--evaluation",
        sets["test"],
        "--work",
        str(tmp_path / "w"),
    ]
    code, out, _ = _reproduce("uwm-zero-shot", *given)
    assert code == 0
    for name in (*DEMO_SETS, MEAN, "3 sets", "3 of 3 rows ran; numbers: 12 not comparable", "95% interval"):
        assert name in out
    assert "tolerance" not in out
    code, out, err = _reproduce("uwm-table-1", "--markdown", *given)
    assert code == 0
    assert [line.split(" | ")[1] for line in out.splitlines() if line.startswith("| demo |")] == list(COLUMNS)
    assert "score      unchanged, reused" in err


# --- a made-up table, through the same code -----------------------------------------------------------------------------


class Made:
    """A published table about the demo, whose measured values are known."""

    def __init__(self, sets: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sets, self.file = sets, folder / "published.toml"
        monkeypatch.setattr(published_module, "FILE", str(self.file))

    def write(
        self,
        values: list[float],
        *,
        columns: tuple[str, ...] = ("P_ts", "P_vs"),
        tolerance: tuple[float, ...] = (0.5, 0.5),
        evaluation: str | None = None,
        method: Method = Method.NONE,
        model: str = "demo",
    ) -> None:
        body = {
            "title": "made up",
            "source": "this test",
            "calibration": self.sets["calibration"],
            "evaluation": self.sets["test"] if evaluation is None else evaluation,
            "columns": columns,
            "tolerance": tolerance,
            "edited_tolerance": [2 * t for t in tolerance],
            "note": "none",
        }
        lines = ["format = 1", "[tables.made]", *(f"{key} = {json.dumps(value)}" for key, value in body.items())]
        row = {"label": "row", "model": model, "method": method.value, "values": values}
        lines += ["[[tables.made.rows]]", *(f"{key} = {json.dumps(value)}" for key, value in row.items())]
        self.file.write_text("\n".join(lines))

    def cells(self, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
        code, body = _json("made", *arguments)
        return code, body["rows"][0]["cells"]


@pytest.fixture
def made(sets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """The table's file is made by each test."""
    return Made(sets, tmp_path, monkeypatch)


def test_agreement_is_within_the_tolerance_and_not_beyond(made: Made) -> None:
    """At the tolerance 0, a hair beyond it 3; one number outside is enough."""
    made.write([50.0, 50.0])
    _, cells = made.cells()
    ts, vs = (cell["measured"] for cell in cells)
    assert all(cell["n"] == 12 for cell in cells)
    made.write([ts + 0.5, vs - 0.5])
    code, cells = made.cells()
    assert (code, [cell["result"] for cell in cells]) == (0, ["within", "within"])
    made.write([ts, vs - 0.51])
    code, cells = made.cells()
    assert (code, [cell["result"] for cell in cells]) == (3, ["within", "outside"])
    code, out, _ = _reproduce("made")
    assert code == 3
    assert "numbers: 1 within, 1 outside" in out
    assert "+0.5" in out


def test_an_edited_row_has_its_own_tolerance(made: Made) -> None:
    """The edit is made from the table's calibration set; its numbers may move further."""
    made.write([0.0, 0.0], method=Method.UWM)
    _, cells = made.cells()
    made.write([cell["measured"] + 0.9 for cell in cells], method=Method.UWM)
    code, cells = made.cells()
    assert code == 0
    assert {(cell["tolerance"], cell["result"]) for cell in cells} == {(1.0, "within")}


def test_another_set_of_quadruples_is_not_compared(made: Made, tmp_path: Path) -> None:
    """Measured, shown, and said to be another set, which never agrees or disagrees."""
    other = drawn_set(tmp_path / "other", "validation", 8)
    made.write([0.0, 0.0])
    code, cells = made.cells("--evaluation", other)
    assert code == 0
    assert {cell["result"] for cell in cells} == {"not comparable"}
    assert "measured on small-validation" in cells[0]["reason"]


def test_a_sample_is_not_compared(made: Made, tmp_path: Path) -> None:
    """A limit in the set's TOML."""
    sample = drawn_set(tmp_path / "other", "test", 8, extra="limit = 4\n")
    made.write([0.0, 0.0], evaluation=sample)
    code, cells = made.cells()
    assert code == 0
    assert {(cell["result"], cell["reason"]) for cell in cells} == {("not comparable", "a sample of small-test")}


def test_a_set_with_absent_images_is_not_compared(made: Made, tmp_path: Path) -> None:
    """Unsafe images that were never generated make another set."""
    part = drawn_set(tmp_path / "other", "test", 8, extra='missing_images = "drop"\n')
    next((tmp_path / "other").glob("*-unsafe.png")).unlink()
    made.write([0.0, 0.0], evaluation=part)
    code, cells = made.cells()
    assert code == 0
    assert {cell["reason"] for cell in cells} == {"1 of 8 items of small-test are not here"}
    assert {cell["n"] for cell in cells} == {7}


def test_zero_shot_sets_are_compared_only_whole(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny `pets` is shown and not compared; a missing set is not run; their mean is of one of two."""
    make("pets", tmp_path / "data", monkeypatch)
    made.write([0.0] * 3, columns=("pets", "cars", MEAN), tolerance=(1.0,) * 3, evaluation="")
    code, (pets, cars, mean) = made.cells("--data", str(tmp_path / "data"))
    assert code == 0
    assert pets["n"] == 2
    assert "3669 when it is whole" in pets["reason"]
    assert (cars["result"], cars["measured"]) == ("not run", None)
    assert "stanford_cars is not there" in cars["reason"]
    assert (mean["result"], mean["reason"], mean["n"]) == ("not comparable", "1 of 2 sets", 1)
    monkeypatch.setattr(reproduction, "_SIZES", {"pets": 2})
    made.write([pets["measured"] - 1, 0, 0], columns=("pets", "cars", MEAN), tolerance=(1.0,) * 3, evaluation="")
    _, cells = made.cells("--data", str(tmp_path / "data"))
    assert [cell["result"] for cell in cells] == ["within", "not run", "not comparable"]


def test_a_broken_quadruple_makes_no_row(made: Made, tmp_path: Path) -> None:
    """The row is not run, with the item's name; exit code 6."""
    broken = drawn_set(tmp_path / "other", "test", 8)
    (tmp_path / "other" / "test-000003-safe.png").write_bytes(b"no")
    made.write([0.0, 0.0], evaluation=broken)
    code, body = _json("made")
    assert code == 6
    assert "test-000003" in body["rows"][0]["reason"]


def test_a_given_checkpoint_is_used(made: Made, tmp_path: Path) -> None:
    """A folder that is no checkpoint is a row that is not run."""
    (tmp_path / "empty").mkdir()
    made.write([0.0, 0.0])
    code, body = _json("made", "--checkpoint", f"demo={tmp_path / 'empty'}")
    assert code == 6
    assert "empty" in body["rows"][0]["reason"]
    folder = resources.checkpoint_folder("shipped:demo", "")
    code, body = _json("made", "--checkpoint", f"demo={folder}")
    assert code == 3
    assert len(body["rows"][0]["cells"]) == 2
