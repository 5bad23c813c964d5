"""The one writer of Markdown tables, and the one place where a cell's text is escaped."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from uwm_deploy.errors import LONGEST_LINE, visible


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """A table of rows with the same keys; columns of numbers are set to the right.

    Raises:
        ValueError: If there are no rows, so that the columns have no names.
    """
    if not rows:
        raise ValueError("a table without rows has no columns")
    head = list(rows[0])
    right = [i for i, key in enumerate(head) if is_numeric(rows, key)]
    return markdown_of_cells(head, [list(map(str, row.values())) for row in rows], right=right)


def markdown_of_cells(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = (), tight: bool = False
) -> str:
    """A table of cells, without a line break at its end.

    Args:
        head: Names of the columns; an empty one is written as one blank.
        rows: Cells, as many in each row as the head has; any text.
        right: Positions of the columns that are set to the right.
        tight: Whether the rule below the head is written without blanks.
    """
    rule = ["---:" if i in right else "---" for i in range(len(head))]
    names = "|" + "".join(f" {cell_text(name)} |" if name else " |" for name in head)
    below = f"|{'|'.join(rule)}|" if tight else f"| {' | '.join(rule)} |"
    return "\n".join([names, below, *(f"| {' | '.join(map(cell_text, row))} |" for row in rows)])


def cell_text(text: str) -> str:
    """Text that cannot end its cell or its row: bars are escaped, line breaks become blanks."""
    barred = re.sub(
        r"(\\*)\|", lambda found: found[1] * 2 + "\\|", text
    )  # a backslash before a bar would undo the escape
    return re.sub(r"[\r\n]", " ", barred)


def inert(text: str) -> str:
    """Text that is shown and does nothing: no HTML, link, image, code span, emphasis or mention begins in it."""
    shown = visible(text, LONGEST_LINE)
    for old, new in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        ("`", "'"),
        ("@", "@\u200b"),
        ("://", "&#58;//"),
        ("www.", "www&#46;"),
    ):
        shown = shown.replace(old, new)
    return re.sub(r"([\[\]])", r"\\\1", shown)


def is_numeric(rows: Sequence[Mapping[str, object]], key: str) -> bool:
    """Whether a column holds numbers, or a dash where there is none."""
    return all(re.match(r"[+-]?\d|-$", str(row[key])) for row in rows)
