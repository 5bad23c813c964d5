"""Tables, lines and pictures: escaping in one place, nothing wrapped or taken for markup, files written whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uwm_deploy.errors import PrerequisiteError
from uwm_deploy.report import drawings
from uwm_deploy.report.lines import Whole
from uwm_deploy.report.markdown_table import cell_text, markdown_of_cells, markdown_table
from uwm_deploy.report.terminal import NAMED, counted, print_line, print_rows, print_sections


def cells_of(line: str) -> list[str]:
    """Splits a row as GitHub does: a bar ends a cell unless an odd number of backslashes stands before it."""
    cells, text, escaped = [], "", False
    for letter in line.removeprefix("|").removesuffix("|"):
        if letter == "|" and not escaped:
            cells.append(text)
            text = ""
        else:
            text += letter
        escaped = letter == "\\" and not escaped
    return [*cells, text]


@given(st.lists(st.text(alphabet="a|\\\n\r `", max_size=8), min_size=3, max_size=3))
def test_a_cell_never_ends_early(cells: list[str]) -> None:
    """Whatever a cell holds, its row stays one line with as many cells as the head."""
    head, rule, row = markdown_of_cells(["x", "y", "z"], [cells]).split("\n")
    assert len(cells_of(row)) == len(cells_of(head)) == len(cells_of(rule)) == 3
    assert not set(row) & {"\n", "\r"}


def test_bars_and_breaks_are_escaped_once() -> None:
    """A backslash before a bar is doubled, other backslashes stay."""
    assert cell_text("a|b") == "a\\|b"
    assert cell_text("a\\|b") == "a\\\\\\|b"
    assert cell_text("C:\\x\r\ny") == "C:\\x  y"


def test_rules_and_empty_heads() -> None:
    """Chosen columns stand to the right; a head without a name is one blank."""
    assert markdown_of_cells(["", "n"], [["a", "1"]], right=(1,), tight=True).split("\n") == [
        "| | n |",
        "|---|---:|",
        "| a | 1 |",
    ]
    assert markdown_of_cells(["a"], []).split("\n") == ["| a |", "| --- |"]
    with pytest.raises(ValueError, match="without rows"):
        markdown_table([])


def test_lines_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """A path longer than the terminal is not broken, and brackets and colons are not markup."""
    path = "/" + "long/" * 60 + "[bold]x[/bold] :smile:"
    print_line(Whole(path), style="red")
    assert capsys.readouterr().out == f"{path}\n"


def test_cells_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Names from data are printed as they are, in rows and in sections."""
    print_rows([{"name": "[red]a[/red]"}])
    print_sections(["", "[b]"], [[["[i]x[/i]", "1"]], [], [["y", "2"]]], title="[u]t[/u]")
    out = capsys.readouterr().out
    assert all(text in out for text in ("[red]a[/red]", "[b]", "[i]x[/i]", "[u]t[/u]"))


def test_a_group_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that share a value show it in the first of them; nothing is printed without rows."""
    print_rows([{"kind": "first", "n": 1}, {"kind": "first", "n": 2}, {"kind": "second", "n": 3}], group="kind")
    out = capsys.readouterr().out
    assert (out.count("first"), out.count("second")) == (1, 1)
    print_rows([])
    assert capsys.readouterr().out == ""


def test_only_the_first_items_are_named() -> None:
    """The count is of all; what is left out is marked."""
    names = [f"item-{i}" for i in range(NAMED + 1)]
    assert counted("broken", len(names), names) == [
        f"broken: {NAMED + 1}",
        *(f"  {name}" for name in names[:NAMED]),
        "  ... and 1 more, see --json",
    ]
    assert counted("broken", 0, []) == []


def test_a_picture_is_the_same_each_time_and_written_whole(tmp_path: Path) -> None:
    """No date or version is in the file, and no temporary file stays."""
    for name in ("a.png", "b.png"):
        figure = drawings._figure(2, 1)
        figure.add_subplot().plot([0, 1], [1, 0])
        drawings._save(figure, tmp_path / "deep" / name)
    one, two = ((tmp_path / "deep" / name).read_bytes() for name in ("a.png", "b.png"))
    assert one == two
    assert one.startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["a.png", "b.png"]


def test_a_picture_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base install has no matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PrerequisiteError, match="matplotlib"):
        drawings._figure(1, 1)
