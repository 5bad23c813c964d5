"""How wide a printed line is, and where a longer one goes on."""

from __future__ import annotations

import os
import re
from typing import TextIO

from uwm_deploy.errors import LONGEST_LINE, visible

COLUMNS = 80
"""Width of what is printed where there is no terminal, and no `COLUMNS` in the environment."""

_FURTHER = 2
"""How much further in a line begins that goes on."""

_LABEL = re.compile(r" *(?:[^\s:,;]+(?: [^\s:,;]+)*  +|[-*] )(?=\S)")
"""What stands before a column of values, and ends with at least two blanks; or the sign of a list."""

_WORD = re.compile(r" *(?:[^\s`]*`[^`]+`\S*|\S+)")
"""A word with the blanks before it; a command between backticks is one."""


class Whole(str):
    """A line that is copied, or read by a program: a path, a command, a row in Markdown. It is never broken."""

    __slots__ = ()


def width_of(stream: TextIO) -> int:
    """Columns of a terminal; of anything else what `COLUMNS` in the environment says, or 80.

    Args:
        stream: Where the lines go.
    """
    try:
        return os.get_terminal_size(stream.fileno()).columns or COLUMNS
    except (OSError, ValueError):
        asked = os.environ.get("COLUMNS", "")
        return int(asked) if asked.isdecimal() and int(asked) else COLUMNS


def printed_lines(text: str, width: int) -> list[str]:
    """A line as it is printed: every character can be seen, and it goes on in the next line where it is too long.

    It is broken between words only, so a path or a digest stays whole even where it is wider. A digest stays beside its
    label, which people search for.

    Args:
        text: The line.
        width: Columns.
    """
    line = visible(text, LONGEST_LINE)
    if isinstance(text, Whole) or len(line) * 2 <= width:  # no character takes more than two columns
        return [line]
    from rich.cells import cell_len

    if cell_len(line) <= width:
        return [line]
    label = _LABEL.match(line)
    if label and cell_len(label[0]) <= width // 2:
        head = label[0]
        further = cell_len(head)
    else:
        head = line[: len(line) - len(line.lstrip())]
        further = len(head) + _FURTHER
    lines = [head]
    for word in re.findall(_WORD, line[len(head) :]):
        stays = lines == [head] and (not head.strip() or "sha256:" in word or cell_len(word) > width - _FURTHER)
        if stays or cell_len(lines[-1] + word) <= width:
            lines[-1] += word
        else:
            word = word.lstrip()
            lines.append(" " * max(min(further, width - cell_len(word)), _FURTHER) + word)
    return [line.rstrip() for line in lines]
