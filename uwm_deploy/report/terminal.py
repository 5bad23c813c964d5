"""Tables and lines on standard output: the one place that writes them with rich."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from uwm_deploy.errors import LONGEST_LINE, visible
from uwm_deploy.report.markdown_table import is_numeric

NAMED = 10
"""Items that are named under a count; the JSON names more of them."""

_WIDTH_WITHOUT_TERMINAL = 120
_SHORT = 12
"""Cells of a column that is never wrapped."""

_COLUMNS_WITH_LINES = 10
"""More columns are printed without lines between them, so that they fit."""


def print_line(text: str, style: str = "", *, wrap: bool = False) -> None:
    """One line, as it is: not wrapped, so that paths and names stay whole, and nothing in it is markup.

    Args:
        text: The line.
        style: Its colour.
        wrap: Break it between words where it is longer than the terminal.
    """
    _console().print(Text(visible(text, LONGEST_LINE), style=style), soft_wrap=not wrap)


def print_lines(lines: Iterable[str]) -> None:
    """Each line as `print_line` does."""
    for line in lines:
        print_line(line)


def print_rows(
    rows: Sequence[Mapping[str, object]], *, group: str = "", styles: Mapping[str, str] | None = None
) -> None:
    """A plain table, columns of numbers to the right; nothing when there are no rows.

    Where the terminal is too narrow to keep every word whole, each row becomes a short list.

    Args:
        rows: With the same keys.
        group: Key whose value is shown once for rows that share it, with a line between groups.
        styles: Colour of a value.
    """
    if not rows:
        return
    rows = [{key: visible(str(value)) for key, value in row.items()} for row in rows]
    console, columns = _console(), list(rows[0])
    lined = len(columns) <= _COLUMNS_WITH_LINES
    cells = [[key, *(str(row[key]) for row in rows)] for key in columns]
    widths = _widths(cells, console.width - (3 if lined else 2) * len(columns) - 1)
    if widths is None:
        _print_as_lists(rows, styles or {})
        return
    table = Table(header_style="bold")
    if not lined:
        table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for key, width in zip(columns, widths, strict=True):
        table.add_column(key, width=width, overflow="fold", justify="right" if is_numeric(rows, key) else "left")
    before = None
    for row in rows:
        shown = {key: Text(str(value), style=(styles or {}).get(str(value), "")) for key, value in row.items()}
        if group and row[group] == before:
            shown[group] = Text("")
        elif group:
            table.add_section()
        before = row[group] if group else None
        table.add_row(*shown.values())
    console.print(table)


def _widths(columns: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """Width of each column, in cells, so that no word is broken; None where that does not fit.

    Args:
        columns: Texts of each column, its name first.
        room: Cells for all columns together, without what lies between them.
    """
    widest = [max(map(cell_len, texts)) for texts in columns]
    words = [max((cell_len(word) for text in texts for word in text.split()), default=0) for texts in columns]
    words = [wide if wide <= _SHORT else word for wide, word in zip(widest, words, strict=True)]
    spare, missing = room - sum(words), sum(widest) - sum(words)
    if spare < 0:
        return None
    share = min(1.0, spare / missing) if missing else 0.0
    return [word + int((wide - word) * share) for word, wide in zip(words, widest, strict=True)]


def _print_as_lists(rows: Sequence[Mapping[str, object]], styles: Mapping[str, str]) -> None:
    """Each row as a line with its first value, then a line for each of the others that says something."""
    for row in rows:
        (_, first), *others = row.items()
        print_line(str(first), style="bold")
        for key, value in others:
            if str(value):
                print_line(f"  {key}: {value}", style=styles.get(str(value), ""))


def print_sections(head: Sequence[str], sections: Sequence[Sequence[Sequence[str]]], *, title: str = "") -> None:
    """A table in sections with a line between them, the first column to the left and numbers to the right.

    Args:
        head: Names of the columns.
        sections: Rows of each section; an empty one is left out.
        title: Above the table.
    """
    table = Table(title=Text(title) if title else None, title_justify="left", header_style="bold")
    for i, name in enumerate(head):
        table.add_column(Text(name), justify="right" if i else "left", overflow="fold")
    for rows in sections:
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))
        table.add_section()
    _console().print(table)


def counted(what: str, count: int, named: Sequence[str]) -> list[str]:
    """A line with the number of some items and one for each of the first; nothing when there are none."""
    lines = [f"{what}: {count}", *(f"  {name}" for name in named[:NAMED])] if count else []
    return [*lines, "  ..."] if count > NAMED else lines


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL)
