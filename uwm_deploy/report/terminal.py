"""Tables and lines on standard output: the one place that writes them with rich."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from uwm_deploy.errors import visible
from uwm_deploy.report.lines import printed_lines, width_of
from uwm_deploy.report.markdown_table import is_numeric

NAMED = 10
"""Items that are named under a count; the JSON names more of them."""

_SHORT = 12
"""Cells of a column that is never wrapped."""

_VALUE = 24
"""Cells of a text that is still a value; a longer one with blanks is prose."""

_COLUMNS_WITH_LINES = 10
"""More columns are printed without lines between them, so that they fit."""


_PARTS = 3
"""Tables that a wide one is split into, at most."""


def print_line(text: str, style: str = "") -> None:
    """One line, which goes on in the next one where it is too long; nothing in it is markup.

    Args:
        text: The line; one that is `Whole` is never broken.
        style: Its colour.
    """
    console = _console()
    for line in printed_lines(text, console.width):
        console.print(Text(line, style=style), soft_wrap=True)


def print_lines(lines: Iterable[str]) -> None:
    """Each line as `print_line` does."""
    for line in lines:
        print_line(line)


def print_rows(
    rows: Sequence[Mapping[str, object]], *, names: int = 1, group: str = "", styles: Mapping[str, str] | None = None
) -> None:
    """A plain table, columns of numbers to the right; nothing when there are no rows.

    Where not every word fits beside the others, a table of values is printed in parts, one below the other. Each part
    begins with the columns that name the rows. Rows with prose, or of too many parts, become short lists.

    Args:
        rows: With the same keys.
        names: Number of columns that name a row.
        group: Key whose value is shown once for rows that share it: in its column, or above a table of its own.
        styles: Colour of a value.
    """
    if not rows:
        return
    cells = [{key: visible(str(value)) for key, value in row.items()} for row in rows]
    width, keys = _console().width, list(cells[0])
    if group and not _layout(cells, keys, width):
        for shared, found in itertools.groupby(cells, key=lambda row: row[group]):
            print_line(shared, style="bold")
            print_rows([{key: row[key] for key in keys if key != group} for row in found], styles=styles)
        return
    parts = [keys] if _layout(cells, keys, width) else _parts(cells, keys, names, width)
    for part in parts:
        _print_table(cells, part, group=group, styles=styles or {})
    if not parts:
        _print_as_lists(cells, styles or {})


def _print_table(
    rows: Sequence[Mapping[str, str]], keys: Sequence[str], *, group: str, styles: Mapping[str, str]
) -> None:
    """These columns of the rows, which fit beside each other."""
    console = _console()
    lined, widths = _layout(rows, keys, console.width) or (True, [])
    table = Table(header_style="bold")
    if not lined:
        table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for key, width in zip(keys, widths, strict=True):
        table.add_column(key, width=width, overflow="fold", justify="right" if is_numeric(rows, key) else "left")
    before = None
    for row in rows:
        shown = {key: Text(row[key], style=styles.get(row[key], "")) for key in keys}
        if group and row[group] == before:
            shown[group] = Text("")
        elif group:
            table.add_section()
        before = row[group] if group else None
        table.add_row(*shown.values())
    console.print(table)


def _layout(rows: Sequence[Mapping[str, str]], keys: Sequence[str], width: int) -> tuple[bool, list[int]] | None:
    """Whether lines stand between the columns, and the width of each in cells, so that no word is broken.

    Args:
        rows: Of the table.
        keys: Its columns.
        width: Cells of a line.

    Returns:
        None where that does not fit.
    """
    texts = [[key, *(row[key] for row in rows)] for key in keys]
    widest = [max(map(cell_len, column)) for column in texts]
    words = [max((cell_len(word) for text in column for word in text.split()), default=0) for column in texts]
    words = [wide if wide <= _SHORT else word for wide, word in zip(widest, words, strict=True)]
    room, missing = width - sum(words), sum(widest) - sum(words)
    spare = {True: room - 3 * len(keys) - 1, False: room - 2 * len(keys) + 2}
    lined = len(keys) <= _COLUMNS_WITH_LINES and spare[True] >= 0
    if spare[lined] < 0:
        return None
    share = min(1.0, spare[lined] / missing) if missing else 0.0
    return lined, [word + int((wide - word) * share) for word, wide in zip(words, widest, strict=True)]


def _parts(rows: Sequence[Mapping[str, str]], keys: Sequence[str], names: int, width: int) -> list[list[str]]:
    """Columns of each part, so that it fits and no value is wrapped.

    Nothing where a value is prose, where a column is too wide itself, or where there would be too many parts.
    """
    if any(cell_len(row[key]) > _VALUE and " " in row[key] for row in rows for key in keys[names:]):
        return []
    widths = [max(map(cell_len, (key, *(row[key] for row in rows)))) + 3 for key in keys]
    parts = [[*keys[:names], *(keys[i] for i in part)] for part in _balanced(widths, names, width - 1)]
    widest = max(sum(widths[keys.index(key)] for key in part) for part in parts)
    return parts if len(parts) <= _PARTS and widest < width else []


def _balanced(widths: Sequence[int], names: int, room: int) -> list[list[int]]:
    """Positions of the columns of each part: as few parts as fit, and about as many columns in each.

    Args:
        widths: Cells of each column.
        names: Number of columns that each part begins with.
        room: Cells of a part.
    """

    def filled(room: int) -> list[list[int]]:
        parts: list[list[int]] = []
        for i in range(names, len(widths)):
            if parts and sum(widths[:names]) + sum(widths[j] for j in (*parts[-1], i)) <= room:
                parts[-1].append(i)
            else:
                parts.append([i])
        return parts

    parts = filled(room)
    for less in range(room, 0, -1):
        if len(narrower := filled(less)) > len(parts):
            break
        parts = narrower
    return parts


def _print_as_lists(rows: Sequence[Mapping[str, str]], styles: Mapping[str, str]) -> None:
    """Each row as a line with its first value, then the others that say something, one behind the other."""
    for row in rows:
        (_, first), *others = row.items()
        print_line(first, style=styles.get(first, "bold"))
        print_line("  " + "; ".join(f"{key}: {value}" if key else value for key, value in others if value))


def print_sections(head: Sequence[str], sections: Sequence[Sequence[Sequence[str]]], *, title: str = "") -> None:
    """A table in sections with a line between them, the first column to the left and numbers to the right.

    Where not every column fits, the others follow in further tables, each with the first column.

    Args:
        head: Names of the columns.
        sections: Rows of each section; an empty one is left out.
        title: Above the table.
    """
    cells = [[visible(cell) for cell in row] for row in (head, *(row for rows in sections for row in rows))]
    widths, width = [max(map(cell_len, column)) + 3 for column in zip(*cells, strict=True)], _console().width
    parts = _balanced(widths, 1, width + 1)
    for part in parts or [[]]:
        _print_sections([0, *part], head, sections, title=title if part in (parts[:1] or [[]]) else "")


def _print_sections(
    shown: Sequence[int], head: Sequence[str], sections: Sequence[Sequence[Sequence[str]]], *, title: str
) -> None:
    table = Table(title=Text(title) if title else None, title_justify="left", header_style="bold", show_edge=False)
    for i in shown:
        table.add_column(Text(visible(head[i])), justify="right" if i else "left", overflow="fold")
    for rows in sections:
        for row in rows:
            table.add_row(*(Text(visible(row[i])) for i in shown))
        table.add_section()
    _console().print(table)


def counted(what: str, count: int, named: Sequence[str]) -> list[str]:
    """A line with the number of some items, one for each of the first, and where the others are; nothing without any."""
    lines = [f"{what}: {count}", *(f"  {name}" for name in named[:NAMED])] if count else []
    return [*lines, f"  ... and {count - NAMED} more, see --json"] if count > NAMED else lines


def _console() -> Console:
    return Console(highlight=False, width=width_of(sys.stdout))
