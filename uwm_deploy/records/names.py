"""Names that become files or folders: one path segment, the same on every system."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from uwm_deploy.errors import is_hidden

SEGMENT_IS = "letters, digits, dots, dashes and underscores, at most 128, the first one no dot or dash"
"""What a name may be, for messages."""

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


_JOINERS = "\u200c\u200d"
"""Formatting characters that words of several scripts are written with."""


def hides(text: str) -> bool:
    """Whether a name of data, such as an id, a concept or a key, holds a character that shows nothing."""
    return not text.isprintable() and any(is_hidden(c) and c not in _JOINERS for c in text)


def is_segment(name: str) -> bool:
    """Whether a name is one path segment that stays where it is put."""
    return _SEGMENT.fullmatch(name) is not None


def segment_of(name: str) -> str:
    """The nearest such name to that of any folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-")[:128] or "model"


def is_inside(path: str) -> bool:
    """Whether a path is relative, in its one proper form, and made of such segments."""
    parts = PurePosixPath(path).parts
    return path == "/".join(parts) and bool(parts) and all(map(is_segment, parts))
