"""What README and docs tell a reader to type: every command and every program of every page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = re.compile(r"not run (?:here|in a test): \w")
"""How a page says so, in a comment behind the command or in the sentence before it, with the reason."""

_PROGRAMS = re.compile(
    r"(?:[A-Z_]+=\S+ +)*(?:\S*/)?(?:uwm-deploy|python3?(?:\.\d+)?|pip|pipx|pytest|torchrun|openssl|model_signing|rm|ln|g\+\+"
    r"|embed|eval|npm|tritonserver|ruff)(?= |$)"
)
_SHELLS = ("sh", "bash", "console")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One line of a shell, or one program in Python."""

    page: str
    line: int
    text: str
    python: bool
    before: str
    """The paragraph above its block."""

    @property
    def is_marked(self) -> bool:
        """The reader is told that it is not run, and why."""
        comment = self.before if self.python else self.text.partition("#")[2] or self.before
        return NOT_RUN.search(comment) is not None

    @property
    def words(self) -> str:
        """Without its comment."""
        return self.text if self.python else re.sub(r"\s+#.*", "", self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block of code of a page: its language (None if it is indented), its lines, and the paragraph above it."""

    line: int
    language: str | None
    lines: list[str]
    before: str


def blocks(text: str) -> Iterator[Block]:
    """Fenced and indented blocks of a page."""
    before, inside, start, after_empty = "", None, 0, True
    found: list[str] = []
    for number, line in enumerate([*text.split("\n"), "end"], start=1):
        if line.lstrip().startswith("```"):
            if inside is None:
                if found:
                    yield Block(line=start, language=None, lines=found, before=before)
                inside, found, start = line.strip("` "), [], number + 1
            else:
                yield Block(line=start, language=inside, lines=found, before=before)
                inside, found = None, []
        elif inside is not None:
            found.append(line)
        elif line.startswith("    ") and (found or after_empty):
            start = start if found else number
            found.append(line)
        elif line.strip():
            if found:
                yield Block(line=start, language=None, lines=found, before=before)
            before, found = line if after_empty or found else f"{before} {line}", []
        after_empty = not line.strip()


def commands(page: Path) -> list[Command]:
    """All that a page tells a reader to type, in order."""
    name, found = page.relative_to(ROOT).as_posix(), []
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python":
            text = "\n".join(block.lines) + "\n"
            found.append(Command(page=name, line=block.line, text=text, python=True, before=block.before))
        elif block.language in (None, "", *_SHELLS):
            joined = re.sub(r"\\\n\s*", "", "\n".join(block.lines))
            lines = (line.strip().removeprefix("$ ") for line in joined.split("\n"))
            found += [
                Command(page=name, line=block.line, text=line, python=False, before=block.before)
                for line in lines
                if line and (block.language in _SHELLS or _PROGRAMS.match(line))
            ]
    return found
