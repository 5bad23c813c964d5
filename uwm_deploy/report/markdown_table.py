"""The one writer of Markdown tables, and the one place where a cell's text is escaped."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from uwm_deploy.errors import LONGEST_LINE, visible


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """A table of rows with the same keys, whose text does nothing; columns of numbers are set to the right.

    Raises:
        ValueError: If there are no rows, so that the columns have no names.
    """
    if not rows:
        raise ValueError("a table without rows has no columns")
    head = list(rows[0])
    right = [i for i, key in enumerate(head) if is_numeric(rows, key)]
    return markdown_of_cells(head, [[inline(str(value)) for value in row.values()] for row in rows], right=right)


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


_INERT = {"&": "&amp;", "<": "&lt;", "`": "'", "\\": "&#92;"}
"""A backslash as an entity: it undoes no other escape, and none undoes it."""

_MENTION = re.compile(r"@(?!\s|$)")

_SPECIAL = re.compile(r"[\[\]*~$]|(?<![^\W_])_|_(?![^\W_])")
"""What begins or ends a link, an image, a note, emphasis or a formula; an underscore inside a word does not."""

_BLOCK = re.compile(r"(?:#{1,6}|[-+]|\d{1,9}[.)])(?=\s|$)|>|:?-[-:\s|]*$|=+\s*$")
"""What makes a heading, a list, a quote, a rule or a table of a line that begins with it."""


def inline(text: str) -> str:
    """Text inside a line that is shown and does nothing: no HTML, link, image, code, emphasis or mention begins in it."""
    shown = "".join(_INERT.get(c, c) for c in visible(text, LONGEST_LINE).strip())
    shown = _MENTION.sub("@\u200b", shown)
    shown = re.sub(r"://", "&#58;//", _SPECIAL.sub(r"\\\g<0>", shown))
    return re.sub(r"www\.|(?:mailto|xmpp):", _unlinked, shown, flags=re.IGNORECASE)


def inert(text: str) -> str:
    """The same where the text may begin a line: no heading, list, quote, rule or table begins in it either."""
    shown = inline(text)
    if block := _BLOCK.match(shown):
        at = block.end() - 1 if shown[0].isdigit() else 0
        shown = f"{shown[:at]}\\{shown[at:]}"
    return shown


def _unlinked(found: re.Match[str]) -> str:
    return found[0].replace(".", "&#46;").replace(":", "&#58;")


def code(text: str) -> str:
    """Text as a span of code, where nothing but a backtick is special; bars are left to the cell."""
    return f"`{visible(text, LONGEST_LINE).replace('`', chr(39)) or ' '}`"


def is_numeric(rows: Sequence[Mapping[str, object]], key: str) -> bool:
    """Whether a column holds numbers, or a dash where there is none."""
    return all(re.match(r"[+-]?\d|-$", str(row[key])) for row in rows)
