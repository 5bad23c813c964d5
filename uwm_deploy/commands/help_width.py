"""Help that fits a terminal of 80 columns: names are never split, and a long example goes on as a shell reads it."""

from __future__ import annotations

import re
from collections.abc import Iterable

import click

_WIDTH = 78
"""Two columns less than a terminal has: click indents the help."""

_FURTHER = " " * 4
"""How much further in a line begins that goes on."""


def within_80_columns(text: str | None, margin: int) -> str | None:
    """The help of a command, whose long example lines are broken, if they can be before an option.

    Args:
        text: A docstring; lines that begin with `uwm-deploy` are examples.
        margin: Blanks before each line, which click takes away.
    """
    if text is None:
        return None
    lines = (_broken(line, margin) if re.match(r" *uwm-deploy ", line) else line for line in text.split("\n"))
    return "\n".join(lines)


def _broken(line: str, margin: int) -> str:
    if len(line) - margin <= _WIDTH:
        return line
    start, end = len(line) - len(line.lstrip()), margin + _WIDTH - len(" \\")
    before_option = [m.start() for m in re.finditer(r" (?=--)", line) if start < m.start() <= end]
    at = before_option[-1] if before_option else line.rfind(" ", start, end)
    if at <= start:
        return line
    first = not line.startswith(" " * (margin + 2) + _FURTHER)
    indent = " " * start + (_FURTHER if first else "")
    return f"{line[:at]} \\\n{_broken(indent + line[at + 1 :], margin)}"


_HYPHEN = "\u2011"
"""Looks like a hyphen, and no line ends behind it."""


def _unbroken(text: str) -> str:
    return text.replace("-", _HYPHEN)


class WholeWords(click.HelpFormatter):
    """Breaks lines at blanks only, so that a name such as `--keep-float32` can be copied from the help."""

    def write(self, string: str) -> None:
        """Writes text as it was before it was laid out."""
        super().write(string.replace(_HYPHEN, "-"))

    def write_text(self, text: str) -> None:
        """A paragraph."""
        super().write_text(_unbroken(text))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """A list of names and what they mean."""
        super().write_dl([(name, _unbroken(meaning)) for name, meaning in rows], col_max, col_spacing)


class HelpContext(click.Context):
    """Of a command whose help is laid out so."""

    formatter_class = WholeWords
