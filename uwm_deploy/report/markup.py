"""Markup that escapes: a string becomes text unless it is `Html`, so data can never become a tag."""

from __future__ import annotations

import html
from collections.abc import Mapping

from uwm_deploy.errors import visible

_VOID = frozenset({"meta", "br", "hr"})


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | Html | None
Value = str | int | float | None
Attributes = Mapping[str, Value]

NOTHING = "\N{EN DASH}"
"""What a table shows where there is no number."""

TIMES = "\N{MULTIPLICATION SIGN}"


def text_of(child: Child) -> str:
    """Markup of a child; strings are escaped, `Html` and None are not text."""
    if child is None:
        return ""
    return child if isinstance(child, Html) else html.escape(visible(child), quote=True)


def tag(name: str, attributes: Attributes | None = None, *children: Child) -> Html:
    """One element; attributes that are None are left out."""
    words = [name]
    for key, value in (attributes or {}).items():
        if value is not None:
            shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
            words.append(f'{key}="{html.escape(visible(shown), quote=True)}"')
    head = f"<{' '.join(words)}>"
    return Html(head if name in _VOID else f"{head}{''.join(map(text_of, children))}</{name}>")


def join(*children: Child) -> Html:
    """Elements one after the other."""
    return Html("".join(map(text_of, children)))


def coded(text: str) -> Html:
    """A sentence in which what stands between backticks is code; with one backtick too many it stays as it is."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return join(text)
    return join(*(tag("code", {}, part) if number % 2 else part for number, part in enumerate(parts)))
