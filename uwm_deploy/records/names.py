"""Names that become files or folders: one path segment, the same on every system."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

SEGMENT_IS = "letters, digits, dots, dashes and underscores, at most 128, the first one no dot or dash"
"""What a name may be, for messages."""

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


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
