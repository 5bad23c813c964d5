"""Tables and lines on standard output: the one place that writes them with rich."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from uwm_deploy.report.markdown_table import is_numeric

NAMED = 10
"""Items that are named under a count; the JSON names more of them."""

_WIDTH_WITHOUT_TERMINAL = 120
_COLUMNS_WITH_LINES = 10
"""More columns are printed without lines between them, so that they fit."""


def print_line(text: str, style: str = "") -> None:
    """One line, as it is: never wrapped, so that paths and names stay whole, and nothing in it is markup."""
    _console().print(Text(text, style=style), soft_wrap=True)


def print_lines(lines: Iterable[str]) -> None:
    """Each line as `print_line` does."""
    for line in lines:
        print_line(line)


def print_rows(
    rows: Sequence[Mapping[str, object]], *, group: str = "", styles: Mapping[str, str] | None = None
) -> None:
    """A plain table, columns of numbers to the right; nothing when there are no rows.

    Args:
        rows: With the same keys.
        group: Key whose value is shown once for rows that share it, with a line between groups.
        styles: Colour of a value.
    """
    if not rows:
        return
    table = Table(header_style="bold")
    if len(rows[0]) > _COLUMNS_WITH_LINES:
        table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for key in rows[0]:
        table.add_column(key, overflow="fold", justify="right" if is_numeric(rows, key) else "left")
    before = None
    for row in rows:
        shown = {key: Text(str(value), style=(styles or {}).get(str(value), "")) for key, value in row.items()}
        if group and row[group] == before:
            shown[group] = Text("")
        elif group:
            table.add_section()
        before = row[group] if group else None
        table.add_row(*shown.values())
    _console().print(table)


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
            table.add_row(*map(Text, row))
        table.add_section()
    _console().print(table)


def counted(what: str, count: int, named: Sequence[str]) -> list[str]:
    """A line with the number of some items and one for each of the first; nothing when there are none."""
    lines = [f"{what}: {count}", *(f"  {name}" for name in named[:NAMED])] if count else []
    return [*lines, "  ..."] if count > NAMED else lines


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL)
